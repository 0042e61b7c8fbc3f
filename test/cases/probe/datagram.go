// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

const datagramBytes = 2048

// serveUDP answers requests.
func (n *Network) serveUDP(f Far) error {
	return n.serve(serverKey{f.Place.Name(), udp, f.Addr}, func() (func(), error) {
		c, err := packetConn(f.Place, unix.SOCK_DGRAM, 0, f.Addr)
		if err != nil {
			return nil, err
		}
		n.wait.Go(func() {
			buf := make([]byte, datagramBytes)
			for {
				size, from, err := c.ReadFrom(buf)
				if err != nil {
					if gone(c, err) {
						return
					}
					continue
				}
				t, ok := findToken(buf[:size])
				if !ok {
					n.answerName(c, buf[:size], from)
					continue
				}
				n.mail.remember(t.connection(), func(b []byte) error {
					_, err := c.WriteTo(b, from)
					return err
				})
				n.mail.deliver(f.Place.Name(), t)
				if back := t.as(answer); t.kind() == request {
					_, _ = c.WriteTo(back[:], from)
				}
			}
		})
		return func() { c.Close() }, nil
	})
}

// answerName answers a query, if it is one.
func (n *Network) answerName(c net.PacketConn, query []byte, from net.Addr) {
	source, err := netip.ParseAddrPort(from.String())
	if err != nil {
		return
	}
	if answer := n.names.reply(query, netip.AddrPortFrom(source.Addr().Unmap(), source.Port())); answer != nil {
		_, _ = c.WriteTo(answer, from) // who is gone asks again
	}
}

// packetConn makes a packet socket of a place.
func packetConn(p Place, kind, protocol int, local netip.AddrPort) (net.PacketConn, error) {
	fd, err := bound(p, kind, protocol, local)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "packets")
	defer file.Close()
	c, err := net.FilePacketConn(file)
	if err != nil {
		return nil, fmt.Errorf("socket %s in %s: %w", local, p.Name(), err)
	}
	return c, nil
}

// dialUDP connects a socket, and reads what comes back. Reads fail with what ICMP errors say, and go on.
func (n *Network) dialUDP(p Place, local, to netip.AddrPort) (*os.File, error) {
	fd, err := bound(p, unix.SOCK_DGRAM, 0, local)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, sockaddr(to)); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("connect %s to %s in %s: %w", local, to, p.Name(), err)
	}
	file := os.NewFile(uintptr(fd), "datagrams")
	n.wait.Go(func() {
		buf := make([]byte, datagramBytes)
		for {
			size, err := file.Read(buf)
			if err != nil {
				if fileGone(err) {
					return
				}
				continue
			}
			if t, ok := findToken(buf[:size]); ok {
				n.mail.deliver(p.Name(), t)
			}
		}
	})
	return file, nil
}
