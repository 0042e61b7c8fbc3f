// SPDX-License-Identifier: Apache-2.0

// Package agent is Weir's node agent: it loads the datapath, plugs pods in, keeps the kernel's maps as the policy service wants them, and carries
// the flows of the node to a relay. What it made in the kernel stays when it ends.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/client"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/internal/version"
	"github.com/weirmesh/weir/services/agent/internal/accesslog"
	"github.com/weirmesh/weir/services/agent/internal/api"
	"github.com/weirmesh/weir/services/agent/internal/clock"
	"github.com/weirmesh/weir/services/agent/internal/cni"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/endpoint"
	"github.com/weirmesh/weir/services/agent/internal/event"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/healthport"
	"github.com/weirmesh/weir/services/agent/internal/mirror"
	"github.com/weirmesh/weir/services/agent/internal/monitor"
	"github.com/weirmesh/weir/services/agent/internal/namerules"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/pipeline"
	"github.com/weirmesh/weir/services/agent/internal/policymap"
	"github.com/weirmesh/weir/services/agent/internal/policysync"
	"github.com/weirmesh/weir/services/agent/internal/publish"
	"github.com/weirmesh/weir/services/agent/internal/request"
	"github.com/weirmesh/weir/services/agent/internal/slot"
	"github.com/weirmesh/weir/services/agent/internal/spool"
)

// Service is an agent. Make it with New; call Run once.
type Service struct {
	config Config
	log    *slog.Logger
	tls    *spiffe.Source
	report *status.Reporter
}

// New checks the configuration and reads the certificate.
func New(config Config, log *slog.Logger) (*Service, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	tls, err := spiffe.Load(config.TLS)
	if err != nil {
		return nil, err
	}
	if id := tls.ID(); id.Service != "agent" || id.Node != config.Node {
		return nil, fmt.Errorf("certificate is of %s, not of the agent of node %s", id, config.Node)
	}
	return &Service{config: config, log: log.With("node", config.Node), tls: tls, report: status.New("agent", config.Node)}, nil
}

// Run plugs the node in and serves until ctx ends. Pods and their traffic go on without it.
func (s *Service) Run(ctx context.Context) error {
	n, err := s.setUp()
	if err != nil {
		return err
	}
	defer n.healthPorts.Close()
	defer func() {
		if err := errors.Join(n.view.Close(), n.datapath.Close()); err != nil {
			s.log.Warn("datapath was not closed", "error", err)
		}
	}()
	return n.run(ctx)
}

// node is a running agent's parts.
type node struct {
	*Service
	uplink    netdev.Uplink
	datapath  *datapath.Datapath
	clock     *clock.Clock
	store     *desired.Store
	directory *flow.Directory
	encoder   *flow.Encoder
	events    *event.Queue
	mirror    *mirror.Mirror
	view      *datapath.View
	slots     *slot.Slots
	names     *namerules.Server
	requests  *request.Queue
	accessLog *accesslog.Server
	policies  *policymap.Engine
	policy    *policysync.Client
	endpoints *endpoint.Manager

	healthPorts *healthport.Server

	monitor   *monitor.Hub
	spool     *spool.Spool
	pipeline  *pipeline.Pipeline
	publisher *publish.Publisher
	flowEnd   flowEnd
	sweeps    sweeps

	ipcacheMax int
	pressed    map[string]int // percents that maps were warned of; owned by retry
	draining   chan struct{}
}

