// SPDX-License-Identifier: Apache-2.0

package hub

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/policy/internal/label"
	"github.com/weirmesh/weir/services/policy/internal/object"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// noNumbers is a broker that never answers.
type noNumbers struct{}

func (noNumbers) Want(label.Set)   {}
func (noNumbers) Unwant(label.Set) {}

type fixture struct {
	*Hub
	t      *testing.T
	ctx    context.Context
	report *status.Reporter
}

func start(t *testing.T, config Config) *fixture {
	t.Helper()
	report := status.New("policy", "")
	h := New(config, slog.New(slog.DiscardHandler), noNumbers{}, report)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx, state.New("default")) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return &fixture{h, t, ctx, report}
}

func (f *fixture) do(apply func(*state.State)) uint64 {
	f.t.Helper()
	revision, err := f.Do(f.ctx, apply)
	if err != nil {
		f.t.Fatal(err)
	}
	return revision
}

func (f *fixture) namespaces(from, to int) uint64 {
	f.t.Helper()
	return f.do(func(st *state.State) {
		for i := from; i < to; i++ {
			st.Upsert(&object.Namespace{Name: fmt.Sprintf("ns-%03d", i)})
		}
	})
}

func (f *fixture) connect(node string) *Session {
	f.t.Helper()
	s, err := f.Connect(f.ctx, node, "", "")
	if err != nil {
		f.t.Fatal(err)
	}
	return s
}

func (f *fixture) next(s *Session) Message {
	f.t.Helper()
	m, err := s.Next(f.ctx)
	if err != nil {
		f.t.Fatal(err)
	}
	return m
}

func (f *fixture) ack(s *Session, revision uint64) {
	f.t.Helper()
	if err := s.Ack(f.ctx, revision); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) held(node string) uint64 {
	for _, a := range f.Status().Agents {
		if a.Node == node {
			return a.Held
		}
	}
	return 0
}

func TestFirstStateInChunks(t *testing.T) {
	c := DefaultConfig()
	c.Chunk = 10
	f := start(t, c)
	f.namespaces(0, 25)
	revision := f.do(func(st *state.State) { st.MarkSynced() })
	s := f.connect("n1")
	for i, want := range []int{10, 10, 5} {
		m := f.next(s)
		if m.Update == nil || m.Update.Revision != uint64(i+1) || len(m.Update.Change.Upserts) != want {
			t.Fatalf("message %d is %+v", i, m)
		}
	}
	if m := f.next(s); m.Synced == nil || *m.Synced != 3 {
		t.Fatalf("message after the chunks is %+v", m)
	}
	// The node holds the revision when it acknowledged the last chunk, not before.
	f.ack(s, 2)
	if got := f.held("n1"); got != 0 {
		t.Errorf("held is %d after two of three chunks", got)
	}
	f.ack(s, 3)
	if got := f.held("n1"); got != revision {
		t.Errorf("held is %d, want %d", got, revision)
	}
}

func TestNothingBeforeSynced(t *testing.T) {
	f := start(t, DefaultConfig())
	f.namespaces(0, 1)
	s := f.connect("n1")
	ctx, cancel := context.WithCancel(f.ctx)
	cancel()
	if m, err := s.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Next before the source is synced: %+v, %v", m, err)
	}
}

// A slow agent gets fewer, larger updates; one within the window gets each.
func TestChangesMergeBehindTheWindow(t *testing.T) {
	c := DefaultConfig()
	c.Window = 2
	f := start(t, c)
	f.do(func(st *state.State) { st.MarkSynced() })
	s := f.connect("n1")
	if m := f.next(s); m.Synced == nil {
		t.Fatalf("first message is %+v", m)
	}
	for i := range 2 {
		f.namespaces(i, i+1)
		if m := f.next(s); m.Update == nil || len(m.Update.Change.Upserts) != 1 {
			t.Fatalf("update %d is %+v", i, m)
		}
	}
	for i := 2; i < 50; i++ {
		f.namespaces(i, i+1)
	}
	f.do(func(st *state.State) { st.Delete(object.Key{Kind: object.KindNamespace, Name: "ns-000"}) })
	// One that came and went meanwhile is never heard of.
	last := f.do(func(st *state.State) { st.Delete(object.Key{Kind: object.KindNamespace, Name: "ns-049"}) })
	f.ack(s, 1)
	m := f.next(s)
	if m.Update == nil || m.Update.Revision != 3 || len(m.Update.Change.Upserts) != 47 || len(m.Update.Change.Removals) != 1 {
		t.Fatalf("merged update is %+v", m.Update)
	}
	f.ack(s, 3)
	if got := f.held("n1"); got != last {
		t.Errorf("held is %d, want %d", got, last)
	}
}

