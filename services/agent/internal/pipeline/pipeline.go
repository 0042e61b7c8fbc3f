// SPDX-License-Identifier: Apache-2.0

// Package pipeline is the way of a flow through the agent: it reads the kernel's records in the order of their time, encodes, numbers and seals
// them, and hands the batches to the spool. One goroutine does all of it.
//
// Order matters: a batch is sealed, then the pinned state says what it covers, then it may be sent, and last the rings' room is given back. A
// process that dies in between loses nothing that it has not numbered, and the next one can say which numbers may be missing. What tells of losses
// that have no numbers goes in batches of its own, which are on disk before they may be sent.
package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/services/agent/internal/batch"
	"github.com/weirmesh/weir/services/agent/internal/event"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/request"
	"github.com/weirmesh/weir/services/agent/internal/spool"
)

// Rings are the kernel's rings and their pinned state (datapath.Rings).
type Rings interface {
	Count() int
	Bytes() int
	Read(ctx context.Context, max int, f func(cpu int, rec *datapath.Record, pos uint64)) (int, error)
	SaveState(datapath.State) error
	LoadState() (datapath.State, error)
	Commit(positions []uint64) error
}

// Losses keeps what is told of losses (losses.Tracker).
type Losses interface {
	// Pending are batches of earlier agents that may not have arrived.
	Pending() []*batch.Sealed
	// Room says whether one more batch may be kept.
	Room() bool
	// New returns the kernel's losses that were not told yet.
	New(now time.Time) ([]*flowv1.Loss, error)
	// Keep makes a batch of losses outlive this process until it has arrived, instead of others that were dropped.
	Keep(b *batch.Sealed, insteadOf []*batch.Sealed) error
}

// Config says what a pipeline works on.
type Config struct {
	Node, Cluster string
	Rings         Rings
	Losses        Losses
	Encoder       *flow.Encoder
	Spool         *spool.Spool
	Events        *event.Queue
	// Requests are what proxies and weir-dns saw; nil = there are none.
	Requests *request.Queue
	// Ended says up to which number of which epoch everything was acknowledged when the last agent ended; zero = not known.
	Ended Ended
	// Observe, if set, sees every record before it is encoded. It must not keep the record nor block.
	Observe func(cpu int, r *datapath.Record)
	// Lost counts losses for status and metrics.
	Lost func(place flowv1.Place, cause flowv1.Cause, n uint64)
	Now  func() time.Time
	Log  *slog.Logger
}

// Ended is a watermark.
type Ended struct {
	Epoch uint64 `json:"epoch"`
	Last  uint64 `json:"last"`
}

const (
	// sealAfter bounds how long a record waits for others.
	sealAfter = 100 * time.Millisecond
	// minPause and maxPause bound the time between two readings while records come. A reading costs some ten microseconds whatever it brings, which is
	// more than a few flows; a long pause makes it bring many.
	minPause = time.Millisecond
	maxPause = 10 * time.Millisecond
	// lossInterval is how often the kernel's loss counters are read.
	lossInterval = time.Second
)

// Stats counts since the start.
type Stats struct {
	Epoch, Next, Flows, Records, Batches, Invalid uint64
}

// Pipeline runs once.
type Pipeline struct {
	cfg Config
	log *slog.Logger

	node      atomic.Pointer[flow.Node] // to be taken over by the encoder
	sealer    *batch.Sealer
	positions []uint64
	opened    time.Time // of the first record in the sealer
	pause     *time.Timer
	pauseTime time.Duration
	lossesDue time.Time
	emit      func(*flow.Flow)
	room      [64]*flow.Request // those that are encoded now
	// Not told yet.
	invalid, eventsDropped uint64
	requestsLost           request.Losses
	untold                 []*batch.Sealed

	epoch, next, flows, records, batches, invalidAll atomic.Uint64
}

// New makes a pipeline.
func New(cfg Config) *Pipeline {
	p := &Pipeline{cfg: cfg, log: cfg.Log.With("component", "pipeline")}
	p.emit = func(f *flow.Flow) { p.sealer.AddFlow(f.Time, f.Body, f.Stats, f.Meta) }
	return p
}

// Stats returns the counters.
func (p *Pipeline) Stats() Stats {
	return Stats{Epoch: p.epoch.Load(), Next: p.next.Load(), Flows: p.flows.Load(), Records: p.records.Load(),
		Batches: p.batches.Load(), Invalid: p.invalidAll.Load()}
}

// SetNode changes what all flows have in common, from the next read on. Safe for concurrent use.
func (p *Pipeline) SetNode(n flow.Node) { p.node.Store(&n) }

