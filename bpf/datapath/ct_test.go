// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// fragment6 makes a fragment of an IPv6 UDP datagram; offset is in bytes.
func fragment6(t testing.TB, src, dst netip.Addr, id uint32, offset uint16, more bool, payload []byte) []byte {
	t.Helper()
	h := make([]byte, 8)
	h[0] = unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(h[2:], offset)
	if more {
		h[3] |= 1
	}
	binary.BigEndian.PutUint32(h[4:], id)
	return rawIP6(t, src, dst, unix.IPPROTO_FRAGMENT, append(h, payload...))
}

func udpHeader(sport, dport uint16, length int) []byte {
	h := make([]byte, 8)
	binary.BigEndian.PutUint16(h, sport)
	binary.BigEndian.PutUint16(h[2:], dport)
	binary.BigEndian.PutUint16(h[4:], uint16(length))
	return h
}

// Later fragments belong to the connection of their first one, at every observation point, and each is a packet.
func TestFragments(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Aggregation = AggregationNone })
	first := append(udpHeader(5000, 53, 1208), make([]byte, 592)...)
	later := make([]byte, 608)
	v4 := func(src, dst netip.Addr, id, offset uint16, more bool, payload []byte) []byte {
		return rawIP(t, src, dst, unix.IPPROTO_UDP, payload, func(l *layers.IPv4) {
			l.Id, l.FragOffset = id, offset/8
			if more {
				l.Flags = layers.IPv4MoreFragments
			}
		})
	}
	for _, c := range []struct {
		name       string
		program    string
		ifindex    uint32
		code       uint32
		parts      [][]byte
		points     int
		bytes      uint64
		fragmented bool
	}{
		{"v4 to remote", tcProgFromPod, b.ifA, actOK, [][]byte{v4(podA4, far4, 9, 0, true, first), v4(podA4, far4, 9, 600, false, later)}, 1, 1248, true},
		{"v6 to remote", tcProgFromPod, b.ifA, actOK,
			[][]byte{fragment6(t, podA6, far6, 9, 0, true, first), fragment6(t, podA6, far6, 9, 600, false, later)}, 1, 1304, true},
		{"v4 to local", tcProgFromPod, b.ifA, actRedirect, [][]byte{v4(podA4, podB4, 9, 0, true, first), v4(podA4, podB4, 9, 600, false, later)}, 2, 1248, true},
		{"v4 from network", tcProgFromNetwork, b.uplink, actRedirect,
			[][]byte{v4(out4, podA4, 9, 0, true, first), v4(out4, podA4, 9, 600, false, later)}, 1, 1248, true},
		{"v6 from host", tcProgFromHost, b.uplink, actRedirect,
			[][]byte{fragment6(t, node6, podB6, 9, 0, true, first), fragment6(t, node6, podB6, 9, 600, false, later)}, 1, 1304, true},
		{"an atomic fragment is a whole packet", tcProgFromPod, b.ifB, actOK,
			[][]byte{fragment6(t, podB6, far6, 10, 0, false, first), fragment6(t, podB6, far6, 11, 0, false, first)}, 1, 1296, false},
	} {
		for i, p := range c.parts {
			if v := b.run(c.program, c.ifindex, p); v.code != c.code {
				t.Errorf("%s: part %d: verdict %d, want %d", c.name, i, v.code, c.code)
			}
		}
		records := b.records()
		if len(records) != c.points*len(c.parts) {
			t.Fatalf("%s: %d records, want %d", c.name, len(records), c.points*len(c.parts))
		}
		for _, r := range records {
			if r.Sport != 5000 || r.Dport != 53 || (r.Flags&FlagFragment != 0) != c.fragmented {
				t.Errorf("%s: record of ports %d -> %d flags %x", c.name, r.Sport, r.Dport, r.Flags)
			}
		}
		last := records[len(records)-1]
		if last.Forward.Packets != 2 || last.Forward.Bytes != c.bytes {
			t.Errorf("%s: %d packets %d bytes, want 2 and %d", c.name, last.Forward.Packets, last.Forward.Bytes, c.bytes)
		}
	}
}

