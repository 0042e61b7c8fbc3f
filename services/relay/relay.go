// SPDX-License-Identifier: Apache-2.0

// Package relay takes the agents' batches of flows and stores them in JetStream. Any number of
// relays run side by side: they keep no order, no memory, and know nothing of each other.
package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	relayv1 "github.com/weirmesh/weir/gen/weir/relay/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/relay/internal/ingest"
)

// Config is the configuration of a relay.
type Config struct {
	flags.Common
	// NATS is the URL of the NATS servers, comma separated.
	NATS string
	// Instance tells the relays apart; default host name and process id.
	Instance string
	// Stream bounds the history that JetStream keeps; default 24 h and 1 GiB.
	Stream bus.StreamConfig
	// StreamBatches is how many batches of one agent may wait for their acknowledgement; default 64.
	StreamBatches int
	// TotalBytes is how many bytes of batches, of all agents, may wait; default 32 MiB.
	TotalBytes int64
	// Hold is how long a batch waits for NATS before the agent is told to try again; default 2 s.
	Hold time.Duration
	// AckTimeout is how long JetStream may take to store a batch; default 5 s.
	AckTimeout time.Duration
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	instance, _ := os.Hostname() // an empty name is as good as any: the process id tells replicas apart
	return Config{
		Common:        flags.Default(":4244"),
		Instance:      instance + "-" + strconv.Itoa(os.Getpid()),
		Stream:        bus.StreamConfig{MaxAge: 24 * time.Hour, MaxBytes: 1 << 30, Replicas: 1},
		StreamBatches: 64,
		TotalBytes:    32 << 20,
		Hold:          2 * time.Second,
		AckTimeout:    5 * time.Second,
	}
}

// Validate reports all faults joined.
func (c *Config) Validate() error {
	errs := []error{c.Common.Validate(), c.TLS.Validate()}
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New(what))
		}
	}
	check(c.Listen != "", "listen is empty")
	check(c.NATS != "", "nats is empty")
	check(c.Instance != "", "instance is empty")
	check(c.StreamBatches > 0, "stream-batches is not above 0")
	check(c.TotalBytes >= batch.MaxBytes, fmt.Sprintf("total-bytes is less than one batch (%d)", batch.MaxBytes))
	check(c.Hold >= 0, "hold is negative")
	check(c.AckTimeout > 0, "ack-timeout is not above 0")
	check(c.Stream.MaxAge >= 0, "history-age is negative")
	check(c.Stream.MaxBytes >= 0, "history-bytes is negative")
	check(c.Stream.Replicas >= 0, "history-replicas is negative")
	return errors.Join(errs...)
}

// What a relay waits for before it is ready.
const waitNATS = "NATS and its stream"

// Service is a relay.
type Service struct {
	config   Config
	log      *slog.Logger
	registry *prometheus.Registry
	reporter *status.Reporter
	conn     *nats.Conn
	js       jetstream.JetStream
	gate     *ingest.Gate
	presence *ingest.Presence
	server   *server.Server

	listeners []net.Listener
}

// New opens the listeners and the connection to NATS; Run serves and closes them.
func New(config Config, log *slog.Logger) (*Service, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	source, err := spiffe.Load(config.TLS)
	if err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	s := &Service{
		config:   config,
		log:      log,
		registry: prometheus.NewRegistry(),
		reporter: status.New("relay", config.Instance),
		gate:     ingest.NewGate(),
	}
	s.reporter.Waiting(waitNATS)
	s.conn, err = bus.Connect(config.NATS, source.ClientTLS(bus.Service), log)
	if err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	if err := s.serve(source); err != nil {
		s.conn.Close()
		return nil, fmt.Errorf("relay: %w", err)
	}
	return s, nil
}

// maxStalled is above all that StreamBatches and TotalBytes let through.
const maxStalled = 1 << 20

// streamWindow is what an agent may have sent ahead of the relay's reading; gRPC holds as much for each agent at most.
const streamWindow = 1 << 20

