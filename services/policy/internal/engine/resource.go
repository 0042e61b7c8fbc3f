// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/weirmesh/weir/internal/policy"
)

// Selector is a set of peers at one time. It is never changed: a newer one knows what changed since the older, so that it need not be compared.
type Selector struct {
	Key string
	// Named are the members that have a prefix of their own ("cidr:..."), sorted.
	Named []string

	members      []string  // if previous is nil
	previous     *Selector // what joined and left is since then
	joined, left []string
	depth, size  int
}

// maxDepth bounds how many older versions a selector keeps.
const maxDepth = 32

// Size is the number of members.
func (s *Selector) Size() int { return s.size }

// Members returns the members, sorted.
func (s *Selector) Members() []string {
	all := s.set()
	return slices.Sorted(maps.Keys(all))
}

func (s *Selector) set() map[string]bool {
	var chain []*Selector
	for ; s.previous != nil; s = s.previous {
		chain = append(chain, s)
	}
	all := make(map[string]bool, len(s.members))
	for _, m := range s.members {
		all[m] = true
	}
	for _, c := range slices.Backward(chain) {
		for _, m := range c.left {
			delete(all, m)
		}
		for _, m := range c.joined {
			all[m] = true
		}
	}
	return all
}

// Part returns a selector of that key with some of its members, for a start that others join.
func (s *Selector) Part(members []string) *Selector {
	return &Selector{Key: s.Key, members: members, size: len(members)}
}

// Since returns who joined and who left since an older version of the same selector, sorted.
func (s *Selector) Since(old *Selector) (joined, left []string) {
	if s == old {
		return nil, nil
	}
	net := map[string]int{}
	at := s
	for ; at != old && at.previous != nil; at = at.previous {
		for _, m := range at.joined {
			net[m]++
		}
		for _, m := range at.left {
			net[m]--
		}
	}
	if at != old { // the chain was cut since then
		net = map[string]int{}
		for m := range s.set() {
			net[m]++
		}
		for m := range old.set() {
			net[m]--
		}
	}
	for m, n := range net {
		switch {
		case n > 0:
			joined = append(joined, m)
		case n < 0:
			left = append(left, m)
		}
	}
	slices.Sort(joined)
	slices.Sort(left)
	return joined, left
}

// next returns the selector with changes.
func (s *Selector) next(joined, left []string, all func() []string) *Selector {
	n := &Selector{Key: s.Key, Named: s.Named, previous: s, joined: joined, left: left, depth: s.depth + 1, size: s.size + len(joined) - len(left)}
	if n.depth > maxDepth || 2*(len(joined)+len(left)) > n.size {
		*n = Selector{Key: s.Key, Named: s.Named, members: all(), size: n.size}
	}
	isNamed := func(m string) bool { return strings.HasPrefix(m, CIDRPrefix) }
	if slices.ContainsFunc(joined, isNamed) || slices.ContainsFunc(left, isNamed) {
		named := slices.DeleteFunc(slices.Clone(s.Named), func(m string) bool { return slices.Contains(left, m) })
		for _, m := range joined {
			if isNamed(m) {
				named = append(named, m)
			}
		}
		slices.Sort(named)
		n.Named = named
	}
	return n
}

// Policy is a resolved policy with the classes that occur. It is never changed.
type Policy struct {
	Key       string
	Direction policy.Direction
	// Selectors are keys; classes name them by position.
	Selectors []string
	// Classes in rising order of their selectors; the first has none.
	Classes []Class
	Rules   []policy.RuleName
	// Prefixes must be peers on nodes with this policy.
	Prefixes []string
	// Names are peers by DNS name, which are no part of classes.
	Names []policy.Name
	// Filters are those that ranges name, by key.
	Filters []*Filter
}

// Filter is a filter of a policy.
type Filter struct {
	*policy.Filter
	// Namespace of the subject; empty = it has none.
	Namespace string
	// Rules of the policy, which items name by position.
	Rules []policy.RuleName
}

// Items returns the rules of the filter's items, by position.
func (f *Filter) Items() []int {
	var all []int
	for i := range f.HTTP {
		all = append(all, f.HTTP[i].Rule)
	}
	for i := range f.DNS {
		all = append(all, f.DNS[i].Rule)
	}
	for i := range f.TLS {
		all = append(all, f.TLS[i].Rule)
	}
	return all
}

// With returns the policy with the classes of an older version beside its own.
func (p *Policy) With(old *Policy) *Policy {
	all := *p
	all.Classes = nil
	i, j := 0, 0
	for i < len(p.Classes) || j < len(old.Classes) {
		order := -1
		switch {
		case i == len(p.Classes):
			order = 1
		case j < len(old.Classes):
			order = compareClasses(p.Classes[i], old.Classes[j])
		}
		switch {
		case order > 0:
			all.Classes = append(all.Classes, old.Classes[j])
			j++
			continue
		case order == 0:
			j++
		}
		all.Classes = append(all.Classes, p.Classes[i])
		i++
	}
	all.Filters = withFilters(p.Filters, old.Filters)
	return &all
}

// withFilters returns filters with those of an older version beside them, by key.
func withFilters(now, old []*Filter) []*Filter {
	all := now
	for _, f := range old {
		if _, found := slices.BinarySearchFunc(now, f.Key, compareFilter); !found {
			all = append(all[:len(all):len(all)], f)
		}
	}
	slices.SortFunc(all, func(a, b *Filter) int { return cmp.Compare(a.Key, b.Key) })
	return all
}

func compareFilter(f *Filter, key string) int { return cmp.Compare(f.Key, key) }

func compareClasses(a, b Class) int {
	return cmp.Or(cmp.Compare(len(a.Selectors), len(b.Selectors)), slices.Compare(a.Selectors, b.Selectors))
}

// Class decides for the peers that exactly these selectors match.
type Class struct {
	Selectors []int
	Ranges    []policy.Range
}

// CIDRPrefix begins the keys of peers outside of the cluster.
const CIDRPrefix = "cidr:"
