// SPDX-License-Identifier: Apache-2.0

// Package status is what a part of Weir says of itself: named readiness tasks, details for the
// operator and counters of what was lost. A Reporter answers weir.status.v1.StatusService, the
// probes /healthz and /readyz, and /metrics.
package status

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/version"
)

// Detail is a name and a value that an operator reads.
type Detail struct {
	Name  string
	Value string
}

// Reporter collects what a part says of itself. Make it with New; safe for concurrent use.
type Reporter struct {
	statusv1.UnimplementedStatusServiceServer

	part     string
	instance string
	started  time.Time

	mu      sync.Mutex
	waiting map[string]bool // task -> still waiting
	onReady []func(bool)
	details []func() []Detail
	losses  map[lossKey]*Loss
	order   []lossKey
}

type lossKey struct{ place, cause string }

// Loss is a counter of things lost or refused at one place for one cause.
type Loss struct {
	count atomic.Uint64
}

// Add counts n more.
func (l *Loss) Add(n uint64) { l.count.Add(n) }

// Value returns the count.
func (l *Loss) Value() uint64 { return l.count.Load() }

// New makes a reporter of a part; instance is its node, or what tells its replicas apart. The part
// is ready when no task waits.
func New(part, instance string) *Reporter {
	return &Reporter{
		part:     part,
		instance: instance,
		started:  time.Now(),
		waiting:  map[string]bool{},
		losses:   map[lossKey]*Loss{},
	}
}

// Waiting says that the part is not ready until Done is called with the same task. A task may come
// back, such as "connected to NATS".
func (r *Reporter) Waiting(task string) { r.set(task, true) }

// Done ends a task.
func (r *Reporter) Done(task string) { r.set(task, false) }

func (r *Reporter) set(task string, waiting bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.readyLocked()
	if waiting {
		r.waiting[task] = true
	} else {
		delete(r.waiting, task)
	}
	if after := r.readyLocked(); after != before {
		for _, f := range r.onReady {
			f(after)
		}
	}
}

func (r *Reporter) readyLocked() bool { return len(r.waiting) == 0 }

// Ready reports whether no task waits.
func (r *Reporter) Ready() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.readyLocked()
}

// OnReady calls f with the present readiness now and at each change, such as server.SetServing. f
// must not call the reporter.
func (r *Reporter) OnReady(f func(ready bool)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.onReady = append(r.onReady, f)
	f(r.readyLocked())
}

// Details adds a function that is asked at each GetStatus; its details are shown in the order of
// the calls to Details. It must not block.
func (r *Reporter) Details(f func() []Detail) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.details = append(r.details, f)
}

// Loss returns the counter of a place and a cause, the same one each time.
func (r *Reporter) Loss(place, cause string) *Loss {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := lossKey{place, cause}
	if loss, ok := r.losses[key]; ok {
		return loss
	}
	loss := &Loss{}
	r.losses[key] = loss
	r.order = append(r.order, key)
	return loss
}

// Register serves StatusService. Allow it to server.Local only.
func (r *Reporter) Register(registrar grpc.ServiceRegistrar) {
	statusv1.RegisterStatusServiceServer(registrar, r)
}

// GetStatus implements StatusService. Caller: the command line, on the unix socket.
func (r *Reporter) GetStatus(context.Context, *statusv1.GetStatusRequest) (*statusv1.GetStatusResponse, error) {
	r.mu.Lock()
	response := &statusv1.GetStatusResponse{
		Part:       r.part,
		Instance:   r.instance,
		Version:    version.Version,
		Ready:      r.readyLocked(),
		WaitingFor: r.waitingLocked(),
		Started:    timestamppb.New(r.started),
	}
	details := slices.Clone(r.details)
	for _, key := range r.order {
		if n := r.losses[key].Value(); n > 0 {
			response.Losses = append(response.Losses, &statusv1.Counter{Place: key.place, Cause: key.cause, Count: n})
		}
	}
	r.mu.Unlock()

	for _, f := range details {
		for _, d := range f() {
			response.Details = append(response.Details, &statusv1.Detail{Name: d.Name, Value: d.Value})
		}
	}
	return response, nil
}

func (r *Reporter) waitingLocked() []string {
	var tasks []string
	for task := range r.waiting {
		tasks = append(tasks, task)
	}
	slices.Sort(tasks)
	return tasks
}

var lossDesc = prometheus.NewDesc("weir_losses_total", "What was lost or refused, by place and cause.",
	[]string{"part", "place", "cause"}, nil)

var readyDesc = prometheus.NewDesc("weir_ready", "1 when the part is ready.", []string{"part", "version"}, nil)

// Describe implements prometheus.Collector.
func (r *Reporter) Describe(ch chan<- *prometheus.Desc) {
	ch <- lossDesc
	ch <- readyDesc
}

// Collect implements prometheus.Collector.
func (r *Reporter) Collect(ch chan<- prometheus.Metric) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, key := range r.order {
		ch <- prometheus.MustNewConstMetric(lossDesc, prometheus.CounterValue,
			float64(r.losses[key].Value()), r.part, key.place, key.cause)
	}
	ready := 0.0
	if r.readyLocked() {
		ready = 1
	}
	ch <- prometheus.MustNewConstMetric(readyDesc, prometheus.GaugeValue, ready, r.part, version.Version)
}
