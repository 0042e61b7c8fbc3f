// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const backlog = 128

// serveTCP listens and answers requests.
func (n *Network) serveTCP(f Far) error {
	return n.serve(serverKey{f.Place.Name(), tcp, f.Addr}, func() (func(), error) {
		fd, err := bound(f.Place, unix.SOCK_STREAM, 0, f.Addr)
		if err != nil {
			return nil, err
		}
		if err := unix.Listen(fd, backlog); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("listen on %s in %s: %w", f.Addr, f.Place.Name(), err)
		}
		file := os.NewFile(uintptr(fd), "listener")
		l, err := net.FileListener(file)
		file.Close()
		if err != nil {
			return nil, fmt.Errorf("listen on %s in %s: %w", f.Addr, f.Place.Name(), err)
		}
		n.wait.Go(func() { n.accept(l, f.Place.Name()) })
		return func() { l.Close() }, nil
	})
}

func (n *Network) accept(l net.Listener, place string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			r := bufio.NewReader(c)
			if first, err := r.Peek(len(magic)); err != nil || !bytes.Equal(first, magic) {
				n.speak(c, r)
				return
			}
			var t token
			for {
				if _, err := io.ReadFull(r, t[:]); err != nil {
					return
				}
				n.mail.remember(t.connection(), func(b []byte) error {
					_, err := c.Write(b)
					return err
				})
				n.mail.deliver(place, t)
				if back := t.as(answer); t.kind() == request {
					if _, err := c.Write(back[:]); err != nil {
						return
					}
				}
			}
		}()
	}
}

// stream is the client of a TCP connection.
type stream struct {
	file *os.File
	send chan []byte
	// stands is set when the connection does.
	stands atomic.Bool
}

// dialTCP begins to connect, and reads what comes back.
func (n *Network) dialTCP(p Place, local, to netip.AddrPort) (*stream, error) {
	fd, err := bound(p, unix.SOCK_STREAM, 0, local)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return nil, fmt.Errorf("connect %s to %s in %s: %w", local, to, p.Name(), err)
	}
	s := &stream{file: os.NewFile(uintptr(fd), "connection"), send: make(chan []byte, 16)}
	n.wait.Go(func() {
		for b := range s.send {
			// Before the connection stands, this waits for it.
			if _, err := s.file.Write(b); err != nil {
				return
			}
			s.stands.Store(true)
			n.mail.notify()
		}
	})
	n.wait.Go(func() {
		var t token
		for {
			if _, err := io.ReadFull(s.file, t[:]); err != nil {
				return
			}
			n.mail.deliver(p.Name(), t)
		}
	})
	return s, nil
}

func (s *stream) write(b []byte) { s.send <- b }

func (s *stream) close() {
	close(s.send)
	// A reset, so that nothing of this connection is in the way of the next.
	if raw, err := s.file.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			_ = unix.SetsockoptLinger(int(fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		})
	}
	s.file.Close()
}