// What does not concern a node needs no acknowledgement of it.
func TestHeldWithoutUpdates(t *testing.T) {
	f := start(t, DefaultConfig())
	f.do(func(st *state.State) {
		st.Upsert(&object.Node{Name: "n1"})
		st.Upsert(&object.Node{Name: "n2"})
		st.MarkSynced()
	})
	s := f.connect("n1")
	m := f.next(s)
	for ; m.Synced == nil; m = f.next(s) {
		f.ack(s, m.Update.Revision)
	}
	revision := f.do(func(st *state.State) {
		st.Upsert(&object.Pod{UID: "u", Namespace: "a", Name: "b", Node: "n2", Unmanaged: true})
	})
	waiting := make(chan []string, 1)
	go func() { waiting <- f.WaitSpread(f.ctx, revision, "") }()
	ctx, cancel := context.WithCancel(f.ctx)
	defer cancel()
	nothing := make(chan error, 1)
	go func() {
		m, err := s.Next(ctx)
		if err == nil {
			err = fmt.Errorf("got %+v", m)
		}
		nothing <- err
	}()
	if late := <-waiting; len(late) != 0 {
		t.Errorf("late: %v", late)
	}
	cancel()
	if err := <-nothing; !errors.Is(err, context.Canceled) {
		t.Errorf("n1 heard of a pod on n2: %v", err)
	}
}

func TestWaitSpread(t *testing.T) {
	f := start(t, DefaultConfig())
	f.do(func(st *state.State) { st.MarkSynced() })
	one, two, own := f.connect("n1"), f.connect("n2"), f.connect("own")
	for _, s := range []*Session{one, two, own} {
		f.next(s) // synced
	}
	revision := f.namespaces(0, 1)
	for _, s := range []*Session{one, two} {
		f.next(s)
	}
	f.ack(one, 1)
	ctx, cancel := context.WithCancel(f.ctx)
	cancel()
	if late := f.WaitSpread(ctx, revision, "own"); len(late) != 1 || late[0] != "n2" {
		t.Errorf("late: %v, want n2", late)
	}
	done := make(chan []string, 1)
	go func() { done <- f.WaitSpread(f.ctx, revision, "own") }()
	two.Close() // who is gone is not waited for
	if late := <-done; len(late) != 0 {
		t.Errorf("late: %v", late)
	}
}

func TestAgentThatDoesNotAcknowledgeIsClosed(t *testing.T) {
	c := DefaultConfig()
	c.AckTimeout = time.Millisecond
	f := start(t, c)
	f.namespaces(0, 1)
	f.do(func(st *state.State) { st.MarkSynced() })
	s := f.connect("n1")
	f.next(s)
	if err := s.Watch(f.ctx); !errors.Is(err, ErrSlow) {
		t.Errorf("Watch: %v", err)
	}
	if _, err := s.Next(f.ctx); !errors.Is(err, ErrSlow) {
		t.Errorf("Next: %v", err)
	}
	if got := f.report.Loss("agent stream", "closed: the agent did not keep up").Value(); got != 1 {
		t.Errorf("counted %d times", got)
	}
}

func TestSpreadsAreBounded(t *testing.T) {
	c := DefaultConfig()
	c.Spreads = 2
	f := start(t, c)
	s := f.connect("n1")
	for i := range 3 {
		s.Answer(Spread{UID: fmt.Sprint(i)})
	}
	if err := s.Watch(f.ctx); !errors.Is(err, ErrSlow) {
		t.Errorf("Watch: %v", err)
	}
}

func TestBadAck(t *testing.T) {
	f := start(t, DefaultConfig())
	s := f.connect("n1")
	if err := s.Ack(f.ctx, 1); !errors.Is(err, ErrBadAck) {
		t.Errorf("Ack: %v", err)
	}
}

func TestDisplaced(t *testing.T) {
	f := start(t, DefaultConfig())
	old := f.connect("n1")
	fresh := f.connect("n1")
	if err := old.Watch(f.ctx); !errors.Is(err, ErrDisplaced) {
		t.Errorf("old: %v", err)
	}
	old.Close() // must not end the new one
	if agents := f.Status().Agents; len(agents) != 1 {
		t.Errorf("agents: %v", agents)
	}
	fresh.Close()
	if agents := f.Status().Agents; len(agents) != 0 {
		t.Errorf("agents: %v", agents)
	}
}
