// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/structpb"

	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/client"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/internal/version"
	"github.com/weirmesh/weir/services/proxy/internal/accesslog"
	"github.com/weirmesh/weir/services/proxy/internal/admin"
	"github.com/weirmesh/weir/services/proxy/internal/cluster"
	"github.com/weirmesh/weir/services/proxy/internal/handover"
	"github.com/weirmesh/weir/services/proxy/internal/httpproxy"
	"github.com/weirmesh/weir/services/proxy/internal/limit"
	"github.com/weirmesh/weir/services/proxy/internal/listener"
	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/netfilter"
	"github.com/weirmesh/weir/services/proxy/internal/pace"
	"github.com/weirmesh/weir/services/proxy/internal/sockets"
	"github.com/weirmesh/weir/services/proxy/internal/state"
	"github.com/weirmesh/weir/services/proxy/internal/upstream"
	"github.com/weirmesh/weir/services/proxy/internal/xds"
)

const (
	// Ports of upstream sockets in a client's name; no pod has them.
	upstreamPortMin = 52000
	upstreamPortMax = 60999
	// nodeAccessLog and nodeProcess are keys of the node's metadata.
	nodeAccessLog = "weir.access_log"
	nodeProcess   = "weir.process"
)

// Service is a proxy.
type Service struct {
	config   Config
	log      *slog.Logger
	started  time.Time
	registry *prometheus.Registry
	reporter *status.Reporter

	conn      *grpc.ClientConn
	client    *xds.Client
	state     *state.State[*httpproxy.Routes]
	clusters  *cluster.Table
	listeners *listener.Set
	accessLog *accesslog.Service
	upstreams *upstream.Pool
	before    *handover.New // the process to take over from; nil = none

	draining  atomic.Bool
	drain     chan struct{} // closed to begin a drain
	drainOnce sync.Once
}

// New makes a proxy, which takes over from one that serves HotRestartSocket. Run serves.
func New(config Config, log *slog.Logger) (*Service, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	source, err := spiffe.Load(config.TLS)
	if err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	if config.Limits.TotalConnections == 0 {
		if config.Limits.TotalConnections, err = totalConnections(); err != nil {
			return nil, fmt.Errorf("proxy: %w", err)
		}
	}
	s := &Service{
		config: config, log: log, started: time.Now(), registry: prometheus.NewRegistry(),
		reporter: status.New("proxy", config.Node), drain: make(chan struct{}),
	}
	s.conn, err = client.New(client.Config{Addresses: config.XDS, TLS: source, Service: "xds"})
	if err != nil {
		return nil, fmt.Errorf("proxy: %w", err)
	}
	if err := s.wire(); err != nil {
		return nil, errors.Join(fmt.Errorf("proxy: %w", err), s.conn.Close())
	}
	return s, nil
}

// wire makes the parts.
func (s *Service) wire() error {
	node, err := s.node()
	if err != nil {
		return err
	}
	limits := limit.New(s.config.Limits, s.registry)
	dialer := sockets.New()
	if s.config.ChoosePorts {
		dialer.ChoosePorts()
	}
	matchers := match.NewCompiler(pace.New(func() bool { return limits.Connections() > 0 }))
	s.clusters = cluster.NewTable(dialer)
	s.clusters.CompileWith(matchers)
	s.upstreams = upstream.NewPool(upstream.Config{})
	lost := s.reporter.Loss("access log", "no room")
	s.accessLog = accesslog.New(accesslog.Config{
		Node: node, Clusters: s.clusters, StreamBytes: s.config.LogStreamBytes, TotalBytes: s.config.LogTotalBytes, Lost: lost.Add, Log: s.log,
	})
	s.state = state.New(state.Config[*httpproxy.Routes]{
		Clusters: s.clusters, Matchers: matchers, KeepRoutes: s.config.ListenerDrain, Changed: func() { s.client.Kick() }, Log: s.log,
		Compile: func(in *routev3.RouteConfiguration) (*httpproxy.Routes, error) {
			return httpproxy.CompileRoutes(in, matchers)
		},
	})
	s.listeners = listener.NewSet(listener.Config{
		Builder: listener.Builder{
			HTTP: s.compileHTTP(limits, matchers), AccessLog: func(path string, in []*accesslogv3.AccessLog) (model.Logger, error) {
				return s.accessLog.Compile(path, in)
			},
			Net:      netfilter.Env{Clusters: s.clusters, Limits: limits},
			Matchers: matchers, PortMin: upstreamPortMin, PortMax: upstreamPortMax,
		},
		Limits: limits, MaxConnections: s.config.ListenerConnections, DrainTime: s.config.ListenerDrain, Log: s.log,
		RoutesKnown: func(name string) bool { _, ok := s.state.Routes(name); return ok }, Reachable: s.clusters.Reachable,
	})
	s.state.SetListeners(s.listeners)
	s.client = xds.New(xds.Config{Conn: s.conn, Node: node, Handler: s.state, Log: s.log})
	s.registry.MustRegister(s.reporter, &collector{s})
	s.reporter.Details(s.details)
	return s.takeOver()
}

