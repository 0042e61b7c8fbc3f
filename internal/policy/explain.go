// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"slices"
	"strings"

	"github.com/weirmesh/weir/internal/labelset"
)

// Explanation says how a decision came about.
type Explanation struct {
	Decision
	Direction   Direction
	Enforced    bool
	DefaultDeny bool
	EnforcedBy  []string
	// Steps has every rule that selects the subject, and the implicit deciders, in the order in which they are asked.
	Steps []Step
	// Nearest is the step of the allow rule that came nearest, for a default deny; -1 = none.
	Nearest int
}

// Step is a rule that was looked at.
type Step struct {
	// Rule is its position in Resolved.Rules.
	Rule        int
	Action      Action
	PeerMatches bool
	PortMatches bool
	// Decided: it is among the rules that decided.
	Decided bool
	// Reason why it did not match, or why it lost, or what it did, in words.
	Reason string
}

// Explain decides as Decide, and says for each rule whether it matches, and why not.
func (r *Resolved) Explain(p *Peer, proto uint8, port uint16) Explanation {
	x := Explanation{
		Decision: r.Decide(p, proto, port), Direction: r.Direction, Enforced: r.Enforced, DefaultDeny: r.DefaultDeny, EnforcedBy: r.EnforcedBy,
		Nearest: -1,
	}
	set := r.termSet(r.Match(p))
	nearest := 0
	for i := range r.entries {
		e := &r.entries[i]
		s := Step{
			Rule: e.rule, Action: e.action, PeerMatches: e.matchesPeer(set), PortMatches: e.matchesPort(set, proto, port),
			Decided: slices.Contains(x.Rules, e.rule),
		}
		switch {
		case e.source != nil && e.source.nothing:
			s.PeerMatches, s.PortMatches = false, false
			s.Reason = nothingReason(e.source)
		case s.PeerMatches && s.PortMatches:
			s.Reason = r.outcome(e, x.Decision, set, proto, port)
		default:
			s.Reason = r.miss(e, &s, p)
		}
		if n := r.nearness(e, &s, p); x.Verdict == DefaultDeny && n > nearest {
			nearest, x.Nearest = n, len(x.Steps)
		}
		x.Steps = append(x.Steps, s)
	}
	if r.fallback >= 0 {
		s := Step{Rule: r.fallback, PeerMatches: true, PortMatches: true, Decided: slices.Contains(x.Rules, r.fallback)}
		s.Reason = "a rule decided before"
		if s.Decided {
			s.Reason = "no rule matches, and nothing puts the endpoint in default deny"
		}
		x.Steps = append(x.Steps, s)
	}
	return x
}

func nothingReason(r *Rule) string {
	switch {
	case r.Ref.Kind == "NetworkPolicy":
		return "it has no entries, so it allows nothing"
	case r.Tier != TierPolicy:
		return "it names a peer in a way that is not known, so it allows nothing"
	case r.Deny:
		return "it names neither peer nor port, so it denies nothing"
	}
	return "it names neither peer nor port, so it allows nothing"
}

// outcome says what came of a rule that matches peer and port.
func (r *Resolved) outcome(e *entry, d Decision, set termSet, proto uint8, port uint16) string {
	if slices.Contains(d.Rules, e.rule) {
		switch {
		case e.localhost:
			return "the local node may always reach its pods"
		case e.action == ActionDeny:
			return "it denies"
		case d.Filter != nil && !d.Filter.Visibility:
			return d.Filter.words(e.rule)
		case d.Filter != nil:
			return "it allows; requests are read, to be seen only"
		}
		return "it allows"
	}
	if e.action == ActionPass && r.passed(e, set, proto, port) {
		return "it passes the decision to the next tier"
	}
	if len(d.Rules) == 0 && e.tier == TierBaseline {
		return "not asked: the endpoint is in default deny, which is final"
	}
	if len(d.Rules) == 0 {
		return "not asked: an earlier rule of its tier passed the decision on"
	}
	winner := r.Rules[d.Rules[0]].String()
	won := r.entryOf(d.Rules[0])
	switch {
	case e.tier == TierPolicy && won != nil && won.tier == TierPolicy && won.action == ActionDeny:
		return "it would allow, but is beaten by the deny rule " + winner
	case won != nil && won.tier < e.tier:
		return "not asked: " + winner + " decided in an earlier tier"
	case e.localhost:
		return "not needed: " + winner + " allows"
	case won != nil && won.localhost && e.tier == TierPolicy:
		return "not asked: the local node may always reach its pods, with every request"
	case won == nil || e.tier < won.tier:
		return "not asked: an earlier rule of its tier passed the decision on"
	}
	return "not asked: " + winner + " comes first in its tier"
}

