// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// backends are ready ones elsewhere.
func backends(list ...netip.AddrPort) []Backend {
	var out []Backend
	for _, a := range list {
		out = append(out, Backend{AddrPort: a})
	}
	return out
}

func checkServices(t *testing.T, d *Datapath, want ...Service) {
	t.Helper()
	got, err := d.Services().List()
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(want, func(a, b Service) int { return int(a.ID) - int(b.ID) })
	for i := range max(len(got), len(want)) {
		switch {
		case i >= len(got):
			t.Errorf("missing: %+v", want[i])
		case i >= len(want):
			t.Errorf("not wanted: %+v", got[i])
		case !got[i].equal(&want[i]):
			t.Errorf("service %d:\n%+v, want\n%+v", got[i].ID, got[i], want[i])
		}
	}
}

// rowsIn counts the rows of the maps of services.
func rowsIn(t *testing.T, d *Datapath) map[string]int {
	t.Helper()
	out := map[string]int{}
	var err [5]error
	err[0] = walkMap(d.coll.Maps[tcMapServices], func(tcServiceKey, tcService) { out[tcMapServices]++ })
	err[1] = walkMap(d.coll.Maps[tcMapBackends], func(tcBackendKey, tcBackend) { out[tcMapBackends]++ })
	err[2] = walkMap(d.coll.Maps[tcMapMembers], func(tcMemberKey, uint32) { out[tcMapMembers]++ })
	var k tcRangeKey
	var v uint32
	it := d.coll.Maps[tcMapSourceRanges].Iterate()
	for it.Next(&k, &v) {
		out[tcMapSourceRanges]++
	}
	err[3] = it.Err()
	var mk [2]uint32
	mv := make([]byte, d.coll.Maps[tcMapMaglev].ValueSize())
	it = d.coll.Maps[tcMapMaglev].Iterate()
	for it.Next(&mk, &mv) {
		out[tcMapMaglev]++
	}
	err[4] = it.Err()
	if err := errors.Join(err[:]...); err != nil {
		t.Fatal(err)
	}
	return out
}

func checkRows(t *testing.T, d *Datapath, services, backends, tables, ranges int) {
	t.Helper()
	want := map[string]int{}
	for name, n := range map[string]int{
		tcMapServices: services, tcMapBackends: backends, tcMapMembers: backends, tcMapMaglev: tables, tcMapSourceRanges: ranges,
	} {
		if n > 0 {
			want[name] = n
		}
	}
	if got := rowsIn(t, d); !reflect.DeepEqual(got, want) {
		t.Errorf("rows %v, want %v", got, want)
	}
	for _, u := range d.Services().Usage() {
		if u.Entries != want[u.Map] || u.Max == 0 {
			t.Errorf("usage %+v, want %d entries", u, want[u.Map])
		}
	}
}