// Begin takes over from the last agent and starts a new epoch, whose first record says what of the old one may be missing.
func (p *Pipeline) Begin() error {
	old, err := p.cfg.Rings.LoadState()
	if err != nil {
		return fmt.Errorf("load flow state: %w", err)
	}
	now := p.cfg.Now()
	// Higher than the last one even when the pinned state is gone: time goes on.
	epoch := max(old.Epoch+1, uint64(now.UnixMilli()))
	p.positions = make([]uint64, p.cfg.Rings.Count())
	copy(p.positions, old.Positions)
	p.sealer = batch.NewSealer(p.cfg.Node, p.cfg.Cluster, epoch)
	p.epoch.Store(epoch)
	p.next.Store(1)
	// A ring holds a record of some 224 bytes a microsecond for at least the pause: a million records a second on one CPU.
	p.pauseTime = min(max(time.Duration(p.cfg.Rings.Bytes()/256)*time.Microsecond, minPause), maxPause)
	p.pause = time.NewTimer(maxPause)
	p.pause.Stop()

	last := old.NextSequence - 1
	if old.NextSequence == 0 {
		last = 0
	}
	for _, b := range p.cfg.Losses.Pending() {
		p.cfg.Spool.Resume(b)
		if b.Epoch == old.Epoch {
			// It may be on disk, and sent by us now, though its agent died before it saved the state.
			last = max(last, b.Last())
		}
	}
	first := uint64(1)
	if p.cfg.Ended.Epoch == old.Epoch {
		first = p.cfg.Ended.Last + 1
	}
	if old.Epoch != 0 && first <= last {
		// How many of them did not arrive, only the observer can tell.
		p.sealer.AddLoss(now.UnixNano(), &flowv1.Loss{Place: flowv1.Place_PLACE_SPOOL, Cause: flowv1.Cause_CAUSE_RESTART,
			Count: last - first + 1, Epoch: old.Epoch, First: first, Last: last, LastTime: now.UnixNano()})
		if err := p.sealLosses(nil); err != nil {
			return err
		}
	}
	p.log.Info("epoch begins", "epoch", epoch, "lastEpoch", old.Epoch, "lastNext", old.NextSequence)
	return nil
}

// Run reads until ctx ends, then seals what it has. Call Begin before.
func (p *Pipeline) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		more, err := p.step(ctx)
		if err != nil {
			return err
		}
		if !more {
			p.pause.Reset(p.pauseTime)
			select {
			case <-ctx.Done():
			case <-p.pause.C:
			}
		}
	}
	p.collect(true)
	return p.seal()
}

// step reads once, at most a batch's records or for the time that a batch may wait. more says that there is more to read.
func (p *Pipeline) step(ctx context.Context) (more bool, err error) {
	if n := p.node.Swap(nil); n != nil {
		p.cfg.Encoder.SetNode(*n)
	}
	readCtx, cancel := context.WithTimeout(ctx, sealAfter)
	limit := max(batch.MaxRecords-p.sealer.Len(), 1)
	n, err := p.cfg.Rings.Read(readCtx, limit, p.record)
	cancel()
	if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
		return false, fmt.Errorf("read rings: %w", err)
	}
	p.collect(false)
	now := p.cfg.Now()
	if p.sealer.Len() == 0 {
		return false, nil
	}
	if p.opened.IsZero() {
		p.opened = now
	}
	// A clock that was set back must not hold a batch.
	if waited := now.Sub(p.opened); p.sealer.Full() || waited >= sealAfter || waited < 0 || n == 0 && waited >= sealAfter/2 {
		return n == limit, p.seal()
	}
	return n == limit, nil
}

// record takes one record of the kernel.
func (p *Pipeline) record(cpu int, r *datapath.Record, pos uint64) {
	if p.sealer.Full() {
		if err := p.finish(nil); err != nil {
			p.log.Error("batch was not sealed", "error", err)
		}
	}
	p.records.Add(1)
	if r != nil && p.cfg.Observe != nil {
		p.cfg.Observe(cpu, r)
	}
	before := p.sealer.Len()
	if r == nil || !p.cfg.Encoder.Encode(r, p.emit) {
		p.invalid++
		p.invalidAll.Add(1)
	}
	p.flows.Add(uint64(p.sealer.Len() - before))
	p.positions[cpu] = pos
}

// requests encodes what proxies and weir-dns saw since the last call, be it more than a batch.
func (p *Pipeline) requests() {
	if p.cfg.Requests == nil {
		return
	}
	for range request.DefaultQueue / len(p.room) {
		n := p.cfg.Requests.Take(p.room[:])
		for _, r := range p.room[:n] {
			p.request(r)
		}
		clear(p.room[:n])
		if n < len(p.room) {
			break
		}
	}
	l := p.cfg.Requests.TakeLosses()
	p.requestsLost.Dropped += l.Dropped
	p.requestsLost.Lost += l.Lost
	p.invalid += l.Malformed
}

// request encodes one.
func (p *Pipeline) request(r *flow.Request) {
	if p.sealer.Full() {
		if err := p.seal(); err != nil {
			p.log.Error("batch was not sealed", "error", err)
		}
	}
	f, ok := p.cfg.Encoder.EncodeRequest(r)
	if !ok {
		p.invalid++
		p.invalidAll.Add(1)
		return
	}
	p.emit(f)
	p.flows.Add(1)
}

