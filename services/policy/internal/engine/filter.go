// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"maps"
	"slices"

	"github.com/weirmesh/weir/internal/policy"
)

// rejuvenate makes a resolution the youngest: what its filters say counts from now on.
func (e *Engine) rejuvenate(r *resolution) {
	e.age++
	r.age = e.age
	if r.out != nil {
		for _, f := range r.out.Filters {
			e.changed.filters[f.Key] = struct{}{}
		}
	}
}

// filters returns the filters that a policy's ranges name, by key.
func (r *resolution) filters(p *Policy) []*Filter {
	found := map[string]*policy.Filter{}
	add := func(ranges []policy.Range) {
		for i := range ranges {
			if f := ranges[i].Filter; f != nil {
				found[f.Key] = f
			}
		}
	}
	for _, c := range p.Classes {
		add(c.Ranges)
	}
	for _, n := range p.Names {
		add(n.Ranges)
	}
	var all []*Filter
	for _, key := range slices.Sorted(maps.Keys(found)) {
		if r.out != nil {
			if i, had := slices.BinarySearchFunc(r.out.Filters, key, compareFilter); had {
				all = append(all, r.out.Filters[i]) // the same rules make the same of it
				continue
			}
		}
		all = append(all, &Filter{Filter: found[key], Namespace: r.namespace, Rules: p.Rules})
	}
	return all
}

// useFilters says which filters a resolution has.
func (e *Engine) useFilters(r *resolution, now []*Filter) {
	for _, f := range r.used {
		if _, still := slices.BinarySearchFunc(now, f.Key, compareFilter); still {
			continue
		}
		e.changed.filters[f.Key] = struct{}{}
		if delete(e.filters[f.Key], r); len(e.filters[f.Key]) == 0 {
			delete(e.filters, f.Key)
		}
	}
	for _, f := range now {
		e.changed.filters[f.Key] = struct{}{}
		if e.filters[f.Key] == nil {
			e.filters[f.Key] = map[*resolution]*Filter{}
		}
		e.filters[f.Key][r] = f
	}
	r.used = now
}

// publishFilters computes the filters that changed; it reports whether any did.
func (e *Engine) publishFilters(v *View) bool {
	if len(e.changed.filters) == 0 {
		return false
	}
	v.Filters = maps.Clone(v.Filters)
	for key := range e.changed.filters {
		users := e.filters[key]
		if len(users) == 0 {
			delete(v.Filters, key)
			continue
		}
		youngest := slices.MaxFunc(slices.Collect(maps.Keys(users)), func(a, b *resolution) int { return cmp.Compare(a.age, b.age) })
		v.Filters[key] = users[youngest]
	}
	return true
}
