// SPDX-License-Identifier: Apache-2.0

package spool_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/services/agent/internal/batch"
	"github.com/weirmesh/weir/services/agent/internal/spool"
)

const size = 10000

// sealed is a batch of ten records that takes a little more than size bytes.
func sealed(first uint64, losses ...*flowv1.Loss) *batch.Sealed {
	return &batch.Sealed{Epoch: 3, First: first, Count: 10, MinTime: int64(first), MaxTime: int64(first) + 9, Bytes: make([]byte, size), Losses: losses}
}

func next(t *testing.T, s *spool.Spool) uint64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	b, err := s.Next(ctx, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	return b.First
}

// none checks that nothing is to be sent now.
func none(t *testing.T, s *spool.Spool, window int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if b, err := s.Next(ctx, window); !errors.Is(err, context.Canceled) {
		t.Fatalf("got batch %v, %v; want none", b, err)
	}
}

func TestOrderAckAndRewind(t *testing.T) {
	s := spool.New(1 << 20)
	for first := uint64(1); first <= 31; first += 10 {
		s.Push(sealed(first))
	}
	if a, b := next(t, s), next(t, s); a != 1 || b != 11 {
		t.Fatalf("got %d, %d; want 1, 11", a, b)
	}
	if !s.Ack(3, 11) || s.Ack(3, 11) || s.Ack(4, 1) {
		t.Error("ack of 11, again, of another epoch: want true, false, false")
	}
	if got := s.Stats().FirstWaiting; got != 1 {
		t.Errorf("first waiting %d, want 1", got)
	}
	s.Rewind()
	for _, want := range []uint64{1, 21, 31} {
		if got := next(t, s); got != want {
			t.Errorf("after the stream broke: got %d, want %d", got, want)
		}
	}
	none(t, s, 1<<20)
	for _, first := range []uint64{1, 21, 31} {
		s.Ack(3, first)
	}
	if st := s.Stats(); st.Batches != 0 || st.Bytes != 0 || st.FirstWaiting != 41 {
		t.Errorf("at the end %+v", st)
	}
}

func TestResumedBatchesOfAnOldEpoch(t *testing.T) {
	s := spool.New(2*size + 1000)
	old := sealed(91)
	old.Epoch = 2
	s.Resume(old)
	for first := uint64(1); first <= 21; first += 10 {
		s.Push(sealed(first))
	}
	// It may have been sent, so it is not the one that is dropped.
	if news, _ := s.TakeLosses(); len(news) != 1 || news[0].First != 1 || news[0].Last != 20 {
		t.Errorf("losses %v, want 1 to 20", news)
	}
	if a, b := next(t, s), next(t, s); a != 91 || b != 21 {
		t.Errorf("got %d, %d; want 91, 21", a, b)
	}
	if got := s.Stats().FirstWaiting; got != 21 {
		t.Errorf("first waiting %d, want 21 of the latest epoch", got)
	}
	s.Ack(3, 21)
	if got := s.Stats().FirstWaiting; got != 31 {
		t.Errorf("first waiting %d, want 31", got)
	}
}

func TestWindow(t *testing.T) {
	s := spool.New(1 << 20)
	s.Push(sealed(1))
	s.Push(sealed(11))
	if got := next(t, s); got != 1 {
		t.Fatal(got)
	}
	none(t, s, size)
	s.Ack(3, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if b, err := s.Next(ctx, size); err != nil || b.First != 11 {
		t.Errorf("got %v, %v", b, err)
	}
}

func TestOverflowDropsOldestUnsentAndTellsOnce(t *testing.T) {
	s := spool.New(4 * (size + 300)) // four batches
	kernel := &flowv1.Loss{Place: flowv1.Place_PLACE_KERNEL, Cause: flowv1.Cause_CAUSE_FULL, Count: 7}
	s.Push(sealed(1))
	s.Push(sealed(11, kernel))
	if got := next(t, s); got != 1 { // sent once: it may have arrived, so it stays
		t.Fatal(got)
	}
	s.Rewind()
	for first := uint64(21); first <= 61; first += 10 {
		s.Push(sealed(first))
	}
	news, untold := s.TakeLosses()
	want := []*flowv1.Loss{{Place: flowv1.Place_PLACE_SPOOL, Cause: flowv1.Cause_CAUSE_FULL, Count: 30, Epoch: 3, First: 11, Last: 40, FirstTime: 11, LastTime: 40}}
	if diff := cmp.Diff(want, news, protocmp.Transform()); diff != "" {
		t.Errorf("losses (-want +got):\n%s", diff)
	}
	if len(untold) != 1 || untold[0].First != 11 || untold[0].Losses[0] != kernel {
		t.Errorf("untold %v, want batch 11, whose loss is told nowhere else", untold)
	}
	if news, untold = s.TakeLosses(); news != nil || untold != nil {
		t.Error("told twice")
	}
	for _, want := range []uint64{1, 41, 51, 61} {
		if got := next(t, s); got != want {
			t.Errorf("got %d, want %d", got, want)
		}
	}
	// All are sent: a new batch that does not fit is dropped itself.
	s.Push(sealed(71))
	news, _ = s.TakeLosses()
	if len(news) != 1 || news[0].First != 71 || s.Stats().Dropped != 40 {
		t.Errorf("losses %v, dropped %d", news, s.Stats().Dropped)
	}
}

func TestRefuse(t *testing.T) {
	s := spool.New(1 << 20)
	s.Push(sealed(1))
	next(t, s)
	if !s.Refuse(3, 1) || s.Refuse(3, 1) {
		t.Error("refuse, again: want true, false")
	}
	news, _ := s.TakeLosses()
	if len(news) != 1 || news[0].Place != flowv1.Place_PLACE_AGENT || news[0].Cause != flowv1.Cause_CAUSE_INVALID || news[0].Count != 10 {
		t.Errorf("losses %v", news)
	}
}

func TestNextWaitsForPush(t *testing.T) {
	s := spool.New(1 << 20)
	got := make(chan uint64, 1)
	go func() {
		b, err := s.Next(t.Context(), 1<<20)
		if err == nil {
			got <- b.First
		}
	}()
	s.Push(sealed(1))
	select {
	case first := <-got:
		if first != 1 {
			t.Error(first)
		}
	case <-time.After(5 * time.Second):
		t.Error("nothing came")
	}
}
