// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

func TestPolicyAudit(t *testing.T) {
	b := newBench(t, nil)
	in := DirectionIngress
	b.policy(5, rows{0: nothing, idFar: {denyPort(unix.IPPROTO_TCP, 80, 71), allowPort(unix.IPPROTO_TCP, 81, 72)}})
	b.enforce(epA, EndpointPolicy{Ingress: 5, IngressAudit: true})
	client := at(far4, 1000)
	syn80 := tcp(t, client, at(podA4, 80), syn, 1, 0, 0)
	b.expect("deny", outcome{verdict: PolicyDeny, rule: 71, direction: in, audited: true}, tcProgFromNetwork, b.uplink, syn80)
	b.expect("its next packet", passes, tcProgFromNetwork, b.uplink, tcp(t, client, at(podA4, 80), ack, 1, 1, 0))
	b.expect("no rule", outcome{verdict: PolicyDefaultDeny, direction: in, audited: true}, tcProgFromNetwork, b.uplink, tcp(t, client, at(podA4, 82), syn, 1, 0, 0))
	b.expect("allow", allowed(in, 72), tcProgFromNetwork, b.uplink, tcp(t, client, at(podA4, 81), syn, 1, 0, 0))
	if c := b.counters().Policy; c.AllowedIngress != 3 || c.DeniedIngress != 0 {
		t.Errorf("counted %+v, want 3 allowed: audit lets pass", c)
	}
	// A trace of it says so as well, and which rule it was.
	b.run(tcProgFromNetwork, b.uplink, tcp(t, client, at(podA4, 80), ack|fin, 1, 1, 0))
	if r := b.records(); len(r) != 1 || r[0].Type != RecordTrace || r[0].Flags&FlagAudited == 0 || r[0].Rule != 71 || r[0].Verdict != uint8(PolicyDeny) {
		t.Errorf("trace %+v, want rule 71, audited", r)
	}
	for _, c := range b.conns() {
		if c.Destination.Port() == 80 && (c.Verdict != PolicyDeny || c.Rule != 71 || !c.Audited) {
			t.Errorf("entry %+v, want denied by rule 71, audited", c)
		}
	}
	b.enforce(epA, EndpointPolicy{Ingress: 5})
	b.expect("audit ends", denied(in, 71), tcProgFromNetwork, b.uplink, tcp(t, client, at(podA4, 80), ack, 2, 1, 0))
	b.enforce(epA, EndpointPolicy{Ingress: 5, IngressAudit: true})
	b.expect("audit begins", outcome{verdict: PolicyDeny, rule: 71, direction: in, audited: true}, tcProgFromNetwork, b.uplink,
		tcp(t, client, at(podA4, 80), ack, 2, 1, 0))
}

func TestPolicyICMP(t *testing.T) {
	b := newBench(t, nil)
	in, out := DirectionIngress, DirectionEgress
	b.policy(5, rows{
		0:     nothing,
		idFar: {allowPort(unix.IPPROTO_ICMP, 8, 81), allowPort(unix.IPPROTO_ICMPV6, 128, 82), allowPort(unix.IPPROTO_UDP, 53, 83), allowPort(unix.IPPROTO_ICMP, 0, 84)},
	})
	b.policy(6, rows{0: nothing})
	b.enforce(epA, EndpointPolicy{Ingress: 5, Egress: 6})
	network := func(name string, want outcome, data []byte) {
		t.Helper()
		b.expect(name, want, tcProgFromNetwork, b.uplink, data)
	}
	pod := func(name string, want outcome, data []byte) {
		t.Helper()
		b.expect(name, want, tcProgFromPod, b.ifA, data)
	}
	message := func(src, dst netip.Addr, kind, code byte, inner []byte) []byte {
		body := append([]byte{kind, code, 0, 0, 0, 0, 0, 0}, inner...)
		if src.Is4() {
			return rawIP(t, src, dst, unix.IPPROTO_ICMP, body, nil)
		}
		return rawIP6(t, src, dst, unix.IPPROTO_ICMPV6, body)
	}
	network("ping", allowed(in, 81), echo(t, far4, podA4, true, 1, 8))
	pod("its answer", passes, echo(t, podA4, far4, false, 1, 8))
	network("ping, IPv6", allowed(in, 82), echo(t, far6, podA6, true, 1, 8))
	pod("its answer, IPv6", passes, echo(t, podA6, far6, false, 1, 8))
	pod("ping out", defaultDenied(out), echo(t, podA4, far4, true, 2, 8))
	network("an answer that nobody asked for, type 0", allowed(in, 84), echo(t, far4, podA4, false, 9, 8))
	network("the like, IPv6, type 129", defaultDenied(in), echo(t, far6, podA6, false, 9, 8))
	b.bump()
	pod("an answer after a change is decided by the request's type", passes, echo(t, podA4, far4, false, 1, 8))
	network("redirect", defaultDenied(in), message(far4, podA4, 5, 0, nil))

	query := udp(t, at(far4, 1000), at(podA4, 53), 20)
	network("UDP", allowed(in, 83), query)
	router := netip.MustParseAddr("192.0.2.99")
	network("an error about it", passes, message(router, podA4, 3, 3, query[14:42]))
	other := udp(t, at(far4, 1001), at(podA4, 53), 20)
	network("an error about nothing, from the same", defaultDenied(in), message(router, podA4, 3, 3, other[14:42]))
	network("an error about it again", passes, message(router, podA4, 3, 3, query[14:42]))
	pod("the pod's error about it", passes, message(podA4, far4, 3, 3, query[14:42]))
	pod("the pod's error about nothing", defaultDenied(out), message(podA4, far4, 3, 3, other[14:42]))
	network("too big, IPv4", passes, message(router, podA4, 3, 4, other[14:42]))
	pod("too big, IPv4, out", passes, message(podA4, router, 3, 4, other[14:42]))
	network("too big, IPv6", passes, message(far6, podA6, 2, 0, make([]byte, 48)))
	pod("too big, IPv6, out", passes, message(podA6, far6, 2, 0, make([]byte, 48)))
	network("unreachable, IPv6, about nothing", defaultDenied(in), message(far6, podA6, 1, 0, make([]byte, 48)))

	b.policy(5, rows{idFar: nothing})
	network("UDP is cut", defaultDenied(in), query)
	network("and an error about it is about nothing", defaultDenied(in), message(router, podA4, 3, 3, query[14:42]))
}

