// SPDX-License-Identifier: Apache-2.0

// Package ingest serves weir.relay.v1.RelayService: it checks the agents' batches, publishes them
// unchanged and acknowledges each one when JetStream has stored it.
//
// A relay keeps no order and no memory. What it has read and not answered is bounded, per stream and
// in all; at the bound it stops reading, so that batches wait in the agent's spool. When the bus is
// away a batch is held for a while and then refused: the agent keeps it and tries again.
package ingest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	relayv1 "github.com/weirmesh/weir/gen/weir/relay/v1"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/internal/spiffe"
)

// Bus publishes; *nats.Conn with JetStream is one.
type Bus interface {
	PublishMsgAsync(msg *nats.Msg, opts ...jetstream.PublishOpt) (jetstream.PubAckFuture, error)
}

// Config says how much the service holds.
type Config struct {
	// StreamBatches is how many batches of one agent may wait for their acknowledgement.
	StreamBatches int
	// TotalBytes is how many bytes of batches, of all agents, may wait for their acknowledgement.
	TotalBytes int64
	// Hold is how long a batch waits for the bus to come back before it is refused.
	Hold time.Duration
}

// Service implements RelayService.
type Service struct {
	relayv1.UnimplementedRelayServiceServer

	config   Config
	bus      Bus
	gate     *Gate
	presence *Presence
	metrics  *Metrics
	draining <-chan struct{}
	all      *semaphore.Weighted
	log      *slog.Logger
}

// New makes the service. gate opens while the bus takes batches; draining is closed when streams
// must end.
func New(config Config, b Bus, gate *Gate, presence *Presence, metrics *Metrics, draining <-chan struct{}, log *slog.Logger) *Service {
	return &Service{
		config:   config,
		bus:      b,
		gate:     gate,
		presence: presence,
		metrics:  metrics,
		draining: draining,
		all:      semaphore.NewWeighted(config.TotalBytes),
		log:      log.With("component", "ingest"),
	}
}

// pending is a batch that was read.
type pending struct {
	epoch, first uint64
	size         int64
	future       jetstream.PubAckFuture
	err          error // it was not even sent
}

// Publish implements RelayService. Caller: an agent, for its own node.
func (s *Service) Publish(stream grpc.BidiStreamingServer[relayv1.PublishRequest, relayv1.PublishResponse]) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	id, ok := spiffe.PeerID(ctx)
	if !ok || id.Node == "" {
		return status.Error(codes.PermissionDenied, "only a node's agent may publish")
	}
	address := ""
	if p, ok := peer.FromContext(ctx); ok {
		address = p.Addr.String()
	}
	leave := s.presence.Enter(id, address)
	defer leave()
	s.metrics.streams.Inc()
	defer s.metrics.streams.Dec()

	held := &flight{all: s.all}
	defer held.close()
	queue := make(chan pending, s.config.StreamBatches)
	readErr := make(chan error, 1)
	// The reader ends when the stream does, at the latest when this handler returns.
	go func() {
		defer close(queue)
		readErr <- s.read(ctx, stream, id.Node, held, queue)
	}()
	if err := s.answer(ctx, stream, held, queue); err != nil {
		return err
	}
	select {
	case err := <-readErr:
		return err
	default: // draining
		return status.Error(codes.Unavailable, "the relay is stopping; go to another one")
	}
}

// read takes batches off the stream and sends them to the bus.
func (s *Service) read(ctx context.Context, stream grpc.BidiStreamingServer[relayv1.PublishRequest, relayv1.PublishResponse], node string, held *flight, queue chan<- pending) error {
	for {
		request, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		data := request.GetBatch()
		header, err := batch.Check(data)
		if err != nil {
			s.metrics.refused.WithLabelValues("invalid").Inc()
			return status.Errorf(codes.InvalidArgument, "unreadable batch: %v", err)
		}
		if header.Node != node {
			s.metrics.refused.WithLabelValues("foreign_node").Inc()
			return status.Errorf(codes.PermissionDenied, "batch of node %q from the agent of node %q", header.Node, node)
		}
		s.metrics.received.Inc()
		s.metrics.records.Add(float64(header.Count))
		s.metrics.bytes.Add(float64(len(data)))
		size := int64(len(data))
		if err := held.acquire(ctx, size); err != nil {
			return status.FromContextError(err).Err()
		}
		p := pending{epoch: header.Epoch, first: header.First, size: size}
		p.future, p.err = s.send(ctx, &header, data)
		select {
		case queue <- p:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// send hands a batch to the bus, waiting for it if it is away.
func (s *Service) send(ctx context.Context, header *batch.Header, data []byte) (jetstream.PubAckFuture, error) {
	if err := s.gate.Wait(ctx, s.config.Hold); err != nil {
		return nil, err
	}
	msg := nats.NewMsg(bus.FlowSubject(header.Node))
	msg.Data = data
	future, err := s.bus.PublishMsgAsync(msg, jetstream.WithMsgID(header.ID()), jetstream.WithExpectStream(bus.FlowStream))
	if err != nil {
		return nil, fmt.Errorf("publish: %w", err)
	}
	return future, nil
}

// answer tells the agent what became of its batches, in the order in which they came.
func (s *Service) answer(ctx context.Context, stream grpc.BidiStreamingServer[relayv1.PublishRequest, relayv1.PublishResponse], held *flight, queue <-chan pending) error {
	draining := s.draining
	for {
		var p pending
		select {
		case next, ok := <-queue:
			if !ok {
				return nil
			}
			p = next
		case <-draining:
			// What was read is still answered: the agent would else send it twice.
			select {
			case next, ok := <-queue:
				if !ok {
					return nil
				}
				p = next
			default:
				return nil
			}
		}
		response := &relayv1.PublishResponse{Epoch: p.epoch, First: p.first}
		if err := s.wait(ctx, p); err != nil {
			response.Error = err.Error()
			s.metrics.refused.WithLabelValues("bus").Inc()
		} else {
			s.metrics.stored.Inc()
		}
		held.release(p.size)
		if err := stream.Send(response); err != nil {
			return err
		}
	}
}

// wait returns nil when JetStream has stored the batch.
func (s *Service) wait(ctx context.Context, p pending) error {
	if p.err != nil {
		return p.err
	}
	select {
	case ack := <-p.future.Ok():
		if ack != nil && ack.Duplicate {
			s.metrics.duplicates.Inc()
		}
		return nil
	case err := <-p.future.Err():
		return fmt.Errorf("store: %w", err)
	case <-ctx.Done():
		return ctx.Err()
	}
}
