// SPDX-License-Identifier: Apache-2.0

// Package store is the observer's memory: a bounded, ordered list of events that many readers read
// at their own pace.
//
// Events are pointers into batches, which stay as they were encoded. Positions count up from 0 and
// never change; the oldest events go when their batches take more bytes than allowed. A reader is a
// position, so a slow one holds nothing: when it comes back it is told how much it missed.
package store

import (
	"sync"
	"unsafe"

	"github.com/weirmesh/weir/services/observer/internal/event"
)

const chunkLen = 512

// eventSize is what an event takes besides its batch.
const eventSize = int(unsafe.Sizeof(event.Event{}))

// gapSize is what a gap takes.
const gapSize = int(unsafe.Sizeof(event.Gap{})) + eventSize

// Store holds events. One goroutine appends; any number read.
type Store struct {
	maxBytes int

	mu      sync.RWMutex
	chunks  [][]event.Event // chunks[0] holds first
	base    uint64          // position of chunks[0][0]
	first   uint64          // oldest position
	next    uint64          // position of the next event
	bytes   int
	oldest  uint64 // every batch from this place in the stream on is whole in memory
	evicted uint64
	changed chan struct{}
}

// New makes a store of batches of at most maxBytes in all.
func New(maxBytes int) *Store {
	return &Store{maxBytes: maxBytes, changed: make(chan struct{})}
}

// SetStart says where in the stream reading begins, before anything is appended.
func (s *Store) SetStart(streamSeq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.oldest = max(s.oldest, streamSeq)
}

// Append adds events; readers that wait are woken once.
func (s *Store) Append(events []event.Event) {
	if len(events) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range events {
		s.append(e)
	}
	for s.bytes > s.maxBytes && s.first < s.next {
		s.evict()
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *Store) append(e event.Event) {
	if n := len(s.chunks); n == 0 || len(s.chunks[n-1]) == chunkLen {
		s.chunks = append(s.chunks, make([]event.Event, 0, chunkLen))
	}
	last := len(s.chunks) - 1
	s.chunks[last] = append(s.chunks[last], e)
	s.next++
	if e.Gap != nil {
		s.bytes += gapSize
		return
	}
	s.bytes += eventSize
	if e.Source.Live == 0 {
		s.bytes += e.Source.Size()
	}
	e.Source.Live++
}

// evict forgets the oldest event.
func (s *Store) evict() {
	at := s.first - s.base
	slot := &s.chunks[0][at]
	e := *slot
	*slot = event.Event{} // the batch may go before its chunk does
	s.oldest = max(s.oldest, e.StreamSeq()+1)
	s.first++
	s.evicted++
	if e.Gap != nil {
		s.bytes -= gapSize
	} else {
		s.bytes -= eventSize
		e.Source.Live--
		if e.Source.Live == 0 {
			s.bytes -= e.Source.Size()
		}
	}
	if at+1 == chunkLen {
		s.chunks[0] = nil
		s.chunks = s.chunks[1:]
		s.base += chunkLen
	}
}

// Bounds returns the oldest position, and the one that the next event will get.
func (s *Store) Bounds() (first, next uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.first, s.next
}

// Snapshot returns the bounds together with the place in the stream from which on memory is whole.
func (s *Store) Snapshot() (first, next, wholeFrom uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.first, s.next, s.oldest
}

// Read copies events from position at on into dst. It returns how many, and the position of the
// first one, which is later than at when events in between are gone.
func (s *Store) Read(at uint64, dst []event.Event) (n int, from uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	at = max(at, s.first)
	for n < len(dst) && at+uint64(n) < s.next {
		i := at + uint64(n) - s.base
		n += copy(dst[n:], s.chunks[i/chunkLen][i%chunkLen:])
	}
	return n, at
}

// ReadBack copies the events before position end into dst, newest last, and returns how many and
// the position of the first. n is 0 when nothing is left before end.
func (s *Store) ReadBack(end uint64, dst []event.Event) (n int, from uint64) {
	s.mu.RLock()
	first, next := s.first, s.next
	s.mu.RUnlock()
	end = min(end, next)
	if end <= first {
		return 0, end
	}
	from = max(first, end-min(end, uint64(len(dst))))
	n, got := s.Read(from, dst[:end-from])
	if got > from { // evicted meanwhile
		if got >= end {
			return 0, end
		}
		n = int(end - got)
	}
	return n, got
}

// Changed returns a channel that is closed at the next Append. Get it before reading.
func (s *Store) Changed() <-chan struct{} {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.changed
}

// Stats is the size of the store.
type Stats struct {
	Events, Evicted uint64
	Bytes, MaxBytes int
}

// Stats returns the size of the store.
func (s *Store) Stats() Stats {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return Stats{Events: s.next - s.first, Evicted: s.evicted, Bytes: s.bytes, MaxBytes: s.maxBytes}
}

// CountByNode returns how many events of each node are in memory.
func (s *Store) CountByNode() map[string]uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	counts := map[*event.Source]uint64{}
	byNode := map[string]uint64{}
	for at := s.first; at < s.next; {
		chunk := s.chunks[(at-s.base)/chunkLen][(at-s.base)%chunkLen:]
		for _, e := range chunk {
			if e.Source != nil && e.Source.Live > 0 && counts[e.Source] == 0 {
				counts[e.Source] = 1
				byNode[e.Source.NodeName] += uint64(e.Source.Live)
			}
		}
		at += uint64(len(chunk))
	}
	return byNode
}