// collect adds what is no record of the kernel: requests, events and losses.
func (p *Pipeline) collect(last bool) {
	p.requests()
	for !p.sealer.Full() {
		e, ok := p.cfg.Events.Next()
		if !ok {
			break
		}
		p.sealer.AddAgentEvent(e.Time.UnixNano(), e.Body)
	}
	now := p.cfg.Now()
	news, untold := p.cfg.Spool.TakeLosses()
	for _, l := range news {
		// It names numbers, so that it is not missed if it dies with this process: the next one reports all that did not arrive.
		p.lose(now.UnixNano(), l)
	}
	p.untold = append(p.untold, untold...)
	p.eventsDropped += p.cfg.Events.TakeDropped()
	if last || now.After(p.lossesDue) || p.lossesDue.Sub(now) > lossInterval {
		p.lossesDue = now.Add(lossInterval)
		if err := p.tellLosses(now); err != nil {
			p.log.Error("losses were not told", "error", err)
		}
	}
}

// tellLosses tells, in a batch of its own, what was lost before it had numbers.
func (p *Pipeline) tellLosses(now time.Time) error {
	if !p.cfg.Losses.Room() {
		return nil
	}
	list, err := p.cfg.Losses.New(now)
	if err != nil {
		return err
	}
	at := now.UnixNano()
	if p.eventsDropped > 0 {
		list = append(list, &flowv1.Loss{Place: flowv1.Place_PLACE_AGENT, Cause: flowv1.Cause_CAUSE_FULL, Count: p.eventsDropped, LastTime: at})
		p.eventsDropped = 0
	}
	if n := p.requestsLost.Dropped; n > 0 {
		list = append(list, &flowv1.Loss{Place: flowv1.Place_PLACE_AGENT, Cause: flowv1.Cause_CAUSE_REQUESTS, Count: n, LastTime: at})
	}
	if n := p.requestsLost.Lost; n > 0 {
		list = append(list, &flowv1.Loss{Place: flowv1.Place_PLACE_PROXY, Cause: flowv1.Cause_CAUSE_FULL, Count: n, LastTime: at})
	}
	p.requestsLost = request.Losses{}
	if p.invalid > 0 {
		list = append(list, &flowv1.Loss{Place: flowv1.Place_PLACE_AGENT, Cause: flowv1.Cause_CAUSE_INVALID, Count: p.invalid, LastTime: at})
		p.invalid = 0
	}
	if len(list) == 0 && len(p.untold) == 0 {
		return nil
	}
	if err := p.seal(); err != nil {
		return err
	}
	for _, l := range list {
		p.lose(at, l)
	}
	for _, b := range p.untold {
		for _, l := range b.Losses {
			p.sealer.AddLoss(at, l)
		}
	}
	untold := p.untold
	p.untold = nil
	return p.sealLosses(untold)
}

// lose counts a loss and tells of it in the batch.
func (p *Pipeline) lose(at int64, l *flowv1.Loss) {
	p.cfg.Lost(l.Place, l.Cause, l.Count)
	p.sealer.AddLoss(at, l)
}

// seal finishes the batch and gives the rings' room back.
func (p *Pipeline) seal() error {
	if err := p.finish(nil); err != nil {
		return err
	}
	if err := p.cfg.Rings.Commit(p.positions); err != nil {
		return fmt.Errorf("give back ring space: %w", err)
	}
	return nil
}

// sealLosses finishes a batch of losses. It must outlive this process from before it may be sent.
func (p *Pipeline) sealLosses(insteadOf []*batch.Sealed) error {
	return p.finish(func(b *batch.Sealed) error { return p.cfg.Losses.Keep(b, insteadOf) })
}

// finish seals what there is. Within a Read it must not be followed by Commit, as the record at hand still lies in the ring.
func (p *Pipeline) finish(keep func(*batch.Sealed) error) error {
	sealed, ok := p.sealer.Seal()
	p.opened = time.Time{}
	if !ok {
		return nil
	}
	p.next.Store(p.sealer.Next())
	var errs []error
	if keep != nil {
		if err := keep(sealed); err != nil {
			// It is told all the same; only a death before it arrives would hide it.
			errs = append(errs, fmt.Errorf("keep batch of losses: %w", err))
		}
	}
	err := p.cfg.Rings.SaveState(datapath.State{Epoch: p.sealer.Epoch(), NextSequence: p.sealer.Next(), Positions: p.positions})
	if err != nil {
		// The rings keep what is covered; the next state that is saved covers it too.
		errs = append(errs, fmt.Errorf("save flow state: %w", err))
	}
	p.cfg.Spool.Push(sealed)
	p.batches.Add(1)
	return errors.Join(errs...)
}
