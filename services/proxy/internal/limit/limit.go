// SPDX-License-Identifier: Apache-2.0

// Package limit bounds what one tenant of the node's proxy may use, so that a flood is shed at who makes it.
package limit

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
)

// Config are the bounds; 0 = no bound.
type Config struct {
	// Of one namespace.
	Connections, Requests, Buffer int64
	// AcceptRate is new connections a second of one namespace; bursts of one second's worth pass.
	AcceptRate float64
	// Of all namespaces together. When one is reached, only who holds more than an equal share is refused.
	TotalConnections, TotalRequests, TotalBuffer int64
}

// Validate reports all faults joined.
func (c Config) Validate() error {
	var errs []error
	for name, v := range map[string]int64{
		"tenant-connections": c.Connections, "tenant-requests": c.Requests, "tenant-buffer-bytes": c.Buffer,
		"max-connections": c.TotalConnections, "max-requests": c.TotalRequests, "max-buffer-bytes": c.TotalBuffer,
	} {
		if v < 0 {
			errs = append(errs, fmt.Errorf("%s is negative", name))
		}
	}
	if c.AcceptRate < 0 {
		errs = append(errs, errors.New("tenant-accept-rate is negative"))
	}
	return errors.Join(errs...)
}

// Causes of refusal that this package counts.
const (
	CauseConnections      = "connections"
	CauseAcceptRate       = "accept-rate"
	CauseRequests         = "requests"
	CauseBuffer           = "buffer"
	CauseTotalConnections = "total-connections"
	CauseTotalRequests    = "total-requests"
	CauseTotalBuffer      = "total-buffer"
)

// maxTenants bounds the table and the metric's label; later namespaces share one entry.
const maxTenants = 10000

// overflow is the name of that entry.
const overflow = "(others)"

// Tenants implements model.Limits. Safe for concurrent use.
type Tenants struct {
	config  Config
	refused *prometheus.CounterVec

	tenants sync.Map // namespace -> *tenant
	count   atomic.Int64

	connections, requests, buffer pool
}

// pool is one resource that all share.
type pool struct {
	total  int64 // the bound; 0 = none
	used   atomic.Int64
	active atomic.Int64 // tenants that hold some
}

// tenant is what one namespace holds.
type tenant struct {
	name                          string
	connections, requests, buffer atomic.Int64
	accepts                       *rate.Limiter
}

// New makes the limits and registers their metrics.
func New(config Config, registry prometheus.Registerer) *Tenants {
	t := &Tenants{
		config: config,
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weir_proxy_refused_total", Help: "What was refused to a tenant, by cause.",
		}, []string{"namespace", "cause"}),
	}
	t.connections.total, t.requests.total, t.buffer.total = config.TotalConnections, config.TotalRequests, config.TotalBuffer
	registry.MustRegister(t.refused, &usage{t})
	return t
}

func (t *Tenants) tenant(namespace string) *tenant {
	if v, ok := t.tenants.Load(namespace); ok {
		return v.(*tenant) //nolint:forcetypeassert // only tenants are stored
	}
	if namespace != overflow && t.count.Load() >= maxTenants {
		return t.tenant(overflow)
	}
	fresh := &tenant{name: namespace}
	if t.config.AcceptRate > 0 {
		fresh.accepts = rate.NewLimiter(rate.Limit(t.config.AcceptRate), max(1, int(t.config.AcceptRate)))
	}
	v, loaded := t.tenants.LoadOrStore(namespace, fresh)
	if !loaded {
		t.count.Add(1)
	}
	return v.(*tenant) //nolint:forcetypeassert // only tenants are stored
}

// take reserves n of a resource. over is the cause that refused, "" = none.
func (p *pool) take(own *atomic.Int64, limit, n int64, cause, totalCause string) (over string) {
	held := own.Load()
	for {
		if limit > 0 && held+n > limit {
			return cause
		}
		if own.CompareAndSwap(held, held+n) {
			break
		}
		held = own.Load()
	}
	if held == 0 {
		p.active.Add(1)
	}
	if used := p.used.Add(n); p.total > 0 && used > p.total && held+n > p.total/max(1, p.active.Load()) {
		p.put(own, n)
		return totalCause
	}
	return ""
}

func (p *pool) put(own *atomic.Int64, n int64) {
	p.used.Add(-n)
	if own.Add(-n) == 0 {
		p.active.Add(-1)
	}
}

// Connection implements model.Limits. It counts against the accept rate as well.
func (t *Tenants) Connection(namespace string) (release func(), ok bool) {
	own := t.tenant(namespace)
	if own.accepts != nil && !own.accepts.Allow() {
		t.Refused(own.name, CauseAcceptRate)
		return nil, false
	}
	return t.reserve(own, &t.connections, &own.connections, t.config.Connections, 1, CauseConnections, CauseTotalConnections)
}

// Request implements model.Limits.
func (t *Tenants) Request(namespace string) (release func(), ok bool) {
	own := t.tenant(namespace)
	return t.reserve(own, &t.requests, &own.requests, t.config.Requests, 1, CauseRequests, CauseTotalRequests)
}

// Buffer implements model.Limits.
func (t *Tenants) Buffer(namespace string, n int) (release func(), ok bool) {
	if n <= 0 {
		return func() {}, true
	}
	own := t.tenant(namespace)
	return t.reserve(own, &t.buffer, &own.buffer, t.config.Buffer, int64(n), CauseBuffer, CauseTotalBuffer)
}

func (t *Tenants) reserve(who *tenant, p *pool, own *atomic.Int64, limit, n int64, cause, totalCause string) (func(), bool) {
	if over := p.take(own, limit, n, cause, totalCause); over != "" {
		t.Refused(who.name, over)
		return nil, false
	}
	var done atomic.Bool
	return func() {
		if done.CompareAndSwap(false, true) {
			p.put(own, n)
		}
	}, true
}

// Refused implements model.Limits.
func (t *Tenants) Refused(namespace, cause string) { t.refused.WithLabelValues(namespace, cause).Inc() }

// Connections returns how many connections are open.
func (t *Tenants) Connections() int64 { return t.connections.used.Load() }

// usage exports what tenants hold.
type usage struct{ t *Tenants }

var usageDesc = prometheus.NewDesc("weir_proxy_in_use", "What a tenant holds now.", []string{"namespace", "resource"}, nil)

// Describe implements prometheus.Collector.
func (u *usage) Describe(ch chan<- *prometheus.Desc) { ch <- usageDesc }

// Collect implements prometheus.Collector.
func (u *usage) Collect(ch chan<- prometheus.Metric) {
	u.t.tenants.Range(func(_, v any) bool {
		own := v.(*tenant) //nolint:forcetypeassert // only tenants are stored
		for resource, n := range map[string]int64{
			"connections": own.connections.Load(), "requests": own.requests.Load(), "buffer-bytes": own.buffer.Load(),
		} {
			ch <- prometheus.MustNewConstMetric(usageDesc, prometheus.GaugeValue, float64(n), own.name, resource)
		}
		return true
	})
}
