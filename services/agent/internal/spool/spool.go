// SPDX-License-Identifier: Apache-2.0

// Package spool keeps sealed batches until a relay has acknowledged them, in bounded memory.
//
// When the bound is reached, the oldest batch that was never sent is dropped, and the loss is told once, in a later batch. A batch that was
// sent even once is never dropped, since it may have arrived; the sender's window bounds how many those are.
package spool

import (
	"context"
	"sync"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/services/agent/internal/batch"
)

type entry struct {
	sealed *batch.Sealed
	// sent: a relay may have it. inFlight: sent on the stream that is open now.
	sent, inFlight bool
}

// Spool is safe for concurrent use.
type Spool struct {
	max int

	mu      sync.Mutex
	entries []*entry // in the order of numbers
	bytes   int
	flying  int
	losses  []*flowv1.Loss
	untold  []*batch.Sealed // dropped batches that would have told of losses
	dropped uint64
	epoch   uint64 // the latest
	acked   uint64 // of that epoch: all numbers up to here are acknowledged or dropped
	wake    chan struct{}
}

// New makes a spool that holds at most maxBytes of encoded batches.
func New(maxBytes int) *Spool { return &Spool{max: maxBytes, wake: make(chan struct{}, 1)} }

// overhead of a batch beside its bytes.
const overhead = 256

// Push adds a batch and drops what no longer fits.
func (s *Spool) Push(sealed *batch.Sealed) { s.push(sealed, false) }

// Resume adds a batch of an earlier agent, which may have been sent.
func (s *Spool) Resume(sealed *batch.Sealed) { s.push(sealed, true) }

func (s *Spool) push(sealed *batch.Sealed, sent bool) {
	s.mu.Lock()
	if sealed.Epoch > s.epoch {
		s.epoch, s.acked = sealed.Epoch, sealed.First-1
	}
	s.entries = append(s.entries, &entry{sealed: sealed, sent: sent})
	s.bytes += len(sealed.Bytes) + overhead
	for s.bytes > s.max && s.dropOldestUnsent() {
	}
	s.mu.Unlock()
	s.signal()
}

func (s *Spool) dropOldestUnsent() bool {
	for i, e := range s.entries {
		if e.sent {
			continue
		}
		s.remove(i)
		s.lost(e.sealed, flowv1.Place_PLACE_SPOOL, flowv1.Cause_CAUSE_FULL)
		return true
	}
	return false
}

// lost tells of a batch's own records, and again of what the batch would have told. Neighbouring ranges are told as one.
func (s *Spool) lost(b *batch.Sealed, place flowv1.Place, cause flowv1.Cause) {
	s.dropped += uint64(b.Count)
	if len(b.Losses) > 0 {
		s.untold = append(s.untold, b)
	}
	for _, l := range s.losses {
		if l.Place == place && l.Cause == cause && l.Epoch == b.Epoch && l.Last+1 == b.First {
			l.Last, l.Count = b.Last(), l.Count+uint64(b.Count)
			l.LastTime = max(l.LastTime, b.MaxTime)
			return
		}
	}
	s.losses = append(s.losses, &flowv1.Loss{
		Place: place, Cause: cause, Count: uint64(b.Count),
		Epoch: b.Epoch, First: b.First, Last: b.Last(), FirstTime: b.MinTime, LastTime: b.MaxTime,
	})
}

// TakeLosses returns what was lost since the last call; the caller must put each into a batch. It also returns dropped batches that would have told
// of losses themselves: those losses are no news, but must be told again.
func (s *Spool) TakeLosses() (news []*flowv1.Loss, untold []*batch.Sealed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	news, untold = s.losses, s.untold
	s.losses, s.untold = nil, nil
	return news, untold
}

// Next waits for a batch that is not on its way, marks it as sent and returns it. It also waits while `window` bytes are on their way.
// The error is ctx's.
func (s *Spool) Next(ctx context.Context, window int) (*batch.Sealed, error) {
	for {
		s.mu.Lock()
		if s.flying < window {
			for _, e := range s.entries {
				if e.inFlight {
					continue
				}
				e.sent, e.inFlight = true, true
				s.flying += len(e.sealed.Bytes)
				s.mu.Unlock()
				return e.sealed, nil
			}
		}
		s.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-s.wake:
		}
	}
}

// Ack forgets a batch. False: no such batch is waiting (it was acknowledged twice).
func (s *Spool) Ack(epoch, first uint64) bool {
	return s.take(epoch, first, func(*batch.Sealed) {})
}

// Refuse forgets a batch that no relay can read, and tells of its loss.
func (s *Spool) Refuse(epoch, first uint64) bool {
	return s.take(epoch, first, func(b *batch.Sealed) { s.lost(b, flowv1.Place_PLACE_AGENT, flowv1.Cause_CAUSE_INVALID) })
}

func (s *Spool) take(epoch, first uint64, then func(*batch.Sealed)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, e := range s.entries {
		if e.sealed.Epoch == epoch && e.sealed.First == first {
			s.remove(i)
			then(e.sealed)
			s.signal()
			return true
		}
	}
	return false
}

func (s *Spool) remove(i int) {
	e := s.entries[i]
	s.bytes -= len(e.sealed.Bytes) + overhead
	if e.inFlight {
		s.flying -= len(e.sealed.Bytes)
	}
	if e.sealed.Epoch == s.epoch {
		s.acked = max(s.acked, e.sealed.Last())
	}
	copy(s.entries[i:], s.entries[i+1:])
	s.entries[len(s.entries)-1] = nil
	s.entries = s.entries[:len(s.entries)-1]
}

// Rewind says that the stream broke: what was on its way must be sent again.
func (s *Spool) Rewind() {
	s.mu.Lock()
	for _, e := range s.entries {
		e.inFlight = false
	}
	s.flying = 0
	s.mu.Unlock()
	s.signal()
}

func (s *Spool) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Stats is what the spool holds.
type Stats struct {
	Batches, Bytes, MaxBytes int
	// Records dropped or refused since the start.
	Dropped uint64
	// FirstWaiting is the lowest number of the latest epoch that is not acknowledged yet: all below it have arrived or are told as lost.
	FirstWaiting uint64
}

// Stats returns what the spool holds now.
func (s *Spool) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Stats{Batches: len(s.entries), Bytes: s.bytes, MaxBytes: s.max, Dropped: s.dropped, FirstWaiting: s.acked + 1}
	for _, e := range s.entries {
		if e.sealed.Epoch == s.epoch {
			st.FirstWaiting = e.sealed.First
			break
		}
	}
	return st
}
