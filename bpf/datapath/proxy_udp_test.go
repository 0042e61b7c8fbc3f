// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const dnsPort = 10053

// udpProxy takes datagrams by two transparent sockets, asks where they were sent to in the client's name, and answers in the server's.
type udpProxy struct {
	w    *world
	seen chan proxied
}

func newUDPProxy(w *world, slot uint16) *udpProxy {
	w.Helper()
	p := &udpProxy{w: w, seen: make(chan proxied, 64)}
	for _, home := range localhosts {
		var c *net.UDPConn
		w.do(inside(w.node, func() error {
			lc := net.ListenConfig{Control: control(0, false)}
			l, err := lc.ListenPacket(context.Background(), "udp", at(home, dnsPort).String())
			if err == nil {
				c = l.(*net.UDPConn)
			}
			return err
		}))
		done := make(chan struct{})
		go func() {
			defer close(done)
			buf, oob := make([]byte, 4096), make([]byte, 256)
			for {
				n, on, _, client, err := c.ReadMsgUDPAddrPort(buf, oob)
				if err != nil {
					return
				}
				original, err := originalDestination(oob[:on])
				client = at(client.Addr().Unmap(), client.Port())
				if err == nil {
					err = p.answer(client, original, buf[:n])
				}
				if err != nil && !errors.Is(err, net.ErrClosed) {
					w.Errorf("%v -> %v: %v", client, original, err)
				}
				p.seen <- proxied{slot, client, original}
			}
		}()
		w.Cleanup(func() { c.Close(); <-done })
	}
	w.do(w.Slots().Set(slot, dnsPort))
	return p
}

// originalDestination reads the answer to IP_RECVORIGDSTADDR or IPV6_RECVORIGDSTADDR.
func originalDestination(oob []byte) (netip.AddrPort, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.AddrPort{}, err
	}
	for i := range messages {
		sa, err := unix.ParseOrigDstAddr(&messages[i])
		if err != nil {
			continue
		}
		switch a := sa.(type) {
		case *unix.SockaddrInet4:
			return at(netip.AddrFrom4(a.Addr), uint16(a.Port)), nil
		case *unix.SockaddrInet6:
			return at(netip.AddrFrom16(a.Addr), uint16(a.Port)), nil
		}
	}
	return netip.AddrPort{}, errors.New("no original destination")
}

func (p *udpProxy) answer(client, original netip.AddrPort, query []byte) error {
	var up, down net.PacketConn
	err := inside(p.w.node, func() (err error) {
		lc := net.ListenConfig{Control: control(MarkEgressPassed, false)}
		port := UpstreamPortMin + client.Port()%1000
		if up, err = lc.ListenPacket(context.Background(), "udp", at(client.Addr(), port).String()); err != nil {
			return err
		}
		lc = net.ListenConfig{Control: control(0, false)}
		down, err = lc.ListenPacket(context.Background(), "udp", original.String())
		return err
	})
	if err != nil {
		return err
	}
	defer up.Close()
	defer down.Close()
	if string(query) == "long" {
		query = []byte(strings.Repeat("long ", 600))
	}
	if _, err := up.WriteTo(query, net.UDPAddrFromAddrPort(original)); err != nil {
		return err
	}
	if err := up.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	buf := make([]byte, 8192)
	n, _, err := up.ReadFrom(buf)
	if err != nil {
		return err
	}
	// Another query while the socket that answers is there still goes to the listener.
	_, err = down.WriteTo(append([]byte("answer to "), buf[:n]...), net.UDPAddrFromAddrPort(client))
	return err
}

