// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestEndpoints(t *testing.T) {
	d := load(t, smallConfig(bpffs(t)))
	e := d.Endpoints()
	mac, _ := net.ParseMAC(macPodText)
	rows := []EndpointRow{
		{podA4, Endpoint{ID: epA, Identity: idA, IfIndex: 11, MAC: mac}},
		{podA6, Endpoint{ID: epA, Identity: idA, IfIndex: 11, MAC: mac}},
		{podB4, Endpoint{ID: epB, Identity: idB, IfIndex: 12, MAC: mac}},
	}
	for _, r := range rows {
		r.NetnsCookie = uint64(r.IfIndex) * 100
		if err := e.Upsert(r.Addr, r.Endpoint); err != nil {
			t.Fatal(err)
		}
	}
	list := func() []string {
		got, err := e.List()
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, r := range got {
			out = append(out, fmt.Sprint(r))
		}
		slices.Sort(out)
		return out
	}
	var want []string
	for _, r := range rows {
		want = append(want, fmt.Sprint(r))
	}
	slices.Sort(want)
	if got := list(); !slices.Equal(got, want) {
		t.Errorf("endpoints %v, want %v", got, want)
	}
	var owner tcNetnsEndpoint
	if err := d.coll.Maps[tcMapNetns].Lookup(uint64(1100), &owner); err != nil || owner.V4.netip() != podA4 || owner.V6.netip() != podA6 || owner.Id != epA {
		t.Errorf("namespace row %+v (%v)", owner, err)
	}
	var row tcEndpoint
	interfaces := d.coll.Maps[tcMapInterfaces]
	for _, step := range []struct {
		addr netip.Addr
		left bool // the interface has an address left
	}{{podA4, true}, {podA6, false}, {podA6, false}} {
		if err := e.Delete(step.addr); err != nil {
			t.Fatal(err)
		}
		if found := interfaces.Lookup(uint32(11), &row) == nil; found != step.left {
			t.Errorf("after %v: interface row %v, want %v", step.addr, found, step.left)
		}
	}
	if err := d.coll.Maps[tcMapNetns].Lookup(uint64(1100), &owner); err == nil {
		t.Error("the namespace row is left behind")
	}
	for _, bad := range []Endpoint{{ID: 0, IfIndex: 1}, {ID: 1}, {ID: 1, IfIndex: 1, MAC: mac[:4]}} {
		if err := e.Upsert(podA4, bad); err == nil {
			t.Errorf("took %+v", bad)
		}
	}
}

func TestIPCache(t *testing.T) {
	d := load(t, smallConfig(bpffs(t)))
	c := d.IPCache()
	want := map[netip.Prefix]IPCacheEntry{
		netip.MustParsePrefix("0.0.0.0/0"):        {Identity: 9},
		netip.MustParsePrefix("10.244.2.0/24"):    {Identity: 3, NodeAddr: netip.MustParseAddr("172.30.0.12")},
		netip.MustParsePrefix("10.244.2.7/32"):    {Identity: idFar, NodeAddr: netip.MustParseAddr("172.30.0.12")},
		netip.MustParsePrefix("::/0"):             {Identity: 10},
		netip.MustParsePrefix("fd00:10:96::/112"): {Flags: IPCacheServices},
	}
	for p, e := range want {
		if err := c.Upsert(p, IPCacheEntry{Identity: 1}); err != nil {
			t.Fatal(err)
		}
		if err := c.Upsert(p, e); err != nil {
			t.Fatal(err)
		}
	}
	rows, err := c.List()
	if err != nil || len(rows) != len(want) {
		t.Fatalf("%d rows (%v), want %d", len(rows), err, len(want))
	}
	for _, r := range rows {
		if r.IPCacheEntry != want[r.Prefix] {
			t.Errorf("%v: %+v, want %+v", r.Prefix, r.IPCacheEntry, want[r.Prefix])
		}
	}
	for p := range want {
		if err := c.Delete(p); err != nil {
			t.Fatal(err)
		}
		if err := c.Delete(p); err != nil {
			t.Errorf("delete of what is gone: %v", err)
		}
	}
	if rows, _ := c.List(); len(rows) != 0 {
		t.Errorf("%d rows left", len(rows))
	}
	if err := c.Upsert(netip.Prefix{}, IPCacheEntry{}); err == nil {
		t.Error("took an invalid prefix")
	}
}

