// SPDX-License-Identifier: Apache-2.0

package ads

import "github.com/prometheus/client_golang/prometheus"

// Metrics of the discovery server.
type Metrics struct {
	streams                                  *prometheus.GaugeVec
	requests, responses, bytes, nacks, stale *prometheus.CounterVec
	refused                                  *prometheus.GaugeVec
	impatience                               prometheus.Counter
}

// NewMetrics registers the metrics.
func NewMetrics(registry prometheus.Registerer) *Metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "weir_xds_" + name, Help: help}, labels)
	}
	m := &Metrics{
		streams:   prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "weir_xds_streams", Help: "Open streams."}, []string{"protocol"}),
		requests:  counter("requests_total", "Discovery requests, acknowledgements included.", "type"),
		responses: counter("responses_total", "Discovery responses.", "type"),
		bytes:     counter("response_bytes_total", "Bytes of resources that were sent.", "type"),
		nacks:     counter("nacks_total", "Responses that a client refused.", "type"),
		stale:     counter("stale_requests_total", "Requests that answered another response than the last.", "type"),
		refused: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "weir_xds_refused", Help: "Filters and configurations that are not in force on a node: refused by its proxy, or not to be rendered.",
		}, []string{"node"}),
		impatience: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "weir_xds_order_timeouts_total", Help: "Times that routes did not wait for clusters, or clusters for routes, any longer.",
		}),
	}
	registry.MustRegister(m.streams, m.requests, m.responses, m.bytes, m.nacks, m.stale, m.refused, m.impatience)
	return m
}
