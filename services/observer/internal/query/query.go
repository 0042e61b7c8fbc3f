// SPDX-License-Identifier: Apache-2.0

// Package query selects events for one request: which part of memory and history, how many, from
// which end, and whether to go on with what is new. The rules are those of Hubble's API.
package query

import (
	"context"
	"errors"
	"math"
	"time"

	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/store"
)

// Selection is the part of a request that does not look into flows.
type Selection struct {
	// Number is how many events; 0 = no limit, MaxUint64 = everything.
	Number uint64
	// First counts Number from the oldest event instead of the newest.
	First bool
	// Follow goes on with new events until the request is cancelled.
	Follow bool
	// Since and Until bound the events' times, both included; nil = unbounded. Unix nanoseconds.
	Since, Until *int64
	// Newest makes Since with Number select the newest events instead of the oldest.
	Newest bool
}

// ErrFirstFollow says that a selection contradicts itself.
var ErrFirstFollow = errors.New("first cannot be specified with follow")

// Validate checks the selection.
func (s *Selection) Validate() error {
	if s.First && s.Follow {
		return ErrFirstFollow
	}
	return nil
}

// Filter decides on events.
type Filter interface {
	// MayMatch rules out whole batches.
	MayMatch(h *batch.Header) bool
	// Match decides on a record.
	Match(source *event.Source, i int) bool
}

// Sink receives the answer, in order.
type Sink interface {
	// Start comes first, once it is settled what is new to a request that follows.
	Start() error
	// Event takes a record that was selected.
	Event(source *event.Source, i int) error
	// Gap takes a gap in what was looked at.
	Gap(gap *event.Gap) error
	// Lost says that this reader was too slow for so many events, between two times.
	Lost(count uint64, first, last time.Time) error
}

// Past opens what is older than memory.
type Past interface {
	// Open begins to read the messages stored at a time or later. It may wait for its turn.
	Open(ctx context.Context, from time.Time) (PastReader, error)
}

// PastReader reads the past, bit by bit.
type PastReader interface {
	// Read calls sink for the events of the messages that follow, up to a place in the stream.
	Read(ctx context.Context, end uint64, sink PastSink) error
	// Seen reports whether a record was read.
	Seen(nodeName string, epoch, number uint64) bool
	// Close ends the reading; Seen stays.
	Close()
}

// PastSink receives what Past reads.
type PastSink interface {
	Record(source *event.Source, i int) error
	Gap(gap *event.Gap) error
}

// Engine answers requests from a store, and the past.
type Engine struct {
	store *store.Store
	past  Past
	now   func() time.Time
}

// New makes an engine; past may be nil.
func New(s *store.Store, past Past, now func() time.Time) *Engine {
	return &Engine{store: s, past: past, now: now}
}

const (
	// readLen is how many events a reader takes from the store at a time.
	readLen = 128
	// slack is how much clocks and the order of arrival may differ: history is looked at from this
	// much before `since`.
	slack = 10 * time.Second
	// lostInterval is how often a slow reader is told.
	lostInterval = time.Second
)

// errDone ends a run early, without an error.
var errDone = errors.New("done")

// run is one request under way.
type run struct {
	engine *Engine
	ctx    context.Context
	sel    Selection
	kind   batch.Kind
	filter Filter
	sink   Sink

	limit uint64 // of matching events
	count uint64
	skip  uint64 // matching events to pass over first

	wholeFrom uint64 // memory's events before this place in the stream are told from the past
	seen      PastReader

	source *event.Source // last batch asked about
	may    bool

	lost      uint64
	lostFirst time.Time
	lostTold  time.Time
}

