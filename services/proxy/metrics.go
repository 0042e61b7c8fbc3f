// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"os"
	"runtime"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weirmesh/weir/services/proxy/internal/xds"
)

// collector exports what the parts count.
type collector struct{ s *Service }

// desc makes a metric's description.
func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("weir_proxy_"+name, help, labels, nil)
}

// Describe implements prometheus.Collector. Describing nothing makes it an unchecked one: its metrics are made at each collection.
func (c *collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	s := c.s
	gauge := func(value float64, name, help string) {
		ch <- prometheus.MustNewConstMetric(desc(name, help), prometheus.GaugeValue, value)
	}
	counter := func(value uint64, name, help string) {
		ch <- prometheus.MustNewConstMetric(desc(name, help), prometheus.CounterValue, float64(value))
	}
	st := s.client.Stats()
	connected := 0.0
	if st.Connected {
		connected = 1
	}
	gauge(connected, "xds_connected", "1 when an xDS server answers.")
	counter(st.Responses, "xds_responses_total", "Answers of the xDS server.")
	counter(st.Nacks, "xds_nacks_total", "Answers of which something was refused.")
	counter(st.Broken, "xds_streams_broken_total", "Streams to the xDS server that ended.")
	gauge(float64(s.state.Refused()), "xds_refused_resources", "Resources whose newest version is not in force.")
	for typeURL, name := range map[string]string{xds.Cluster: "cluster", xds.Endpoint: "endpoint", xds.Listener: "listener", xds.Route: "route"} {
		ch <- prometheus.MustNewConstMetric(desc("resources", "Resources in force.", "type"), prometheus.GaugeValue,
			float64(s.state.Counts()[typeURL]), name)
	}
	counter(s.accessLog.Sent(), "access_log_entries_total", "Entries that were handed to the access log's server.")
	gauge(float64(s.accessLog.Waiting()), "access_log_waiting_bytes", "Bytes of entries that wait.")
	gauge(float64(s.listeners.Pending()), "listeners_waiting", "Listeners that wait for their routes or for an address.")
	var open, total float64
	for _, l := range s.listeners.Status() {
		open += float64(l.Connections)
		total += float64(l.Total)
	}
	gauge(open, "connections", "Open connections of clients.")
	gauge(total, "connections_accepted", "Connections that the present listeners accepted.")
	c.process(gauge)
	for _, cl := range s.clusters.Status() {
		n := cl.Counters
		for _, one := range []struct {
			name, help string
			value      float64
			kind       prometheus.ValueType
		}{
			{"upstream_connections", "Open connections to a cluster.", float64(n.Connections.Load()), prometheus.GaugeValue},
			{"upstream_requests_total", "Requests and connections led to a cluster.", float64(n.TotalRequests.Load()), prometheus.CounterValue},
			{"upstream_failures_total", "Of them those that failed.", float64(n.FailedRequests.Load()), prometheus.CounterValue},
			{"upstream_connect_failures_total", "Attempts to connect that failed.", float64(n.ConnectFailures.Load()), prometheus.CounterValue},
			{"upstream_overflows_total", "What a circuit breaker refused.", float64(n.Overflows.Load()), prometheus.CounterValue},
		} {
			ch <- prometheus.MustNewConstMetric(desc(one.name, one.help, "cluster"), one.kind, one.value, cl.Name)
		}
	}
}

// process exports what must not grow for ever.
func (c *collector) process(gauge func(value float64, name, help string)) {
	gauge(float64(runtime.NumGoroutine()), "goroutines", "Goroutines.")
	if entries, err := os.ReadDir("/proc/self/fd"); err == nil {
		gauge(float64(len(entries)), "open_files", "Open descriptors.")
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	gauge(float64(m.HeapAlloc), "heap_bytes", "Bytes of the heap in use.")
}
