// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"net/netip"
	"slices"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// Addresses of services and of who uses them from outside.
var (
	lb4, lb6         = netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8:100::7")
	farNode4         = netip.MustParseAddr("172.30.0.12")
	farNode6         = netip.MustParseAddr("fd30::12")
	any4, any6       = netip.IPv4Unspecified(), netip.IPv6Unspecified()
	protocolsOfPorts = map[string]uint8{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "sctp": unix.IPPROTO_SCTP}
)

// lbBench is a bench whose node has routes: to another node's pods and to the world.
func lbBench(t testing.TB, change func(*Config)) *bench {
	t.Helper()
	b := newBench(t, func(c *Config) {
		c.NodeIPv4, c.NodeIPv6 = node4, node6
		if change != nil {
			change(c)
		}
	})
	err := inside(b.ns, func() error {
		for name, value := range map[string]string{
			"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", "net/ipv6/conf/default/accept_dad": "0",
			"net/ipv6/conf/all/accept_dad": "0",
		} {
			sysctl(t, name, value)
		}
		return errors.Join(linkUp("lo"), linkUp("upp"), linkUp("up"), linkUp("wra"), linkUp("wrb"), running("up"),
			addAddr("up", "172.30.0.11/24"), addAddr("up", "fd30::11/64"),
			addRoute("10.244.2.0/24", "up", farNode4.String()), addRoute("fd00:10:244:2::/64", "up", farNode6.String()),
			addRoute("192.0.2.0/24", "up", "172.30.0.1"), addRoute("2001:db8::/64", "up", "fd30::1"))
	})
	if err != nil {
		t.Fatal(err)
	}
	for prefix, entry := range map[string]IPCacheEntry{
		"172.30.0.12/32": {Identity: IdentityRemoteNode}, "fd30::12/128": {Identity: IdentityRemoteNode},
		"198.51.100.7/32": {Flags: IPCacheServices}, "2001:db8:100::7/128": {Flags: IPCacheServices},
	} {
		if err := b.IPCache().Upsert(netip.MustParsePrefix(prefix), entry); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func (b *bench) upsert(list ...Service) {
	b.Helper()
	if err := b.Services().Upsert(list...); err != nil {
		b.Fatal(err)
	}
}

// tuple is who a packet is from and to.
type tuple struct {
	src, dst netip.AddrPort
	proto    uint8
}

func (u tuple) reversed() tuple { return tuple{u.dst, u.src, u.proto} }

// segment makes a packet of the tuple: flags of TCP, or an SCTP chunk type.
func (u tuple) packet(t testing.TB, flags uint8, payload int) []byte {
	t.Helper()
	switch u.proto {
	case unix.IPPROTO_TCP:
		return tcp(t, u.src, u.dst, flags, 100, 200, payload)
	case unix.IPPROTO_UDP:
		return udp(t, u.src, u.dst, payload)
	}
	chunk := layers.SCTPChunkTypeData
	if flags&syn != 0 {
		chunk = layers.SCTPChunkTypeInit
	}
	l := &layers.SCTP{SrcPort: layers.SCTPPort(u.src.Port()), DstPort: layers.SCTPPort(u.dst.Port()), VerificationTag: 7}
	body := append([]byte{byte(chunk), 3, 0, byte(4 + payload)}, make([]byte, payload)...)
	return packet(t, ip(u.src.Addr(), u.dst.Addr(), layers.IPProtocolSCTP), l, gopacket.Payload(body))
}

// decode reads a packet and checks its checksums.
func (b *bench) decode(packet []byte) gopacket.Packet {
	b.Helper()
	p := gopacket.NewPacket(packet, layers.LayerTypeEthernet, gopacket.Default)
	for _, l := range p.Layers() {
		if l, ok := l.(interface {
			SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
		}); ok {
			if err := l.SetNetworkLayerForChecksum(p.NetworkLayer()); err != nil {
				b.Fatal(err)
			}
		}
	}
	if err, bad := p.VerifyChecksums(); err != nil || len(bad) != 0 {
		b.Errorf("checksums: %v %+v", err, bad)
	}
	if l, ok := p.Layer(layers.LayerTypeSCTP).(*layers.SCTP); ok {
		whole := append(slices.Clone(l.Contents), l.Payload...)
		clear(whole[8:12])
		if want := crc32.Checksum(whole, crc32.MakeTable(crc32.Castagnoli)); binary.LittleEndian.Uint32(l.Contents[8:]) != want {
			b.Errorf("SCTP checksum %x, want %08x", l.Contents[8:12], want)
		}
	}
	return p
}

// read says who a packet is from and to.
func (b *bench) read(packet []byte) tuple {
	b.Helper()
	p := b.decode(packet)
	var u tuple
	var src, dst netip.Addr
	switch l := p.NetworkLayer().(type) {
	case *layers.IPv4:
		src, _ = netip.AddrFromSlice(l.SrcIP)
		dst, _ = netip.AddrFromSlice(l.DstIP)
		u.proto = uint8(l.Protocol)
	case *layers.IPv6:
		src, _ = netip.AddrFromSlice(l.SrcIP)
		dst, _ = netip.AddrFromSlice(l.DstIP)
		u.proto = uint8(l.NextHeader)
	default:
		b.Fatalf("no IP packet: %v", p)
	}
	var sport, dport uint16
	switch l := p.TransportLayer().(type) {
	case *layers.TCP:
		sport, dport = uint16(l.SrcPort), uint16(l.DstPort)
	case *layers.UDP:
		sport, dport = uint16(l.SrcPort), uint16(l.DstPort)
	case *layers.SCTP:
		sport, dport = uint16(l.SrcPort), uint16(l.DstPort)
	}
	u.src, u.dst = at(src, sport), at(dst, dport)
	return u
}

// passes runs a packet through a program and returns how it left.
func (b *bench) passes(program string, ifindex uint32, packet []byte, code, redirect uint32) tuple {
	b.Helper()
	v := b.run(program, ifindex, packet)
	if v.code != code || v.redirect != redirect {
		b.Fatalf("verdict %d to interface %d, want %d to %d; records %+v", v.code, v.redirect, code, redirect, b.records())
	}
	return b.read(v.out)
}

func (b *bench) same(what string, got, want tuple) {
	b.Helper()
	if got != want {
		b.Errorf("%s: %v, want %v", what, got, want)
	}
}

// lbFamilies has the addresses of the bench's world by family.
var lbFamilies = map[string]struct{ a, b, far, out, node, farNode, vip, lb, any netip.Addr }{
	"v4": {podA4, podB4, far4, out4, node4, farNode4, vip4, lb4, any4},
	"v6": {podA6, podB6, far6, out6, node6, farNode6, vip6, lb6, any6},
}

// everyWay runs a test for both lbFamilies and all protocols with ports.
func everyWay(t *testing.T, run func(t *testing.T, family string, proto uint8)) {
	for family := range lbFamilies {
		for name, proto := range protocolsOfPorts {
			t.Run(family+" "+name, func(t *testing.T) { run(t, family, proto) })
		}
	}
}

// on gives the bench to a subtest.
func (b *bench) on(t testing.TB) *bench {
	c := *b
	c.TB = t
	return &c
}

// A pod's packets that still carry a service's address go to its backend, and the answers come from the service.
func TestPodToService(t *testing.T) {
	shared := lbBench(t, nil)
	everyWay(t, func(t *testing.T, family string, proto uint8) {
		b, f := shared.on(t), lbFamilies[family]
		for i, c := range []struct {
			name           string
			service        Service
			dial           netip.AddrPort
			remote, hasRow bool
		}{
			{"cluster ip, far", Service{Frontend: Frontend{f.vip, 8080, proto}, Backends: backends(at(f.far, 8080))}, at(f.vip, 8080), true, true},
			{"cluster ip, near", Service{Frontend: Frontend{f.vip, 8081, proto}, Backends: backends(at(f.b, 8081))}, at(f.vip, 8081), false, true},
			{"node port here", Service{Frontend: Frontend{f.any, 30080, proto}, Kind: NodePort, Backends: backends(at(f.b, 30080))}, at(f.node, 30080), false, true},
			{"node port there", Service{Frontend: Frontend{f.any, 30081, proto}, Kind: NodePort, ExternalLocal: true, Backends: backends(at(f.far, 30081))}, at(f.farNode, 30081), true, true},
			{"load balancer", Service{Frontend: Frontend{f.lb, 8080, proto}, Kind: LoadBalancer, Backends: backends(at(f.far, 8080))}, at(f.lb, 8080), true, true},
		} {
			id := uint32(proto)*100 + uint32(i) + 1
			b.records()
			c.service.ID = id
			b.upsert(c.service)
			client := at(f.a, uint16(40000+i))
			backend := c.service.Backends[0].AddrPort
			asked := tuple{client, c.dial, proto}
			direct := tuple{client, backend, proto}
			for n := range 3 {
				flags := uint8(ack)
				if n == 0 {
					flags = syn
				}
				if c.remote {
					b.same(c.name, b.passes(tcProgFromPod, b.ifA, asked.packet(t, flags, 40), actOK, 0), direct)
					b.same(c.name+": answer", b.passes(tcProgFromNetwork, b.uplink, direct.reversed().packet(t, ack, 40), actRedirect, b.ifA), asked.reversed())
				} else {
					b.same(c.name, b.passes(tcProgFromPod, b.ifA, asked.packet(t, flags, 40), actRedirect, b.ifB), direct)
					b.same(c.name+": answer", b.passes(tcProgFromPod, b.ifB, direct.reversed().packet(t, ack, 40), actRedirect, b.ifA), asked.reversed())
				}
			}
			named := 0
			for _, r := range b.records() {
				if r.Type == RecordTrace && r.Endpoint == epA {
					named++
					if r.Service != id {
						t.Errorf("%s: record of service %d, want %d", c.name, r.Service, id)
					}
				}
			}
			if named == 0 {
				t.Errorf("%s: no records", c.name)
			}
		}
		// An undefined port of a service's address is nobody's, one of a node is the node's.
		if v := b.run(tcProgFromPod, b.ifA, tuple{at(f.a, 1), at(f.vip, 9), proto}.packet(t, syn, 0)); v.code != actShot {
			t.Errorf("undefined port of a ClusterIP: verdict %d", v.code)
		}
		b.passes(tcProgFromPod, b.ifA, tuple{at(f.a, 1), at(f.node, 22), proto}.packet(t, syn, 0), actOK, 0)
	})
}

// Traffic from outside reaches backends of this node under the client's address, and those of other nodes under the node's.
func TestOutsideToService(t *testing.T) {
	shared := lbBench(t, nil)
	everyWay(t, func(t *testing.T, family string, proto uint8) {
		b, f := shared.on(t), lbFamilies[family]
		for i, c := range []struct {
			name    string
			service Service
			dial    netip.Addr
		}{
			{"node port", Service{Frontend: Frontend{f.any, 30080, proto}, Kind: NodePort}, f.node},
			{"load balancer", Service{Frontend: Frontend{f.lb, 8080, proto}, Kind: LoadBalancer}, f.lb},
			{"cluster ip", Service{Frontend: Frontend{f.vip, 8080, proto}}, f.vip},
		} {
			port := c.service.Frontend.Port
			c.service.ID = uint32(proto)*100 + uint32(i) + 1
			client := at(f.out, uint16(50000+i))
			asked := tuple{client, at(c.dial, port), proto}

			c.service.Backends = []Backend{{at(f.b, port), true, false}}
			b.upsert(c.service)
			direct := tuple{client, c.service.Backends[0].AddrPort, proto}
			b.same(c.name, b.passes(tcProgFromNetwork, b.uplink, asked.packet(t, syn, 40), actRedirect, b.ifB), direct)
			b.same(c.name+": answer", b.passes(tcProgFromPod, b.ifB, direct.reversed().packet(t, syn|ack, 40), actRedirect, b.uplink), asked.reversed())
			b.same(c.name, b.passes(tcProgFromNetwork, b.uplink, asked.packet(t, ack, 40), actRedirect, b.ifB), direct)
			for _, r := range b.records() {
				if r.Type == RecordTrace && r.Service != c.service.ID {
					t.Errorf("%s: record of service %d, want %d", c.name, r.Service, c.service.ID)
				}
			}

			asked.src = at(f.out, uint16(51000+i))
			c.service.Backends = backends(at(f.far, port))
			b.upsert(c.service)
			sent := b.passes(tcProgFromNetwork, b.uplink, asked.packet(t, syn, 40), actRedirect, b.uplink)
			if sent.src.Addr() != f.node || sent.src.Port() < 61000 || sent.dst != at(f.far, port) {
				t.Fatalf("%s: forwarded as %v", c.name, sent)
			}
			b.same(c.name+": far answer", b.passes(tcProgFromNetwork, b.uplink, sent.reversed().packet(t, syn|ack, 40), actRedirect, b.uplink), asked.reversed())
			b.same(c.name+": again", b.passes(tcProgFromNetwork, b.uplink, asked.packet(t, ack, 40), actRedirect, b.uplink), sent)
		}
		// A node port is one of this node's addresses alone; other ports are the node's own.
		for _, to := range []netip.AddrPort{at(f.farNode, 30080), at(f.node, 22)} {
			asked := tuple{at(f.out, 1), to, proto}
			b.same("not a node port", b.passes(tcProgFromNetwork, b.uplink, asked.packet(t, syn, 0), actOK, 0), asked)
		}
	})
}

// A UDP port that asked a service, and then a backend of it without the service, gets each answer from whom it asked last.
func TestPortUsedAgain(t *testing.T) {
	shared := lbBench(t, nil)
	for family, f := range lbFamilies {
		t.Run(family, func(t *testing.T) {
			b := shared.on(t)
			near, far := backends(at(f.b, 53)), backends(at(f.far, 54))
			b.upsert(Service{ID: 1, Frontend: Frontend{f.vip, 53, unix.IPPROTO_UDP}, Backends: near},
				Service{ID: 2, Frontend: Frontend{f.vip, 54, unix.IPPROTO_UDP}, Backends: far},
				Service{ID: 3, Frontend: Frontend{f.lb, 53, unix.IPPROTO_UDP}, Kind: LoadBalancer, Backends: near})
			client, outside := at(f.a, 40000), at(f.out, 40000)
			for _, service := range []bool{true, false, true, false, false} {
				for _, c := range []struct {
					client, vip, backend netip.AddrPort
				}{{client, at(f.vip, 53), at(f.b, 53)}, {client, at(f.vip, 54), at(f.far, 54)}, {outside, at(f.lb, 53), at(f.b, 53)}} {
					direct := tuple{c.client, c.backend, unix.IPPROTO_UDP}
					asked := direct
					if service {
						asked.dst = c.vip
					}
					question := asked.packet(t, 0, 40)
					answer := direct.reversed().packet(t, 0, 40)
					switch {
					case c.client == outside:
						b.same("question", b.passes(tcProgFromNetwork, b.uplink, question, actRedirect, b.ifB), direct)
						code, to := uint32(actOK), uint32(0)
						if service {
							code, to = actRedirect, b.uplink
						}
						b.same("answer", b.passes(tcProgFromPod, b.ifB, answer, code, to), asked.reversed())
					case c.backend.Addr() == f.far:
						b.same("question", b.passes(tcProgFromPod, b.ifA, question, actOK, 0), direct)
						b.same("answer", b.passes(tcProgFromNetwork, b.uplink, answer, actRedirect, b.ifA), asked.reversed())
					default:
						b.same("question", b.passes(tcProgFromPod, b.ifA, question, actRedirect, b.ifB), direct)
						b.same("answer", b.passes(tcProgFromPod, b.ifB, answer, actRedirect, b.ifA), asked.reversed())
					}
				}
			}
		})
	}
}

// Where a backend's port is not the service's, ports are translated too; TTL goes down by one where the node routes.
func TestServicePorts(t *testing.T) {
	shared := lbBench(t, nil)
	everyWay(t, func(t *testing.T, family string, proto uint8) {
		b, f := shared.on(t), lbFamilies[family]
		b.upsert(Service{Frontend: Frontend{f.vip, 80, proto}, ID: uint32(proto), Backends: backends(at(f.far, 8080))})
		asked, direct := tuple{at(f.a, 40000), at(f.vip, 80), proto}, tuple{at(f.a, 40000), at(f.far, 8080), proto}
		for _, size := range []int{0, 1, 3, 64, 1001} {
			b.same("forward", b.passes(tcProgFromPod, b.ifA, asked.packet(t, syn, size&0xff), actOK, 0), direct)
			b.same("answer", b.passes(tcProgFromNetwork, b.uplink, direct.reversed().packet(t, ack, size&0xff), actRedirect, b.ifA), asked.reversed())
		}
	})
}

// A pod may get itself as the backend of a service.
func TestHairpin(t *testing.T) {
	shared := lbBench(t, nil)
	everyWay(t, func(t *testing.T, family string, proto uint8) {
		b, f := shared.on(t), lbFamilies[family]
		b.upsert(Service{Frontend: Frontend{f.vip, 8080, proto}, ID: uint32(proto), Backends: backends(at(f.a, 8080))})
		// Policy says no to everything: it is not asked.
		if err := b.Policies().SetEndpoint(epA, EndpointPolicy{Ingress: 1, Egress: 1}); err != nil {
			t.Fatal(err)
		}
		asked := tuple{at(f.a, 40000), at(f.vip, 8080), proto}
		inside := tuple{at(f.vip, 40000), at(f.a, 8080), proto}
		for range 2 {
			b.same("forward", b.passes(tcProgFromPod, b.ifA, asked.packet(t, syn, 8), actRedirect, b.ifA), inside)
			b.same("answer", b.passes(tcProgFromPod, b.ifA, inside.reversed().packet(t, syn|ack, 8), actRedirect, b.ifA), asked.reversed())
		}
		found := 0
		for _, c := range b.conns() {
			if c.Proto == proto && c.Destination == asked.dst {
				found++
				if c.Source != asked.src || c.Forward.Packets != 2 || c.Reverse.Packets != 2 || c.Service != uint32(proto) {
					t.Errorf("entry %+v", c)
				}
			}
		}
		if found != 1 {
			t.Errorf("%d entries, want 1: %+v", found, b.conns())
		}
		if _, err := b.Conntrack().Purge(epA); err != nil {
			t.Fatal(err)
		}
		b.records()
	})
}

// unreachable checks that a packet tells the sender of another that nobody is there.
func (b *bench) unreachable(got []byte, about tuple) {
	b.Helper()
	p := b.decode(got)
	outer := b.read(got)
	if l, ok := p.TransportLayer().(*layers.TCP); ok {
		b.same("reset", outer, about.reversed())
		if !l.RST || !l.ACK || l.SYN || l.Ack != 101 || l.Seq != 0 {
			b.Errorf("answer %+v, want a reset of the SYN", l)
		}
		return
	}
	if outer.src.Addr() != about.dst.Addr() || outer.dst.Addr() != about.src.Addr() {
		b.Errorf("from %v to %v, want %v to %v", outer.src, outer.dst, about.dst, about.src)
	}
	var inner []byte
	if l, ok := p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4); ok {
		if l.TypeCode != layers.CreateICMPv4TypeCode(3, 3) {
			b.Errorf("ICMP %v", l.TypeCode)
		}
		inner = append([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0}, l.Payload...)
	} else if l, ok := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6); ok {
		if l.TypeCode != layers.CreateICMPv6TypeCode(1, 4) {
			b.Errorf("ICMP %v", l.TypeCode)
		}
		inner = append([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x86, 0xdd}, l.Payload[4:]...)
	} else {
		b.Fatalf("no ICMP message: %v", p)
	}
	offset := 14 + 20
	if about.src.Addr().Is6() {
		offset = 14 + 40
	}
	if len(inner) < offset+8 {
		b.Fatalf("only %d bytes of the packet", len(inner))
	}
	sport, dport := uint16(inner[offset])<<8|uint16(inner[offset+1]), uint16(inner[offset+2])<<8|uint16(inner[offset+3])
	if sport != about.src.Port() || dport != about.dst.Port() {
		b.Errorf("about ports %d and %d, want %v and %v", sport, dport, about.src, about.dst)
	}
}

