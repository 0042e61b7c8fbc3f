// SPDX-License-Identifier: Apache-2.0

// Package policy is Weir's policy service: it watches the cluster's objects, has the identity
// broker number their label sets, and streams to each node's agent what that node needs.
package policy

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/client"
	weirserver "github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/policy/internal/broker"
	"github.com/weirmesh/weir/services/policy/internal/hub"
	"github.com/weirmesh/weir/services/policy/internal/label"
	"github.com/weirmesh/weir/services/policy/internal/progress"
	"github.com/weirmesh/weir/services/policy/internal/query"
	"github.com/weirmesh/weir/services/policy/internal/server"
	"github.com/weirmesh/weir/services/policy/internal/source"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// Service is a policy service. Make it with New; call Run once.
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
	return &Service{config: config, log: log, tls: tls, report: status.New("policy", "")}, nil
}

// Run serves until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	sourceConn, err := client.New(client.Config{Addresses: []string{s.config.Source}, TLS: s.tls, Service: "source"})
	if err != nil {
		return err
	}
	defer sourceConn.Close()
	identityConn, err := client.New(client.Config{Addresses: s.config.Identity, TLS: s.tls, Service: "identity", Balance: true})
	if err != nil {
		return err
	}
	defer identityConn.Close()
	listeners, err := weirserver.Listen(ctx, s.config.Listen, s.config.Socket, s.config.Listeners...)
	if err != nil {
		return err
	}

	options, err := s.config.options()
	if err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(s.report)
	rpc := weirserver.New(weirserver.Config{
		Name: "policy", Log: s.log, TLS: s.tls, Authorize: server.Authorize(), Metrics: registry,
	})
	s.report.OnReady(func(ready bool) { rpc.SetServing("", ready) })
	s.report.Register(rpc.GRPC())

	group, ctx := errgroup.WithContext(ctx)
	objects := source.NewStream(sourceConn, s.log, s.report)
	var h *hub.Hub
	numbers := broker.New(broker.DefaultConfig(), identityConn, s.log, func(set label.Set, number uint32) {
		s.numbered(ctx, h, set, number)
	})
	h = hub.New(hub.DefaultConfig(), s.log, numbers, s.report)
	policyv1.RegisterPolicyServiceServer(rpc.GRPC(), server.New(h, s.log, s.report, rpc.Draining()))
	policyv1.RegisterRenderServiceServer(rpc.GRPC(), server.NewRender(h, s.log, s.report, rpc.Draining()))
	policyv1.RegisterPolicyQueryServiceServer(rpc.GRPC(), query.New(h))
	s.report.Details(func() []status.Detail { return details(h.Status(), numbers) })
	registry.MustRegister(newCollector(h, numbers))

	desired := state.NewWith(options)
	desired.SetStandIns(s.config.StandIns)
	group.Go(func() error { return h.Run(ctx, desired) })
	group.Go(func() error { return numbers.Run(ctx) })
	group.Go(func() error { return s.rest(ctx, h) })
	statuses := progress.NewWriter(objects, s.holder(), func(ctx context.Context) ([]progress.Object, error) { return progress.Of(ctx, h) }, time.Now, s.log)
	group.Go(func() error { return statuses.Run(ctx) })
	group.Go(func() error {
		return objects.Run(ctx, func(e source.Event) { s.apply(ctx, h, e) })
	})
	group.Go(func() error { return rpc.Serve(ctx, listeners...) })
	group.Go(func() error { return status.ServeHTTP(ctx, s.config.MetricsListen, s.report.Handler(registry)) })
	s.log.Info("policy service runs", "listen", listeners[0].Addr().String(), "source", s.config.Source, "identity", s.config.Identity)
	return group.Wait()
}

// holder names this replica to others.
func (s *Service) holder() string {
	host, err := os.Hostname()
	if err != nil {
		host = "policy"
	}
	return host + "-" + rand.Text()
}

// restEvery is longer than an agent may lag: see state.Rest.
const restEvery = time.Minute

// rest has the state forget what it needed last long ago.
func (s *Service) rest(ctx context.Context, h *hub.Hub) error {
	ticker := time.NewTicker(restEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			if err := h.Post(ctx, (*state.State).Rest); err != nil && ctx.Err() == nil {
				return err
			}
		}
	}
}

