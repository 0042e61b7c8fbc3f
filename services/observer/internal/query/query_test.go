// SPDX-License-Identifier: Apache-2.0

package query

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/store"
	"github.com/weirmesh/weir/services/observer/internal/testflow"
)

// The selection rules are tested through the API, in services/observer; here is what is hard to
// bring about there.

func source(t *testing.T, streamSeq, first uint64, count int) *event.Source {
	t.Helper()
	b, err := batch.Parse(testflow.Encode(testflow.Flows("node-1", 1, first, count, testflow.Base)))
	if err != nil {
		t.Fatal(err)
	}
	return event.NewSource(b, streamSeq, testflow.Base.UnixNano())
}

func events(s *event.Source) []event.Event {
	var out []event.Event
	for i := range s.Len() {
		out = append(out, event.Event{Source: s, Index: int32(i)})
	}
	return out
}

type all struct{}

func (all) MayMatch(*batch.Header) bool   { return true }
func (all) Match(*event.Source, int) bool { return true }

// reader is a sink that takes events one by one, when the test lets it.
type reader struct {
	started chan struct{}
	next    chan struct{} // nil = do not wait
	flows   int
	lost    []uint64
	told    []time.Time
	fail    error
}

func (r *reader) Start() error {
	close(r.started)
	return nil
}

func (r *reader) Event(*event.Source, int) error {
	if r.next != nil {
		<-r.next
	}
	r.flows++
	return r.fail
}

func (r *reader) Gap(*event.Gap) error { return nil }

func (r *reader) Lost(count uint64, _, last time.Time) error {
	r.lost = append(r.lost, count)
	r.told = append(r.told, last)
	return nil
}

// TestSlowReader: a reader that is overtaken is told how much it missed, at most once a second, and
// the sum is exact.
func TestSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one := source(t, 1, 1, 100)
		s := store.New(3 * (one.Size() + 100*40))
		engine := New(s, nil, time.Now)
		r := &reader{started: make(chan struct{}), next: make(chan struct{})}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- engine.Run(ctx, Selection{Follow: true}, batch.Flow, all{}, r) }()
		<-r.started
		const batches = 40
		for i := range uint64(batches) {
			s.Append(events(source(t, i+1, 1+100*i, 100)))
			if i%10 == 9 { // now and then the reader gets on
				for range 150 {
					r.next <- struct{}{}
				}
			}
			time.Sleep(50 * time.Millisecond)
		}
		close(r.next)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("run ended with %v", err)
		}
		var lost uint64
		for i, n := range r.lost {
			lost += n
			if i > 0 && r.told[i].Sub(r.told[i-1]) < time.Second {
				t.Errorf("told at %s and at %s", r.told[i-1], r.told[i])
			}
		}
		if lost == 0 || uint64(r.flows)+lost != batches*100 {
			t.Errorf("%d flows + %d lost, want %d", r.flows, lost, batches*100)
		}
	})
}

// TestSinkFails: a client that went away ends the run.
func TestSinkFails(t *testing.T) {
	s := store.New(1 << 20)
	s.Append(events(source(t, 1, 1, 10)))
	gone := errors.New("gone")
	r := &reader{started: make(chan struct{}), fail: gone}
	if err := New(s, nil, time.Now).Run(t.Context(), Selection{}, batch.Flow, all{}, r); !errors.Is(err, gone) {
		t.Errorf("run ended with %v", err)
	}
}

// fakePast is a past of batches.
type fakePast struct {
	t       *testing.T
	sources []*event.Source
	opened  int
	// onRead is called before each read.
	onRead func()
}

func (p *fakePast) Open(context.Context, time.Time) (PastReader, error) {
	p.opened++
	return &fakeReader{past: p}, nil
}

type fakeReader struct {
	past *fakePast
	at   int
}

func (r *fakeReader) Read(_ context.Context, end uint64, sink PastSink) error {
	if r.past.onRead != nil {
		r.past.onRead()
	}
	for ; r.at < len(r.past.sources) && r.past.sources[r.at].StreamSeq < end; r.at++ {
		s := r.past.sources[r.at]
		for i := range s.Len() {
			if err := sink.Record(s, i); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *fakeReader) Seen(_ string, _, number uint64) bool {
	for _, s := range r.past.sources[:r.at] {
		if s.First <= number && number <= s.Last() {
			return true
		}
	}
	return false
}

func (*fakeReader) Close() {}

// TestMemoryMovesOn: while the past is read memory forgets more; nothing is missed, nothing told twice.
func TestMemoryMovesOn(t *testing.T) {
	one := source(t, 1, 1, 100)
	s := store.New(3 * (one.Size() + 100*40))
	past := &fakePast{t: t}
	var seq uint64
	more := func() {
		seq++
		next := source(t, seq, 1+100*(seq-1), 100)
		past.sources = append(past.sources, next)
		s.Append(events(next))
	}
	for range 20 {
		more()
	}
	reads := 0
	past.onRead = func() {
		if reads++; reads <= 3 {
			for range 4 {
				more()
			}
		}
	}
	r := &reader{started: make(chan struct{})}
	since := testflow.Base.UnixNano()
	if err := New(s, past, time.Now).Run(t.Context(), Selection{Since: &since}, batch.Flow, all{}, r); err != nil {
		t.Fatal(err)
	}
	if r.flows != int(seq)*100 || len(r.lost) > 0 || past.opened != 1 {
		t.Errorf("%d flows of %d, lost %v, the past opened %d times", r.flows, seq*100, r.lost, past.opened)
	}
}

// TestSecondCopyInMemory: a batch that the past had and that was sent again later is told once.
func TestSecondCopyInMemory(t *testing.T) {
	one := source(t, 1, 1, 100)
	s := store.New(2*(one.Size()+100*40) + 100)
	past := &fakePast{t: t, sources: []*event.Source{one}}
	s.SetStart(5) // this observer began to read at 5, and did not see the first copy
	s.Append(events(source(t, 6, 1, 100)))
	s.Append(events(source(t, 7, 101, 100)))
	r := &reader{started: make(chan struct{})}
	since := testflow.Base.UnixNano()
	if err := New(s, past, time.Now).Run(t.Context(), Selection{Since: &since}, batch.Flow, all{}, r); err != nil {
		t.Fatal(err)
	}
	if r.flows != 200 {
		t.Errorf("%d flows, want 200", r.flows)
	}
}

// TestLateBacklog: the oldest event of memory may be far older than what memory forgot, when an agent
// sent late; a request for the time between still needs the past.
func TestLateBacklog(t *testing.T) {
	forgotten := source(t, 1, 1, 100)
	late := source(t, 2, 101, 100)
	hour := int64(time.Hour)
	forgotten.Arrival += hour // its records are as old as the others, but that is not looked at here
	late.Arrival += hour
	s := store.New(late.Size() + 100*40 + 100)
	s.Append(events(forgotten))
	s.Append(events(late))
	past := &fakePast{t: t, sources: []*event.Source{forgotten}}
	r := &reader{started: make(chan struct{})}
	since := testflow.Base.UnixNano() + int64(15*time.Second) // later than all records, earlier than their arrival
	if err := New(s, past, time.Now).Run(t.Context(), Selection{Since: &since}, batch.Flow, all{}, r); err != nil {
		t.Fatal(err)
	}
	if past.opened != 1 {
		t.Error("the past was not looked at")
	}
}
