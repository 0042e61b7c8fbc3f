// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"encoding/binary"
	"net/netip"

	"github.com/weirmesh/weir/internal/policy"
)

// frame is a packet as a program run takes it. Checksums of the upper protocols are left out: no program looks at them.
type frame struct {
	src, dst     netip.Addr
	protocol     uint8
	sport, dport uint16 // of ICMP, sport is the identifier
	icmpType     uint8
	icmpCode     uint8
	answer       bool // the second packet of its connection
	goesOn       bool // a later one
}

// reply is the answer to a frame, if its protocol has one.
func (f frame) reply() (frame, bool) {
	r := f
	r.src, r.dst, r.sport, r.dport, r.answer = f.dst, f.src, f.dport, f.sport, true
	switch {
	case f.protocol != policy.ICMP && f.protocol != policy.ICMPv6:
	case f.protocol == policy.ICMP && f.icmpType == 8:
		r.icmpType, r.sport = 0, f.sport
	case f.protocol == policy.ICMPv6 && f.icmpType == 128:
		r.icmpType, r.sport = 129, f.sport
	default:
		return r, false
	}
	return r, true
}

// message is an ICMP frame without what tells it from its like.
func (f frame) message() frame {
	f.sport = 0
	return f
}

func (f frame) bytes() []byte {
	payload := f.payload()
	b := []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 10}
	if f.src.Is4() {
		b = append(b, 8, 0, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(20+len(payload)))
		b = append(b, 0, 1, 0, 0, 64, f.protocol, 0, 0)
	} else {
		b = append(b, 0x86, 0xdd, 0x60, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(len(payload)))
		b = append(b, f.protocol, 64)
	}
	b = append(b, f.src.AsSlice()...)
	b = append(b, f.dst.AsSlice()...)
	return append(b, payload...)
}

func (f frame) payload() []byte {
	var b []byte
	if f.protocol != policy.ICMP && f.protocol != policy.ICMPv6 {
		b = binary.BigEndian.AppendUint16(b, f.sport)
		b = binary.BigEndian.AppendUint16(b, f.dport)
	}
	switch f.protocol {
	case policy.TCP:
		const syn, ack = 2, 16
		flags := byte(syn)
		if f.answer {
			flags |= ack
		}
		if f.goesOn {
			flags = ack
		}
		return append(b, 0, 0, 0, 1, 0, 0, 0, 2, 5<<4, flags, 16, 0, 0, 0, 0, 0)
	case policy.UDP:
		return append(b, 0, 12, 0, 0, 'w', 'e', 'i', 'r')
	case policy.SCTP:
		const chunkData, chunkInit, chunkInitAck = 0, 1, 2
		chunk := byte(chunkInit)
		if f.answer {
			chunk = chunkInitAck
		}
		if f.goesOn {
			chunk = chunkData
		}
		b = append(b, 0, 0, 0, 0, 0, 0, 0, 0) // tag, checksum
		return append(b, chunk, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1)
	}
	b = append(b, f.icmpType, f.icmpCode, 0, 0)
	b = binary.BigEndian.AppendUint16(b, f.sport) // the identifier of an echo
	return append(b, make([]byte, 50)...)
}
