// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"

	"github.com/weirmesh/weir/internal/reserved"
)

// Anchors returns labels without their source, `key=value` or `key`: every peer that the term matches has at least one of them. Nil = a peer without
// any label may match. Who has many terms finds by it those that are worth trying.
func (t *Term) Anchors() []string {
	switch t.kind {
	case termEndpoints, termLabels:
		var all []string
		for _, s := range t.selectors {
			a := s.anchors()
			if a == nil {
				return nil
			}
			all = append(all, a...)
		}
		return all
	case termNodes:
		if a := t.selectors[0].anchors(); a != nil {
			return a
		}
		return []string{"remote-node"}
	case termCIDR:
		if !t.networks && !t.nodes && !t.pods {
			return worldAnchors()
		}
	case termWorld:
		return worldAnchors()
	}
	return nil
}

// Outside returns prefixes of which one contains every peer that the term matches; ok is false if it may match others, too. A term of names has none: no
// peer of a node's policy matches it.
func (t *Term) Outside() (prefixes []netip.Prefix, ok bool) {
	if t.kind == termName {
		return nil, true
	}
	if t.kind != termCIDR || t.networks || t.nodes || t.pods {
		return nil, false
	}
	for i := range t.items {
		prefixes = append(prefixes, t.items[i].prefix)
	}
	return prefixes, true
}

func worldAnchors() []string { return []string{"world", "world-ipv4", "world-ipv6"} }

// anchors are those of the requirement that fewest meet, as far as can be told: what everybody has comes last.
func (s *Selector) anchors() []string {
	var best []string
	rank := 0
	for i := range s.requirements {
		q := &s.requirements[i]
		r := 0
		switch q.op {
		case opIn:
			r = 4
		case opExists:
			r = 2
		default:
			continue
		}
		switch q.key {
		case reserved.ClusterKey:
			r -= 2
			if r == 0 {
				r = 1
			}
		case reserved.NamespaceKey:
			r--
		}
		if r <= rank {
			continue
		}
		rank, best = r, nil
		for _, v := range q.values {
			best = append(best, q.key+"="+v)
		}
		if q.op == opExists {
			best = []string{q.key}
		}
		if q.key == "world" { // also that of one family
			best = append(best, worldAnchors()...)
		}
	}
	return best
}
