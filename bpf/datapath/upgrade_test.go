// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"net/netip"
	"os"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// oldMap makes a map as an earlier version had it.
func (b *bench) oldMap(name string, kind ebpf.MapType, layout int, valueSize uint32) *ebpf.Map {
	b.Helper()
	now := b.coll.Maps[name]
	spec := &ebpf.MapSpec{Type: kind, KeySize: now.KeySize(), ValueSize: valueSize, MaxEntries: now.MaxEntries()}
	if kind != ebpf.PerCPUArray {
		spec.Flags = unix.BPF_F_NO_PREALLOC
	}
	m, err := ebpf.NewMap(spec)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { m.Close() })
	if err := m.Pin(b.oldPin(name, layout)); err != nil {
		b.Fatal(err)
	}
	return m
}

// moveToOld moves a map's rows into one of an earlier layout.
func (b *bench) moveToOld(name string, old *ebpf.Map) {
	b.Helper()
	var key, value []byte
	var keys [][]byte
	it := b.coll.Maps[name].Iterate()
	for it.Next(&key, &value) {
		if err := old.Put(key, value[:old.ValueSize()]); err != nil {
			b.Fatal(err)
		}
		keys = append(keys, append([]byte{}, key...))
	}
	if err := it.Err(); err != nil {
		b.Fatal(err)
	}
	for _, k := range keys {
		if err := b.coll.Maps[name].Delete(k); err != nil {
			b.Fatal(err)
		}
	}
}

// An earlier version's maps are taken over: what they held, and what its programs counted until the hooks had the new ones.
func TestUpgrade(t *testing.T) {
	b := newBench(t, nil)
	seen, busy, quiet := at(podA4, 1), at(podA4, 2), at(podA4, 3)
	server := at(far4, 80)
	for _, c := range []netip.AddrPort{seen, busy, quiet} {
		b.run(tcProgFromPod, b.ifA, tcp(t, c, server, syn, 1, 0, 0))
		b.run(tcProgFromNetwork, b.uplink, tcp(t, server, c, syn|ack, 1, 2, 0))
	}
	oldCt := b.oldMap(tcMapCt, ebpf.Hash, ctBefore.layout, ctBefore.valueSize)
	oldCache := b.oldMap(tcMapIpcache, ebpf.LPMTrie, 1, 24)
	oldEndpoints := b.oldMap(tcMapEndpoints, ebpf.Hash, 1, 16)
	oldMetrics := b.oldMap(tcMapMetrics, ebpf.PerCPUArray, metricsLayoutsBefore[0], 16)
	wantCache, err := b.IPCache().List()
	if err != nil {
		t.Fatal(err)
	}
	b.moveToOld(tcMapCt, oldCt)
	b.moveToOld(tcMapIpcache, oldCache)
	b.moveToOld(tcMapEndpoints, oldEndpoints)
	before := b.counters()
	bump := func(n uint64) {
		values := make([]tcMetricValue, ebpf.MustPossibleCPU())
		values[0] = tcMetricValue{Count: n, Bytes: 60 * n}
		if err := oldMetrics.Put(uint32(tcMetricMETRIC_ARP), values); err != nil {
			t.Fatal(err)
		}
	}
	bump(5)

	old, err := b.copyOld()
	if err != nil {
		t.Fatal(err)
	}
	// The new programs carry one of the connections on; the old ones have packets of two, and a new connection.
	b.run(tcProgFromPod, b.ifA, tcp(t, seen, server, ack, 2, 2, 10))
	if got := len(b.conns()); got != 3 {
		t.Errorf("%d entries, want the 3 of before", got)
	}
	fresh := at(podA4, 4)
	var key tcCtKey
	var value []byte
	changed := map[tcCtKey][]byte{} // first collected: what is written while it is walked may be met twice
	it := oldCt.Iterate()
	for it.Next(&key, &value) {
		entry := make([]byte, unsafe.Sizeof(tcCtEntry{})) // as long as an entry is now
		copy(entry, value)
		conn := &(*tcCtEntry)(unsafe.Pointer(&entry[0])).Conn
		port := port16(key.LoPort)
		if key.Hi.netip() == podA4 {
			port = port16(key.HiPort)
		}
		if port == quiet.Port() {
			continue
		}
		conn.Dir[0].Packets += 7
		conn.Dir[0].Bytes += 700
		conn.Dir[0].Last++
		changed[key] = entry[:len(value)]
	}
	if err := it.Err(); err != nil {
		t.Fatal(err)
	}
	for key, entry := range changed {
		if err := oldCt.Put(key, entry); err != nil {
			t.Fatal(err)
		}
	}
	b.run(tcProgFromPod, b.ifA, tcp(t, fresh, server, syn, 1, 0, 0))
	bump(8)
	if err := b.adoptRest(old); err != nil {
		t.Fatal(err)
	}
	if err := old.close(); err != nil {
		t.Fatal(err)
	}
	want := map[uint16]uint64{seen.Port(): 1 + 1 + 7, busy.Port(): 1 + 7, quiet.Port(): 1, fresh.Port(): 1}
	for _, c := range b.conns() {
		if c.Forward.Packets != want[c.Source.Port()] {
			t.Errorf("connection from port %d: %d packets, want %d", c.Source.Port(), c.Forward.Packets, want[c.Source.Port()])
		}
		delete(want, c.Source.Port())
	}
	if len(want) != 0 {
		t.Errorf("no entries for ports %v", want)
	}
	rows, err := b.IPCache().List()
	if err != nil || len(rows) != len(wantCache) {
		t.Errorf("ipcache of %d rows, error %v, want %d", len(rows), err, len(wantCache))
	}
	if rows, err := b.Endpoints().List(); err != nil || len(rows) != 4 {
		t.Errorf("endpoints %v, error %v, want 4", rows, err)
	}
	if c := b.counters(); c.ARP != before.ARP+8 || c.ConnsCreated != before.ConnsCreated+1 {
		t.Errorf("counted %d ARP and %d connections, want %d and %d", c.ARP, c.ConnsCreated, before.ARP+8, before.ConnsCreated+1)
	}
	for name, layout := range map[string]int{tcMapCt: ctBefore.layout, tcMapIpcache: 1, tcMapEndpoints: 1, tcMapMetrics: metricsLayoutsBefore[0]} {
		if _, err := os.Stat(b.oldPin(name, layout)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the old %s is still pinned: %v", name, err)
		}
	}
	// The carried connections are decided by policy like any other, in the direction that they have.
	b.policy(6, map[uint32][]PolicyRange{0: nothing})
	b.enforce(epA, EndpointPolicy{Egress: 6})
	b.expect("answer of a carried connection", defaultDenied(DirectionEgress), tcProgFromNetwork, b.uplink, tcp(t, server, quiet, ack, 2, 2, 5))
}

