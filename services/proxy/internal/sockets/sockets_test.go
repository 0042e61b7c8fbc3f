// SPDX-License-Identifier: Apache-2.0

package sockets_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/services/proxy/internal/sockets"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("transparent sockets need root")
	}
}

func listen(t *testing.T, addr string) (*net.TCPListener, netip.AddrPort) {
	t.Helper()
	ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln, ln.Addr().(*net.TCPAddr).AddrPort()
}

func TestDialInTheClientsName(t *testing.T) {
	needRoot(t)
	for _, tc := range []struct {
		name, server, client string
		choose               bool
	}{
		{"v4", "127.0.0.1:0", "127.0.0.77", false},
		{"v4, ports chosen here", "127.0.0.1:0", "127.0.0.77", true},
		// Any address may be bound, since the socket is transparent; ::1 is the one whose packets find their way on loopback.
		{"v6", "[::1]:0", "::1", false},
		{"v6, ports chosen here", "[::1]:0", "::1", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ln, to := listen(t, tc.server)
			d := sockets.New()
			if tc.choose {
				d.ChoosePorts()
			}
			const low, high = 52000, 52063
			used := map[uint16]bool{}
			for range 16 {
				conn, err := d.Dial(t.Context(), sockets.Spec{Source: netip.MustParseAddr(tc.client), Mark: 0x300, PortMin: low, PortMax: high}, to)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				got, err := ln.Accept()
				if err != nil {
					t.Fatal(err)
				}
				defer got.Close()
				from := got.RemoteAddr().(*net.TCPAddr).AddrPort()
				if from.Addr().Unmap() != netip.MustParseAddr(tc.client) || from.Port() < low || from.Port() > high || used[from.Port()] {
					t.Fatalf("the server sees %s", from)
				}
				used[from.Port()] = true
				if mark := markOf(t, conn); mark != 0x300 {
					t.Fatalf("mark %#x", mark)
				}
			}
		})
	}
}

func markOf(t *testing.T, conn net.Conn) int {
	t.Helper()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var mark int
	if ctlErr := raw.Control(func(fd uintptr) { mark, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK) }); ctlErr != nil || err != nil {
		t.Fatal(ctlErr, err)
	}
	return mark
}

// TestRangeIsUsedUp: a range of one port serves one connection to a server, and another one to another server.
func TestRangeIsUsedUp(t *testing.T) {
	needRoot(t)
	for _, choose := range []bool{false, true} {
		_, to := listen(t, "127.0.0.1:0")
		_, other := listen(t, "127.0.0.1:0")
		d := sockets.New()
		if choose {
			d.ChoosePorts()
		}
		spec := sockets.Spec{Source: netip.MustParseAddr("127.0.0.78"), PortMin: 52100, PortMax: 52100}
		if choose {
			spec.Source = netip.MustParseAddr("127.0.0.79")
		}
		first, err := d.Dial(t.Context(), spec, to)
		if err != nil {
			t.Fatal(err)
		}
		defer first.Close()
		if _, err := d.Dial(t.Context(), spec, to); !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.EADDRINUSE) {
			t.Fatalf("choose=%v: a second connection by one port: %v", choose, err)
		}
		second, err := d.Dial(t.Context(), spec, other)
		if err != nil {
			t.Fatalf("choose=%v: to another server: %v", choose, err)
		}
		defer second.Close()
	}
}

func TestTwoFamilies(t *testing.T) {
	_, to := listen(t, "127.0.0.1:0")
	if _, err := sockets.New().Dial(t.Context(), sockets.Spec{Source: netip.MustParseAddr("::1")}, to); err == nil {
		t.Fatal("a v6 client's name was taken for a v4 server")
	}
}

func TestPortRange(t *testing.T) {
	keep := sockets.Option{Level: unix.SOL_TCP, Name: unix.TCP_NODELAY, Value: 1}
	rest, low, high := sockets.PortRange([]sockets.Option{{Level: 0, Name: 51, Value: 60999<<16 | 52000}, keep})
	if low != 52000 || high != 60999 || len(rest) != 1 {
		t.Fatalf("got %d..%d, %v", low, high, rest)
	}
	// As an int32 of the configuration the value is negative.
	value := uint32(60999<<16 | 52000)
	if _, low, high = sockets.PortRange([]sockets.Option{{Level: 0, Name: 51, Value: int(int32(value))}}); low != 52000 || high != 60999 {
		t.Fatalf("got %d..%d of a negative value", low, high)
	}
}