func TestPolicyFragments(t *testing.T) {
	b := newBench(t, nil)
	in := DirectionIngress
	b.policy(5, rows{0: nothing, idFar: {allowPort(unix.IPPROTO_UDP, 53, 91)}})
	b.enforce(epA, EndpointPolicy{Ingress: 5})
	v4 := func(id, port, offset uint16, more bool) []byte {
		payload := make([]byte, 608)
		if offset == 0 {
			payload = append(udpHeader(5000, port, 1208), make([]byte, 592)...)
		}
		return rawIP(t, far4, podA4, unix.IPPROTO_UDP, payload, func(l *layers.IPv4) {
			l.Id, l.FragOffset = id, offset/8
			if more {
				l.Flags = layers.IPv4MoreFragments
			}
		})
	}
	v6 := func(id uint32, port, offset uint16, more bool) []byte {
		if offset == 0 {
			return fragment6(t, far6, podA6, id, 0, more, append(udpHeader(5000, port, 1208), make([]byte, 592)...))
		}
		return fragment6(t, far6, podA6, id, offset, more, make([]byte, 608))
	}
	for _, c := range []struct {
		name string
		want outcome
		data []byte
	}{
		{"first", allowed(in, 91), v4(1, 53, 0, true)},
		{"later", passes, v4(1, 53, 600, false)},
		{"first of a denied port", defaultDenied(in), v4(2, 54, 0, true)},
		{"later of a denied port", defaultDenied(in), v4(2, 54, 600, false)},
		{"later without a first", outcome{reason: DropUnknownFragment}, v4(3, 53, 600, false)},
		{"IPv6 first", allowed(in, 91), v6(1, 53, 0, true)},
		{"IPv6 later", passes, v6(1, 53, 600, false)},
		{"IPv6 later of a denied port's", defaultDenied(in), v6(2, 54, 0, true)},
		{"IPv6 later of a denied port", defaultDenied(in), v6(2, 54, 600, false)},
	} {
		b.expect(c.name, c.want, tcProgFromNetwork, b.uplink, c.data)
	}
}

// A connection that begins in another one's entry is decided like any other, and a refused one does not end the one before.
func TestPolicyTakeover(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Timeouts.UDP = time.Millisecond })
	in := DirectionIngress
	query := udp(t, at(far4, 1), at(podA4, 53), 4)
	b.run(tcProgFromNetwork, b.uplink, query)
	client, server := at(far4, 1000), at(podA4, 80)
	b.run(tcProgFromNetwork, b.uplink, tcp(t, client, server, syn, 1, 0, 0))
	b.run(tcProgFromPod, b.ifA, tcp(t, server, client, rst|ack, 0, 2, 0))
	before := b.counters()
	b.policy(5, rows{0: nothing})
	b.enforce(epA, EndpointPolicy{Ingress: 5})
	for _, c := range b.conns() {
		if c.Proto == unix.IPPROTO_UDP {
			waitPast(c.Expires)
		}
	}
	b.expect("expired", defaultDenied(in), tcProgFromNetwork, b.uplink, query)
	b.expect("closed", defaultDenied(in), tcProgFromNetwork, b.uplink, tcp(t, client, server, syn, 9, 0, 0))
	if c := b.counters(); c.Written.Final != before.Written.Final || c.ConnsCreated != before.ConnsCreated {
		t.Errorf("final records %d, entries %d: want %d and %d as before", c.Written.Final, c.ConnsCreated, before.Written.Final, before.ConnsCreated)
	}
	b.policy(5, rows{idFar: everything})
	b.expect("closed, allowed", allowed(in, 900), tcProgFromNetwork, b.uplink, tcp(t, client, server, syn, 9, 0, 0))
	b.expect("expired, allowed", allowed(in, 900), tcProgFromNetwork, b.uplink, query)
}

