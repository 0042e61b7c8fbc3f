// SPDX-License-Identifier: Apache-2.0

// Package observer merges the flows of all nodes, remembers them and answers Hubble's API and our
// own. Any number of observers run side by side; each reads the whole stream.
package observer

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
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	hubble "github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/observer/internal/api"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/intake"
	"github.com/weirmesh/weir/services/observer/internal/live"
	"github.com/weirmesh/weir/services/observer/internal/merge"
	"github.com/weirmesh/weir/services/observer/internal/nodes"
	"github.com/weirmesh/weir/services/observer/internal/past"
	"github.com/weirmesh/weir/services/observer/internal/query"
	"github.com/weirmesh/weir/services/observer/internal/store"
	"github.com/weirmesh/weir/services/observer/internal/stream"
	"github.com/weirmesh/weir/services/observer/internal/wire"
)

// Config is the configuration of an observer.
type Config struct {
	// Common: a Listen address on loopback is served in plain text, any other with mutual TLS.
	flags.Common
	// ListenFD is an inherited listener to serve on instead of Listen; negative = none.
	ListenFD int
	// NATS is the URL of the NATS servers, comma separated.
	NATS string
	// Instance tells the observers apart; default host name.
	Instance string
	// MemoryBytes is how many bytes of batches are kept in memory; default 64 MiB.
	MemoryBytes int
	// ReplayBytes is how much of the stream's end is read at the start; default 256 MiB. Losses and
	// counts are known from there on.
	ReplayBytes uint64
	// Window is how long a flow waits at most for earlier ones of other nodes; default 1 s.
	Window time.Duration
	// Settle is how long it waits at least; default 150 ms, a little more than an agent holds a batch.
	Settle time.Duration
	// Patience is how long a hole in a node's numbers may stay before it is told as a gap; default 10 s.
	Patience time.Duration
	// Silence is how long after its last batch a node counts as connected when no relay says that its
	// agent is; default 20 s.
	Silence time.Duration
}

// agentEventBytes bounds the memory of agent events.
const agentEventBytes = 2 << 20

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	instance, err := os.Hostname()
	if err != nil || instance == "" {
		instance = "observer"
	}
	return Config{
		Common:      flags.Default("127.0.0.1:4245"),
		ListenFD:    -1,
		Instance:    instance,
		MemoryBytes: 64 << 20,
		ReplayBytes: 256 << 20,
		Window:      time.Second,
		Settle:      150 * time.Millisecond,
		Patience:    10 * time.Second,
		Silence:     20 * time.Second,
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
	check(c.Listen != "" || c.ListenFD >= 0, "listen is empty and there is no listen-fd")
	check(c.NATS != "", "nats is empty")
	check(c.Instance != "", "instance is empty")
	check(c.MemoryBytes >= 1<<20, "memory-bytes is less than 1 MiB")
	check(c.ReplayBytes > 0, "replay-bytes is not above 0")
	check(c.Settle >= 0 && c.Settle <= c.Window, "settle is negative or longer than window")
	check(c.Patience > c.Window, "patience is not longer than window")
	check(c.Silence > 0, "silence is not above 0")
	return errors.Join(errs...)
}

// waitCaughtUp is what an observer waits for before it is ready.
const waitCaughtUp = "the stream's end"

// Service is an observer.
type Service struct {
	config    Config
	log       *slog.Logger
	registry  *prometheus.Registry
	reporter  *status.Reporter
	conn      *nats.Conn
	nodes     *nodes.Registry
	flows     *store.Store
	live      *live.Reader
	server    *server.Server
	listeners []net.Listener
}

// New opens the listeners and the connection to NATS; Run serves and closes them.
func New(config Config, log *slog.Logger) (*Service, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("observer: %w", err)
	}
	source, err := spiffe.Load(config.TLS)
	if err != nil {
		return nil, fmt.Errorf("observer: %w", err)
	}
	s := &Service{
		config:   config,
		log:      log,
		registry: prometheus.NewRegistry(),
		reporter: status.New("observer", config.Instance),
		nodes:    nodes.New(config.Silence, time.Now),
		flows:    store.New(config.MemoryBytes),
	}
	s.reporter.Waiting(waitCaughtUp)
	tcp, plain, err := listen(config)
	if err != nil {
		return nil, fmt.Errorf("observer: %w", err)
	}
	s.listeners = append(s.listeners, tcp)
	s.conn, err = bus.Connect(config.NATS, source.ClientTLS(bus.Service), log)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("observer: %w", err), tcp.Close())
	}
	if plain {
		source = nil
	}
	if err := s.wire(source); err != nil {
		s.conn.Close()
		return nil, errors.Join(fmt.Errorf("observer: %w", err), tcp.Close())
	}
	return s, nil
}

// listen opens the API's port and says whether it may be plain: only loopback may.
func listen(config Config) (ln net.Listener, plain bool, err error) {
	if config.ListenFD >= 0 {
		file := os.NewFile(uintptr(config.ListenFD), "inherited listener")
		if file == nil {
			return nil, false, fmt.Errorf("listen-fd %d is no open file", config.ListenFD)
		}
		ln, err = net.FileListener(file) // it has its own copy
		if closeErr := file.Close(); err == nil && closeErr != nil {
			err = errors.Join(closeErr, ln.Close())
		}
		if err != nil {
			return nil, false, fmt.Errorf("listen-fd %d: %w", config.ListenFD, err)
		}
	} else if ln, err = net.Listen("tcp", config.Listen); err != nil {
		return nil, false, fmt.Errorf("listen: %w", err)
	}
	addr, ok := ln.Addr().(*net.TCPAddr)
	return ln, ok && addr.IP.IsLoopback(), nil
}

