// SPDX-License-Identifier: Apache-2.0

package dnsnames

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/internal/policy"
)

// fakeMaps check the order of writes: no address is ever in a set without its rows.
type fakeMaps struct {
	t  testing.TB
	mu sync.Mutex

	addresses map[netip.Addr]uint32
	rows      map[Row][]Range
	fail      map[netip.Addr]error
	failRows  error
	needRows  bool // every set of an address must have a row
	writes    int
}

func newFakeMaps(t testing.TB) *fakeMaps {
	return &fakeMaps{t: t, addresses: map[netip.Addr]uint32{}, rows: map[Row][]Range{}, fail: map[netip.Addr]error{}, needRows: true}
}

func (m *fakeMaps) hasRow(set uint32) bool {
	for r := range m.rows {
		if r.Set == set {
			return true
		}
	}
	return false
}

func (m *fakeMaps) SetAddress(addr netip.Addr, set uint32) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.fail[addr]; err != nil {
		return err
	}
	if m.needRows && !m.hasRow(set) {
		m.t.Errorf("%v gets set %d before its rows are there", addr, set)
	}
	m.addresses[addr] = set
	m.writes++
	return nil
}

func (m *fakeMaps) DeleteAddress(addr netip.Addr) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.addresses, addr)
	m.writes++
	return nil
}

func (m *fakeMaps) SetPolicy(policy, set uint32, ranges []Range) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failRows != nil {
		return m.failRows
	}
	m.rows[Row{policy, set}] = slices.Clone(ranges)
	m.writes++
	return nil
}

func (m *fakeMaps) DeletePolicy(policy, set uint32) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.rows, Row{policy, set})
	m.writes++
	return nil
}

func (m *fakeMaps) Addresses() (map[netip.Addr]uint32, error) { return maps.Clone(m.addresses), nil }

func (m *fakeMaps) Policies() ([]Row, error) { return slices.Collect(maps.Keys(m.rows)), nil }

// allows returns what a policy allows to an address, as a program sees it.
func (m *fakeMaps) allows(policy uint32, addr string) []Range {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rows[Row{policy, m.addresses[netip.MustParseAddr(addr)]}]
}

type bench struct {
	*Engine
	t    testing.TB
	maps *fakeMaps
	now  time.Time
	live map[netip.Addr]struct{}
}

func newBench(t testing.TB, change func(*Config)) *bench {
	t.Helper()
	b := &bench{t: t, maps: newFakeMaps(t), now: time.Unix(1000, 0), live: map[netip.Addr]struct{}{}}
	cfg := Config{
		Maps: b.maps, Live: func() (map[netip.Addr]struct{}, error) { return b.live, nil }, Match: policy.MatchName, PerName: 1000, PerEndpoint: 1000,
		Max: 10000, MaxKept: 100, Now: func() time.Time { return b.now }, Log: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&cfg)
	}
	b.Engine = New(cfg)
	return b
}

// learn learns and writes, and fails the test when the answer may not go out.
func (b *bench) learn(endpoint uint16, name string, ttl time.Duration, addrs ...string) {
	b.t.Helper()
	if err := b.tryLearn(endpoint, name, ttl, addrs...); err != nil {
		b.t.Fatalf("learn %s: %v", name, err)
	}
}

func (b *bench) tryLearn(endpoint uint16, name string, ttl time.Duration, addrs ...string) error {
	var list []netip.Addr
	for _, a := range addrs {
		list = append(list, netip.MustParseAddr(a))
	}
	done := make(chan error, 1)
	if b.Learn(endpoint, name, list, ttl, func(err error) { done <- err }) {
		return nil
	}
	flushErr := b.flush()
	select {
	case err := <-done:
		return err
	default:
		return fmt.Errorf("nobody was told: %w", flushErr)
	}
}

func (b *bench) update(upserts []Policy, removed ...uint32) {
	b.t.Helper()
	done := false
	b.Update(upserts, removed, false, func() { done = true })
	if err := b.flush(); err != nil || !done {
		b.t.Fatalf("update: done %v, %v", done, err)
	}
}

