// SPDX-License-Identifier: Apache-2.0

package policymap

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/namerules"
)

// policy is a resolved policy and how far the kernel has it.
type policy struct {
	desired *desired.Policy
	number  uint32
	classes map[string][]datapath.PolicyRange // by positions, encoded; the one of "" is the rest
	// unclassed are peers of classes that the policy service did not send. They are denied.
	unclassed map[string]struct{}
	names     []namerules.Name
	unslotted error // there is no slot for one of its filters
	written   bool
	stale     bool  // a write failed, and is to be done again
	blocked   error // why endpoints that do not have it must not get it
	full      error // why it is not written, or only in a stricter form
	gone      bool  // the policy service has taken it back
}

func (p *policy) key() string { return p.desired.Key }

func (p *policy) resource() desired.Key { return desired.Key{Kind: desired.KindPolicy, Name: p.key()} }

// modelPolicy takes a policy in and says whether its rows must be looked at.
func (e *Engine) modelPolicy(c desired.Change) (*policy, bool) {
	old := e.policies[c.Key.Name]
	x, ok := c.New.(*desired.Policy)
	if !ok {
		if old != nil && !old.gone {
			old.gone = true
			e.removed = append(e.removed, old)
		}
		return nil, false
	}
	if old != nil {
		back := old.gone
		old.gone = false
		if !back && !old.stale && reflect.DeepEqual(old.desired, x) {
			return old, false
		}
		e.disuse(old)
		// A class more or less: rows of the others stay, since equal rows are left alone.
		old.desired = x
	} else {
		old = &policy{desired: x, number: e.numbers.policy(x.Key)}
		e.policies[x.Key] = old
	}
	for _, key := range x.Selectors {
		s := e.selectors[key]
		if s == nil {
			s = &selector{members: map[string]struct{}{}, users: map[string]*policy{}, gone: true}
			e.selectors[key] = s
		}
		s.users[x.Key] = old
	}
	e.encode(old)
	for m := range e.members(old) {
		e.number(m)
	}
	return old, true
}

// disuse ends a policy's use of its selectors.
func (e *Engine) disuse(p *policy) {
	for _, key := range p.desired.Selectors {
		if s := e.selectors[key]; s != nil {
			delete(s.users, p.key())
			if s.gone && len(s.users) == 0 {
				delete(e.selectors, key)
			}
		}
	}
}

// members finds the class of each peer that a selector of the policy matches.
func (e *Engine) members(p *policy) map[string][]uint32 {
	all := map[string][]uint32{}
	for i, key := range p.desired.Selectors {
		for m := range e.selectors[key].members {
			all[m] = append(all[m], uint32(i))
		}
	}
	return all
}

// positions finds the class of one peer.
func (e *Engine) positions(p *policy, peer string) []uint32 {
	var list []uint32
	for i, key := range p.desired.Selectors {
		if _, ok := e.selectors[key].members[peer]; ok {
			list = append(list, uint32(i))
		}
	}
	return list
}

