// SPDX-License-Identifier: Apache-2.0

// Package dnswire reads of DNS messages what the proxy decides by, straight from the wire, and writes the few answers that the proxy gives itself.
// Messages pass the proxy as they are, so that nothing that it has not read is lost or changed; so it must read exactly what client and server read,
// and refuses what can be read in two ways.
package dnswire

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Sizes of the wire format.
const (
	HeaderSize = 12
	// MaxSize of a message.
	MaxSize = 65535

	maxName = 255
)

// Types, classes and codes that the proxy knows.
const (
	TypeA     uint16 = 1
	TypeCNAME uint16 = 5
	TypeAAAA  uint16 = 28
	TypeOPT   uint16 = 41
	TypeTSIG  uint16 = 250
	TypeIXFR  uint16 = 251
	TypeAXFR  uint16 = 252

	classIN uint16 = 1

	RCodeSuccess        = 0
	RCodeFormatError    = 1
	RCodeServerFailure  = 2
	RCodeNameError      = 3
	RCodeNotImplemented = 4
	RCodeRefused        = 5
)

const (
	flagResponse  = 0x8000
	flagTruncated = 0x0200
	flagDesired   = 0x0100 // recursion
	flagAvailable = 0x0080 // recursion
	opcodeMask    = 0x7800
)

var (
	// ErrIgnore says that it is no query at all (too short, or an answer); nothing is said to the sender.
	ErrIgnore = errors.New("not a query")
	// ErrFormat says that it cannot be read, or in two ways.
	ErrFormat = errors.New("malformed message")
	// ErrNotImplemented says that it is another operation than a query.
	ErrNotImplemented = errors.New("operation is not QUERY")
)

// Question is what is asked.
type Question struct {
	// Name in lower case with the trailing dot; what is no ordinary character is escaped, so that a dot in a label is no dot here.
	Name        string
	Type, Class uint16
	// Wire is the question section as it was asked; it aliases the message.
	Wire []byte
}

// Query is a query as far as the proxy reads it.
type Query struct {
	ID uint16
	Question
	// EDNS: the query has an OPT record.
	EDNS bool
	// size is where the OPT record says how much the client takes; 0 = nowhere.
	size   int
	signed bool
}

// ID returns the number of a message of at least HeaderSize bytes.
func ID(msg []byte) uint16 { return binary.BigEndian.Uint16(msg) }

// SetID replaces it.
func SetID(msg []byte, id uint16) { binary.BigEndian.PutUint16(msg, id) }

// ReadQuery reads a query. The error is ErrIgnore, ErrFormat or ErrNotImplemented.
func ReadQuery(msg []byte) (Query, error) {
	if len(msg) < HeaderSize || binary.BigEndian.Uint16(msg[2:])&flagResponse != 0 {
		return Query{}, ErrIgnore
	}
	q := Query{ID: ID(msg)}
	if binary.BigEndian.Uint16(msg[2:])&opcodeMask != 0 {
		return q, ErrNotImplemented
	}
	if binary.BigEndian.Uint16(msg[4:]) != 1 {
		return q, ErrFormat
	}
	question, next, err := readQuestion(msg, "")
	if err != nil {
		return q, err
	}
	q.Question = question
	records := sectionCount(msg, 6) + sectionCount(msg, 8) + sectionCount(msg, 10)
	for range records {
		r, err := skipRecord(msg, next)
		if err != nil {
			return q, err
		}
		switch r.kind {
		case TypeOPT:
			if q.EDNS {
				return q, ErrFormat
			}
			q.EDNS, q.size = true, r.data-8
		case TypeTSIG:
			q.signed = true
		}
		next = r.next
	}
	if next != len(msg) {
		return q, ErrFormat
	}
	return q, nil
}

// LimitSize makes a query ask for UDP answers of at most size bytes, so that they need no fragments. A signed query is left alone.
func (q *Query) LimitSize(msg []byte, size uint16) {
	if q.EDNS && !q.signed && binary.BigEndian.Uint16(msg[q.size:]) > size {
		binary.BigEndian.PutUint16(msg[q.size:], size)
	}
}