// pass lets time go by, with a sweep.
func (b *bench) pass(d time.Duration) {
	b.t.Helper()
	b.now = b.now.Add(d)
	b.sweep()
	if err := b.flush(); err != nil {
		b.t.Fatal(err)
	}
}

func byName(name string, ranges ...Range) Selector {
	return Selector{policy.NameSelector{MatchName: name}, ranges}
}

func byPattern(pattern string, ranges ...Range) Selector {
	return Selector{policy.NameSelector{MatchPattern: pattern}, ranges}
}

var (
	https = Range{Proto: 6, First: 443, Last: 443, Rule: 1}
	http  = Range{Proto: 6, First: 80, Last: 80, Rule: 2}
	all   = Range{Last: 65535, Rule: 3}
)

func TestAnswerOpensItsAddresses(t *testing.T) {
	b := newBench(t, nil)
	b.update([]Policy{{7, []Selector{byName("a.example", https), byPattern("*.example", http)}}, {8, []Selector{byPattern("*.org", all)}}})
	b.learn(1, "a.example.", time.Minute, "1.1.1.1", "2001:db8::1")
	b.learn(1, "b.example.", time.Minute, "2.2.2.2")
	b.learn(2, "elsewhere.net.", time.Minute, "3.3.3.3")
	for _, c := range []struct {
		policy uint32
		addr   string
		want   []Range
	}{
		{7, "1.1.1.1", []Range{http, https}}, {7, "2001:db8::1", []Range{http, https}}, {7, "2.2.2.2", []Range{http}}, {7, "3.3.3.3", nil},
		{8, "1.1.1.1", nil},
	} {
		if diff := cmp.Diff(c.want, b.maps.allows(c.policy, c.addr)); diff != "" {
			t.Errorf("policy %d, %s: %s", c.policy, c.addr, diff)
		}
	}
	// The same address by another policy's name.
	b.learn(2, "x.org.", time.Minute, "1.1.1.1")
	if diff := cmp.Diff([]Range{all}, b.maps.allows(8, "1.1.1.1")); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]Range{http, https}, b.maps.allows(7, "1.1.1.1")); diff != "" {
		t.Error(diff)
	}
	if r, ok := b.Range(7, netip.MustParseAddr("1.1.1.1"), 6, 443); !ok || r != https {
		t.Errorf("Range: %v, %v", r, ok)
	}
	if _, ok := b.Range(7, netip.MustParseAddr("1.1.1.1"), 6, 444); ok {
		t.Error("port 444 is allowed")
	}
	// The second time, nothing is to be written.
	writes := b.maps.writes
	b.learn(1, "a.example.", time.Minute, "1.1.1.1")
	if b.maps.writes != writes {
		t.Error("a known answer was written again")
	}
}

func TestPoliciesChangeAfterwards(t *testing.T) {
	b := newBench(t, nil)
	b.learn(1, "a.example.", time.Minute, "1.1.1.1")
	b.learn(1, "b.example.", time.Minute, "2.2.2.2")
	if len(b.maps.addresses) != 0 {
		t.Fatalf("addresses %v without a policy", b.maps.addresses)
	}
	b.update([]Policy{{7, []Selector{byPattern("*.example", http)}}})
	if diff := cmp.Diff([]Range{http}, b.maps.allows(7, "1.1.1.1")); diff != "" {
		t.Error(diff)
	}
	b.update([]Policy{{7, []Selector{byPattern("*.example", https)}}, {8, []Selector{byName("a.example", all)}}})
	if diff := cmp.Diff([]Range{https}, b.maps.allows(7, "2.2.2.2")); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]Range{all}, b.maps.allows(8, "1.1.1.1")); diff != "" {
		t.Error(diff)
	}
	b.update([]Policy{{7, nil}})
	if b.maps.allows(7, "1.1.1.1") != nil || b.maps.allows(8, "1.1.1.1") == nil || b.maps.allows(7, "2.2.2.2") != nil {
		t.Errorf("after removal: %v %v", b.maps.addresses, b.maps.rows)
	}
	b.update(nil, 8)
	if len(b.maps.addresses)+len(b.maps.rows) != 0 {
		t.Errorf("left over: %v %v", b.maps.addresses, b.maps.rows)
	}
	if s := b.Stats(); s.Selectors != 0 || s.Sets != 0 || s.Names != 2 {
		t.Errorf("%+v", s)
	}
}

