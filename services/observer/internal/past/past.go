// SPDX-License-Identifier: Apache-2.0

// Package past reads what the observer's memory has forgotten from JetStream, through the same
// pipeline as live messages.
package past

import (
	"context"
	"log/slog"
	"time"

	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/intake"
	"github.com/weirmesh/weir/services/observer/internal/query"
	"github.com/weirmesh/weir/services/observer/internal/stream"
)

// maxReaders is how many requests read the past at a time; others wait. Each holds a window's worth
// of batches.
const maxReaders = 4

// Past implements query.Past.
type Past struct {
	stream *stream.Stream
	config intake.Config
	log    *slog.Logger
	slots  chan struct{}
}

// New makes it. config is the one of the live pipeline.
func New(s *stream.Stream, config intake.Config, log *slog.Logger) *Past {
	config.FromStart = false // reading begins in the middle
	return &Past{stream: s, config: config, log: log.With("component", "past"), slots: make(chan struct{}, maxReaders)}
}

// Open implements query.Past.
func (p *Past) Open(ctx context.Context, from time.Time) (query.PastReader, error) {
	select {
	case p.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r := &reader{past: p, from: from}
	r.pipeline = intake.New(p.config, r, nil, p.log)
	return r, nil
}

type reader struct {
	past     *Past
	pipeline *intake.Pipeline
	from     time.Time
	next     uint64
	sink     query.PastSink
	err      error
	closed   bool
}

// Read implements query.PastReader.
func (r *reader) Read(ctx context.Context, end uint64, sink query.PastSink) error {
	r.sink = sink
	if r.next >= end {
		return nil
	}
	err := r.past.stream.Past(ctx, r.from, r.next, end, func(m intake.Message) error {
		r.pipeline.Message(m)
		r.next = m.Seq + 1
		return r.err
	})
	if err != nil {
		return err
	}
	r.next = end
	r.pipeline.Flush()
	return r.err
}

// Seen implements query.PastReader.
func (r *reader) Seen(nodeName string, epoch, number uint64) bool {
	return r.pipeline.Tracker().Seen(nodeName, epoch, number)
}

// Close implements query.PastReader.
func (r *reader) Close() {
	if !r.closed {
		r.closed = true
		<-r.past.slots
	}
}

// Record implements intake.Sink.
func (r *reader) Record(source *event.Source, i int) {
	if r.err == nil {
		r.err = r.sink.Record(source, i)
	}
}

// Gap implements intake.Sink.
func (r *reader) Gap(gap *event.Gap) {
	if r.err == nil {
		r.err = r.sink.Gap(gap)
	}
}
