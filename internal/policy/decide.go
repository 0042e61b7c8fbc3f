// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"slices"
)

// Range says what is decided for some ports of a protocol.
type Range struct {
	// Proto is an IP protocol number; AnyProtocol (0) = every protocol that no other range of the class names, and then all ports.
	Proto uint8
	// First and Last port; the type for ICMP and ICMPv6.
	First, Last uint16
	Verdict     Verdict
	// Rules that decided, as positions in Resolved.Rules, rising.
	Rules []int
	// Filter that what is allowed passes through; nil = it passes plainly. With Allow only.
	Filter *Filter
}

// Decision is what is decided for one peer and port.
type Decision struct {
	Verdict Verdict
	// Rules that decided, as positions in Resolved.Rules, rising: all that allow, or all that deny, or the first of a tier. Empty for DefaultDeny, and
	// where nothing is enforced.
	Rules []int
	// Filter that what is allowed passes through; nil = it passes plainly. With Allow only.
	Filter *Filter
}

// decide is the one place of precedence: cover has the positions of the entries that match peer and port, rising. The filter of the decision is made of
// the draft once its range is known.
func (r *Resolved) decide(cover []int, at place) (Decision, *draft) {
	if !r.Enforced && len(r.visible) == 0 {
		return Decision{Verdict: Allow}, nil
	}
	localhost := -1 // the peer is the local node, which needs no rule and meets no filter
	for _, i := range cover {
		if e := &r.entries[i]; e.localhost {
			localhost = e.rule
		}
	}
	d, allows := r.verdict(cover, localhost)
	if d.Verdict != Allow {
		return d, nil
	}
	f := r.draftOf(allows, at)
	switch {
	case localhost >= 0 && f != nil:
		return Decision{Verdict: Allow, Rules: []int{localhost}}, nil
	case localhost >= 0 || f != nil:
		return d, f
	}
	return d, r.visibleAt(at)
}

// verdict decides without looking at requests. allows are the entries whose requests must be looked at.
func (r *Resolved) verdict(cover []int, localhost int) (d Decision, allows []int) {
	rest, d, ok := r.firstMatch(cover, TierAdmin)
	if ok {
		return d, nil
	}
	var rules, denies []int
	i := 0
	for ; i < len(rest) && r.entries[rest[i]].tier == TierPolicy; i++ {
		switch e := &r.entries[rest[i]]; {
		case e.localhost:
		case e.action == ActionDeny:
			denies = append(denies, e.rule)
		default:
			rules, allows = append(rules, e.rule), append(allows, rest[i])
		}
	}
	switch {
	case len(denies) > 0:
		return Decision{Verdict: Deny, Rules: denies}, nil
	case len(allows) > 0:
		return Decision{Verdict: Allow, Rules: rules}, allows
	case r.DefaultDeny && localhost >= 0:
		return Decision{Verdict: Allow, Rules: []int{localhost}}, nil
	case r.DefaultDeny:
		return Decision{Verdict: DefaultDeny}, nil
	}
	if _, d, ok := r.firstMatch(rest[i:], TierBaseline); ok {
		return d, nil
	}
	return Decision{Verdict: Allow, Rules: []int{r.fallback}}, nil
}

// firstMatch asks an ordered tier: its first entry decides, unless that passes on. It returns the entries of later tiers.
func (r *Resolved) firstMatch(cover []int, tier Tier) (rest []int, d Decision, decided bool) {
	n := 0
	for n < len(cover) && r.entries[cover[n]].tier == tier {
		n++
	}
	rest = cover[n:]
	if n == 0 {
		return rest, d, false
	}
	switch e := &r.entries[cover[0]]; e.action {
	case ActionAllow:
		return rest, Decision{Verdict: Allow, Rules: []int{e.rule}}, true
	case ActionDeny:
		return rest, Decision{Verdict: Deny, Rules: []int{e.rule}}, true
	}
	return rest, d, false
}

// termSet has a mark for each term that is matched.
type termSet []bool

func (r *Resolved) termSet(terms []int) termSet {
	set := make(termSet, len(r.Terms))
	for _, t := range terms {
		set[t] = true
	}
	return set
}

func (e *entry) matchesPeer(set termSet) bool {
	return e.any || slices.ContainsFunc(e.terms, func(t int) bool { return set[t] })
}

func (e *entry) matchesPort(set termSet, proto uint8, port uint16) bool {
	return e.anyPort || slices.ContainsFunc(e.ports, func(p portRange) bool {
		return p.proto == proto && p.first <= port && port <= p.last && p.appliesTo(set)
	})
}

func (p portRange) appliesTo(set termSet) bool { return p.term < 0 || set[p.term] }

