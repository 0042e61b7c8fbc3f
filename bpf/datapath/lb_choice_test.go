// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// forwardsTo sends a client's packet to a frontend and returns the backend that gets it.
func (b *bench) forwardsTo(u tuple, flags uint8) netip.AddrPort {
	b.Helper()
	v := b.run(tcProgFromNetwork, b.uplink, u.packet(b, flags, 8))
	if v.code != actRedirect {
		b.Fatalf("%v: verdict %d: %+v", u, v.code, b.records())
	}
	return b.read(v.out).dst
}

// What lives stays with its backend while that is there: TCP even when it is not, UDP moves.
func TestServiceStickiness(t *testing.T) {
	shared := lbBench(t, func(c *Config) { c.ServiceConnectionsMax = 1 << 14 })
	const clients = 40
	for _, name := range []string{"tcp", "udp"} {
		t.Run(name, func(t *testing.T) {
			b, proto := shared.on(t), protocolsOfPorts[name]
			svc := Service{Frontend: Frontend{lb4, 80, proto}, Kind: LoadBalancer, ID: uint32(proto)}
			all := []Backend{{at(podA4, 80), true, false}, {at(podB4, 80), true, false}}
			set := func(list ...Backend) { svc.Backends = list; b.upsert(svc) }
			u := func(i int) tuple { return tuple{at(out4, uint16(20000+i)), at(lb4, 80), proto} }
			set(all...)
			first := map[int]netip.AddrPort{}
			got := map[netip.AddrPort]int{}
			for i := range clients {
				first[i] = b.forwardsTo(u(i), syn)
				got[first[i]]++
			}
			if len(got) != 2 {
				t.Fatalf("all clients get %v", got)
			}
			check := func(step string, flags uint8, want func(i int) bool) {
				t.Helper()
				for i := range clients {
					if now := b.forwardsTo(u(i), flags); !want(i) && now != first[i] || want(i) && now == first[i] {
						t.Errorf("%s: client %d at %v, before at %v", step, i, now, first[i])
					}
				}
			}
			stays := func(int) bool { return false }
			onA := func(i int) bool { return first[i] == all[0].AddrPort }
			check("same set", ack, stays)
			check("a SYN sent again", syn, stays)
			terminating := all[0]
			terminating.Terminating = true
			set(terminating, all[1])
			check("one terminates", ack, stays)
			for i := range clients {
				if at := b.forwardsTo(tuple{netip.AddrPortFrom(out4, uint16(30000+i)), at(lb4, 80), proto}, syn); at == all[0].AddrPort {
					t.Error("a new connection goes to a backend that terminates")
				}
			}
			set(all[1])
			if name == "tcp" {
				check("one is gone", ack, stays)
				check("one is gone, a SYN", syn, onA)
			} else {
				check("one is gone", ack, onA)
			}
			b.records()
			set(terminating)
			if at := b.forwardsTo(tuple{at(out4, 35000), at(lb4, 80), proto}, syn); at != all[0].AddrPort {
				t.Errorf("only one that terminates is left, and %v is chosen", at)
			}
		})
	}
	if err := shared.Services().Delete(Frontend{lb4, 80, unix.IPPROTO_TCP}, Frontend{lb4, 80, unix.IPPROTO_UDP}); err != nil {
		t.Fatal(err)
	}
}

// Clients of a service with affinity keep their backend over connections, ports of the service and a change of other backends.
func TestServiceAffinity(t *testing.T) {
	b := lbBench(t, func(c *Config) { c.AffinityMax = 1024 })
	list := []Backend{{at(podA4, 80), true, false}, {at(podB4, 80), true, false}}
	one := Service{Frontend: Frontend{lb4, 80, 6}, Kind: LoadBalancer, ID: 1, Backends: list, Affinity: time.Hour, AffinityGroup: 7}
	two := one
	two.Frontend.Port, two.ID = 81, 2
	b.upsert(one, two)
	client := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}) }
	first := map[int]netip.AddrPort{}
	got := map[netip.AddrPort]int{}
	for i := range 30 {
		for n := range 6 {
			to := b.forwardsTo(tuple{at(client(i), uint16(1000+n)), at(lb4, uint16(80+n%2)), 6}, syn)
			if n == 0 {
				first[i] = to
				got[to]++
			} else if to != first[i] {
				t.Errorf("client %d: %v, before %v", i, to, first[i])
			}
		}
	}
	if len(got) != 2 {
		t.Errorf("all clients get %v", got)
	}
	one.Backends = list[1:]
	b.upsert(one)
	for i := range 30 {
		if to := b.forwardsTo(tuple{at(client(i), 2000), at(lb4, 80), 6}, syn); to != list[1].AddrPort {
			t.Errorf("client %d goes to %v, which is gone", i, to)
		}
	}
	// Nothing is remembered for longer than asked.
	one.Backends, one.Affinity = list, time.Second
	b.upsert(one)
	// A write puts an entry before the others of its bucket: while the map is read, two of a bucket would be met in turn for ever.
	entries := map[tcAffinityKey]tcAffinityEntry{}
	var k tcAffinityKey
	var v tcAffinityEntry
	it := b.coll.Maps[tcMapAffinity].Iterate()
	for it.Next(&k, &v) {
		entries[k] = v
	}
	if err := it.Err(); err != nil || len(entries) != 30 {
		t.Fatalf("%d entries of 30 clients, %v", len(entries), err)
	}
	for k, v := range entries {
		v.Time -= uint64(2 * time.Second)
		if err := b.coll.Maps[tcMapAffinity].Put(k, v); err != nil {
			t.Fatal(err)
		}
	}
	got = map[netip.AddrPort]int{}
	for i := range 30 {
		got[b.forwardsTo(tuple{at(client(i), 3000), at(lb4, 80), 6}, syn)]++
	}
	if len(got) != 2 {
		t.Errorf("an affinity that has ended still sends all to %v", got)
	}
}

