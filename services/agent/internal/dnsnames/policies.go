// SPDX-License-Identifier: Apache-2.0

package dnsnames

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/internal/policy"
)

// Policy is what a policy allows by names.
type Policy struct {
	Number uint32
	Names  []Selector
}

// Selector is one selector of names and what it allows.
type Selector struct {
	policy.NameSelector
	Ranges []Range
}

// selector is one that any policy has.
type selector struct {
	id   uint32
	refs int
}

type namePolicy struct {
	number uint32
	names  map[uint32]Selector // by the selector's number
	keys   []policy.NameSelector
}

// set is a set of selectors that the names of some address match.
type set struct {
	key       string
	number    uint32
	selectors []uint32
	refs      int // addresses that want it or have it
	isNew     bool
}

// Update replaces some policies and removes others. complete: with it all policies are known, and what an earlier process wrote for others goes too,
// since their numbers may be given to new ones. done is called when the maps hold it; while they cannot, it is tried again. It must not block.
func (e *Engine) Update(upserts []Policy, removed []uint32, complete bool, done func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if complete {
		removed = append(removed, e.strangersLocked(upserts)...)
	}
	var old []*namePolicy
	drop := func(number uint32) {
		if p := e.policies[number]; p != nil {
			old = append(old, p)
			delete(e.policies, number)
		}
		e.dirtyPolicies[number] = struct{}{}
	}
	for _, number := range removed {
		drop(number)
	}
	created := map[uint32]policy.NameSelector{}
	for _, u := range upserts {
		drop(u.Number)
		p := &namePolicy{number: u.Number, names: map[uint32]Selector{}}
		for _, s := range u.Names {
			sel := e.selectors[s.NameSelector]
			if sel == nil {
				e.lastID++
				sel = &selector{id: e.lastID}
				e.selectors[s.NameSelector] = sel
				created[sel.id] = s.NameSelector
			}
			sel.refs++
			p.keys = append(p.keys, s.NameSelector)
			s.Ranges = slices.Concat(p.names[sel.id].Ranges, s.Ranges)
			p.names[sel.id] = s
		}
		if len(p.keys) > 0 {
			e.policies[u.Number] = p
		}
	}
	gone := e.releaseLocked(old)
	if len(created) > 0 || len(gone) > 0 {
		e.rematchLocked(created, gone)
	}
	if done != nil {
		e.updates = append(e.updates, done)
	}
	e.kick()
}

// strangersLocked returns the policies that have rows in the maps and are neither known nor among the new ones.
func (e *Engine) strangersLocked(fresh []Policy) []uint32 {
	strangers := map[uint32]struct{}{}
	for _, rows := range e.rows {
		for number := range rows {
			if e.policies[number] == nil {
				strangers[number] = struct{}{}
			}
		}
	}
	for _, p := range fresh {
		delete(strangers, p.Number)
	}
	return slices.Collect(maps.Keys(strangers))
}

// releaseLocked gives back the selectors of replaced policies, and returns those that no policy has left.
func (e *Engine) releaseLocked(old []*namePolicy) map[uint32]struct{} {
	gone := map[uint32]struct{}{}
	for _, p := range old {
		for _, key := range p.keys {
			sel := e.selectors[key]
			if sel.refs--; sel.refs == 0 {
				gone[sel.id] = struct{}{}
				delete(e.selectors, key)
			}
		}
	}
	return gone
}

// rematchLocked brings all names up to date with the selectors.
func (e *Engine) rematchLocked(created map[uint32]policy.NameSelector, gone map[uint32]struct{}) {
	for _, n := range e.names {
		before := len(n.matches)
		n.matches = slices.DeleteFunc(n.matches, func(id uint32) bool { _, is := gone[id]; return is })
		changed := len(n.matches) != before
		for id, sel := range created {
			if _, is := gone[id]; !is && e.cfg.Match(sel, n.text) {
				n.matches, changed = append(n.matches, id), true
			}
		}
		if !changed {
			continue
		}
		slices.Sort(n.matches)
		for _, m := range n.mappings {
			e.chooseLocked(m.address)
		}
	}
}

// matchesLocked returns the selectors that match a name.
func (e *Engine) matchesLocked(text string) []uint32 {
	var out []uint32
	for sel, s := range e.selectors {
		if e.cfg.Match(sel, text) {
			out = append(out, s.id)
		}
	}
	slices.Sort(out)
	return out
}

// chooseLocked sets what an address wants.
func (e *Engine) chooseLocked(a *address) {
	var ids []uint32
	if len(a.mappings) == 1 {
		for n := range a.mappings {
			ids = n.matches
		}
	} else {
		for n := range a.mappings {
			ids = append(ids, n.matches...)
		}
		slices.Sort(ids)
		ids = slices.Compact(ids)
	}
	want := e.setLocked(ids)
	if want != a.want {
		e.dropSetLocked(a.want)
		a.want = want
		if want != nil {
			want.refs++
		}
	}
	if a.want != a.have || a.foreign != 0 {
		e.dirty[a] = struct{}{}
	}
}

// setLocked returns the set of some selectors, nil for none.
func (e *Engine) setLocked(ids []uint32) *set {
	if len(ids) == 0 {
		return nil
	}
	key := make([]byte, 0, 4*len(ids))
	for _, id := range ids {
		key = binary.BigEndian.AppendUint32(key, id)
	}
	if s := e.sets[string(key)]; s != nil {
		return s
	}
	// Numbers are used again only after all others, so that no program takes one set for another.
	e.lastSet++
	for e.lastSet == 0 || e.byNumber[e.lastSet] != nil {
		e.lastSet++
	}
	s := &set{key: string(key), number: e.lastSet, selectors: slices.Clone(ids), isNew: true}
	e.sets[s.key], e.byNumber[s.number] = s, s
	return s
}

func (e *Engine) dropSetLocked(s *set) {
	if s == nil {
		return
	}
	if s.refs--; s.refs > 0 {
		return
	}
	delete(e.sets, s.key)
	delete(e.byNumber, s.number)
	e.dead = append(e.dead, s.number)
}

// rowLocked is what a policy allows to addresses of a set.
func (e *Engine) rowLocked(p *namePolicy, s *set) (ranges []Range, conflicts int) {
	var matching []Selector
	for _, id := range s.selectors {
		if x, ok := p.names[id]; ok {
			matching = append(matching, x)
		}
	}
	return merge(matching...)
}

// Range returns what a policy allows by name to an address, as the kernel has it.
func (e *Engine) Range(number uint32, addr netip.Addr, proto uint8, port uint16) (Range, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	a := e.addresses[addr]
	if a == nil || a.have == nil {
		return Range{}, false
	}
	return find(e.rows[a.have.number][number], proto, port)
}
