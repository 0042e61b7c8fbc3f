// SPDX-License-Identifier: Apache-2.0

// Package allocator gives numbers to label sets: one number per set, one set per number, with any
// number of brokers, whichever of them dies when.
//
// Two keys make an identity. `n.<number>` = set claims the number; `l.<hash>` = number makes it the
// set's. Every write names the revision that it replaces, so of two writers one fails. What makes
// that enough:
//
//   - A number belongs to who created its n key. So no number is ever linked to two sets.
//   - A set's number is what its l key says. So no set ever has two numbers.
//   - The l key is read before the number is claimed, and written with the revision that was read.
//     Whoever collects a claim without a link first writes the l key too (the fence), then deletes
//     the claim with the revision seen before. A broker that slept between its two writes therefore
//     finds its second write refused; one that goes on after a refusal renews its claim first, which
//     makes the collector's deletion fail or shows that it happened.
//   - A release removes the link first and the claim after it. What is lost of that by a crash is a
//     claim without a link.
//
// A freed number rests, counted from the deletion that its n key keeps, so all brokers agree on it.
package allocator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/internal/reserved"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/identity/internal/store"
)

// What callers branch on.
var (
	ErrExhausted = errors.New("no identity number is free")
	ErrNotFound  = errors.New("no such identity")
)

// Keys is the store, as far as the allocator needs it. See package store for the contract.
type Keys interface {
	Get(ctx context.Context, key string) (store.Entry, error)
	Put(ctx context.Context, key string, value []byte, expected uint64) (uint64, error)
	Delete(ctx context.Context, key string, expected uint64) (uint64, error)
	Forget(ctx context.Context, key string, revision uint64) error
	Last(ctx context.Context) (uint64, error)
	Open(ctx context.Context) error
	Watch(ctx context.Context, each func(store.Entry), caughtUp func(uint64)) error
}

// Config says how numbers are given. Zero values are not defaults: begin with DefaultConfig.
type Config struct {
	// Min and Max bound the numbers.
	Min, Max uint32
	// Rest is how long a freed number is not given again.
	Rest time.Duration
	// ReleaseWait is how long a released set keeps its number.
	ReleaseWait time.Duration
	// OrphanGrace is how old a claim without a link must be before it is collected. It only spares
	// work: collecting is safe at any age.
	OrphanGrace time.Duration
	// CollectEvery is how often what is due is collected.
	CollectEvery time.Duration
	// Forget is how long, after Rest, a deletion is kept. A broker that slept for longer than both
	// between its two writes is not guarded against.
	Forget time.Duration

	// Hash and Next are replaced by tests to force collisions. Next returns the number to try after
	// another one; nil = the one above, round robin.
	Hash func(labelset.Set) string
	Next func(after uint32) uint32
	Now  func() time.Time
	// Claimed is called between the two writes, if not nil; an error ends the call as a crash would.
	Claimed func(set labelset.Set, number uint32) error
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{
		Min: reserved.FirstGiven, Max: reserved.LastGiven,
		Rest: 24 * time.Hour, ReleaseWait: 10 * time.Minute, OrphanGrace: 10 * time.Minute,
		CollectEvery: 30 * time.Second, Forget: 24 * time.Hour,
		Hash: hashLabels, Now: time.Now,
	}
}

// Allocator is one broker's. Make it with New; safe for concurrent use.
type Allocator struct {
	config Config
	keys   Keys
	log    *slog.Logger
	report *status.Reporter
	broken *status.Loss
	counts counts

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when the view changes
	view    *view         // nil until caught up once
	cursor  uint32
	locks   map[string]*hashLock
}

// readyTask is what the service waits for.
const readyTask = "nats"

// New makes an allocator; Run must run for anything else to work.
func New(config Config, keys Keys, log *slog.Logger, report *status.Reporter) *Allocator {
	report.Waiting(readyTask)
	return &Allocator{
		config:  config,
		keys:    keys,
		log:     log.With("component", "allocator"),
		report:  report,
		broken:  report.Loss("identity bucket", "value that cannot be read, or link without claim"),
		changed: make(chan struct{}),
		locks:   map[string]*hashLock{},
	}
}

