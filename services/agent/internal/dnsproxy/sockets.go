// SPDX-License-Identifier: Apache-2.0

package dnsproxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// option is a socket option that is a number.
type option struct {
	level, name, value int
	what               string
}

// control sets options before bind.
func control(options ...option) func(string, string, syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var setErr error
		err := c.Control(func(fd uintptr) {
			for _, o := range options {
				if err := unix.SetsockoptInt(int(fd), o.level, o.name, o.value); err != nil {
					setErr = fmt.Errorf("set %s: %w", o.what, err)
					return
				}
			}
		})
		return errors.Join(err, setErr)
	}
}

func transparent(v4 bool) option {
	if v4 {
		return option{unix.SOL_IP, unix.IP_TRANSPARENT, 1, "IP_TRANSPARENT"}
	}
	return option{unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1, "IPV6_TRANSPARENT"}
}

func originalDestination(v4 bool) option {
	if v4 {
		return option{unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1, "IP_RECVORIGDSTADDR"}
	}
	return option{unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, 1, "IPV6_RECVORIGDSTADDR"}
}

func familyOf(network string, v4 bool) string {
	if v4 {
		return network + "4"
	}
	return network + "6"
}

// receiveBuffer holds what comes while the readers are busy.
const receiveBuffer = 4 << 20

func listenUDP(ctx context.Context, host string, port uint16) (*net.UDPConn, error) {
	v4 := netip.MustParseAddr(host).Is4()
	config := net.ListenConfig{Control: control(transparent(v4), originalDestination(v4),
		option{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer, "SO_RCVBUFFORCE"})}
	c, err := config.ListenPacket(ctx, familyOf("udp", v4), net.JoinHostPort(host, strconv.Itoa(int(port))))
	if err != nil {
		return nil, fmt.Errorf("listen for DNS: %w", err)
	}
	udp, _ := c.(*net.UDPConn)
	return udp, nil
}

func listenTCP(ctx context.Context, host string, port uint16) (*net.TCPListener, error) {
	v4 := netip.MustParseAddr(host).Is4()
	config := net.ListenConfig{Control: control(transparent(v4))}
	l, err := config.Listen(ctx, familyOf("tcp", v4), net.JoinHostPort(host, strconv.Itoa(int(port))))
	if err != nil {
		return nil, fmt.Errorf("listen for DNS: %w", err)
	}
	tcp, _ := l.(*net.TCPListener)
	return tcp, nil
}

// destinationOf reads the original destination of a datagram from its control messages.
func destinationOf(oob []byte) (netip.AddrPort, bool) {
	for len(oob) >= unix.SizeofCmsghdr {
		size := binary.NativeEndian.Uint64(oob)
		level, kind := int32(binary.NativeEndian.Uint32(oob[8:])), int32(binary.NativeEndian.Uint32(oob[12:]))
		if size < unix.SizeofCmsghdr || size > uint64(len(oob)) {
			break
		}
		data := oob[unix.SizeofCmsghdr:size]
		switch {
		case level == unix.SOL_IP && kind == unix.IP_ORIGDSTADDR && len(data) >= 8:
			addr, _ := netip.AddrFromSlice(data[4:8])
			return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(data[2:])), true
		case level == unix.SOL_IPV6 && kind == unix.IPV6_ORIGDSTADDR && len(data) >= 24:
			addr, _ := netip.AddrFromSlice(data[8:24])
			return netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(data[2:])), true
		}
		oob = oob[min((size+7)&^7, uint64(len(oob))):]
	}
	return netip.AddrPort{}, false
}

const (
	dialTimeout = 5 * time.Second
	portTries   = 16
)

// dial connects to a server in the name of a client, from one of the proxy's ports.
func (p *Proxy) dial(ctx context.Context, network string, client netip.Addr, server netip.AddrPort) (net.Conn, error) {
	v4 := client.Is4()
	options := []option{transparent(v4), {unix.SOL_SOCKET, unix.SO_MARK, p.cfg.Mark, "SO_MARK"}}
	portRange := option{unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int(p.cfg.PortMax)<<16 | int(p.cfg.PortMin), "IP_LOCAL_PORT_RANGE"}
	network = familyOf(network, v4)
	if network[:3] == "tcp" {
		options = append(options, option{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1, "IP_BIND_ADDRESS_NO_PORT"})
	}
	dialer := net.Dialer{Timeout: dialTimeout, Control: control(append(options, portRange)...), LocalAddr: localAddr(network, client, 0)}
	c, err := dialer.DialContext(ctx, network, server.String())
	if err == nil || !errors.Is(err, unix.ENOPROTOOPT) {
		return c, err
	}
	// Before Linux 6.3 the kernel does not choose within a range.
	dialer.Control = control(options...)
	for range portTries {
		port := p.cfg.PortMin + uint16(rand.IntN(int(p.cfg.PortMax)-int(p.cfg.PortMin)+1)) //nolint:gosec // the query's number is the secret
		dialer.LocalAddr = localAddr(network, client, port)
		if c, err = dialer.DialContext(ctx, network, server.String()); !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			break
		}
	}
	return c, err
}

func localAddr(network string, addr netip.Addr, port uint16) net.Addr {
	ap := netip.AddrPortFrom(addr, port)
	if network[:3] == "tcp" {
		return net.TCPAddrFromAddrPort(ap)
	}
	return net.UDPAddrFromAddrPort(ap)
}
