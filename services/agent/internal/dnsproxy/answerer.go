// SPDX-License-Identifier: Apache-2.0

package dnsproxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// answerer sends UDP answers in the servers' names, with headers of its own on raw sockets. A socket bound to a server's address and port would take that
// server's packets when it is a process of this node, and there would have to be one for each server.
type answerer struct {
	v4, v6  int
	buffers sync.Pool
}

const (
	ipv4Header = 20
	ipv6Header = 40
	udpHeader  = 8
	hopLimit   = 64
)

func newAnswerer() (*answerer, error) {
	v4, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		return nil, fmt.Errorf("raw IPv4 socket: %w", err)
	}
	v6, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		v6, err = noSocket, nil
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("raw IPv6 socket: %w", err), unix.Close(v4))
	}
	a := &answerer{v4: v4, v6: v6}
	a.buffers.New = func() any { b := make([]byte, 0, 2048); return &b }
	return a, nil
}

// noSocket: the kernel has no IPv6.
const noSocket = -1

func (a *answerer) close() error {
	err := unix.Close(a.v4)
	if a.v6 != noSocket {
		err = errors.Join(err, unix.Close(a.v6))
	}
	return err
}

// send sends a datagram. What does not fit into a packet is EMSGSIZE.
func (a *answerer) send(from, to netip.AddrPort, msg []byte) error {
	buffer, _ := a.buffers.Get().(*[]byte)
	defer a.buffers.Put(buffer)
	if len(msg) > 0xffff-ipv4Header-udpHeader {
		return unix.EMSGSIZE
	}
	var err error
	if from.Addr().Is4() {
		*buffer = appendIPv4(*buffer, from, to, msg)
		err = unix.Sendto(a.v4, *buffer, unix.MSG_DONTWAIT, &unix.SockaddrInet4{Addr: to.Addr().As4()})
	} else {
		*buffer = appendIPv6(*buffer, from, to, msg)
		err = unix.Sendto(a.v6, *buffer, unix.MSG_DONTWAIT, &unix.SockaddrInet6{Addr: to.Addr().As16()})
	}
	if err != nil {
		return fmt.Errorf("send to %v: %w", to, err)
	}
	return nil
}

// appendIPv4 writes a packet; the kernel adds length, identification and checksum of its header.
func appendIPv4(b []byte, from, to netip.AddrPort, msg []byte) []byte {
	src, dst := from.Addr().As4(), to.Addr().As4()
	b = append(b[:0], 0x45, 0, 0, 0, 0, 0, 0x40, 0, hopLimit, unix.IPPROTO_UDP, 0, 0)
	b = append(append(b, src[:]...), dst[:]...)
	return appendUDP(b, src[:], dst[:], from.Port(), to.Port(), msg)
}

func appendIPv6(b []byte, from, to netip.AddrPort, msg []byte) []byte {
	src, dst := from.Addr().As16(), to.Addr().As16()
	b = append(b[:0], 0x60, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(udpHeader+len(msg)))
	b = append(b, unix.IPPROTO_UDP, hopLimit)
	b = append(append(b, src[:]...), dst[:]...)
	return appendUDP(b, src[:], dst[:], from.Port(), to.Port(), msg)
}

func appendUDP(b, src, dst []byte, from, to uint16, msg []byte) []byte {
	start := len(b)
	size := udpHeader + len(msg)
	for _, x := range []uint16{from, to, uint16(size), 0} {
		b = binary.BigEndian.AppendUint16(b, x)
	}
	b = append(b, msg...)
	sum := sumWords(uint64(unix.IPPROTO_UDP)+uint64(size), src)
	sum = sumWords(sumWords(sum, dst), b[start:])
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	check := ^uint16(sum)
	if check == 0 {
		check = 0xffff
	}
	binary.BigEndian.PutUint16(b[start+6:], check)
	return b
}

// sumWords adds bytes up as the checksum of RFC 1071 does, four at a time.
func sumWords(sum uint64, b []byte) uint64 {
	for ; len(b) >= 4; b = b[4:] {
		sum += uint64(binary.BigEndian.Uint32(b))
	}
	if len(b) >= 2 {
		sum += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		sum += uint64(b[0]) << 8
	}
	return sum
}
