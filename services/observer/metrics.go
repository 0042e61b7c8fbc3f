// SPDX-License-Identifier: Apache-2.0

package observer

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// lossName turns PLACE_KERNEL into kernel.
func lossName(enum, prefix string) string {
	return strings.ToLower(strings.TrimPrefix(enum, prefix))
}

var (
	descFlows = prometheus.NewDesc("weir_observer_flows_total", "Flows received, each once.", []string{"node"}, nil)
	// A gauge: a gap is taken back when its records come after all.
	descLost        = prometheus.NewDesc("weir_observer_lost_records", "Records lost, each counted once.", []string{"node", "place", "cause"}, nil)
	descInMemory    = prometheus.NewDesc("weir_observer_memory_events", "Events in memory.", nil, nil)
	descMemoryBytes = prometheus.NewDesc("weir_observer_memory_bytes", "Bytes of memory that they take.", nil, nil)
	descConnected   = prometheus.NewDesc("weir_observer_node_connected", "1 when the node's agent is connected.", []string{"node"}, nil)
	descBatches     = prometheus.NewDesc("weir_observer_batches_total", "Batches read, by what they were.", []string{"kind"}, nil)
	descCut         = prometheus.NewDesc("weir_observer_unordered_records_total", "Records handed on before their time because too many bytes waited for it.", nil, nil)
)

// collector exports what the parts count.
type collector struct{ service *Service }

// Describe implements prometheus.Collector.
func (*collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descFlows, descLost, descInMemory, descMemoryBytes, descConnected, descBatches, descCut} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	s := c.service
	for _, n := range s.nodes.Nodes() {
		connected := 0.0
		if n.Connected {
			connected = 1
		}
		ch <- prometheus.MustNewConstMetric(descFlows, prometheus.CounterValue, float64(n.Flows), n.Name)
		ch <- prometheus.MustNewConstMetric(descConnected, prometheus.GaugeValue, connected, n.Name)
	}
	for _, l := range s.nodes.Losses() {
		ch <- prometheus.MustNewConstMetric(descLost, prometheus.GaugeValue, float64(l.Count),
			l.NodeName, lossName(l.Place.String(), "PLACE_"), lossName(l.Cause.String(), "CAUSE_"))
	}
	stats := s.flows.Stats()
	ch <- prometheus.MustNewConstMetric(descInMemory, prometheus.GaugeValue, float64(stats.Events))
	ch <- prometheus.MustNewConstMetric(descMemoryBytes, prometheus.GaugeValue, float64(stats.Bytes))
	counters, cut := s.live.Counters()
	for kind, n := range map[string]uint64{"readable": counters.Batches, "duplicate": counters.Duplicates, "unreadable": counters.Unreadable} {
		ch <- prometheus.MustNewConstMetric(descBatches, prometheus.CounterValue, float64(n), kind)
	}
	ch <- prometheus.MustNewConstMetric(descCut, prometheus.CounterValue, float64(cut))
}