// A GSO packet counts as the segments that it stands for, each with its headers.
func TestSegments(t *testing.T) {
	b := newBench(t, nil)
	for i, c := range []struct {
		name       string
		packet     func(port uint16) []byte
		size, segs uint32
		packets    uint64
		bytes      uint64
	}{
		{"plain", func(p uint16) []byte { return tcp(t, at(podA4, p), at(far4, 80), ack, 1, 1, 1000) }, 0, 0, 1, 1040},
		{"one segment", func(p uint16) []byte { return tcp(t, at(podA4, p), at(far4, 80), ack, 1, 1, 1000) }, 1448, 1, 1, 1040},
		{"three segments", func(p uint16) []byte { return tcp(t, at(podA4, p), at(far4, 80), ack, 1, 1, 2500) }, 1000, 3, 3, 2500 + 3*40},
		{"three of IPv6", func(p uint16) []byte { return tcp(t, at(podA6, p), at(far6, 80), ack, 1, 1, 2500) }, 1000, 3, 3, 2500 + 3*60},
		{"UDP", func(p uint16) []byte { return udp(t, at(podA4, p), at(far4, 80), 2500) }, 1000, 3, 3, 2500 + 3*28},
		{"segments not told", func(p uint16) []byte { return tcp(t, at(podA4, p), at(far4, 80), ack, 1, 1, 2500) }, 1000, 0, 3, 2500 + 3*40},
	} {
		port := uint16(21000 + i)
		b.run(tcProgFromPod, b.ifA, c.packet(port), gso(c.size, c.segs))
		found := false
		for _, conn := range b.conns() {
			if conn.Source.Port() == port {
				found = true
				if conn.Forward.Packets != c.packets || conn.Forward.Bytes != c.bytes {
					t.Errorf("%s: %d packets %d bytes, want %d and %d", c.name, conn.Forward.Packets, conn.Forward.Bytes, c.packets, c.bytes)
				}
			}
		}
		if !found {
			t.Errorf("%s: no entry", c.name)
		}
	}
}

func TestICMP(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Aggregation = AggregationNone })
	for _, f := range []struct{ pod, far netip.Addr }{{podA4, far4}, {podA6, far6}} {
		// Two pings with one id, one each way, are two connections.
		b.run(tcProgFromPod, b.ifA, echo(t, f.pod, f.far, true, 77, 56))
		b.run(tcProgFromNetwork, b.uplink, echo(t, f.far, f.pod, false, 77, 56))
		b.run(tcProgFromNetwork, b.uplink, echo(t, f.far, f.pod, true, 77, 56))
		b.run(tcProgFromPod, b.ifA, echo(t, f.pod, f.far, false, 77, 56))
		records := b.records()
		if len(records) != 4 {
			t.Fatalf("%v: %d records, want 4", f.far, len(records))
		}
		for i, r := range records {
			reply, direction := i%2 == 1, DirectionEgress
			if i > 1 {
				direction = DirectionIngress
			}
			if r.IsReply() != reply || r.Direction != direction || r.Sport != 0 || r.Dport != 0 {
				t.Errorf("%v: record %d: reply %v direction %d ports %d %d", f.far, i, r.IsReply(), r.Direction, r.Sport, r.Dport)
			}
		}
		if records[0].Connection == records[2].Connection || records[0].Connection != records[1].Connection {
			t.Errorf("%v: connections %x %x %x", f.far, records[0].Connection, records[1].Connection, records[2].Connection)
		}
	}
}

// An ICMP error about a tracked connection is related to it; about another it is not.
func TestICMPRelated(t *testing.T) {
	b := newBench(t, nil)
	sent := udp(t, at(podA4, 1000), at(far4, 2000), 20)
	other := udp(t, at(podA4, 1001), at(far4, 2000), 20)
	b.run(tcProgFromPod, b.ifA, sent)
	sent6 := udp(t, at(podA6, 1000), at(far6, 2000), 20)
	b.run(tcProgFromPod, b.ifA, sent6)
	b.records()
	router4, router6 := netip.MustParseAddr("172.30.0.99"), netip.MustParseAddr("fd30::99")
	for _, c := range []struct {
		name    string
		packet  []byte
		related bool
	}{
		{"v4", rawIP(t, router4, podA4, unix.IPPROTO_ICMP, append([]byte{3, 1, 0, 0, 0, 0, 0, 0}, sent[14:42]...), nil), true},
		{"v6", rawIP6(t, router6, podA6, unix.IPPROTO_ICMPV6, append([]byte{1, 4, 0, 0, 0, 0, 0, 0}, sent6[14:]...)), true},
		{"v4 unknown", rawIP(t, far4, podA4, unix.IPPROTO_ICMP, append([]byte{3, 1, 0, 0, 0, 0, 0, 0}, other[14:42]...), nil), false},
	} {
		b.run(tcProgFromNetwork, b.uplink, c.packet)
		records := b.records()
		if len(records) != 1 || (records[0].Reason == TraceRelated) != c.related {
			t.Errorf("%s: records %+v, want one, related %v", c.name, records, c.related)
		}
	}
	for _, conn := range b.conns() {
		if conn.Proto == unix.IPPROTO_UDP && conn.Forward.Packets+conn.Reverse.Packets != 1 {
			t.Errorf("the error was counted in the connection: %+v", conn)
		}
	}
}

