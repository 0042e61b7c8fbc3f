// SPDX-License-Identifier: Apache-2.0

package dnswire

import (
	"bytes"
	"encoding/binary"
	"math"
	"net/netip"
)

// Answer is an answer as far as the proxy reads it.
type Answer struct {
	RCode     int
	Truncated bool
	// Question is empty (no Wire) in some errors.
	Question
	// Addresses of the name that was asked for, at the end of its chain of aliases; CNAMEs are that chain. Records of other names are left out.
	Addresses []netip.Addr
	CNAMEs    []string
	// Types of all records of the answer section.
	Types []uint16
	// TTL is the lowest of the chain's and the addresses'; of all records when there are no addresses.
	TTL uint32
}

// maxAliases is how long a chain may be; resolvers stop at 8 to 16.
const maxAliases = 16

// Answers reports whether an answer's question is the one that was asked: the same type and class, and the same name but for its case, which some
// servers do not keep. An answer without a question must be an error.
func (a *Answer) Answers(asked []byte) bool {
	if len(a.Wire) == 0 {
		return a.RCode != RCodeSuccess
	}
	if len(a.Wire) != len(asked) {
		return false
	}
	// Label lengths are below 'A': folding changes letters only.
	end := len(asked) - 4
	for i := range end {
		if fold(a.Wire[i]) != fold(asked[i]) {
			return false
		}
	}
	return bytes.Equal(a.Wire[end:], asked[end:])
}

func fold(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// ReadAnswerHead reads an answer's header and question, which is enough to find who waits for it. asked is the name that it likely has, or empty.
func ReadAnswerHead(msg []byte, asked string) (Answer, error) {
	a, _, err := readAnswerHead(msg, asked)
	return a, err
}

func readAnswerHead(msg []byte, asked string) (Answer, int, error) {
	if len(msg) < HeaderSize {
		return Answer{}, 0, ErrFormat
	}
	flags := binary.BigEndian.Uint16(msg[2:])
	if flags&flagResponse == 0 || flags&opcodeMask != 0 {
		return Answer{}, 0, ErrFormat
	}
	a := Answer{RCode: int(flags & 0xf), Truncated: flags&flagTruncated != 0}
	switch binary.BigEndian.Uint16(msg[4:]) {
	case 0:
		return a, HeaderSize, nil
	case 1:
		question, next, err := readQuestion(msg, asked)
		if err != nil {
			return a, 0, err
		}
		a.Question = question
		return a, next, nil
	}
	return a, 0, ErrFormat
}

// few is what most answers have no more records than.
const few = 4

// ReadAnswer reads an answer. Of a truncated one it reads what is whole. asked is the name that it likely answers, or empty. The error is ErrFormat.
func ReadAnswer(msg []byte, asked string) (Answer, error) {
	a, next, err := readAnswerHead(msg, asked)
	if err != nil {
		return a, err
	}
	var addresses [few]address
	c := chain{msg: msg, answer: &a, lowest: math.MaxUint32, addresses: addresses[:0]}
	next, err = c.read(next, sectionCount(msg, 6))
	if err == nil {
		err = a.readRest(msg, next)
	}
	if err != nil && !a.Truncated {
		return a, err
	}
	c.follow()
	return a, nil
}

// readRest looks through authority and additional records for the rest of the code.
func (a *Answer) readRest(msg []byte, next int) error {
	for range sectionCount(msg, 8) + sectionCount(msg, 10) {
		r, err := skipRecord(msg, next)
		if err != nil {
			return err
		}
		if r.kind == TypeOPT {
			a.RCode |= int(r.ttl>>24) << 4
		}
		next = r.next
	}
	return nil
}

// chain follows aliases from the name that was asked for to its addresses.
type chain struct {
	msg       []byte
	answer    *Answer
	lowest    uint32 // TTL of all records
	aliases   []alias
	addresses []address
}

type alias struct {
	owner, target string
	ttl           uint32
}

type address struct {
	owner string
	addr  netip.Addr
	ttl   uint32
}

func (c *chain) read(next, count int) (int, error) {
	lastAt, lastOwner := -1, ""
	if len(c.answer.Wire) > 0 {
		lastAt, lastOwner = HeaderSize, c.answer.Name // the question's
	}
	if count > 0 {
		c.answer.Types = make([]uint16, 0, min(count, few))
	}
	for range count {
		r, err := skipRecord(c.msg, next)
		if err != nil {
			return 0, err
		}
		c.answer.Types = append(c.answer.Types, r.kind)
		c.lowest = min(c.lowest, r.ttl)
		if r.class == classIN && (r.kind == TypeA || r.kind == TypeAAAA || r.kind == TypeCNAME) {
			// Most owners are the same pointer.
			at := next
			if c.msg[next] >= 0xc0 {
				at = int(binary.BigEndian.Uint16(c.msg[next:])) & 0x3fff
			}
			if at != lastAt {
				if lastOwner, _, err = readName(c.msg, next, c.answer.Name); err != nil {
					return 0, err
				}
				lastAt = at
			}
			if err := c.take(r, lastOwner); err != nil {
				return 0, err
			}
		}
		next = r.next
	}
	return next, nil
}

func (c *chain) take(r record, owner string) error {
	data := c.msg[r.data:r.next]
	switch {
	case r.kind == TypeCNAME:
		target, end, err := readName(c.msg, r.data, "")
		if err != nil || end != r.next {
			return ErrFormat
		}
		c.aliases = append(c.aliases, alias{owner, target, r.ttl})
	case r.kind == TypeA && len(data) == 4, r.kind == TypeAAAA && len(data) == 16:
		addr, _ := netip.AddrFromSlice(data)
		c.addresses = append(c.addresses, address{owner, addr.Unmap(), r.ttl})
	default:
		return ErrFormat
	}
	return nil
}

func (c *chain) follow() {
	a := c.answer
	name, ttl := a.Name, uint32(math.MaxUint32)
	for range maxAliases {
		i := c.aliasOf(name)
		if i < 0 {
			break
		}
		name, ttl = c.aliases[i].target, min(ttl, c.aliases[i].ttl)
		a.CNAMEs = append(a.CNAMEs, name)
	}
	for _, x := range c.addresses {
		if x.owner == name && a.Class == classIN {
			if a.Addresses == nil {
				a.Addresses = make([]netip.Addr, 0, len(c.addresses))
			}
			a.Addresses = append(a.Addresses, x.addr)
			ttl = min(ttl, x.ttl)
		}
	}
	if len(a.Addresses) == 0 {
		ttl = c.lowest
	}
	if ttl != math.MaxUint32 {
		a.TTL = ttl
	}
}

func (c *chain) aliasOf(name string) int {
	for i := range c.aliases {
		if c.aliases[i].owner == name {
			return i
		}
	}
	return -1
}