func TestExpiry(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Grace = 10 * time.Second })
	b.update([]Policy{{7, []Selector{byPattern("**.example", http)}}})
	used := netip.MustParseAddr("2.2.2.2")
	b.live[used] = struct{}{}
	b.learn(1, "a.example.", 30*time.Second, "1.1.1.1", "2.2.2.2")
	b.learn(1, "zero.example.", 0, "3.3.3.3")
	b.pass(500 * time.Millisecond)
	if b.maps.allows(7, "3.3.3.3") == nil {
		t.Error("an answer without a lifetime is over before the client could connect")
	}
	b.pass(3 * time.Second)
	if b.maps.allows(7, "3.3.3.3") != nil {
		t.Error("an answer without a lifetime stays")
	}
	b.pass(20 * time.Second)
	b.learn(1, "a.example.", 30*time.Second, "1.1.1.1", "2.2.2.2")
	b.pass(20 * time.Second)
	if b.maps.allows(7, "1.1.1.1") == nil {
		t.Error("a new lookup did not prolong")
	}
	b.pass(11 * time.Second)
	if b.maps.allows(7, "1.1.1.1") != nil || b.maps.allows(7, "2.2.2.2") == nil {
		t.Errorf("over and unused stays, or over and in use went: %v", b.maps.addresses)
	}
	b.pass(time.Hour)
	if s := b.Stats(); s.Kept != 1 || b.maps.allows(7, "2.2.2.2") == nil {
		t.Errorf("in use, and gone: %+v", s)
	}
	delete(b.live, used)
	b.pass(9 * time.Second)
	if b.maps.allows(7, "2.2.2.2") == nil {
		t.Error("gone before the grace period")
	}
	b.pass(2 * time.Second)
	if b.maps.allows(7, "2.2.2.2") != nil || len(b.maps.rows) != 0 {
		t.Errorf("unused, and stays: %v", b.maps.rows)
	}
	if s := b.Stats(); s.Names+s.Addresses+s.Mappings+s.Kept+s.Sets+len(b.endpoints) != 0 {
		t.Errorf("%+v", s)
	}
}

// An address that is kept only for its connections is learnt again.
func TestKeptIsLearntAgain(t *testing.T) {
	b := newBench(t, nil)
	b.update([]Policy{{7, []Selector{byPattern("*", http)}}})
	b.live[netip.MustParseAddr("1.1.1.1")] = struct{}{}
	b.learn(1, "a.", time.Second, "1.1.1.1")
	b.pass(time.Minute)
	b.learn(1, "a.", time.Minute, "1.1.1.1")
	clear(b.live)
	b.pass(30 * time.Second)
	if b.maps.allows(7, "1.1.1.1") == nil {
		t.Error("gone although it was learnt again")
	}
	b.pass(time.Minute)
	if b.maps.allows(7, "1.1.1.1") != nil {
		t.Error("stays")
	}
}

func TestUnknownConnectionsKeepEverything(t *testing.T) {
	fail := errors.New("no conntrack")
	b := newBench(t, func(c *Config) { c.Live = func() (map[netip.Addr]struct{}, error) { return nil, fail } })
	b.update([]Policy{{7, []Selector{byPattern("*", http)}}})
	b.learn(1, "a.", time.Second, "1.1.1.1")
	b.pass(time.Minute)
	if b.maps.allows(7, "1.1.1.1") == nil || b.Stats().Failures == 0 {
		t.Error("gone, or not counted")
	}
}

