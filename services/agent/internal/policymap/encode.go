// SPDX-License-Identifier: Apache-2.0

package policymap

import (
	"encoding/binary"
	"slices"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/namerules"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

// classKey encodes positions, rising.
func classKey(positions []uint32) string {
	b := make([]byte, 0, 2*len(positions))
	for _, x := range positions {
		b = binary.AppendUvarint(b, uint64(x))
	}
	return string(b)
}

// encode turns classes and names into the kernel's form.
func (e *Engine) encode(p *policy) {
	x := p.desired
	p.unslotted = nil
	slots := make(map[string]uint16, len(x.Filters))
	for i := range x.Filters {
		f := &x.Filters[i]
		number, err := e.cfg.Slots.Of(slot.Filter{Key: f.Key, Kind: uint8(f.Kind), Direction: x.Direction, Visibility: f.Visibility})
		if err != nil {
			p.unslotted = err
			continue
		}
		slots[f.Key] = number
		if f.Kind == desired.FilterDNS {
			e.cfg.NameRules.SetFilter(number, *f)
		}
	}
	p.classes = make(map[string][]datapath.PolicyRange, len(x.Classes))
	rest := restOf(x)
	for i := range x.Classes {
		class := &x.Classes[i]
		p.classes[classKey(class.Selectors)] = e.ranges(p, slots, class.Ranges, func(r desired.PolicyRange) bool {
			return len(class.Selectors) > 0 && !coveredBy(rest, r)
		})
	}
	p.names = nil
	for _, n := range x.Names {
		p.names = append(p.names, namerules.Name{MatchName: n.MatchName, MatchPattern: n.MatchPattern,
			Ranges: e.ranges(p, slots, n.Ranges, func(desired.PolicyRange) bool { return true })})
	}
	if len(p.names) > 0 {
		e.numbers.reserve([]uint32{p.number}) // on disk before weir-dns hears of it
	}
}

// ranges turns ranges into the kernel's form; byPeer says whether the peer mattered. What should pass a filter that has no slot is left out, and so
// denied.
func (e *Engine) ranges(p *policy, slots map[string]uint16, list []desired.PolicyRange, byPeer func(desired.PolicyRange) bool) []datapath.PolicyRange {
	out := make([]datapath.PolicyRange, 0, len(list))
	for _, r := range list {
		if r.Verdict == desired.DefaultDeny && len(r.Rules) == 0 {
			continue // as if it were not there
		}
		x := datapath.PolicyRange{Proto: r.Proto, First: r.First, Last: r.Last, Verdict: datapath.PolicyVerdict(r.Verdict)}
		if r.Filter != "" {
			if x.Slot = slots[r.Filter]; x.Slot == 0 {
				continue
			}
			x.Verdict = datapath.PolicyRedirect
			if f := p.desired.Filter(r.Filter); f != nil && f.Visibility {
				x.Verdict = datapath.PolicyVisible
			}
		}
		rules := make([]desired.PolicyRule, 0, len(r.Rules))
		for _, i := range r.Rules {
			rules = append(rules, p.desired.Rules[i])
		}
		number, fresh, err := e.numbers.list(matchOf(r, byPeer(r)), rules)
		if err != nil {
			e.log.Error("flows do not name rules of a policy", "policy", p.key(), "error", err)
		}
		if fresh {
			e.cfg.Names.SetRules(number, e.numbers.lists[number].match, rules)
		}
		x.Rule = number
		out = append(out, x)
	}
	return out
}

// Hubble's match types (flow.policy_match_type).
const (
	matchL3      = 1
	matchL3L4    = 2
	matchL4      = 3
	matchAll     = 4
	matchL3Proto = 5
	matchProto   = 6
)

// matchOf says what of a packet made it fall under a range: its peer, its protocol, its port.
func matchOf(r desired.PolicyRange, peer bool) uint8 {
	switch {
	case r.Proto == 0 && peer:
		return matchL3
	case r.Proto == 0:
		return matchAll
	case r.First == 0 && r.Last == 65535 && peer:
		return matchL3Proto
	case r.First == 0 && r.Last == 65535:
		return matchProto
	case peer:
		return matchL3L4
	}
	return matchL4
}

// coveredBy says that the same rules decide the same for every other peer, so that the peer did not matter.
func coveredBy(rest []desired.PolicyRange, r desired.PolicyRange) bool {
	return slices.ContainsFunc(rest, func(x desired.PolicyRange) bool {
		return x.Proto == r.Proto && x.First <= r.First && r.Last <= x.Last && x.Verdict == r.Verdict && x.Filter == r.Filter && slices.Equal(x.Rules, r.Rules)
	})
}

// covers says that a allows whatever b allows. It may say no where the truth is yes.
func covers(a, b []datapath.PolicyRange) bool {
	names := func(list []datapath.PolicyRange, proto uint8) bool {
		return slices.ContainsFunc(list, func(x datapath.PolicyRange) bool { return x.Proto == proto })
	}
	for _, r := range b {
		if !r.Verdict.Allows() {
			continue
		}
		proto := r.Proto
		if !names(a, proto) {
			proto = 0
		}
		port := int(r.First)
		for _, x := range a {
			if x.Proto == proto && passes(x, r) && int(x.First) <= port && int(x.Last) >= port {
				port = int(x.Last) + 1
			}
			if r.Proto == 0 && !names(b, x.Proto) {
				return false // a says something of its own about a protocol
			}
		}
		if port <= int(r.Last) {
			return false
		}
	}
	return true
}

// passes says that a lets through whatever b does: what b sends through a filter may pass a plainly, or by the same filter.
func passes(a, b datapath.PolicyRange) bool {
	if b.Verdict == datapath.PolicyRedirect && a.Verdict == datapath.PolicyRedirect {
		return a.Slot == b.Slot
	}
	return a.Verdict == datapath.PolicyAllow || a.Verdict == datapath.PolicyVisible
}

// restOf is what is decided for peers that no selector matches.
func restOf(p *desired.Policy) []desired.PolicyRange {
	for i := range p.Classes {
		if len(p.Classes[i].Selectors) == 0 {
			return p.Classes[i].Ranges
		}
	}
	return nil
}
