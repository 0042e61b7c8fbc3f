// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
)

// Rings reads the records of all CPUs, merged by kernel time. One goroutine uses it.
//
// What was read stays in its ring, and takes room there, until Commit. The order of a safe reader: Read, seal the batch,
// SaveState with the positions that the sealed batches cover, Commit the same positions. After a crash LoadState tells a new process where
// to go on; Read then begins at the saved positions by itself.
type Rings struct{}

// State is what survives the process, in the pinned map flowstate.
type State struct {
	// Epoch and NextSequence are the agent's; 0 = never saved.
	Epoch        uint64
	NextSequence uint64
	// Positions has one entry a ring: records before it are covered by sealed batches.
	Positions []uint64
}

// Count returns the number of rings, one a possible CPU.
func (r *Rings) Count() int { return 0 }

// Bytes returns the size of each ring.
func (r *Rings) Bytes() int { return 0 }

// Read waits until there are records, hands them to f in order of their time, and returns their number. At most max are handed over; pos is
// the position behind the record in ring cpu, for State.Positions. The record is valid during the call only. A record younger than a
// millisecond waits for the next call, so that order holds across rings and calls. It returns ctx.Err() when ctx ends first.
// An undecodable record is handed over as nil.
func (r *Rings) Read(ctx context.Context, max int, f func(cpu int, rec *Record, pos uint64)) (int, error) {
	return 0, errors.ErrUnsupported
}

// Positions returns the positions up to which Read has handed over records.
func (r *Rings) Positions() []uint64 { return nil }

// SaveState writes the pinned state; do so before Commit.
func (r *Rings) SaveState(s State) error { return errors.ErrUnsupported }

// LoadState reads the pinned state.
func (r *Rings) LoadState() (State, error) { return State{}, errors.ErrUnsupported }

// Commit gives the room before these positions back to the kernel.
func (r *Rings) Commit(positions []uint64) error { return errors.ErrUnsupported }

// Now returns the clock of the records: CLOCK_MONOTONIC nanoseconds.
func Now() uint64 { return 0 }
