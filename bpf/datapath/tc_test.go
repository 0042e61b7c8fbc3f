// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// from tells which end of a connection between podA and far sends.
type from bool

const (
	podSends from = true
	farSends from = false
)

// step is one TCP segment.
type step struct {
	from     from
	flags    uint8
	seq, ack uint32
	payload  int
}

func (b *bench) play(client, server netip.AddrPort, steps []step) {
	b.Helper()
	for i, s := range steps {
		var v verdict
		if s.from == podSends {
			v = b.run(tcProgFromPod, b.ifA, tcp(b, client, server, s.flags, s.seq, s.ack, s.payload))
			if v.code != actOK {
				b.Fatalf("step %d: verdict %d, want pass", i, v.code)
			}
		} else {
			v = b.run(tcProgFromNetwork, b.uplink, tcp(b, server, client, s.flags, s.seq, s.ack, s.payload))
			if v.code != actRedirect || v.redirect != b.ifA {
				b.Fatalf("step %d: verdict %d to %d, want redirect to %d", i, v.code, v.redirect, b.ifA)
			}
		}
	}
}

var handshake = []step{
	{podSends, syn, 100, 0, 0},
	{farSends, syn | ack, 500, 101, 0},
	{podSends, ack, 101, 501, 0},
}

func TestTCPStates(t *testing.T) {
	b := newBench(t, nil)
	after := func(more ...step) []step { return append(slices.Clone(handshake), more...) }
	for i, c := range []struct {
		name    string
		steps   []step
		state   ConnState
		records int // trace records at medium aggregation
		known   uint8
	}{
		{"syn only", handshake[:1], StateSynSent, 1, 0},
		{"syn twice", []step{handshake[0], handshake[0]}, StateSynSent, 2, 0},
		{"half open", handshake[:2], StateSynRecv, 2, 0},
		{"established", handshake, StateEstablished, 3, KnownHandshake},
		{"data", after(step{podSends, psh | ack, 101, 501, 100}, step{farSends, ack, 501, 201, 0}, step{podSends, psh | ack, 201, 501, 100}),
			StateEstablished, 4, KnownHandshake},
		{"one side closed", after(step{podSends, fin | ack, 101, 501, 0}), StateFinWait, 4, KnownHandshake},
		{"one side closed, acknowledged", after(step{podSends, fin | ack, 101, 501, 0}, step{farSends, ack, 501, 102, 0}),
			StateFinWait, 4, KnownHandshake},
		{"closed", after(step{podSends, fin | ack, 101, 501, 0}, step{farSends, fin | ack, 501, 102, 0}, step{podSends, ack, 102, 502, 0}),
			StateClosed, 5, KnownHandshake},
		{"last ack old", after(step{podSends, fin | ack, 101, 501, 0}, step{farSends, fin | ack, 501, 102, 10}, step{podSends, ack, 102, 511, 0}),
			StateFinWait, 5, KnownHandshake},
		{"both closed at once", after(step{podSends, fin | ack, 101, 501, 0}, step{farSends, fin | ack, 501, 101, 0},
			step{podSends, ack, 102, 502, 0}, step{farSends, ack, 502, 102, 0}), StateClosed, 5, KnownHandshake},
		{"refused", []step{handshake[0], {farSends, rst | ack, 0, 101, 0}}, StateClosed, 2, 0},
		{"reset", after(step{farSends, rst, 501, 0, 0}), StateClosed, 4, KnownHandshake},
		{"sequence wraps", []step{{podSends, syn, 0xffffffff, 0, 0}, {farSends, syn | ack, 500, 0, 0}, {podSends, ack, 0, 501, 0},
			{farSends, fin | ack, 501, 0, 0}, {podSends, fin | ack, 0, 502, 0}, {farSends, ack, 502, 1, 0}}, StateClosed, 5, KnownHandshake},
		{"picked up", []step{{podSends, ack, 101, 501, 10}}, StateEstablished, 1, 0},
	} {
		for _, far := range []netip.Addr{far4, far6} {
			pod := podA4
			if far.Is6() {
				pod = podA6
			}
			client, server := at(pod, uint16(20000+i)), at(far, 80)
			b.records()
			b.play(client, server, c.steps)
			var traces int
			for _, r := range b.records() {
				if r.Type == RecordTrace {
					traces++
				}
			}
			if traces != c.records {
				t.Errorf("%s %v: %d records, want %d", c.name, far, traces, c.records)
			}
			for _, conn := range b.conns() {
				if conn.Source != client {
					continue
				}
				if conn.State != c.state || conn.Known != c.known || conn.Destination != server || conn.Endpoint != epA {
					t.Errorf("%s: %+v, want state %v known %x", c.name, conn, c.state, c.known)
				}
				var want [2]Traffic
				for _, s := range c.steps {
					d := &want[0]
					if s.from == farSends {
						d = &want[1]
					}
					d.Packets++
					d.Bytes += uint64(40 + s.payload)
					if far.Is6() {
						d.Bytes += 20
					}
				}
				if conn.Forward.Packets != want[0].Packets || conn.Forward.Bytes != want[0].Bytes ||
					conn.Reverse.Packets != want[1].Packets || conn.Reverse.Bytes != want[1].Bytes {
					t.Errorf("%s: totals %+v %+v, want %+v %+v", c.name, conn.Forward, conn.Reverse, want[0], want[1])
				}
			}
		}
	}
}

