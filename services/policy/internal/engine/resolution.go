// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/binary"
	"slices"

	"github.com/weirmesh/weir/internal/policy"
)

// resolution is a resolved policy in use, with the classes of peers that occur.
type resolution struct {
	resolved *policy.Resolved
	refs     int // sides of classes
	terms    []*term
	classes  map[string]*peerClass // by positions
	out      *Policy
	stale    bool
	// namespace of the subject; a policy with filters is one subject's identity's alone.
	namespace string
	age       uint64    // the youngest with a filter says what it is
	used      []*Filter // of out, told to the engine
}

// peerClass are the peers that exactly some terms match.
type peerClass struct {
	terms  []int
	peers  int
	ranges []policy.Range
}

func positionsKey(terms []int) string {
	b := make([]byte, 0, 2*len(terms))
	for _, t := range terms {
		b = binary.AppendUvarint(b, uint64(t))
	}
	return string(b)
}

// acquire returns the shared resolution of a resolved policy; nil if everything passes by it, unseen.
func (e *Engine) acquire(resolved *policy.Resolved, namespace string) *resolution {
	if resolved.Key == "" {
		return nil
	}
	if r := e.resolutions[resolved.Key]; r != nil {
		if r.refs++; r.refs == 1 {
			delete(e.idle, r)
			e.rejuvenate(r)
		}
		return r
	}
	r := &resolution{namespace: namespace, resolved: resolved, refs: 1, classes: map[string]*peerClass{}, stale: true}
	e.resolutions[resolved.Key] = r
	for _, t := range resolved.Terms {
		term := e.acquireTerm(t)
		term.users[r] = struct{}{}
		r.terms = append(r.terms, term)
	}
	e.rejuvenate(r)
	r.class(e, nil) // always there
	e.partition(r)
	for _, p := range resolved.Prefixes() {
		if p.Bits() == 0 {
			continue // the world's own peers
		}
		e.prefixes[p]++
		if e.prefixes[p] == 1 {
			e.refreshCIDR(p)
		}
	}
	for _, p := range resolved.Networks() {
		e.networks[p]++
		if e.networks[p] == 1 {
			e.told++
		}
	}
	for _, n := range resolved.NamedPorts() {
		e.names[n]++
		if e.names[n] == 1 {
			e.told++
		}
	}
	e.changed.resolutions[r] = struct{}{}
	return r
}

// Rests is how many calls of Rest a policy is kept up to date that no subject has any more. A node has it until its subjects have another one, and must
// know meanwhile what it says of new peers.
const Rests = 2

// Rest forgets policies that no subject had since two calls. It must be called no more often than agents may lag.
func (e *Engine) Rest() {
	for r, n := range e.idle {
		if n > 1 {
			e.idle[r] = n - 1
			continue
		}
		delete(e.idle, r)
		e.drop(r)
	}
}

// release gives a resolution back.
func (e *Engine) release(r *resolution) {
	if r == nil {
		return
	}
	if r.refs--; r.refs == 0 {
		e.idle[r] = Rests
	}
}

// drop forgets a resolution that no class uses.
func (e *Engine) drop(r *resolution) {
	delete(e.resolutions, r.resolved.Key)
	delete(e.changed.resolutions, r)
	e.changed.gonePolicy[r.resolved.Key] = struct{}{}
	e.useFilters(r, nil)
	for _, t := range r.terms {
		delete(t.users, r)
		e.releaseTerm(t)
	}
	for _, p := range r.resolved.Prefixes() {
		if p.Bits() > 0 {
			e.dropPrefix(p)
		}
	}
	for _, p := range r.resolved.Networks() {
		if e.networks[p]--; e.networks[p] == 0 {
			delete(e.networks, p)
			e.told++
		}
	}
	for _, n := range r.resolved.NamedPorts() {
		if e.names[n]--; e.names[n] == 0 {
			delete(e.names, n)
			e.told++
		}
	}
}

// class returns the class of peers that exactly these terms match.
func (r *resolution) class(e *Engine, terms []int) *peerClass {
	key := positionsKey(terms)
	c := r.classes[key]
	if c == nil {
		e.counts.Decided++
		c = &peerClass{terms: slices.Clone(terms), ranges: r.resolved.Class(terms)}
		r.classes[key] = c
		r.stale = true
	}
	return c
}

// count says that peers with these terms came or went.
func (r *resolution) count(e *Engine, terms []int, n int) {
	if len(terms) == 0 {
		return
	}
	c := r.class(e, terms)
	if c.peers += n; c.peers <= 0 {
		delete(r.classes, positionsKey(terms))
		r.stale = true
	}
	if r.stale {
		e.changed.resolutions[r] = struct{}{}
	}
}

// positions returns the terms that a peer matches.
func (r *resolution) positions(id int) []int {
	var found []int
	for i, t := range r.terms {
		if t.members.has(id) {
			found = append(found, i)
		}
	}
	return found
}

// branch is a class under construction: the peers that matched some of the terms so far.
type branch struct {
	terms []int
	next  map[int]*branch
	peers int
}

// partition counts the classes of all peers: one pass over the members of each term.
func (e *Engine) partition(r *resolution) {
	if len(e.scratch) < len(e.byID) {
		e.scratch = make([]*branch, len(e.byID)+len(e.byID)/4)
	}
	at := e.scratch
	root := &branch{}
	var touched []int
	for i, t := range r.terms {
		t.members.each(func(id int) {
			b := at[id]
			if b == nil {
				b = root
				touched = append(touched, id)
			}
			n := b.next[i]
			if n == nil {
				n = &branch{terms: append(slices.Clone(b.terms), i)}
				if b.next == nil {
					b.next = map[int]*branch{}
				}
				b.next[i] = n
			}
			at[id] = n
		})
	}
	for _, id := range touched {
		at[id].peers++
		at[id] = nil
	}
	var visit func(b *branch)
	visit = func(b *branch) {
		if b.peers > 0 {
			r.class(e, b.terms).peers = b.peers
		}
		for _, n := range b.next {
			visit(n)
		}
	}
	visit(root)
}

// publish returns the policy as of now.
func (r *resolution) publish() *Policy {
	if !r.stale {
		return r.out
	}
	p := &Policy{Key: r.resolved.Key, Direction: r.resolved.Direction, Rules: r.resolved.Rules}
	if r.out != nil {
		p.Selectors, p.Prefixes, p.Names = r.out.Selectors, r.out.Prefixes, r.out.Names
	} else {
		p.Names = r.resolved.Names()
		for _, t := range r.terms {
			p.Selectors = append(p.Selectors, t.term.Key)
		}
		for _, x := range r.resolved.Prefixes() {
			if x.Bits() > 0 {
				p.Prefixes = append(p.Prefixes, CIDRPrefix+x.String())
			}
		}
	}
	for _, c := range r.classes {
		p.Classes = append(p.Classes, Class{Selectors: c.terms, Ranges: c.ranges})
	}
	slices.SortFunc(p.Classes, compareClasses)
	p.Filters = r.filters(p)
	r.out, r.stale = p, false
	return p
}