// httpFilter is a connection manager as listeners see it.
type httpFilter struct{ *httpproxy.Manager }

// Adopt implements listener.HTTP.
func (f httpFilter) Adopt(next listener.HTTP) {
	if n, ok := next.(httpFilter); ok {
		f.Manager.Adopt(n.Manager)
	}
}

func (s *Service) compileHTTP(limits model.Limits, matchers *match.Compiler) func(*hcmv3.HttpConnectionManager, model.Logger) (listener.HTTP, error) {
	return func(hcm *hcmv3.HttpConnectionManager, logger model.Logger) (listener.HTTP, error) {
		m, err := httpproxy.Compile(hcm, httpproxy.Env{
			Clusters: s.clusters, Logger: logger, Limits: limits, Upstreams: s.upstreams, Matchers: matchers, Log: s.log,
			Routes: func(name string) *httpproxy.Routes { r, _ := s.state.Routes(name); return r },
		})
		if err != nil {
			return nil, err
		}
		return httpFilter{m}, nil
	}
}

// node is who we are.
func (s *Service) node() (*corev3.Node, error) {
	metadata, err := structpb.NewStruct(map[string]any{
		nodeAccessLog: s.config.AccessLog,
		// Tells the numbers of two processes' access logs apart.
		nodeProcess: strconv.Itoa(os.Getpid()) + "-" + strconv.FormatInt(s.started.UnixNano(), 36),
	})
	if err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	return &corev3.Node{
		Id: s.config.Node, Cluster: s.config.ClusterName, Metadata: metadata,
		UserAgentName: "weir-proxy", UserAgentVersionType: &corev3.Node_UserAgentVersion{UserAgentVersion: version.Version},
	}, nil
}

// takeOver asks the process before for its sockets.
func (s *Service) takeOver() error {
	if s.config.HotRestartSocket == "" {
		return nil
	}
	before, files, err := handover.Take(s.config.HotRestartSocket)
	if err != nil {
		return err
	}
	s.before = before
	for _, f := range files {
		if err := s.listeners.Inherit(f); err != nil {
			return err
		}
	}
	if before != nil {
		s.log.Info("taking over from the process before", "sockets", len(files))
	}
	return nil
}

// Ready reports whether clusters and listeners have come and all listeners are in force.
func (s *Service) Ready() bool { return s.client.Configured() && s.listeners.Pending() == 0 }

// Drain begins a drain, at whose end Run returns.
func (s *Service) Drain() { s.drainOnce.Do(func() { close(s.drain) }) }

// tick is how often what waits for time to pass is looked at.
const tick = 250 * time.Millisecond

// Run serves until ctx ends, Drain was called, or a new process took over; then it drains.
func (s *Service) Run(ctx context.Context) error {
	// What serves connections goes on until the last one has ended.
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, life := errgroup.WithContext(life)
	group.Go(func() error { return s.client.Run(life) })
	group.Go(func() error { return s.listeners.Run(life) })
	group.Go(func() error { return s.accessLog.Run(life) })
	group.Go(func() error { return s.upstreams.Run(life) })
	group.Go(func() error { return s.release(life) })

	taken, err := s.front(ctx, life)
	s.draining.Store(true)
	wait := s.config.Drain
	if taken {
		wait = s.config.ParentDrain
		s.log.Info("a new process has taken over; draining", "deadline", wait)
	}
	// Told to end while it drains for long: the shorter time counts from then.
	drainCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), wait)
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(s.config.Drain, cancel) })()
	err = errors.Join(err, s.listeners.Drain(drainCtx))
	stop()
	return errors.Join(err, group.Wait(), s.conn.Close())
}

// release lets routes into force that waited for clusters.
func (s *Service) release(ctx context.Context) error {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-ticker.C:
			s.state.Release(now)
		}
	}
}

