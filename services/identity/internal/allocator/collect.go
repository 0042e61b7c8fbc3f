// SPDX-License-Identifier: Apache-2.0

package allocator

import (
	"context"
	"errors"
	"time"

	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/services/identity/internal/store"
)

// collectLoop collects at intervals. Several brokers may do so at once.
func (a *Allocator) collectLoop(ctx context.Context) {
	ticker := time.NewTicker(a.config.CollectEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if err := a.Collect(ctx); err != nil && ctx.Err() == nil {
			a.log.Warn("collection of identities was cut short, it goes on next time", "error", err)
		}
	}
}

// Collect removes sets whose release is old enough, claims without a link, and deletions that need
// no longer be remembered. It looks for candidates in the view and decides by what the leader says.
func (a *Allocator) Collect(ctx context.Context) error {
	last, err := a.keys.Last(ctx)
	if err != nil {
		return err
	}
	if err := a.waitView(ctx, last); err != nil {
		return err
	}
	due := a.candidates()
	for _, r := range due.released {
		if err := a.finishRelease(ctx, r); err != nil {
			return err
		}
	}
	for _, number := range due.orphans {
		if err := a.collectOrphan(ctx, number); err != nil {
			return err
		}
	}
	for _, u := range due.unclaimed {
		if err := a.audit(ctx, u); err != nil {
			return err
		}
	}
	for _, e := range due.forgettable {
		if err := a.keys.Forget(ctx, e.Key, e.Revision); err != nil {
			return err
		}
		a.forget(e)
	}
	return nil
}

// due is what there may be to collect.
type due struct {
	released    []released
	orphans     []uint32
	unclaimed   []unclaimed
	forgettable []store.Entry
}

// unclaimed is a link to a number without a claim, which must not be.
type unclaimed struct {
	number uint32
	hash   string
}

type released struct {
	hash   string
	labels labelset.Set
}

func (a *Allocator) candidates() due {
	a.mu.Lock()
	defer a.mu.Unlock()
	var d due
	now := a.config.Now()
	linked := map[uint32]string{}
	for hash, l := range a.view.links {
		for _, e := range l.Entries {
			linked[e.Number] = hash
			if a.releaseDue(e, now) {
				d.released = append(d.released, released{hash, e.Labels})
			}
		}
		if l.Deleted && now.Sub(l.Time) >= a.config.Rest+a.config.Forget {
			d.forgettable = append(d.forgettable, l.Entry)
		}
	}
	for number, n := range a.view.numbers {
		switch {
		case n.labels != nil && linked[number] == "" && now.Sub(n.Time) >= a.config.OrphanGrace:
			d.orphans = append(d.orphans, number)
		case n.Deleted && now.Sub(n.Time) >= a.config.Rest+a.config.Forget:
			d.forgettable = append(d.forgettable, n.Entry)
		}
	}
	for number, hash := range linked {
		if a.view.numbers[number].labels == nil {
			d.unclaimed = append(d.unclaimed, unclaimed{number, hash})
		}
	}
	return d
}

func (a *Allocator) releaseDue(e linkEntry, now time.Time) bool {
	return !e.Released.IsZero() && now.Sub(e.Released) >= a.config.ReleaseWait
}

// finishRelease removes the link of a released set, then its claim.
func (a *Allocator) finishRelease(ctx context.Context, r released) error {
	entry, l, err := a.readLink(ctx, r.hash)
	if err != nil {
		return err
	}
	e, ok := l.find(r.labels)
	if !ok || !a.releaseDue(e, a.config.Now()) {
		return nil // asked for again, or another broker was faster
	}
	// Read before the link goes: once it is gone, the same set may claim the same number again, and
	// that claim must not be deleted.
	n, err := a.keys.Get(ctx, numberKey(e.Number))
	if err != nil {
		return err
	}
	if err := a.writeLink(ctx, entry, l.without(r.labels)); err != nil {
		return ignoreConflict(err)
	}
	a.counts.released.Add(1)
	_, err = a.keys.Delete(ctx, n.Key, n.Revision)
	return ignoreConflict(err)
}

// collectOrphan removes a claim without a link. The order of its four steps is what makes it safe
// against a broker that is between claim and link: see the package comment.
func (a *Allocator) collectOrphan(ctx context.Context, number uint32) error {
	n, err := a.keys.Get(ctx, numberKey(number))
	if err != nil {
		return err
	}
	if !n.Exists() || a.config.Now().Sub(n.Time) < a.config.OrphanGrace {
		return nil
	}
	c, err := decodeClaim(n.Value)
	if err != nil {
		return nil // counted by the view; never taken for free
	}
	entry, l, err := a.readLink(ctx, a.config.Hash(c.Labels))
	if err != nil {
		return err
	}
	if e, ok := l.find(c.Labels); ok && e.Number == number {
		return nil
	}
	if err := a.writeLink(ctx, entry, l); err != nil { // the fence: same content, new revision
		return ignoreConflict(err)
	}
	if _, err := a.keys.Delete(ctx, n.Key, n.Revision); err != nil {
		return ignoreConflict(err)
	}
	a.counts.orphans.Add(1)
	a.log.Info("claim without a link collected", "number", number)
	return nil
}

// audit reports a link without a claim, if the leader says so too. It repairs nothing: that state
// cannot come about by what the brokers do, so somebody else wrote or lost the key.
func (a *Allocator) audit(ctx context.Context, u unclaimed) error {
	n, err := a.keys.Get(ctx, numberKey(u.number))
	if err != nil || n.Exists() {
		return err
	}
	_, l, err := a.readLink(ctx, u.hash)
	if err != nil {
		return err
	}
	for _, e := range l.Entries {
		if e.Number == u.number {
			a.broken.Add(1)
			a.log.Error("an identity has a link and no claim: its number could be given twice", "number", u.number, "labels", e.Labels)
		}
	}
	return nil
}

// forget drops a forgotten deletion from the view, unless the key lives again.
func (a *Allocator) forget(e store.Entry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if number, ok := parseNumberKey(e.Key); ok {
		if a.view.numbers[number].Revision == e.Revision {
			delete(a.view.numbers, number)
		}
		return
	}
	hash := e.Key[len(linkPrefix):]
	if a.view.links[hash].Revision == e.Revision {
		delete(a.view.links, hash)
	}
}

// ignoreConflict: another broker did it, or the set is in use again; the next round looks anew.
func ignoreConflict(err error) error {
	if errors.Is(err, store.ErrConflict) {
		return nil
	}
	return err
}
