// SPDX-License-Identifier: Apache-2.0

package sequence

import (
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
)

// missing is a range of numbers that has not come.
type missing struct {
	first, last uint64
	// opened is when a later number came first.
	opened int64
	// firstTime and lastTime are the times of the records around it.
	firstTime, lastTime int64
	// place and cause are set once the range was told as a gap.
	place flowv1.Place
	cause flowv1.Cause
	// lost says that storage dropped messages just before the hole was found: it can not be filled.
	lost bool
}

func (m *missing) told() bool { return m.place != flowv1.Place_PLACE_UNSPECIFIED }

func (m *missing) count() uint64 { return m.last - m.first + 1 }

// Span is a run of indexes of a batch: from <= i < to.
type Span struct{ From, To int }

// epoch is what is known of one epoch's numbers: all of [base, high] came, except missing; of the
// numbers below base only those in below.
type epoch struct {
	number     uint64
	base, high uint64
	highTime   int64
	missing    []missing // sorted, disjoint
	below      []Span64  // sorted, disjoint
}

// Span64 is a range of numbers, both ends included.
type Span64 struct{ First, Last uint64 }

// add notes the numbers [first, last] and returns which of them are new, and the told ranges that
// they fill, wholly or in part.
func (e *epoch) add(first, last uint64, minTime, maxTime, now int64, lost bool) (fresh []Span64, filled []missing) {
	// Below the base: before our view begins.
	if first < e.base {
		upTo := min(last, e.base-1)
		fresh = append(fresh, e.addBelow(first, upTo)...)
		if last < e.base {
			return fresh, nil
		}
		first = e.base
	}
	// Inside: only what is missing is new.
	if first <= e.high {
		upTo := min(last, e.high)
		var kept []missing
		for _, m := range e.missing {
			if m.last < first || m.first > upTo {
				kept = append(kept, m)
				continue
			}
			from, to := max(m.first, first), min(m.last, upTo)
			fresh = append(fresh, Span64{from, to})
			if m.told() {
				filled = append(filled, m)
			}
			if m.first < from {
				rest := m
				rest.last = from - 1
				kept = append(kept, rest)
			}
			if m.last > to {
				rest := m
				rest.first = to + 1
				kept = append(kept, rest)
			}
		}
		e.missing = kept
	}
	// Beyond: a hole up to it, if it does not follow.
	if last > e.high {
		from := max(first, e.high+1)
		if from > e.high+1 {
			e.missing = append(e.missing, missing{
				first: e.high + 1, last: from - 1, opened: now, firstTime: e.highTime, lastTime: minTime, lost: lost,
			})
		}
		fresh = append(fresh, Span64{from, last})
		e.high, e.highTime = last, max(maxTime, e.highTime)
	}
	return fresh, filled
}

func (e *epoch) addBelow(first, last uint64) (fresh []Span64) {
	at := first
	for _, s := range e.below {
		if s.Last < at || s.First > last {
			continue
		}
		if s.First > at {
			fresh = append(fresh, Span64{at, s.First - 1})
		}
		at = s.Last + 1
	}
	if at <= last {
		fresh = append(fresh, Span64{at, last})
	}
	for _, f := range fresh {
		e.below = insert(e.below, f)
	}
	if len(e.below) > maxMissing { // nothing like it is expected: keep what is newest
		e.below = e.below[len(e.below)-maxMissing:]
	}
	return fresh
}

// insert adds a span that overlaps none, joined with its neighbours.
func insert(spans []Span64, s Span64) []Span64 {
	i := 0
	for i < len(spans) && spans[i].Last < s.First {
		i++
	}
	spans = append(spans, Span64{})
	copy(spans[i+1:], spans[i:])
	spans[i] = s
	joined := spans[:0]
	for _, x := range spans {
		if n := len(joined); n > 0 && joined[n-1].Last+1 == x.First {
			joined[n-1].Last = x.Last
		} else {
			joined = append(joined, x)
		}
	}
	return joined
}

// explain tells what is missing in [first, last] as lost at a place for a cause: it extends the
// epoch to last, and returns the ranges that were not told before.
func (e *epoch) explain(first, last uint64, place flowv1.Place, cause flowv1.Cause, firstTime, lastTime, now int64) (told []missing) {
	if last > e.high {
		e.missing = append(e.missing, missing{first: e.high + 1, last: last, opened: now, firstTime: firstTime, lastTime: lastTime})
		e.high, e.highTime = last, max(e.highTime, lastTime)
	}
	var all []missing
	for _, m := range e.missing {
		if m.told() || m.last < first || m.first > last {
			all = append(all, m)
			continue
		}
		if m.first < first {
			rest := m
			rest.last = first - 1
			all = append(all, rest)
		}
		part := m
		part.first, part.last, part.place, part.cause = max(m.first, first), min(m.last, last), place, cause
		if firstTime != 0 {
			part.firstTime = firstTime
		}
		if lastTime != 0 {
			part.lastTime = lastTime
		}
		all = append(all, part)
		told = append(told, part)
		if m.last > last {
			rest := m
			rest.first = last + 1
			all = append(all, rest)
		}
	}
	e.missing = all
	return told
}

// due tells the holes that have been open for long enough.
func (e *epoch) due(before int64) (told []missing) {
	for i := range e.missing {
		m := &e.missing[i]
		if m.told() || m.opened > before && !m.lost {
			continue
		}
		m.place, m.cause = flowv1.Place_PLACE_RELAY, flowv1.Cause_CAUSE_MISSING
		if m.lost {
			m.place, m.cause = flowv1.Place_PLACE_NATS, flowv1.Cause_CAUSE_EXPIRED
		}
		told = append(told, *m)
	}
	return told
}
