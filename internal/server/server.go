// SPDX-License-Identifier: Apache-2.0

// Package server is the gRPC server of every part of Weir: mutual TLS on TCP, checked users on unix
// sockets, one table that says who may call what, health, metrics, logging, recovery and drain.
//
// One Server serves any mix of listeners; how a peer is authenticated follows from its connection.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"strings"
	"time"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/auth"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/logging"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/internal/spiffe"
)

// DefaultDrain is how long calls may go on after the server was told to stop.
const DefaultDrain = 5 * time.Second

// Config says what a server is.
type Config struct {
	// Name is the part's name, used in logs.
	Name string
	// Log receives what calls did; required.
	Log *slog.Logger
	// TLS authenticates TCP peers. Nil = TCP is plain, and its peers are nobody (see Plain).
	TLS *spiffe.Source
	// Authorize says who may call what. What it does not name is denied.
	Authorize Table
	// Reflection serves gRPC reflection, to whoever reaches the port.
	Reflection bool
	// Options are added to the server's own. They must not set credentials.
	Options []grpc.ServerOption
	// Metrics receives the call metrics. Nil = they are not exported.
	Metrics *prometheus.Registry
	// Drain is how long calls may go on after Serve was told to stop; 0 = DefaultDrain.
	Drain time.Duration
}

// Server is a gRPC server. Make it with New, register services on GRPC, then call Serve once.
type Server struct {
	config   Config
	grpc     *grpc.Server
	health   *health.Server
	metrics  *grpcprom.ServerMetrics
	draining chan struct{}
}

// New makes a server with health, and reflection if asked for, registered and allowed to anyone.
func New(config Config) *Server {
	if config.Log == nil {
		config.Log = slog.New(slog.DiscardHandler)
	}
	if config.Drain == 0 {
		config.Drain = DefaultDrain
	}
	log := config.Log.With("component", "server", "part", config.Name)
	metrics := callMetrics(config.Metrics)
	panics := panicCounter(config.Metrics)

	// Order: metrics see everything, logging sees denials and panics, nobody's handler runs before
	// authorization, and a panic becomes an error for all of them.
	quiet := selector.MatchFunc(func(_ context.Context, c interceptors.CallMeta) bool {
		return c.Service != healthpb.Health_ServiceDesc.ServiceName
	})
	logOptions := []logging.Option{logging.WithLogOnEvents(logging.FinishCall), logging.WithLevels(logLevel)}
	authorize := auth.AuthFunc(config.Authorize.withDefaults(config.Reflection).authorize)
	recoverPanic := recovery.WithRecoveryHandlerContext(func(ctx context.Context, p any) error {
		panics.Inc()
		method, _ := grpc.Method(ctx)
		log.ErrorContext(ctx, "handler panicked", "method", method, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		return status.Error(codes.Internal, "internal error: the handler panicked; see the log of "+config.Name)
	})

	options := []grpc.ServerOption{
		grpc.Creds(&dispatch{tls: config.TLS}),
		grpc.ChainUnaryInterceptor(
			metrics.UnaryServerInterceptor(),
			selector.UnaryServerInterceptor(logging.UnaryServerInterceptor(logAdapter(log), logOptions...), quiet),
			auth.UnaryServerInterceptor(authorize),
			recovery.UnaryServerInterceptor(recoverPanic),
		),
		grpc.ChainStreamInterceptor(
			metrics.StreamServerInterceptor(),
			selector.StreamServerInterceptor(logging.StreamServerInterceptor(logAdapter(log), logOptions...), quiet),
			auth.StreamServerInterceptor(authorize),
			recovery.StreamServerInterceptor(recoverPanic),
		),
		// A peer that vanished without a word (its node died) is noticed within 15 s.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
	s := &Server{
		config:   config,
		grpc:     grpc.NewServer(append(options, config.Options...)...),
		health:   health.NewServer(),
		metrics:  metrics,
		draining: make(chan struct{}),
	}
	healthpb.RegisterHealthServer(s.grpc, s.health)
	s.health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	if config.Reflection {
		reflection.Register(s.grpc)
	}
	return s
}

// GRPC returns the server to register services on. Do not call its Serve or Stop.
func (s *Server) GRPC() *grpc.Server { return s.grpc }

// SetServing sets what health says of a service; "" is the whole part. Everything begins not serving.
func (s *Server) SetServing(service string, ok bool) {
	state := healthpb.HealthCheckResponse_NOT_SERVING
	if ok {
		state = healthpb.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus(service, state)
}

// Draining is closed when the server stops taking calls. A handler of a stream that lives for long
// selects on it and returns codes.Unavailable; others are cut off when the drain ends.
func (s *Server) Draining() <-chan struct{} { return s.draining }

// Serve serves on the listeners, which it closes, until ctx ends or one fails. Then health turns to
// not serving, no new calls are taken, and running ones have Config.Drain to end. It returns nil
// after ctx ended.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	if len(listeners) == 0 {
		return errors.New("serve: no listener")
	}
	s.metrics.InitializeMetrics(s.grpc)
	group, groupCtx := errgroup.WithContext(ctx)
	for _, ln := range listeners {
		group.Go(func() error {
			if err := s.grpc.Serve(ln); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
				return fmt.Errorf("serve on %s: %w", ln.Addr(), err)
			}
			return nil
		})
	}
	<-groupCtx.Done()
	s.drain()
	return group.Wait()
}

func (s *Server) drain() {
	s.health.Shutdown()
	close(s.draining)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.grpc.GracefulStop()
	}()
	deadline := time.NewTimer(s.config.Drain)
	defer deadline.Stop()
	select {
	case <-stopped:
	case <-deadline.C:
		s.config.Log.Warn("calls were cut off when the drain ended", "part", s.config.Name, "after", s.config.Drain)
		s.grpc.Stop()
		<-stopped
	}
}

// logLevel: single calls are no news; what an operator must act on is.
func logLevel(code codes.Code) logging.Level {
	switch code {
	case codes.PermissionDenied, codes.Unauthenticated:
		return logging.LevelWarn
	case codes.Internal, codes.Unknown, codes.DataLoss:
		return logging.LevelError
	}
	return logging.LevelDebug
}

func logAdapter(log *slog.Logger) logging.Logger {
	return logging.LoggerFunc(func(ctx context.Context, level logging.Level, msg string, fields ...any) {
		log.Log(ctx, slog.Level(level), msg, fields...)
	})
}

// callMetrics registers the call metrics. Several servers of one process may share a registry: they
// then share the metrics too.
func callMetrics(registry *prometheus.Registry) *grpcprom.ServerMetrics {
	metrics := grpcprom.NewServerMetrics()
	if registry == nil {
		return metrics
	}
	var already prometheus.AlreadyRegisteredError
	if err := registry.Register(metrics); errors.As(err, &already) {
		if existing, ok := already.ExistingCollector.(*grpcprom.ServerMetrics); ok {
			return existing
		}
	}
	return metrics
}

func panicCounter(registry *prometheus.Registry) prometheus.Counter {
	counter := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "weir_handler_panics_total",
		Help: "Calls whose handler panicked.",
	})
	if registry == nil {
		return counter
	}
	var already prometheus.AlreadyRegisteredError
	if err := registry.Register(counter); errors.As(err, &already) {
		if existing, ok := already.ExistingCollector.(prometheus.Counter); ok {
			return existing
		}
	}
	return counter
}

// serviceOf returns "/pkg.Service/" of "/pkg.Service/Method".
func serviceOf(method string) string {
	if i := strings.LastIndexByte(method, '/'); i > 0 {
		return method[:i+1]
	}
	return method
}
