// SPDX-License-Identifier: Apache-2.0

// Package broker keeps the numbers of the label sets in use: it asks the identity broker for them,
// asks again at intervals so that a set in use is never collected, and releases sets out of use.
package broker

import (
	"container/heap"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	identityv1 "github.com/weirmesh/weir/gen/weir/identity/v1"
	"github.com/weirmesh/weir/internal/reserved"
	"github.com/weirmesh/weir/services/policy/internal/label"
)

// Config bounds the calls.
type Config struct {
	// Workers is how many calls run at once; default 8.
	Workers int
	// Timeout of one call; default 5 s.
	Timeout time.Duration
	// Refresh is how often the number of a set in use is asked for again, which takes back a release by
	// another policy service that did not know of the use. It must be well under the broker's wait
	// before it deletes; default 1 min, where the broker waits 10 min.
	Refresh time.Duration
	// Sweep is how often sets that nobody seems to use are looked for and released; default 10 min.
	Sweep time.Duration
	// MinBackoff and MaxBackoff bound the pause after a failed call; default 100 ms and 5 s.
	MinBackoff, MaxBackoff time.Duration
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{
		Workers: 8, Timeout: 5 * time.Second, Refresh: time.Minute, Sweep: 10 * time.Minute,
		MinBackoff: 100 * time.Millisecond, MaxBackoff: 5 * time.Second,
	}
}

// Broker is the client of the identity broker. Want, Unwant and Run are safe together.
type Broker struct {
	config Config
	client identityv1.IdentityServiceClient
	log    *slog.Logger
	// number is told each answer. It may block, which slows the calls.
	number func(label.Set, uint32)

	wake chan struct{}

	mu      sync.Mutex
	sets    map[string]*entry
	queue   schedule // of the entries that no call runs for
	busy    int      // calls that run
	failing bool     // the last call failed
	// failures counts failed calls. None is a loss: each is made again.
	failures uint64
}

// entry is one set. It is in the queue, or a call runs for it.
type entry struct {
	labels  label.Set
	wanted  bool
	due     time.Time
	backoff time.Duration
	index   int  // in the queue; -1 = a call runs
	changed bool // while the call ran
}

// schedule is a heap of entries by when they are due.
type schedule []*entry

func (s schedule) Len() int           { return len(s) }
func (s schedule) Less(i, j int) bool { return s[i].due.Before(s[j].due) }
func (s schedule) Swap(i, j int) {
	s[i], s[j] = s[j], s[i]
	s[i].index, s[j].index = i, j
}

// Push implements heap.Interface.
func (s *schedule) Push(x any) {
	e := x.(*entry)
	e.index = len(*s)
	*s = append(*s, e)
}

// Pop implements heap.Interface.
func (s *schedule) Pop() any {
	last := len(*s) - 1
	e := (*s)[last]
	(*s)[last] = nil
	*s = (*s)[:last]
	e.index = -1
	return e
}

// New makes a client; number is called with each answer, from several goroutines.
func New(config Config, conn grpc.ClientConnInterface, log *slog.Logger, number func(label.Set, uint32)) *Broker {
	return &Broker{
		config: config,
		client: identityv1.NewIdentityServiceClient(conn),
		log:    log.With("component", "broker"),
		number: number,
		sets:   map[string]*entry{},
		wake:   make(chan struct{}, 1),
	}
}

// Want asks for a set's number as soon as possible, and keeps it in use until Unwant.
func (b *Broker) Want(labels label.Set) { b.set(labels, true) }

// Unwant releases a set.
func (b *Broker) Unwant(labels label.Set) { b.set(labels, false) }

func (b *Broker) set(labels label.Set, wanted bool) {
	b.mu.Lock()
	e := b.sets[labels.Key()]
	if e == nil {
		e = &entry{labels: labels, index: -1}
		b.sets[labels.Key()] = e
		heap.Push(&b.queue, e)
	}
	e.wanted, e.due, e.backoff, e.changed = wanted, time.Time{}, 0, true
	if e.index >= 0 {
		heap.Fix(&b.queue, e.index)
	}
	b.mu.Unlock()
	b.poke()
}

// Status says whether the broker answered the last call, and how many calls failed so far.
func (b *Broker) Status() (answers bool, failures uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.failing, b.failures
}

