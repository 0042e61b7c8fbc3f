// SPDX-License-Identifier: Apache-2.0

// Package store is the identity broker's use of NATS: keys with exact compare-and-swap, read from
// the stream's leader.
//
// The layout is that of a NATS key-value bucket, so that its tools can read it, but the bucket API
// is not used: it may read from a replica that lags, and its create adapts to whatever deletion it
// finds, where the broker must know exactly which state it replaces.
package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/weirmesh/weir/internal/bus"
)

// ErrConflict means that a key was not in the state that the writer expected. Nothing was written.
var ErrConflict = errors.New("the key changed")

const (
	streamName = "KV_" + bus.IdentityBucket
	prefix     = "$KV." + bus.IdentityBucket + "."
	// operation is the header by which NATS tools know a deletion.
	operation = "KV-Operation"
	deletion  = "DEL"
	purge     = "PURGE"
)

// Entry is a key at one revision. A key that never was, or whose deletion has been forgotten, has
// revision 0; a deleted one has the revision of its deletion.
type Entry struct {
	Key      string
	Value    []byte
	Revision uint64
	Deleted  bool
	// Time is when the revision was written, by the server's clock.
	Time time.Time
}

// Exists reports whether the key has a value.
func (e Entry) Exists() bool { return e.Revision != 0 && !e.Deleted }

// ErrNotOpen means that NATS did not answer yet.
var ErrNotOpen = errors.New("the identity bucket is not open: nats did not answer yet")

// Store is the bucket. Safe for concurrent use.
type Store struct {
	js       jetstream.JetStream
	replicas int
	stream   atomic.Pointer[jetstream.Stream]
}

// New returns a store on a connection, which stays the caller's. Nothing is asked of the server
// before Open. replicas is the number of NATS servers that hold a key before a write succeeds; 0 = 1.
func New(conn *nats.Conn, replicas int) (*Store, error) {
	js, err := jetstream.New(conn)
	if err != nil {
		return nil, fmt.Errorf("use jetstream: %w", err)
	}
	return &Store{js: js, replicas: max(replicas, 1)}, nil
}

// Open makes the bucket or takes the existing one. It may be called again.
func (s *Store) Open(ctx context.Context) error {
	stream, err := s.js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name:              streamName,
		Description:       "identity numbers: n.<number> = label set, l.<hash> = numbers of the sets with that hash",
		Subjects:          []string{prefix + ">"},
		Storage:           jetstream.FileStorage,
		MaxMsgsPerSubject: 1,
		Discard:           jetstream.DiscardNew,
		DenyDelete:        true,
		AllowRollup:       true,
		// A direct get may be answered by a replica that lags behind the leader.
		AllowDirect: false,
		Replicas:    s.replicas,
	})
	if err != nil {
		return fmt.Errorf("open identity bucket: %w", err)
	}
	s.stream.Store(&stream)
	return nil
}

func (s *Store) opened() (jetstream.Stream, error) {
	stream := s.stream.Load()
	if stream == nil {
		return nil, ErrNotOpen
	}
	return *stream, nil
}

// Get reads a key from the stream's leader. A key that is not there is an Entry that does not
// exist, not an error.
func (s *Store) Get(ctx context.Context, key string) (Entry, error) {
	stream, err := s.opened()
	if err != nil {
		return Entry{}, err
	}
	message, err := stream.GetLastMsgForSubject(ctx, prefix+key)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return Entry{Key: key}, nil
	}
	if err != nil {
		return Entry{}, fmt.Errorf("read %s: %w", key, err)
	}
	return entry(key, message.Data, message.Header, message.Sequence, message.Time), nil
}

func entry(key string, data []byte, header nats.Header, revision uint64, at time.Time) Entry {
	op := header.Get(operation)
	return Entry{Key: key, Value: data, Revision: revision, Deleted: op == deletion || op == purge, Time: at}
}

// Put writes a key whose revision must be expected (0 = it must not be there at all) and returns the
// new revision. After an error other than ErrConflict the value may have been written or not.
func (s *Store) Put(ctx context.Context, key string, value []byte, expected uint64) (uint64, error) {
	return s.publish(ctx, &nats.Msg{Subject: prefix + key, Data: value, Header: nats.Header{}}, key, expected)
}

// Delete deletes a key whose revision must be expected, and returns the revision of the deletion.
// It also works on a key that is not there, which then has a new revision.
func (s *Store) Delete(ctx context.Context, key string, expected uint64) (uint64, error) {
	return s.publish(ctx, &nats.Msg{Subject: prefix + key, Header: nats.Header{operation: []string{deletion}}}, key, expected)
}

func (s *Store) publish(ctx context.Context, message *nats.Msg, key string, expected uint64) (uint64, error) {
	ack, err := s.js.PublishMsg(ctx, message, jetstream.WithExpectLastSequencePerSubject(expected))
	if err == nil {
		return ack.Sequence, nil
	}
	var api *jetstream.APIError
	if errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence ||
		api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant) {
		return 0, fmt.Errorf("write %s: %w", key, ErrConflict)
	}
	return 0, fmt.Errorf("write %s: %w", key, err)
}

// Forget removes the deletion of a key, if it still has that revision.
func (s *Store) Forget(ctx context.Context, key string, revision uint64) error {
	stream, err := s.opened()
	if err != nil {
		return err
	}
	if err := stream.Purge(ctx, jetstream.WithPurgeSubject(prefix+key), jetstream.WithPurgeSequence(revision+1)); err != nil {
		return fmt.Errorf("forget %s: %w", key, err)
	}
	return nil
}

// Last returns the revision of the newest write of any key.
func (s *Store) Last(ctx context.Context) (uint64, error) {
	state, err := s.state(ctx)
	return state.LastSeq, err
}

func (s *Store) state(ctx context.Context) (jetstream.StreamState, error) {
	stream, err := s.opened()
	if err != nil {
		return jetstream.StreamState{}, err
	}
	info, err := stream.Info(ctx)
	if err != nil {
		return jetstream.StreamState{}, fmt.Errorf("read state of the identity bucket: %w", err)
	}
	return info.State, nil
}

// Watch calls each for every key as it is now, then caughtUp once with a revision up to which
// nothing is missing, then each for every change, in the order of the revisions, until ctx ends or
// the watch breaks. When the server goes away and comes back, it goes on by itself.
func (s *Store) Watch(ctx context.Context, each func(Entry), caughtUp func(revision uint64)) error {
	state, err := s.state(ctx)
	if err != nil {
		return err
	}
	stream, err := s.opened()
	if err != nil {
		return err
	}
	consumer, err := stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{prefix + ">"},
		DeliverPolicy:  jetstream.DeliverLastPerSubjectPolicy,
	})
	if err != nil {
		return fmt.Errorf("watch identity bucket: %w", err)
	}
	messages, err := consumer.Messages()
	if err != nil {
		return fmt.Errorf("watch identity bucket: %w", err)
	}
	stop := context.AfterFunc(ctx, messages.Stop)
	defer stop()
	defer messages.Stop()
	caught := false
	if state.Msgs == 0 {
		caught = true
		caughtUp(state.LastSeq)
	}
	for {
		message, err := messages.Next()
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("watch identity bucket: %w", err)
		}
		meta, err := message.Metadata()
		if err != nil {
			return fmt.Errorf("watch identity bucket: %w", err)
		}
		key := strings.TrimPrefix(message.Subject(), prefix)
		each(entry(key, message.Data(), message.Headers(), meta.Sequence.Stream, meta.Timestamp))
		if !caught && meta.NumPending == 0 {
			caught = true
			caughtUp(state.LastSeq)
		}
	}
}
