// SPDX-License-Identifier: Apache-2.0

package hub

import (
	"sync"

	"github.com/weirmesh/weir/services/policy/internal/state"
)

// maxDiffs is how many comparisons of snapshots are remembered.
const maxDiffs = 16

// diffs remembers comparisons: agents that are equally far behind, or begin at the same time, share one.
type diffs struct {
	mu  sync.Mutex
	all []*diff // oldest first
}

type diff struct {
	old, new *state.Snapshot
	once     sync.Once
	change   state.Change
}

func (d *diffs) get(old, new *state.Snapshot) state.Change {
	d.mu.Lock()
	var found *diff
	for _, x := range d.all {
		if x.old == old && x.new == new {
			found = x
		}
	}
	if found == nil {
		found = &diff{old: old, new: new}
		if len(d.all) >= maxDiffs {
			d.all = append(d.all[:0:0], d.all[1:]...)
		}
		d.all = append(d.all, found)
	}
	d.mu.Unlock()
	found.once.Do(func() { found.change = state.Diff(old, new) })
	return found.change
}