// apply hands an event of the source to the hub. It fails only when the service ends.
func (s *Service) apply(ctx context.Context, h *hub.Hub, e source.Event) {
	err := h.Post(ctx, func(st *state.State) {
		switch {
		case e.Upsert != nil:
			st.Upsert(e.Upsert)
		case e.Delete != nil:
			st.Delete(*e.Delete)
		case e.Synced:
			st.MarkSynced()
		}
	})
	if err != nil && ctx.Err() == nil {
		s.log.Error("an object was not taken in", "error", err)
	}
}

func (s *Service) numbered(ctx context.Context, h *hub.Hub, set label.Set, number uint32) {
	refused := s.report.Loss("identity", "number refused")
	err := h.Post(ctx, func(st *state.State) {
		if err := st.SetNumber(set, number); err != nil {
			refused.Add(1)
			s.log.Error("identity number refused, its pods keep waiting", "error", err)
		}
	})
	if err != nil && ctx.Err() == nil {
		s.log.Error("an identity number was not taken in", "error", err)
	}
}

// details is what an operator reads first.
func details(st hub.Status, numbers *broker.Broker) []status.Detail {
	answers, failures := numbers.Status()
	identity := "answers"
	if !answers {
		identity = "does not answer"
	}
	d := []status.Detail{
		{Name: "revision", Value: strconv.FormatUint(st.Revision, 10)},
		{Name: "nodes", Value: strconv.Itoa(st.Snapshot.Count(state.KindNode))},
		{Name: "endpoints", Value: strconv.Itoa(st.Snapshot.Count(state.KindEndpoint))},
		{Name: "identities", Value: strconv.Itoa(st.Snapshot.Count(state.KindIdentity))},
		{Name: "services", Value: strconv.Itoa(st.Snapshot.Count(state.KindService))},
		{Name: "namespaces", Value: strconv.Itoa(st.Snapshot.Count(state.KindNamespace))},
		{Name: "policies", Value: fmt.Sprintf("%d, %d of them not valid", st.Policies, st.Invalid)},
		{Name: "resolved policies", Value: fmt.Sprintf("%d, with %d selectors, for %d endpoints", st.Snapshot.Count(state.KindPolicy),
			st.Snapshot.Count(state.KindSelector), st.Snapshot.Count(state.KindSubject))},
		{Name: "last change computed in", Value: st.LastCommit.Round(time.Microsecond).String()},
		{Name: "label sets without number", Value: strconv.Itoa(st.MissingNumbers)},
		{Name: "identity broker", Value: fmt.Sprintf("%s, %d calls made again", identity, failures)},
		{Name: "agents", Value: strconv.Itoa(len(st.Agents))},
	}
	d = append(d, proxyDetails(st)...)
	for _, a := range st.Agents {
		value := fmt.Sprintf("revision %d, behind %d, unacknowledged %d, connected %s", a.Held, st.Revision-min(a.Held, st.Revision),
			a.Unacknowledged, time.Since(a.Since).Round(time.Second))
		if !a.Synced {
			value += ", first state under way"
		}
		if n := len(a.Refusals); n > 0 {
			value += fmt.Sprintf(", does not enforce %d resources", n)
		}
		d = append(d, status.Detail{Name: "agent " + a.Node, Value: value})
	}
	return d
}

// maxWarnings bounds how many objects the status names.
const maxWarnings = 20

// proxyDetails says what proxies are given, and what became of it.
func proxyDetails(st hub.Status) []status.Detail {
	render := st.Snapshot.Render()
	d := []status.Detail{
		{Name: "proxies", Value: fmt.Sprintf("%d filters, %d Envoy configurations, on %d nodes; %d resources are refused", render.Count(state.RenderFilter),
			render.Count(state.RenderConfig), render.Count(state.RenderNode), len(st.Faults))},
		{Name: "xds servers", Value: strconv.Itoa(len(st.XDS))},
	}
	for _, x := range st.XDS {
		value := "connected " + time.Since(x.Since).Round(time.Second).String()
		if !x.Synced {
			value += ", first state under way"
		}
		if x.Faults > 0 {
			value += fmt.Sprintf(", tells of %d refused resources", x.Faults)
		}
		d = append(d, status.Detail{Name: "xds server " + x.Instance, Value: value})
	}
	for i, w := range st.Warnings {
		if i == maxWarnings {
			d = append(d, status.Detail{Name: "warnings", Value: fmt.Sprintf("%d more", len(st.Warnings)-i)})
			break
		}
		d = append(d, status.Detail{Name: "warning " + w.Object.String(), Value: w.Text})
	}
	return d
}
