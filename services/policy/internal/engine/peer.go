// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/internal/policy"
)

// peer is a peer and its number in bitsets.
type peer struct {
	peer *policy.Peer
	id   int
}

// term is a selector in use.
type term struct {
	term    *policy.Term
	anchors []string       // labels of which every match has one
	outside []netip.Prefix // instead: prefixes of which one contains every match
	refs    int
	seen    uint64 // the last search that found it
	members bitset
	users   map[*resolution]struct{}
	// pending is what changed since out was made: +1 joined, -1 left.
	pending map[string]int
	out     *Selector
}

// SetPeer takes a peer in.
func (e *Engine) SetPeer(p *policy.Peer) {
	old := e.peers[p.Key]
	if old != nil && equalPeers(old.peer, p) {
		return
	}
	if old != nil {
		e.DeletePeer(p.Key)
	}
	n := &peer{peer: p, id: len(e.byID)}
	if last := len(e.free) - 1; last >= 0 {
		n.id, e.free = e.free[last], e.free[:last]
		e.byID[n.id] = n
	} else {
		e.byID = append(e.byID, n)
	}
	e.peers[p.Key] = n
	for _, l := range anchorsOf(p.Labels) {
		if e.byLabel[l] == nil {
			e.byLabel[l] = map[*peer]struct{}{}
		}
		e.byLabel[l][n] = struct{}{}
	}
	if p.Prefix.IsValid() {
		e.prefixed[n] = struct{}{}
	}
	affected := map[*resolution]struct{}{}
	e.candidates(n.peer, func(t *term) {
		e.counts.Matched++
		if t.term.Matches(p) {
			t.members.add(n.id)
			e.noteMember(t, p.Key, 1)
			maps.Copy(affected, t.users)
		}
	})
	for r := range affected {
		r.count(e, r.positions(n.id), 1)
	}
}

// DeletePeer forgets a peer.
func (e *Engine) DeletePeer(key string) {
	n := e.peers[key]
	if n == nil {
		return
	}
	affected := map[*resolution]struct{}{}
	var matched []*term
	e.candidates(n.peer, func(t *term) {
		if t.members.has(n.id) {
			matched = append(matched, t)
			maps.Copy(affected, t.users)
		}
	})
	for r := range affected {
		r.count(e, r.positions(n.id), -1)
	}
	for _, t := range matched {
		t.members.remove(n.id)
		e.noteMember(t, key, -1)
	}
	for _, l := range anchorsOf(n.peer.Labels) {
		delete(e.byLabel[l], n)
		if len(e.byLabel[l]) == 0 {
			delete(e.byLabel, l)
		}
	}
	delete(e.prefixed, n)
	delete(e.peers, key)
	e.byID[n.id] = nil
	e.free = append(e.free, n.id)
}

func (e *Engine) noteMember(t *term, key string, n int) {
	e.changed.terms[t] = struct{}{}
	if t.pending[key] += n; t.pending[key] == 0 {
		delete(t.pending, key)
	}
	if strings.HasPrefix(key, CIDRPrefix) {
		e.changed.named[t.term.Key] = struct{}{} // nodes with the selector must have the peer
	}
}

// candidates calls f for the terms that may match a peer.
func (e *Engine) candidates(p *policy.Peer, f func(*term)) {
	e.search++
	found := func(terms map[*term]struct{}) {
		for t := range terms {
			if t.seen != e.search {
				t.seen = e.search
				f(t)
			}
		}
	}
	for _, l := range anchorsOf(p.Labels) {
		found(e.anchored[l])
	}
	if p.Prefix.IsValid() {
		for bits := range p.Prefix.Bits() + 1 {
			if outer, err := p.Prefix.Addr().Prefix(bits); err == nil {
				found(e.byPrefix[outer])
			}
		}
	}
	for t := range e.unanchored {
		f(t)
	}
}

// within reports whether a peer may match by its prefix.
func (t *term) within(p *policy.Peer) bool {
	return slices.ContainsFunc(t.outside, func(o netip.Prefix) bool { return o.Bits() <= p.Prefix.Bits() && o.Contains(p.Prefix.Addr()) })
}

