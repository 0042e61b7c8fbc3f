// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"bytes"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// Names count for outside peers alone, where the ordinary decision is default deny or a redirect, for connections that begin and that live.
func TestPolicyByName(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			b := newBench(t, nil)
			n := openNames(t, b.Datapath)
			ranges := []PolicyRange{allowPort(6, 443, 11), allowPort(6, 80, 12), allowPort(6, 22, 13), denyPort(6, 444, 14), allowPort(17, 443, 15)}
			if err := n.SetPolicy(5, 3, ranges); err != nil {
				t.Fatal(err)
			}
			const cidr = uint32(1<<24 + 7)
			inCIDR := netip.MustParseAddr(map[string]string{"IPv4": "198.51.100.9", "IPv6": "2001:db8:c::9"}[f.name])
			if err := b.IPCache().Upsert(netip.PrefixFrom(inCIDR, inCIDR.BitLen()), IPCacheEntry{Identity: cidr}); err != nil {
				t.Fatal(err)
			}
			b.policy(5, rows{
				0:    {denyPort(6, 22, 1), redirectPort(6, 80, 9, 2), allowPort(6, 25, 3)},
				cidr: {denyPort(6, 443, 4)},
			})
			b.enforce(epA, EndpointPolicy{Egress: 5, Ingress: 5})
			out := DirectionEgress
			noListener := outcome{reason: DropNoListener, rule: 2}
			port := uint16(1000)
			syn := func(name string, want outcome, to netip.AddrPort) {
				t.Helper()
				port++
				b.expect(name, want, tcProgFromPod, b.ifA, tcp(t, at(f.podA, port), to, syn, 1, 0, 0))
			}
			syn("before the name is known", defaultDenied(out), at(f.out, 443))
			syn("redirect before it", noListener, at(f.out, 80))
			for _, a := range []netip.Addr{f.out, f.far, inCIDR, f.node} {
				if err := n.SetAddress(a, 3); err != nil {
					t.Fatal(err)
				}
			}
			syn("by name", allowed(out, 11), at(f.out, 443))
			syn("another port", defaultDenied(out), at(f.out, 8443))
			syn("a deny stands", denied(out, 1), at(f.out, 22))
			syn("an allow stands", allowed(out, 3), at(f.out, 25))
			syn("a plain allow by name lifts a redirect", allowed(out, 12), at(f.out, 80))
			syn("names do not deny", defaultDenied(out), at(f.out, 444))
			syn("another CIDR's deny stands", denied(out, 4), at(inCIDR, 443))
			syn("a pod has no name", defaultDenied(out), at(f.far, 443))
			syn("nor has a node", defaultDenied(out), at(f.node, 443))
			b.expect("nor ingress", defaultDenied(DirectionIngress), tcProgFromNetwork, b.uplink, tcp(t, at(f.out, 1), at(f.podA, 443), 2, 1, 0, 0))
			b.expect("another protocol", allowed(out, 15), tcProgFromPod, b.ifA, udp(t, at(f.podA, 1), at(f.out, 443), 1))

			// A live connection follows its address's names.
			client, server := at(f.podA, 2000), at(f.out, 443)
			b.expect("SYN", allowed(out, 11), tcProgFromPod, b.ifA, tcp(t, client, server, 2, 1, 0, 0))
			if err := n.DeleteAddress(f.out); err != nil {
				t.Fatal(err)
			}
			b.expect("before the bump", passes, tcProgFromPod, b.ifA, tcp(t, client, server, ack, 2, 2, 0))
			b.bump()
			b.expect("after it", defaultDenied(out), tcProgFromNetwork, b.uplink, tcp(t, server, client, ack, 2, 2, 0))
			if err := n.SetAddress(f.out, 3); err != nil {
				t.Fatal(err)
			}
			b.bump()
			b.expect("known again", allowed(out, 11), tcProgFromNetwork, b.uplink, tcp(t, server, client, ack, 2, 2, 0))

			// An address whose set no policy has a row for is like one without names.
			if err := n.SetAddress(f.out, 4); err != nil {
				t.Fatal(err)
			}
			syn("another set", defaultDenied(out), at(f.out, 443))
		})
	}
}

