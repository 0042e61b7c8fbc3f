// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A pod's connection to a service with a route is not translated at its socket: it goes to the route's slot, then by the client's egress rules to the
// backend that the proxy has chosen, and by the server's ingress rules there.
func TestProxyRoute(t *testing.T) {
	w, a, b := lbWorld(t, ownCgroup(t))
	p := newProxy(w)
	const route, egress, ingress = 9, 5, 6
	p.listen(route, MarkRoutePassed)
	p.listen(egress, MarkEgressPassed)
	p.listen(ingress, MarkIngressPassed)
	for i, f := range families {
		vip, backend := at(lbFamilies[map[string]string{"IPv4": "v4", "IPv6": "v6"}[f.name]].vip, 80), at(f.podB, 8080)
		p.redirect(func(slot uint16, original netip.AddrPort) netip.AddrPort {
			if slot == route {
				return backend
			}
			return original
		})
		w.do(w.Services().Upsert(Service{Frontend: Frontend{vip.Addr(), 80, unix.IPPROTO_TCP}, ID: uint32(i + 1), Route: route}))
		list, err := w.Services().List()
		w.do(err)
		if list[i].Route != route {
			t.Errorf("listed %+v, want its route", list[i])
		}
		seen := server(w, in(b), backend)
		try := func(what string, e EndpointPolicy, in EndpointPolicy, slots ...uint16) {
			t.Helper()
			w.settled()
			w.do(w.Policies().SetEndpoint(epA, e), w.Policies().SetEndpoint(epB, in), w.Policies().Bump())
			if _, err := talk(podNS(a), "tcp", vip); err != nil {
				w.rejectDrops(what)
				t.Fatalf("%s %s: %v", f.name, what, err)
			}
			if got := <-seen; got.Addr() != f.podA {
				t.Errorf("%s: the server sees %v", what, got)
			}
			var had []uint16
			for _, x := range p.next(len(p.seen)) {
				had = append(had, x.slot)
				if x.client.Addr() != f.podA || x.original != map[bool]netip.AddrPort{true: vip, false: backend}[x.slot == route] {
					t.Errorf("%s: %+v", what, x)
				}
			}
			if len(had) != len(slots) {
				t.Errorf("%s: slots %v, want %v", what, had, slots)
			}
			w.rejectDrops(what)
		}
		w.setPolicy(5, rows{0: nothing, idB: {redirectPort(6, 8080, egress, 1)}})
		w.setPolicy(6, rows{0: nothing, idA: {redirectPort(6, 8080, ingress, 2)}})
		w.setPolicy(7, rows{0: nothing, idB: {allowPort(6, 8080, 3)}})
		try("route alone", EndpointPolicy{}, EndpointPolicy{}, route)
		try("route and plain egress", EndpointPolicy{Egress: 7}, EndpointPolicy{}, route)
		try("route and egress", EndpointPolicy{Egress: 5}, EndpointPolicy{}, route, egress)
		try("route and ingress", EndpointPolicy{}, EndpointPolicy{Ingress: 6}, route, ingress)
		try("all three", EndpointPolicy{Egress: 5}, EndpointPolicy{Ingress: 6}, route, egress, ingress)

		// The client's rules are of the backend, and hold for live connections.
		w.settled()
		w.do(w.Policies().SetEndpoint(epB, EndpointPolicy{}), w.Policies().SetEndpoint(epA, EndpointPolicy{Egress: 7}), w.Policies().Bump())
		w.setPolicy(7, rows{idB: {denyPort(6, 8080, 4)}})
		c := w.dial(a, vip)
		if err := c.SetDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if err := c.say("refused"); err == nil {
			t.Error("answered although egress denies the backend")
		}
		c.Close()
		r := w.waitRecord("the refusal", func(r *Record) bool { return r.Type == RecordDrop })
		if r.Reason != DropPolicyDeny || r.Rule != 4 || r.Direction != DirectionEgress || r.Endpoint != epA || r.Dport != 8080 {
			t.Errorf("drop %+v, want by rule 4", r)
		}
		// Its SYN is sent again, and the refused connection comes to its end.
		w.setPolicy(7, rows{idB: {allowPort(6, 8080, 3)}})
		p.next(1)
		<-seen
		w.settled()

		// Without the route's listener nothing goes to the service.
		w.do(w.Slots().Delete(route))
		err = inside(a.ns, func() error {
			c, err := net.DialTimeout("tcp", vip.String(), 300*time.Millisecond)
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil {
			t.Error("connected without the route's listener")
		}
		r = w.waitRecord("the refused SYN", func(r *Record) bool { return r.Type == RecordDrop && r.DstAddr() == vip.Addr() })
		if r.Reason != DropNoListener || r.Slot() != route {
			t.Errorf("drop %+v, want reason %d of the route's slot", r, DropNoListener)
		}
		w.do(w.Slots().Set(route, ProxyPortBase+route))
	}
}

func podNS(p *pod) func(func() error) error { return in(p) }

// What a proxy sends to the world in a pod's name leaves with the node's address, and the answers come back to it.
func TestProxyToTheWorld(t *testing.T) {
	w, a := masqueradeWorld(t)
	p := newProxy(w)
	p.listen(5, MarkEgressPassed)
	w.setPolicy(5, rows{0: {redirectPort(6, 9000, 5, 1)}})
	w.do(w.Policies().SetEndpoint(epA, EndpointPolicy{Egress: 5}), w.Policies().Bump())
	for _, f := range []struct{ pod, node, out netip.Addr }{{podA4, node4, w.out.v4}, {podA6, node6, w.out.v6}} {
		to := at(f.out, 9000)
		seen := seenBy(w, "tcp", to)
		for range 3 {
			if _, err := talk(in(a), "tcp", to); err != nil {
				w.rejectDrops("to the world")
				t.Fatal(err)
			}
			if got := <-seen; got.Addr() != f.node || got.Port() < 61000 {
				t.Errorf("the world sees %v, want %v and a claimed port", got, f.node)
			}
			p.expectSeen("to the world", f.pod, to, 5)
		}
	}
	w.rejectDrops("to the world")
	p.conns.Wait()
	// The claims are collected with the rows that keep them.
	claims := func() int {
		n := 0
		w.do(walkMap(w.coll.Maps[tcMapNat], func(tcNatKey, tcNatEntry) { n++ }))
		return n
	}
	if n := claims(); n != 12 {
		t.Errorf("%d rows of claims, want two for each of 6 connections", n)
	}
	w.do(walkMap(w.coll.Maps[tcMapLb], func(k tcNatKey, v tcLbEntry) {
		v.Expires = 1
		w.do(w.coll.Maps[tcMapLb].Put(k, v))
	}))
	_, err := w.Services().Sweep()
	w.do(err)
	if n := claims(); n != 0 {
		t.Errorf("%d rows of claims are left after the sweep", n)
	}
}

// A client outside, by address or node port, and a process of the node pass the server's slot too.
func TestProxyFromOutside(t *testing.T) {
	w, a, b := lbWorld(t, "")
	p := newProxy(w)
	p.listen(6, MarkIngressPassed)
	w.setPolicy(6, rows{0: {redirectPort(6, 8080, 6, 1)}})
	w.do(w.Policies().SetEndpoint(epB, EndpointPolicy{Ingress: 6}), w.Policies().Bump())
	id := uint32(0)
	for family, f := range lbFamilies {
		id++
		backend := at(f.b, 8080)
		seen := server(w, in(b), backend)
		w.do(w.Services().Upsert(Service{Frontend: Frontend{f.any, 30080, 6}, Kind: NodePort, ID: id, Backends: backends(backend)}))
		w.do(w.Services().Upsert(Service{Frontend: Frontend{f.vip, 80, 6}, ID: id + 10, Backends: backends(backend)}))
		out := w.out.v4
		if f.b.Is6() {
			out = w.out.v6
		}
		for _, c := range []struct {
			name   string
			from   func(func() error) error
			client netip.Addr
			to     netip.AddrPort
		}{
			{"outside", in(w.out), out, backend},
			{"outside by node port", in(w.out), out, at(f.node, 30080)},
			{"pod by cluster IP, by packet", in(a), f.a, at(f.vip, 80)},
			{"the node", w.onNode, f.node, backend},
		} {
			t.Run(family+" "+c.name, func(t *testing.T) {
				w.records()
				if _, err := talk(c.from, "tcp", c.to); err != nil {
					w.rejectDrops(c.name)
					t.Fatal(err)
				}
				if got := <-seen; got.Addr() != c.client || got.Port() < UpstreamPortMin {
					t.Errorf("the server sees %v, want %v and an upstream port", got, c.client)
				}
				p.expectSeen(c.name, c.client, backend, 6)
				w.rejectDrops(c.name)
			})
		}
	}
}

// A port that is used again at once meets the earlier connection's socket in TIME_WAIT, and connects all the same.
func TestProxyPortUsedAgain(t *testing.T) {
	w, a, b, p := lives(t, nil)
	w.setPolicy(5, rows{0: {redirectPort(6, 8080, 5, 1)}})
	for _, f := range families {
		to := at(f.podB, 8080)
		accepted := acceptOne(w, b, to)
		for i := range 3 {
			start := time.Now()
			w.do(inside(a.ns, func() error {
				d := net.Dialer{Timeout: 10 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(at(f.podA, 40000)), Control: reuse}
				c, err := d.Dial("tcp", to.String())
				if err != nil {
					return err
				}
				// The server ends it, so that the proxy's socket towards the client is the one that waits.
				(<-accepted).Close()
				_, err = c.Read(make([]byte, 1))
				return errors.Join(ignoreEOF(err), c.Close())
			}))
			t.Logf("%s %d: %v", f.name, i, time.Since(start))
		}
		if n := len(p.next(len(p.seen))); n != 3 {
			t.Errorf("%s: the proxy had %d connections, want 3", f.name, n)
		}
	}
}

// A pod's connection to the node passes its slot, and the node's own rules.
func TestProxyToTheNode(t *testing.T) {
	w, a, _, p := lives(t, nil)
	w.setPolicy(5, rows{0: {redirectPort(6, 8080, 5, 1)}})
	w.setPolicy(8, rows{0: nothing, idA: {allowPort(6, 8080, 2)}})
	for _, f := range families {
		to := at(f.node, 8080)
		seen := server(w, w.onNode, to)
		for _, host := range []EndpointPolicy{{}, {Ingress: 8}} {
			w.do(w.Policies().SetEndpoint(HostEndpoint, host), w.Policies().Bump())
			if _, err := talk(in(a), "tcp", to); err != nil {
				w.rejectDrops("to the node")
				t.Fatalf("%s, host %+v: %v", f.name, host, err)
			}
			if got := <-seen; got.Addr() != f.podA {
				t.Errorf("the node sees %v, want %v", got, f.podA)
			}
			p.expectSeen("to the node", f.podA, to, 5)
			w.settled()
		}
	}
	w.setPolicy(8, rows{idA: nothing})
	err := inside(a.ns, func() error {
		c, err := net.DialTimeout("tcp", at(node4, 8080).String(), 300*time.Millisecond)
		if err == nil {
			c.Close()
		}
		return err
	})
	if err == nil || len(p.seen) != 0 {
		t.Error("the proxy had a connection that the node's rules refuse")
	}
	r := w.waitRecord("the refusal", func(r *Record) bool { return r.Type == RecordDrop })
	if r.Reason != DropPolicy || r.Endpoint != HostEndpoint || r.Direction != DirectionIngress {
		t.Errorf("drop %+v, want by the node's rules", r)
	}
}

// A process of the node whose port is one of those that the proxy uses is none of the proxy's: the node's rules and counts hold for it.
func TestProxyPortsOfTheNode(t *testing.T) {
	w := newWorld(t, nil)
	a := w.plug("a", epA, idA, podA4, podA6)
	newProxy(w)
	w.setPolicy(8, rows{0: nothing, idA: {allowPort(6, 8080, 2)}})
	w.do(w.Policies().SetEndpoint(HostEndpoint, EndpointPolicy{Ingress: 8, Egress: 8}), w.Policies().Bump())
	for _, f := range families {
		server(w, in(a), at(f.podA, 8080))
		w.do(w.onNode(func() error {
			d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(at(f.node, UpstreamPortMin)), Timeout: 5 * time.Second, Control: reuse}
			c, err := d.Dial("tcp", at(f.podA, 8080).String())
			if err != nil {
				return err
			}
			return errors.Join(line{w, c}.say("hello"), c.Close())
		}))
		w.settled()
	}
	n := 0
	w.do(w.Conntrack().List(func(c Conn) bool {
		if n++; c.Forward.Packets == 0 || c.Reverse.Packets < 3 {
			t.Errorf("entry %+v counts not all", c)
		}
		return true
	}))
	if n != 4 {
		t.Errorf("%d entries, want one at each end of 2 connections", n)
	}
}

// A packet of an upstream socket that is too big for the way is told to the socket, not to the pod that it speaks for.
func TestProxyTooBig(t *testing.T) {
	w, a := masqueradeWorld(t)
	p := newProxy(w)
	p.listen(5, MarkEgressPassed)
	w.setPolicy(5, rows{0: {redirectPort(6, 9000, 5, 1)}})
	w.do(w.Policies().SetEndpoint(epA, EndpointPolicy{Egress: 5}), w.Policies().Bump())
	w.do(inside(w.node, func() error {
		l, err := netlink.LinkByName("eth0")
		return errors.Join(err, netlink.LinkSetMTU(l, 1400))
	}))
	for _, out := range []netip.Addr{w.out.v4, w.out.v6} {
		seenBy(w, "tcp", at(out, 9000))
		if _, err := talk(in(a), "tcp", at(out, 9000)); err != nil {
			w.rejectDrops("too big")
			t.Errorf("%v: %v", out, err)
		}
	}
	w.rejectDrops("too big")
	if c := w.proxyCounts(); c.Redirected != 2 {
		t.Errorf("counted %+v, want 2 connections", c)
	}
}

func reuse(_, _ string, c syscall.RawConn) error {
	var fault error
	err := c.Control(func(fd uintptr) { fault = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return errors.Join(err, fault)
}

func ignoreEOF(err error) error {
	if err != nil && err.Error() == "EOF" {
		return nil
	}
	return err
}
