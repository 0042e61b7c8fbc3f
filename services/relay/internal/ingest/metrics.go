// SPDX-License-Identifier: Apache-2.0

package ingest

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/weirmesh/weir/internal/status"
)

// Metrics counts what the relay did.
type Metrics struct {
	streams    prometheus.Gauge
	received   prometheus.Counter
	records    prometheus.Counter
	bytes      prometheus.Counter
	stored     prometheus.Counter
	duplicates prometheus.Counter
	refused    *prometheus.CounterVec
}

// NewMetrics makes and registers the metrics.
func NewMetrics(registry prometheus.Registerer) *Metrics {
	m := &Metrics{
		streams:    prometheus.NewGauge(prometheus.GaugeOpts{Name: "weir_relay_streams", Help: "Open streams of agents."}),
		received:   prometheus.NewCounter(prometheus.CounterOpts{Name: "weir_relay_batches_received_total", Help: "Readable batches received, resent ones included."}),
		records:    prometheus.NewCounter(prometheus.CounterOpts{Name: "weir_relay_records_received_total", Help: "Records in the received batches."}),
		bytes:      prometheus.NewCounter(prometheus.CounterOpts{Name: "weir_relay_bytes_received_total", Help: "Bytes of the received batches."}),
		stored:     prometheus.NewCounter(prometheus.CounterOpts{Name: "weir_relay_batches_stored_total", Help: "Batches that JetStream stored and the agent was told of."}),
		duplicates: prometheus.NewCounter(prometheus.CounterOpts{Name: "weir_relay_batches_duplicate_total", Help: "Stored batches that JetStream had already."}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "weir_relay_batches_refused_total",
			Help: "Batches not taken, by reason; the agent keeps them, except invalid ones.",
		}, []string{"reason"}),
	}
	registry.MustRegister(m.streams, m.received, m.records, m.bytes, m.stored, m.duplicates, m.refused)
	return m
}

// Details returns what an operator reads first.
func (m *Metrics) Details() []status.Detail {
	return []status.Detail{
		{Name: "batches stored", Value: count(m.stored)},
		{Name: "records received", Value: count(m.records)},
		{Name: "batches sent twice", Value: count(m.duplicates)},
	}
}

// count reads a counter.
func count(c prometheus.Counter) string {
	var out dto.Metric
	if err := c.Write(&out); err != nil {
		return "?"
	}
	return strconv.FormatFloat(out.GetCounter().GetValue(), 'f', 0, 64)
}
