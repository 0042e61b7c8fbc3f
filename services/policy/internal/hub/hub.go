// SPDX-License-Identifier: Apache-2.0

// Package hub connects the deciding state with its readers: one goroutine (Run) applies changes to
// the state and publishes snapshots; each connected agent has a Session that says what to send next
// and what was acknowledged.
//
// A session keeps no queue of changes. It remembers the snapshot that it sent last and compares: an
// agent that is slow gets fewer, larger updates, and one that stops acknowledging is closed.
package hub

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/label"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// Config bounds a hub.
type Config struct {
	// Queue is how many changes may wait to be applied; whoever brings more waits. Default 1024.
	Queue int
	// Window is how many updates an agent may leave unacknowledged before further changes are held back
	// and merged. Default 16.
	Window int
	// Chunk is how many resources one update holds at most. Default 500.
	Chunk int
	// AckTimeout closes the session of an agent whose oldest update is unacknowledged for longer.
	// Default 30 s.
	AckTimeout time.Duration
	// Spreads is how many answers to registrations may wait for an agent that does not read. Default 1024.
	Spreads int
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{Queue: 1024, Window: 16, Chunk: 500, AckTimeout: 30 * time.Second, Spreads: 1024}
}

// Numbers is the identity broker, as far as the hub needs it. Both calls return at once.
type Numbers interface {
	Want(label.Set)
	Unwant(label.Set)
}

// readyTask is what the service waits for: the numbers of all label sets of the first sync.
const readyTask = "identity numbers"

// ErrStopped is returned once the hub has ended.
var ErrStopped = errors.New("the policy service is stopping")

// Hub is made by New. All methods are safe for concurrent use.
type Hub struct {
	config  Config
	log     *slog.Logger
	numbers Numbers
	ops     chan op
	slow    *status.Loss
	report  *status.Reporter
	stopped chan struct{}
	diffs   diffs

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at every change of what is below
	current  *state.Snapshot
	last     state.Change // what made current of the one before
	synced   bool
	complete bool
	missing  int
	work     Work
	sessions map[string]*Session
	watchers map[*Watcher]struct{}
	warnings []state.Warning
}

type op struct {
	apply func(*state.State)
	reads bool          // it changes nothing
	done  chan<- uint64 // receives the revision that holds the change; nil = nobody waits
}

// New makes a hub; call Run once.
func New(config Config, log *slog.Logger, numbers Numbers, report *status.Reporter) *Hub {
	report.Waiting(readyTask)
	return &Hub{
		report:   report,
		config:   config,
		log:      log.With("component", "hub"),
		numbers:  numbers,
		ops:      make(chan op, config.Queue),
		slow:     report.Loss("agent stream", "closed: the agent did not keep up"),
		stopped:  make(chan struct{}),
		changed:  make(chan struct{}),
		current:  &state.Snapshot{},
		sessions: map[string]*Session{},
		watchers: map[*Watcher]struct{}{},
	}
}

// Run applies changes to a state, which is the hub's from now on, until ctx ends.
func (h *Hub) Run(ctx context.Context, st *state.State) error {
	defer close(h.stopped)
	batch := make([]op, 0, h.config.Queue)
	for {
		batch = batch[:0]
		select {
		case <-ctx.Done():
			return nil
		case o := <-h.ops:
			batch = append(batch, o)
		}
		// What has gathered meanwhile is computed and sent as one.
	gather:
		for len(batch) < cap(batch) {
			select {
			case o := <-h.ops:
				batch = append(batch, o)
			default:
				break gather
			}
		}
		for _, o := range batch {
			o.apply(st)
		}
		if slices.ContainsFunc(batch, func(o op) bool { return !o.reads }) {
			h.publish(st)
		}
		for _, o := range batch {
			if o.done != nil {
				o.done <- h.current.Revision // only this goroutine writes current
			}
		}
	}
}

