// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// holdBack is how old a record must be before it is handed over: by then every record that is older is in its ring, since a program
// writes what it saw within microseconds.
const holdBack = time.Millisecond

// The reader also looks by itself, since programs wake it only when a ring fills: often when there is traffic, seldom when there is none.
const (
	pollMin = 2 * time.Millisecond
	pollMax = 32 * time.Millisecond
)

// Rings reads the records of all CPUs, merged by kernel time. One goroutine uses it.
//
// What was read stays in its ring, and takes room there, until Commit. The order of a safe reader: Read, seal the batch,
// SaveState with the positions that the sealed batches cover, Commit the same positions. After a crash LoadState tells a new process where
// to go on; Read then begins at the saved positions by itself.
type Rings struct {
	rings []*ring
	state *ebpf.Map
	epoll int
	poll  time.Duration
}

// State is what survives the process, in the pinned map flowstate.
type State struct {
	// Epoch and NextSequence are the agent's; 0 = never saved.
	Epoch        uint64
	NextSequence uint64
	// Positions has one entry a ring: records before it are covered by sealed batches.
	Positions []uint64
}

func newRings(maps []*ebpf.Map, state *ebpf.Map) (*Rings, error) {
	r := &Rings{state: state, epoll: -1, poll: pollMin}
	if err := r.open(maps); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

func (r *Rings) open(maps []*ebpf.Map) error {
	var err error
	if r.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	saved, err := r.LoadState()
	if err != nil {
		return err
	}
	for cpu, m := range maps {
		ring, err := mapRing(m.FD(), int(m.MaxEntries()))
		if err != nil {
			return fmt.Errorf("ring of cpu %d: %w", cpu, err)
		}
		r.rings = append(r.rings, ring)
		ring.resume(saved.Positions[cpu])
		// Edge-triggered: a ring with uncommitted records is always readable.
		ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(cpu)}
		if err := unix.EpollCtl(r.epoll, unix.EPOLL_CTL_ADD, m.FD(), &ev); err != nil {
			return fmt.Errorf("epoll: ring of cpu %d: %w", cpu, err)
		}
	}
	return nil
}

func (r *Rings) close() error {
	var errs []error
	for _, ring := range r.rings {
		errs = append(errs, ring.unmap())
	}
	r.rings = nil
	if r.epoll >= 0 {
		errs = append(errs, unix.Close(r.epoll))
		r.epoll = -1
	}
	return errors.Join(errs...)
}

// Count returns the number of rings, one a possible CPU.
func (r *Rings) Count() int { return len(r.rings) }

// Bytes returns the size of each ring.
func (r *Rings) Bytes() int { return r.rings[0].size }

// Read waits until there are records, hands them to f in order of their time, and returns their number. At most limit are handed over; pos is
// the position behind the record in ring cpu, for State.Positions. The record is valid during the call only. A record younger than a
// millisecond waits for the next call, so that order holds across rings and calls. Read returns ctx.Err() when ctx ends first, within
// tens of milliseconds. An undecodable record is handed over as nil.
func (r *Rings) Read(ctx context.Context, limit int, f func(cpu int, rec *Record, pos uint64)) (int, error) {
	for {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		n, waiting := r.drain(limit, Now()-uint64(holdBack), f)
		if n > 0 {
			r.poll = pollMin
			return n, nil
		}
		if waiting {
			r.poll = pollMin
		}
		if err := r.wait(); err != nil {
			return 0, err
		}
	}
}

// Drain hands over what is there now, however young, without waiting: for the end of a process and for tests.
func (r *Rings) Drain(limit int, f func(cpu int, rec *Record, pos uint64)) int {
	n, _ := r.drain(limit, math.MaxUint64, f)
	return n
}

// drain hands over records up to a time; waiting says that there are younger ones.
func (r *Rings) drain(limit int, until uint64, f func(cpu int, rec *Record, pos uint64)) (n int, waiting bool) {
	for _, ring := range r.rings {
		ring.refresh()
	}
	for n < limit {
		first := -1
		for cpu, ring := range r.rings {
			if ring.peek() && (first < 0 || ring.time < r.rings[first].time) {
				first = cpu
			}
		}
		if first < 0 {
			return n, waiting
		}
		ring := r.rings[first]
		if ring.time > until {
			return n, true
		}
		rec, pos := ring.take()
		f(first, rec, pos)
		n++
	}
	return n, true
}

func (r *Rings) wait() error {
	var events [8]unix.EpollEvent
	timeout := int(r.poll / time.Millisecond)
	r.poll = min(2*r.poll, pollMax)
	if _, err := unix.EpollWait(r.epoll, events[:], timeout); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// Positions returns the positions up to which records have been handed over.
func (r *Rings) Positions() []uint64 {
	out := make([]uint64, len(r.rings))
	for i, ring := range r.rings {
		out[i] = ring.read
	}
	return out
}

// Pending returns how many bytes of each ring are in use: unread, or not committed.
func (r *Rings) Pending() []int {
	out := make([]int, len(r.rings))
	for i, ring := range r.rings {
		out[i] = int(atomic.LoadUint64(ring.producer) - atomic.LoadUint64(ring.consumer))
	}
	return out
}

// SaveState writes the pinned state; do so before Commit. The kernel copies it in one go: a process that dies leaves the old or the new.
func (r *Rings) SaveState(s State) error {
	row := tcFlowstate{Epoch: s.Epoch, NextSequence: s.NextSequence}
	if copy(row.Positions[:], s.Positions) != len(s.Positions) {
		return fmt.Errorf("save state: %d positions", len(s.Positions))
	}
	if err := r.state.Put(uint32(0), &row); err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	return nil
}

// LoadState reads the pinned state.
func (r *Rings) LoadState() (State, error) {
	var row tcFlowstate
	if err := r.state.Lookup(uint32(0), &row); err != nil {
		return State{}, fmt.Errorf("load state: %w", err)
	}
	n := len(r.rings)
	if n == 0 {
		n = len(row.Positions)
	}
	return State{Epoch: row.Epoch, NextSequence: row.NextSequence, Positions: append([]uint64(nil), row.Positions[:n]...)}, nil
}

// Commit gives the room before these positions back to the kernel.
func (r *Rings) Commit(positions []uint64) error {
	if len(positions) != len(r.rings) {
		return fmt.Errorf("commit: %d positions for %d rings", len(positions), len(r.rings))
	}
	for cpu, pos := range positions {
		if err := r.rings[cpu].commit(pos); err != nil {
			return fmt.Errorf("commit ring of cpu %d: %w", cpu, err)
		}
	}
	return nil
}

// Now returns the clock of the records: CLOCK_MONOTONIC nanoseconds.
func Now() uint64 {
	var ts unix.Timespec
	// It cannot fail: the clock and the pointer are right.
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return uint64(ts.Nano())
}