// Run answers a request for events of a kind. It returns nil at its end, or when ctx ends.
func (e *Engine) Run(ctx context.Context, sel Selection, kind batch.Kind, filter Filter, sink Sink) error {
	if err := sel.Validate(); err != nil {
		return err
	}
	r := &run{engine: e, ctx: ctx, sel: sel, kind: kind, filter: filter, sink: sink, limit: math.MaxUint64}
	err := r.run()
	if errors.Is(err, errDone) {
		err = nil
	}
	if err == nil {
		err = r.tellLost(true)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func (r *run) run() error {
	first, next := r.engine.store.Bounds()
	if err := r.sink.Start(); err != nil {
		return err
	}
	end := next
	if r.sel.Follow {
		end = math.MaxUint64
	}
	all := r.sel.Number == 0 || r.sel.Number == math.MaxUint64
	start := first
	var err error
	switch {
	case r.sel.Since != nil && r.sel.Newest && !all && !r.sel.First && !r.sel.Follow:
		start, err = r.newest(next)
	case r.sel.Since != nil:
		if !all && !r.sel.Follow {
			r.limit = r.sel.Number
		}
		start, err = r.readPast()
	case r.sel.First:
		if !all {
			r.limit = r.sel.Number
		}
	case r.sel.Number == 0 && r.sel.Follow:
		start = next
	case !all:
		start, _ = r.rewind(next, r.sel.Number)
	}
	if err != nil {
		return err
	}
	if !r.sel.Follow && r.seen != nil {
		_, end = r.engine.store.Bounds() // the past took a while
	}
	return r.forward(start, end)
}

// forward tells the events of memory from a position on.
func (r *run) forward(at, end uint64) error {
	buf := make([]event.Event, readLen)
	for at < end {
		changed := r.engine.store.Changed()
		n, from := r.engine.store.Read(at, buf[:min(readLen, end-at)])
		if from > at {
			r.noteLost(min(from, end) - at)
			at = from
		}
		if err := r.tellLost(false); err != nil {
			return err
		}
		if n == 0 {
			if at >= end {
				return nil
			}
			if err := r.wait(changed); err != nil {
				return err
			}
			continue
		}
		n = int(min(uint64(n), end-at))
		for _, e := range buf[:n] {
			if err := r.memory(e); err != nil {
				return err
			}
		}
		clear(buf[:n]) // a reader that waits holds no batches
		at += uint64(n)
	}
	return nil
}

// wait returns when the store has changed, or a slow reader must be told of its loss.
func (r *run) wait(changed <-chan struct{}) error {
	var due <-chan time.Time
	if r.lost > 0 {
		timer := time.NewTimer(lostInterval - r.engine.now().Sub(r.lostTold))
		defer timer.Stop()
		due = timer.C
	}
	select {
	case <-changed:
		return nil
	case <-due:
		return nil
	case <-r.ctx.Done():
		return r.ctx.Err()
	}
}

// memory takes an event of the store.
func (r *run) memory(e event.Event) error {
	if r.wholeFrom > 0 && e.StreamSeq() < r.wholeFrom {
		return nil // told from the past
	}
	if e.Gap != nil {
		return r.sink.Gap(e.Gap)
	}
	return r.record(e.Source, int(e.Index))
}

// record decides on a record and tells it.
func (r *run) record(source *event.Source, i int) error {
	if !r.matches(source, i) {
		if r.sel.Follow && r.sel.Until != nil && source.Time(i) > *r.sel.Until {
			return errDone
		}
		return nil
	}
	if r.skip > 0 {
		r.skip--
		return nil
	}
	if err := r.sink.Event(source, i); err != nil {
		return err
	}
	r.count++
	if r.count >= r.limit {
		return errDone
	}
	return nil
}

func (r *run) matches(source *event.Source, i int) bool {
	if source.Kind(i) != r.kind {
		return false
	}
	if source != r.source {
		r.source, r.may = source, r.mayMatch(source)
	}
	if !r.may {
		return false
	}
	t := source.Time(i)
	if r.sel.Since != nil && t < *r.sel.Since || r.sel.Until != nil && t > *r.sel.Until {
		return false
	}
	return r.filter.Match(source, i)
}

func (r *run) mayMatch(source *event.Source) bool {
	if r.sel.Since != nil && source.MaxTime < *r.sel.Since || r.sel.Until != nil && source.MinTime > *r.sel.Until {
		return false
	}
	if r.seen != nil && r.seen.Seen(source.NodeName, source.Epoch, source.First) {
		return false // a second copy of a batch that the past had
	}
	return r.filter.MayMatch(&source.Header)
}

// rewind returns the position of the n-th newest event that matches, or of the oldest event, and how
// many match from there on. Hubble's rule: `until` plays no part in the counting.
func (r *run) rewind(end uint64, n uint64) (uint64, uint64) {
	until := r.sel.Until
	if r.sel.Since == nil {
		r.sel.Until = nil
	}
	defer func() { r.sel.Until, r.source = until, nil }()
	buf := make([]event.Event, readLen)
	var found uint64
	for found < n && r.ctx.Err() == nil {
		got, from := r.engine.store.ReadBack(end, buf)
		if got == 0 {
			break
		}
		for i := got - 1; i >= 0; i-- {
			e := buf[i]
			if e.Gap == nil && r.matches(e.Source, int(e.Index)) {
				found++
				if found == n {
					return from + uint64(i), found
				}
			}
		}
		end = from
	}
	return end, found
}

func (r *run) noteLost(n uint64) {
	if r.lost == 0 {
		r.lostFirst = r.engine.now()
	}
	r.lost += n
}

// tellLost tells the reader, at most once a second, that it was too slow.
func (r *run) tellLost(last bool) error {
	now := r.engine.now()
	if r.lost == 0 || !last && now.Sub(r.lostTold) < lostInterval {
		return nil
	}
	n := r.lost
	r.lost, r.lostTold = 0, now
	return r.sink.Lost(n, r.lostFirst, now)
}