// front serves what is not traffic: status, admin page, metrics, hot restart. It returns when it is time to drain; taken = a new process took over.
func (s *Service) front(ctx, life context.Context) (taken bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(life, cancel)()
	if s.before != nil {
		if err := s.succeed(ctx); err != nil {
			return false, err
		}
	}
	// Each part ends with frontCtx; the new process needs their addresses.
	frontCtx, closeFront := context.WithCancel(ctx)
	defer closeFront()
	group, frontCtx := errgroup.WithContext(frontCtx)
	if err := s.serveStatus(frontCtx, group); err != nil {
		return false, err
	}
	group.Go(func() error {
		return status.ServeHTTP(frontCtx, s.config.MetricsListen, s.reporter.Handler(s.registry))
	})
	group.Go(func() error { return status.ServeHTTP(frontCtx, s.config.AdminListen, s.admin()) })
	group.Go(func() error {
		select {
		case <-s.drain:
			cancel()
		case <-frontCtx.Done():
		}
		return nil
	})
	if s.config.HotRestartSocket == "" {
		return false, group.Wait()
	}
	ln, err := server.ListenUnix(s.config.HotRestartSocket)
	if err != nil {
		closeFront()
		return false, errors.Join(err, group.Wait())
	}
	// A part that fails ends the process, but what the new process is told outlives the parts.
	defer context.AfterFunc(frontCtx, func() {
		if !s.draining.Load() {
			cancel()
		}
	})()
	old := handover.Old{Sockets: s.sockets, Release: func() {
		s.draining.Store(true)
		closeFront()
		err = group.Wait()
	}}
	taken, serveErr := old.Serve(ctx, ln)
	closeFront()
	return taken, errors.Join(serveErr, err, group.Wait())
}

// succeed waits for the configuration and then replaces the process before.
func (s *Service) succeed(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.config.HotRestartWait)
	defer cancel()
	ticker := time.NewTicker(tick / 10)
	defer ticker.Stop()
	for !s.Ready() {
		select {
		case <-ctx.Done():
			return errors.Join(errors.New("hot restart: no configuration in time; the process before goes on"), s.before.Close())
		case <-ticker.C:
		}
	}
	if err := s.before.Ready(); err != nil {
		return err
	}
	s.log.Info("took over")
	return s.listeners.ForgetInherited()
}

func (s *Service) sockets() ([]*os.File, error) {
	all, err := s.listeners.Sockets()
	if err != nil {
		return nil, err
	}
	files := make([]*os.File, 0, len(all))
	for _, one := range all {
		files = append(files, one.File)
	}
	return files, nil
}

// serveStatus serves the status service for root, on the unix socket alone.
func (s *Service) serveStatus(ctx context.Context, group *errgroup.Group) error {
	if s.config.Socket == "" {
		return nil
	}
	grpcServer := server.New(server.Config{
		Name: "proxy", Log: s.log, Metrics: s.registry,
		Authorize: server.Table{"/" + statusv1.StatusService_ServiceDesc.ServiceName + "/": {server.Local}},
	})
	s.reporter.Register(grpcServer.GRPC())
	s.reporter.OnReady(func(ready bool) { grpcServer.SetServing("", ready) })
	var ln net.Listener
	ln, err := server.ListenUnix(s.config.Socket)
	if err != nil {
		return err
	}
	group.Go(func() error { return grpcServer.Serve(ctx, ln) })
	return nil
}

// State of the process, in Envoy's words.
func (s *Service) stateName() string {
	switch {
	case s.draining.Load():
		return "DRAINING"
	case s.client.Configured():
		return "LIVE"
	}
	return "PRE_INITIALIZING"
}

// admin returns the operator's page.
func (s *Service) admin() http.Handler {
	return admin.Handler(admin.Config{
		Node: s.config.Node, Version: version.Version, Started: s.started, Dump: s.state.Dump, Clusters: s.clusters.Status,
		Listeners: s.listeners.Status, State: s.stateName, Drain: s.Drain, Registry: s.registry,
	})
}

// details are what weir status shows.
func (s *Service) details() []status.Detail {
	st, counts := s.client.Stats(), s.state.Counts()
	configured := "none yet"
	if st.Configured {
		configured = "in force"
		if !st.Connected {
			configured = "the last one; no xDS server answers"
		}
	}
	return []status.Detail{
		{Name: "configuration", Value: configured},
		{Name: "listeners", Value: strconv.Itoa(counts[xds.Listener])},
		{Name: "routes", Value: strconv.Itoa(counts[xds.Route])},
		{Name: "clusters", Value: strconv.Itoa(counts[xds.Cluster])},
		{Name: "refused resources", Value: strconv.Itoa(s.state.Refused())},
		{Name: "access log waiting", Value: strconv.FormatInt(s.accessLog.Waiting(), 10) + " bytes"},
	}
}
