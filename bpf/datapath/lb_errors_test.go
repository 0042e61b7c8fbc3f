// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// unreachablePort makes the ICMP error that says that a packet's port is closed; from is who says it.
func unreachablePort(t testing.TB, from netip.Addr, about []byte) []byte {
	t.Helper()
	inner := about[14:]
	to, _ := netip.AddrFromSlice(inner[12:16])
	if from.Is6() {
		to, _ = netip.AddrFromSlice(inner[8:24])
		l := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(1, 4)}
		network := ip(from, to, layers.IPProtocolICMPv6)
		if err := l.SetNetworkLayerForChecksum(network.(gopacket.NetworkLayer)); err != nil {
			t.Fatal(err)
		}
		return packet(t, network, l, gopacket.Payload(append(make([]byte, 4), inner[:48]...)))
	}
	return packet(t, ip(from, to, layers.IPProtocolICMPv4), &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(3, 3)}, gopacket.Payload(inner[:28]))
}

// ICMP errors about translated packets find who sent these, and are about what that one knows.
func TestServiceErrors(t *testing.T) {
	shared := lbBench(t, nil)
	for family, f := range lbFamilies {
		t.Run(family, func(t *testing.T) {
			b, proto := shared.on(t), uint8(unix.IPPROTO_UDP)
			id := uint32(len(family)) + uint32(family[1])
			b.upsert(
				Service{Frontend: Frontend{f.vip, 80, proto}, ID: id, Backends: backends(at(f.far, 8080))},
				Service{Frontend: Frontend{f.vip, 81, proto}, ID: id + 1, Backends: backends(at(f.b, 8080))},
				Service{Frontend: Frontend{f.any, 30080, proto}, Kind: NodePort, ID: id + 2, Backends: []Backend{{at(f.b, 8080), true, false}}},
				Service{Frontend: Frontend{f.any, 30081, proto}, Kind: NodePort, ID: id + 3, Backends: backends(at(f.far, 8080))},
			)
			// A pod asks; the backend, far or near, says no.
			asked := tuple{at(f.a, 40000), at(f.vip, 80), proto}
			sent := b.run(tcProgFromPod, b.ifA, asked.packet(t, 0, 8)).out
			v := b.run(tcProgFromNetwork, b.uplink, unreachablePort(t, f.far, sent))
			if v.code != actRedirect || v.redirect != b.ifA {
				t.Fatalf("error of a far backend: verdict %d", v.code)
			}
			b.unreachable(v.out, asked)
			asked.dst = at(f.vip, 81)
			sent = b.run(tcProgFromPod, b.ifA, asked.packet(t, 0, 8)).out
			v = b.run(tcProgFromPod, b.ifB, unreachablePort(t, f.b, sent))
			if v.code != actRedirect || v.redirect != b.ifA {
				t.Fatalf("error of a near backend: verdict %d", v.code)
			}
			b.unreachable(v.out, asked)
			// A client outside asks.
			for _, port := range []uint16{30080, 30081} {
				asked = tuple{at(f.out, 40000), at(f.node, port), proto}
				sent = b.run(tcProgFromNetwork, b.uplink, asked.packet(t, 0, 8)).out
				if port == 30080 {
					v = b.run(tcProgFromPod, b.ifB, unreachablePort(t, f.b, sent))
				} else {
					v = b.run(tcProgFromNetwork, b.uplink, unreachablePort(t, f.far, sent))
				}
				if v.code != actRedirect || v.redirect != b.uplink {
					t.Fatalf("error to a client outside: verdict %d to %d: %+v", v.code, v.redirect, b.records())
				}
				b.unreachable(v.out, asked)
				// The client itself says no to an answer.
				answer := b.read(sent).reversed()
				var seen []byte
				if port == 30080 {
					seen = b.run(tcProgFromPod, b.ifB, answer.packet(t, 0, 8)).out
				} else {
					seen = b.run(tcProgFromNetwork, b.uplink, answer.packet(t, 0, 8)).out
				}
				b.same("answer", b.read(seen), asked.reversed())
				v = b.run(tcProgFromNetwork, b.uplink, unreachablePort(t, f.out, seen))
				want := b.ifB
				if port == 30081 {
					want = b.uplink
				}
				if v.code != actRedirect || v.redirect != want {
					t.Fatalf("error of a client outside: verdict %d to %d: %+v", v.code, v.redirect, b.records())
				}
				b.unreachable(v.out, answer)
			}
			b.records()
		})
	}
}