// Decide says what is decided for one peer, protocol and port (the type for ICMP).
func (r *Resolved) Decide(p *Peer, proto uint8, port uint16) Decision {
	set := r.termSet(r.Match(p))
	var cover []int
	for i := range r.entries {
		if e := &r.entries[i]; e.matchesPeer(set) && e.matchesPort(set, proto, port) {
			cover = append(cover, i)
		}
	}
	d, f := r.decide(cover, place{set, proto, port})
	if f == nil {
		return d
	}
	for _, x := range r.classOf(set) { // whose range the filter is named by
		if x.Proto == proto && x.First <= port && port <= x.Last {
			d.Filter = x.Filter
		}
	}
	return d
}

// edge is where a range of an entry begins or has ended.
type edge struct {
	proto uint8
	at    int // port
	entry int // -1 = of none: there is something to be seen
	ends  bool
}

// Class says what is decided for peers that exactly these terms match (rising): sorted by protocol and port, merged, without overlap. What no range
// covers is DefaultDeny by no rule.
func (r *Resolved) Class(terms []int) []Range { return r.classOf(r.termSet(terms)) }

func (r *Resolved) classOf(set termSet) []Range {
	var base []int // entries for every port
	var edges []edge
	for i := range r.entries {
		e := &r.entries[i]
		if !e.matchesPeer(set) {
			continue
		}
		if e.anyPort {
			base = append(base, i)
			continue
		}
		for _, p := range e.ports {
			if p.appliesTo(set) {
				edges = append(edges, edge{p.proto, int(p.first), i, false}, edge{p.proto, int(p.last) + 1, i, true})
			}
		}
	}
	for _, v := range r.visible {
		edges = append(edges, edge{v.Proto, int(v.Port), -1, false}, edge{v.Proto, int(v.Port) + 1, -1, true})
	}
	slices.SortFunc(edges, func(a, b edge) int { return cmp.Or(cmp.Compare(a.proto, b.proto), cmp.Compare(a.at, b.at)) })

	rest, _ := r.decide(base, place{set: set})
	var ranges []Range
	if rest.Verdict != DefaultDeny {
		ranges = append(ranges, Range{Proto: AnyProtocol, Last: maxPort, Verdict: rest.Verdict, Rules: rest.Rules})
	}
	for len(edges) > 0 {
		n := 1
		for n < len(edges) && edges[n].proto == edges[0].proto {
			n++
		}
		ranges = append(ranges, r.protocolRanges(set, base, edges[:n], rest)...)
		edges = edges[n:]
	}
	return ranges
}

// protocolRanges walks along the ports of one protocol. rest is what is decided for every other protocol.
func (r *Resolved) protocolRanges(set termSet, base []int, edges []edge, rest Decision) []Range {
	var ranges []Range
	var drafts []*draft
	active := map[int]int{} // entries at this port -> how many of their ranges
	cover := make([]int, 0, len(base)+4)
	for at, i := 0, 0; at <= maxPort; {
		for ; i < len(edges) && edges[i].at == at; i++ {
			e := edges[i]
			if e.entry < 0 {
				continue
			}
			if !e.ends {
				active[e.entry]++
			} else if active[e.entry]--; active[e.entry] == 0 {
				delete(active, e.entry)
			}
		}
		next := maxPort + 1
		if i < len(edges) {
			next = edges[i].at
		}
		cover = append(cover[:0], base...)
		for e := range active {
			cover = append(cover, e)
		}
		slices.Sort(cover)
		d, f := r.decide(cover, place{set, edges[0].proto, uint16(at)})
		if last := len(ranges) - 1; last >= 0 && ranges[last].Verdict == d.Verdict && slices.Equal(ranges[last].Rules, d.Rules) && drafts[last].same(f) {
			ranges[last].Last = uint16(next - 1)
		} else {
			ranges = append(ranges, Range{Proto: edges[0].proto, First: uint16(at), Last: uint16(next - 1), Verdict: d.Verdict, Rules: d.Rules})
			drafts = append(drafts, f)
		}
		at = next
	}
	for i := range ranges {
		ranges[i].Filter = r.filter(drafts[i], ranges[i].Proto, ranges[i].First, ranges[i].Last)
	}
	if len(ranges) == 1 {
		if ranges[0].Verdict == rest.Verdict && slices.Equal(ranges[0].Rules, rest.Rules) && drafts[0] == nil {
			return nil // as every other protocol
		}
		return ranges
	}
	return slices.DeleteFunc(ranges, func(x Range) bool { return x.Verdict == DefaultDeny })
}

func (d *draft) same(o *draft) bool {
	return d == nil && o == nil || d != nil && o != nil && d.signature == o.signature
}
