// SPDX-License-Identifier: Apache-2.0

package dnsnames

import (
	"cmp"
	"container/heap"
	"net/netip"
	"slices"
	"time"
)

// Reading all connections costs time: at most this part of it.
const (
	scanShare    = 50
	scanInterval = time.Second
	scanMax      = 30 * time.Second
)

// sweep takes away mappings whose time is over and that no live connection uses.
func (e *Engine) sweep() {
	e.mu.Lock()
	now := e.cfg.Now()
	for len(e.expiring) > 0 && !e.expiring[0].expires.After(now) {
		m, _ := heap.Pop(&e.expiring).(*mapping)
		e.keepLocked(m)
	}
	due := len(e.kept) > 0 && !now.Before(e.nextScan)
	e.mu.Unlock()
	if !due {
		return
	}
	began := time.Now()
	live, err := e.cfg.Live()
	took := time.Since(began)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.nextScan = now.Add(min(max(scanInterval, scanShare*took), scanMax))
	if err != nil {
		// Nobody knows who is in use: all stay.
		e.stats.Failures++
		e.log.Warn("live connections were not read; names that are over stay", "error", err)
	} else {
		e.dropUnusedLocked(live, e.cfg.Now())
	}
	e.boundKeptLocked()
}

func (e *Engine) dropUnusedLocked(live map[netip.Addr]struct{}, now time.Time) {
	for m := range e.kept {
		if _, used := live[m.address.addr]; used {
			m.used = now
			continue
		}
		if m.used.IsZero() || !now.Before(m.used.Add(e.cfg.Grace)) {
			e.stats.Expired++
			e.removeLocked(m)
		}
	}
}

// boundKeptLocked bounds what only live connections keep; what was over first goes first.
func (e *Engine) boundKeptLocked() {
	over := len(e.kept) - e.cfg.MaxKept
	if over <= 0 {
		return
	}
	all := make([]*mapping, 0, len(e.kept))
	for m := range e.kept {
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b *mapping) int {
		return cmp.Or(a.expires.Compare(b.expires), a.address.addr.Compare(b.address.addr))
	})
	for _, m := range all[:over] {
		e.stats.Evicted++
		e.removeLocked(m)
	}
}