// What no proxy can take is refused where a rule wants it to.
func TestProxyRefuses(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			b := newBench(t, nil)
			b.policy(5, rows{0: {
				redirectPort(unix.IPPROTO_SCTP, 7, 9, 1), redirectPort(6, 80, 9, 2), redirectPort(17, 53, 9, 3), visiblePort(unix.IPPROTO_SCTP, 8, 9, 4),
				visiblePort(6, 81, 9, 5),
			}})
			b.enforce(epA, EndpointPolicy{Egress: 5})
			b.enforce(HostEndpoint, EndpointPolicy{Ingress: 5})
			client := at(f.podA, 1000)
			for _, c := range []struct {
				name    string
				data    []byte
				reason  uint8
				rule    uint32
				slotted bool
			}{
				{"SCTP", sctpChunk(t, client, at(f.far, 7), 1), DropProxyProtocol, 1, true},
				{"a SYN without listener", tcp(t, client, at(f.far, 80), syn, 1, 0, 0), DropNoListener, 2, true},
				{"the middle of a connection", tcp(t, client, at(f.far, 80), ack, 1, 1, 5), DropNoListener, 2, true},
				{"a datagram without listener", udp(t, client, at(f.far, 53), 5), DropNoListener, 3, true},
				{"SCTP to be seen", sctpChunk(t, client, at(f.far, 8), 1), 0, 0, false},
				{"TCP to be seen", tcp(t, client, at(f.far, 81), syn, 1, 0, 0), 0, 0, false},
			} {
				b.records()
				v := b.run(tcProgFromPod, b.ifA, c.data)
				if passed := v.code == actOK; passed != (c.reason == 0) {
					t.Errorf("%s: verdict %+v", c.name, v)
				}
				for _, r := range b.records() {
					if r.Type == RecordDrop && (r.Reason != c.reason || r.Rule != c.rule || (r.Slot() != 0) != c.slotted || r.Direction != DirectionEgress) {
						t.Errorf("%s: drop for reason %d by rule %d, slot %d", c.name, r.Reason, r.Rule, r.Slot())
					}
				}
			}
			for _, c := range b.conns() {
				if c.Slot != 0 || c.Verdict != PolicyAllow {
					t.Errorf("entry %+v, want none on a slot", c)
				}
			}
			// The node itself has no proxy.
			v := b.outcomeOf(tcProgFromNetwork, b.uplink, tcp(t, at(f.out, 9), at(f.node, 80), syn, 1, 0, 0))
			if v.reason != DropProxyProtocol {
				t.Errorf("to the node: %v, want reason %d", v, DropProxyProtocol)
			}
		})
	}
}

// Marks that only share bits with another are not taken for it.
func TestProxyMarks(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Masquerade, c.NodeIPv4, c.NodeIPv6 = true, node4, node6 })
	for _, f := range families {
		for _, mark := range []uint32{MarkIngressPassed, MarkProxy, MarkEgressPassed, MarkRoutePassed} {
			data := tcp(t, at(f.podA, 1000), at(f.out, 80), syn, 1, 0, 0)
			if v := b.run(tcProgToNetwork, b.uplink, data, withMark(mark)); v.code != actOK || v.mark != mark || !bytes.Equal(v.out, data) {
				t.Errorf("%s mark %#x: verdict %+v, want it to pass untouched", f.name, mark, v)
			}
		}
		// A stage is believed of a pod of this node alone.
		for mark, src := range map[uint32]netip.Addr{MarkEgressPassed: f.far, MarkRoutePassed: f.far} {
			got := b.outcomeOf(tcProgFromHost, b.uplink, tcp(t, at(src, 1000), at(f.podA, 80), syn, 1, 0, 0), withMark(mark))
			if got.reason != DropInvalidSourceIP {
				t.Errorf("%s mark %#x: %v, want reason %d", f.name, mark, got, DropInvalidSourceIP)
			}
		}
		got := b.outcomeOf(tcProgFromHost, b.uplink, tcp(t, at(f.podA, 1000), at(f.out, 80), syn, 1, 0, 0), withMark(MarkIngressPassed))
		if got.reason != DropUnroutable {
			t.Errorf("%s: %v, want reason %d: the server is not here", f.name, got, DropUnroutable)
		}
		// Masqueraded on its way.
		v := b.run(tcProgFromHost, b.uplink, tcp(t, at(f.podA, 52001), at(f.out, 80), syn, 1, 0, 0), withMark(MarkEgressPassed))
		if v.code != actOK || v.mark != 0x400 {
			t.Errorf("%s: verdict %+v, want the mark of masquerading", f.name, v)
		}
	}
	if n := len(b.conns()); n != 0 {
		t.Errorf("%d entries at the endpoint that the proxy speaks for", n)
	}
}