func TestBounds(t *testing.T) {
	b := newBench(t, func(c *Config) { c.PerName, c.PerEndpoint, c.Max, c.MaxKept = 3, 5, 7, 2 })
	b.update([]Policy{{7, []Selector{byPattern("*", http)}}})
	for i := range 5 {
		b.learn(1, "a.", time.Minute, fmt.Sprintf("1.0.0.%d", i))
	}
	b.pass(time.Second)
	if got := len(b.maps.addresses); got != 3 || b.maps.allows(7, "1.0.0.0") != nil || b.maps.allows(7, "1.0.0.4") == nil {
		t.Errorf("of one name: %v", b.maps.addresses)
	}
	for i := range 5 {
		b.learn(1, fmt.Sprintf("b%d.", i), time.Minute, fmt.Sprintf("2.0.0.%d", i))
	}
	b.pass(time.Second)
	if got := len(b.maps.addresses); got != 5 || b.maps.allows(7, "1.0.0.4") != nil || b.maps.allows(7, "2.0.0.0") == nil {
		t.Errorf("of one endpoint: %v", b.maps.addresses)
	}
	// Another endpoint's: who has most pays.
	for i := range 3 {
		b.learn(2, fmt.Sprintf("c%d.", i), time.Minute, fmt.Sprintf("3.0.0.%d", i))
	}
	b.pass(time.Second)
	if got := len(b.maps.addresses); got != 7 || b.maps.allows(7, "2.0.0.0") != nil || b.maps.allows(7, "3.0.0.0") == nil {
		t.Errorf("in all: %v", b.maps.addresses)
	}
	if s := b.Stats(); s.Evicted != 2+3+1 {
		t.Errorf("%d evicted, want 6", s.Evicted)
	}
	// What live connections keep is bounded as well.
	for a := range b.maps.addresses {
		b.live[a] = struct{}{}
	}
	b.pass(time.Hour)
	if got := len(b.maps.addresses); got != 2 || b.Stats().Evicted != 6+5 {
		t.Errorf("kept: %v, %+v", b.maps.addresses, b.Stats())
	}
}

// What two endpoints have asked for does not go with one of them.
func TestFloodOfOneLeavesTheOther(t *testing.T) {
	b := newBench(t, func(c *Config) { c.PerEndpoint = 10 })
	b.update([]Policy{{7, []Selector{byPattern("*", http)}}})
	b.learn(1, "shared.", time.Hour, "9.9.9.9")
	b.learn(2, "shared.", time.Hour, "9.9.9.9")
	for i := range 100 {
		b.learn(2, fmt.Sprintf("flood%d.", i), time.Hour, fmt.Sprintf("10.0.0.%d", i))
	}
	b.pass(time.Second)
	if b.maps.allows(7, "9.9.9.9") == nil {
		t.Error("endpoint 1 lost what it asked for")
	}
	if n := len(b.maps.addresses); n != 11 {
		t.Errorf("%d addresses, want 11", n)
	}
}

func TestFailedWrites(t *testing.T) {
	b := newBench(t, nil)
	b.update([]Policy{{7, []Selector{byPattern("*", http)}}})
	bad := errors.New("map is full")
	b.maps.fail[netip.MustParseAddr("1.1.1.1")] = bad
	if err := b.tryLearn(1, "a.", time.Minute, "1.1.1.1", "2.2.2.2"); !errors.Is(err, bad) {
		t.Errorf("error %v, want %v", err, bad)
	}
	// It is not in the maps, so that the next answer waits too.
	if err := b.tryLearn(1, "a.", time.Minute, "1.1.1.1"); !errors.Is(err, bad) {
		t.Errorf("error %v, want %v", err, bad)
	}
	b.learn(1, "b.", time.Minute, "3.3.3.3")
	delete(b.maps.fail, netip.MustParseAddr("1.1.1.1"))
	b.learn(1, "a.", time.Minute, "1.1.1.1")

	b.maps.failRows = bad
	done := false
	b.Update([]Policy{{8, []Selector{byPattern("*", https)}}}, nil, false, func() { done = true })
	if err := b.flush(); !errors.Is(err, bad) || done {
		t.Fatalf("flush %v, done %v", err, done)
	}
	b.maps.failRows = nil
	if err := b.flush(); err != nil || !done {
		t.Fatalf("the second flush: %v, done %v", err, done)
	}
	if diff := cmp.Diff([]Range{https}, b.maps.allows(8, "1.1.1.1")); diff != "" {
		t.Error(diff)
	}
}

