// SPDX-License-Identifier: Apache-2.0

// Package sequence keeps, for each node and epoch, which record numbers have come. It says which
// records of a batch are new, when a hole in the numbers has become a gap, and when a gap is void
// because its records came after all.
//
// It is pure: time comes in as a parameter (the stream's clock), so that two observers that read the
// same stream decide the same. What a gap counts is counted once: a told range leaves its state
// only by being withdrawn.
package sequence

import (
	"slices"
	"time"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/services/observer/internal/event"
)

// Bounds of the state of one node.
const (
	// maxEpochs is how many epochs of a node are remembered; batches of older ones are stale.
	maxEpochs = 16
	// maxMissing is how many missing ranges of an epoch are remembered. The oldest told one is then
	// forgotten: should it come after all, it stays counted as lost.
	maxMissing = 4096
	// maxRange is the longest range that a Loss may name; more is a fault of the sender.
	maxRange = 1 << 40
)

// Tracker follows the numbers of all nodes. It is not safe for concurrent use.
type Tracker struct {
	patience  time.Duration
	fromStart bool
	nodes     map[string]*node
	out       []event.Gap
}

type node struct {
	epochs  []*epoch // by number
	skipped bool     // storage dropped messages since this node's last batch
}

// New makes a tracker. A hole becomes a gap after patience. fromStart says that reading begins with
// the first message that the stream ever had, so that numbers before the first one seen are missing
// and not merely out of view.
func New(patience time.Duration, fromStart bool) *Tracker {
	return &Tracker{patience: patience, fromStart: fromStart, nodes: map[string]*node{}}
}

// Skipped says that the stream has dropped messages that were not read: holes found next in any
// node's numbers are the storage's.
func (t *Tracker) Skipped() {
	for _, n := range t.nodes {
		n.skipped = true
	}
}

// Add notes a batch. It returns the records that are new, as spans of indexes, and the gaps that
// this tells or withdraws. now is the stream's clock.
func (t *Tracker) Add(h *batch.Header, now int64) ([]Span, []event.Gap) {
	t.out = nil
	name := event.NodeName(h.Cluster, h.Node)
	n := t.node(name)
	e := n.find(h.Epoch)
	if e == nil {
		if e = t.open(n, h); e == nil {
			return nil, nil // stale
		}
	}
	lost := n.skipped
	n.skipped = false
	fresh, filled := e.add(h.First, h.Last(), h.MinTime, h.MaxTime, now, lost)
	t.withdraw(name, e, filled)
	if lost {
		t.tell(name, e, e.due(now-int64(t.patience)))
	}
	e.bound()
	spans := make([]Span, 0, len(fresh))
	for _, f := range fresh {
		spans = append(spans, Span{int(f.First - h.First), int(f.Last-h.First) + 1})
	}
	slices.SortFunc(spans, func(a, b Span) int { return a.From - b.From })
	return spans, t.out
}

// Loss notes what a node's agent told of lost records.
func (t *Tracker) Loss(h *batch.Header, l *flowv1.Loss, recordTime, now int64) []event.Gap {
	t.out = nil
	name := event.NodeName(h.Cluster, h.Node)
	firstTime, lastTime := l.GetFirstTime(), l.GetLastTime()
	if firstTime == 0 {
		firstTime = recordTime
	}
	if lastTime == 0 {
		lastTime = recordTime
	}
	place, cause := l.GetPlace(), l.GetCause()
	if place == flowv1.Place_PLACE_UNSPECIFIED {
		place = flowv1.Place_PLACE_AGENT
	}
	if l.GetFirst() == 0 || l.GetLast() < l.GetFirst() || l.GetLast()-l.GetFirst() >= maxRange {
		if l.GetCount() == 0 {
			return nil
		}
		cpu := int32(-1)
		if l.Cpu != nil {
			cpu = int32(l.GetCpu())
		}
		return []event.Gap{{
			NodeName: name, Place: place, Cause: cause, CPU: cpu, Count: l.GetCount(), FirstTime: firstTime, LastTime: lastTime,
		}}
	}
	number := l.GetEpoch()
	if number == 0 {
		number = h.Epoch
	}
	n := t.node(name)
	e := n.find(number)
	first := l.GetFirst()
	if e == nil {
		// Nothing of that epoch came. When our view begins later than the stream did, most of it may
		// have come before: only what the agent itself missed can be counted.
		if !t.fromStart && first == 1 && l.GetCount() > 0 {
			first = l.GetLast() - min(l.GetCount(), l.GetLast()) + 1
		}
		e = n.insert(&epoch{number: number, base: first, high: first - 1})
		if e == nil {
			return nil
		}
	}
	t.tell(name, e, e.explain(first, l.GetLast(), place, cause, firstTime, lastTime, now))
	e.bound()
	return t.out
}

