// SPDX-License-Identifier: Apache-2.0

// Package losses makes sure that each loss is told once, also across restarts: it turns the kernel's counters of lost records into Loss records, and
// keeps every batch that tells of a loss on disk until it is stored. An agent that dies before that leaves the batch to the next one, which sends
// the same bytes under the same numbers, so that whoever has them already knows it.
package losses

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/bpf/datapath"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/services/agent/internal/batch"
	"github.com/weirmesh/weir/services/agent/internal/statefile"
)

// maxPending bounds the batches on disk. While so many wait, nothing more is told: the kernel's counters keep it.
const maxPending = 64

// Tracker is safe for concurrent use.
type Tracker struct {
	path     string
	counters func() (datapath.Counters, error)

	mu      sync.Mutex
	told    map[int]uint64 // by CPU
	pending []*batch.Sealed
	last    time.Time
}

type file struct {
	Told    map[int]uint64  `json:"told"`
	Pending []*batch.Sealed `json:"pending"`
}

const (
	kind    = "losses"
	version = 1
)

// New makes a tracker that keeps its state at path. fresh says that the kernel's counters began anew, so that what was told is of their predecessors.
func New(path string, counters func() (datapath.Counters, error), fresh bool) (*Tracker, error) {
	t := &Tracker{path: path, counters: counters, told: map[int]uint64{}}
	b, err := statefile.Read(path, kind, version)
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	var f file
	if err == nil {
		err = json.Unmarshal(b, &f)
	}
	if err != nil {
		return t, fmt.Errorf("losses told by the last agent: %w", err)
	}
	t.pending = f.Pending
	if !fresh && f.Told != nil {
		t.told = f.Told
	}
	return t, nil
}

// Pending returns the batches of earlier agents that may not have arrived, oldest first.
func (t *Tracker) Pending() []*batch.Sealed {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.pending)
}

// Room says whether one more batch may be kept.
func (t *Tracker) Room() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.pending) < maxPending
}

// New returns one loss for each ring that lost something since the last call. The caller tells it in a batch and gives that to Keep.
func (t *Tracker) New(now time.Time) ([]*flowv1.Loss, error) {
	c, err := t.counters()
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	first := t.last
	t.last = now
	var list []*flowv1.Loss
	for cpu, n := range c.LostByCPU {
		total := n.Total()
		if total <= t.told[cpu] {
			continue
		}
		l := &flowv1.Loss{Place: flowv1.Place_PLACE_KERNEL, Cause: flowv1.Cause_CAUSE_FULL, Count: total - t.told[cpu],
			Cpu: proto.Uint32(uint32(cpu)), LastTime: now.UnixNano()}
		if !first.IsZero() {
			l.FirstTime = first.UnixNano()
		}
		list = append(list, l)
		t.told[cpu] = total
	}
	return list, nil
}

// Keep writes a batch that tells of losses to disk, together with what it tells. Batches that it stands in for are forgotten in the same step.
func (t *Tracker) Keep(b *batch.Sealed, insteadOf []*batch.Sealed) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, old := range insteadOf {
		t.forget(old)
	}
	t.pending = append(t.pending, b)
	return t.save()
}

// Stored takes note that a batch has arrived.
func (t *Tracker) Stored(b *batch.Sealed) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.forget(b) {
		return nil
	}
	return t.save()
}

func (t *Tracker) forget(b *batch.Sealed) bool {
	n := len(t.pending)
	t.pending = slices.DeleteFunc(t.pending, func(p *batch.Sealed) bool { return p.Epoch == b.Epoch && p.First == b.First })
	return len(t.pending) < n
}

func (t *Tracker) save() error {
	b, err := json.Marshal(file{t.told, t.pending})
	if err != nil {
		return err
	}
	return statefile.Write(t.path, kind, version, b)
}