func TestSCTP(t *testing.T) {
	b := newBench(t, nil)
	sctp := func(src, dst netip.AddrPort, chunk byte) []byte {
		p := make([]byte, 16)
		binary.BigEndian.PutUint16(p, src.Port())
		binary.BigEndian.PutUint16(p[2:], dst.Port())
		p[12], p[15] = chunk, 4
		return packet(t, ip(src.Addr(), dst.Addr(), layers.IPProtocolSCTP), gopacket.Payload(p))
	}
	for _, f := range []struct{ pod, far netip.AddrPort }{{at(podA4, 5000), at(far4, 6000)}, {at(podA6, 5000), at(far6, 6000)}} {
		for i, s := range []struct {
			from  from
			chunk byte
			state ConnState
		}{
			{podSends, 1, StateSynSent}, {farSends, 2, StateSynRecv}, {podSends, 10, StateEstablished}, {farSends, 11, StateEstablished},
			{podSends, 0, StateEstablished}, {podSends, 7, StateFinWait}, {farSends, 8, StateFinWait}, {podSends, 14, StateClosed},
		} {
			if s.from == podSends {
				b.run(tcProgFromPod, b.ifA, sctp(f.pod, f.far, s.chunk))
			} else {
				b.run(tcProgFromNetwork, b.uplink, sctp(f.far, f.pod, s.chunk))
			}
			for _, conn := range b.conns() {
				if conn.Source == f.pod && conn.State != s.state {
					t.Errorf("%v: step %d: state %v, want %v", f.pod, i, conn.State, s.state)
				}
			}
		}
		// A new INIT on the closed entry is a new association.
		b.records()
		b.run(tcProgFromPod, b.ifA, sctp(f.pod, f.far, 1))
		if r := b.records(); len(r) != 2 || r[0].Type != RecordFinal || r[0].Forward.Packets != 5 || r[0].Reverse.Packets != 3 || r[1].Forward.Packets != 1 {
			t.Errorf("%v: records after a new INIT: %+v", f.pod, r)
		}
	}
}

// A new SYN on a closed connection begins another: final record first.
func TestTakeover(t *testing.T) {
	b := newBench(t, nil)
	client, server := at(podA4, 3000), at(podB4, 80)
	b.run(tcProgFromPod, b.ifA, tcp(t, client, server, syn, 1, 0, 0))
	b.run(tcProgFromPod, b.ifB, tcp(t, server, client, rst|ack, 0, 2, 0))
	before := b.records()
	b.run(tcProgFromPod, b.ifA, tcp(t, client, server, syn, 9, 0, 0))
	records := b.records()
	if len(records) != 4 {
		t.Fatalf("%d records, want a final and a new one at both ends: %+v", len(records), records)
	}
	for i, ep := range []uint16{epA, epB} {
		final, fresh := records[2*i], records[2*i+1]
		if final.Type != RecordFinal || final.Endpoint != ep || final.Forward.Packets != 1 || final.Reverse.Packets != 1 ||
			final.Connection != before[i].Connection || final.SrcAddr() != podA4 || final.Dport != 80 || final.State != uint8(StateClosed) {
			t.Errorf("endpoint %d: final %+v", ep, final)
		}
		if fresh.Type != RecordTrace || fresh.Reason != TraceNew || fresh.Forward.Packets != 1 || fresh.Reverse.Packets != 0 || fresh.Connection == final.Connection {
			t.Errorf("endpoint %d: new %+v", ep, fresh)
		}
	}
	if c := b.counters(); c.ConnsCreated != 4 || c.Written.Final != 2 || len(b.conns()) != 2 {
		t.Errorf("created %d, final %d, live %d, want 4, 2 and 2", c.ConnsCreated, c.Written.Final, len(b.conns()))
	}
}

// waitPast spins until the kernel's clock has passed a time.
func waitPast(t uint64) {
	for Now() <= t {
	}
}