// Damaged notes a batch whose header is readable and whose records are not.
func (t *Tracker) Damaged(h *batch.Header, now int64) []event.Gap {
	t.out = nil
	name := event.NodeName(h.Cluster, h.Node)
	n := t.node(name)
	e := n.find(h.Epoch)
	if e == nil {
		if e = t.open(n, h); e == nil {
			return nil
		}
	}
	t.tell(name, e, e.explain(h.First, h.Last(), flowv1.Place_PLACE_NATS, flowv1.Cause_CAUSE_INVALID, h.MinTime, h.MaxTime, now))
	e.bound()
	return t.out
}

// Due tells the holes whose patience has ended.
func (t *Tracker) Due(now int64) []event.Gap {
	t.out = nil
	for name, n := range t.nodes {
		for _, e := range n.epochs {
			if len(e.missing) > 0 {
				t.tell(name, e, e.due(now-int64(t.patience)))
			}
		}
	}
	slices.SortFunc(t.out, func(a, b event.Gap) int {
		switch {
		case a.FirstTime != b.FirstTime:
			return int(min(max(a.FirstTime-b.FirstTime, -1), 1))
		case a.NodeName != b.NodeName:
			if a.NodeName < b.NodeName {
				return -1
			}
			return 1
		}
		return 0
	})
	return t.out
}

// Position returns the newest epoch of a node and the highest number that came in it.
func (t *Tracker) Position(name string) (epoch, last uint64) {
	n := t.nodes[name]
	if n == nil || len(n.epochs) == 0 {
		return 0, 0
	}
	e := n.epochs[len(n.epochs)-1]
	return e.number, e.high
}

// Seen reports whether a record has come.
func (t *Tracker) Seen(name string, epochNumber, number uint64) bool {
	n := t.nodes[name]
	if n == nil {
		return false
	}
	e := n.find(epochNumber)
	if e == nil || number > e.high {
		return false
	}
	if number < e.base {
		return slices.ContainsFunc(e.below, func(s Span64) bool { return s.First <= number && number <= s.Last })
	}
	return !slices.ContainsFunc(e.missing, func(m missing) bool { return m.first <= number && number <= m.last })
}

func (t *Tracker) node(name string) *node {
	n := t.nodes[name]
	if n == nil {
		n = &node{}
		t.nodes[name] = n
	}
	return n
}

// open begins an epoch with a batch. Nil = it is older than all that are remembered.
func (t *Tracker) open(n *node, h *batch.Header) *epoch {
	base := h.First
	newest := len(n.epochs) == 0 || h.Epoch > n.epochs[len(n.epochs)-1].number
	if newest && (len(n.epochs) > 0 || t.fromStart) {
		base = 1 // we saw the epoch before it, or the whole stream: numbers begin at 1
	}
	return n.insert(&epoch{number: h.Epoch, base: base, high: base - 1, highTime: h.MinTime})
}

func (n *node) find(number uint64) *epoch {
	for i := len(n.epochs) - 1; i >= 0; i-- {
		if n.epochs[i].number == number {
			return n.epochs[i]
		}
	}
	return nil
}

// insert adds an epoch and forgets the oldest one beyond the bound; nil when that is this one.
func (n *node) insert(e *epoch) *epoch {
	i := 0
	for i < len(n.epochs) && n.epochs[i].number < e.number {
		i++
	}
	if i == 0 && len(n.epochs) >= maxEpochs {
		return nil
	}
	n.epochs = slices.Insert(n.epochs, i, e)
	if len(n.epochs) > maxEpochs {
		n.epochs = slices.Delete(n.epochs, 0, 1)
	}
	return e
}

// bound forgets told ranges beyond the bound, oldest first.
func (e *epoch) bound() {
	if len(e.missing) <= maxMissing {
		return
	}
	over := len(e.missing) - maxMissing
	e.missing = slices.DeleteFunc(e.missing, func(m missing) bool {
		if over > 0 && m.told() {
			over--
			return true
		}
		return false
	})
}

func (t *Tracker) tell(name string, e *epoch, ranges []missing) {
	for _, m := range ranges {
		t.out = append(t.out, gapOf(name, e, m))
	}
}

// withdraw makes told ranges void that were filled, and tells what is left of them anew.
func (t *Tracker) withdraw(name string, e *epoch, filled []missing) {
	for _, f := range filled {
		g := gapOf(name, e, f)
		g.Withdrawn = true
		t.out = append(t.out, g)
		for _, m := range e.missing {
			if m.told() && m.first >= f.first && m.last <= f.last {
				t.out = append(t.out, gapOf(name, e, m))
			}
		}
	}
}

func gapOf(name string, e *epoch, m missing) event.Gap {
	return event.Gap{
		NodeName: name, Place: m.place, Cause: m.cause, CPU: -1,
		Epoch: e.number, First: m.first, Last: m.last, Count: m.count(),
		FirstTime: m.firstTime, LastTime: m.lastTime,
	}
}