// Allocate returns the number of a set, giving it one when it has none. A set that is being
// released keeps its number.
func (a *Allocator) Allocate(ctx context.Context, set labelset.Set) (uint32, error) {
	hash := a.config.Hash(set)
	unlock, err := a.lock(ctx, hash)
	if err != nil {
		return 0, err
	}
	defer unlock()

	var own *ownClaim
	for {
		// First the link, then the claim: see the package comment.
		entry, l, err := a.readLink(ctx, hash)
		if err != nil {
			return 0, err
		}
		if e, ok := l.find(set); ok {
			if own != nil {
				a.counts.lost.Add(1)
				a.giveBack(ctx, own)
				own = nil
			}
			if e.Released.IsZero() {
				return e.Number, nil
			}
			e.Released = time.Time{}
			if err := a.writeLink(ctx, entry, l.with(e)); err == nil {
				a.counts.revived.Add(1)
				return e.Number, nil
			} else if !errors.Is(err, store.ErrConflict) {
				return 0, err
			}
			continue
		}
		if own, err = a.claimFor(ctx, set, own); err != nil {
			return 0, err
		}
		if own == nil {
			continue // it was collected meanwhile
		}
		if a.config.Claimed != nil {
			if err := a.config.Claimed(set, own.number); err != nil {
				return 0, err
			}
		}
		err = a.writeLink(ctx, entry, l.with(linkEntry{Number: own.number, Labels: set}))
		if err == nil {
			a.counts.allocated.Add(1)
			return own.number, nil
		}
		if !errors.Is(err, store.ErrConflict) {
			// It may have been written: then the next call finds it, else the claim is collected.
			return 0, err
		}
	}
}

// ownClaim is a number that this call claimed.
type ownClaim struct {
	number   uint32
	revision uint64
}

// claimFor claims a number for a set or, with one already claimed, renews that; nil = it is gone.
func (a *Allocator) claimFor(ctx context.Context, set labelset.Set, own *ownClaim) (*ownClaim, error) {
	value := encode(claim{Labels: set})
	if own != nil {
		revision, err := a.keys.Put(ctx, numberKey(own.number), value, own.revision)
		if errors.Is(err, store.ErrConflict) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		return &ownClaim{own.number, revision}, nil
	}
	if err := a.waitView(ctx, 0); err != nil {
		return nil, err
	}
	caughtUp := false
	for tries := uint32(0); tries <= a.config.Max-a.config.Min; tries++ {
		number, expected, ok := a.pick()
		if !ok && !caughtUp {
			// The view follows the writes: a number may have become free that it does not know of yet.
			if err := a.catchUp(ctx); err != nil {
				return nil, err
			}
			caughtUp = true
			number, expected, ok = a.pick()
		}
		if !ok {
			break
		}
		for range 2 {
			revision, err := a.keys.Put(ctx, numberKey(number), value, expected)
			if err == nil {
				return &ownClaim{number, revision}, nil
			}
			if !errors.Is(err, store.ErrConflict) {
				return nil, err
			}
			// The view was behind. Look at the leader's: the number may be free all the same.
			a.counts.collisions.Add(1)
			entry, err := a.keys.Get(ctx, numberKey(number))
			if err != nil {
				return nil, err
			}
			a.observe(entry)
			if !a.isFree(entry) {
				break
			}
			expected = entry.Revision
		}
	}
	return nil, ErrExhausted
}

// giveBack deletes the claim of who came second. If that fails it is collected later.
func (a *Allocator) giveBack(ctx context.Context, own *ownClaim) {
	if _, err := a.keys.Delete(ctx, numberKey(own.number), own.revision); err != nil {
		a.log.Debug("claim was not given back, it will be collected", "number", own.number, "error", err)
	}
}

