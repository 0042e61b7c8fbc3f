// SPDX-License-Identifier: Apache-2.0

package policymap

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// ErrUnknown says that a name is of nobody here.
var ErrUnknown = errors.New("not known")

// Answer is what the kernel decides for a packet.
type Answer struct {
	Policy  uint32 // 0 = not enforced
	Key     string
	Audit   bool
	Peer    uint32
	PeerRow bool
	Verdict datapath.PolicyVerdict
	Rule    uint32
	Rules   []desired.PolicyRule
	Through
}

// Through is what allowed connections pass; Slot 0 = nothing.
type Through struct {
	Slot uint16
	// Filter is the slot's key, Listener the port where the kernel finds it (0 = nowhere).
	Filter   string
	Listener uint16
}

// Through describes a slot.
func (e *Engine) Through(number uint16) Through {
	if number == 0 {
		return Through{}
	}
	t := Through{Slot: number, Listener: e.cfg.Slots.Port(number)}
	if s, ok := e.cfg.Slots.Get(number); ok {
		t.Filter = s.Key
	}
	return t
}

// Lookup asks the kernel's maps what an endpoint's policy decides for a peer.
func (e *Engine) Lookup(id uint16, d desired.Direction, peer uint32, proto uint8, port uint16) (Answer, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f := e.force[id]
	a := Answer{Policy: f.Ingress, Audit: f.IngressAudit, Peer: peer}
	if d == desired.Egress {
		a.Policy, a.Audit = f.Egress, f.EgressAudit
	}
	if a.Policy == 0 {
		a.Verdict = datapath.PolicyAllow
		return a, nil
	}
	a.Key = e.keyOf(a.Policy)
	r, peerRow, err := e.cfg.Maps.LookupRange(a.Policy, peer, proto, port)
	a.Verdict, a.Rule, a.PeerRow, a.Through = r.Verdict, r.Rule, peerRow, e.Through(r.Slot)
	a.Rules = e.numbers.lists[a.Rule].rules
	return a, err
}

// Peer finds the number of a peer by its name.
func (e *Engine) Peer(name string) (uint32, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if n, ok := e.numbers.peer(name); ok {
		return n, nil
	}
	return 0, fmt.Errorf("peer %q: %w", name, ErrUnknown)
}

func (e *Engine) keyOf(number uint32) string {
	for _, p := range e.policies {
		if p.number == number {
			return p.key()
		}
	}
	return ""
}

// Enforced returns what holds for an endpoint.
func (e *Engine) Enforced(id uint16) datapath.EndpointPolicy {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.force[id]
}

// DumpRow is a row of the kernel with names.
type DumpRow struct {
	datapath.PolicyRow
	Key       string
	Direction desired.Direction
	Endpoints []uint16
	PeerName  string
}

// Dump lists the kernel's rows, sorted by policy and peer; id 0 = of all policies.
func (e *Engine) Dump(id uint16) ([]DumpRow, error) {
	rows, err := e.cfg.Maps.List()
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	names := map[uint32]string{}
	for name, n := range e.numbers.peers {
		names[n] = name
	}
	type use struct {
		direction desired.Direction
		endpoints []uint16
	}
	uses := map[uint32]*use{}
	note := func(policy uint32, id uint16, d desired.Direction) {
		if policy == 0 {
			return
		}
		if uses[policy] == nil {
			uses[policy] = &use{direction: d}
		}
		if !slices.Contains(uses[policy].endpoints, id) {
			uses[policy].endpoints = append(uses[policy].endpoints, id)
		}
	}
	for id, f := range e.force {
		note(f.Ingress, id, desired.Ingress)
		note(f.Egress, id, desired.Egress)
	}
	keys := map[uint32]*policy{}
	for _, p := range e.policies {
		keys[p.number] = p
	}
	want := e.force[id]
	var out []DumpRow
	for _, r := range rows {
		if id != 0 && r.Policy != want.Ingress && r.Policy != want.Egress {
			continue
		}
		d := DumpRow{PolicyRow: r}
		if u := uses[r.Policy]; u != nil {
			d.Direction, d.Endpoints = u.direction, u.endpoints
			slices.Sort(d.Endpoints)
		}
		if p := keys[r.Policy]; p != nil {
			d.Key, d.Direction = p.key(), p.desired.Direction
		}
		switch first, ok := kindOf(r.Peer); {
		case ok && first != 0:
			d.PeerName = names[r.Peer]
		case r.Peer != 0:
			d.PeerName = fmt.Sprint(r.Peer)
		}
		out = append(out, d)
	}
	return out, nil
}

// Filters returns the keys of all filters that policies of this node name.
func (e *Engine) Filters() map[string]struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	keys := map[string]struct{}{}
	for _, p := range e.policies {
		for i := range p.desired.Filters {
			keys[p.desired.Filters[i].Key] = struct{}{}
		}
	}
	return keys
}

// Frozen says that the state is from disk, and the kernel's younger.
func (e *Engine) Frozen() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.frozen
}

// FilterRules lists the rules of all policies that name a filter: those that its items may be of.
func (e *Engine) FilterRules(key string) []desired.PolicyRule {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []desired.PolicyRule
	for _, p := range e.policies {
		if p.desired.Filter(key) != nil {
			all = append(all, p.desired.Rules...)
		}
	}
	return all
}

// FilterUsers lists the policies that name a filter.
func (e *Engine) FilterUsers(key string) []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []string
	for _, p := range e.policies {
		if p.desired.Filter(key) != nil {
			all = append(all, p.key())
		}
	}
	slices.Sort(all)
	return all
}

// Rules returns the rules of a number.
func (e *Engine) Rules(number uint32) []desired.PolicyRule {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.numbers.lists[number].rules
}

// Stats counts.
type Stats struct {
	Policies, Selectors, Refused, Enforced int
	Usage                                  []datapath.MapUsage
}

// Stats returns the counts of now.
func (e *Engine) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	return Stats{Policies: len(e.policies), Selectors: len(e.selectors), Refused: len(e.refusals), Enforced: len(e.force), Usage: e.cfg.Maps.Usage()}
}

// Describe names a policy by the objects that its rules come from.
func (e *Engine) Describe(k desired.Key) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if p := e.policies[k.Name]; p != nil && k.Kind == desired.KindPolicy {
		if names := labelsOf(p.desired); len(names) > 0 {
			return strings.Join(names, ", ")
		}
	}
	return k.Name
}
