// SPDX-License-Identifier: Apache-2.0

// Package identity is Weir's identity broker: it gives each label set of the cluster one number,
// and each number one label set, with any number of brokers over one NATS.
package identity

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	identityv1 "github.com/weirmesh/weir/gen/weir/identity/v1"
	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/internal/flags"
	weirserver "github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/identity/internal/allocator"
	"github.com/weirmesh/weir/services/identity/internal/server"
	"github.com/weirmesh/weir/services/identity/internal/store"
)

// Config is the configuration of an identity broker.
type Config struct {
	flags.Common
	// NATS is the URL of the NATS servers, comma-separated.
	NATS string
	// Replicas is the number of NATS servers that hold an identity before it is answered; default 1.
	Replicas int
	// Allocator says how long numbers rest, and so on.
	Allocator allocator.Config
	// Listeners, if not empty, are served with mutual TLS instead of Listen, which a process with several
	// network namespaces needs. The service closes them.
	Listeners []net.Listener
}

// DefaultConfig returns the defaults.
func DefaultConfig() Config {
	return Config{Common: flags.Default(":18002"), Replicas: 1, Allocator: allocator.DefaultConfig()}
}

// Validate reports all faults joined.
func (c *Config) Validate() error {
	errs := []error{c.Common.Validate(), c.TLS.Validate()}
	if c.NATS == "" {
		errs = append(errs, errors.New("nats is empty"))
	}
	if c.Listen == "" && len(c.Listeners) == 0 {
		errs = append(errs, errors.New("listen is empty"))
	}
	if c.Replicas < 1 {
		errs = append(errs, fmt.Errorf("nats-replicas is %d, not 1 or more", c.Replicas))
	}
	if a := c.Allocator; a.Rest < 0 || a.ReleaseWait < 0 {
		errs = append(errs, errors.New("rest or release-wait is negative"))
	}
	return errors.Join(errs...)
}

// Service is an identity broker. Make it with New; call Run once.
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
	return &Service{config: config, log: log, tls: tls, report: status.New("identity", "")}, nil
}

// Run serves until ctx ends. NATS may be away: calls then fail as unavailable, and it comes back by
// itself.
func (s *Service) Run(ctx context.Context) error {
	conn, err := bus.Connect(s.config.NATS, s.tls.ClientTLS(bus.Service), s.log)
	if err != nil {
		return err
	}
	defer conn.Close()
	keys, err := store.New(conn, s.config.Replicas)
	if err != nil {
		return err
	}
	listeners, err := weirserver.Listen(ctx, s.config.Listen, s.config.Socket, s.config.Listeners...)
	if err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(s.report)
	rpc := weirserver.New(weirserver.Config{
		Name: "identity", Log: s.log, TLS: s.tls, Authorize: server.Authorize(), Metrics: registry,
	})
	s.report.OnReady(func(ready bool) { rpc.SetServing("", ready) })
	s.report.Register(rpc.GRPC())
	numbers := allocator.New(s.config.Allocator, keys, s.log, s.report)
	identityv1.RegisterIdentityServiceServer(rpc.GRPC(), server.New(numbers, s.config.ClusterName))
	s.report.Details(func() []status.Detail { return details(numbers.Stats()) })
	registry.MustRegister(collector{numbers})

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return numbers.Run(ctx) })
	group.Go(func() error { return rpc.Serve(ctx, listeners...) })
	group.Go(func() error { return status.ServeHTTP(ctx, s.config.MetricsListen, s.report.Handler(registry)) })
	s.log.Info("identity broker runs", "listen", listeners[0].Addr().String(), "nats", s.config.NATS)
	return group.Wait()
}

// details is what an operator reads first.
func details(s allocator.Stats) []status.Detail {
	return []status.Detail{
		{Name: "identities", Value: strconv.Itoa(s.Identities)},
		{Name: "released", Value: strconv.Itoa(s.Released)},
		{Name: "numbers resting", Value: strconv.Itoa(s.Resting)},
		{Name: "allocated here", Value: strconv.FormatUint(s.Allocated, 10)},
		{Name: "collected here", Value: strconv.FormatUint(s.Collected+s.Orphans, 10)},
	}
}

// collector exports the allocator's figures at the time of the scrape.
type collector struct{ numbers *allocator.Allocator }

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

// Collect implements prometheus.Collector.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	s := c.numbers.Stats()
	for _, m := range []struct {
		name, help string
		kind       prometheus.ValueType
		value      float64
	}{
		{"weir_identity_identities", "Identities of the cluster.", prometheus.GaugeValue, float64(s.Identities)},
		{"weir_identity_released", "Identities out of use that keep their number for a while.", prometheus.GaugeValue, float64(s.Released)},
		{"weir_identity_resting", "Freed numbers that are not given again yet.", prometheus.GaugeValue, float64(s.Resting)},
		{"weir_identity_allocated_total", "Numbers given by this broker.", prometheus.CounterValue, float64(s.Allocated)},
		{"weir_identity_revived_total", "Released sets asked for again at this broker.", prometheus.CounterValue, float64(s.Revived)},
		{"weir_identity_races_lost_total", "Sets that another broker numbered first.", prometheus.CounterValue, float64(s.Lost)},
		{"weir_identity_number_collisions_total", "Numbers that were taken when this broker tried them.", prometheus.CounterValue, float64(s.Collisions)},
		{"weir_identity_collected_total", "Released sets that this broker removed.", prometheus.CounterValue, float64(s.Collected)},
		{"weir_identity_orphans_total", "Claims without a link that this broker removed.", prometheus.CounterValue, float64(s.Orphans)},
	} {
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc(m.name, m.help, nil, nil), m.kind, m.value)
	}
}
