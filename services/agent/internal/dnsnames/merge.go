// SPDX-License-Identifier: Apache-2.0

package dnsnames

import (
	"cmp"
	"math"
	"slices"

	"github.com/weirmesh/weir/internal/policy"
)

// Range is allowed: plainly, or through a slot.
type Range struct {
	// Proto is the IP protocol number; 0 = any protocol that no other range names, and then all ports.
	Proto       uint8
	First, Last uint16
	Rule        uint32
	Slot        uint16 // 0 = plainly
	// Visibility: the slot is only there to see.
	Visibility bool
}

// rank orders what one port may have; the lowest wins. Whatever lets everything pass beats a filter; to be seen beats not to be seen.
func (r Range) rank() int {
	switch {
	case r.Slot != 0 && r.Visibility:
		return 0
	case r.Slot == 0:
		return 1
	}
	return filtered
}

// filtered is the rank of ranges whose filter decides.
const filtered = 2

// claim is a range and the selector that it comes from.
type claim struct {
	Range
	by policy.NameSelector
}

func better(a, b claim) int {
	if c := cmp.Compare(a.rank(), b.rank()); c != 0 {
		return c
	}
	if a.rank() == filtered {
		if c := narrower(a.by, b.by); c != 0 {
			return c
		}
	}
	return cmp.Or(cmp.Compare(a.Slot, b.Slot), cmp.Compare(a.Rule, b.Rule))
}

// narrower orders selectors: names before patterns, longer patterns first.
func narrower(a, b policy.NameSelector) int {
	isPattern := func(s policy.NameSelector) int {
		if s.MatchName != "" {
			return 0
		}
		return 1
	}
	return cmp.Or(cmp.Compare(isPattern(a), isPattern(b)), cmp.Compare(len(b.MatchPattern), len(a.MatchPattern)))
}

// merge joins what several selectors of a policy allow. Where filters contend for a port, the narrowest selector's wins: by the policy's making it has
// what wider ones say as well. conflicts counts stretches of ports where that is not sure, between patterns.
func merge(selectors ...Selector) (merged []Range, conflicts int) {
	byProto := map[uint8][]claim{}
	for _, s := range selectors {
		for _, r := range s.Ranges {
			if r.Proto == 0 {
				r.First, r.Last = 0, math.MaxUint16
			}
			byProto[r.Proto] = append(byProto[r.Proto], claim{r, s.NameSelector})
		}
	}
	for proto, ranges := range byProto {
		if proto != 0 {
			for _, r := range byProto[0] {
				r.Proto = proto
				ranges = append(ranges, r)
			}
		}
		m, c := mergePorts(ranges)
		merged, conflicts = append(merged, m...), conflicts+c
	}
	slices.SortFunc(merged, func(a, b Range) int { return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.First, b.First)) })
	return merged, conflicts
}

// mergePorts joins ranges of one protocol.
func mergePorts(ranges []claim) (merged []Range, conflicts int) {
	starts := make([]int, 0, 2*len(ranges))
	for _, r := range ranges {
		starts = append(starts, int(r.First), int(r.Last)+1)
	}
	slices.Sort(starts)
	starts = slices.Compact(starts)
	for i, start := range starts {
		if i+1 == len(starts) {
			break
		}
		var best claim
		slots, found := map[uint16]struct{}{}, false
		for _, r := range ranges {
			if start < int(r.First) || start > int(r.Last) {
				continue
			}
			if r.rank() == filtered {
				slots[r.Slot] = struct{}{}
			}
			if !found || better(r, best) < 0 {
				best, found = r, true
			}
		}
		if !found {
			continue
		}
		if best.rank() == filtered && len(slots) > 1 && best.by.MatchName == "" {
			conflicts++
		}
		best.First, best.Last = uint16(start), uint16(starts[i+1]-1)
		if n := len(merged); n > 0 && joins(merged[n-1], best.Range) {
			merged[n-1].Last = best.Last
			continue
		}
		merged = append(merged, best.Range)
	}
	return merged, conflicts
}

func joins(a, b Range) bool {
	return int(a.Last)+1 == int(b.First) && a.Rule == b.Rule && a.Slot == b.Slot && a.Visibility == b.Visibility
}

// find returns the range for a port.
func find(ranges []Range, proto uint8, port uint16) (Range, bool) {
	named := false
	for _, r := range ranges {
		if r.Proto != proto {
			continue
		}
		named = true
		if r.First <= port && port <= r.Last {
			return r, true
		}
	}
	if !named && len(ranges) > 0 && ranges[0].Proto == 0 {
		return ranges[0], true
	}
	return Range{}, false
}