func TestPolicyMissing(t *testing.T) {
	b := newBench(t, nil)
	in := DirectionIngress
	data := func(port uint16) []byte { return tcp(t, at(far4, port), at(podA4, 80), syn, 1, 0, 0) }
	b.enforce(epA, EndpointPolicy{Ingress: 77})
	b.expect("no row at all", defaultDenied(in), tcProgFromNetwork, b.uplink, data(1))
	b.policy(77, rows{idB: everything})
	b.expect("no row of the peer, none of peer 0", defaultDenied(in), tcProgFromNetwork, b.uplink, data(2))
	b.policy(77, rows{0: everything})
	b.expect("peer 0", allowed(in, 900), tcProgFromNetwork, b.uplink, data(3))
	// A row that is another key's, as an element used again shows for a moment, is believed never.
	stolen := policyRow(t, b, 77, idB)
	if err := b.Policies().table.peers.Put(tcPolicyPeerKey{Policy: 77, Peer: idFar}, stolen); err != nil {
		t.Fatal(err)
	}
	if err := b.Policies().DeletePeer(77, 0); err != nil {
		t.Fatal(err)
	}
	b.expect("a row of another key", defaultDenied(in), tcProgFromNetwork, b.uplink, data(4))
	if _, _, _, err := b.Policies().Lookup(77, idFar, unix.IPPROTO_TCP, 80); err == nil {
		t.Error("Lookup of a row of another key: no error")
	}
	if err := b.Policies().DeletePolicy(77); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Policies().Endpoint(epA); err != nil {
		t.Error(err)
	}
}

func policyRow(t *testing.T, b *bench, policy, peer uint32) tcPolicyPeer {
	t.Helper()
	var row tcPolicyPeer
	if err := b.Policies().table.peers.Lookup(tcPolicyPeerKey{Policy: policy, Peer: peer}, &row); err != nil {
		t.Fatal(err)
	}
	return row
}

// The programs load, whatever they are configured for.
func TestLoadConfigurations(t *testing.T) {
	pin := bpffs(t)
	inNetns(t)
	for i := range 8 {
		cfg := smallConfig(filepath.Join(filepath.Dir(pin), fmt.Sprintf("node%d", i)))
		cfg.Masquerade = i&1 != 0
		if i&2 != 0 {
			cfg.NodeIPv4, cfg.NodeIPv6 = node4, node6
		}
		if i&4 != 0 {
			cfg.Routing, cfg.OverlayIfIndex = RoutingVXLAN, loopback
		}
		if i&1 != 0 {
			cfg.Aggregation = AggregationNone
		}
		load(t, cfg)
	}
}

// While rows of other peers come, change and go, and blocks with them, a peer that is denied is denied every time.
func TestPolicyChurn(t *testing.T) {
	b := newBench(t, func(c *Config) { c.PolicyRangesMax, c.DropsMax = 64, 64 })
	b.policy(5, rows{0: nothing, idFar: {denyPort(unix.IPPROTO_TCP, 80, 1)}})
	b.enforce(epA, EndpointPolicy{Ingress: 5})
	stop := make(chan struct{})
	var writer sync.WaitGroup
	var failed error
	changes := 0
	writer.Go(func() {
		p := b.Policies()
		for i := uint32(0); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			peer := 5000 + i%7
			ranges := []PolicyRange{{Proto: 6, First: uint16(i % 80), Last: 90, Verdict: PolicyAllow, Rule: i}, {Last: 65535, Verdict: PolicyAllow, Rule: i}}
			if failed = p.SetPeer(5, peer, ranges); failed != nil {
				return
			}
			if i%3 == 0 {
				if failed = p.DeletePeer(5, peer-1); failed != nil {
					return
				}
			}
			// The denied peer's own row is replaced by an equal one in another block.
			if failed = p.SetPeer(5, idFar, []PolicyRange{denyPort(unix.IPPROTO_TCP, 80, 1+i%2)}); failed != nil {
				return
			}
			changes++
		}
	})
	data := tcp(t, at(far4, 1), at(podA4, 80), syn, 1, 0, 0)
	const runs = 200000
	in := skbuff{Ifindex: b.uplink, IngressIfindex: b.uplink}
	before := b.counters()
	var code uint32
	err := inside(b.ns, func() (err error) {
		code, err = b.coll.Programs[tcProgFromNetwork].Run(&ebpf.RunOptions{Data: data, Context: &in, Repeat: runs})
		return err
	})
	close(stop)
	writer.Wait()
	if err != nil || failed != nil {
		t.Fatalf("run: %v, writer: %v", err, failed)
	}
	c := b.counters()
	if code != actShot || c.Policy.AllowedIngress != 0 || c.Policy.DeniedIngress-before.Policy.DeniedIngress != runs {
		t.Errorf("verdict %d, counted %+v after %d changes, want %d denied", code, c.Policy, changes, runs)
	}
	if changes == 0 {
		t.Error("nothing changed meanwhile")
	}
	drops, err := b.Drops()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range drops {
		if d.Reason != DropPolicyDeny || d.Rule != 1 && d.Rule != 2 {
			t.Errorf("dropped otherwise than by the deny rule: %+v", d)
		}
	}
}
