// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"
)

// namespace makes a network namespace with nothing but loopback.
func namespace(t *testing.T) Namespace {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test needs root: it makes a network namespace")
	}
	name := fmt.Sprintf("weircases-%07x", rand.Uint32()>>4)
	for _, args := range [][]string{{"netns", "add", name}, {"-n", name, "link", "set", "lo", "up"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v\n%s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "del", name).CombinedOutput(); err != nil {
			t.Errorf("ip netns del: %v\n%s", err, out)
		}
	})
	return Namespace{Title: name, Path: "/run/netns/" + name}
}

// await waits for a message to come, and to be answered where it wants that.
func await(t *testing.T, n *Network, m *Message) {
	t.Helper()
	limit := time.After(10 * time.Second)
	for {
		changed := n.Changed()
		if m.Arrived() && (!m.WantsAnswer || m.Answered()) {
			return
		}
		select {
		case <-limit:
			t.Fatalf("arrived %t, answered %t", m.Arrived(), m.Answered())
		case <-changed:
		}
	}
}

func TestMessages(t *testing.T) {
	place := namespace(t)
	n := NewNetwork()
	t.Cleanup(n.Close)
	v4, v6 := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")
	for _, c := range []struct {
		name     string
		protocol int
		addr     netip.Addr
		kind     byte
	}{
		{"TCP", tcp, v4, 0}, {"TCP over IPv6", tcp, v6, 0}, {"UDP", udp, v4, 0}, {"UDP over IPv6", udp, v6, 0},
		{"SCTP", sctp, v4, 0}, {"SCTP over IPv6", sctp, v6, 0}, {"ICMP", icmp4, v4, 8}, {"ICMPv6", icmp6, v6, 128},
	} {
		t.Run(c.name, func(t *testing.T) {
			to := netip.AddrPortFrom(c.addr, 4000)
			k, err := n.New(Spec{Protocol: c.protocol, From: place, Source: c.addr, To: to, Far: []Far{{place, to}}, ICMPType: c.kind})
			if err != nil {
				t.Fatal(err)
			}
			defer k.Close()
			for step, send := range map[string]func() (*Message, error){"first": k.Forward, "next": k.Forward} {
				m, err := send()
				if err != nil {
					t.Fatalf("%s: %v", step, err)
				}
				await(t, n, m)
			}
			m, err := k.Reply()
			if err != nil {
				t.Fatal(err)
			}
			await(t, n, m)
			icmpType, icmpCode := byte(3), byte(3)
			if c.addr.Is6() {
				icmpType, icmpCode = 1, 4
			}
			if m, err = k.Related(place, c.addr, Far{place, netip.AddrPortFrom(c.addr, 0)}, icmpType, icmpCode); err != nil {
				t.Fatal(err)
			}
			await(t, n, m)
		})
	}
}

// TestNothingArrives: what nobody reads did not arrive.
func TestNothingArrives(t *testing.T) {
	here, there := namespace(t), namespace(t)
	n := NewNetwork()
	t.Cleanup(n.Close)
	local := netip.MustParseAddr("127.0.0.1")
	to := netip.AddrPortFrom(local, 4000)
	// The server is in another namespace, of which this address means another machine.
	k, err := n.New(Spec{Protocol: udp, From: here, Source: local, To: to, Far: []Far{{there, to}}})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	m, err := k.Forward()
	if err != nil {
		t.Fatal(err)
	}
	// A message that does arrive, sent after it, bounds the wait.
	other, err := n.New(Spec{Protocol: udp, From: here, Source: local, To: netip.AddrPortFrom(local, 4001), Far: []Far{{here, netip.AddrPortFrom(local, 4001)}}})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	second, err := other.Forward()
	if err != nil {
		t.Fatal(err)
	}
	await(t, n, second)
	if m.Arrived() || m.Answered() {
		t.Errorf("arrived %t, answered %t", m.Arrived(), m.Answered())
	}
}