// Each packet is recorded at the observation points that it passes, with Hubble's numbers.
func TestObservationPoints(t *testing.T) {
	type seen struct {
		endpoint         uint16
		direction, point uint8
		reply            bool
		src, dst         uint32
	}
	b := newBench(t, func(c *Config) { c.Aggregation = AggregationNone })
	for _, c := range []struct {
		name    string
		program string
		ifindex uint32
		packet  []byte
		code    uint32
		to      uint32
		want    []seen
	}{
		{"pod to remote pod", tcProgFromPod, b.ifA, udp(t, at(podA4, 1), at(far4, 2), 4), actOK, 0,
			[]seen{{epA, DirectionEgress, PointToNetwork, false, idA, idFar}}},
		{"its answer", tcProgFromNetwork, b.uplink, udp(t, at(far4, 2), at(podA4, 1), 4), actRedirect, b.ifA,
			[]seen{{epA, DirectionEgress, PointToEndpoint, true, idFar, idA}}},
		{"remote pod to pod", tcProgFromNetwork, b.uplink, udp(t, at(far6, 2), at(podA6, 1), 4), actRedirect, b.ifA,
			[]seen{{epA, DirectionIngress, PointToEndpoint, false, idFar, idA}}},
		{"its answer", tcProgFromPod, b.ifA, udp(t, at(podA6, 1), at(far6, 2), 4), actOK, 0,
			[]seen{{epA, DirectionIngress, PointToNetwork, true, idA, idFar}}},
		{"pod to local pod", tcProgFromPod, b.ifA, udp(t, at(podA4, 3), at(podB4, 4), 4), actRedirect, b.ifB,
			[]seen{{epA, DirectionEgress, PointFromEndpoint, false, idA, idB}, {epB, DirectionIngress, PointToEndpoint, false, idA, idB}}},
		{"its answer", tcProgFromPod, b.ifB, udp(t, at(podB4, 4), at(podA4, 3), 4), actRedirect, b.ifA,
			[]seen{{epB, DirectionIngress, PointFromEndpoint, true, idB, idA}, {epA, DirectionEgress, PointToEndpoint, true, idB, idA}}},
		{"pod to its node", tcProgFromPod, b.ifA, udp(t, at(podA4, 5), at(node4, 6), 4), actOK, 0,
			[]seen{{epA, DirectionEgress, PointToHost, false, idA, IdentityHost}}},
		{"its answer", tcProgFromHost, b.uplink, udp(t, at(node4, 6), at(podA4, 5), 4), actRedirect, b.ifA,
			[]seen{{epA, DirectionEgress, PointToEndpoint, true, IdentityHost, idA}}},
		{"node to pod", tcProgFromHost, b.uplink, udp(t, at(node6, 6), at(podB6, 5), 4), actRedirect, b.ifB,
			[]seen{{epB, DirectionIngress, PointToEndpoint, false, IdentityHost, idB}}},
		{"pod to world", tcProgFromPod, b.ifA, udp(t, at(podA6, 7), at(out6, 53), 4), actOK, 0,
			[]seen{{epA, DirectionEgress, PointToNetwork, false, idA, IdentityWorldIPv6}}},
		{"world to pod", tcProgFromNetwork, b.uplink, udp(t, at(out4, 7), at(podA4, 53), 4), actRedirect, b.ifA,
			[]seen{{epA, DirectionIngress, PointToEndpoint, false, IdentityWorldIPv4, idA}}},
		{"network to node", tcProgFromNetwork, b.uplink, udp(t, at(out4, 7), at(node4, 53), 4), actOK, 0, nil},
	} {
		v := b.run(c.program, c.ifindex, c.packet)
		if v.code != c.code || v.redirect != c.to {
			t.Errorf("%s: verdict %d to %d, want %d to %d", c.name, v.code, v.redirect, c.code, c.to)
		}
		var got []seen
		for _, r := range b.records() {
			got = append(got, seen{r.Endpoint, r.Direction, r.Point, r.IsReply(), r.SrcIdentity, r.DstIdentity})
			if r.SrcMac != [6]uint8{2, 0, 0, 0, 0, 0xa} || r.DstMac != [6]uint8{2, 0, 0, 0, 0, 1} {
				t.Errorf("%s: ethernet %x -> %x", c.name, r.SrcMac, r.DstMac)
			}
			if want := ipLength(c.packet); r.Length != want {
				t.Errorf("%s: length %d, want %d", c.name, r.Length, want)
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: records %+v, want %+v", c.name, got, c.want)
		}
	}
}

// ipLength reads the length out of a packet's IP header: short frames are padded.
func ipLength(p []byte) uint32 {
	if p[14]>>4 == 4 {
		return uint32(binary.BigEndian.Uint16(p[16:]))
	}
	return 40 + uint32(binary.BigEndian.Uint16(p[18:]))
}

// rawIP makes an IPv4 packet of any protocol.
func rawIP(t testing.TB, src, dst netip.Addr, proto uint8, payload []byte, change func(*layers.IPv4)) []byte {
	t.Helper()
	l := ip(src, dst, layers.IPProtocol(proto)).(*layers.IPv4)
	if change != nil {
		change(l)
	}
	return packet(t, l, gopacket.Payload(payload))
}

// rawIP6 makes an IPv6 packet; next is the first header behind the fixed one.
func rawIP6(t testing.TB, src, dst netip.Addr, next uint8, payload []byte) []byte {
	t.Helper()
	return packet(t, ip(src, dst, layers.IPProtocol(next)), gopacket.Payload(payload))
}

func TestDrops(t *testing.T) {
	b := newBench(t, nil)
	if err := b.Services().Upsert(Service{Frontend: Frontend{vip4, 80, unix.IPPROTO_TCP}, ID: 5}); err != nil {
		t.Fatal(err)
	}
	hop := func(next uint8) []byte { return []byte{next, 0, 0, 0, 0, 0, 0, 0} }
	var chain []byte
	for range 7 {
		chain = append(chain, hop(unix.IPPROTO_DSTOPTS)...)
	}
	nonIP := packet(t, ip(podA4, far4, 6), gopacket.Payload(make([]byte, 40)))
	binary.BigEndian.PutUint16(nonIP[12:], 0x88cc)
	for _, c := range []struct {
		name      string
		program   string
		ifindex   uint32
		packet    []byte
		reason    uint8
		endpoint  uint16
		direction uint8
		peer      uint32
		port      uint16
	}{
		{"spoofed source", tcProgFromPod, b.ifA, tcp(t, at(netip.MustParseAddr("10.9.9.9"), 1), at(far4, 80), syn, 1, 0, 0),
			DropInvalidSourceIP, epA, DirectionEgress, idFar, 80},
		{"another pod's source", tcProgFromPod, b.ifA, udp(t, at(podB4, 1), at(far4, 53), 4), DropInvalidSourceIP, epA, DirectionEgress, idFar, 53},
		{"spoofed IPv6 source", tcProgFromPod, b.ifB, udp(t, at(out6, 1), at(podA6, 53), 4), DropInvalidSourceIP, epB, DirectionEgress, idA, 53},
		{"local source from network", tcProgFromNetwork, b.uplink, udp(t, at(podB4, 1), at(podA4, 53), 4),
			DropInvalidSourceIP, epA, DirectionIngress, idB, 53},
		{"unknown L4 protocol", tcProgFromPod, b.ifA, rawIP(t, podA4, far4, unix.IPPROTO_GRE, make([]byte, 20), nil),
			DropUnknownL4, epA, DirectionEgress, idFar, 0},
		{"unknown L4 protocol to pod", tcProgFromNetwork, b.uplink, rawIP(t, far4, podA4, unix.IPPROTO_GRE, make([]byte, 20), nil),
			DropUnknownL4, epA, DirectionIngress, idFar, 0},
		{"ICMPv6 in IPv4", tcProgFromPod, b.ifA, rawIP(t, podA4, far4, unix.IPPROTO_ICMPV6, make([]byte, 20), nil),
			DropUnknownL4, epA, DirectionEgress, idFar, 0},
		{"truncated TCP", tcProgFromPod, b.ifA, rawIP(t, podA4, far4, unix.IPPROTO_TCP, make([]byte, 12), nil),
			DropTruncated, epA, DirectionEgress, idFar, 0},
		{"truncated UDP", tcProgFromNetwork, b.uplink, rawIP6(t, far6, podA6, unix.IPPROTO_UDP, make([]byte, 6)),
			DropTruncated, epA, DirectionIngress, idFar, 0},
		{"not IP", tcProgFromPod, b.ifA, nonIP, DropUnsupportedL3, epA, DirectionEgress, 0, 0},
		{"bad IP length", tcProgFromPod, b.ifA, badLength(t), DropInvalidPacket, epA, DirectionEgress, idFar, 0},
		{"too many extension headers", tcProgFromPod, b.ifA, rawIP6(t, podA6, far6, unix.IPPROTO_DSTOPTS, chain),
			DropInvalidExtension, epA, DirectionEgress, idFar, 0},
		{"unknown later fragment", tcProgFromPod, b.ifA, rawIP(t, podA4, far4, unix.IPPROTO_UDP, make([]byte, 64),
			func(l *layers.IPv4) { l.FragOffset = 100; l.Id = 4711 }), DropUnknownFragment, epA, DirectionEgress, idFar, 0},
		{"no such local endpoint", tcProgFromPod, b.ifA, udp(t, at(podA4, 1), at(gone4, 53), 4), DropUnroutable, epA, DirectionEgress, 3, 53},
		{"no such local endpoint, from network", tcProgFromNetwork, b.uplink, udp(t, at(far4, 1), at(gone4, 53), 4),
			DropUnroutable, 0, DirectionIngress, idFar, 53},
		{"no such local endpoint, from host", tcProgFromHost, b.uplink, udp(t, at(node4, 1), at(gone4, 53), 4),
			DropUnroutable, 0, DirectionIngress, IdentityHost, 53},
		{"service without backends", tcProgFromPod, b.ifA, tcp(t, at(podA4, 1), at(vip4, 80), syn, 1, 0, 0),
			DropNoBackend, epA, DirectionEgress, IdentityWorldIPv4, 80},
		{"ping of a ClusterIP", tcProgFromPod, b.ifA, echo(t, podA4, vip4, true, 7, 0), DropIsClusterIP, epA, DirectionEgress, IdentityWorldIPv4, 0},
		{"hop limit 0", tcProgFromPod, b.ifA, packet(t, &layers.IPv6{Version: 6, NextHeader: 17, SrcIP: podA6.AsSlice(), DstIP: far6.AsSlice()},
			gopacket.Payload(make([]byte, 8))), DropTTLExceeded, epA, DirectionEgress, idFar, 0},
		{"router advertisement of a pod", tcProgFromPod, b.ifA, rawIP6(t, podA6, far6, unix.IPPROTO_ICMPV6, append([]byte{134}, make([]byte, 15)...)),
			DropForbiddenICMPv6, epA, DirectionEgress, idFar, 0},
		{"round the hooks", tcProgToPod, b.ifA, udp(t, at(far4, 1), at(podA4, 53), 4), DropUnroutable, epA, DirectionIngress, idFar, 53},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := dropRows(t, b)
			code := uint32(actShot)
			if c.reason == DropNoBackend {
				code = actRedirect // an answer
			}
			if v := b.run(c.program, c.ifindex, c.packet); v.code != code {
				t.Fatalf("verdict %d, want %d", v.code, code)
			}
			records := b.records()
			if len(records) != 1 {
				t.Fatalf("%d records, want 1: %+v", len(records), records)
			}
			r := records[0]
			peer := r.SrcIdentity
			if c.direction == DirectionEgress {
				peer = r.DstIdentity
			}
			if r.Type != RecordDrop || r.Reason != c.reason || r.Endpoint != c.endpoint || r.Direction != c.direction || peer != c.peer {
				t.Errorf("record type %d reason %d endpoint %d direction %d peer %d, want reason %d endpoint %d direction %d peer %d",
					r.Type, r.Reason, r.Endpoint, r.Direction, peer, c.reason, c.endpoint, c.direction, c.peer)
			}
			var grown []DropRow
			for k, v := range dropRows(t, b) {
				if was := before[k]; v.Records != was.Records {
					k.Records, k.Packets, k.Bytes = v.Records-was.Records, v.Packets-was.Packets, v.Bytes-was.Bytes
					grown = append(grown, k)
				}
			}
			want := DropRow{Endpoint: c.endpoint, Direction: c.direction, PeerIdentity: c.peer, Port: c.port, Proto: r.Proto, Reason: c.reason,
				Records: 1, Packets: 1, Bytes: uint64(r.Length)}
			if len(grown) != 1 || grown[0] != want {
				t.Errorf("drops grew by %+v, want %+v", grown, want)
			}
		})
	}
	if n := len(b.conns()); n != 0 {
		t.Errorf("%d entries for dropped packets, want none", n)
	}
}

