// SPDX-License-Identifier: Apache-2.0

package batch

import (
	"errors"
	"fmt"
	"math"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"
)

// Kind says what a record is.
type Kind uint8

// Kinds of records.
const (
	// Flow is an encoded flow.Flow.
	Flow Kind = iota + 1
	// AgentEvent is an encoded flow.AgentEvent.
	AgentEvent
	// Loss is an encoded weir.flow.v1.Loss.
	Loss
)

// ref says where a record lies in the batch's bytes.
type ref struct {
	time     int64
	item     uint32
	itemLen  uint32
	stats    uint32
	statsLen uint32
	kind     Kind
}

// Batch is an indexed batch. It is not changed after Parse, so it may be used concurrently; slices
// that it returns belong to it.
type Batch struct {
	Header
	data    []byte
	refs    []ref
	ordered bool
}

// Parse indexes a batch and keeps the bytes, or those that they unpack to. Items are not decoded. The header's times become those
// of the records, since readers skip batches by them.
func Parse(data []byte) (*Batch, error) {
	if len(data) > math.MaxInt32 {
		return nil, errors.New("batch is too large")
	}
	h, rest, err := ParseHeader(data)
	if err != nil {
		return nil, err
	}
	if packed(rest) {
		if rest, _, err = unpack(nil, rest); err != nil {
			return nil, err
		}
		data = rest
	}
	// A record takes at least two bytes, so that a lying header can not make us allocate much.
	if int(h.Count) > len(rest)/2 {
		return nil, fmt.Errorf("batch has no room for the %d records of its header", h.Count)
	}
	b := &Batch{Header: h, data: data, refs: make([]ref, 0, h.Count), ordered: true}
	for len(rest) > 0 {
		raw, n, err := nextRecord(rest)
		if err != nil {
			return nil, err
		}
		if len(b.refs) == int(h.Count) {
			return nil, fmt.Errorf("batch has more records than the %d of its header", h.Count)
		}
		offset := len(data) - len(rest) + n - len(raw)
		r, err := parseRecord(raw, uint32(offset))
		if err != nil {
			return nil, fmt.Errorf("batch record %d: %w", len(b.refs), err)
		}
		if r.time == 0 {
			r.time = h.MaxTime
		}
		if k := len(b.refs); k > 0 && r.time < b.refs[k-1].time {
			b.ordered = false
		}
		b.refs = append(b.refs, r)
		rest = rest[n:]
	}
	if len(b.refs) != int(h.Count) {
		return nil, fmt.Errorf("batch has %d records, its header says %d", len(b.refs), h.Count)
	}
	b.MinTime, b.MaxTime = b.refs[0].time, b.refs[0].time
	for _, r := range b.refs {
		b.MinTime, b.MaxTime = min(b.MinTime, r.time), max(b.MaxTime, r.time)
	}
	return b, nil
}

func parseRecord(raw []byte, offset uint32) (ref, error) {
	var r ref
	size := len(raw)
	for len(raw) > 0 {
		number, typ, n := protowire.ConsumeTag(raw)
		if n < 0 {
			return r, protowire.ParseError(n)
		}
		raw = raw[n:]
		switch {
		case number == fieldTime && typ == protowire.VarintType:
			value, n := protowire.ConsumeVarint(raw)
			if n < 0 {
				return r, protowire.ParseError(n)
			}
			r.time = int64(value)
			raw = raw[n:]
		case typ == protowire.BytesType && number >= fieldFlow && number <= fieldStats:
			value, n := protowire.ConsumeBytes(raw)
			if n < 0 {
				return r, protowire.ParseError(n)
			}
			start := offset + uint32(size-len(raw)+n-len(value))
			if number == fieldStats {
				r.stats, r.statsLen = start, uint32(len(value))
			} else {
				r.item, r.itemLen, r.kind = start, uint32(len(value)), Kind(number-fieldFlow)+Flow
			}
			raw = raw[n:]
		default:
			n := protowire.ConsumeFieldValue(number, typ, raw)
			if n < 0 {
				return r, protowire.ParseError(n)
			}
			raw = raw[n:]
		}
	}
	if r.kind == 0 {
		return r, errors.New("it has no item")
	}
	return r, nil
}

// Len returns the number of records.
func (b *Batch) Len() int { return len(b.refs) }

// Ordered reports whether the records' times never go back.
func (b *Batch) Ordered() bool { return b.ordered }

// Time returns the time of record i, Unix nanoseconds.
func (b *Batch) Time(i int) int64 { return b.refs[i].time }

// Kind returns what record i is.
func (b *Batch) Kind(i int) Kind { return b.refs[i].kind }

// Item returns the encoded item of record i.
func (b *Batch) Item(i int) []byte {
	r := &b.refs[i]
	return b.data[r.item : r.item+r.itemLen : r.item+r.itemLen]
}

// Stats returns the encoded weir.observer.v1.FlowStats of record i; empty = none.
func (b *Batch) Stats(i int) []byte {
	r := &b.refs[i]
	return b.data[r.stats : r.stats+r.statsLen : r.stats+r.statsLen]
}

// Size returns the memory that the batch holds, in bytes.
func (b *Batch) Size() int {
	return cap(b.data) + cap(b.refs)*int(unsafe.Sizeof(ref{})) + int(unsafe.Sizeof(*b))
}

// Extract returns a batch of record i alone, with a copy of its bytes and the number that it has.
func (b *Batch) Extract(i int) *Batch {
	r := b.refs[i]
	single := &Batch{Header: b.Header, ordered: true}
	single.First, single.Count = b.First+uint64(i), 1
	single.MinTime, single.MaxTime = r.time, r.time
	single.data = append(append(make([]byte, 0, r.itemLen+r.statsLen), b.Item(i)...), b.Stats(i)...)
	r.item, r.stats = 0, r.itemLen
	single.refs = []ref{r}
	return single
}