// serve makes the server and opens its listeners.
func (s *Service) serve(source *spiffe.Source) error {
	js, err := jetstream.New(s.conn, jetstream.WithPublishAsyncTimeout(s.config.AckTimeout), jetstream.WithPublishAsyncMaxPending(maxStalled))
	if err != nil {
		return fmt.Errorf("jetstream: %w", err)
	}
	s.js = js
	s.server = server.New(server.Config{
		Name: "relay",
		Log:  s.log,
		TLS:  source,
		Authorize: server.Table{
			"/" + relayv1.RelayService_ServiceDesc.ServiceName + "/":   {"agent"},
			"/" + statusv1.StatusService_ServiceDesc.ServiceName + "/": {server.Local},
		},
		Options: []grpc.ServerOption{
			grpc.MaxRecvMsgSize(batch.MaxBytes + 1024), grpc.ForceServerCodecV2(ingest.NewCodec()),
			// A batch is often larger than the 64 KiB that gRPC starts with: it would come in as many turns.
			grpc.InitialWindowSize(streamWindow), grpc.InitialConnWindowSize(streamWindow),
		},
		Metrics: s.registry,
	})
	s.presence = ingest.NewPresence(s.config.ClusterName, s.config.Instance, s.conn, s.log)
	metrics := ingest.NewMetrics(s.registry)
	relayv1.RegisterRelayServiceServer(s.server.GRPC(), ingest.New(ingest.Config{
		StreamBatches: s.config.StreamBatches,
		TotalBytes:    s.config.TotalBytes,
		Hold:          s.config.Hold,
	}, js, s.gate, s.presence, metrics, s.server.Draining(), s.log))
	s.reporter.Register(s.server.GRPC())
	s.reporter.OnReady(func(ready bool) { s.server.SetServing("", ready) })
	s.reporter.Details(func() []status.Detail {
		return append([]status.Detail{{Name: "agents", Value: strconv.Itoa(s.presence.Count())}}, metrics.Details()...)
	})
	s.registry.MustRegister(s.reporter)

	tcp, err := net.Listen("tcp", s.config.Listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	s.listeners = append(s.listeners, tcp)
	if s.config.Socket != "" {
		socket, err := server.ListenUnix(s.config.Socket)
		if err != nil {
			return errors.Join(err, tcp.Close())
		}
		s.listeners = append(s.listeners, socket)
	}
	return nil
}

// Addr returns the address of the gRPC port.
func (s *Service) Addr() net.Addr { return s.listeners[0].Addr() }

// Ready reports whether batches can be stored.
func (s *Service) Ready() bool { return s.reporter.Ready() }

// Run serves until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	defer s.conn.Close()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.server.Serve(ctx, s.listeners...) })
	group.Go(func() error { return s.keepStream(ctx) })
	group.Go(func() error { return s.presence.Run(ctx) })
	group.Go(func() error {
		return status.ServeHTTP(ctx, s.config.MetricsListen, s.reporter.Handler(s.registry))
	})
	return group.Wait()
}

// retryStream is how soon a failed attempt to make the stream is repeated.
const retryStream = 500 * time.Millisecond

// keepStream opens the gate whenever the connection is up and the stream is there.
func (s *Service) keepStream(ctx context.Context) error {
	changed := s.conn.StatusChanged()
	defer s.conn.RemoveStatusListener(changed)
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-retry.C:
		}
		if !s.conn.IsConnected() {
			s.gate.Set(false)
			s.reporter.Waiting(waitNATS)
			retry.Reset(retryStream)
			continue
		}
		if s.reporter.Ready() {
			continue
		}
		tryCtx, cancel := context.WithTimeout(ctx, s.config.AckTimeout)
		_, err := bus.EnsureFlowStream(tryCtx, s.js, s.config.Stream)
		cancel()
		if err != nil {
			s.log.Debug("stream is not ready", "error", err)
			retry.Reset(retryStream)
			continue
		}
		s.gate.Set(true)
		s.reporter.Done(waitNATS)
	}
}
