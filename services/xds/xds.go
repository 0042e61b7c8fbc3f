// SPDX-License-Identifier: Apache-2.0

// Package xds serves the configuration of the nodes' proxies: what the policy service resolved, as Envoy resources, over aggregated discovery. Replicas
// keep nothing: the same state gives the same versions.
package xds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/client"
	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/xds/internal/ads"
	"github.com/weirmesh/weir/services/xds/internal/feed"
	"github.com/weirmesh/weir/services/xds/internal/render"
)

// Config is the configuration of an xDS server.
type Config struct {
	flags.Common
	// Policy are the addresses of the policy service's replicas.
	Policy []string
	// Instance tells the replicas apart; default host name and process id.
	Instance string
	// NodeStreams is how many streams one node may have; default 64.
	NodeStreams int
	// Patience is how long routes wait for new clusters, and old clusters for new routes; default 5 s.
	Patience time.Duration
	// Render is what renders alike everywhere; replicas must have the same.
	Render render.Options
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	instance, _ := os.Hostname() // an empty name is as good as any: the process id tells replicas apart
	return Config{
		Common:      flags.Default(":18000"),
		Instance:    instance + "-" + strconv.Itoa(os.Getpid()),
		NodeStreams: 64,
		Patience:    5 * time.Second,
		Render:      render.DefaultOptions(),
	}
}

// Add adds the flags; the values that c holds are their defaults.
func (c *Config) Add(set *pflag.FlagSet) {
	c.Common.Add(set)
	set.StringSliceVar(&c.Policy, "policy", c.Policy, "`addresses` (host:port) of the policy service, comma separated")
	set.StringVar(&c.Instance, "instance", c.Instance, "`name` that tells replicas apart")
	set.IntVar(&c.NodeStreams, "node-streams", c.NodeStreams, "`number` of streams that one node may have")
	set.DurationVar(&c.Patience, "patience", c.Patience, "`time` that routes wait for new clusters, and old clusters for new routes")
	set.StringSliceVar(&c.Render.RequestHeaders, "log-request-headers", c.Render.RequestHeaders, "`names` of request headers in the access log")
	set.StringSliceVar(&c.Render.ResponseHeaders, "log-response-headers", c.Render.ResponseHeaders, "`names` of response headers in the access log")
	set.IntVar(&c.Render.NamespaceInstructions, "namespace-instructions", c.Render.NamespaceInstructions,
		"`instructions` that the regular expressions in the configurations and HTTP rules of one namespace may have on one node")
	set.IntVar(&c.Render.NamespaceBytes, "namespace-bytes", c.Render.NamespaceBytes, "`bytes` that the configurations of one namespace may have on one node")
}

// Validate reports all faults joined.
func (c *Config) Validate() error {
	errs := []error{c.Common.Validate(), c.TLS.Validate(), client.CheckAddresses("policy", c.Policy)}
	check := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New(what))
		}
	}
	check(c.Listen != "", "listen is empty")
	check(c.Instance != "", "instance is empty")
	check(c.NodeStreams > 0, "node-streams is not above 0")
	check(c.Patience > 0, "patience is not above 0")
	check(c.Render.NamespaceBytes > 0, "namespace-bytes is not above 0")
	check(c.Render.NamespaceInstructions > 0, "namespace-instructions is not above 0")
	return errors.Join(errs...)
}

// What a server waits for before it is ready.
const waitState = "the policy service's state"

const (
	// maxState is what one message of the policy service may have.
	maxState = 256 << 20
	// maxRequest is what one request of a proxy may have: it names all that the proxy asks for.
	maxRequest = 4 << 20
	maxShown   = 20
)

// Service is an xDS server.
type Service struct {
	config    Config
	log       *slog.Logger
	registry  *prometheus.Registry
	reporter  *status.Reporter
	policy    []*grpc.ClientConn
	hub       *ads.Hub
	feed      *feed.Feed
	server    *server.Server
	listeners []net.Listener
	// streams ends when streams must.
	streams    context.Context
	endStreams context.CancelFunc
}

// New opens the listeners; Run serves and closes them.
func New(config Config, log *slog.Logger) (*Service, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("xds: %w", err)
	}
	source, err := spiffe.Load(config.TLS)
	if err != nil {
		return nil, fmt.Errorf("xds: %w", err)
	}
	s := &Service{config: config, log: log, registry: prometheus.NewRegistry(), reporter: status.New("xds", config.Instance)}
	s.streams, s.endStreams = context.WithCancel(context.Background())
	s.reporter.Waiting(waitState)
	if err := s.wire(source); err != nil {
		s.endStreams()
		return nil, errors.Join(fmt.Errorf("xds: %w", err), s.hangUp())
	}
	return s, nil
}

