// SPDX-License-Identifier: Apache-2.0

// Package merge orders the records of all nodes by time, within a window.
//
// The order is by record time, but a record counts as no later than its batch's arrival: a node
// whose clock is ahead does not hold back the others, and a node whose clock is behind by more than
// the window is shown as it arrives. Times themselves are never changed. A record waits until every
// node that spoke lately has passed its time, at least for the settle time (records of a node that
// was silent may still be under way) and at most for the window. Arrival is JetStream's time stamp,
// so that two observers that read the same stream choose the same order.
package merge

import (
	"container/heap"
	"sort"
	"time"

	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/sequence"
)

// Config bounds the waiting.
type Config struct {
	// Window is how long a record waits at most.
	Window time.Duration
	// Settle is how long it waits at least.
	Settle time.Duration
	// MaxBytes is how many bytes of batches may wait; beyond it the window is cut short.
	MaxBytes int
}

// Merger orders records. It is not safe for concurrent use.
type Merger struct {
	config  Config
	heap    cursors
	bytes   int
	arrived []*cursor // in the order of arrival; done ones are dropped from the front
	passed  map[string]mark
	cut     uint64
}

// mark is how far a node has come.
type mark struct{ key, arrival int64 }

// cursor stands at the next record of a batch.
type cursor struct {
	source *event.Source
	spans  []sequence.Span
	order  []int32 // indexes by time; nil = as they are
	span   int
	next   int
	key    int64
	done   bool
	serial uint64
}

// New makes a merger.
func New(config Config) *Merger {
	return &Merger{config: config, passed: map[string]mark{}}
}

// Add takes the new records of a batch.
func (m *Merger) Add(source *event.Source, spans []sequence.Span, serial uint64) {
	if len(spans) == 0 {
		return
	}
	c := &cursor{source: source, spans: spans, next: spans[0].From, serial: serial}
	if !source.Ordered() {
		for _, s := range spans {
			for i := s.From; i < s.To; i++ {
				c.order = append(c.order, int32(i))
			}
		}
		sort.SliceStable(c.order, func(a, b int) bool {
			return source.Time(int(c.order[a])) < source.Time(int(c.order[b]))
		})
		c.next = 0
	}
	c.key = c.keyOf()
	heap.Push(&m.heap, c)
	m.arrived = append(m.arrived, c)
	m.bytes += source.Size()
	p := m.passed[source.NodeName]
	p.key = max(p.key, source.MaxTime) // what comes from it later is later, or counts as its arrival
	p.arrival = max(p.arrival, source.Arrival)
	m.passed[source.NodeName] = p
}

func (c *cursor) index() int {
	if c.order != nil {
		return int(c.order[c.next])
	}
	return c.next
}

func (c *cursor) keyOf() int64 { return min(c.source.Time(c.index()), c.source.Arrival) }

// advance steps to the next record; false = there is none.
func (c *cursor) advance() bool {
	c.next++
	if c.order != nil {
		if c.next == len(c.order) {
			return false
		}
	} else if c.next == c.spans[c.span].To {
		c.span++
		if c.span == len(c.spans) {
			return false
		}
		c.next = c.spans[c.span].From
	}
	c.key = c.keyOf()
	return true
}

// Emit hands on, in order, all records whose waiting is over. now is the stream's clock.
func (m *Merger) Emit(now int64, sink func(*event.Source, int)) {
	if len(m.heap) == 0 {
		return
	}
	window, settle := int64(m.config.Window), int64(m.config.Settle)
	threshold := now - settle
	for name, p := range m.passed {
		if p.arrival < now-window {
			delete(m.passed, name) // silent: nobody waits for it
			continue
		}
		threshold = min(threshold, p.key)
	}
	threshold = max(threshold, now-window)
	for len(m.heap) > 0 {
		top := m.heap[0]
		full := m.config.MaxBytes > 0 && m.bytes > m.config.MaxBytes
		settled := top.source.Arrival <= now-settle || m.oldestArrival() <= now-window
		if !full && (top.key > threshold || !settled) {
			return
		}
		if full {
			m.cut++
		}
		m.step(top, sink)
	}
}

// Flush hands on everything.
func (m *Merger) Flush(sink func(*event.Source, int)) {
	for len(m.heap) > 0 {
		m.step(m.heap[0], sink)
	}
}

func (m *Merger) step(top *cursor, sink func(*event.Source, int)) {
	sink(top.source, top.index())
	if top.advance() {
		heap.Fix(&m.heap, 0)
		return
	}
	heap.Pop(&m.heap)
	top.done = true
	m.bytes -= top.source.Size()
}

// oldestArrival returns the arrival of the batch that has waited longest.
func (m *Merger) oldestArrival() int64 {
	for m.arrived[0].done {
		m.arrived[0] = nil
		m.arrived = m.arrived[1:]
	}
	return m.arrived[0].source.Arrival
}

// Waiting reports whether records wait.
func (m *Merger) Waiting() bool { return len(m.heap) > 0 }

// Cut returns how many records were handed on early because too many bytes waited.
func (m *Merger) Cut() uint64 { return m.cut }

// cursors is a heap by key, then arrival in the stream.
type cursors []*cursor

func (h cursors) Len() int { return len(h) }
func (h cursors) Less(i, j int) bool {
	if h[i].key != h[j].key {
		return h[i].key < h[j].key
	}
	return h[i].serial < h[j].serial
}
func (h cursors) Swap(i, j int) { h[i], h[j] = h[j], h[i] }

// Push implements heap.Interface.
func (h *cursors) Push(x any) { *h = append(*h, x.(*cursor)) }

// Pop implements heap.Interface.
func (h *cursors) Pop() any {
	old := *h
	n := len(old)
	c := old[n-1]
	old[n-1] = nil
	*h = old[:n-1]
	return c
}