// writePolicy makes the kernel hold all rows of a policy. That it does not fit is a refusal and no error.
func (e *Engine) writePolicy(p *policy, quiet bool) error {
	pinned := e.pinned[p.number]
	if e.frozen && len(pinned) > 0 {
		p.written = true
		return nil
	}
	for _, key := range p.desired.Selectors {
		if !e.selectors[key].known {
			// Its members would be judged as everybody else.
			e.refuse(p, fmt.Errorf("selector %q has not been sent", key))
			return nil
		}
	}
	if p.unslotted != nil && !p.written {
		e.refuse(p, p.unslotted)
		return nil
	}
	members := e.members(p)
	if err := e.room(p, len(members)+1); err != nil {
		e.refuse(p, err)
		return nil
	}
	first := !p.written
	p.unclassed = nil
	keep := map[uint32]struct{}{0: {}}
	var errs []error
	for peer, positions := range members {
		number := e.number(peer)
		keep[number] = struct{}{}
		errs = append(errs, e.setRow(p, peer, number, positions))
	}
	errs = append(errs, e.cfg.Maps.SetPeer(p.number, 0, p.classes[""]))
	for _, r := range pinned {
		if _, ok := keep[r.Peer]; !ok {
			errs = append(errs, e.cfg.Maps.DeletePeer(p.number, r.Peer))
		}
	}
	delete(e.pinned, p.number)
	e.dirty = true
	if err := errors.Join(errs...); err != nil {
		if !errors.Is(err, datapath.ErrFull) {
			p.stale = true
			return fmt.Errorf("write policy %s: %w", p.key(), err)
		}
		if first {
			err = errors.Join(err, e.cfg.Maps.DeletePolicy(p.number))
		} else {
			err = errors.Join(err, e.cfg.Maps.SetPeer(p.number, 0, nil))
		}
		e.refuse(p, err)
		return nil
	}
	p.written, p.stale, p.full = true, false, nil
	e.cfg.NameRules.SetPolicy(p.number, p.names)
	if p.unslotted != nil {
		e.refuse(p, p.unslotted) // it is in force, less what has no slot: that is denied
	}
	e.judge(p)
	if first && !quiet {
		e.cfg.Events.PolicyUpdated(labelsOf(p.desired), uint64(p.number), len(p.desired.Rules))
	}
	return nil
}

// room refuses a policy that is not written yet, before a map overflows.
func (e *Engine) room(p *policy, rows int) error {
	if p.written || len(e.pinned[p.number]) > 0 {
		return nil
	}
	ranges := 0
	for _, c := range p.classes {
		ranges += len(c)
	}
	for i, u := range e.cfg.Maps.Usage() {
		need := rows
		if i > 0 {
			need = ranges
		}
		if limit := u.Max * reserve / 100; u.Entries+need > limit {
			return fmt.Errorf("%s is full: %d of %d entries, and the policy needs %d (the last %d %% are kept for new peers): %w",
				u.Map, u.Entries, u.Max, need, 100-reserve, datapath.ErrFull)
		}
	}
	return nil
}

// setRow makes the row of one peer. A peer that is judged as everybody else has none.
func (e *Engine) setRow(p *policy, peer string, number uint32, positions []uint32) error {
	ranges, ok := p.classes[classKey(positions)]
	if !ok {
		if p.unclassed == nil {
			p.unclassed = map[string]struct{}{}
		}
		p.unclassed[peer] = struct{}{}
	} else {
		delete(p.unclassed, peer)
	}
	if number == 0 {
		return nil
	}
	if ok && slices.Equal(ranges, p.classes[""]) {
		return e.cfg.Maps.DeletePeer(p.number, number)
	}
	return e.cfg.Maps.SetPeer(p.number, number, ranges)
}

// writeRow makes one peer's row follow its selectors.
func (e *Engine) writeRow(p *policy, peer string) error {
	if e.policies[p.key()] != p || !p.written {
		return nil
	}
	number := e.number(peer)
	positions := e.positions(p, peer)
	e.dirty = true
	defer e.cfg.NameRules.SetPolicy(p.number, p.names) // it is told when rows change
	if len(positions) == 0 {
		delete(p.unclassed, peer)
		e.judge(p)
		if number == 0 {
			return nil
		}
		err := e.cfg.Maps.DeletePeer(p.number, number)
		p.stale = p.stale || err != nil
		return err
	}
	err := e.setRow(p, peer, number, positions)
	if errors.Is(err, datapath.ErrFull) {
		// Without a row the peer is judged as everybody else. Where that would let it pass too much, everybody else is denied.
		if !covers(p.classes[classKey(positions)], p.classes[""]) {
			err = errors.Join(err, e.cfg.Maps.SetPeer(p.number, 0, nil))
		}
		e.refuse(p, err)
		return nil
	}
	if err != nil {
		p.stale = true
		return fmt.Errorf("write policy %s: %w", p.key(), err)
	}
	e.judge(p)
	return nil
}

