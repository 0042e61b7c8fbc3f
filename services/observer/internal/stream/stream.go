// SPDX-License-Identifier: Apache-2.0

// Package stream reads the batches from JetStream: the live end, forever, and stretches of the past.
package stream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/services/observer/internal/intake"
)

// How many messages (batches of some hundred KB) may be under way to us.
const (
	livePull = 32
	pastPull = 8
)

const (
	requestTimeout = 5 * time.Second
	retryWait      = 250 * time.Millisecond
	// stopWait is how often a reader of the past looks whether it has come to the end.
	stopWait = 200 * time.Millisecond
)

// Stream is the flow stream.
type Stream struct {
	conn *nats.Conn
	js   jetstream.JetStream
	log  *slog.Logger
}

// New makes a reader over a connection.
func New(conn *nats.Conn, log *slog.Logger) (*Stream, error) {
	js, err := jetstream.New(conn, jetstream.WithDefaultTimeout(requestTimeout))
	if err != nil {
		return nil, fmt.Errorf("jetstream: %w", err)
	}
	return &Stream{conn: conn, js: js, log: log.With("component", "stream")}, nil
}

// Connected reports whether NATS can be reached now.
func (s *Stream) Connected() bool { return s.conn.IsConnected() }

// State is what the stream holds.
type State struct {
	FirstSeq, LastSeq, Messages, Bytes uint64
	Created                            time.Time
}

// State asks for the stream's state.
func (s *Stream) State(ctx context.Context) (State, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	stream, err := s.js.Stream(ctx, bus.FlowStream)
	if err != nil {
		return State{}, fmt.Errorf("stream %s: %w", bus.FlowStream, err)
	}
	info := stream.CachedInfo()
	return State{
		FirstSeq: info.State.FirstSeq, LastSeq: info.State.LastSeq,
		Messages: info.State.Msgs, Bytes: info.State.Bytes, Created: info.Created,
	}, nil
}

// Start chooses where reading begins, so that about replay bytes are read, and says whether this is
// the very first message that the stream ever had.
func (st State) Start(replay uint64) (seq uint64, fromStart bool) {
	first := max(st.FirstSeq, 1)
	if st.Messages == 0 {
		return st.LastSeq + 1, st.LastSeq == 0
	}
	if st.Bytes <= replay {
		return first, first == 1
	}
	want := uint64(float64(st.Messages) * float64(replay) / float64(st.Bytes))
	return max(first, st.LastSeq+1-min(want, st.LastSeq)), false
}

// Item is a message, or word of the reader's state.
type Item struct {
	Message intake.Message
	// Pending is how many messages follow in the stream now.
	Pending uint64
	// Restarted says that the stream was made anew: its places begin at 1 again. There is no message.
	Restarted bool
}

// Follow sends every message from a place on, in order, until ctx ends. It comes back by itself
// from anything.
func (s *Stream) Follow(ctx context.Context, next uint64, created time.Time, out chan<- Item) error {
	for ctx.Err() == nil {
		err := s.follow(ctx, &next, &created, out)
		if ctx.Err() != nil {
			break
		}
		s.log.Debug("reading the stream begins again", "next", next, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(retryWait):
		}
	}
	return nil
}

func (s *Stream) follow(ctx context.Context, next *uint64, created *time.Time, out chan<- Item) error {
	state, err := s.State(ctx)
	if err != nil {
		return err
	}
	if !state.Created.Equal(*created) || state.LastSeq+1 < *next {
		s.log.Warn("the stream was made anew", "created", state.Created)
		*next, *created = max(state.FirstSeq, 1), state.Created
		select {
		case out <- Item{Restarted: true}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	messages, err := s.open(ctx, jetstream.OrderedConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:   *next,
		// Not for ever: whoever makes the consumer anew must look whether the stream is still the same.
		MaxResetAttempts: 1,
	}, livePull)
	if err != nil {
		return err
	}
	defer messages.Stop()
	for {
		item, err := read(ctx, messages)
		if err != nil {
			return err
		}
		select {
		case out <- item:
			*next = item.Message.Seq + 1
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Past calls f for the messages before place end, in order, that were stored at a time or later, or,
// if next is not 0, have place next or later.
func (s *Stream) Past(ctx context.Context, from time.Time, next, end uint64, f func(intake.Message) error) error {
	config := jetstream.OrderedConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &from, MaxResetAttempts: 20,
	}
	if next > 0 {
		config.DeliverPolicy, config.OptStartSeq, config.OptStartTime = jetstream.DeliverByStartSequencePolicy, next, nil
	}
	messages, err := s.open(ctx, config, pastPull)
	if err != nil {
		return err
	}
	defer messages.Stop()
	for {
		waitCtx, cancel := context.WithTimeout(ctx, stopWait)
		item, err := read(waitCtx, messages)
		cancel()
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			// Nothing came: perhaps nothing is there.
			state, err := s.State(ctx)
			if err != nil {
				return err
			}
			if state.Messages == 0 || state.LastSeq < max(next, 1) || stored(ctx, s, state.LastSeq).Before(from) {
				return nil
			}
			continue
		}
		if err != nil {
			return err
		}
		if item.Message.Seq >= end {
			return nil
		}
		if err := f(item.Message); err != nil {
			return err
		}
		if item.Message.Seq+1 >= end || item.Pending == 0 {
			return nil
		}
	}
}

// stored returns when a message was stored; the far future when that can not be told.
func stored(ctx context.Context, s *Stream, seq uint64) time.Time {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	stream, err := s.js.Stream(ctx, bus.FlowStream)
	if err == nil {
		if msg, err := stream.GetMsg(ctx, seq); err == nil {
			return msg.Time
		}
	}
	return time.Unix(1<<40, 0)
}

func (s *Stream) open(ctx context.Context, config jetstream.OrderedConsumerConfig, pull int) (jetstream.MessagesContext, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	consumer, err := s.js.OrderedConsumer(ctx, bus.FlowStream, config)
	if err != nil {
		return nil, fmt.Errorf("open consumer: %w", err)
	}
	messages, err := consumer.Messages(jetstream.PullMaxMessages(pull))
	if err != nil {
		return nil, fmt.Errorf("read consumer: %w", err)
	}
	return messages, nil
}

func read(ctx context.Context, messages jetstream.MessagesContext) (Item, error) {
	msg, err := messages.Next(jetstream.NextContext(ctx))
	if err != nil {
		return Item{}, err
	}
	meta, err := msg.Metadata()
	if err != nil {
		return Item{}, fmt.Errorf("message: %w", err)
	}
	return Item{
		Message: intake.Message{Seq: meta.Sequence.Stream, Time: meta.Timestamp.UnixNano(), Data: msg.Data()},
		Pending: meta.NumPending,
	}, nil
}
