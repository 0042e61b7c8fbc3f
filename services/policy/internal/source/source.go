// SPDX-License-Identifier: Apache-2.0

// Package source reads the cluster's objects. The stream implementation here reads them from a
// weir.source.v1 server; a Kubernetes API server will be another.
package source

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	sourcev1 "github.com/weirmesh/weir/gen/weir/source/v1"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// Event is one step of the cluster's objects: exactly one of the fields is set.
type Event struct {
	Upsert object.Object
	Delete *object.Key
	// Synced: the objects that existed at the start are all in. It comes once.
	Synced bool
}

// readyTask is what the service waits for until the first sync.
const readyTask = "source"

// Stream reads objects from a weir.source.v1 server. A broken object is logged and skipped, so that
// its last good form stays in force.
type Stream struct {
	client sourcev1.SourceServiceClient
	log    *slog.Logger
	report *status.Reporter
	broken *status.Loss
	// retry is the pause before a broken watch is begun again.
	retry time.Duration
}

// NewStream reads from a connection, which stays the caller's.
func NewStream(conn grpc.ClientConnInterface, log *slog.Logger, report *status.Reporter) *Stream {
	report.Waiting(readyTask)
	return &Stream{
		client: sourcev1.NewSourceServiceClient(conn),
		log:    log.With("component", "source"),
		report: report,
		broken: report.Loss("source", "broken object"),
		retry:  time.Second,
	}
}

// UpdateStatus merges into an object's status.
func (s *Stream) UpdateStatus(ctx context.Context, key object.Key, uid string, status []byte) error {
	_, err := s.client.UpdateStatus(ctx, &sourcev1.UpdateStatusRequest{
		Kind: key.Kind, Namespace: key.Namespace, Name: key.Name, Uid: uid, Status: status,
	})
	if grpcstatus.Code(err) == codes.NotFound {
		return nil // it is gone, and its status with it
	}
	return err
}

// AcquireLease takes or renews a lease.
func (s *Stream) AcquireLease(ctx context.Context, name, holder string, seconds uint32) (bool, error) {
	r, err := s.client.AcquireLease(ctx, &sourcev1.AcquireLeaseRequest{Name: name, Holder: holder, Seconds: seconds})
	if err != nil {
		return false, err
	}
	return r.GetAcquired(), nil
}

// Run reads until ctx ends, calling emit for each event, one at a time; emit may block. When the
// watch breaks, the objects stay as they are; the next one is compared with them, and what is gone
// by then is deleted.
func (s *Stream) Run(ctx context.Context, emit func(Event)) error {
	known := map[object.Key]bool{}
	first := true
	for {
		err := s.watch(ctx, known, &first, emit)
		if ctx.Err() != nil {
			return nil
		}
		s.log.Warn("watch of the cluster's objects ended, will try again", "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(s.retry):
		}
	}
}

// watch runs one watch; known holds the objects emitted and not deleted.
func (s *Stream) watch(ctx context.Context, known map[object.Key]bool, first *bool, emit func(Event)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := s.client.Watch(ctx, &sourcev1.WatchRequest{Kinds: object.Kinds()}, grpc.WaitForReady(true))
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	seen := map[object.Key]bool{}
	synced := false
	for {
		event, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		switch event.GetType() {
		case sourcev1.WatchResponse_TYPE_ADDED, sourcev1.WatchResponse_TYPE_MODIFIED:
			o, key, err := object.Decode(event.GetKind(), event.GetObject())
			if !synced && key.Name != "" {
				seen[key] = true // also when broken: its last good form stays
			}
			if err != nil {
				s.broken.Add(1)
				s.log.Warn("object skipped, its last good form stays", "object", key.String(), "error", err)
				continue
			}
			known[key] = true
			emit(Event{Upsert: o})
		case sourcev1.WatchResponse_TYPE_DELETED:
			key, err := object.DecodeKey(event.GetKind(), event.GetObject())
			if err != nil {
				s.broken.Add(1)
				s.log.Warn("deletion of an object without a name skipped", "object", key.String(), "error", err)
				continue
			}
			delete(known, key)
			emit(Event{Delete: &key})
		case sourcev1.WatchResponse_TYPE_SYNCED:
			if synced {
				return errors.New("the source said twice that it is synced")
			}
			synced = true
			for key := range known {
				if !seen[key] {
					delete(known, key)
					emit(Event{Delete: &key})
				}
			}
			if *first {
				*first = false
				emit(Event{Synced: true})
				s.report.Done(readyTask)
			}
		default:
			return fmt.Errorf("the source sent an event of type %v", event.GetType())
		}
	}
}
