// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// TestLayer7 makes requests and queries on loopback, beside the tokens of the same port.
func TestLayer7(t *testing.T) {
	n := NewNetwork()
	t.Cleanup(n.Close)
	here := namespace(t)
	loopback := netip.MustParseAddr("127.0.0.1")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	connection := func(protocol int, port uint16) *Connection {
		t.Helper()
		to := netip.AddrPortFrom(loopback, port)
		c, err := n.New(Spec{Protocol: protocol, From: here, Source: loopback, To: to, Far: []Far{{here, to}}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		return c
	}
	for _, q := range []Request{
		{Method: "GET", Target: "/a/../b?c", Host: "x.example", Headers: []string{"X-A: b"}},
		{Method: "GET", Target: "/", Host: "x.example", Headers: []string{"X-A: b"}, TLS: true, ServerName: "x.example"},
	} {
		c := connection(tcp, 18080)
		conn, err := c.Connect(ctx)
		if err != nil {
			t.Fatal(err)
		}
		x := c.Ask(ctx, conn, q)
		if x.Err != nil || !x.Arrived || x.Status != 200 || x.Source.Port() != c.Local().Port() || x.Header.Get("X-A") != "b" {
			t.Errorf("%+v: %+v", q, x)
		}
	}
	m, err := connection(tcp, 18080).Forward()
	if err != nil {
		t.Fatal(err)
	}
	await(t, n, m)
	if _, err := connection(tcp, 18081).Connect(ctx); err != nil {
		t.Errorf("connect: %v", err)
	}
	n.Answer(loopback, "Api.example", []netip.Addr{netip.MustParseAddr("192.0.2.7")}, 5)
	for _, protocol := range []int{udp, tcp} {
		for _, port := range []uint16{53, 5353} {
			c := connection(protocol, port)
			for range 2 { // on the same socket
				l := c.Resolve(ctx, Query{Name: "api.EXAMPLE", Type: dnsmessage.TypeA})
				if l.Err != nil || !l.Arrived || l.Source.Port() != c.Local().Port() || !slices.Equal(l.Addresses, []netip.Addr{netip.MustParseAddr("192.0.2.7")}) {
					t.Errorf("protocol %d port %d: %+v", protocol, port, l)
				}
			}
		}
	}
	ended, end := context.WithCancel(ctx)
	end()
	if l := connection(udp, 18082).Resolve(ended, Query{Name: "api.example", Type: dnsmessage.TypeA}); l.Err == nil {
		t.Error("a query went on after its context had ended")
	}
}
