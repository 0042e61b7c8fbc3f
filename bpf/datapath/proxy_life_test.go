// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// line is an open connection whose far end echoes.
type line struct {
	w *world
	net.Conn
}

func (w *world) dial(from *pod, to netip.AddrPort) line {
	w.Helper()
	var c net.Conn
	w.do(inside(from.ns, func() (err error) {
		c, err = net.DialTimeout("tcp", to.String(), 5*time.Second)
		return err
	}))
	w.Cleanup(func() { c.Close() })
	w.do(c.SetDeadline(time.Now().Add(20 * time.Second)))
	return line{w, c}
}

// say sends a word and reads its echo.
func (l line) say(word string) error {
	if _, err := l.Write([]byte(word)); err != nil {
		return err
	}
	got := make([]byte, len(word))
	_, err := io.ReadFull(l, got)
	return err
}

// works fails the test when the line does not.
func (l line) works(what string) {
	l.w.Helper()
	if err := l.say(what); err != nil {
		l.w.rejectDrops(what)
		l.w.Fatalf("%s: %v", what, err)
	}
}

// ends waits for the connection's end, which must be this error.
func (l line) ends(what string, want error) {
	l.w.Helper()
	var err error
	for err == nil {
		err = l.say(what)
	}
	if !errors.Is(err, want) {
		l.w.Errorf("%s: %v, want %v", what, err, want)
	}
}

// acceptOne is a server whose connections the test holds.
func acceptOne(w *world, p *pod, to netip.AddrPort) <-chan net.Conn {
	w.Helper()
	var l net.Listener
	w.do(inside(p.ns, func() (err error) {
		l, err = net.Listen("tcp", to.String())
		return err
	}))
	out := make(chan net.Conn, 8)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(20 * time.Second))
			out <- c
		}
	}()
	w.Cleanup(func() { l.Close(); <-done })
	return out
}

// lives is a node with two pods and a proxy that has slots 5 and 7 for egress and 6 for ingress.
func lives(t *testing.T, change func(*Config)) (w *world, a, b *pod, p *tproxy) {
	w = newWorld(t, change)
	a = w.plug("a", epA, idA, podA4, podA6)
	b = w.plug("b", epB, idB, podB4, podB6)
	p = newProxy(w)
	p.listen(5, MarkEgressPassed)
	p.listen(7, MarkEgressPassed)
	p.listen(6, MarkIngressPassed)
	w.do(w.Policies().SetEndpoint(epA, EndpointPolicy{Egress: 5}))
	return w, a, b, p
}

func (w *world) proxyCounts() ProxyCounts {
	w.Helper()
	c, err := w.Counters()
	w.do(err)
	return c.Proxy
}

// Without a listener a redirected connection does not begin; one that was only to be seen goes straight on.
func TestProxyListenerGone(t *testing.T) {
	w, a, b, p := lives(t, nil)
	p.kill()
	w.setPolicy(5, rows{0: {redirectPort(unix.IPPROTO_TCP, 8080, 5, 1), visiblePort(unix.IPPROTO_TCP, 8081, 7, 2)}})
	for _, f := range families {
		seen := server(w, in(b), at(f.podB, 8081))
		strict := acceptOne(w, b, at(f.podB, 8080))
		w.records()
		err := inside(a.ns, func() error {
			c, err := net.DialTimeout("tcp", at(f.podB, 8080).String(), 300*time.Millisecond)
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil || len(strict) != 0 {
			t.Errorf("%s: connected past the proxy", f.name)
		}
		r := w.waitRecord("the refused SYN", func(r *Record) bool { return r.Type == RecordDrop && r.Dport == 8080 })
		if r.Reason != DropNoListener || r.Rule != 1 || r.Slot() != 5 || r.Direction != DirectionEgress || r.Endpoint != epA {
			t.Errorf("%s: drop %+v, want reason %d by rule 1 of slot 5", f.name, r, DropNoListener)
		}
		local, err := talk(in(a), "tcp", at(f.podB, 8081))
		if err != nil {
			t.Fatal(err)
		}
		if got := <-seen; got != local {
			t.Errorf("%s: the server sees %v, want %v", f.name, got, local)
		}
	}
	if c := w.proxyCounts(); c.NoListener < 2 || c.NotSeen != 2 || c.Redirected != 0 {
		t.Errorf("counted %+v", c)
	}
}

// What the proxy had when it died ends, for both its ends, also when nothing was said of it; nothing of it goes past.
func TestProxyDies(t *testing.T) {
	for _, verdict := range []PolicyVerdict{PolicyRedirect, PolicyVisible} {
		for _, f := range families {
			t.Run(verdict.String()+" "+f.name, func(t *testing.T) {
				w, a, b, p := lives(t, nil)
				w.setPolicy(5, rows{0: {{Proto: unix.IPPROTO_TCP, First: 8080, Last: 8080, Verdict: verdict, Slot: 5, Rule: 1}}})
				accepted := acceptOne(w, b, at(f.podB, 8080))
				client := w.dial(a, at(f.podB, 8080))
				server := <-accepted
				go io.CopyN(server, server, 5)
				client.works("hello")
				p.vanish()
				client.ends("after the proxy's death", syscall.ECONNRESET)
				w.do(server.SetReadDeadline(time.Now().Add(20 * time.Second)))
				if _, err := server.Write([]byte("past")); err != nil {
					t.Fatal(err)
				}
				if n, err := server.Read(make([]byte, 1)); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("server: %d bytes, %v; want a reset", n, err)
				}
				if len(accepted) != 0 {
					t.Error("the server got another connection")
				}
				if lost := w.proxyCounts().Lost; lost < 2 {
					t.Errorf("%d lost packets are counted, want 2 at least", lost)
				}
			})
		}
	}
}

// vanish makes the proxy's sockets go without a word, as if it had never had them.
func (p *tproxy) vanish() {
	p.w.Helper()
	p.mu.Lock()
	for c := range p.socks {
		s, ok := c.(*net.TCPConn)
		if !ok {
			continue
		}
		raw, err := s.SyscallConn()
		p.w.do(err)
		// A socket in repair mode says nothing when it is closed.
		var fault error
		p.w.do(raw.Control(func(fd uintptr) { fault = unix.SetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_REPAIR, 1) }))
		p.w.do(fault)
	}
	p.mu.Unlock()
	p.kill()
}

