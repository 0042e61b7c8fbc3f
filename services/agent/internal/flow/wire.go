// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"net/netip"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// Tags of flow.Flow as they lie on the wire: number << 3 | type (0 varint, 1 fixed64, 2 bytes). Those above 15 take two bytes or more.
const (
	tagTime          = 1<<3 | 2
	tagVerdict       = 2 << 3
	tagDropReason    = 3 << 3
	tagEthernet      = 4<<3 | 2
	tagIP            = 5<<3 | 2
	tagL4            = 6<<3 | 2
	tagSource        = 8<<3 | 2
	tagDestination   = 9<<3 | 2
	tagType          = 10 << 3
	tagNodeName      = 11<<3 | 2
	tagSourceNames   = 13<<3 | 2
	tagDestNames     = 14<<3 | 2
	tagL7            = 15<<3 | 2
	tagReply         = 16 << 3
	tagEventType     = 19<<3 | 2
	tagSourceService = 20<<3 | 2
	tagDestService   = 21<<3 | 2
	tagDirection     = 22 << 3
	tagPoint         = 24 << 3
	tagDropDesc      = 25 << 3
	tagIsReply       = 26<<3 | 2
	tagInterface     = 28<<3 | 2
	tagProxyPort     = 29 << 3
	tagTraceContext  = 30<<3 | 2
	tagSockPoint     = 31 << 3
	tagCookie        = 32 << 3
	tagCgroup        = 33 << 3
	tagUUID          = 34<<3 | 2
	tagTraceReason   = 36 << 3
	tagNodeLabels    = 37<<3 | 2
	tagEmitter       = 41<<3 | 2
	tagSummary       = 100000<<3 | 2
)

// Tags of the record of flow.Layer7.
const (
	tagDNS  = 100<<3 | 2
	tagHTTP = 101<<3 | 2
)

// appendTag appends a tag known at compile time; one byte up to number 15, two up to 2047.
func appendTag(b []byte, tag uint32) []byte {
	switch {
	case tag < 1<<7:
		return append(b, byte(tag))
	case tag < 1<<14:
		return append(b, byte(tag)|0x80, byte(tag>>7))
	}
	return protowire.AppendVarint(b, uint64(tag))
}

// appendLength appends a length, most of which take one byte.
func appendLength(b []byte, n int) []byte {
	if n < 1<<7 {
		return append(b, byte(n))
	}
	return protowire.AppendVarint(b, uint64(n))
}

func appendVarintField(b []byte, tag uint32, v uint64) []byte {
	if v == 0 {
		return b
	}
	b = appendTag(b, tag)
	if v < 1<<7 {
		return append(b, byte(v))
	}
	return protowire.AppendVarint(b, v)
}

func appendBytesField(b []byte, tag uint32, v []byte) []byte {
	return append(appendLength(appendTag(b, tag), len(v)), v...)
}

func appendStringField(b []byte, tag uint32, v string) []byte {
	if v == "" {
		return b
	}
	return append(appendLength(appendTag(b, tag), len(v)), v...)
}

// begin opens a nested message whose length fits one byte; end closes it. The caller knows that it does.
func begin(b []byte, tag uint32) ([]byte, int) {
	b = append(appendTag(b, tag), 0)
	return b, len(b)
}

func end(b []byte, start int) []byte {
	n := len(b) - start
	if n < 0x80 {
		b[start-1] = byte(n)
		return b
	}
	// Longer than expected: make room for the second and further bytes of the length.
	extra := protowire.SizeVarint(uint64(n)) - 1
	for range extra {
		b = append(b, 0)
	}
	copy(b[start+extra:], b[start:len(b)-extra])
	protowire.AppendVarint(b[start-1:start-1], uint64(n))
	return b
}

func appendTimestamp(b []byte, tag uint32, unixNano int64) []byte {
	b, start := begin(b, tag)
	seconds, nanos := unixNano/1e9, unixNano%1e9
	if nanos < 0 {
		seconds, nanos = seconds-1, nanos+1e9
	}
	b = appendVarintField(b, 1<<3, uint64(seconds))
	b = appendVarintField(b, 2<<3, uint64(nanos))
	return end(b, start)
}

const hexDigits = "0123456789abcdef"

func appendMAC(b []byte, tag uint32, mac *[6]byte) []byte {
	if *mac == [6]byte{} {
		return b
	}
	b = append(appendTag(b, tag), 17)
	for i, x := range mac {
		if i > 0 {
			b = append(b, ':')
		}
		b = append(b, hexDigits[x>>4], hexDigits[x&15])
	}
	return b
}

// uuids makes UUIDs of version 8 (RFC 9562: contents are the maker's): random bits of the process, then a counter.
type uuids struct {
	prefix [19]byte // xxxxxxxx-xxxx-8xxx-
	count  uint64
}

func newUUIDs(random [8]byte) uuids {
	var u uuids
	at := 0
	for i := range 16 {
		if i == 8 || i == 12 {
			u.prefix[at] = '-'
			at++
		}
		x := random[i/2] >> (4 * (1 - i%2)) & 15
		if i == 12 {
			x = 8 // version
		}
		u.prefix[at] = hexDigits[x]
		at++
	}
	u.prefix[18] = '-'
	return u
}

func (u *uuids) append(b []byte) []byte {
	u.count++
	c := u.count
	b = append(b, u.prefix[:]...)
	b = append(b, 'a', hexDigits[c>>56&15], hexDigits[c>>52&15], hexDigits[c>>48&15], '-') // a = variant 10xx
	for shift := 44; shift >= 0; shift -= 4 {
		b = append(b, hexDigits[c>>shift&15])
	}
	return b
}

// Bits of the TCP header's flags byte, in the order in which Hubble's summary names them.
var summaryOrder = [...]struct {
	bit  byte
	name string
}{{2, "SYN"}, {16, "ACK"}, {4, "RST"}, {1, "FIN"}, {8, "PSH"}, {32, "URG"}, {64, "ECE"}, {128, "CWR"}}

func tcpSummary(flags byte) string {
	var names []string
	for _, f := range summaryOrder {
		if flags&f.bit != 0 {
			names = append(names, f.name)
		}
	}
	return "TCP Flags: " + strings.Join(names, ", ")
}

// tcpFlags encodes flow.TCPFlags: fields 1..8 are FIN SYN RST PSH ACK URG ECE CWR, which is the order of the bits.
func tcpFlags(flags byte) []byte {
	b := []byte{} // not nil: without any flag the message is there and empty
	for i := range 8 {
		if flags>>i&1 != 0 {
			b = append(b, byte(i+1)<<3, 1)
		}
	}
	return b
}

// addrOf turns the kernel's 16 bytes into an address, IPv4 unmapped.
func addrOf(a [16]byte) netip.Addr { return netip.AddrFrom16(a).Unmap() }
