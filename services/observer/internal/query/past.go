// SPDX-License-Identifier: Apache-2.0

package query

import (
	"math"
	"time"

	"github.com/weirmesh/weir/services/observer/internal/event"
)

// needsPast reports whether events at `since` or later may be older than memory. What memory forgot
// arrived before its oldest event, or within the order window of it, and no event is later than its
// arrival unless its node's clock is ahead by more than the slack.
func (r *run) needsPast() bool {
	if r.engine.past == nil {
		return false
	}
	first, next, wholeFrom := r.engine.store.Snapshot()
	if wholeFrom <= 1 {
		return false // nothing was ever forgotten
	}
	if first == next {
		return true
	}
	buf := make([]event.Event, 1)
	if n, _ := r.engine.store.Read(first, buf); n == 0 || buf[0].Source == nil {
		return true
	}
	return buf[0].Source.Arrival > *r.sel.Since-int64(slack)
}

// readPast tells what is older than memory, and returns where in memory to go on. While it reads,
// memory forgets more; what it forgot is read as well, until nothing is between.
func (r *run) readPast() (uint64, error) {
	if !r.needsPast() {
		first, _ := r.engine.store.Bounds()
		return first, nil
	}
	reader, err := r.open()
	if err != nil {
		return 0, err
	}
	defer reader.Close()
	sink := &pastSink{run: r}
	for {
		_, _, wholeFrom := r.engine.store.Snapshot()
		if err := reader.Read(r.ctx, wholeFrom, sink); err != nil {
			return 0, err
		}
		if first, _, now := r.engine.store.Snapshot(); now == wholeFrom {
			r.wholeFrom, r.seen, r.source = wholeFrom, reader, nil
			return first, nil
		}
	}
}

func (r *run) open() (PastReader, error) {
	return r.engine.past.Open(r.ctx, time.Unix(0, *r.sel.Since).Add(-slack))
}

// newest makes Number select the newest events since a time.
func (r *run) newest(next uint64) (uint64, error) {
	start, found := r.rewind(next, r.sel.Number)
	if found >= r.sel.Number || !r.needsPast() {
		return start, nil
	}
	// Two passes over the past, so that nothing is held: first count, then tell the last ones.
	counter := &pastSink{run: r, count: new(uint64)}
	_, _, wholeFrom := r.engine.store.Snapshot()
	reader, err := r.open()
	if err != nil {
		return 0, err
	}
	err = reader.Read(r.ctx, wholeFrom, counter)
	reader.Close()
	if err != nil {
		return 0, err
	}
	r.wholeFrom, r.seen = wholeFrom, reader
	inMemory := r.countFrom(next)
	r.wholeFrom, r.seen = 0, nil
	if total := *counter.count + inMemory; total > r.sel.Number {
		r.skip = total - r.sel.Number
	}
	return r.readPast()
}

// countFrom counts what matches in memory and is not told from the past.
func (r *run) countFrom(end uint64) uint64 {
	buf := make([]event.Event, readLen)
	var count uint64
	at, _ := r.engine.store.Bounds()
	for at < end && r.ctx.Err() == nil {
		n, from := r.engine.store.Read(at, buf)
		if n == 0 {
			break
		}
		for _, e := range buf[:min(uint64(n), end-min(from, end))] {
			if e.Gap == nil && e.StreamSeq() >= r.wholeFrom && r.matches(e.Source, int(e.Index)) {
				count++
			}
		}
		at = from + uint64(n)
	}
	r.source = nil
	return count
}

// pastSink takes the events of the past, or only counts them.
type pastSink struct {
	run   *run
	count *uint64
}

// Record implements PastSink.
func (s *pastSink) Record(source *event.Source, i int) error {
	if s.count == nil {
		return s.run.record(source, i)
	}
	if s.run.matches(source, i) && *s.count < math.MaxUint64 {
		*s.count++
	}
	return nil
}

// Gap implements PastSink.
func (s *pastSink) Gap(gap *event.Gap) error {
	if s.count != nil {
		return nil
	}
	return s.run.sink.Gap(gap)
}