// Who asks for a service that nobody serves is told so; who may not ask, or asks the wrong node, is not answered.
func TestServiceRefusals(t *testing.T) {
	shared := lbBench(t, nil)
	everyWay(t, func(t *testing.T, family string, proto uint8) {
		b, f := shared.on(t), lbFamilies[family]
		other := netip.MustParsePrefix("203.0.113.0/24")
		mine := netip.PrefixFrom(f.out, f.out.BitLen()-8).Masked()
		b.upsert(
			Service{Frontend: Frontend{f.vip, 1, proto}, ID: 1 + uint32(proto)*10},
			Service{Frontend: Frontend{f.any, 30001, proto}, Kind: NodePort, ID: 2 + uint32(proto)*10},
			Service{Frontend: Frontend{f.any, 30002, proto}, Kind: NodePort, ID: 3 + uint32(proto)*10, ExternalLocal: true, Backends: backends(at(f.far, 30002))},
			Service{Frontend: Frontend{f.vip, 2, proto}, ID: 4 + uint32(proto)*10, InternalLocal: true, Backends: backends(at(f.far, 2))},
			Service{Frontend: Frontend{f.lb, 1, proto}, Kind: LoadBalancer, ID: 5 + uint32(proto)*10, SourceRanges: []netip.Prefix{other}, Backends: backends(at(f.far, 1))},
			Service{Frontend: Frontend{f.lb, 2, proto}, Kind: LoadBalancer, ID: 6 + uint32(proto)*10, SourceRanges: []netip.Prefix{other, mine}, Backends: backends(at(f.b, 2))},
		)
		for i, c := range []struct {
			name    string
			program string
			ifindex uint32
			u       tuple
			reason  uint8
			answers bool
		}{
			{"pod, nobody", tcProgFromPod, b.ifA, tuple{at(f.a, 40001), at(f.vip, 1), proto}, DropNoBackend, true},
			{"outside, nobody", tcProgFromNetwork, b.uplink, tuple{at(f.out, 40001), at(f.node, 30001), proto}, DropNoBackend, true},
			{"outside, nobody here", tcProgFromNetwork, b.uplink, tuple{at(f.out, 40001), at(f.node, 30002), proto}, DropNoBackend, false},
			{"pod, nobody here", tcProgFromPod, b.ifA, tuple{at(f.a, 40001), at(f.vip, 2), proto}, DropNoBackend, false},
			{"outside, not in the ranges", tcProgFromNetwork, b.uplink, tuple{at(f.out, 40001), at(f.lb, 1), proto}, DropSourceRange, false},
			{"pod, not in the ranges", tcProgFromPod, b.ifA, tuple{at(f.a, 40001), at(f.lb, 1), proto}, DropSourceRange, false},
			{"outside, in the ranges", tcProgFromNetwork, b.uplink, tuple{at(f.out, 40001), at(f.lb, 2), proto}, 0, false},
			{"pod, to a node port that is for this node's backends only for others", tcProgFromPod, b.ifA, tuple{at(f.a, 40001), at(f.node, 30002), proto}, 0, false},
		} {
			b.records()
			size := 32
			if proto == unix.IPPROTO_TCP {
				size = 0
			}
			v := b.run(c.program, c.ifindex, c.u.packet(t, syn, size))
			switch {
			case c.reason == 0:
				if v.code == actShot {
					t.Errorf("%s: dropped", c.name)
				}
				continue
			case c.answers:
				if v.code != actRedirect || v.redirect != c.ifindex || v.mark&0xf00 != 0x800 {
					t.Errorf("%s: verdict %d to %d mark %x, want an answer by %d", c.name, v.code, v.redirect, v.mark, c.ifindex)
					continue
				}
				b.unreachable(v.out, c.u)
			case v.code != actShot:
				t.Errorf("%s: verdict %d", c.name, v.code)
			}
			r := b.records()
			if len(r) != 1 || r[0].Type != RecordDrop || r[0].Reason != c.reason || r[0].Service/10 != uint32(proto) {
				t.Errorf("%s (%d): records %+v, want a drop for %d", c.name, i, r, c.reason)
			}
		}
	})
}
