// SPDX-License-Identifier: Apache-2.0

package procnet

import (
	"net"
	"net/netip"
	"slices"
	"testing"
)

// TestServed looks for sockets that it opened itself: listening and not, of both families.
func TestServed(t *testing.T) {
	served := func(network string, a net.Addr) bool {
		t.Helper()
		all, err := Served(network)
		if err != nil {
			t.Fatal(err)
		}
		return slices.Contains(all, netip.MustParseAddrPort(a.String()))
	}
	for _, host := range []string{"127.0.0.1:0", "[::1]:0"} {
		tcp, err := net.Listen("tcp", host)
		if err != nil {
			t.Fatal(err)
		}
		client, err := net.Dial("tcp", tcp.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		if !served("tcp", tcp.Addr()) || served("tcp", client.LocalAddr()) {
			t.Errorf("of %s and its client %s the first alone is served", tcp.Addr(), client.LocalAddr())
		}
		tcp.Close()
		if served("tcp", tcp.Addr()) {
			t.Errorf("%s is served after its end", tcp.Addr())
		}
		udp, err := net.ListenPacket("udp", host)
		if err != nil {
			t.Fatal(err)
		}
		asker, err := net.Dial("udp", udp.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer asker.Close()
		if !served("udp", udp.LocalAddr()) || served("udp", asker.LocalAddr()) {
			t.Errorf("of %s and its client %s the first alone is served", udp.LocalAddr(), asker.LocalAddr())
		}
		udp.Close()
	}
	if _, err := Served("sctp"); err == nil {
		t.Error("no error for a network that has no table")
	}
}
