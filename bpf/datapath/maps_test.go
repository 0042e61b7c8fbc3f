// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
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
