// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"errors"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// Entries are decoded by hand: of each only what makes a flow, in place. The generated code, which makes every message, map and text of every entry, took
// more than a third of the agent's processor time. It is the test's oracle.

// Tags as they lie on the wire: number << 3 | type (0 varint, 2 bytes).
const (
	messageIdentifier = 1<<3 | 2
	messageHTTP       = 2<<3 | 2
	messageTCP        = 3<<3 | 2
	identifierLogName = 2<<3 | 2
	entriesEntry      = 1<<3 | 2

	entryCommon   = 1<<3 | 2
	entryProtocol = 2 << 3
	entryRequest  = 3<<3 | 2
	entryResponse = 4<<3 | 2

	commonRemote   = 2<<3 | 2
	commonLocal    = 3<<3 | 2
	commonTLS      = 4<<3 | 2
	commonStart    = 5<<3 | 2
	commonLastRx   = 10<<3 | 2
	commonFirstTx  = 11<<3 | 2
	commonLastTx   = 12<<3 | 2
	commonMetadata = 17<<3 | 2
	commonTags     = 22<<3 | 2
	commonDuration = 23<<3 | 2
	commonDetails  = 25<<3 | 2
	commonStreamID = 26<<3 | 2
	commonType     = 33 << 3

	requestMethod    = 1 << 3
	requestScheme    = 2<<3 | 2
	requestAuthority = 3<<3 | 2
	requestPath      = 5<<3 | 2
	requestAgent     = 6<<3 | 2
	requestReferer   = 7<<3 | 2
	requestForwarded = 8<<3 | 2
	requestID        = 9<<3 | 2
	requestHeaders   = 13<<3 | 2

	responseCode     = 1<<3 | 2
	responseHeaders  = 4<<3 | 2
	responseTrailers = 5<<3 | 2
	responseDetails  = 6<<3 | 2

	tlsServerName = 3<<3 | 2

	addressSocket, addressPipe, addressInternal = 1<<3 | 2, 2<<3 | 2, 3<<3 | 2
	socketAddress, socketPort, socketNamedPort  = 2<<3 | 2, 3 << 3, 4<<3 | 2

	metadataFilter = 1<<3 | 2
	structFields   = 1<<3 | 2
	// The kinds of a google.protobuf.Value.
	valueNull, valueNumber, valueText, valueBool, valueStruct, valueList = 1 << 3, 2<<3 | 1, 3<<3 | 2, 4 << 3, 5<<3 | 2, 6<<3 | 2

	// Of an entry of a map, and of a message with one value.
	mapKey, mapValue = 1<<3 | 2, 2<<3 | 2
	wrapped          = 1 << 3
	// Of timestamps and durations.
	timeSeconds, timeNanos = 1 << 3, 2 << 3
)

var errUTF8 = errors.New("a text is not UTF-8")

// field is one of a message: number is a varint's value, bytes those of texts and messages. Of other types only the tag is there.
type field struct {
	tag    uint64
	number uint64
	bytes  []byte
}

// fields gives each field of a message to f.
func fields(raw []byte, f func(x field) error) error {
	for len(raw) > 0 {
		if x, n := short(raw); n > 0 {
			raw = raw[n:]
			if err := f(x); err != nil {
				return err
			}
			continue
		}
		number, typ, n := protowire.ConsumeTag(raw)
		if n < 0 {
			return protowire.ParseError(n)
		}
		raw = raw[n:]
		x := field{tag: uint64(number)<<3 | uint64(typ)} //nolint:gosec // neither is negative
		switch typ {
		case protowire.VarintType:
			x.number, n = protowire.ConsumeVarint(raw)
		case protowire.BytesType:
			x.bytes, n = protowire.ConsumeBytes(raw)
		default:
			n = protowire.ConsumeFieldValue(number, typ, raw)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		raw = raw[n:]
		if err := f(x); err != nil {
			return err
		}
	}
	return nil
}

// short reads a field of bytes whose tag and length have one byte each, as most have; n = 0: it is another one.
func short(raw []byte) (x field, n int) {
	if len(raw) < 2 || raw[0] >= 0x80 || raw[0] < 1<<3 || raw[0]&7 != byte(protowire.BytesType) || raw[1] >= 0x80 {
		return field{}, 0
	}
	if n = 2 + int(raw[1]); n > len(raw) {
		return field{}, 0
	}
	return field{tag: uint64(raw[0]), bytes: raw[2:n]}, n
}

// text takes a text, which must be UTF-8.
func (x *field) text(to *[]byte) error {
	if !utf8.Valid(x.bytes) {
		return errUTF8
	}
	*to = x.bytes
	return nil
}

// part is a message inside another one. One that comes in several pieces is these in a row: so merging is defined.
type part struct {
	raw []byte
	set bool
}

func (p *part) add(raw []byte) {
	if !p.set {
		p.raw, p.set = raw, true
		return
	}
	p.raw = append(p.raw[:len(p.raw):len(p.raw)], raw...)
}

// envelope is a StreamAccessLogsMessage.
type envelope struct {
	identified bool
	logName    []byte
	tcp        bool
	entries    [][]byte
}

func (e *envelope) decode(raw []byte) error {
	*e = envelope{entries: e.entries[:0]}
	return fields(raw, func(x field) error {
		switch x.tag {
		case messageIdentifier:
			e.identified = true
			return fields(x.bytes, func(x field) error {
				if x.tag == identifierLogName {
					return x.text(&e.logName)
				}
				return nil
			})
		case messageHTTP, messageTCP:
			// One of the two: the later one counts.
			if tcp := x.tag == messageTCP; tcp != e.tcp {
				e.tcp, e.entries = tcp, e.entries[:0]
			}
			return fields(x.bytes, func(x field) error {
				if x.tag == entriesEntry {
					e.entries = append(e.entries, x.bytes)
				}
				return nil
			})
		}
		return nil
	})
}

// pair is an entry of a map of texts.
type pair struct{ key, value []byte }

func (p *pair) decode(raw []byte) error {
	*p = pair{}
	// Nearly all are a short key and a short value.
	if key, n := short(raw); n > 0 && key.tag == mapKey {
		if value, m := short(raw[n:]); m > 0 && value.tag == mapValue && n+m == len(raw) {
			if err := key.text(&p.key); err != nil {
				return err
			}
			return value.text(&p.value)
		}
	}
	return fields(raw, func(x field) error {
		switch x.tag {
		case mapKey:
			return x.text(&p.key)
		case mapValue:
			return x.text(&p.value)
		}
		return nil
	})
}

// moment is a Timestamp or a Duration.
type moment struct {
	set     bool
	seconds int64
	nanos   int32
}

func (m *moment) merge(raw []byte) error {
	m.set = true
	return fields(raw, func(x field) error {
		switch x.tag {
		case timeSeconds:
			m.seconds = int64(x.number) //nolint:gosec // as the wire has negative numbers
		case timeNanos:
			m.nanos = int32(x.number) //nolint:gosec // as the generated code cuts it
		}
		return nil
	})
}
