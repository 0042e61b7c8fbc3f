// SPDX-License-Identifier: Apache-2.0

// Package batch reads encoded weir.flow.v1.Batch messages in place: the header without the records,
// and the places of the records without decoding them. Relay and observer handle batches only so;
// the bytes that an agent sealed are never encoded again.
//
// All of it takes bytes from outside and bounds what they can cost.
package batch

import (
	"errors"
	"fmt"
	"math"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// Bounds of a batch.
const (
	// MaxRecords is the largest number of records in a batch.
	MaxRecords = 1 << 16
	// MaxBytes is the largest encoded batch; it fits into a NATS message (1 MiB by default) with its headers.
	MaxBytes = 1<<20 - 4096
	// maxHeader bounds the header, and with it the number of namespaces.
	maxHeader = 64 << 10
	// maxNode is the longest node name (a DNS name).
	maxNode = 253
)

// DefaultCluster is the name of a cluster whose batches name none.
const DefaultCluster = "default"

// Header is a decoded weir.flow.v1.BatchHeader.
type Header struct {
	Node       string
	Cluster    string
	Epoch      uint64
	First      uint64
	Count      uint32
	MinTime    int64
	MaxTime    int64
	Namespaces []string
	Verdicts   uint32
	EventTypes uint32
}

// Last returns the number of the last record.
func (h *Header) Last() uint64 { return h.First + uint64(h.Count) - 1 }

// ID returns what names a batch everywhere: node/epoch/first.
func (h *Header) ID() string { return fmt.Sprintf("%s/%d/%d", h.Node, h.Epoch, h.First) }

// Field numbers of weir.flow.v1; a test compares them with the descriptors.
const (
	fieldHeader  protowire.Number = 1
	fieldRecords protowire.Number = 2
	fieldPacked  protowire.Number = 3

	fieldNode       protowire.Number = 1
	fieldEpoch      protowire.Number = 2
	fieldFirst      protowire.Number = 3
	fieldCount      protowire.Number = 4
	fieldMinTime    protowire.Number = 5
	fieldMaxTime    protowire.Number = 6
	fieldNamespaces protowire.Number = 7
	fieldVerdicts   protowire.Number = 8
	fieldEventTypes protowire.Number = 9
	fieldCluster    protowire.Number = 10

	fieldTime       protowire.Number = 1
	fieldFlow       protowire.Number = 2
	fieldAgentEvent protowire.Number = 3
	fieldLoss       protowire.Number = 4
	fieldStats      protowire.Number = 5
)

// ParseHeader decodes and checks the header, which is the first field, and returns the bytes behind it.
func ParseHeader(data []byte) (Header, []byte, error) {
	number, typ, n := protowire.ConsumeTag(data)
	if n < 0 || number != fieldHeader || typ != protowire.BytesType {
		return Header{}, nil, errors.New("batch does not begin with its header")
	}
	raw, m := protowire.ConsumeBytes(data[n:])
	if m < 0 {
		return Header{}, nil, fmt.Errorf("batch header: %w", protowire.ParseError(m))
	}
	if len(raw) > maxHeader {
		return Header{}, nil, fmt.Errorf("batch header has %d bytes, more than %d", len(raw), maxHeader)
	}
	h, err := decodeHeader(raw)
	if err != nil {
		return Header{}, nil, fmt.Errorf("batch header: %w", err)
	}
	if err := h.check(); err != nil {
		return Header{}, nil, fmt.Errorf("batch header: %w", err)
	}
	return h, data[n+m:], nil
}

func decodeHeader(raw []byte) (Header, error) {
	var h Header
	for len(raw) > 0 {
		number, typ, n := protowire.ConsumeTag(raw)
		if n < 0 {
			return h, protowire.ParseError(n)
		}
		raw = raw[n:]
		switch {
		case typ == protowire.BytesType && (number == fieldNode || number == fieldNamespaces || number == fieldCluster):
			value, n := protowire.ConsumeBytes(raw)
			if n < 0 {
				return h, protowire.ParseError(n)
			}
			raw = raw[n:]
			if !utf8.Valid(value) {
				return h, fmt.Errorf("field %d is not UTF-8", number)
			}
			switch number {
			case fieldNode:
				h.Node = string(value)
			case fieldCluster:
				h.Cluster = string(value)
			default:
				h.Namespaces = append(h.Namespaces, string(value))
			}
		case typ == protowire.VarintType:
			value, n := protowire.ConsumeVarint(raw)
			if n < 0 {
				return h, protowire.ParseError(n)
			}
			raw = raw[n:]
			if err := h.setNumber(number, value); err != nil {
				return h, err
			}
		default:
			n := protowire.ConsumeFieldValue(number, typ, raw)
			if n < 0 {
				return h, protowire.ParseError(n)
			}
			raw = raw[n:]
		}
	}
	if h.Cluster == "" {
		h.Cluster = DefaultCluster
	}
	return h, nil
}

func (h *Header) setNumber(number protowire.Number, value uint64) error {
	switch number {
	case fieldEpoch:
		h.Epoch = value
	case fieldFirst:
		h.First = value
	case fieldCount:
		if value > MaxRecords {
			return fmt.Errorf("count %d is more than %d", value, MaxRecords)
		}
		h.Count = uint32(value)
	case fieldMinTime:
		h.MinTime = int64(value)
	case fieldMaxTime:
		h.MaxTime = int64(value)
	case fieldVerdicts:
		h.Verdicts = uint32(value)
	case fieldEventTypes:
		h.EventTypes = uint32(value)
	}
	return nil
}

func (h *Header) check() error {
	switch {
	case h.Node == "" || len(h.Node) > maxNode:
		return errors.New("node is empty or too long")
	case len(h.Cluster) > maxNode:
		return errors.New("cluster is too long")
	case h.Count == 0:
		return errors.New("count is 0")
	case h.First == 0:
		return errors.New("first is 0")
	case h.First > math.MaxUint64-uint64(h.Count):
		return errors.New("first is too large")
	case h.MinTime > h.MaxTime:
		return errors.New("min_time is after max_time")
	}
	return nil
}

// Check decodes the header and walks over the records without looking into them: there are as many
// as the header says, and nothing else.
func Check(data []byte) (Header, error) {
	if len(data) > MaxBytes {
		return Header{}, fmt.Errorf("batch has %d bytes, more than %d", len(data), MaxBytes)
	}
	h, rest, err := ParseHeader(data)
	if err != nil {
		return Header{}, err
	}
	room := rooms.Get().(*[]byte)
	defer rooms.Put(room)
	if rest, *room, err = unpack(*room, rest); err != nil {
		return Header{}, err
	}
	var count uint32
	for len(rest) > 0 {
		_, n, err := nextRecord(rest)
		if err != nil {
			return Header{}, err
		}
		rest = rest[n:]
		count++
	}
	if count != h.Count {
		return Header{}, fmt.Errorf("batch has %d records, its header says %d", count, h.Count)
	}
	return h, nil
}

// nextRecord returns the first record of the bytes, and how many bytes it takes with its tag.
func nextRecord(data []byte) ([]byte, int, error) {
	number, typ, n := protowire.ConsumeTag(data)
	if n < 0 {
		return nil, 0, fmt.Errorf("batch: %w", protowire.ParseError(n))
	}
	if number != fieldRecords || typ != protowire.BytesType {
		return nil, 0, fmt.Errorf("batch has field %d where records are", number)
	}
	record, m := protowire.ConsumeBytes(data[n:])
	if m < 0 {
		return nil, 0, fmt.Errorf("batch record: %w", protowire.ParseError(m))
	}
	return record, n + m, nil
}
