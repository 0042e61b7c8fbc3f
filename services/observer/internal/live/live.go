// SPDX-License-Identifier: Apache-2.0

// Package live reads the stream's end into memory.
package live

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/intake"
	"github.com/weirmesh/weir/services/observer/internal/nodes"
	"github.com/weirmesh/weir/services/observer/internal/store"
	"github.com/weirmesh/weir/services/observer/internal/stream"
)

// Config says what is read, and where it goes.
type Config struct {
	Stream      *stream.Stream
	Order       intake.Config
	ReplayBytes uint64
	Flows       *store.Store
	AgentEvents *store.Store
	Nodes       *nodes.Registry
	OnGap       func(*event.Gap)
	// OnCaughtUp is called when the end of the stream is reached for the first time.
	OnCaughtUp func()
}

const (
	// queueLen is how many messages wait between the network and the pipeline.
	queueLen = 8
	// tick is how often waiting records are looked at while no message comes.
	tick = 20 * time.Millisecond
	// retryWait is how soon the stream is looked for again.
	retryWait = 250 * time.Millisecond
)

// Reader reads.
type Reader struct {
	config Config
	log    *slog.Logger

	mu       sync.Mutex
	counters intake.Counters
	cut      uint64
	position uint64
}

// New makes a reader.
func New(config Config, log *slog.Logger) *Reader {
	return &Reader{config: config, log: log.With("component", "live")}
}

// Counters returns what was read so far, and how many records were handed on early.
func (r *Reader) Counters() (intake.Counters, uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.counters, r.cut
}

// Position returns the place of the last message read.
func (r *Reader) Position() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.position
}

// Run reads until ctx ends.
func (r *Reader) Run(ctx context.Context) error {
	state, ok := r.find(ctx)
	if !ok {
		return nil
	}
	start, fromStart := state.Start(r.config.ReplayBytes)
	r.log.Info("reading the stream", "from", start, "first", state.FirstSeq, "last", state.LastSeq, "bytes", state.Bytes)
	r.config.Flows.SetStart(start)
	memory := intake.NewMemory(r.config.Flows, r.config.AgentEvents, r.config.OnGap)
	order := r.config.Order
	order.FromStart = fromStart
	pipeline := intake.New(order, memory, r.config.Nodes, r.log)
	if state.LastSeq < start {
		r.config.OnCaughtUp()
	}
	queue := make(chan stream.Item, queueLen)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return r.config.Stream.Follow(ctx, start, state.Created, queue) })
	group.Go(func() error { return r.pump(ctx, pipeline, memory, queue) })
	return group.Wait()
}

// find waits for the stream, which the relays make.
func (r *Reader) find(ctx context.Context) (stream.State, bool) {
	for {
		state, err := r.config.Stream.State(ctx)
		if err == nil {
			return state, true
		}
		r.log.Debug("no stream yet", "error", err)
		select {
		case <-ctx.Done():
			return stream.State{}, false
		case <-time.After(retryWait):
		}
	}
}

// pump moves messages, and the time, through the pipeline.
func (r *Reader) pump(ctx context.Context, pipeline *intake.Pipeline, memory *intake.Memory, queue <-chan stream.Item) error {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	caughtUp := false
	// clock is the stream's clock: JetStream's time stamps, and between them, once the end of the
	// stream is reached, our own clock's pace.
	var clock int64
	wall := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case item := <-queue:
			wall = time.Now()
			if item.Restarted {
				pipeline.Restarted()
				continue
			}
			pipeline.Message(item.Message)
			clock = max(clock, item.Message.Time)
			if item.Pending == 0 && !caughtUp {
				caughtUp = true
				r.config.OnCaughtUp()
			}
		case now := <-ticker.C:
			if clock == 0 || !caughtUp {
				continue
			}
			clock += int64(now.Sub(wall))
			wall = now
			pipeline.Tick(clock, !r.config.Stream.Connected())
		}
		memory.Commit()
		r.mu.Lock()
		r.counters, r.cut, r.position = pipeline.Counters(), pipeline.Cut(), pipeline.Last()
		r.mu.Unlock()
	}
}
