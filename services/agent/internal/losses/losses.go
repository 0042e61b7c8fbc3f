// SPDX-License-Identifier: Apache-2.0

// Package losses turns the kernel's counters of lost records into Loss records, each count told once, also across restarts.
//
// What was told counts as told for good when the batch that tells it is stored; until then a new agent tells it again, since an unsent batch dies
// with its agent.
package losses

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/bpf/datapath"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/services/agent/internal/statefile"
)

// Tracker is safe for concurrent use.
type Tracker struct {
	path     string
	counters func() (datapath.Counters, error)

	mu        sync.Mutex
	told      map[int]uint64 // by CPU
	confirmed map[int]uint64
	last      time.Time
}

const (
	kind    = "kernel-losses"
	version = 1
)

// New makes a tracker that keeps its state at path. fresh says that the kernel's counters began anew, so that what is on disk is of their
// predecessors.
func New(path string, counters func() (datapath.Counters, error), fresh bool) (*Tracker, error) {
	t := &Tracker{path: path, counters: counters, told: map[int]uint64{}, confirmed: map[int]uint64{}}
	if fresh {
		return t, t.save()
	}
	b, err := statefile.Read(path, kind, version)
	if errors.Is(err, fs.ErrNotExist) {
		return t, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &t.confirmed)
	}
	if err != nil {
		return t, fmt.Errorf("losses told by the last agent: %w", err)
	}
	for cpu, n := range t.confirmed {
		t.told[cpu] = n
	}
	return t, nil
}

// New returns one loss for each ring that lost something since the last call.
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
		total := n.Trace + n.Drop + n.Translation + n.Final
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

// Confirm takes note of a stored batch's losses.
func (t *Tracker) Confirm(list []*flowv1.Loss) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	changed := false
	for _, l := range list {
		if l.Place == flowv1.Place_PLACE_KERNEL && l.Cpu != nil {
			t.confirmed[int(*l.Cpu)] += l.Count
			changed = true
		}
	}
	if !changed {
		return nil
	}
	return t.save()
}

func (t *Tracker) save() error {
	b, err := json.Marshal(t.confirmed)
	if err != nil {
		return err
	}
	return statefile.Write(t.path, kind, version, b)
}