// An entry that has expired is taken over by the next packet, or collected by the sweep.
func TestExpiry(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Timeouts.UDP = time.Millisecond })
	p := udp(t, at(podA4, 1), at(far4, 2), 10)
	b.run(tcProgFromPod, b.ifA, p)
	waitPast(b.conns()[0].Expires)
	b.records()
	b.run(tcProgFromPod, b.ifA, p)
	if r := b.records(); len(r) != 2 || r[0].Type != RecordFinal || r[1].Reason != TraceNew || r[1].Forward.Packets != 1 {
		t.Errorf("records of an expired entry's next packet: %+v", r)
	}
	waitPast(b.conns()[0].Expires)
	stats, err := b.Conntrack().Sweep()
	if err != nil {
		t.Fatal(err)
	}
	if stats.Collected != 1 || stats.Left != 0 || stats.Live != 0 {
		t.Errorf("sweep %+v, want 1 collected", stats)
	}
	if r := b.records(); len(r) != 1 || r[0].Type != RecordFinal || r[0].SrcAddr() != podA4 || r[0].DstAddr() != far4 || r[0].Dport != 2 {
		t.Errorf("records of a sweep: %+v", r)
	}
	if c := b.counters(); c.ConnsCreated != c.Written.Final || len(b.conns()) != 0 {
		t.Errorf("created %d, final %d, live %d", c.ConnsCreated, c.Written.Final, len(b.conns()))
	}
}

// A live connection stays.
func TestSweepLeavesLive(t *testing.T) {
	b := newBench(t, nil)
	b.run(tcProgFromPod, b.ifA, udp(t, at(podA4, 1), at(far4, 2), 10))
	stats, err := b.Conntrack().Sweep()
	if err != nil {
		t.Fatal(err)
	}
	if stats.Live != 1 || stats.Collected != 0 || len(b.conns()) != 1 {
		t.Errorf("sweep %+v with %d entries, want 1 live", stats, len(b.conns()))
	}
}

// A full table refuses new connections and says so; those it has go on. Under pressure, half-open ones go first.
func TestConntrackFull(t *testing.T) {
	const size = 64
	b := newBench(t, func(c *Config) { c.ConntrackMax = size })
	for i := range size {
		if v := b.run(tcProgFromPod, b.ifA, tcp(t, at(podA4, uint16(1000+i)), at(far4, 80), syn, 1, 0, 0)); v.code != actOK {
			t.Fatalf("connection %d of %d was refused", i, size)
		}
	}
	b.records()
	const refused = 10
	for i := range refused {
		if v := b.run(tcProgFromPod, b.ifA, tcp(t, at(podA4, uint16(2000+i)), at(far4, 80), syn, 1, 0, 0)); v.code != actShot {
			t.Fatal("a full table took a new connection")
		}
	}
	if v := b.run(tcProgFromPod, b.ifA, tcp(t, at(podA4, 1000), at(far4, 80), syn, 1, 0, 0)); v.code != actOK {
		t.Error("a connection that the table has was refused")
	}
	drops := 0
	for _, r := range b.records() {
		if r.Type == RecordDrop && r.Reason == DropConntrackFull {
			drops++
		}
	}
	if c := b.counters(); drops != refused || c.ConnsRefused != refused || c.ConnsCreated != size {
		t.Errorf("%d drop records, %d refused, %d created, want %d, %d and %d", drops, c.ConnsRefused, c.ConnsCreated, refused, refused, size)
	}
	var last uint64
	for _, c := range b.conns() {
		last = max(last, c.Forward.Last)
	}
	waitPast(last + uint64(halfOpenGrace))
	stats, err := b.Conntrack().Sweep()
	if err != nil {
		t.Fatal(err)
	}
	if stats.Collected != size || len(b.conns()) != 0 {
		t.Errorf("sweep under pressure: %+v, %d entries left", stats, len(b.conns()))
	}
}