func sectionCount(msg []byte, at int) int { return int(binary.BigEndian.Uint16(msg[at:])) }

// readQuestion reads the one question of a message. Its name has no pointer: there is nothing before it to point to. likely is as of readName.
func readQuestion(msg []byte, likely string) (Question, int, error) {
	name, next, err := readName(msg, HeaderSize, likely)
	if err != nil {
		return Question{}, 0, err
	}
	if len(msg) < next+4 {
		return Question{}, 0, ErrFormat
	}
	return Question{
		Name: name, Type: binary.BigEndian.Uint16(msg[next:]), Class: binary.BigEndian.Uint16(msg[next+2:]), Wire: msg[HeaderSize : next+4],
	}, next + 4, nil
}

// record is a resource record whose owner was not read.
type record struct {
	kind, class uint16
	ttl         uint32
	data, next  int // where its data begins and ends
}

func skipRecord(msg []byte, at int) (record, error) {
	at, err := skipName(msg, at)
	if err != nil {
		return record{}, err
	}
	if len(msg) < at+10 {
		return record{}, ErrFormat
	}
	r := record{
		kind: binary.BigEndian.Uint16(msg[at:]), class: binary.BigEndian.Uint16(msg[at+2:]), ttl: binary.BigEndian.Uint32(msg[at+4:]), data: at + 10,
	}
	r.next = r.data + int(binary.BigEndian.Uint16(msg[at+8:]))
	if r.next > len(msg) {
		return record{}, ErrFormat
	}
	return r, nil
}

func skipName(msg []byte, at int) (int, error) {
	for size := 1; at < len(msg) && size <= maxName; {
		n := int(msg[at])
		switch {
		case n == 0:
			return at + 1, nil
		case n >= 0xc0:
			if at+2 > len(msg) {
				return 0, ErrFormat
			}
			return at + 2, nil
		case n >= 0x40:
			return 0, ErrFormat
		}
		at += 1 + n
		size += 1 + n
	}
	return 0, ErrFormat
}

// readName returns a name in lower case with a trailing dot, and where it ends. A pointer leads back, never forward: so none leads round. likely is what
// is returned if the name is the same: most names of an answer are known from its query.
func readName(msg []byte, at int, likely string) (string, int, error) {
	var buf [4 * maxName]byte
	out := buf[:0]
	next, limit, size := 0, at, 1
	for {
		if at >= len(msg) {
			return "", 0, ErrFormat
		}
		n := int(msg[at])
		switch {
		case n == 0:
			if next == 0 {
				next = at + 1
			}
			switch {
			case len(out) == 0:
				return ".", next, nil
			case string(out) == likely:
				return likely, next, nil
			}
			return string(out), next, nil
		case n >= 0xc0:
			if at+2 > len(msg) {
				return "", 0, ErrFormat
			}
			if next == 0 {
				next = at + 2
			}
			at = int(binary.BigEndian.Uint16(msg[at:])) & 0x3fff
			if at >= limit || at < HeaderSize {
				return "", 0, ErrFormat
			}
			limit = at
			continue
		case n >= 0x40:
			return "", 0, ErrFormat
		}
		size += 1 + n
		if at+1+n > len(msg) || size > maxName {
			return "", 0, ErrFormat
		}
		out = appendLabel(out, msg[at+1:at+1+n])
		at += 1 + n
	}
}

// appendLabel writes a label as text, as zone files have it, and a dot. There is no space in it.
func appendLabel(out, label []byte) []byte {
	for _, c := range label {
		switch {
		case c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_':
			out = append(out, c)
		case c >= 'A' && c <= 'Z':
			out = append(out, c+'a'-'A')
		case c == '.' || c == '\'' || c == '@' || c == ';' || c == '(' || c == ')' || c == '"' || c == '\\':
			out = append(out, '\\', c)
		case c <= ' ' || c > '~':
			out = fmt.Appendf(out, "\\%03d", c)
		default:
			out = append(out, c)
		}
	}
	return append(out, '.')
}