// wire connects the parts.
func (s *Service) wire(tls *spiffe.Source) error {
	flowStream, err := stream.New(s.conn, s.log)
	if err != nil {
		return err
	}
	order := intake.Config{
		Merge:    merge.Config{Window: s.config.Window, Settle: s.config.Settle, MaxBytes: s.config.MemoryBytes / 4},
		Patience: s.config.Patience,
	}
	agentEvents := store.New(agentEventBytes)
	s.live = live.New(live.Config{
		Stream: flowStream, Order: order, ReplayBytes: s.config.ReplayBytes,
		Flows: s.flows, AgentEvents: agentEvents, Nodes: s.nodes, OnGap: s.gap,
		OnCaughtUp: func() { s.reporter.Done(waitCaughtUp) },
	}, s.log)

	anyone := []string{server.Any, server.Plain}
	s.server = server.New(server.Config{
		Name: "observer",
		Log:  s.log,
		TLS:  tls,
		Authorize: server.Table{
			"/" + hubble.Observer_ServiceDesc.ServiceName + "/":            anyone,
			"/" + observerv1.ObserverService_ServiceDesc.ServiceName + "/": anyone,
			"/" + statusv1.StatusService_ServiceDesc.ServiceName + "/":     {server.Local},
		},
		Reflection: true,
		Options:    []grpc.ServerOption{grpc.ForceServerCodecV2(wire.NewCodec())},
		Metrics:    s.registry,
	})
	handlers := api.New(api.Config{
		Name:        event.NodeName(s.config.ClusterName, s.config.Instance),
		Flows:       query.New(s.flows, past.New(flowStream, order, s.log), time.Now),
		FlowStore:   s.flows,
		AgentEvents: query.New(agentEvents, nil, time.Now),
		Nodes:       s.nodes,
		OnGap:       s.gap,
		Draining:    s.server.Draining(),
		Started:     time.Now(),
		Now:         time.Now,
	})
	hubble.RegisterObserverServer(s.server.GRPC(), handlers)
	observerv1.RegisterObserverServiceServer(s.server.GRPC(), api.NewWeir(handlers))
	s.reporter.Register(s.server.GRPC())
	s.reporter.OnReady(func(ready bool) {
		for _, name := range []string{"", hubble.Observer_ServiceDesc.ServiceName, "hubble.server.Observer", observerv1.ObserverService_ServiceDesc.ServiceName} {
			s.server.SetServing(name, ready)
		}
	})
	s.reporter.Details(s.details)
	s.registry.MustRegister(s.reporter, &collector{service: s})
	if s.config.Socket != "" {
		socket, err := server.ListenUnix(s.config.Socket)
		if err != nil {
			return err
		}
		s.listeners = append(s.listeners, socket)
	}
	return nil
}

// gap counts a gap wherever losses are shown.
func (s *Service) gap(g *event.Gap) {
	s.nodes.Gap(g)
	loss := s.reporter.Loss(lossName(g.Place.String(), "PLACE_"), lossName(g.Cause.String(), "CAUSE_"))
	if g.Withdrawn {
		loss.Add(-g.Count) // unsigned arithmetic: it takes the count back
		return
	}
	loss.Add(g.Count)
}

func (s *Service) details() []status.Detail {
	stats := s.flows.Stats()
	seen, rate := s.nodes.Flows()
	connected := 0
	all := s.nodes.Nodes()
	for _, n := range all {
		if n.Connected {
			connected++
		}
	}
	return []status.Detail{
		{Name: "nodes", Value: fmt.Sprintf("%d of %d connected", connected, len(all))},
		{Name: "flows/s", Value: strconv.FormatFloat(rate, 'f', 1, 64)},
		{Name: "flows seen", Value: strconv.FormatUint(seen, 10)},
		{Name: "flows in memory", Value: strconv.FormatUint(stats.Events, 10)},
		{Name: "memory", Value: fmt.Sprintf("%d of %d MiB", stats.Bytes>>20, stats.MaxBytes>>20)},
		{Name: "stream", Value: fmt.Sprintf("at %d", s.live.Position())},
	}
}

// Addr returns the address of the API's port.
func (s *Service) Addr() net.Addr { return s.listeners[0].Addr() }

// Ready reports whether the end of the stream was reached.
func (s *Service) Ready() bool { return s.reporter.Ready() }

// Run serves until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	defer s.conn.Close()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.server.Serve(ctx, s.listeners...) })
	group.Go(func() error { return s.live.Run(ctx) })
	group.Go(func() error { return s.watchNodes(ctx) })
	group.Go(func() error {
		return status.ServeHTTP(ctx, s.config.MetricsListen, s.reporter.Handler(s.registry))
	})
	return group.Wait()
}

// watchNodes listens to what the relays say of the agents.
func (s *Service) watchNodes(ctx context.Context) error {
	sub, err := s.conn.Subscribe(bus.NodeSubjects, func(m *nats.Msg) {
		word, err := bus.DecodePresence(m.Data)
		if err != nil {
			s.log.Debug("unreadable presence", "error", err)
			return
		}
		s.nodes.Presence(word)
	})
	if err != nil {
		return fmt.Errorf("watch nodes: %w", err)
	}
	<-ctx.Done()
	_ = sub.Unsubscribe() // the connection goes next
	return nil
}