// isFree reports whether a number can be claimed: it never was, or it has rested.
func (a *Allocator) isFree(e store.Entry) bool {
	if e.Revision == 0 {
		return true
	}
	return e.Deleted && a.config.Now().Sub(e.Time) >= a.config.Rest
}

// pick returns the next number that looks free, and the revision to claim it with.
func (a *Allocator) pick() (number uint32, expected uint64, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for tries := uint32(0); tries <= a.config.Max-a.config.Min; tries++ {
		a.cursor = a.next(max(a.cursor, a.config.Min-1))
		entry := a.view.numbers[a.cursor]
		if a.isFree(entry.Entry) {
			return a.cursor, entry.Revision, true
		}
	}
	return 0, 0, false
}

func (a *Allocator) next(after uint32) uint32 {
	next := after + 1
	if a.config.Next != nil {
		next = a.config.Next(after)
	}
	if next < a.config.Min || next > a.config.Max {
		return a.config.Min
	}
	return next
}

// Release says that a set is out of use: it keeps its number for ReleaseWait. A set without a number
// is fine.
func (a *Allocator) Release(ctx context.Context, set labelset.Set) error {
	hash := a.config.Hash(set)
	unlock, err := a.lock(ctx, hash)
	if err != nil {
		return err
	}
	defer unlock()
	for {
		entry, l, err := a.readLink(ctx, hash)
		if err != nil {
			return err
		}
		e, ok := l.find(set)
		if !ok || !e.Released.IsZero() {
			return nil
		}
		e.Released = a.config.Now().UTC()
		if err := a.writeLink(ctx, entry, l.with(e)); !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
}

// Get returns the set of a number.
func (a *Allocator) Get(ctx context.Context, number uint32) (labelset.Set, error) {
	entry, err := a.keys.Get(ctx, numberKey(number))
	if err != nil {
		return nil, err
	}
	if !entry.Exists() {
		return nil, ErrNotFound
	}
	c, err := decodeClaim(entry.Value)
	if err != nil {
		a.broken.Add(1)
		return nil, fmt.Errorf("%s: %w", entry.Key, err)
	}
	_, l, err := a.readLink(ctx, a.config.Hash(c.Labels))
	if err != nil {
		return nil, err
	}
	if e, ok := l.find(c.Labels); !ok || e.Number != number {
		return nil, ErrNotFound // claimed, and not (or no longer) an identity
	}
	return c.Labels, nil
}

// readLink reads an l key from the leader.
func (a *Allocator) readLink(ctx context.Context, hash string) (store.Entry, link, error) {
	entry, err := a.keys.Get(ctx, linkKey(hash))
	if err != nil || !entry.Exists() {
		return entry, link{}, err
	}
	l, err := decodeLink(entry.Value)
	if err != nil {
		// Never taken as empty: that would give the sets in it second numbers.
		a.broken.Add(1)
		return entry, link{}, fmt.Errorf("%s: %w", entry.Key, err)
	}
	return entry, l, nil
}

// writeLink replaces an l key as it was read; one without entries is deleted.
func (a *Allocator) writeLink(ctx context.Context, read store.Entry, l link) error {
	if len(l.Entries) == 0 {
		_, err := a.keys.Delete(ctx, read.Key, read.Revision)
		return err
	}
	_, err := a.keys.Put(ctx, read.Key, encode(l), read.Revision)
	return err
}

// hashLock keeps calls of this broker for one hash from racing each other. It spares conflicts; what
// is correct does not depend on it.
type hashLock struct {
	held  chan struct{}
	users int
}

func (a *Allocator) lock(ctx context.Context, hash string) (unlock func(), err error) {
	a.mu.Lock()
	l := a.locks[hash]
	if l == nil {
		l = &hashLock{held: make(chan struct{}, 1)}
		a.locks[hash] = l
	}
	l.users++
	a.mu.Unlock()
	drop := func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(a.locks, hash)
		}
	}
	select {
	case l.held <- struct{}{}:
		return func() { <-l.held; drop() }, nil
	case <-ctx.Done():
		drop()
		return nil, ctx.Err()
	}
}