// A connection that began at an earlier version's program, after its map was copied, is known to the new programs: its answers pass where policy lets
// nobody begin, and its totals are those of both.
func TestUpgradeBetweenHooks(t *testing.T) {
	b := newBench(t, nil)
	client, server := at(podA4, 1), at(far4, 80)
	b.run(tcProgFromPod, b.ifA, tcp(t, client, server, syn, 1, 0, 0))
	old := b.oldMap(tcMapCt, ebpf.Hash, ctBefore.layout, ctBefore.valueSize)
	b.moveToOld(tcMapCt, old)
	fresh := &Datapath{cfg: b.cfg, log: b.log, links: map[string]heldLink{}}
	if err := fresh.loadCollections(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fresh.Close(); err != nil {
			t.Error(err)
		}
	})
	b.policy(6, map[uint32][]PolicyRange{0: nothing})
	b.enforce(epA, EndpointPolicy{Ingress: 6})
	coll := b.coll
	b.coll = fresh.coll
	defer func() { b.coll = coll }()
	b.expect("an answer", passes, tcProgFromNetwork, b.uplink, tcp(t, server, client, syn|ack, 1, 2, 0))
	b.expect("an answer to nothing", defaultDenied(DirectionIngress), tcProgFromNetwork, b.uplink, tcp(t, server, at(podA4, 2), syn|ack, 1, 2, 0))
	if err := b.adoptRest(&takeover{maps: map[string]*ebpf.Map{tcMapCt: old}}); err != nil {
		t.Fatal(err)
	}
	conns := b.conns()
	if len(conns) != 1 || conns[0].Forward.Packets != 1 || conns[0].Reverse.Packets != 1 || conns[0].Source != client {
		t.Errorf("connections %+v, want one of a packet each way", conns)
	}
}