func badLength(t testing.TB) []byte {
	p := udp(t, at(podA4, 1), at(far4, 53), 4)
	binary.BigEndian.PutUint16(p[16:], 1000)
	return p
}

// dropRows returns the drops map as row without counts -> counts.
func dropRows(t testing.TB, b *bench) map[DropRow]DropRow {
	t.Helper()
	rows, err := b.Drops()
	if err != nil {
		t.Fatal(err)
	}
	out := map[DropRow]DropRow{}
	for _, r := range rows {
		k := r
		k.Records, k.Packets, k.Bytes = 0, 0, 0
		out[k] = r
	}
	return out
}

// echo makes an ICMP or ICMPv6 echo.
func echo(t testing.TB, src, dst netip.Addr, request bool, id uint16, payload int) []byte {
	t.Helper()
	if src.Is4() {
		typ := layers.CreateICMPv4TypeCode(0, 0)
		if request {
			typ = layers.CreateICMPv4TypeCode(8, 0)
		}
		return packet(t, ip(src, dst, layers.IPProtocolICMPv4), &layers.ICMPv4{TypeCode: typ, Id: id, Seq: 1}, gopacket.Payload(make([]byte, payload)))
	}
	b := make([]byte, 8+payload)
	b[0] = 129
	if request {
		b[0] = 128
	}
	binary.BigEndian.PutUint16(b[4:], id)
	return rawIP6(t, src, dst, unix.IPPROTO_ICMPV6, b)
}