// anchorsOf returns what of labels the index knows: `key=value` and `key`, without source.
func anchorsOf(labels labelset.Set) []string {
	all := make([]string, 0, 2*len(labels))
	for _, l := range labels {
		_, rest, _ := strings.Cut(l, ":")
		key, value, _ := strings.Cut(rest, "=")
		all = append(all, key, key+"="+value)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func (e *Engine) acquireTerm(t *policy.Term) *term {
	if old := e.terms[t.Key]; old != nil {
		old.refs++
		return old
	}
	n := &term{term: t, refs: 1, users: map[*resolution]struct{}{}, pending: map[string]int{}, anchors: t.Anchors()}
	e.terms[t.Key] = n
	e.changed.terms[n] = struct{}{}
	match := func(p *peer) {
		e.counts.Matched++
		if t.Matches(p.peer) {
			n.members.add(p.id)
		}
	}
	if prefixes, ok := t.Outside(); ok {
		n.anchors, n.outside = nil, prefixes
		for _, o := range prefixes {
			if e.byPrefix[o] == nil {
				e.byPrefix[o] = map[*term]struct{}{}
			}
			e.byPrefix[o][n] = struct{}{}
		}
		for p := range e.prefixed {
			if n.within(p.peer) {
				match(p)
			}
		}
		return n
	}
	if len(n.anchors) == 0 {
		e.unanchored[n] = struct{}{}
		for _, p := range e.peers {
			match(p)
		}
		return n
	}
	for _, l := range n.anchors {
		if e.anchored[l] == nil {
			e.anchored[l] = map[*term]struct{}{}
		}
		e.anchored[l][n] = struct{}{}
		for p := range e.byLabel[l] {
			match(p)
		}
	}
	return n
}

func (e *Engine) releaseTerm(t *term) {
	if t.refs--; t.refs > 0 {
		return
	}
	delete(e.terms, t.term.Key)
	delete(e.unanchored, t)
	for _, l := range t.anchors {
		delete(e.anchored[l], t)
		if len(e.anchored[l]) == 0 {
			delete(e.anchored, l)
		}
	}
	for _, o := range t.outside {
		delete(e.byPrefix[o], t)
		if len(e.byPrefix[o]) == 0 {
			delete(e.byPrefix, o)
		}
	}
	delete(e.changed.terms, t)
	e.changed.goneTerm[t.term.Key] = struct{}{}
}

// publishTerm makes the selector as of now.
func (e *Engine) publishTerm(t *term, into map[string]*Selector) {
	all := func() []string {
		var keys []string
		t.members.each(func(id int) { keys = append(keys, e.byID[id].peer.Key) })
		slices.Sort(keys)
		return keys
	}
	if t.out == nil {
		s := &Selector{Key: t.term.Key, members: all()}
		s.size = len(s.members)
		for _, m := range s.members {
			if strings.HasPrefix(m, CIDRPrefix) {
				s.Named = append(s.Named, m)
			}
		}
		t.out = s
	} else if len(t.pending) > 0 {
		var joined, left []string
		for key, n := range t.pending {
			if n > 0 {
				joined = append(joined, key)
			} else {
				left = append(left, key)
			}
		}
		t.out = t.out.next(joined, left, all)
	}
	t.pending = map[string]int{}
	into[t.term.Key] = t.out
}

func (e *Engine) dropPrefix(p netip.Prefix) {
	if e.prefixes[p]--; e.prefixes[p] <= 0 {
		delete(e.prefixes, p)
		e.refreshCIDR(p)
	}
}

// refreshCIDR makes the peer of a prefix as it should be.
func (e *Engine) refreshCIDR(p netip.Prefix) {
	key := CIDRPrefix + p.String()
	e.changed.cidrs[key] = struct{}{}
	if e.prefixes[p] == 0 {
		e.DeletePeer(key)
		return
	}
	_, api := e.apiServers[p.Addr()]
	e.SetPeer(&policy.Peer{Key: key, Prefix: p, Labels: OutsideLabels(p, e.options.DualStack, api && p.IsSingleIP())})
}

// OutsideLabels returns the labels of a prefix outside of the cluster.
func OutsideLabels(p netip.Prefix, dual, apiServer bool) labelset.Set {
	world := "reserved:world"
	switch {
	case dual && p.Addr().Is4():
		world = "reserved:world-ipv4"
	case dual:
		world = "reserved:world-ipv6"
	}
	labels := labelset.Set{CIDRPrefix + p.String()}
	if apiServer {
		labels = append(labels, "reserved:kube-apiserver")
	}
	return append(labels, world) // sorted as it stands
}
