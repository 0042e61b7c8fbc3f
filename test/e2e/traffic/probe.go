// SPDX-License-Identifier: Apache-2.0

package traffic

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// WhoPort answers, over TCP and UDP, who serves and whom it sees asking.
const WhoPort = 7002

// Who is the answer of WhoPort.
type Who struct {
	// Server is the host name of the one that answered.
	Server string `json:"server"`
	// Client is the address that the server sees.
	Client netip.AddrPort `json:"client"`
}

// Asked is what a client saw of one question to WhoPort.
type Asked struct {
	Who
	// Local is the client's socket's own address, as it knows it.
	Local netip.AddrPort `json:"local"`
	// Peer is what getpeername says; unset for a socket that is not connected.
	Peer netip.AddrPort `json:"peer"`
	// Source is the answer's source by recvfrom; unset for TCP.
	Source netip.AddrPort `json:"source"`
}

// serveWho answers on WhoPort until ctx ends.
func serveWho(ctx context.Context) error {
	var lc net.ListenConfig
	tcp, err := lc.Listen(ctx, "tcp", fmt.Sprintf(":%d", WhoPort))
	if err != nil {
		return fmt.Errorf("serve who: %w", err)
	}
	udp, err := lc.ListenPacket(ctx, "udp", fmt.Sprintf(":%d", WhoPort)) // the last: Ready looks for it
	if err != nil {
		tcp.Close()
		return fmt.Errorf("serve who: %w", err)
	}
	host, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("serve who: %w", err)
	}
	answer := func(client net.Addr) []byte {
		from, _ := netip.ParseAddrPort(client.String())
		b, _ := json.Marshal(Who{host, netip.AddrPortFrom(from.Addr().Unmap(), from.Port())})
		return b
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if n, err := c.Read(make([]byte, 1)); n == 1 && err == nil {
					_, _ = c.Write(answer(c.RemoteAddr()))
				}
			}()
		}
	})
	wg.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			_, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = udp.WriteTo(answer(from), from)
		}
	})
	<-ctx.Done()
	tcp.Close()
	udp.Close()
	wg.Wait()
	return nil
}

// Ask asks WhoPort, or a service in front of it, once. The network is tcp, udp (connected) or udp-unconnected; with -mapped behind it an IPv6
// socket speaks IPv4. It uses bare sockets, so that nothing but the kernel says what it saw.
func Ask(network string, to netip.AddrPort, limit time.Duration) (Asked, error) {
	kind, mapped := strings.CutSuffix(network, "-mapped")
	s, err := newSocket(kind == "tcp", to, mapped, time.Now().Add(limit))
	if err != nil {
		return Asked{}, err
	}
	defer s.close()
	var a Asked
	switch kind {
	case "tcp", "udp":
		if err := s.connect(); err != nil {
			return a, err
		}
		sa, err := unix.Getpeername(s.fd)
		if err != nil {
			return a, fmt.Errorf("getpeername: %w", err)
		}
		a.Peer = addrPort(sa)
		if err := s.send([]byte{1}, nil); err != nil {
			return a, err
		}
	case "udp-unconnected":
		if err := s.send([]byte{1}, s.to); err != nil {
			return a, err
		}
	default:
		return a, fmt.Errorf("ask: network %q: want tcp, udp or udp-unconnected", network)
	}
	sa, err := unix.Getsockname(s.fd)
	if err != nil {
		return a, fmt.Errorf("getsockname: %w", err)
	}
	a.Local = addrPort(sa)
	b, from, err := s.receive()
	if err != nil {
		return a, err
	}
	if from != nil {
		a.Source = addrPort(from)
	}
	if err := json.Unmarshal(b, &a.Who); err != nil {
		return a, fmt.Errorf("answer %q: %w", b, err)
	}
	return a, nil
}

// socket is a bare socket whose waits end at a deadline.
type socket struct {
	fd       int
	to       unix.Sockaddr
	deadline time.Time
}

func newSocket(stream bool, to netip.AddrPort, mapped bool, deadline time.Time) (*socket, error) {
	s := &socket{deadline: deadline}
	family := unix.AF_INET
	if to.Addr().Is6() || mapped {
		family = unix.AF_INET6
		s.to = &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
	} else {
		s.to = &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	}
	kind := unix.SOCK_DGRAM
	if stream {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	s.fd = fd
	return s, nil
}

func (s *socket) close() { unix.Close(s.fd) }

// wait waits for events; it returns those that came.
func (s *socket) wait(events int16) (int16, error) {
	for {
		left := time.Until(s.deadline)
		if left <= 0 {
			return 0, os.ErrDeadlineExceeded
		}
		fds := []unix.PollFd{{Fd: int32(s.fd), Events: events}}
		n, err := unix.Poll(fds, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return 0, fmt.Errorf("poll: %w", err)
		}
		if n > 0 {
			return fds[0].Revents, nil
		}
	}
}

func (s *socket) connect() error {
	err := unix.Connect(s.fd, s.to)
	if errors.Is(err, unix.EINPROGRESS) {
		if _, err := s.wait(unix.POLLOUT); err != nil {
			return fmt.Errorf("connect: %w", err)
		}
		number, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			return fmt.Errorf("connect: %w", err)
		}
		if number != 0 {
			return fmt.Errorf("connect: %w", unix.Errno(number))
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	return nil
}

func (s *socket) send(b []byte, to unix.Sockaddr) error {
	var err error
	if to == nil {
		_, err = unix.Write(s.fd, b)
	} else {
		err = unix.Sendto(s.fd, b, 0, to)
	}
	if err != nil {
		return fmt.Errorf("send: %w", err)
	}
	return nil
}

func (s *socket) receive() ([]byte, unix.Sockaddr, error) {
	if _, err := s.wait(unix.POLLIN); err != nil {
		return nil, nil, fmt.Errorf("receive: %w", err)
	}
	b := make([]byte, 1<<16)
	n, from, err := unix.Recvfrom(s.fd, b, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("receive: %w", err)
	}
	return b[:n], from, nil
}

// addrPort shows an address as the kernel gave it: a mapped IPv4 address stays mapped.
func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return netip.AddrPort{}
}