// Random and Maglev give every backend its share; Maglev chooses the same on every node, and for most connections after a change.
func TestServiceDistribution(t *testing.T) {
	b := lbBench(t, func(c *Config) { c.ServiceConnectionsMax, c.MaglevTableSize, c.ConntrackMax = 1<<15, 1021, 1<<15 })
	const n, each = 8, 500
	var list []Backend
	for i := range n {
		ep := netip.AddrFrom4([4]byte{10, 244, 1, byte(100 + i)})
		list = append(list, Backend{at(ep, 80), i%2 == 0, false})
		if err := b.Endpoints().Upsert(ep, Endpoint{ID: uint16(100 + i), Identity: idB, IfIndex: b.ifB}); err != nil {
			t.Fatal(err)
		}
	}
	choose := func(port uint16, base int) map[int]netip.AddrPort {
		out := map[int]netip.AddrPort{}
		for i := range n * each {
			out[i] = b.forwardsTo(tuple{at(netip.AddrFrom4([4]byte{192, 0, 2, byte(base)}), uint16(10000+i)), at(lb4, port), 6}, syn)
		}
		if _, err := b.Conntrack().Purge(0); err != nil {
			t.Fatal(err)
		}
		for i := range n {
			if _, err := b.Conntrack().Purge(uint16(100 + i)); err != nil {
				t.Fatal(err)
			}
		}
		b.records()
		return out
	}
	for _, algorithm := range []Algorithm{Random, Maglev} {
		svc := Service{Frontend: Frontend{lb4, 80 + uint16(algorithm), 6}, Kind: LoadBalancer, ID: 1 + uint32(algorithm), Backends: list, Algorithm: algorithm}
		b.upsert(svc)
		count := map[netip.AddrPort]int{}
		for _, to := range choose(80+uint16(algorithm), 1) {
			count[to]++
		}
		for _, x := range list {
			// Six standard deviations of a binomial distribution.
			if c := count[x.AddrPort]; c < each-130 || c > each+130 {
				t.Errorf("algorithm %d: %v has %d of %d", algorithm, x, c, n*each)
			}
		}
		if algorithm == Random {
			continue
		}
		before := choose(81, 2)
		// Another node has other local backends; a state is not shared. The choice is.
		clearMap(t, b, tcMapLb)
		for i := range list {
			list[i].Local = !list[i].Local
		}
		svc.Backends = list
		b.upsert(svc)
		if elsewhere := choose(81, 2); fmt.Sprint(elsewhere) != fmt.Sprint(before) {
			t.Error("two nodes choose differently")
		}
		clearMap(t, b, tcMapLb)
		svc.Backends = list[1:]
		b.upsert(svc)
		moved := 0
		for i, to := range choose(81, 2) {
			if before[i] != list[0].AddrPort && to != before[i] {
				moved++
			}
		}
		if share := float64(moved) / (n * each); share > 0.1 {
			t.Errorf("%.1f%% of the connections of backends that stayed have moved", 100*share)
		}
	}
}

func clearMap(t *testing.T, b *bench, name string) {
	t.Helper()
	var keys []tcNatKey
	if err := walkMap(b.coll.Maps[name], func(k tcNatKey, _ tcLbEntry) { keys = append(keys, k) }); err != nil {
		t.Fatal(err)
	}
	if err := deleteAll(b.coll.Maps[name], keys); err != nil {
		t.Fatal(err)
	}
}

// A UDP port that asks two addresses of one backend by turns gets each answer from the address that it asked.
func TestPortUsedAtTwoAddresses(t *testing.T) {
	shared := lbBench(t, nil)
	for family, f := range lbFamilies {
		t.Run(family, func(t *testing.T) {
			b := shared.on(t)
			b.upsert(Service{ID: 1, Frontend: Frontend{f.vip, 53, unix.IPPROTO_UDP}, Backends: backends(at(f.b, 53))},
				Service{ID: 1, Frontend: Frontend{f.lb, 53, unix.IPPROTO_UDP}, Kind: LoadBalancer, Backends: backends(at(f.b, 53))},
				Service{ID: 1, Frontend: Frontend{f.any, 30053, unix.IPPROTO_UDP}, Kind: NodePort, Backends: backends(at(f.b, 53))})
			inside, outside := at(f.a, 41000), at(f.out, 41000)
			for _, to := range []netip.AddrPort{at(f.lb, 53), at(f.node, 30053), at(f.lb, 53), at(f.lb, 53), at(f.vip, 53), at(f.lb, 53), at(f.node, 30053)} {
				for _, c := range []struct {
					client  netip.AddrPort
					program string
					ifindex uint32
				}{{inside, tcProgFromPod, b.ifA}, {outside, tcProgFromNetwork, b.uplink}} {
					asked, direct := tuple{c.client, to, unix.IPPROTO_UDP}, tuple{c.client, at(f.b, 53), unix.IPPROTO_UDP}
					b.same("question", b.passes(c.program, c.ifindex, asked.packet(t, 0, 40), actRedirect, b.ifB), direct)
					b.same("answer", b.passes(tcProgFromPod, b.ifB, direct.reversed().packet(t, 0, 40), actRedirect, c.ifindex), asked.reversed())
				}
			}
			rows := 0
			err := walkMap(b.coll.Maps[tcMapLb], func(k tcNatKey, _ tcLbEntry) {
				if k.Src.netip() == f.out || k.Dst.netip() == f.out {
					rows++
				}
			})
			if err != nil || rows != 2 {
				t.Errorf("%d rows of a port that talks to one backend (error %v), want 2", rows, err)
			}
		})
	}
}