// What is written can be read back, also by the next process; nothing is left behind.
func TestServices(t *testing.T) {
	pin := bpffs(t)
	d := load(t, smallConfig(pin))
	var (
		f4  = Frontend{vip4, 80, unix.IPPROTO_TCP}
		f6  = Frontend{vip6, 53, unix.IPPROTO_UDP}
		np4 = Frontend{netip.IPv4Unspecified(), 30080, unix.IPPROTO_TCP}
		lb4 = Frontend{netip.MustParseAddr("198.51.100.7"), 80, unix.IPPROTO_TCP}
		two = []Backend{{at(podA4, 8080), true, false}, {at(podB4, 8080), false, true}}
	)
	plain := Service{Frontend: f4, ID: 1, Backends: two}
	empty := Service{Frontend: f6, ID: 2}
	node := Service{Frontend: np4, ID: 3, Kind: NodePort, Backends: two, ExternalLocal: true, Affinity: 3 * time.Hour, AffinityGroup: 9}
	lb := Service{Frontend: lb4, ID: 4, Kind: LoadBalancer, Backends: two, Algorithm: Maglev, ExternalLocal: true,
		SourceRanges: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")}}
	for _, list := range [][]Service{
		{{Frontend: f4, ID: 1, Backends: backends(at(podA4, 8080))}},
		{plain, empty, node, lb},
		{plain, empty, node, lb},
		{lb, lb},
	} {
		if err := d.Services().Upsert(list...); err != nil {
			t.Fatal(err)
		}
	}
	checkServices(t, d, plain, empty, node, lb)
	// The plain and the node port share a set; that of the load balancer has tables. The empty set has no rows.
	checkRows(t, d, 4, 4, 2, 2)
	// What a process left half done when it died goes with the next Load.
	for _, err := range []error{
		d.coll.Maps[tcMapBackends].Put(tcBackendKey{Set: 999, Slot: 0}, tcBackend{}),
		d.coll.Maps[tcMapMembers].Put(tcMemberKey{Set: 999}, uint32(1)),
		d.coll.Maps[tcMapSourceRanges].Put(rangeKey(999, netip.MustParsePrefix("192.0.2.0/24")), uint32(1)),
		d.coll.Maps[tcMapMaglev].Put([2]uint32{999, 0}, make([]byte, 2*251)),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	again := load(t, smallConfig(pin))
	checkServices(t, again, plain, empty, node, lb)
	checkRows(t, again, 4, 4, 2, 2)

	// Tables of another size are made anew.
	cfg := smallConfig(pin)
	cfg.MaglevTableSize = 509
	again = load(t, cfg)
	checkRows(t, again, 4, 4, 2, 2)

	lb.SourceRanges, lb.ID, lb.Algorithm = lb.SourceRanges[:1], 5, Random
	if err := again.Services().Upsert(lb); err != nil {
		t.Fatal(err)
	}
	checkServices(t, again, plain, empty, node, lb)
	checkRows(t, again, 4, 2, 0, 1)
	if err := again.Services().Delete(f4, f6, f4); err != nil {
		t.Fatal(err)
	}
	checkServices(t, again, node, lb)
	checkRows(t, again, 2, 2, 0, 1)
	if err := again.Services().Delete(np4, lb4); err != nil {
		t.Fatal(err)
	}
	checkServices(t, again)
	checkRows(t, again, 0, 0, 0, 0)
}

func TestServicesRefused(t *testing.T) {
	d := load(t, smallConfig(bpffs(t)))
	f := Frontend{vip4, 80, unix.IPPROTO_TCP}
	for name, bad := range map[string]Service{
		"no id":             {Frontend: f},
		"no frontend":       {ID: 1},
		"other family":      {Frontend: f, ID: 1, Backends: backends(at(podA6, 1))},
		"twice":             {Frontend: f, ID: 1, Backends: backends(at(podA4, 1), at(podA4, 1))},
		"backend port":      {Frontend: f, ID: 1, Backends: backends(at(podA4, 0))},
		"node port address": {Frontend: f, ID: 1, Kind: NodePort},
		"unspecified":       {Frontend: Frontend{netip.IPv6Unspecified(), 80, 6}, ID: 1},
		"affinity":          {Frontend: f, ID: 1, Affinity: time.Millisecond},
		"range":             {Frontend: f, ID: 1, SourceRanges: []netip.Prefix{{}}},
		"algorithm":         {Frontend: f, ID: 1, Algorithm: 7},
	} {
		err := d.Services().Upsert(bad)
		var se *ServiceError
		if !errors.As(err, &se) || se.Frontend != bad.Frontend {
			t.Errorf("%s: %v, want an error of the service", name, err)
		}
	}
	checkServices(t, d)
	checkRows(t, d, 0, 0, 0, 0)
}

// A full map refuses by name what does not fit; what is there stays, and all else is written.
func TestServicesFull(t *testing.T) {
	d := load(t, smallConfig(bpffs(t)))
	some := func(id uint32, port uint16, n int) Service {
		svc := Service{Frontend: Frontend{vip4, port, unix.IPPROTO_TCP}, ID: id}
		for i := range n {
			svc.Backends = append(svc.Backends, Backend{AddrPort: at(podA4, uint16(1000*int(id)+i+1))})
		}
		return svc
	}
	maglev := some(5, 84, 2)
	maglev.Algorithm = Maglev
	first := some(1, 80, 200)
	if err := d.Services().Upsert(first, maglev); err != nil {
		t.Fatal(err)
	}
	big, small := some(2, 81, 100), some(3, 82, 20)
	grown := first
	grown.Backends = some(9, 80, 60).Backends
	err := d.Services().Upsert(big, grown, small)
	var failed []Frontend
	for _, e := range err.(interface{ Unwrap() []error }).Unwrap() {
		var se *ServiceError
		if !errors.As(e, &se) || !errors.Is(e, ErrFull) {
			t.Errorf("error %v", e)
			continue
		}
		failed = append(failed, se.Frontend)
	}
	if want := []Frontend{big.Frontend, grown.Frontend}; !slices.Equal(failed, want) {
		t.Errorf("refused %v, want %v", failed, want)
	}
	checkServices(t, d, first, small, maglev)
	checkRows(t, d, 3, 222, 1, 0)
	if err := d.Services().Delete(first.Frontend); err != nil {
		t.Fatal(err)
	}
	if err := d.Services().Upsert(big); err != nil {
		t.Errorf("no room after a deletion: %v", err)
	}
	checkRows(t, d, 3, 122, 1, 0)

	var many []Service
	for i := range 64 {
		many = append(many, some(uint32(100+i), uint16(1000+i), 0))
	}
	if err := d.Services().Upsert(many...); !errors.Is(err, ErrFull) {
		t.Errorf("67 services in a map of 64: %v", err)
	}
	checkRows(t, d, 64, 122, 1, 0)
}

// ServiceSlots: what the programs and the owner call the slots of new connections is the same.
func TestSetOrder(t *testing.T) {
	b := func(port uint16, local, terminating bool) Backend {
		return Backend{at(podA4, port), local, terminating}
	}
	for _, c := range []struct {
		name         string
		backends     []Backend
		wide, inside string
	}{
		{"none", nil, "[]", "[]"},
		{"mixed", []Backend{b(1, false, true), b(2, true, true), b(3, false, false), b(4, true, false)}, "[4 3]", "[4]"},
		{"terminating alone", []Backend{b(1, false, true), b(2, true, true)}, "[2 1]", "[2]"},
		{"local ones are terminating", []Backend{b(1, false, false), b(2, true, true), b(3, false, true)}, "[1]", "[2]"},
		{"none local", []Backend{b(1, false, false)}, "[1]", "[]"},
	} {
		svc := Service{Frontend: Frontend{vip4, 1, 6}, ID: 1, Backends: c.backends}
		set := newSet(1, setKey(&svc), &svc)
		for i, want := range []string{c.wide, c.inside} {
			first, count := set.slots(i == 1)
			ports := []uint16{}
			for _, x := range set.backends[first : first+count] {
				ports = append(ports, x.Port())
			}
			if got := fmt.Sprint(ports); got != want {
				t.Errorf("%s, local %v: %v, want %v", c.name, i == 1, got, want)
			}
		}
	}
}
