// SPDX-License-Identifier: Apache-2.0

package policymap_test

import (
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/namerules"
	"github.com/weirmesh/weir/services/agent/internal/policymap"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

type rowKey struct{ policy, peer uint32 }

// kernel is the maps of policy, with a journal of what was really written.
type kernel struct {
	rows      map[rowKey][]datapath.PolicyRange
	endpoints map[uint16]datapath.EndpointPolicy
	max       int
	journal   []string
	fail      error // of the next write of a row
}

func newKernel() *kernel {
	return &kernel{rows: map[rowKey][]datapath.PolicyRange{}, endpoints: map[uint16]datapath.EndpointPolicy{}, max: 1000}
}

func (k *kernel) SetPeer(policy, peer uint32, ranges []datapath.PolicyRange) error {
	if err := k.fail; err != nil {
		k.fail = nil
		return err
	}
	key := rowKey{policy, peer}
	old, ok := k.rows[key]
	if ok && slices.Equal(old, ranges) {
		return nil
	}
	if !ok && len(k.rows) >= k.max {
		return fmt.Errorf("policy_peers: %w", datapath.ErrFull)
	}
	k.rows[key] = slices.Clone(ranges)
	k.journal = append(k.journal, fmt.Sprintf("row %d/%d", policy, peer))
	return nil
}

func (k *kernel) DeletePeer(policy, peer uint32) error {
	if _, ok := k.rows[rowKey{policy, peer}]; ok {
		delete(k.rows, rowKey{policy, peer})
		k.journal = append(k.journal, fmt.Sprintf("no row %d/%d", policy, peer))
	}
	return nil
}

func (k *kernel) DeletePolicy(policy uint32) error {
	for key := range k.rows {
		if key.policy == policy {
			delete(k.rows, key)
		}
	}
	k.journal = append(k.journal, fmt.Sprintf("no policy %d", policy))
	return nil
}

func (k *kernel) SetEndpoint(id uint16, e datapath.EndpointPolicy) error {
	if e == (datapath.EndpointPolicy{}) {
		delete(k.endpoints, id)
	} else {
		k.endpoints[id] = e
	}
	k.journal = append(k.journal, fmt.Sprintf("endpoint %d", id))
	return nil
}

func (k *kernel) Endpoints() (map[uint16]datapath.EndpointPolicy, error) {
	all := map[uint16]datapath.EndpointPolicy{}
	for id, e := range k.endpoints {
		all[id] = e
	}
	return all, nil
}

func (k *kernel) List() ([]datapath.PolicyRow, error) {
	var all []datapath.PolicyRow
	for key, ranges := range k.rows {
		all = append(all, datapath.PolicyRow{Policy: key.policy, Peer: key.peer, Ranges: ranges})
	}
	return all, nil
}

func (k *kernel) LookupRange(policy, peer uint32, proto uint8, port uint16) (datapath.PolicyRange, bool, error) {
	ranges, own := k.rows[rowKey{policy, peer}]
	if !own {
		ranges = k.rows[rowKey{policy, 0}]
	}
	denied := datapath.PolicyRange{Verdict: datapath.PolicyDefaultDeny}
	any, named := denied, false
	for _, r := range ranges {
		if r.Proto == 0 {
			any = r
		}
		if r.Proto == proto {
			named = true
			if r.First <= port && port <= r.Last {
				return r, own, nil
			}
		}
	}
	if named {
		return denied, own, nil
	}
	return any, own, nil
}

func (k *kernel) Bump() error { k.journal = append(k.journal, "bump"); return nil }

func (k *kernel) Usage() []datapath.MapUsage {
	return []datapath.MapUsage{{Map: "policy_peers", Entries: len(k.rows), Max: k.max}, {Map: "policy_ranges", Entries: 0, Max: 100000}}
}

func (k *kernel) take() []string {
	j := k.journal
	k.journal = nil
	return j
}

// told is what flows and events would say.
type told struct {
	identities map[uint32][]string
	rules      map[uint32][]desired.PolicyRule
	matches    map[uint32]uint8
	notices    []string
}

func (t *told) SetIdentity(n uint32, labels []string) { t.identities[n] = labels }
func (t *told) RemoveIdentity(n uint32)               { delete(t.identities, n) }
func (t *told) SetRules(n uint32, match uint8, rules []desired.PolicyRule) {
	t.rules[n], t.matches[n] = rules, match
}
func (t *told) RemoveRules(n uint32) { delete(t.rules, n) }
func (t *told) PolicyUpdated(labels []string, _ uint64, _ int) {
	t.notices = append(t.notices, "updated "+strings.Join(labels, ","))
}

func (t *told) PolicyDeleted(labels []string, _ uint64, _ int) {
	t.notices = append(t.notices, "deleted "+strings.Join(labels, ","))
}
func (t *told) Notice(kind string, _ any) { t.notices = append(t.notices, kind) }

// slots numbers filters in their order; there are max of them.
type slots struct {
	numbers map[string]uint16
	max     int
}

func (s *slots) Of(f slot.Filter) (uint16, error) {
	n, ok := s.numbers[f.Key]
	if !ok {
		if len(s.numbers) >= s.max {
			return 0, fmt.Errorf("slots are full: %w", slot.ErrFull)
		}
		n = uint16(len(s.numbers) + 1)
		s.numbers[f.Key] = n
	}
	return n, nil
}

func (s *slots) Get(number uint16) (slot.Slot, bool) {
	for key, n := range s.numbers {
		if n == number {
			return slot.Slot{Number: n, Filter: slot.Filter{Key: key}}, true
		}
	}
	return slot.Slot{}, false
}

func (s *slots) Port(number uint16) uint16 { return slot.PortBase + number }

// nameRules is what weir-dns would be told.
type nameRules struct {
	filters  map[uint16]desired.Filter
	policies map[uint32][]namerules.Name
	// acknowledged: weir-dns has said that it holds just these policies.
	acknowledged bool
}

func (n *nameRules) Gone(number uint32) bool { return n.acknowledged && n.policies[number] == nil }

func (n *nameRules) SetFilter(slot uint16, f desired.Filter) { n.filters[slot] = f }

func (n *nameRules) SetPolicy(number uint32, names []namerules.Name) {
	n.policies[number] = names
	if len(names) == 0 {
		delete(n.policies, number)
	}
}

type fixture struct {
	t *testing.T
	*policymap.Engine
	kernel *kernel
	slots  *slots
	rules  *nameRules
	told   *told
	store  *desired.Store
	dir    string
	now    time.Time
	named  []uint32 // policies with rows by names
}

func start(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{t: t, kernel: newKernel(), slots: &slots{map[string]uint16{}, 10}, dir: t.TempDir(), now: time.Unix(1_000_000, 0)}
	f.restart()
	return f
}

// restart is a new agent over the same kernel and disk, less the policy state.
func (f *fixture) restart() {
	f.t.Helper()
	f.told = &told{identities: map[uint32][]string{}, rules: map[uint32][]desired.PolicyRule{}, matches: map[uint32]uint8{}}
	f.store, f.rules = desired.NewStore(), &nameRules{filters: map[uint16]desired.Filter{}, policies: map[uint32][]namerules.Name{}}
	e, err := policymap.New(policymap.Config{Maps: f.kernel, NumbersFile: filepath.Join(f.dir, "numbers"), PausesFile: filepath.Join(f.dir, "pauses"),
		Names: f.told, Slots: f.slots, NameRules: f.rules, Named: f.named, Events: f.told, Now: func() time.Time { return f.now }, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.t.Fatal(err)
	}
	f.Engine = e
}

func (f *fixture) apply(quiet bool, resources []desired.Resource, removals ...desired.Key) {
	f.t.Helper()
	for _, err := range []error{f.Prepare(f.store.Apply(upserts(resources), removals), quiet), f.Switch(), f.Finish()} {
		if err != nil {
			f.t.Fatal(err)
		}
	}
}

func (f *fixture) prune() {
	f.t.Helper()
	if err := f.Prune(nil); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) bind(subject string, id uint16) {
	f.t.Helper()
	if err := f.Bind(subject, id); err != nil {
		f.t.Fatal(err)
	}
}

func upserts(resources []desired.Resource) []desired.Upsert {
	var all []desired.Upsert
	for _, r := range resources {
		all = append(all, desired.Upsert{Key: keyOf(r), Resource: r})
	}
	return all
}

func keyOf(r desired.Resource) desired.Key {
	switch x := r.(type) {
	case *desired.Peer:
		return desired.Key{Kind: desired.KindPeer, Name: x.Key}
	case *desired.Selector:
		return desired.Key{Kind: desired.KindSelector, Name: x.Key}
	case *desired.Policy:
		return desired.Key{Kind: desired.KindPolicy, Name: x.Key}
	case *desired.Subject:
		return desired.Key{Kind: desired.KindSubject, Name: x.Key}
	case *desired.Endpoint:
		return desired.Key{Kind: desired.KindEndpoint, Name: x.UID}
	}
	panic(fmt.Sprintf("%T", r))
}

func selector(key string, members ...string) *desired.Selector {
	slices.Sort(members)
	return &desired.Selector{Key: key, Members: members}
}

func rule(name string) desired.PolicyRule {
	return desired.PolicyRule{Kind: "NetworkPolicy", Namespace: "default", Name: name, List: "ingress"}
}

func ports(verdict desired.Verdict, first, last uint16, rules ...uint32) desired.PolicyRange {
	return desired.PolicyRange{Proto: 6, First: first, Last: last, Verdict: verdict, Rules: rules}
}

// webPolicy: selector 0 reaches port 80, selector 1 is denied all, both: denied; others reach port 443.
func webPolicy(key string) *desired.Policy {
	return &desired.Policy{Key: key, Direction: desired.Ingress, Selectors: []string{"web", "bad"}, Rules: []desired.PolicyRule{rule("allow"), rule("deny"), rule("tls")},
		Classes: []desired.PolicyClass{
			{Ranges: []desired.PolicyRange{ports(desired.Allow, 443, 443, 2)}},
			{Selectors: []uint32{0}, Ranges: []desired.PolicyRange{ports(desired.Allow, 80, 80, 0), ports(desired.Allow, 443, 443, 2)}},
			{Selectors: []uint32{1}, Ranges: []desired.PolicyRange{{Last: 65535, Verdict: desired.Deny, Rules: []uint32{1}}}},
			{Selectors: []uint32{0, 1}, Ranges: []desired.PolicyRange{{Last: 65535, Verdict: desired.Deny, Rules: []uint32{1}}}},
		}}
}

// decide asks the kernel what an endpoint's ingress policy says of a peer and TCP port.
func (f *fixture) decide(id uint16, peer string, port uint16) string {
	f.t.Helper()
	n, err := f.Peer(peer)
	if err != nil {
		return err.Error()
	}
	a, err := f.Lookup(id, desired.Ingress, n, 6, port)
	if err != nil {
		f.t.Fatal(err)
	}
	if a.Policy == 0 {
		return "open"
	}
	text := a.Verdict.String()
	if a.Slot != 0 {
		text += " " + a.Filter
	}
	for _, r := range a.Rules {
		text += " " + r.Name
	}
	if a.Audit {
		text += " audit"
	}
	return text
}

func (f *fixture) expect(when string, id uint16, want map[string]string) {
	f.t.Helper()
	for q, w := range want {
		i := strings.LastIndex(q, ":")
		peer, port := q[:i], q[i+1:]
		var p uint16
		if _, err := fmt.Sscan(port, &p); err != nil {
			f.t.Fatal(err)
		}
		if got := f.decide(id, peer, p); got != w {
			f.t.Errorf("%s: peer %s port %d: %s, want %s", when, peer, p, got, w)
		}
	}
}

func prefix(text string) netip.Prefix { return netip.MustParsePrefix(text) }
