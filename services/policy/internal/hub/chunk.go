// SPDX-License-Identifier: Apache-2.0

package hub

import (
	"slices"

	"github.com/weirmesh/weir/services/policy/internal/state"
)

// chunk cuts a change into updates of about at most size resources, in an order in which they can be applied one by one: policies know a peer before an
// address is it, and addresses are what a policy tells apart before a subject has it. On the way back, the other way round.
//
// An agent puts subjects in force before addresses, within one update. So both are never in one.
func chunk(c state.Change, size int) []state.Change {
	addresses := slices.ContainsFunc(c.Upserts, func(r state.Resource) bool {
		k := r.Key().Kind
		return k == state.KindPeer || k == state.KindNode || k == state.KindEndpoint
	})
	subjects := slices.ContainsFunc(c.Upserts, func(r state.Resource) bool { return r.Key().Kind == state.KindSubject })
	if !addresses || !subjects {
		c = withoutPassing(c)
	}
	total := len(c.Removals) + len(c.Late)
	for _, r := range c.Upserts {
		total += cost(r)
	}
	for _, s := range c.Selectors {
		total += changeCost(s)
	}
	if total == 0 {
		return nil
	}
	if total <= size && !(addresses && subjects) && len(c.Late) == 0 {
		return []state.Change{c}
	}
	b := builder{size: size}
	i := 0
	for ; i < len(c.Upserts) && c.Upserts[i].Key().Kind <= state.KindPolicy; i++ {
		b.upsert(c.Upserts[i])
	}
	for _, s := range c.Selectors {
		b.change(state.SelectorChange{Key: s.Key, Joined: s.Joined})
	}
	for ; i < len(c.Upserts) && c.Upserts[i].Key().Kind < state.KindSubject; i++ {
		b.upsert(c.Upserts[i])
	}
	if addresses && subjects {
		b.flush()
	}
	for ; i < len(c.Upserts); i++ {
		b.upsert(c.Upserts[i])
	}
	i = 0
	for ; i < len(c.Removals) && c.Removals[i].Key.Kind > state.KindPolicy; i++ {
		b.remove(c.Removals[i])
	}
	for _, s := range c.Selectors {
		b.change(state.SelectorChange{Key: s.Key, Left: s.Left})
	}
	for ; i < len(c.Removals); i++ {
		b.remove(c.Removals[i])
	}
	b.flush()
	for _, r := range c.Late {
		b.upsert(r)
	}
	b.flush()
	return b.all
}

// withoutPassing leaves out what is changed and then removed: it matters only between addresses and subjects.
func withoutPassing(c state.Change) state.Change {
	gone := map[state.Key]bool{}
	for _, r := range c.Removals {
		gone[r.Key] = true
	}
	c.Upserts = slices.DeleteFunc(slices.Clone(c.Upserts), func(r state.Resource) bool { return r.Key().Kind == state.KindPolicy && gone[r.Key()] })
	c.Selectors = slices.DeleteFunc(slices.Clone(c.Selectors), func(s state.SelectorChange) bool { return gone[state.Key{Kind: state.KindSelector, Name: s.Key}] })
	return c
}

// perUnit is how many small parts of a resource weigh as much as a resource.
const perUnit = 20

func cost(r state.Resource) int {
	parts := 0
	switch r := r.(type) {
	case state.Selector:
		parts = r.Size()
	case state.Policy:
		parts = 4 * len(r.Rules)
		for _, f := range r.Filters {
			parts += 1 + len(f.DNS)
		}
		for _, n := range r.Names {
			parts += 1 + len(n.Ranges)
		}
		for _, c := range r.Classes {
			parts += len(c.Selectors) + len(c.Ranges)
		}
	case state.Service:
		for _, p := range r.Ports {
			parts += len(p.Backends)
		}
	}
	return 1 + parts/perUnit
}

func changeCost(s state.SelectorChange) int { return 1 + (len(s.Joined)+len(s.Left))/perUnit }

type builder struct {
	size, used int
	now        state.Change
	all        []state.Change
}

func (b *builder) flush() {
	if b.used > 0 {
		b.all, b.now, b.used = append(b.all, b.now), state.Change{}, 0
	}
}

func (b *builder) room(n int) {
	if b.used > 0 && b.used+n > b.size {
		b.flush()
	}
	b.used += n
}

func (b *builder) upsert(r state.Resource) {
	s, ok := r.(state.Selector)
	most := b.size * perUnit
	if !ok || s.Size() <= most {
		b.room(cost(r))
		b.now.Upserts = append(b.now.Upserts, r)
		return
	}
	// Its first members, then others join; no policy names it yet.
	members := s.Members()
	b.room(b.size)
	b.now.Upserts = append(b.now.Upserts, state.Selector{Selector: s.Part(members[:most])})
	for part := range slices.Chunk(members[most:], most) {
		b.change(state.SelectorChange{Key: s.Selector.Key, Joined: part})
	}
}

func (b *builder) change(s state.SelectorChange) {
	if len(s.Joined)+len(s.Left) > 0 {
		b.room(changeCost(s))
		b.now.Selectors = append(b.now.Selectors, s)
	}
}

func (b *builder) remove(r state.Removal) {
	b.room(1)
	b.now.Removals = append(b.now.Removals, r)
}
