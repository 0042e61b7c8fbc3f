// SPDX-License-Identifier: Apache-2.0

package allocator

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/services/identity/internal/store"
)

// view is this broker's picture of the bucket. It may lag; nothing is decided by it but where to
// look. Guarded by Allocator.mu once it is the allocator's.
type view struct {
	numbers map[uint32]numberView
	links   map[string]linkView // by hash
	applied uint64              // every write up to here is in
}

type numberView struct {
	store.Entry
	labels labelset.Set // nil when deleted or not readable
}

type linkView struct {
	store.Entry
	link
}

func newView() *view {
	return &view{numbers: map[uint32]numberView{}, links: map[string]linkView{}}
}

// apply takes in a key unless what is there is newer. It reports whether the value could be read.
func (v *view) apply(e store.Entry) bool {
	v.applied = max(v.applied, e.Revision)
	if number, ok := parseNumberKey(e.Key); ok {
		if v.numbers[number].Revision > e.Revision {
			return true
		}
		nv := numberView{Entry: e}
		if e.Exists() {
			c, err := decodeClaim(e.Value)
			if err != nil {
				v.numbers[number] = nv
				return false
			}
			nv.labels = c.Labels
		}
		nv.Value = nil
		v.numbers[number] = nv
		return true
	}
	hash, ok := strings.CutPrefix(e.Key, linkPrefix)
	if !ok {
		return false
	}
	if v.links[hash].Revision > e.Revision {
		return true
	}
	lv := linkView{Entry: e}
	if e.Exists() {
		l, err := decodeLink(e.Value)
		if err != nil {
			v.links[hash] = lv
			return false
		}
		lv.link = l
	}
	lv.Value = nil
	v.links[hash] = lv
	return true
}

// observe takes in what the leader said of a key, which may be that it is not there.
func (a *Allocator) observe(e store.Entry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.view == nil {
		return
	}
	if number, ok := parseNumberKey(e.Key); ok && e.Revision == 0 {
		delete(a.view.numbers, number)
		return
	}
	applied := a.view.applied
	a.view.apply(e)
	a.view.applied = applied // one key says nothing about the others
}

// Run keeps the view and collects what is due, until ctx ends.
func (a *Allocator) Run(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.collectLoop(ctx)
	}()
	defer func() { <-done }()
	for {
		err := a.watch(ctx)
		if ctx.Err() != nil {
			return nil
		}
		a.report.Waiting(readyTask)
		a.log.Warn("watch of the identity bucket ended, will try again", "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryPause):
		}
	}
}

// retryPause is the time between two tries to reach NATS; openTimeout is how long one may take.
const (
	retryPause  = 500 * time.Millisecond
	openTimeout = 5 * time.Second
)

// watch follows the bucket. Each time it begins with an empty view, which replaces the old one when
// it is whole, so that a bucket that was made anew is not mixed with the old one.
func (a *Allocator) watch(ctx context.Context) error {
	openCtx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	if err := a.keys.Open(openCtx); err != nil {
		return err
	}
	building := newView()
	return a.keys.Watch(ctx, func(e store.Entry) {
		a.mu.Lock()
		defer a.mu.Unlock()
		if !building.apply(e) {
			a.broken.Add(1)
			a.log.Error("a key of the identity bucket cannot be read", "key", e.Key)
		}
		if a.view == building {
			a.broadcastLocked()
		}
	}, func(revision uint64) {
		a.mu.Lock()
		defer a.mu.Unlock()
		building.applied = max(building.applied, revision)
		a.view = building
		if a.cursor == 0 {
			a.cursor = newestNumber(building)
		}
		a.broadcastLocked()
		a.report.Done(readyTask)
	})
}

// newestNumber returns the number that was claimed last, so that a new broker goes on from there
// instead of trying what others have just given.
func newestNumber(v *view) uint32 {
	var newest uint32
	var revision uint64
	for number, n := range v.numbers {
		if n.Revision > revision {
			newest, revision = number, n.Revision
		}
	}
	return newest
}

func (a *Allocator) broadcastLocked() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// waitView waits until the view exists and holds every write up to a revision.
func (a *Allocator) waitView(ctx context.Context, revision uint64) error {
	for {
		a.mu.Lock()
		ok, changed := a.view != nil && a.view.applied >= revision, a.changed
		a.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return errors.Join(errors.New("the identity bucket was not read yet"), ctx.Err())
		}
	}
}

// Identity is a number and its set.
type Identity struct {
	Number uint32
	Labels labelset.Set
}

// List returns all identities by number, as of a moment during the call: the view is first brought
// up to what the leader has.
func (a *Allocator) List(ctx context.Context) ([]Identity, error) {
	if err := a.catchUp(ctx); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []Identity
	for _, l := range a.view.links {
		for _, e := range l.Entries {
			all = append(all, Identity{Number: e.Number, Labels: e.Labels})
		}
	}
	slices.SortFunc(all, func(x, y Identity) int { return cmp.Compare(x.Number, y.Number) })
	return all, nil
}

// catchUp waits until the view holds all that the leader had stored when it was called.
func (a *Allocator) catchUp(ctx context.Context) error {
	last, err := a.keys.Last(ctx)
	if err != nil {
		return err
	}
	return a.waitView(ctx, last)
}

// counts are what this broker did.
type counts struct {
	allocated, revived, lost, collisions, released, orphans atomic.Uint64
}

// Stats is what this broker knows and did.
type Stats struct {
	// Identities and Released (those of them that are out of use) are cluster-wide; Resting numbers too.
	Identities, Released, Resting int
	// Allocated numbers, Revived released sets, Lost races for a set, number Collisions, and what was
	// collected: sets after their release, and claims without a link (Orphans). Since the start.
	Allocated, Revived, Lost, Collisions, Collected, Orphans uint64
}

// Stats returns the present figures.
func (a *Allocator) Stats() Stats {
	s := Stats{
		Allocated: a.counts.allocated.Load(), Revived: a.counts.revived.Load(), Lost: a.counts.lost.Load(),
		Collisions: a.counts.collisions.Load(), Collected: a.counts.released.Load(), Orphans: a.counts.orphans.Load(),
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.view == nil {
		return s
	}
	for _, l := range a.view.links {
		s.Identities += len(l.Entries)
		for _, e := range l.Entries {
			if !e.Released.IsZero() {
				s.Released++
			}
		}
	}
	for _, n := range a.view.numbers {
		if n.Deleted && !a.isFree(n.Entry) {
			s.Resting++
		}
	}
	return s
}