func TestServices(t *testing.T) {
	pin := bpffs(t)
	d := load(t, smallConfig(pin))
	f4, f6 := Frontend{vip4, 80, unix.IPPROTO_TCP}, Frontend{vip6, 53, unix.IPPROTO_UDP}
	for _, svc := range []Service{
		{f4, 1, []netip.AddrPort{at(podA4, 8080)}},
		{f4, 1, []netip.AddrPort{at(podA4, 8080), at(podB4, 8080)}},
		{f6, 2, nil},
	} {
		if err := d.Services().Upsert(svc); err != nil {
			t.Fatal(err)
		}
	}
	check := func(d *Datapath, want ...string) {
		t.Helper()
		list, err := d.Services().List()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range list {
			got = append(got, fmt.Sprint(s))
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("services %v, want %v", got, want)
		}
	}
	backends := func(d *Datapath) (n int) {
		var k tcBackendKey
		var v tcBackend
		it := d.coll.Maps[tcMapBackends].Iterate()
		for it.Next(&k, &v) {
			n++
		}
		return n
	}
	all := []string{fmt.Sprint(Service{f4, 1, []netip.AddrPort{at(podA4, 8080), at(podB4, 8080)}}), fmt.Sprint(Service{f6, 2, nil})}
	check(d, all...)
	if n := backends(d); n != 2 {
		t.Errorf("%d backends, want 2: the old set goes", n)
	}
	// What a process left half done when it died goes with the next Load.
	if err := d.coll.Maps[tcMapBackends].Put(tcBackendKey{Set: 999, Slot: 0}, tcBackend{}); err != nil {
		t.Fatal(err)
	}
	again := load(t, smallConfig(pin))
	if n := backends(again); n != 2 {
		t.Errorf("%d backends after a restart, want 2", n)
	}
	check(again, all...)
	if err := again.Services().Upsert(Service{f4, 1, []netip.AddrPort{at(podB4, 1)}}); err != nil {
		t.Fatal(err)
	}
	for _, f := range []Frontend{f6, f4, f4} {
		if err := again.Services().Delete(f); err != nil {
			t.Fatal(err)
		}
	}
	check(again)
	if n := backends(again); n != 0 {
		t.Errorf("%d backends left", n)
	}
	for _, bad := range []Service{{f4, 0, nil}, {Frontend{}, 1, nil}, {f4, 1, []netip.AddrPort{at(podA6, 1)}}} {
		if err := again.Services().Upsert(bad); err == nil {
			t.Errorf("took %+v", bad)
		}
	}
}

func TestConfigValidate(t *testing.T) {
	good := DefaultConfig()
	good.PinPath = "/p"
	if err := good.Validate(); err != nil {
		t.Fatalf("defaults: %v", err)
	}
	bad := Config{NodeIPv4: podA6, NodeIPv6: podA4, Aggregation: 9}
	err := bad.Validate()
	if err == nil {
		t.Fatal("took an empty config")
	}
	for _, word := range []string{"pin path", "ring bytes", "conntrack max", "report interval", "aggregation", "nat ports", "IPv4", "IPv6"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("faults do not name %q: %v", word, err)
		}
	}
	for word, want := range map[string]Aggregation{"none": AggregationNone, "medium": AggregationMedium} {
		if got, err := ParseAggregation(word); err != nil || got != want || got.String() != word {
			t.Errorf("aggregation %q: %v (%v)", word, got, err)
		}
	}
	if _, err := ParseAggregation("some"); err == nil {
		t.Error("took an unknown aggregation")
	}
}