// passed reports whether a Pass rule that matches is the first of its tier that does.
func (r *Resolved) passed(e *entry, set termSet, proto uint8, port uint16) bool {
	for i := range r.entries {
		o := &r.entries[i]
		if o.tier == e.tier && o.matchesPeer(set) && o.matchesPort(set, proto, port) {
			return o == e
		}
	}
	return false
}

func (r *Resolved) entryOf(rule int) *entry {
	for i := range r.entries {
		if r.entries[i].rule == rule {
			return &r.entries[i]
		}
	}
	return nil
}

// miss says why a rule does not match.
func (r *Resolved) miss(e *entry, s *Step, p *Peer) string {
	var why []string
	if !s.PeerMatches {
		why = append(why, r.peerMiss(e, p))
	}
	if !s.PortMatches && e.source != nil {
		why = append(why, "the port is not among "+e.source.ports.String())
	}
	return strings.Join(why, "; ")
}

func (r *Resolved) peerMiss(e *entry, p *Peer) string {
	if e.localhost {
		return "the peer is not the local node"
	}
	if len(e.terms) == 0 {
		return "it selects no peer"
	}
	var best []requirement
	for i, t := range e.terms {
		missing, ok := r.Terms[t].missing(p.Labels)
		if !ok {
			continue
		}
		if i == 0 || best == nil || len(missing) < len(best) {
			best = missing
		}
	}
	if len(best) == 0 || len(best) > 2 {
		words := make([]string, 0, 3)
		for i, t := range e.terms {
			if i == 2 && len(e.terms) > 3 {
				words = append(words, itoa(len(e.terms)-i)+" more")
				break
			}
			words = append(words, r.Terms[t].Words())
		}
		return "the peer is not among " + strings.Join(words, ", or ")
	}
	texts := make([]string, len(best))
	for i, q := range best {
		texts[i] = q.String() + " is wanted, and the peer has " + found(q, p.Labels)
	}
	return strings.Join(texts, "; ")
}

// missing returns what labels lack for an endpoint term. False = it is no condition on labels alone.
func (t *Term) missing(labels labelset.Set) ([]requirement, bool) {
	if t.kind != termEndpoints {
		return nil, false
	}
	return t.selectors[0].missing(labels), true
}

// found is what a peer has for the key of a requirement.
func found(q requirement, labels labelset.Set) string {
	var have []string
	for _, l := range labels {
		source, _, _ := strings.Cut(l, ":")
		if _, ok := cut(l, source, q.key); ok && (q.source == anySource || q.source == source) {
			have = append(have, l)
		}
	}
	if len(have) == 0 {
		return "no " + q.key
	}
	return strings.Join(have, " and ")
}

// nearness ranks rules that might have allowed: the peer right beats the port right, few labels missing beat many. 0 = not near.
func (r *Resolved) nearness(e *entry, s *Step, p *Peer) int {
	if e.source == nil || e.source.nothing || e.action != ActionAllow || e.tier == TierBaseline || s.PeerMatches && s.PortMatches {
		return 0
	}
	if s.PeerMatches {
		return 1000
	}
	outside := p.Prefix.IsValid() || isOutside(p)
	near := 0
	for _, t := range e.terms {
		missing, ok := r.Terms[t].missing(p.Labels)
		switch {
		case ok && !outside:
			near = max(near, 10-min(len(missing), 8))
		case outside && (r.Terms[t].kind == termCIDR || r.Terms[t].kind == termName):
			near = max(near, 2)
		default:
			near = max(near, 1)
		}
	}
	if s.PortMatches && near > 0 {
		near += 100
	}
	return near
}
