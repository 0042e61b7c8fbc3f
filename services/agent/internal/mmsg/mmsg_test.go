// SPDX-License-Identifier: Apache-2.0

package mmsg

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func listen(t *testing.T, address string) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	a, _ := c.LocalAddr().(*net.UDPAddr)
	ap := a.AddrPort()
	return c, netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// receive receives once, when something has come.
func receive(t *testing.T, c *net.UDPConn, r *Receiver) int {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	n, readErr := 0, error(nil)
	err = raw.Read(func(fd uintptr) bool {
		n, readErr = r.Receive(fd)
		return !errors.Is(readErr, unix.EAGAIN)
	})
	if err := errors.Join(err, readErr); err != nil {
		t.Fatal(err)
	}
	return n
}

// send sends all; it returns what failed.
func send(t *testing.T, c *net.UDPConn, s *Sender, again bool) (failed []string) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Write(func(fd uintptr) bool {
		return s.Send(fd, func(i int, err error) bool {
			failed = append(failed, fmt.Sprintf("%d: %v", i, err))
			return again
		})
	}); err != nil {
		t.Fatal(err)
	}
	return failed
}

func TestSendAndReceive(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		to, toAddr := listen(t, address)
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(toAddr))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		from, _ := c.LocalAddr().(*net.UDPAddr)
		r, s := NewReceiver(4, 8, 0), NewSender(6)
		for round := range 2 { // the same receiver and sender again
			for i := range 6 {
				s.Add(fmt.Appendf(nil, "m%d%d", round, i), netip.Addr{})
			}
			if !s.Full() {
				t.Error("there is room for more")
			}
			if failed := send(t, c, s, false); len(failed) > 0 || s.Sent() != 6 {
				t.Fatalf("%d sent, failed: %v", s.Sent(), failed)
			}
			s.Reset()
			var got []string
			for len(got) < 6 {
				n := receive(t, to, r)
				for i := range n {
					got = append(got, string(r.Data(i)))
					if sender := r.From(i); sender != netip.AddrPortFrom(from.AddrPort().Addr().Unmap(), uint16(from.Port)) || !r.Whole(i) {
						t.Errorf("from %v, want %v", sender, from)
					}
				}
			}
			if want := fmt.Sprintf("[m%[1]d0 m%[1]d1 m%[1]d2 m%[1]d3 m%[1]d4 m%[1]d5]", round); fmt.Sprint(got) != want {
				t.Errorf("got %v, want %v", got, want)
			}
		}
		// A longer one is cut, and said to be; the next one is whole.
		for _, text := range []string{"longer than eight", "short"} {
			if _, err := c.Write([]byte(text)); err != nil {
				t.Fatal(err)
			}
		}
		for _, want := range []struct {
			text  string
			whole bool
		}{{"longer t", false}, {"short", true}} {
			r := NewReceiver(1, 8, 0)
			if receive(t, to, r); string(r.Data(0)) != want.text || r.Whole(0) != want.whole {
				t.Errorf("got %q, whole %v; want %v", r.Data(0), r.Whole(0), want)
			}
		}
	}
}

// What cannot be sent is told by its place, and keeps nothing else.
func TestFailures(t *testing.T) {
	to, toAddr := listen(t, "127.0.0.1:0")
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(toAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s := NewSender(3)
	s.Add([]byte("a"), netip.Addr{})
	s.Add(bytes.Repeat([]byte("x"), 70000), netip.Addr{})
	s.Add([]byte("c"), netip.Addr{})
	if failed := send(t, c, s, false); fmt.Sprint(failed) != "[1: message too long]" || s.Sent() != 3 {
		t.Errorf("%d sent, failed: %v", s.Sent(), failed)
	}
	r := NewReceiver(1, 16, 0)
	for _, want := range []string{"a", "c"} {
		if receive(t, to, r); string(r.Data(0)) != want {
			t.Errorf("received %q, want %q", r.Data(0), want)
		}
	}
	raw, err := to.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var none error
	if err := raw.Control(func(fd uintptr) { _, none = r.Receive(fd) }); err != nil || !errors.Is(none, unix.EAGAIN) {
		t.Errorf("nothing has come: %v, %v", err, none)
	}
}

// An error that belongs to an earlier datagram takes no later one with it when the sender tries again.
func TestAgain(t *testing.T) {
	gone, goneAddr := listen(t, "127.0.0.1:0")
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(goneAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := gone.Close(); err != nil {
		t.Fatal(err)
	}
	s := NewSender(1)
	s.Add([]byte("a"), netip.Addr{})
	if failed := send(t, c, s, false); len(failed) > 0 {
		t.Fatal(failed)
	}
	to, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(goneAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	s.Reset()
	s.Add([]byte("b"), netip.Addr{})
	if failed := send(t, c, s, true); fmt.Sprint(failed) != "[0: connection refused]" {
		t.Errorf("failed: %v", failed)
	}
	r := NewReceiver(2, 16, 0)
	if n := receive(t, to, r); n != 1 || string(r.Data(0)) != "b" {
		t.Errorf("%d received, %q", n, r.Data(0))
	}
}
