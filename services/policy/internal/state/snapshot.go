// SPDX-License-Identifier: Apache-2.0

package state

import (
	"cmp"
	"slices"
)

// Snapshot is the whole state at one revision. It is never changed.
type Snapshot struct {
	Revision uint64
	parts    [kinds]*part
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

// Count returns how many resources of a kind there are.
func (s *Snapshot) Count(kind Kind) int { return len(s.parts[kind].get()) }

// Get returns one resource.
func (s *Snapshot) Get(key Key) (Resource, bool) {
	r, ok := s.parts[key.Kind].get()[key.Name]
	return r, ok
}

// Removal is a resource that is gone, and the only node that knew it (empty = all).
type Removal struct {
	Key   Key
	Scope string
}

// Change is what turns one snapshot into another. Upserts and removals are in the order in which
// they must be applied.
type Change struct {
	Upserts  []Resource
	Removals []Removal
}

// Empty reports whether nothing changed.
func (c Change) Empty() bool { return len(c.Upserts) == 0 && len(c.Removals) == 0 }

// For returns the part of a change that concerns a node.
func (c Change) For(node string) Change {
	return Change{
		Upserts:  filter(c.Upserts, func(r Resource) bool { return r.Scope() == "" || r.Scope() == node }),
		Removals: filter(c.Removals, func(r Removal) bool { return r.Scope == "" || r.Scope == node }),
	}
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
	var c Change
	if old == nil {
		old = &Snapshot{}
	}
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
	slices.SortFunc(c.Upserts, func(a, b Resource) int { return compareKeys(a.Key(), b.Key()) })
	slices.SortFunc(c.Removals, func(a, b Removal) int { return compareKeys(b.Key, a.Key) })
	return c
}

func compareKeys(a, b Key) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name))
}
