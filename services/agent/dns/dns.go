// SPDX-License-Identifier: Apache-2.0

// Package dns is weir-dns: the node's DNS proxy. It is a process of its own, so that DNS goes on while the agent is replaced.
package dns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/internal/version"
	"github.com/weirmesh/weir/services/agent/internal/dnsnames"
	"github.com/weirmesh/weir/services/agent/internal/dnsproxy"
	"github.com/weirmesh/weir/services/agent/internal/dnsrecord"
	"github.com/weirmesh/weir/services/agent/internal/dnsrules"
)

// Tasks that readiness waits for.
const (
	waitDatapath = "the node's datapath"
	waitRules    = "rules from the agent"
)

// Service is a weir-dns. Make it with New; call Run once.
type Service struct {
	config Config
	log    *slog.Logger
	report *status.Reporter
	// current is what serves now.
	current atomic.Pointer[parts]
}

// New checks the configuration.
func New(config Config, log *slog.Logger) (*Service, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	return &Service{config: config, log: log.With("node", config.Node), report: status.New("dns", config.Node)}, nil
}

// parts of a running weir-dns.
type parts struct {
	*Service
	view    *datapath.View
	maps    *datapath.Names
	names   *dnsnames.Engine
	rules   *dnsrules.Rules
	records *dnsrecord.Queue
	proxy   *dnsproxy.Proxy
	agent   *grpc.ClientConn
	sync    *dnsrules.Sync
}

// Run serves until ctx ends. What the maps hold stays.
func (s *Service) Run(ctx context.Context) error {
	s.report.Waiting(waitDatapath)
	s.report.Waiting(waitRules)
	s.report.Details(func() []status.Detail {
		if p := s.current.Load(); p != nil {
			return p.details()
		}
		return nil
	})
	registry := prometheus.NewRegistry()
	registry.MustRegister(s.report)
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.serveStatus(groupCtx, registry) })
	group.Go(func() error { return status.ServeHTTP(groupCtx, s.config.MetricsListen, s.report.Handler(registry)) })
	group.Go(func() error {
		for {
			err := s.work(groupCtx, registry)
			if !errors.Is(err, errReplaced) || ctx.Err() != nil {
				return err
			}
			s.log.Warn("beginning anew with the node's datapath", "reason", err)
			s.report.Waiting(waitDatapath)
		}
	})
	return group.Wait()
}

// work serves with the maps that are pinned, until ctx ends or others are.
func (s *Service) work(ctx context.Context, registry *prometheus.Registry) error {
	p := &parts{Service: s}
	err := p.open(ctx)
	if err == nil {
		c := newCollector(p)
		registry.MustRegister(c)
		s.current.Store(p)
		err = p.run(ctx)
		s.current.Store(nil)
		registry.Unregister(c)
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil
	}
	return errors.Join(err, p.close())
}

// serveStatus serves the status socket, if there is one.
func (s *Service) serveStatus(ctx context.Context, registry *prometheus.Registry) error {
	if s.config.Socket == "" {
		<-ctx.Done()
		return nil
	}
	rpc := server.New(server.Config{Name: "dns", Log: s.log, Metrics: registry, Authorize: server.Table{
		"/" + statusv1.StatusService_ServiceDesc.ServiceName + "/": {server.Local},
	}})
	s.report.OnReady(func(ready bool) { rpc.SetServing("", ready) })
	s.report.Register(rpc.GRPC())
	ln, err := server.ListenUnix(s.config.Socket)
	if err != nil {
		return err
	}
	return rpc.Serve(ctx, ln)
}