// connect opens a connection to each replica of the policy service: all of them want to hear what proxies refuse.
func (s *Service) connect(source *spiffe.Source) ([]policyv1.RenderServiceClient, error) {
	var clients []policyv1.RenderServiceClient
	for _, address := range s.config.Policy {
		conn, err := client.New(client.Config{
			Addresses: []string{address}, TLS: source, Service: "policy",
			Options: []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxState))},
		})
		if err != nil {
			return nil, err
		}
		s.policy = append(s.policy, conn)
		clients = append(clients, policyv1.NewRenderServiceClient(conn))
	}
	return clients, nil
}

func (s *Service) hangUp() error {
	var errs []error
	for _, conn := range s.policy {
		errs = append(errs, conn.Close())
	}
	return errors.Join(errs...)
}

func (s *Service) wire(source *spiffe.Source) error {
	clients, err := s.connect(source)
	if err != nil {
		return err
	}
	reports := feed.NewReports()
	s.hub = ads.New(ads.Config{
		NodeStreams: s.config.NodeStreams, Patience: s.config.Patience, Log: s.log.With("component", "ads"),
		Report: func(node string, r ads.Report) { reports.Set(node, r.Connected, r.Errors, r.Taken) },
	}, ads.NewMetrics(s.registry))
	state, err := render.NewState(s.config.Render)
	if err != nil {
		return err
	}
	s.feed = feed.New(feed.Config{
		Clients: clients, Publisher: s.hub, Reports: reports, State: state, Instance: s.config.Instance,
		// Once there was a state the server stays ready: what it has is better than nothing.
		OnSynced: func() { s.reporter.Done(waitState) }, Log: s.log.With("component", "feed"),
	})
	s.server = server.New(server.Config{
		Name: "xds", Log: s.log, TLS: source, Metrics: s.registry,
		Authorize: server.Table{
			"/" + discoveryv3.AggregatedDiscoveryService_ServiceDesc.ServiceName + "/": {"proxy"},
			"/" + statusv1.StatusService_ServiceDesc.ServiceName + "/":                 {server.Local},
		},
		Options: []grpc.ServerOption{grpc.MaxRecvMsgSize(maxRequest)},
	})
	s.hub.Register(s.streams, s.server.GRPC())
	s.reporter.Register(s.server.GRPC())
	s.reporter.OnReady(func(ready bool) { s.server.SetServing("", ready) })
	s.reporter.Details(s.details)
	s.registry.MustRegister(s.reporter)
	return s.listen()
}

func (s *Service) listen() error {
	tcp, err := net.Listen("tcp", s.config.Listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	s.listeners = append(s.listeners, tcp)
	if s.config.Socket == "" {
		return nil
	}
	socket, err := server.ListenUnix(s.config.Socket)
	if err != nil {
		return errors.Join(err, tcp.Close())
	}
	s.listeners = append(s.listeners, socket)
	return nil
}

func (s *Service) details() []status.Detail {
	nodes, streams, refused := s.hub.Details()
	details := []status.Detail{
		{Name: "nodes", Value: strconv.Itoa(nodes)},
		{Name: "streams", Value: strconv.Itoa(streams)},
		{Name: "revision", Value: strconv.FormatUint(s.feed.Revision(), 10)},
		{Name: "refused", Value: strconv.Itoa(len(refused))},
	}
	for _, text := range refused[:min(len(refused), maxShown)] {
		details = append(details, status.Detail{Name: "refused", Value: text})
	}
	return details
}

// Addr returns the address of the gRPC port.
func (s *Service) Addr() net.Addr { return s.listeners[0].Addr() }

// Ready reports whether there is a state to serve.
func (s *Service) Ready() bool { return s.reporter.Ready() }

// Run serves until ctx ends. Then streams end at once: proxies keep what they have and go to another replica.
func (s *Service) Run(ctx context.Context) error {
	defer func() { _ = s.hangUp() }() // nothing is left to be sent
	defer s.endStreams()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.server.Serve(ctx, s.listeners...) })
	group.Go(func() error { return s.feed.Run(ctx) })
	group.Go(func() error {
		<-ctx.Done()
		<-s.server.Draining()
		s.endStreams()
		return nil
	})
	group.Go(func() error {
		return status.ServeHTTP(ctx, s.config.MetricsListen, s.reporter.Handler(s.registry))
	})
	return group.Wait()
}
