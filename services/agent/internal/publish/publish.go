// SPDX-License-Identifier: Apache-2.0

// Package publish carries sealed batches from the spool to a relay, any relay of a list, and frees them when the relay says that they are stored.
package publish

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	relayv1 "github.com/weirmesh/weir/gen/weir/relay/v1"
	"github.com/weirmesh/weir/services/agent/internal/batch"
	"github.com/weirmesh/weir/services/agent/internal/spool"
)

// window bounds the bytes that are on their way to a relay and not acknowledged.
const window = 4 << 20

// Config says where to publish.
type Config struct {
	// Addresses of the relays.
	Addresses []string
	Dial      func(address string) (*grpc.ClientConn, error)
	Spool     *spool.Spool
	// Acked is called for each batch that is stored.
	Acked func(*batch.Sealed)
	// Changed is called when a stream opens (with its address) or ends ("").
	Changed func(address string)
	Log     *slog.Logger
}

// Publisher is one sender. Run it once; the rest is safe for concurrent use.
type Publisher struct {
	cfg     Config
	log     *slog.Logger
	address atomic.Pointer[string]

	mu       sync.Mutex
	rejected map[uint64]int // by first number: how often a relay could not read it
}

// New makes a publisher.
func New(cfg Config) *Publisher {
	return &Publisher{cfg: cfg, log: cfg.Log.With("component", "publish"), rejected: map[uint64]int{}}
}

// Relay is the address of the relay in use, "" without one.
func (p *Publisher) Relay() string {
	if a := p.address.Load(); a != nil {
		return *a
	}
	return ""
}

func (p *Publisher) setRelay(address string) {
	p.address.Store(&address)
	if p.cfg.Changed != nil {
		p.cfg.Changed(address)
	}
}

const (
	firstBackoff = 100 * time.Millisecond
	maxBackoff   = 2 * time.Second
	// openTimeout bounds how long a relay that does not answer is waited for.
	openTimeout = 5 * time.Second
	// ackTimeout: a relay that is connected and acknowledges nothing for so long is left for another one.
	ackTimeout = 10 * time.Second
	// maxRejections of a batch before it is given up: the relays cannot read it, and it would block all that follow.
	maxRejections = 3
)

// Run sends until ctx ends.
func (p *Publisher) Run(ctx context.Context) error {
	backoff := firstBackoff
	for i := 0; ; i++ {
		address := p.cfg.Addresses[i%len(p.cfg.Addresses)]
		started := time.Now()
		err := p.stream(ctx, address)
		p.cfg.Spool.Rewind()
		if p.Relay() != "" {
			p.setRelay("")
		}
		if ctx.Err() != nil {
			return nil
		}
		p.log.Warn("relay stream ended", "address", address, "error", err)
		if time.Since(started) > 10*time.Second {
			backoff = firstBackoff
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

func (p *Publisher) stream(ctx context.Context, address string) error {
	conn, err := p.cfg.Dial(address)
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	opening := time.AfterFunc(openTimeout, func() { cancel(errors.New("relay does not answer")) })
	stream, err := relayv1.NewRelayServiceClient(conn).Publish(ctx, grpc.WaitForReady(true), grpc.ForceCodecV2(codec{}))
	opening.Stop()
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return fmt.Errorf("open stream: %w", err)
	}
	p.setRelay(address)
	p.log.Info("publishing to a relay", "address", address)

	flight := &flight{}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for {
			b, err := p.cfg.Spool.Next(ctx, window)
			if err != nil {
				return
			}
			flight.add(b)
			if stream.Send(&relayv1.PublishRequest{Batch: b.Bytes}) != nil {
				return // the receiver has the reason
			}
		}
	}()
	watch := make(chan struct{})
	go func() {
		defer close(watch)
		p.watch(ctx, flight, cancel)
	}()
	err = p.receive(stream, flight)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	cancel(err)
	<-sent
	<-watch
	return err
}

// flight knows what was sent on a stream and not answered.
type flight struct {
	mu      sync.Mutex
	batches []*batch.Sealed
	since   time.Time // of the last answer, or of the first batch after a pause
}

func (f *flight) add(b *batch.Sealed) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.batches) == 0 {
		f.since = time.Now()
	}
	f.batches = append(f.batches, b)
}

func (f *flight) take(epoch, first uint64) *batch.Sealed {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.since = time.Now()
	for i, b := range f.batches {
		if b.Epoch == epoch && b.First == first {
			f.batches = append(f.batches[:i], f.batches[i+1:]...)
			return b
		}
	}
	return nil
}

func (f *flight) oldest() (b *batch.Sealed, silent time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.batches) == 0 {
		return nil, 0
	}
	return f.batches[0], time.Since(f.since)
}

// watch leaves a relay that takes and does not answer.
func (p *Publisher) watch(ctx context.Context, f *flight, cancel context.CancelCauseFunc) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if _, silent := f.oldest(); silent > ackTimeout {
				cancel(fmt.Errorf("relay has acknowledged nothing for %s", ackTimeout))
				return
			}
		}
	}
}

func (p *Publisher) receive(stream grpc.BidiStreamingClient[relayv1.PublishRequest, relayv1.PublishResponse], f *flight) error {
	for {
		r, err := stream.Recv()
		if err != nil {
			if status.Code(err) == codes.InvalidArgument {
				p.refused(f)
			}
			return err
		}
		if r.GetError() != "" {
			// It stays in the spool, and is sent again on the next stream.
			return fmt.Errorf("relay could not store batch %d of epoch %d: %s", r.GetFirst(), r.GetEpoch(), r.GetError())
		}
		b := f.take(r.GetEpoch(), r.GetFirst())
		if p.cfg.Spool.Ack(r.GetEpoch(), r.GetFirst()) && b != nil && p.cfg.Acked != nil {
			p.cfg.Acked(b)
		}
	}
}

// refused counts against the oldest batch on its way; relays read in order, so it is the one that could not be read.
func (p *Publisher) refused(f *flight) {
	b, _ := f.oldest()
	if b == nil {
		return
	}
	p.mu.Lock()
	p.rejected[b.First]++
	give := p.rejected[b.First] >= maxRejections
	if give {
		delete(p.rejected, b.First)
	}
	p.mu.Unlock()
	if give {
		p.log.Error("no relay can read a batch: it is given up", "epoch", b.Epoch, "first", b.First, "count", b.Count)
		p.cfg.Spool.Refuse(b.Epoch, b.First)
	}
}
