// SPDX-License-Identifier: Apache-2.0

package dnsproxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/services/agent/internal/mmsg"
)

// answerer sends UDP answers in the servers' names, with headers of its own on raw sockets. A socket bound to a server's address and port would take that
// server's packets when it is a process of this node, and there would have to be one for each server.
type answerer struct {
	v4, v6 int
	single sync.Pool // of *answers for one
}

// answers gathers answers of one family, which are sent with one call.
type answers struct {
	sender  *mmsg.Sender
	queries []*query
	packets []byte // grows; those that wait stay where they are
	v6      bool
}

func newAnswers(count int) *answers { return &answers{sender: mmsg.NewSender(count)} }

// add adds an answer to a query. False: it does not fit into a packet, or not to those that wait.
func (x *answers) add(q *query, msg []byte) bool {
	if !x.put(q.server, q.client, msg) {
		return false
	}
	x.queries = append(x.queries, q)
	return true
}

func (x *answers) put(from, to netip.AddrPort, msg []byte) bool {
	v6 := !from.Addr().Is4()
	if len(msg) > 0xffff-ipv4Header-udpHeader || x.sender.Full() || x.sender.Len() > 0 && x.v6 != v6 {
		return false
	}
	x.v6 = v6
	start := len(x.packets)
	if v6 {
		x.packets = appendIPv6(x.packets, from, to, msg)
	} else {
		x.packets = appendIPv4(x.packets, from, to, msg)
	}
	x.sender.Add(x.packets[start:], to.Addr())
	return true
}

func (x *answers) reset() {
	x.sender.Reset()
	clear(x.queries)
	x.queries, x.packets = x.queries[:0], x.packets[:0]
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
	a.single.New = func() any { return newAnswers(1) }
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
	x, _ := a.single.Get().(*answers)
	defer a.single.Put(x)
	defer x.reset()
	if !x.put(from, to, msg) {
		return unix.EMSGSIZE
	}
	var err error
	if !x.sender.Send(a.socket(x), func(_ int, sendErr error) bool { err = sendErr; return false }) {
		err = unix.EAGAIN
	}
	if err != nil {
		return fmt.Errorf("send to %v: %w", to, err)
	}
	return nil
}

func (a *answerer) socket(x *answers) uintptr {
	if x.v6 {
		return uintptr(a.v6)
	}
	return uintptr(a.v4)
}

// flush sends what waits. unsent is told of each that could not be sent.
func (a *answerer) flush(x *answers, unsent func(q *query, err error)) {
	defer x.reset()
	if x.sender.Len() == 0 {
		return
	}
	if !x.sender.Send(a.socket(x), func(i int, err error) bool { unsent(x.queries[i], err); return false }) {
		for _, q := range x.queries[x.sender.Sent():] {
			unsent(q, unix.EAGAIN)
		}
	}
}

// appendIPv4 appends a packet; the kernel adds length, identification and checksum of its header.
func appendIPv4(b []byte, from, to netip.AddrPort, msg []byte) []byte {
	src, dst := from.Addr().As4(), to.Addr().As4()
	b = append(b, 0x45, 0, 0, 0, 0, 0, 0x40, 0, hopLimit, unix.IPPROTO_UDP, 0, 0)
	b = append(append(b, src[:]...), dst[:]...)
	return appendUDP(b, src[:], dst[:], from.Port(), to.Port(), msg)
}

func appendIPv6(b []byte, from, to netip.AddrPort, msg []byte) []byte {
	src, dst := from.Addr().As16(), to.Addr().As16()
	b = append(b, 0x60, 0, 0, 0)
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