func TestRestart(t *testing.T) {
	dir := t.TempDir()
	withDir := func(c *Config) { c.Dir = dir }
	first := newBench(t, withDir)
	rules := []Policy{{7, []Selector{byPattern("*.example", http)}}}
	first.update(rules)
	first.learn(3, "saved.example.", time.Hour, "1.1.1.1")
	if err := first.Save(); err != nil {
		t.Fatal(err)
	}
	first.learn(3, "journal.example.", time.Hour, "2.2.2.2")
	first.learn(3, `sp\032ace.example.`, time.Hour, "2.2.2.2")
	if err := first.flush(); err != nil {
		t.Fatal(err)
	}
	// A torn last line is left out.
	f, err := os.OpenFile(filepath.Join(dir, "names.log"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("01234567 torn.example. 6.6.6"); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}

	second := newBench(t, withDir)
	second.maps.addresses, second.maps.rows = first.maps.addresses, first.maps.rows
	second.maps.addresses[netip.MustParseAddr("6.6.6.6")] = 99 // of a name that is forgotten
	second.maps.rows[Row{7, 99}] = []Range{all}
	if err := second.Load(); err != nil {
		t.Fatal(err)
	}
	// Nothing is taken away before the rules are known.
	if err := second.flush(); err != nil || len(second.maps.addresses) != 3 || len(second.maps.allows(7, "6.6.6.6")) == 0 {
		t.Fatalf("before the rules: %v, %v", second.maps.addresses, err)
	}
	second.update(rules)
	for _, a := range []string{"1.1.1.1", "2.2.2.2"} {
		if diff := cmp.Diff([]Range{http}, second.maps.allows(7, a)); diff != "" {
			t.Errorf("%s: %s", a, diff)
		}
	}
	second.Settle()
	if err := second.flush(); err != nil {
		t.Fatal(err)
	}
	if len(second.maps.addresses) != 2 || len(second.maps.rows) != 1 {
		t.Errorf("in the end: %v %v", second.maps.addresses, second.maps.rows)
	}
	if n := second.names[`sp\032ace.example.`]; n == nil {
		t.Error("the name with a space is forgotten")
	}
	if got := second.endpoints[3].leases.Len(); got != 3 {
		t.Errorf("endpoint 3 has %d, want 3", got)
	}
	second.pass(2 * time.Hour)
	if len(second.maps.addresses)+len(second.maps.rows) != 0 {
		t.Errorf("over: %v %v", second.maps.addresses, second.maps.rows)
	}
}

// Random answers, policies and times against a simple model: each address has what the selectors of its names allow.
func TestRandom(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { random(t, rand.New(rand.NewPCG(seed, 1))) })
	}
}

func random(t *testing.T, r *rand.Rand) {
	b := newBench(t, nil)
	texts := []string{"a.", "b.a.", "c.a.", "d.", "e.d.", "f.e.d."}
	selectors := []Selector{byName("a"), byPattern("*.a"), byPattern("**.d"), byName("d"), byPattern("*")}
	type fact struct {
		name string
		addr netip.Addr
	}
	model := map[fact]time.Time{}
	policies := map[uint32][]Selector{}
	for range 300 {
		switch r.IntN(6) {
		case 0:
			number := uint32(1 + r.IntN(4))
			var names []Selector
			for i, s := range selectors {
				if r.IntN(2) == 0 {
					s.Ranges = []Range{{Proto: 6, First: uint16(10 * i), Last: uint16(10*i + 5 + r.IntN(10)), Rule: uint32(i)}}
					names = append(names, s)
				}
			}
			policies[number] = names
			b.update([]Policy{{number, names}})
		case 1:
			number := uint32(1 + r.IntN(4))
			delete(policies, number)
			b.update(nil, number)
		case 2:
			b.pass(time.Duration(1000+r.IntN(20000)) * time.Millisecond)
			for f, until := range model {
				if !until.After(b.now) {
					delete(model, f)
				}
			}
		default:
			text, ttl := texts[r.IntN(len(texts))], time.Duration(1+r.IntN(30))*time.Second
			addr := netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(8))})
			b.learn(uint16(r.IntN(3)), text, ttl, addr.String())
			f := fact{text, addr}
			if until := b.now.Add(ttl); until.After(model[f]) {
				model[f] = until
			}
		}
		for i := range 8 {
			addr := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
			for number := uint32(1); number <= 4; number++ {
				var matching []Selector
				for _, s := range policies[number] {
					if slices.ContainsFunc(texts, func(text string) bool {
						_, known := model[fact{text, addr}]
						return known && policy.MatchName(s.NameSelector, text)
					}) {
						matching = append(matching, s)
					}
				}
				want, _ := merge(matching...)
				if diff := cmp.Diff(want, b.maps.allows(number, addr.String())); diff != "" {
					t.Fatalf("policy %d, %v: %s", number, addr, diff)
				}
			}
		}
	}
	b.update(nil, 1, 2, 3, 4)
	if len(b.maps.addresses)+len(b.maps.rows)+b.Stats().Sets != 0 {
		t.Errorf("left over: %v %v", b.maps.addresses, b.maps.rows)
	}
}

