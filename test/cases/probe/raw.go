// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// gone reports whether a socket was closed; other errors are what the network says of single packets.
func gone(_ net.PacketConn, err error) bool { return errors.Is(err, net.ErrClosed) }

func fileGone(err error) bool { return errors.Is(err, os.ErrClosed) }

// ICMP messages that answer.
const (
	echoReply4, echo4 = 0, 8
	echo6, echoReply6 = 128, 129
)

func echoTypes(v4 bool) (ask, reply byte) {
	if v4 {
		return echo4, echoReply4
	}
	return echo6, echoReply6
}

// icmpHeader is type, code, checksum, and four bytes that depend on the type (the echo's identifier and sequence).
const icmpHeader = 8

func icmpProtocol(a netip.Addr) int {
	if a.Is4() {
		return icmp4
	}
	return icmp6
}

// serveICMP notes what comes to an address in a place: messages of the type that they were sent as, and answers to echoes. The place's kernel answers
// the echoes.
func (n *Network) serveICMP(p Place, addr netip.Addr) error {
	local := netip.AddrPortFrom(addr, 0)
	return n.serve(serverKey{p.Name(), icmpProtocol(addr), local}, func() (func(), error) {
		c, err := packetConn(p, unix.SOCK_RAW, icmpProtocol(addr), local)
		if err != nil {
			return nil, err
		}
		n.wait.Go(func() {
			buf := make([]byte, datagramBytes)
			for {
				size, _, err := c.ReadFrom(buf)
				if err != nil {
					if gone(c, err) {
						return
					}
					continue
				}
				n.icmp(p.Name(), addr.Is4(), buf[:size])
			}
		})
		return func() { c.Close() }, nil
	})
}

func (n *Network) icmp(place string, v4 bool, b []byte) {
	t, ok := findToken(b)
	if !ok || len(b) < icmpHeader {
		return
	}
	ask, reply := echoTypes(v4)
	switch b[0] {
	case t[5]:
		n.mail.deliver(place, t)
	case reply:
		if t[5] == ask && t.kind() == request {
			n.mail.deliver(place, t.as(answer))
		}
	}
}

// icmpMessage builds a message. The kernel sums ICMPv6.
func icmpMessage(v4 bool, kind, code byte, rest [4]byte, body []byte) []byte {
	b := make([]byte, icmpHeader, icmpHeader+len(body))
	b[0], b[1] = kind, code
	copy(b[4:], rest[:])
	b = append(b, body...)
	if v4 {
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	}
	return b
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// innerPacket is the beginning of a packet as an ICMP error quotes it, with a token behind.
func innerPacket(protocol int, src, dst netip.AddrPort, rest [4]byte, t token) []byte {
	l4 := make([]byte, 8, 8+tokenSize)
	switch protocol {
	case icmp4, icmp6:
		l4[0], _ = echoTypes(protocol == icmp4)
		copy(l4[4:], rest[:])
	default:
		binary.BigEndian.PutUint16(l4, src.Port())
		binary.BigEndian.PutUint16(l4[2:], dst.Port())
		if protocol == udp {
			binary.BigEndian.PutUint16(l4[4:], 8+tokenSize)
		}
	}
	l4 = append(l4, t[:]...)
	if src.Addr().Is4() {
		h := make([]byte, 20)
		h[0], h[8], h[9] = 0x45, 64, byte(protocol)
		binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(l4)))
		s, d := src.Addr().As4(), dst.Addr().As4()
		copy(h[12:], s[:])
		copy(h[16:], d[:])
		binary.BigEndian.PutUint16(h[10:], checksum(h))
		return append(h, l4...)
	}
	h := make([]byte, 40)
	h[0], h[6], h[7] = 0x60, byte(protocol), 64
	binary.BigEndian.PutUint16(h[4:], uint16(len(l4)))
	s, d := src.Addr().As16(), dst.Addr().As16()
	copy(h[8:], s[:])
	copy(h[24:], d[:])
	return append(h, l4...)
}

// SCTP chunks. Where the kernel has no SCTP, packets are crafted and read by raw sockets: to everything on their way they are what they seem.
const (
	chunkData, chunkInit, chunkInitAck = 0, 1, 2
	sctpHeader                         = 12
	verificationTag                    = 0x77656972
	// An unknown parameter of a chunk, which receivers skip, carries the token.
	tokenParameter = 0x8077
)

func sctpPacket(src, dst uint16, chunk byte, t token) []byte {
	var body []byte
	tag := uint32(verificationTag)
	switch chunk {
	case chunkData:
		body = make([]byte, 12)
		body = append(body, t[:]...)
	default:
		if chunk == chunkInit {
			tag = 0
		}
		body = make([]byte, 16)
		binary.BigEndian.PutUint32(body, verificationTag)
		binary.BigEndian.PutUint32(body[4:], 65536)
		binary.BigEndian.PutUint16(body[8:], 1)
		binary.BigEndian.PutUint16(body[10:], 1)
		body = binary.BigEndian.AppendUint16(body, tokenParameter)
		body = binary.BigEndian.AppendUint16(body, 4+tokenSize)
		body = append(body, t[:]...)
	}
	b := make([]byte, sctpHeader+4, sctpHeader+4+len(body))
	binary.BigEndian.PutUint16(b, src)
	binary.BigEndian.PutUint16(b[2:], dst)
	binary.BigEndian.PutUint32(b[4:], tag)
	b[sctpHeader] = chunk
	if chunk == chunkData {
		b[sctpHeader+1] = 3 // first and last fragment
	}
	binary.BigEndian.PutUint16(b[sctpHeader+2:], uint16(4+len(body)))
	b = append(b, body...)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// serveSCTP notes what comes to a port, and answers requests.
func (n *Network) serveSCTP(f Far) error {
	return n.serve(serverKey{f.Place.Name(), sctp, f.Addr}, func() (func(), error) {
		c, err := packetConn(f.Place, unix.SOCK_RAW, sctp, netip.AddrPortFrom(f.Addr.Addr(), 0))
		if err != nil {
			return nil, err
		}
		n.wait.Go(func() { n.readSCTP(c, f.Place.Name(), f.Addr.Port()) })
		return func() { c.Close() }, nil
	})
}

func (n *Network) readSCTP(c net.PacketConn, place string, port uint16) {
	buf := make([]byte, datagramBytes)
	for {
		size, from, err := c.ReadFrom(buf)
		if err != nil {
			if gone(c, err) {
				return
			}
			continue
		}
		b := buf[:size]
		t, ok := findToken(b)
		if !ok || size < sctpHeader+4 || binary.BigEndian.Uint16(b[2:]) != port {
			continue
		}
		client, chunk := binary.BigEndian.Uint16(b), b[sctpHeader]
		n.mail.remember(t.connection(), func(b []byte) error {
			var t token
			copy(t[:], b)
			_, err := c.WriteTo(sctpPacket(port, client, chunkData, t), from)
			return err
		})
		n.mail.deliver(place, t)
		if t.kind() == request {
			reply := byte(chunkData)
			if chunk == chunkInit {
				reply = chunkInitAck
			}
			_, _ = c.WriteTo(sctpPacket(port, client, reply, t.as(answer)), from)
		}
	}
}