// A connection whose policy names another slot is reset at both ends, with a reason of its own; one to be seen, or allowed plainly, stays as it is.
func TestProxySlotChanges(t *testing.T) {
	for _, c := range []struct {
		name     string
		from, to PolicyRange
		resets   bool
	}{
		{"none to a slot", allowPort(6, 8080, 1), redirectPort(6, 8080, 5, 2), true},
		{"slot to slot", redirectPort(6, 8080, 5, 1), redirectPort(6, 8080, 7, 2), true},
		{"seen to a slot", visiblePort(6, 8080, 5, 1), redirectPort(6, 8080, 7, 2), true},
		{"slot to none", redirectPort(6, 8080, 5, 1), allowPort(6, 8080, 2), false},
		{"none to be seen", allowPort(6, 8080, 1), visiblePort(6, 8080, 5, 2), false},
		{"rule alone", redirectPort(6, 8080, 5, 1), redirectPort(6, 8080, 5, 2), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, a, b, p := lives(t, nil)
			for _, f := range families {
				w.setPolicy(5, rows{0: {c.from}})
				accepted := acceptOne(w, b, at(f.podB, 8080))
				client := w.dial(a, at(f.podB, 8080))
				server := <-accepted
				echo := make(chan error, 1)
				go func() { _, err := io.Copy(server, server); echo <- err }()
				client.works("before")
				w.records()
				w.setPolicy(5, rows{0: {c.to}})
				if !c.resets {
					client.works("after the change")
					client.works("and again")
					w.rejectDrops("after the change")
					client.Close()
					if err := <-echo; err != nil {
						t.Errorf("%s: server: %v", f.name, err)
					}
					continue
				}
				client.ends("after the change", syscall.ECONNRESET)
				r := w.waitRecord("the reset", func(r *Record) bool { return r.Type == RecordDrop })
				if r.Reason != DropSlotChanged || r.Endpoint != epA || r.Rule != 2 {
					t.Errorf("%s: drop %+v, want reason %d by rule 2", f.name, r, DropSlotChanged)
				}
				if err := <-echo; !errors.Is(err, syscall.ECONNRESET) && c.from.Verdict == PolicyAllow {
					t.Errorf("%s: server: %v, want a reset", f.name, err)
				}
				next := w.dial(a, at(f.podB, 8080))
				server = <-accepted
				go func() { io.Copy(server, server); server.Close() }()
				next.works("a new connection")
				if got := p.next(len(p.seen)); len(got) == 0 || got[len(got)-1].slot != c.to.Slot {
					t.Errorf("%s: the proxy had %v, want the last on slot %d", f.name, got, c.to.Slot)
				}
				next.Close()
			}
		})
	}
}

// The same, where the entry is the server's and the packets come from another machine.
func TestProxySlotChangesAtIngress(t *testing.T) {
	w, a, _, _ := lives(t, nil)
	w.do(w.Policies().SetEndpoint(epA, EndpointPolicy{Ingress: 6}))
	for _, f := range families {
		out := w.out.v4
		if !f.podA.Is4() {
			out = w.out.v6
		}
		w.setPolicy(6, rows{0: {allowPort(6, 8080, 1)}})
		accepted := acceptOne(w, a, at(f.podA, 8080))
		client := w.dial(w.out, at(f.podA, 8080))
		server := <-accepted
		if client.LocalAddr().(*net.TCPAddr).AddrPort().Addr() != out {
			t.Fatal("wrong client")
		}
		w.setPolicy(6, rows{0: {redirectPort(6, 8080, 6, 2)}})
		// The server speaks first: the change is met on its way.
		if _, err := server.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		for _, c := range []net.Conn{server, client} {
			if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: %v, want a reset", f.name, err)
			}
		}
	}
}