// Rows of an earlier process for policies that are not known any more are gone before the complete state is acknowledged: while addresses are in their
// sets, and with the rules on disk lost.
func TestStrangersGo(t *testing.T) {
	dir := t.TempDir()
	withDir := func(c *Config) { c.Dir = dir }
	first := newBench(t, withDir)
	first.update([]Policy{{7, []Selector{byPattern("*", http)}}, {8, []Selector{byPattern("*", https)}}})
	first.learn(1, "a.", time.Minute, "1.1.1.1")
	if err := first.Save(); err != nil {
		t.Fatal(err)
	}
	b := newBench(t, withDir)
	b.maps = first.maps
	b.cfg.Maps = first.maps
	if err := b.Load(); err != nil {
		t.Fatal(err)
	}
	b.update([]Policy{{8, []Selector{byPattern("*", https)}}})
	if len(b.maps.allows(7, "1.1.1.1"))+len(b.maps.allows(8, "1.1.1.1")) == 0 {
		t.Fatal("rows went before the state was complete")
	}
	acked := false
	b.Update(nil, nil, true, func() {
		acked = true
		for row := range b.maps.rows {
			if row.Policy == 7 {
				t.Errorf("acknowledged with %v", row)
			}
		}
	})
	if err := b.flush(); err != nil || !acked {
		t.Fatalf("flush %v, acknowledged %v", err, acked)
	}
	if diff := cmp.Diff([]Range{https}, b.maps.allows(8, "1.1.1.1")); diff != "" {
		t.Error(diff)
	}
}

func TestRun(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Dir, c.Now = t.TempDir(), time.Now })
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- b.Run(ctx) }()
	acked := make(chan struct{})
	b.Update([]Policy{{7, []Selector{byPattern("*", http)}}}, nil, false, func() { close(acked) })
	<-acked
	done := make(chan error, 1)
	if b.Learn(1, "a.", []netip.Addr{netip.MustParseAddr("1.1.1.1")}, time.Minute, func(err error) { done <- err }) {
		t.Error("a new address needs no waiting")
	}
	if err := <-done; err != nil || b.maps.allows(7, "1.1.1.1") == nil {
		t.Errorf("released: %v, %v", err, b.maps.addresses)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	saved, err := os.ReadFile(filepath.Join(b.cfg.Dir, "names"))
	if err != nil || !strings.Contains(string(saved), "a. 1.1.1.1 ") {
		t.Errorf("saved %q, %v", saved, err)
	}
}

