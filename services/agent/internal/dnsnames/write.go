// SPDX-License-Identifier: Apache-2.0

package dnsnames

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

const (
	sweepInterval = 500 * time.Millisecond
	retryInterval = time.Second
	logInterval   = 10 * time.Second
)

// Run writes the maps, takes away what is over and saves, until ctx ends; then it saves once more.
func (e *Engine) Run(ctx context.Context) error {
	saved := make(chan struct{})
	go func() {
		defer close(saved)
		e.keepSaved(ctx)
	}()
	defer func() { <-saved }()
	sweep := time.NewTicker(sweepInterval)
	defer sweep.Stop()
	var retry <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-e.wake:
		case <-sweep.C:
			e.sweep()
			if !e.pending() {
				continue
			}
		case <-retry:
		}
		retry = nil
		if err := e.flush(); err != nil {
			e.failed(err)
			retry = time.After(retryInterval)
		}
	}
}

func (e *Engine) failed(err error) {
	e.mu.Lock()
	e.stats.Failures++
	now := e.cfg.Now()
	quiet := now.Sub(e.lastFailure) < logInterval
	if !quiet {
		e.lastFailure = now
	}
	e.mu.Unlock()
	if !quiet {
		e.log.Error("names are not in the maps; trying again", "error", err)
	}
}

// pending reports whether removals wait to be written; what answers wait for comes by wake.
func (e *Engine) pending() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.dirty) > 0 && !e.retrying || len(e.dead) > 0
}

// Settle says that all policies are known: addresses of an earlier process that no selector matches may go.
func (e *Engine) Settle() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.settled {
		return
	}
	e.settled = true
	for _, a := range e.addresses {
		if a.foreign != 0 {
			e.dirty[a] = struct{}{}
		}
	}
	e.kick()
}

type rowWrite struct {
	policy    uint32
	set       *set
	ranges    []Range
	conflicts int
}

type addressWrite struct {
	address *address
	target  *set
}

// Flush writes what has changed. Only for before Run, which does it from then on.
func (e *Engine) Flush() error { return e.flush() }

// flush writes what has changed. Who waits for an address that could not be written hears so at once; all the rest is tried again.
func (e *Engine) flush() error {
	e.mu.Lock()
	waiters, updates := e.waiters, e.updates
	e.waiters, e.updates = nil, nil
	fresh := e.freshLocked()
	rows, policies := e.planRowsLocked()
	e.mu.Unlock()

	if err := e.disk.append(fresh); err != nil {
		// The maps matter more; the next save brings it all.
		e.unsaved(err)
	}
	badSets, badPolicies, errs := e.writeRows(rows)
	moves := e.planAddresses()
	badAddresses, err := e.writeAddresses(moves, badSets)
	errs = append(errs, err, e.deleteRows(policies, badPolicies))

	e.mu.Lock()
	for number := range badPolicies {
		e.dirtyPolicies[number] = struct{}{}
	}
	if len(badPolicies) > 0 {
		e.updates = append(updates, e.updates...)
		updates = nil
	}
	e.retrying = len(badAddresses) > 0
	e.mu.Unlock()
	for _, w := range waiters {
		e.answer(w, badAddresses)
	}
	for _, done := range updates {
		done()
	}
	return errors.Join(errs...)
}

// answer tells a waiter how it went. One whose addresses were given another set meanwhile waits for the next flush.
func (e *Engine) answer(w waiter, bad map[*address]error) {
	e.mu.Lock()
	again := false
	for _, a := range w.addresses {
		if err := bad[a]; err != nil {
			e.mu.Unlock()
			w.done(err)
			return
		}
		again = again || a.have != a.want
	}
	if again {
		e.waiters = append(e.waiters, w)
		e.kick()
	}
	e.mu.Unlock()
	if !again {
		w.done(nil)
	}
}

// planRowsLocked says which rows are not as they should be: those of new sets and of changed policies.
func (e *Engine) planRowsLocked() (writes []rowWrite, policies map[uint32]struct{}) {
	policies = e.dirtyPolicies
	e.dirtyPolicies = map[uint32]struct{}{}
	plan := func(p *namePolicy, s *set) {
		ranges, conflicts := e.rowLocked(p, s)
		if len(ranges) > 0 && !slices.Equal(ranges, e.rows[s.number][p.number]) {
			writes = append(writes, rowWrite{p.number, s, ranges, conflicts})
		}
	}
	for _, s := range e.sets {
		if s.isNew {
			for _, p := range e.policies {
				plan(p, s)
			}
			s.isNew = false
			continue
		}
		for number := range policies {
			if p := e.policies[number]; p != nil {
				plan(p, s)
			}
		}
	}
	return writes, policies
}

func (e *Engine) writeRows(writes []rowWrite) (badSets map[*set]error, badPolicies map[uint32]struct{}, errs []error) {
	badSets, badPolicies = map[*set]error{}, map[uint32]struct{}{}
	for _, w := range writes {
		err := e.cfg.Maps.SetPolicy(w.policy, w.set.number, w.ranges)
		if err != nil {
			err = fmt.Errorf("policy %d, set %d: %w", w.policy, w.set.number, err)
			badSets[w.set], badPolicies[w.policy] = err, struct{}{}
			errs = append(errs, err)
			continue
		}
		e.mu.Lock()
		if e.rows[w.set.number] == nil {
			e.rows[w.set.number] = map[uint32][]Range{}
		}
		e.rows[w.set.number][w.policy] = w.ranges
		e.stats.Conflicts += uint64(w.conflicts)
		e.mu.Unlock()
	}
	if len(badSets) > 0 {
		e.mu.Lock()
		for s := range badSets {
			s.isNew = true
		}
		e.mu.Unlock()
	}
	return badSets, badPolicies, errs
}