// setUp brings the kernel side into place and restores what an earlier agent left, in the order in which the parts need each other.
func (s *Service) setUp() (_ *node, err error) {
	n := &node{Service: s, clock: clock.New(s.config.ClockOffset), store: desired.NewStore(), monitor: monitor.New(), spool: spool.New(s.config.SpoolBytes),
		pressed: map[string]int{}, healthPorts: healthport.New(s.log), requests: request.NewQueue(request.DefaultQueue), draining: make(chan struct{})}
	if n.uplink, err = netdev.FindUplink(s.config.Uplink); err != nil {
		return nil, err
	}
	config, err := s.config.datapath()
	if err != nil {
		return nil, err
	}
	if err := n.setUpRouting(&config); err != nil {
		return nil, err
	}
	worldIPv4, worldIPv6 := n.worlds()
	config.NodeIPv4, config.NodeIPv6, config.WorldIPv4, config.WorldIPv6 = n.uplink.IPv4, n.uplink.IPv6, worldIPv4, worldIPv6
	n.ipcacheMax = config.IPCacheMax
	if n.datapath, err = datapath.Load(config, s.log); err != nil {
		return nil, fmt.Errorf("load the datapath: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.datapath.Close())
		}
	}()
	n.directory = flow.NewDirectory(s.config.ClusterName, time.Now)
	n.events = event.NewQueue(n.clock.Now)
	n.events.Started(n.clock.Now())
	n.encoder = flow.NewEncoder(n.directory, n.clock, n.flowNode(nil))
	present, err := n.datapath.Services().List()
	if err != nil {
		return nil, err
	}
	ids, err := mirror.LoadServiceIDs(s.path("service-ids"), present)
	if err != nil {
		// Numbers of live connections may name another service; better than no agent.
		s.log.Error("numbers of services were not read", "error", err)
	}
	if err := n.setUpProxies(); err != nil {
		return nil, err
	}
	named, err := namedPolicies(s.config.BPFFS)
	if err != nil {
		return nil, err
	}
	n.policies, err = policymap.New(policymap.Config{
		Maps: n.datapath.Policies(), NumbersFile: s.path("policy-numbers"), PausesFile: s.path("policy-pauses"), Names: n.directory, Slots: n.slots, NameRules: n.names,
		Named: named, Events: n.events, Now: time.Now, Log: s.log,
	})
	if err != nil {
		return nil, err
	}
	n.mirror = mirror.New(mirror.Config{
		Node: s.config.Node, WorldIPv4: worldIPv4, WorldIPv6: worldIPv6, IPCache: n.datapath.IPCache(), IPCacheMax: n.ipcacheMax,
		Services: n.datapath.Services(), Routes: func(r []netdev.Route) error { return netdev.SyncRoutes(n.uplink, r) },
		NodeIPv4: n.uplink.IPv4, NodeIPv6: n.uplink.IPv6, Directory: n.directory, Events: n.events, ServiceIDs: ids, Log: s.log,
		HealthPorts: n.healthPorts, Peers: n.policies, Slots: n.slots, PeersChanged: func(uid string) { n.endpoints.PeersChanged(uid) },
		NodeChanged: func(d *desired.Node) { n.pipeline.SetNode(n.flowNode(d)) },
		PodChanged:  func(p *desired.Pod) { n.endpoints.PodChanged(p) },
	})
	instance := time.Now().UTC().Format("20060102T150405.000000000")
	n.policy = policysync.New(policysync.Config{
		Node: s.config.Node, Version: version.Version, Instance: instance, Addresses: s.config.Policy, Dial: s.dialer("policy"),
		StateFile: s.path("policy-state"), Store: n.store, Sink: n.sink(), Refusals: n.refusals, Changed: n.policyChanged, Now: time.Now, Log: s.log,
	})
	if n.slots.Known() {
		n.reportSlots(n.slots.Listed())
	}
	n.endpoints = endpoint.New(endpoint.Config{
		Node: s.config.Node, StateFile: s.path("endpoints"), MTU: n.uplink.PodMTU, Store: n.store, Programs: programs{n.datapath}, Table: n.datapath.Endpoints(),
		Identities: n.mirror, Policies: n.policies, Registry: n.policy, Directory: n.directory, Events: n.events, Now: time.Now,
		PolicyWait: endpoint.DefaultPolicyWait, SpreadWait: endpoint.DefaultSpreadWait, Log: s.log,
	})
	if err := n.setUpFlows(); err != nil {
		return nil, err
	}
	return n, n.restore()
}

// setUpRouting makes the node's devices: the pair to the pods, and the tunnel if there is to be one.
func (n *node) setUpRouting(config *datapath.Config) error {
	if config.Routing == datapath.RoutingVXLAN {
		index, err := netdev.SetupOverlay(n.uplink)
		if err != nil {
			return err
		}
		n.uplink.Overlay, n.uplink.PodMTU = index, netdev.OverlayMTU(n.uplink)
		config.OverlayIfIndex, config.OverlayPort = uint32(index), netdev.OverlayPort
	} else if err := netdev.DeleteLink(netdev.OverlayLink); err != nil {
		return err
	}
	if err := netdev.SetupNode(n.uplink); err != nil {
		return err
	}
	return netdev.SetupProxy()
}

// programs is the datapath as endpoints need it.
type programs struct{ *datapath.Datapath }

// Purge collects the connections of an endpoint that is gone.
func (p programs) Purge(id uint16) error {
	_, err := p.Conntrack().Purge(id)
	return err
}

