// SPDX-License-Identifier: Apache-2.0

package traffic

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Datagram is what became of a UDP datagram that must not be cut.
type Datagram struct {
	// Answered: the server got it and answered.
	Answered bool `json:"answered"`
	// Refused: this host did not even send it; its path is known to be too narrow.
	Refused bool `json:"refused"`
	// TooBig: an ICMP message said so; Type, Code and MTU are its own.
	TooBig bool   `json:"too_big"`
	Type   uint8  `json:"type,omitempty"`
	Code   uint8  `json:"code,omitempty"`
	MTU    uint32 `json:"mtu,omitempty"`
}

// PathMTU sends datagrams of the sizes (IP length) one after the other to the test server with fragmentation forbidden, and says what became of each.
func PathMTU(to netip.Addr, sizes []int) ([]Datagram, error) {
	s, err := newSocket(false, netip.AddrPortFrom(to, UDPPort), false, time.Now().Add(20*time.Second))
	if err != nil {
		return nil, err
	}
	defer s.close()
	level, discover, receive, headers := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_RECVERR, 28
	if to.Is6() {
		level, discover, receive, headers = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_RECVERR, 48
	}
	if err := errors.Join(unix.SetsockoptInt(s.fd, level, discover, unix.IP_PMTUDISC_DO), unix.SetsockoptInt(s.fd, level, receive, 1)); err != nil {
		return nil, fmt.Errorf("path mtu: %w", err)
	}
	if err := s.connect(); err != nil {
		return nil, err
	}
	var all []Datagram
	for _, size := range sizes {
		msg := make([]byte, size-headers)
		binary.BigEndian.PutUint32(msg, 4)
		d, err := s.datagram(msg)
		if err != nil {
			return all, fmt.Errorf("datagram of %d bytes: %w", size, err)
		}
		all = append(all, d)
	}
	return all, nil
}

// datagram sends one and waits for what comes back: an answer or an error message.
func (s *socket) datagram(msg []byte) (Datagram, error) {
	if err := s.send(msg, nil); err != nil {
		if !errors.Is(err, unix.EMSGSIZE) {
			return Datagram{}, err
		}
		_, err := s.errorMessage() // the queue has a local error too
		return Datagram{Refused: true}, err
	}
	events, err := s.wait(unix.POLLIN)
	if err != nil {
		return Datagram{}, err
	}
	if events&unix.POLLERR != 0 {
		d, err := s.errorMessage()
		if err != nil {
			return Datagram{}, err
		}
		// What is left for the next call to report.
		if _, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil {
			return Datagram{}, fmt.Errorf("clear error: %w", err)
		}
		return d, nil
	}
	if _, _, err := unix.Recvfrom(s.fd, make([]byte, 1<<16), 0); err != nil {
		return Datagram{}, fmt.Errorf("receive: %w", err)
	}
	return Datagram{Answered: true}, nil
}

// errorMessage takes a message off the socket's error queue: struct sock_extended_err, linux/errqueue.h.
func (s *socket) errorMessage() (Datagram, error) {
	oob := make([]byte, 512)
	_, n, _, _, err := unix.Recvmsg(s.fd, make([]byte, 1<<16), oob, unix.MSG_ERRQUEUE)
	if err != nil {
		return Datagram{}, fmt.Errorf("error queue: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return Datagram{}, fmt.Errorf("error queue: %w", err)
	}
	for _, m := range messages {
		if len(m.Data) < 16 || (m.Header.Type != unix.IP_RECVERR && m.Header.Type != unix.IPV6_RECVERR) {
			continue
		}
		const originICMP, originICMP6 = 2, 3
		number, origin := binary.NativeEndian.Uint32(m.Data), m.Data[4]
		return Datagram{
			TooBig: unix.Errno(number) == unix.EMSGSIZE && (origin == originICMP || origin == originICMP6),
			Type:   m.Data[5], Code: m.Data[6], MTU: binary.NativeEndian.Uint32(m.Data[8:]),
		}, nil
	}
	return Datagram{}, errors.New("error queue: a message without an extended error")
}

// Transfer sends n bytes over TCP to the test server and takes as many back.
func Transfer(ctx context.Context, to netip.Addr, n int) error {
	c, err := dialTCP(ctx, newNumbers(rand.Uint32()), to, TCPPort)
	if err != nil {
		return err
	}
	defer c.Close()
	return tcpTransfer(c, n, n)
}

// Ping sends a few echoes and waits for each answer.
func Ping(ctx context.Context, to netip.Addr) error {
	return echo(ctx, rand.New(rand.NewPCG(rand.Uint64(), 1)), newNumbers(rand.Uint32()), to)
}