// refuse notes that a policy does not fit.
func (e *Engine) refuse(p *policy, err error) {
	if p.full == nil {
		e.tellRefused(p, err)
	}
	p.full = err
	e.judge(p)
}

func (e *Engine) tellRefused(p *policy, err error) {
	e.log.Error("a policy does not fit", "policy", p.key(), "error", err)
	e.cfg.Events.Notice("policy-refused", map[string]any{"policy": p.key(), "rules": labelsOf(p.desired), "error": err.Error()})
}

// judge keeps the refusal of a policy.
func (e *Engine) judge(p *policy) {
	switch {
	case p.gone:
		delete(e.refusals, p.resource())
	case p.full != nil:
		e.refusals[p.resource()] = p.full.Error()
	case p.blocked != nil:
		e.refusals[p.resource()] = p.blocked.Error()
	case len(p.unclassed) > 0:
		peer := slices.Min(slices.Collect(maps.Keys(p.unclassed)))
		e.refusals[p.resource()] = fmt.Sprintf("the policy does not say what %d peers may do, %s among them; they are denied", len(p.unclassed), peer)
	default:
		delete(e.refusals, p.resource())
	}
}

// collectPolicies removes the rows of policies that the policy service has taken back, when no endpoint has them any more.
func (e *Engine) collectPolicies() error {
	var errs []error
	used := e.used()
	var left []*policy
	for _, p := range e.removed {
		if !p.gone || e.policies[p.key()] != p {
			continue
		}
		if _, ok := used[p.number]; ok {
			left = append(left, p)
			continue
		}
		if err := e.cfg.Maps.DeletePolicy(p.number); err != nil {
			errs, left = append(errs, err), append(left, p)
			continue
		}
		e.disuse(p)
		e.cfg.NameRules.SetPolicy(p.number, nil)
		delete(e.policies, p.key())
		delete(e.refusals, p.resource())
		e.cfg.Events.PolicyDeleted(labelsOf(p.desired), uint64(p.number), len(p.desired.Rules))
	}
	e.removed = left
	return errors.Join(errs...)
}

// used are the numbers of policies that endpoints have.
func (e *Engine) used() map[uint32]struct{} {
	used := map[uint32]struct{}{denyAll: {}}
	for _, f := range e.force {
		used[f.Ingress], used[f.Egress] = struct{}{}, struct{}{}
	}
	return used
}

// collectStrays removes what an earlier agent left and nobody wants: endpoints that are gone, rows of policies that are not known.
func (e *Engine) collectStrays() error {
	var errs []error
	alive := map[uint16]struct{}{}
	for _, ids := range e.bound {
		for id := range ids {
			alive[id] = struct{}{}
		}
	}
	for id := range e.force {
		if _, ok := alive[id]; !ok && id != datapath.HostEndpoint {
			errs = append(errs, e.setEndpoint(id, datapath.EndpointPolicy{}))
		}
	}
	used := e.used()
	known := map[uint32]struct{}{}
	for _, p := range e.policies {
		known[p.number] = struct{}{}
	}
	for number := range e.pinned {
		_, inUse := used[number]
		_, isKnown := known[number]
		if inUse || isKnown {
			continue
		}
		if err := e.cfg.Maps.DeletePolicy(number); err != nil {
			errs = append(errs, err)
			continue
		}
		delete(e.pinned, number)
	}
	return errors.Join(errs...)
}

// labelsOf names the objects of a policy's rules.
func labelsOf(p *desired.Policy) []string {
	seen := map[string]struct{}{}
	for _, r := range p.Rules {
		if r.Name != "" {
			name := r.Name
			if r.Namespace != "" {
				name = r.Namespace + "/" + name
			}
			seen[r.Kind+"="+name] = struct{}{}
		}
	}
	return slices.Sorted(maps.Keys(seen))
}