// ask sends a datagram and returns the answer.
func ask(from *pod, to netip.AddrPort, query string) (answer string, local netip.AddrPort, err error) {
	err = inside(from.ns, func() error {
		c, err := net.Dial("udp", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		local = netip.MustParseAddrPort(c.LocalAddr().String())
		if _, err := c.Write([]byte(query)); err != nil {
			return err
		}
		buf := make([]byte, 8192)
		n, err := c.Read(ignoreDeadline(c, buf))
		answer = string(buf[:n])
		return err
	})
	return answer, local, err
}

func ignoreDeadline(c net.Conn, buf []byte) []byte {
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	return buf
}

// A pod's queries go to the proxy, wherever they are sent to, and the answers come from there; the server sees the pod's address.
func TestProxyUDP(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Masquerade, c.NodeIPv4, c.NodeIPv6 = true, node4, node6 })
	a := w.plug("a", epA, idA, podA4, podA6)
	b := w.plug("b", epB, idB, podB4, podB6)
	p := newUDPProxy(w, 11)
	newProxy(w)
	w.setPolicy(5, rows{0: {redirectPort(unix.IPPROTO_UDP, 53, 11, 1)}})
	w.do(w.Policies().SetEndpoint(epA, EndpointPolicy{Egress: 5}), w.Policies().Bump())
	for _, f := range []struct{ pod, node, server, out netip.Addr }{{podA4, node4, podB4, w.out.v4}, {podA6, node6, podB6, w.out.v6}} {
		inCluster := server(w, in(b), at(f.server, 53))
		outside := seenBy(w, "udp", at(f.out, 53))
		for _, c := range []struct {
			to     netip.AddrPort
			seen   <-chan netip.AddrPort
			client netip.Addr
		}{{at(f.server, 53), inCluster, f.pod}, {at(f.out, 53), outside, f.node}} {
			for i := range 3 {
				query := fmt.Sprintf("query %d", i)
				answer, local, err := ask(a, c.to, query)
				if err != nil || answer != "answer to "+query {
					w.rejectDrops(query)
					t.Fatalf("%v: answer %q, %v", c.to, answer, err)
				}
				if got := <-p.seen; got.client != local || got.original != c.to {
					t.Errorf("the proxy saw %+v, want %v -> %v", got, local, c.to)
				}
				if got := <-c.seen; got.Addr().Unmap() != c.client {
					t.Errorf("the server saw %v, want %v", got, c.client)
				}
			}
		}
	}
	// What the proxy sends and gets may come in fragments, towards the server and towards the client; a query in fragments is refused.
	for _, to := range []netip.AddrPort{at(podB4, 53), at(podB6, 53), at(w.out.v4, 53), at(w.out.v6, 53)} {
		answer, _, err := ask(a, to, "long")
		if want := "answer to " + strings.Repeat("long ", 600); err != nil || answer != want {
			t.Errorf("%v: %d bytes, %v; want %d", to, len(answer), err, len(want))
		}
	}
	w.rejectDrops("queries")
	long := strings.Repeat("x", 3000)
	if _, _, err := ask(a, at(podB4, 53), long); err == nil {
		t.Error("a fragmented query was answered")
	}
	r := w.waitRecord("the fragment", func(r *Record) bool { return r.Type == RecordDrop })
	if r.Reason != DropProxyFragment || r.Rule != 1 || r.Slot() != 11 {
		t.Errorf("drop %+v, want reason %d", r, DropProxyFragment)
	}
	w.records()

	// Connections that were there before the rule move to the listener without a reset.
	w.setPolicy(5, rows{0: {allowPort(unix.IPPROTO_UDP, 54, 2)}})
	server(w, in(b), at(podB4, 54))
	w.do(inside(a.ns, func() error {
		c, err := net.Dial("udp", at(podB4, 54).String())
		if err != nil {
			return err
		}
		defer c.Close()
		for i, want := range []string{"hello", "answer to hello"} {
			if i == 1 {
				w.setPolicy(5, rows{0: {redirectPort(unix.IPPROTO_UDP, 54, 11, 3)}})
			}
			if _, err := c.Write([]byte("hello")); err != nil {
				return err
			}
			buf := make([]byte, 100)
			n, err := c.Read(ignoreDeadline(c, buf))
			if err != nil || !bytes.Equal(buf[:n], []byte(want)) {
				return fmt.Errorf("answer %q, %w; want %q", buf[:n], err, want)
			}
		}
		w.rejectDrops("moved")
		_, err = c.Write([]byte(long))
		return err
	}))
	r = w.waitRecord("the fragment", func(r *Record) bool { return r.Type == RecordDrop })
	if r.Reason != DropProxyFragment || r.Rule != 3 {
		t.Errorf("drop %+v, want reason %d by rule 3", r, DropProxyFragment)
	}
	w.records()

	// Without the listener nothing is answered.
	w.do(w.Slots().Delete(11))
	send(w, a, at(podB4, 54))
	r = w.waitRecord("the refused query", func(r *Record) bool { return r.Type == RecordDrop })
	if r.Reason != DropNoListener || r.Rule != 3 {
		t.Errorf("drop %+v, want reason %d by rule 3", r, DropNoListener)
	}
}