func (h *Hub) publish(st *state.State) {
	h.askNumbers(st)
	started := time.Now()
	snapshot, change := st.Commit()
	took := time.Since(started)
	policies, invalid := st.Policies()
	for _, w := range st.TakeWarnings() {
		h.log.Warn("an object is not as it should be", "object", w.Object.String(), "warning", w.Text)
	}
	warnings := st.Warnings()
	if st.Complete() {
		h.report.Done(readyTask)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if snapshot != h.current {
		h.current, h.last = snapshot, change
	}
	h.work = Work{
		Policies: policies, Invalid: invalid, Compiler: st.Counters(), Commits: h.work.Commits + 1, CommitTime: h.work.CommitTime + took, LastCommit: took,
	}
	h.warnings = warnings
	h.synced, h.complete, h.missing = st.Synced(), st.Complete(), st.MissingNumbers()
	h.broadcastLocked()
}

func (h *Hub) askNumbers(st *state.State) {
	acquire, release := st.TakeIdentityChanges()
	for _, set := range release {
		if !st.Uses(set) {
			h.numbers.Unwant(set)
		}
	}
	for _, set := range acquire {
		if st.Uses(set) {
			h.numbers.Want(set)
		}
	}
}

func (h *Hub) broadcastLocked() {
	close(h.changed)
	h.changed = make(chan struct{})
}

// Post hands in a change and returns when it is queued. The change is called on the hub's goroutine
// and must not block.
func (h *Hub) Post(ctx context.Context, apply func(*state.State)) error {
	return h.enqueue(ctx, op{apply: apply})
}

// Do hands in a change and returns the revision of the first published snapshot that holds it.
func (h *Hub) Do(ctx context.Context, apply func(*state.State)) (uint64, error) {
	done := make(chan uint64, 1)
	if err := h.enqueue(ctx, op{apply: apply, done: done}); err != nil {
		return 0, err
	}
	select {
	case revision := <-done:
		return revision, nil
	case <-h.stopped:
		return 0, ErrStopped
	}
}

// Read calls f on the hub's goroutine; it must change nothing, and be quick.
func (h *Hub) Read(ctx context.Context, f func(*state.State)) error {
	done := make(chan uint64, 1)
	if err := h.enqueue(ctx, op{apply: f, reads: true, done: done}); err != nil {
		return err
	}
	select {
	case <-done:
		return nil
	case <-h.stopped:
		return ErrStopped
	}
}

func (h *Hub) enqueue(ctx context.Context, o op) error {
	select {
	case h.ops <- o:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-h.stopped:
		return ErrStopped
	}
}

// WaitSpread returns when every agent that is connected now, but one node's, holds a revision or is
// gone, or ctx ends. It returns the nodes that do not hold it by then, sorted.
func (h *Hub) WaitSpread(ctx context.Context, revision uint64, except string) []string {
	h.mu.Lock()
	waiting := maps.Clone(h.sessions)
	h.mu.Unlock()
	delete(waiting, except)
	for {
		h.mu.Lock()
		changed := h.changed
		for node, s := range waiting {
			if s.closed != nil || s.heldLocked() >= revision {
				delete(waiting, node)
			}
		}
		h.mu.Unlock()
		if len(waiting) == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return slices.Sorted(maps.Keys(waiting))
		}
	}
}

// Agent is what the hub knows of a connected agent.
type Agent struct {
	Node     string
	Version  string
	Instance string
	Since    time.Time
	// Held is the newest revision that the agent's maps hold.
	Held   uint64
	Synced bool
	// Unacknowledged is how many updates are under way.
	Unacknowledged int
	// Refusals are what the agent does not enforce, and why.
	Refusals map[Refused]string
}

// Status is what the hub knows of itself.
type Status struct {
	Revision       uint64
	Complete       bool
	MissingNumbers int
	Snapshot       *state.Snapshot
	Agents         []Agent
	XDS            []XDSServer
	// Faults are what proxies refused, of all xDS servers.
	Faults []ProxyFault
	// Proxies are as Hub.Proxies; only where they were asked for.
	Proxies  map[string]map[string]string
	Warnings []state.Warning
	Work
}

// Work is what the compiler has and did.
type Work struct {
	// Policies counts policy objects, Invalid those whose newest version is not valid.
	Policies, Invalid int
	Compiler          engine.Counters
	// Commits were made in CommitTime together; LastCommit is the time of the last one.
	Commits                uint64
	CommitTime, LastCommit time.Duration
}

// Status returns the present state, agents by node.
func (h *Hub) Status() Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	st := Status{Revision: h.current.Revision, Complete: h.complete, MissingNumbers: h.missing, Snapshot: h.current, Work: h.work, Warnings: h.warnings}
	st.XDS, st.Faults = h.xdsLocked()
	for _, node := range slices.Sorted(maps.Keys(h.sessions)) {
		s := h.sessions[node]
		st.Agents = append(st.Agents, Agent{
			Node: node, Version: s.version, Instance: s.instance, Since: s.since,
			Held: s.heldLocked(), Synced: s.syncedSent, Unacknowledged: len(s.outstanding),
			Refusals: maps.Clone(s.refusals),
		})
	}
	return st
}