// restore puts back what was there: the last policy state, then the endpoints, then the hooks that everything passes.
func (n *node) restore() error {
	if err := n.adopt(); err != nil {
		return err
	}
	if err := n.policy.Load(); err != nil {
		// The policy service sends it all again; until then new pods wait.
		n.log.Warn("no policy state from disk", "error", err)
	}
	if err := n.endpoints.Restore(); err != nil {
		return err
	}
	if err := n.datapath.AttachHost(netdev.NetLink); err != nil {
		return err
	}
	if err := n.datapath.AttachUplink(n.uplink.Name); err != nil {
		return err
	}
	if n.uplink.Overlay != 0 {
		if err := n.datapath.AttachOverlay(netdev.OverlayLink); err != nil {
			return err
		}
	}
	if n.config.Cgroup != "" {
		if err := n.datapath.AttachCgroup(n.config.Cgroup); err != nil {
			return err
		}
	}
	n.log.Info("datapath is in place", "path", n.datapath.Path())
	return nil
}

// run serves until ctx ends.
func (n *node) run(ctx context.Context) error {
	registry := prometheus.NewRegistry()
	registry.MustRegister(n.report, newCollector(n))
	rpc := server.New(server.Config{Name: "agent", Log: n.log, TLS: n.tls, Metrics: registry, Authorize: server.Table{
		"/" + agentv1.CNIService_ServiceDesc.ServiceName + "/":     {server.Local},
		"/" + agentv1.AgentService_ServiceDesc.ServiceName + "/":   {server.Local},
		"/" + agentv1.DNSService_ServiceDesc.ServiceName + "/":     {server.Local},
		"/" + statusv1.StatusService_ServiceDesc.ServiceName + "/": {server.Local},
	}})
	n.report.OnReady(func(ready bool) { rpc.SetServing("", ready) })
	n.report.Waiting(waitPolicy)
	n.report.Details(n.details)
	n.report.Register(rpc.GRPC())
	agentv1.RegisterCNIServiceServer(rpc.GRPC(), cni.New(n.endpoints, n.ready))
	agentv1.RegisterAgentServiceServer(rpc.GRPC(), api.New(api.Config{
		Endpoints: n.endpoints, Directory: n.directory, Services: n.mirror, Conntrack: n.datapath.Conntrack(), IPCache: n.datapath.IPCache(),
		ServiceMaps: n.datapath.Services(), Monitor: n.monitor, Clock: n.clock, Draining: rpc.Draining(),
		Policies: n.policies, Peers: n.mirror, Slots: n.slots, SlotUsers: n.slotUsers, Now: time.Now,
	}))
	agentv1.RegisterDNSServiceServer(rpc.GRPC(), n.names)
	ln, err := server.ListenUnix(n.config.Socket)
	if err != nil {
		return err
	}
	logs, logsListener, err := n.accessLogServer()
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	if err := n.pipeline.Begin(); err != nil {
		return errors.Join(err, ln.Close(), logsListener.Close())
	}

	// The publisher outlives the rest by a little, to carry what is left.
	sendCtx, stopSending := context.WithCancel(context.WithoutCancel(ctx))
	defer stopSending()
	sent := make(chan error, 1)
	go func() { sent <- n.publisher.Run(sendCtx) }()

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return n.clock.Run(ctx) })
	group.Go(func() error { return n.policy.Run(ctx) })
	group.Go(func() error { return n.policies.Run(ctx) })
	group.Go(func() error { return n.pipeline.Run(ctx) })
	group.Go(func() error { return n.sweep(ctx) })
	group.Go(func() error { return n.retry(ctx) })
	group.Go(func() error { return n.health(ctx) })
	group.Go(func() error { return rpc.Serve(ctx, ln) })
	group.Go(func() error { return logs.Serve(ctx, logsListener) })
	group.Go(func() error {
		<-ctx.Done()
		close(n.draining)
		return nil
	})
	group.Go(func() error { return status.ServeHTTP(ctx, n.config.MetricsListen, n.report.Handler(registry)) })
	n.log.Info("agent runs", "socket", n.config.Socket, "uplink", n.uplink.Name, "mtu", n.uplink.PodMTU)
	err = group.Wait()
	n.drain(stopSending)
	return errors.Join(err, <-sent)
}

func (n *node) sink() sink { return sink{n.slots, n.names, n.policies, n.mirror} }

func (s *Service) path(name string) string { return filepath.Join(s.config.StateDir, name) }

// dialer connects to replicas of a service, each by its address.
func (s *Service) dialer(service string) func(string) (*grpc.ClientConn, error) {
	return func(address string) (*grpc.ClientConn, error) {
		return client.New(client.Config{Addresses: []string{address}, TLS: s.tls, Service: service})
	}
}

// worlds are the identities of what is outside of the cluster: one in a single-stack cluster, one a family in a dual-stack one.
func (n *node) worlds() (v4, v6 uint32) {
	if n.uplink.IPv4.IsValid() && n.uplink.IPv6.IsValid() {
		return datapath.IdentityWorldIPv4, datapath.IdentityWorldIPv6
	}
	return datapath.IdentityWorld, datapath.IdentityWorld
}
