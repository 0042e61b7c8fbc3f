// SPDX-License-Identifier: Apache-2.0

package state

import (
	"cmp"
	"iter"
	"maps"
	"slices"

	"github.com/weirmesh/weir/services/policy/internal/engine"
)

// Snapshot is the whole state at one revision. It is never changed.
type Snapshot struct {
	Revision uint64
	parts    [kinds]*part
	// policy is what is not told to every node: subjects, policies, selectors, peers outside of the cluster. Nil until the state is whole.
	policy *engine.View
	// render is what proxies are rendered from.
	render *Render
}

// part holds the resources of one kind. A part that nothing touched is carried over from snapshot
// to snapshot, so that an equal pointer means equal content.
type part struct{ resources map[string]Resource }

func (p *part) get() map[string]Resource {
	if p == nil {
		return nil
	}
	return p.resources
}

var emptyView = &engine.View{}

// Policy returns what policies make of the state.
func (s *Snapshot) Policy() *engine.View {
	if s == nil || s.policy == nil {
		return emptyView
	}
	return s.policy
}

var emptyRender = &Render{}

// Render returns what proxies are rendered from.
func (s *Snapshot) Render() *Render {
	if s == nil || s.render == nil {
		return emptyRender
	}
	return s.render
}

// Count returns how many resources of a kind there are.
func (s *Snapshot) Count(kind Kind) int {
	switch v := s.Policy(); kind {
	case KindIdentity:
		return len(s.parts[kind].get()) - len(s.parts[KindNode].get()) // each node's host is one
	case KindSelector:
		return len(v.Selectors)
	case KindPolicy:
		return len(v.Policies)
	case KindPeer:
		return len(v.CIDRs) + len(s.parts[kind].get())
	case KindSubject:
		n := 0
		for _, node := range v.Nodes {
			n += len(node.Subjects)
		}
		return n
	}
	return len(s.parts[kind].get())
}

// Names returns the names of a kind that every node is told, sorted.
func (s *Snapshot) Names(kind Kind) []string { return slices.Sorted(maps.Keys(s.parts[kind].get())) }

// All yields the resources of a kind that every node is told.
func (s *Snapshot) All(kind Kind) iter.Seq[Resource] { return maps.Values(s.parts[kind].get()) }

// Get returns one resource of the kinds that every node is told.
func (s *Snapshot) Get(key Key) (Resource, bool) {
	r, ok := s.parts[key.Kind].get()[key.Name]
	return r, ok
}

// Removal is a resource that is gone, and the only node that knew it (empty = all).
type Removal struct {
	Key   Key
	Scope string
}

// SelectorChange says which peers a selector matches from now on, and which no longer.
type SelectorChange struct {
	Key          string
	Joined, Left []string
}

// policyChange is a policy with other classes. Classes come before their peers and go after them.
type policyChange struct {
	key         string
	early, late *engine.Policy // nil = nothing
}

// Change is what turns one snapshot into another. Upserts and removals are in the order in which
// they must be applied. Selectors that stay are changed after upserts of selectors and policies.
type Change struct {
	Upserts   []Resource
	Selectors []SelectorChange
	Removals  []Removal
	// Late upserts come after all else: policies without the classes of peers that are gone then.
	Late []Resource

	// What For needs beside; nil in what it returns.
	old, new *Snapshot
	policies []policyChange
	cidrs    []Peer
}

// Empty reports whether nothing changed.
func (c Change) Empty() bool {
	return len(c.Upserts) == 0 && len(c.Removals) == 0 && len(c.Selectors) == 0 && len(c.Late) == 0 && c.old.Policy() == c.new.Policy() &&
		c.old.Render() == c.new.Render()
}

// For returns the part of a change that concerns a node.
func (c Change) For(node string) Change {
	mine := Change{
		Upserts:  filter(c.Upserts, func(r Resource) bool { return r.Scope() == "" || r.Scope() == node }),
		Removals: filter(c.Removals, func(r Removal) bool { return r.Scope == "" || r.Scope == node }),
	}
	c.addPolicy(node, &mine)
	c.addNear(node, &mine)
	mine.sort()
	return mine
}

func filter[T any](all []T, keep func(T) bool) []T {
	var kept []T
	for _, t := range all {
		if keep(t) {
			kept = append(kept, t)
		}
	}
	return kept
}

// Diff returns what turns old into new. A nil old is an empty one.
func Diff(old, new *Snapshot) Change {
	if old == nil {
		old = &Snapshot{}
	}
	c := Change{old: old, new: new}
	for kind := range kinds {
		if old.parts[kind] == new.parts[kind] {
			continue
		}
		before, after := old.parts[kind].get(), new.parts[kind].get()
		for name, r := range after {
			if b, ok := before[name]; !ok || !r.equal(b) {
				c.Upserts = append(c.Upserts, r)
			}
		}
		for name, r := range before {
			if a, ok := after[name]; !ok {
				c.Removals = append(c.Removals, Removal{Key: Key{kind, name}, Scope: r.Scope()})
			} else if a.Scope() != r.Scope() && r.Scope() != "" {
				// It moved: the old node must forget it, though the key lives on.
				c.Removals = append(c.Removals, Removal{Key: Key{kind, name}, Scope: r.Scope()})
			}
		}
	}
	c.diffPolicy()
	c.sort()
	return c
}

func (c *Change) sort() {
	slices.SortFunc(c.Upserts, func(a, b Resource) int { return compareKeys(a.Key(), b.Key()) })
	slices.SortFunc(c.Removals, func(a, b Removal) int { return compareKeys(b.Key, a.Key) })
	slices.SortFunc(c.Selectors, func(a, b SelectorChange) int { return cmp.Compare(a.Key, b.Key) })
}

func compareKeys(a, b Key) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name))
}