// open brings everything into place, the sockets last: whoever can ask finds names and rules.
func (p *parts) open(ctx context.Context) error {
	if err := p.openMaps(ctx); err != nil {
		return err
	}
	p.report.Done(waitDatapath)
	c := p.config
	p.names = dnsnames.New(dnsnames.Config{
		Maps: nameMaps{p.maps}, Live: p.view.LiveRemotes, Match: policy.MatchName, Dir: c.StateDir, MinTTL: time.Duration(c.MinTTL) * time.Second,
		Grace: c.IdleGrace, PerName: c.MaxPerName, PerEndpoint: c.MaxPerEndpoint, Max: c.MaxNames, MaxKept: c.MaxDeferred, Now: time.Now, Log: p.log,
	})
	p.rules = dnsrules.New(p.view, p.names, filepath.Join(c.StateDir, "rules"), p.log)
	if err := p.names.Load(); err != nil {
		// Names are learnt again; what the maps hold goes by the rules.
		p.log.Error("names of the last process were not read", "error", err)
	}
	if err := p.rules.Load(); errors.Is(err, fs.ErrNotExist) {
		p.log.Info("no rules from before; queries are refused until the agent has sent them")
	} else if err != nil {
		p.log.Error("rules of the last process were not read; queries are refused until the agent has sent them", "error", err)
	}
	if err := p.names.Flush(); err != nil {
		p.log.Error("names are not in the maps; trying again", "error", err)
	}
	// Numbers of a later process are above: nobody counts a nanosecond away with records.
	p.records = dnsrecord.New(c.RecordsMax, uint64(time.Now().UnixNano()))
	var err error
	if p.agent, err = dialAgent(c.Agent); err != nil {
		return err
	}
	hello := &agentv1.DNSHello{Version: version.Version, Instance: time.Now().UTC().Format("20060102T150405.000000000")}
	p.sync = dnsrules.NewSync(p.rules, p.agent, hello, p.status, func(connected bool) {
		if connected {
			p.report.Done(waitRules)
		}
	})
	if _, _, known := p.rules.Counts(); known {
		p.report.Done(waitRules)
	}
	p.proxy, err = dnsproxy.New(dnsproxy.Config{
		Port: c.Port, Judge: p.rules, Names: p.names, Record: p.record, Mark: datapath.MarkEgressPassed, PortMin: datapath.UpstreamPortMin,
		PortMax: datapath.UpstreamPortMax, RejectCode: c.rejectCode(), Timeout: c.Timeout, NamesTimeout: c.MapsTimeout, MaxQueries: c.MaxQueries,
		MaxQueriesPerClient: c.MaxQueriesPerClient, MaxSockets: maxSockets, MaxSocketsPerClient: maxSocketsPerClient, MaxConns: c.MaxConns,
		MaxConnsPerClient: c.MaxConnsPerClient, UDPSize: c.UDPSize, Readers: runtime.GOMAXPROCS(0), Log: p.log,
	})
	if err != nil {
		return err
	}
	return p.proxy.Listen(ctx)
}

// Sockets to servers: one for each client and server, and a few that retire.
const (
	maxSockets          = 8192
	maxSocketsPerClient = 128
)

func dialAgent(socket string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
		MinConnectTimeout: time.Second,
	}))
	if err != nil {
		return nil, fmt.Errorf("connect to the agent: %w", err)
	}
	return conn, nil
}

const openInterval = 200 * time.Millisecond

// openMaps waits until an agent has loaded the datapath.
func (p *parts) openMaps(ctx context.Context) error {
	for said := false; ; {
		view, err := datapath.OpenView(p.config.BPFFS)
		if err == nil {
			p.view = view
			if p.maps, err = datapath.OpenNames(p.config.BPFFS); err == nil {
				return nil
			}
			err = errors.Join(err, view.Close())
			p.view = nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("open the datapath's maps: %w", err)
		}
		if !said {
			p.log.Info("waiting for the node's datapath", "bpffs", p.config.BPFFS)
			said = true
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(openInterval):
		}
	}
}

// run serves. Names are written until the proxy has given its last answers.
func (p *parts) run(ctx context.Context) error {
	namesCtx, stopNames := context.WithCancel(context.WithoutCancel(ctx))
	defer stopNames()
	namesDone := make(chan error, 1)
	go func() { namesDone <- p.names.Run(namesCtx) }()
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return p.proxy.Run(groupCtx) })
	group.Go(func() error { return p.rules.Run(groupCtx) })
	group.Go(func() error { return p.sync.Run(groupCtx) })
	group.Go(func() error { return p.records.Run(groupCtx, p.agent) })
	group.Go(func() error { return p.watchPins(groupCtx) })
	p.log.Info("weir-dns runs", "port", p.config.Port)
	err := group.Wait()
	stopNames()
	return errors.Join(err, <-namesDone)
}

// pinsInterval is how often it is looked whether the pinned maps are still the ones that are open.
const pinsInterval = 2 * time.Second

// errReplaced ends the work with maps that are not the node's any more.
var errReplaced = errors.New("the node's datapath was removed or replaced")

// watchPins looks for that.
func (p *parts) watchPins(ctx context.Context) error {
	tick := time.NewTicker(pinsInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		stale, err := p.view.Stale()
		if stale {
			return errReplaced
		}
		if err != nil {
			p.log.Warn("it is not known whether the open maps are the node's", "error", err)
		}
	}
}

func (p *parts) close() error {
	var errs []error
	if p.agent != nil {
		errs = append(errs, p.agent.Close())
	}
	if p.maps != nil {
		errs = append(errs, p.maps.Close())
	}
	if p.view != nil {
		errs = append(errs, p.view.Close())
	}
	return errors.Join(errs...)
}
