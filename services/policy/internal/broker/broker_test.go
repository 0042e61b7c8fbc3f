// SPDX-License-Identifier: Apache-2.0

package broker

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	identityv1 "github.com/weirmesh/weir/gen/weir/identity/v1"
	"github.com/weirmesh/weir/services/policy/internal/label"
)

// fakeClient answers as the test says and tells it of each call.
type fakeClient struct {
	mu      sync.Mutex
	running int
	most    int
	fail    int           // calls still to fail
	hold    chan struct{} // if not nil, calls wait for it
	listed  []*identityv1.Identity
	calls   chan string
}

func newFake() *fakeClient { return &fakeClient{calls: make(chan string, 10_000)} }

func (f *fakeClient) enter(ctx context.Context, call string) error {
	f.mu.Lock()
	f.running++
	f.most = max(f.most, f.running)
	fail := f.fail > 0
	if fail {
		f.fail--
	}
	hold := f.hold
	f.mu.Unlock()
	f.calls <- call
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
		}
	}
	f.mu.Lock()
	f.running--
	f.mu.Unlock()
	if fail {
		return errors.New("no quorum")
	}
	return ctx.Err()
}

func (f *fakeClient) Allocate(ctx context.Context, r *identityv1.AllocateRequest, _ ...grpc.CallOption) (*identityv1.AllocateResponse, error) {
	if err := f.enter(ctx, "allocate "+r.GetLabels()[0]); err != nil {
		return nil, err
	}
	return &identityv1.AllocateResponse{Identity: &identityv1.Identity{Number: 300, Labels: r.GetLabels()}}, nil
}

func (f *fakeClient) Release(ctx context.Context, r *identityv1.ReleaseRequest, _ ...grpc.CallOption) (*identityv1.ReleaseResponse, error) {
	return &identityv1.ReleaseResponse{}, f.enter(ctx, "release "+r.GetLabels()[0])
}

func (f *fakeClient) Get(context.Context, *identityv1.GetRequest, ...grpc.CallOption) (*identityv1.GetResponse, error) {
	return nil, errors.New("not asked in these tests")
}

func (f *fakeClient) List(context.Context, *identityv1.ListRequest, ...grpc.CallOption) (*identityv1.ListResponse, error) {
	return &identityv1.ListResponse{Identities: f.listed}, nil
}

func start(t *testing.T, f *fakeClient, config Config) (*Broker, <-chan string) {
	t.Helper()
	answers := make(chan string, 10_000)
	b := New(config, nil, slog.New(slog.DiscardHandler), func(s label.Set, _ uint32) { answers <- s[0] })
	b.client = f
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return b, answers
}

func next(t *testing.T, calls <-chan string) string {
	t.Helper()
	select {
	case c := <-calls:
		return c
	case <-time.After(20 * time.Second):
		t.Fatal("nothing came")
		return ""
	}
}

func quickConfig() Config {
	c := DefaultConfig()
	c.MinBackoff, c.MaxBackoff = time.Millisecond, time.Millisecond
	return c
}

func TestRetryUntilAnswered(t *testing.T) {
	f := newFake()
	f.fail = 3
	b, answers := start(t, f, quickConfig())
	b.Want(label.Set{"k8s:a=1"})
	for range 4 {
		if got := next(t, f.calls); got != "allocate k8s:a=1" {
			t.Fatalf("call %q", got)
		}
	}
	if got := next(t, answers); got != "k8s:a=1" {
		t.Errorf("answer for %q", got)
	}
	if _, failures := b.Status(); failures != 3 {
		t.Errorf("%d failures, want 3", failures)
	}
}

func TestReleaseThenWantAgain(t *testing.T) {
	f := newFake()
	b, answers := start(t, f, quickConfig())
	set := label.Set{"k8s:a=1"}
	b.Want(set)
	next(t, answers)
	next(t, f.calls)
	// The release is under way when the set is wanted again: it must be asked for after it.
	f.mu.Lock()
	f.hold = make(chan struct{})
	hold := f.hold
	f.mu.Unlock()
	b.Unwant(set)
	if got := next(t, f.calls); got != "release k8s:a=1" {
		t.Fatalf("call %q", got)
	}
	b.Want(set)
	f.mu.Lock()
	f.hold = nil
	f.mu.Unlock()
	close(hold)
	if got := next(t, f.calls); got != "allocate k8s:a=1" {
		t.Errorf("call %q", got)
	}
	next(t, answers)
}

func TestRefresh(t *testing.T) {
	f := newFake()
	c := quickConfig()
	c.Refresh = time.Millisecond
	b, _ := start(t, f, c)
	b.Want(label.Set{"k8s:a=1"})
	for range 3 { // the number of a set in use is asked for again and again
		if got := next(t, f.calls); got != "allocate k8s:a=1" {
			t.Fatalf("call %q", got)
		}
	}
}

func TestBoundedConcurrency(t *testing.T) {
	f := newFake()
	c := quickConfig()
	c.Workers = 3
	b, answers := start(t, f, c)
	var want, got []string
	for i := range 500 {
		text := "k8s:a=" + string(rune('a'+i%26)) + string(rune('a'+i/26))
		want = append(want, text)
		b.Want(label.Set{text})
	}
	for range want {
		got = append(got, next(t, answers))
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("%d answers, not one per set", len(got))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.most > 3 {
		t.Errorf("%d calls at once, want at most 3", f.most)
	}
}

func TestSweep(t *testing.T) {
	f := newFake()
	f.listed = []*identityv1.Identity{
		{Number: 1, Labels: []string{"reserved:host"}},
		{Number: 300, Labels: []string{"k8s:used=1"}},
		{Number: 301, Labels: []string{"k8s:left=over"}},
	}
	b, answers := start(t, f, quickConfig())
	b.Want(label.Set{"k8s:used=1"})
	next(t, answers)
	next(t, f.calls)
	if err := b.sweep(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := next(t, f.calls); got != "release k8s:left=over" {
		t.Errorf("call %q", got)
	}
	select {
	case got := <-f.calls:
		t.Errorf("another call: %q", got)
	default:
	}
}