// What keeps a link going makes no flow.
func TestControlPackets(t *testing.T) {
	b := newBench(t, nil)
	linkLocal, allNodes := netip.MustParseAddr("fe80::5"), netip.MustParseAddr("ff02::1")
	icmp6 := func(typ byte) []byte { return append([]byte{typ}, make([]byte, 23)...) }
	arp := packet(t, &layers.ARP{
		AddrType: layers.LinkTypeEthernet, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: 1,
		SourceHwAddress: net.HardwareAddr{2, 0, 0, 0, 0, 0xa}, SourceProtAddress: podA4.AsSlice(),
		DstHwAddress: make([]byte, 6), DstProtAddress: []byte{169, 254, 1, 1},
	})
	mld := append([]byte{58, 0, 5, 2, 0, 0, 1, 0}, icmp6(143)...)
	for _, c := range []struct {
		name    string
		program string
		packet  []byte
		code    uint32
		counter func(Counters) uint64
	}{
		{"ARP", tcProgFromPod, arp, actOK, func(c Counters) uint64 { return c.ARP }},
		{"ARP to pod", tcProgToPod, arp, actOK, nil},
		{"neighbour solicitation", tcProgFromPod, rawIP6(t, linkLocal, allNodes, 58, icmp6(135)), actOK,
			func(c Counters) uint64 { return c.NeighbourDiscovery }},
		{"neighbour advertisement to pod", tcProgToPod, rawIP6(t, linkLocal, podA6, 58, icmp6(136)), actOK,
			func(c Counters) uint64 { return c.NeighbourDiscovery }},
		{"router solicitation", tcProgFromPod, rawIP6(t, linkLocal, allNodes, 58, icmp6(133)), actShot,
			func(c Counters) uint64 { return c.MulticastControl }},
		{"MLD report behind an option", tcProgFromPod, rawIP6(t, linkLocal, allNodes, 0, mld), actShot,
			func(c Counters) uint64 { return c.MulticastControl }},
		{"IGMP", tcProgFromPod, rawIP(t, podA4, netip.MustParseAddr("224.0.0.22"), unix.IPPROTO_IGMP, make([]byte, 16), nil), actShot,
			func(c Counters) uint64 { return c.MulticastControl }},
		{"MLD of the node", tcProgFromHost, rawIP6(t, linkLocal, allNodes, 0, mld), actShot,
			func(c Counters) uint64 { return c.MulticastControl }},
		{"delivered", tcProgToPod, udp(t, at(far4, 1), at(podA4, 2), 4), actOK, nil},
	} {
		before := b.counters()
		var opts []runOption
		if c.name == "delivered" {
			opts = append(opts, withMark(0x800))
		}
		if v := b.run(c.program, b.ifA, c.packet, opts...); v.code != c.code {
			t.Errorf("%s: verdict %d, want %d", c.name, v.code, c.code)
		}
		if c.counter != nil && c.counter(b.counters()) != c.counter(before)+1 {
			t.Errorf("%s: not counted", c.name)
		}
	}
	if r := b.records(); len(r) != 0 {
		t.Errorf("%d records, want none: %+v", len(r), r)
	}
}