func TestMerge(t *testing.T) {
	r := func(proto uint8, first, last uint16, slot uint16, visible bool, rule uint32) Range {
		return Range{Proto: proto, First: first, Last: last, Slot: slot, Visibility: visible, Rule: rule}
	}
	for _, c := range []struct {
		name      string
		selectors []Selector
		want      []Range
		conflicts int
	}{
		{"one", []Selector{byName("a", r(6, 1, 2, 0, false, 1))}, []Range{r(6, 1, 2, 0, false, 1)}, 0},
		{"none", nil, nil, 0},
		{"plain beats a filter", []Selector{byName("a", r(6, 80, 80, 5, false, 1)), byPattern("*", r(6, 1, 100, 0, false, 2))},
			[]Range{r(6, 1, 100, 0, false, 2)}, 0},
		{"a filter beside plain", []Selector{byPattern("*", r(6, 80, 90, 5, false, 1)), byPattern("*a", r(6, 85, 100, 0, false, 2))},
			[]Range{r(6, 80, 84, 5, false, 1), r(6, 85, 100, 0, false, 2)}, 0},
		{"the name before the pattern", []Selector{byPattern("*.a.example", r(6, 80, 80, 4, false, 1)), byName("b.a", r(6, 80, 80, 5, false, 2))},
			[]Range{r(6, 80, 80, 5, false, 2)}, 0},
		{"the longer pattern", []Selector{byPattern("*", r(6, 80, 80, 4, false, 1)), byPattern("*.a", r(6, 80, 80, 5, false, 2))},
			[]Range{r(6, 80, 80, 5, false, 2)}, 1},
		{"the lower slot", []Selector{byPattern("*a", r(6, 80, 90, 5, false, 1)), byPattern("a*", r(6, 85, 85, 4, false, 2))},
			[]Range{r(6, 80, 84, 5, false, 1), r(6, 85, 85, 4, false, 2), r(6, 86, 90, 5, false, 1)}, 1},
		{"seen beats plain", []Selector{byName("a", r(6, 80, 80, 5, true, 1)), byName("a", r(6, 80, 80, 0, false, 2), r(6, 80, 80, 3, false, 2))},
			[]Range{r(6, 80, 80, 5, true, 1)}, 0},
		{"all protocols, and a port", []Selector{byName("a", r(0, 0, 65535, 0, false, 1)), byName("b", r(6, 80, 80, 5, false, 2)), byName("c", r(17, 53, 53, 0, false, 3))},
			[]Range{r(0, 0, 65535, 0, false, 1), r(6, 0, 65535, 0, false, 1), r(17, 0, 65535, 0, false, 1)}, 0},
		{"top port", []Selector{byName("a", r(6, 65535, 65535, 0, false, 1)), byName("b", r(6, 0, 65534, 0, false, 1))}, []Range{r(6, 0, 65535, 0, false, 1)}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, order := range [][]Selector{c.selectors, reversed(c.selectors)} {
				got, conflicts := merge(order...)
				if diff := cmp.Diff(c.want, got); diff != "" || conflicts != c.conflicts {
					t.Errorf("%d conflicts, want %d; %s", conflicts, c.conflicts, diff)
				}
			}
		})
	}
}

func reversed(s []Selector) []Selector {
	out := slices.Clone(s)
	slices.Reverse(out)
	return out
}

// FuzzParseLine reads what may be on disk.
func FuzzParseLine(f *testing.F) {
	f.Add("a.example. 1.2.3.4 1700000000 1,2\n")
	f.Add("a. ::1 -1 \n")
	f.Fuzz(func(t *testing.T, line string) {
		x, ok := parseLine(line)
		if ok && (!x.addr.IsValid() || x.addr.Zone() != "" || !strings.HasSuffix(x.name, ".") || strings.Contains(x.name, " ")) {
			t.Errorf("%q: %+v", line, x)
		}
	})
}

func BenchmarkLearnKnown(b *testing.B) {
	x := newBench(b, func(c *Config) { c.PerEndpoint, c.Max = 1<<20, 1<<20 })
	x.update([]Policy{{7, []Selector{byPattern("*.example", http)}}})
	addrs := []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("1.1.1.2")}
	for i := range 10000 {
		x.learn(1, fmt.Sprintf("n%d.example.", i), time.Hour, fmt.Sprintf("10.1.%d.%d", i/250, i%250))
	}
	x.learn(1, "a.example.", time.Hour, "1.1.1.1", "1.1.1.2")
	b.ReportAllocs()
	for b.Loop() {
		if !x.Learn(1, "a.example.", addrs, time.Hour, nil) {
			b.Fatal("not known")
		}
	}
}