// planAddresses takes the addresses that are in the wrong set and whose right one has its rows.
func (e *Engine) planAddresses() []addressWrite {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []addressWrite
	for a := range e.dirty {
		switch {
		case a.want != nil && a.want.isNew:
			continue // made since the rows were planned, or they could not be written
		case a.want == nil && a.foreign != 0 && !e.settled:
			continue
		}
		delete(e.dirty, a)
		if a.want == a.have && a.foreign == 0 {
			e.forgetLocked(a)
			continue
		}
		if a.want != nil {
			a.want.refs++ // what the kernel has counts
		}
		out = append(out, addressWrite{a, a.want})
	}
	return out
}

func (e *Engine) writeAddresses(writes []addressWrite, badSets map[*set]error) (map[*address]error, error) {
	bad := map[*address]error{}
	var first error
	for _, w := range writes {
		var err error
		if w.target != nil {
			err = e.cfg.Maps.SetAddress(w.address.addr, w.target.number)
		} else {
			err = e.cfg.Maps.DeleteAddress(w.address.addr)
		}
		e.mu.Lock()
		if err != nil {
			bad[w.address] = fmt.Errorf("address %v: %w", w.address.addr, err)
			first = bad[w.address]
			e.dropSetLocked(w.target)
			e.dirty[w.address] = struct{}{}
		} else {
			e.wroteLocked(w)
		}
		e.mu.Unlock()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for a := range e.dirty {
		if err := badSets[a.want]; err != nil {
			bad[a] = err
		}
	}
	return bad, first
}

func (e *Engine) wroteLocked(w addressWrite) {
	a := w.address
	e.dropSetLocked(a.have)
	a.have = w.target
	if a.foreign != 0 {
		if e.foreign[a.foreign]--; e.foreign[a.foreign] == 0 {
			delete(e.foreign, a.foreign)
			e.dead = append(e.dead, a.foreign)
		}
		a.foreign = 0
	}
	if a.want != a.have {
		e.dirty[a] = struct{}{}
	}
	e.forgetLocked(a)
}

// deleteRows removes rows of sets that no address has, and of changed policies that have nothing for a set any more.
func (e *Engine) deleteRows(policies, bad map[uint32]struct{}) error {
	e.mu.Lock()
	var gone []Row
	dead := e.dead
	e.dead = nil
	for _, number := range dead {
		for p := range e.rows[number] {
			gone = append(gone, Row{p, number})
		}
	}
	for number := range policies {
		p := e.policies[number]
		for s, rows := range e.rows {
			if _, has := rows[number]; !has || e.foreign[s] > 0 && p != nil {
				continue
			}
			if set := e.byNumber[s]; set != nil && p != nil {
				if ranges, _ := e.rowLocked(p, set); len(ranges) > 0 {
					continue
				}
			}
			gone = append(gone, Row{number, s})
		}
	}
	e.mu.Unlock()
	var errs []error
	for _, r := range gone {
		if err := e.cfg.Maps.DeletePolicy(r.Policy, r.Set); err != nil {
			errs = append(errs, fmt.Errorf("policy %d, set %d: %w", r.Policy, r.Set, err))
			bad[r.Policy] = struct{}{}
			e.mu.Lock()
			if e.byNumber[r.Set] == nil && e.foreign[r.Set] == 0 && !slices.Contains(e.dead, r.Set) {
				e.dead = append(e.dead, r.Set)
			}
			e.mu.Unlock()
			continue
		}
		e.mu.Lock()
		if delete(e.rows[r.Set], r.Policy); len(e.rows[r.Set]) == 0 {
			delete(e.rows, r.Set)
		}
		e.mu.Unlock()
	}
	return errors.Join(errs...)
}

// adopt takes note of what the maps hold from an earlier process: it stays until what is known now has taken its place.
func (e *Engine) adopt() error {
	addresses, err := e.cfg.Maps.Addresses()
	if err != nil {
		return err
	}
	rows, err := e.cfg.Maps.Policies()
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for addr, number := range addresses {
		a := e.addresses[addr]
		if a == nil {
			a = &address{addr: addr, mappings: map[*name]*mapping{}}
			e.addresses[addr] = a
		}
		a.foreign = number
		e.foreign[number]++
		e.dirty[a] = struct{}{}
		e.lastSet = max(e.lastSet, number)
	}
	for _, r := range rows {
		if e.rows[r.Set] == nil {
			e.rows[r.Set] = map[uint32][]Range{}
			if e.foreign[r.Set] == 0 {
				e.dead = append(e.dead, r.Set)
			}
		}
		e.rows[r.Set][r.Policy] = nil
		e.lastSet = max(e.lastSet, r.Set)
	}
	return nil
}

// Entries returns what the kernel has, for those who look into it.
func (e *Engine) Entries() map[netip.Addr]uint32 {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make(map[netip.Addr]uint32, len(e.addresses))
	for addr, a := range e.addresses {
		if a.have != nil {
			out[addr] = a.have.number
		}
	}
	return out
}