// With rings that are too small, what is lost is counted, and totals are exact.
func TestRingOverflow(t *testing.T) {
	b := newBench(t, func(c *Config) { c.RingBytes = 4096; c.Timeouts.UDP = time.Millisecond })
	const conns, spoofed = 100, 30
	for i := range conns {
		b.run(tcProgFromPod, b.ifA, udp(t, at(podA4, uint16(1000+i)), at(far4, 2), 10))
	}
	for range spoofed {
		b.run(tcProgFromPod, b.ifA, udp(t, at(podB4, 9), at(far4, 2), 10))
	}
	c := b.counters()
	if c.Written.Trace+c.Lost.Trace != conns || c.Lost.Trace == 0 {
		t.Errorf("traces: %d written and %d lost, want %d together", c.Written.Trace, c.Lost.Trace, conns)
	}
	if c.Written.Drop+c.Lost.Drop != spoofed {
		t.Errorf("drops: %d written and %d lost, want %d together", c.Written.Drop, c.Lost.Drop, spoofed)
	}
	var byCPU uint64
	for _, l := range c.LostByCPU {
		byCPU += l.Total()
	}
	if byCPU != c.Lost.Total() {
		t.Errorf("%d lost by CPU, %d in all", byCPU, c.Lost.Total())
	}
	rows, err := b.Drops()
	if err != nil || len(rows) != 1 || rows[0].Records != spoofed {
		t.Errorf("drops map %+v (%v), want one row of %d", rows, err, spoofed)
	}
	// Expired entries that are taken over while the ring is full leave their totals in the counters.
	var last uint64
	for _, c := range b.conns() {
		last = max(last, c.Expires)
	}
	waitPast(last)
	for i := range 10 {
		b.run(tcProgFromPod, b.ifA, udp(t, at(podA4, uint16(1000+i)), at(far4, 2), 10))
	}
	c = b.counters()
	if c.Written.Final+c.ConnsUnreported != 10 || c.ConnsUnreported == 0 || c.UnreportedPackets != c.ConnsUnreported || c.UnreportedBytes != 38*c.ConnsUnreported {
		t.Errorf("taken over: %d finals, %d unreported with %d packets %d bytes", c.Written.Final, c.ConnsUnreported, c.UnreportedPackets, c.UnreportedBytes)
	}
	// The sweep gives nothing up that it cannot report: what does not fit waits.
	finals := c.Written.Final
	for rounds := 0; ; rounds++ {
		if rounds > conns {
			t.Fatal("the sweep makes no progress")
		}
		for _, conn := range b.conns() {
			last = max(last, conn.Expires)
		}
		waitPast(last)
		stats, err := b.Conntrack().Sweep()
		if err != nil {
			t.Fatal(err)
		}
		if stats.Left+stats.Live != len(b.conns()) {
			t.Errorf("sweep %+v, %d entries", stats, len(b.conns()))
		}
		for _, r := range b.records() {
			if r.Type == RecordFinal {
				finals--
			}
		}
		if len(b.conns()) == 0 {
			break
		}
	}
	c = b.counters()
	if c.ConnsCreated != c.Written.Final+c.ConnsUnreported {
		t.Errorf("%d created, %d finals, %d unreported", c.ConnsCreated, c.Written.Final, c.ConnsUnreported)
	}
}

// Two CPUs that count in the same entries, while they expire, are swept and taken over, lose nothing.
func TestConcurrentTotals(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Timeouts.UDP = 50 * time.Microsecond })
	const ports, rounds = 8, 20000
	packets := make([][]byte, ports)
	for i := range packets {
		packets[i] = udp(t, at(podA4, uint16(1000+i)), at(far4, 2), 10)
	}
	var writers, reader sync.WaitGroup
	for range 2 {
		writers.Go(func() {
			for i := range rounds {
				b.run(tcProgFromPod, b.ifA, packets[i%ports])
			}
		})
	}
	stop := make(chan struct{})
	var got, gotBytes, finals uint64
	drain := func() {
		for _, r := range b.records() {
			if r.Type == RecordFinal {
				finals++
				got += r.Forward.Packets + r.Reverse.Packets
				gotBytes += r.Forward.Bytes + r.Reverse.Bytes
			}
		}
	}
	reader.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := b.Conntrack().Sweep(); err != nil {
				t.Error(err)
				return
			}
			drain()
		}
	})
	writers.Wait()
	close(stop)
	reader.Wait()
	drain()
	c := b.counters()
	for _, conn := range b.conns() {
		got += conn.Forward.Packets + conn.Reverse.Packets
		gotBytes += conn.Forward.Bytes + conn.Reverse.Bytes
	}
	got += c.UnreportedPackets + c.UncountedPackets
	gotBytes += c.UnreportedBytes + c.UncountedBytes
	if got != 2*rounds || gotBytes != 2*rounds*38 {
		t.Errorf("%d packets %d bytes in all totals (%d uncounted), want %d and %d", got, gotBytes, c.UncountedPackets, 2*rounds, 2*rounds*38)
	}
	if live := uint64(len(b.conns())); c.ConnsCreated != c.Written.Final+c.ConnsUnreported+live || finals != c.Written.Final {
		t.Errorf("%d created, %d finals (%d read), %d unreported, %d live", c.ConnsCreated, c.Written.Final, finals, c.ConnsUnreported, live)
	}
	if finals < 100 {
		t.Errorf("only %d finals: the test did not test", finals)
	}
	t.Logf("%d connections, %d uncounted packets", c.ConnsCreated, c.UncountedPackets)
}