func (b *Broker) poke() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// Run makes the calls until ctx ends.
func (b *Broker) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return b.sweepLoop(ctx) })
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		next := b.startDue(ctx, group)
		timer.Reset(time.Until(next))
		select {
		case <-ctx.Done():
			return group.Wait()
		case <-b.wake:
		case <-timer.C:
		}
	}
}

// startDue starts the calls that are due, as many as there are workers, and returns when to look
// again.
func (b *Broker) startDue(ctx context.Context, group *errgroup.Group) time.Time {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.queue) > 0 && b.busy < b.config.Workers { // a call that ends wakes us
		e := b.queue[0]
		if e.due.After(now) {
			return e.due
		}
		heap.Pop(&b.queue)
		e.changed = false
		wanted := e.wanted
		b.busy++
		group.Go(func() error { b.call(ctx, e, wanted); return nil })
	}
	return now.Add(time.Minute)
}

// call makes one call for a set and says when the next is due.
func (b *Broker) call(ctx context.Context, e *entry, wanted bool) {
	callCtx, cancel := context.WithTimeout(ctx, b.config.Timeout)
	defer cancel()
	var err error
	if wanted {
		var response *identityv1.AllocateResponse
		response, err = b.client.Allocate(callCtx, &identityv1.AllocateRequest{Labels: e.labels})
		if err == nil {
			err = b.deliver(e.labels, response.GetIdentity())
		}
	} else {
		_, err = b.client.Release(callCtx, &identityv1.ReleaseRequest{Labels: e.labels})
	}
	if ctx.Err() != nil {
		return
	}
	b.note(err)

	defer b.poke() // after the lock is free
	b.mu.Lock()
	defer b.mu.Unlock()
	b.busy--
	switch {
	case e.changed:
		e.due = time.Time{} // what is wanted now is asked at once
	case err != nil:
		e.backoff = min(max(2*e.backoff, b.config.MinBackoff), b.config.MaxBackoff)
		e.due = time.Now().Add(jitter(e.backoff))
	case wanted:
		e.backoff = 0
		e.due = time.Now().Add(jitter(b.config.Refresh))
	default:
		delete(b.sets, e.labels.Key())
		return
	}
	heap.Push(&b.queue, e)
}

func (b *Broker) deliver(labels label.Set, identity *identityv1.Identity) error {
	if !slices.Equal(identity.GetLabels(), labels) {
		return fmt.Errorf("the broker answered for %v when asked for %v", identity.GetLabels(), labels)
	}
	b.number(labels, identity.GetNumber())
	return nil
}

// note counts failures, and logs the first of a row and its end.
func (b *Broker) note(err error) {
	b.mu.Lock()
	if err != nil {
		b.failures++
	}
	changed := b.failing != (err != nil)
	b.failing = err != nil
	b.mu.Unlock()
	if !changed {
		return
	}
	if err != nil {
		b.log.Warn("identity broker does not answer, will try again; known identities stay", "error", err)
	} else {
		b.log.Info("identity broker answers")
	}
}

// sweepLoop releases what the broker holds and no pod here uses: sets that went out of use while no
// policy service ran. Another replica that does use one takes the release back by its next refresh.
func (b *Broker) sweepLoop(ctx context.Context) error {
	ticker := time.NewTicker(b.config.Sweep)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if err := b.sweep(ctx); err != nil && ctx.Err() == nil {
			b.log.Warn("unused identities could not be looked for", "error", err)
		}
	}
}

func (b *Broker) sweep(ctx context.Context) error {
	callCtx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	response, err := b.client.List(callCtx, &identityv1.ListRequest{}, grpc.MaxCallRecvMsgSize(1<<30))
	if err != nil {
		return err
	}
	for _, identity := range response.GetIdentities() {
		set := label.Set(identity.GetLabels())
		if identity.GetNumber() < reserved.FirstGiven {
			continue
		}
		b.mu.Lock()
		_, known := b.sets[set.Key()]
		b.mu.Unlock()
		if !known {
			b.Unwant(set)
		}
	}
	return nil
}

// jitter returns 75 to 100 % of d, so that calls do not come in bursts.
func jitter(d time.Duration) time.Duration {
	return d - rand.N(d/4+1)
}
