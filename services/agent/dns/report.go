// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/agent/internal/dnsproxy"
)

// status is what the agent is told.
func (p *parts) status() *agentv1.DNSStatus {
	s := p.names.Stats()
	return &agentv1.DNSStatus{Names: uint64(s.Names), Addresses: uint64(s.Addresses), Evicted: s.Evicted}
}

// details are what an operator is told.
func (p *parts) details() []status.Detail {
	n, c := p.names.Stats(), p.proxy.Counters()
	queries, sockets, conns := p.proxy.InFlight()
	filters, policies, known := p.rules.Counts()
	total, waiting, lost := p.records.Stats()
	rules := fmt.Sprintf("%d filters, %d policies with names", filters, policies)
	switch {
	case !known:
		rules = "none yet: queries are refused"
	case !p.sync.Connected():
		rules += ", from disk or the agent's last word: the agent is away"
	}
	failed := c.NamesFailed.Load()
	out := []status.Detail{
		{Name: "rules", Value: rules},
		{Name: "names", Value: fmt.Sprintf("%d names, %d addresses, %d kept by live connections alone, %d evicted, %d expired",
			n.Names, n.Addresses, n.Kept, n.Evicted, n.Expired)},
		{Name: "sets of selectors", Value: fmt.Sprintf("%d sets, %d rows, %d selectors", n.Sets, n.Rows, n.Selectors)},
		{Name: "queries", Value: fmt.Sprintf("%d by UDP, %d by TCP, %d answered, %d refused, %d in flight (%d sockets, %d connections)",
			c.Queries.Load(), c.QueriesTCP.Load(), c.Answers.Load(), c.Refused.Load(), queries, sockets, conns)},
		{Name: "servers", Value: fmt.Sprintf("%d timeouts, %d not reached, %d answers to no query", c.Timeouts.Load(), c.Unreachable.Load(),
			c.Mismatched.Load())},
		{Name: "records", Value: fmt.Sprintf("%d, %d wait for the agent, %d lost", total, waiting, lost)},
	}
	if over := c.Overload.Load() + c.ClientOverload.Load() + c.SocketsFull.Load() + c.ConnsRefused.Load(); over > 0 {
		out = append(out, status.Detail{Name: "overload", Value: fmt.Sprintf("%d queries and connections refused: too many at once", over)})
	}
	if failed+n.Failures > 0 || n.Unsaved {
		text := fmt.Sprintf("%d answers withheld, %d writes failed", failed, n.Failures)
		if n.Unsaved {
			text += ", names are not on disk"
		}
		out = append(out, status.Detail{Name: "maps of names", Value: text})
	}
	if n.Conflicts > 0 {
		out = append(out, status.Detail{Name: "conflicts", Value: fmt.Sprintf("%d times two patterns had a filter each for one port of a name: the longer one won", n.Conflicts)})
	}
	return out
}

// metric is a number that is read at the time of the scrape.
type metric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func() float64
}

// collector exports what weir-dns knows.
type collector struct {
	metrics []metric
	latency *prometheus.Desc
	counts  *dnsproxy.Counters
}

func newCollector(p *parts) *collector {
	c := &collector{counts: p.proxy.Counters(), latency: prometheus.NewDesc("weir_dns_answer_seconds", "Time from a query to its answer.", nil, nil)}
	add := func(kind prometheus.ValueType, name, help string, labels prometheus.Labels, value func() float64) {
		c.metrics = append(c.metrics, metric{prometheus.NewDesc(name, help, nil, labels), kind, value})
	}
	counter := func(name, help string, labels prometheus.Labels, load func() uint64) {
		add(prometheus.CounterValue, name, help, labels, func() float64 { return float64(load()) })
	}
	gauge := func(name, help string, value func() int) {
		add(prometheus.GaugeValue, name, help, nil, func() float64 { return float64(value()) })
	}
	p.proxyMetrics(counter, gauge)
	p.nameMetrics(counter, gauge)
	return c
}

type (
	addCounter func(name, help string, labels prometheus.Labels, load func() uint64)
	addGauge   func(name, help string, value func() int)
)

func (p *parts) proxyMetrics(counter addCounter, gauge addGauge) {
	n := p.proxy.Counters()
	const queries = "Queries of clients, by protocol."
	counter("weir_dns_queries_total", queries, prometheus.Labels{"protocol": "udp"}, n.Queries.Load)
	counter("weir_dns_queries_total", queries, prometheus.Labels{"protocol": "tcp"}, n.QueriesTCP.Load)
	counter("weir_dns_answers_total", "Answers given to clients, the proxy's own left out.", nil, n.Answers.Load)
	const refused = "Queries and connections that went no further, by cause."
	for cause, load := range map[string]func() uint64{
		"policy": n.Refused.Load, "unknown-client": n.Unknown.Load, "malformed": n.Malformed.Load, "overload": n.Overload.Load,
		"client-overload": n.ClientOverload.Load, "sockets": n.SocketsFull.Load, "connections": n.ConnsRefused.Load,
	} {
		counter("weir_dns_refused_total", refused, prometheus.Labels{"cause": cause}, load)
	}
	const failed = "Queries that passed and were not answered by their server's word, by cause."
	for cause, load := range map[string]func() uint64{
		"timeout": n.Timeouts.Load, "unreachable": n.Unreachable.Load, "malformed-answer": n.MalformedAnswers.Load, "maps": n.NamesFailed.Load,
		"unsent": n.Unsent.Load,
	} {
		counter("weir_dns_failed_total", failed, prometheus.Labels{"cause": cause}, load)
	}
	counter("weir_dns_answers_ignored_total", "Messages of servers that answer no query: wrong number or question.", nil, n.Mismatched.Load)
	counter("weir_dns_truncated_total", "Answers that were too long for a packet and sent the client to TCP.", nil, n.Truncated.Load)
	gauge("weir_dns_in_flight", "Queries that wait for an answer.", func() int { q, _, _ := p.proxy.InFlight(); return q })
	gauge("weir_dns_sockets", "Sockets to servers.", func() int { _, s, _ := p.proxy.InFlight(); return s })
	gauge("weir_dns_connections", "TCP connections of clients.", func() int { _, _, c := p.proxy.InFlight(); return c })
}

func (p *parts) nameMetrics(counter addCounter, gauge addGauge) {
	gauge("weir_dns_names", "Names that have addresses.", func() int { return p.names.Stats().Names })
	gauge("weir_dns_addresses", "Addresses that have names.", func() int { return p.names.Stats().Addresses })
	gauge("weir_dns_addresses_kept", "Addresses of names that live connections alone keep.", func() int { return p.names.Stats().Kept })
	gauge("weir_dns_sets", "Sets of selectors that addresses match.", func() int { return p.names.Stats().Sets })
	gauge("weir_dns_rows", "Rows of policies for sets.", func() int { return p.names.Stats().Rows })
	counter("weir_dns_evicted_total", "Addresses of names that found no room.", nil, func() uint64 { return p.names.Stats().Evicted })
	counter("weir_dns_expired_total", "Addresses of names whose time was over.", nil, func() uint64 { return p.names.Stats().Expired })
	counter("weir_dns_conflicts_total", "Ports of names that two filters of a policy claimed.", nil, func() uint64 { return p.names.Stats().Conflicts })
	counter("weir_dns_map_failures_total", "Writes to the kernel's maps that failed.", nil, func() uint64 { return p.names.Stats().Failures })
	counter("weir_dns_records_total", "Records for the agent.", nil, func() uint64 { total, _, _ := p.records.Stats(); return total })
	counter("weir_dns_records_lost_total", "Records that did not reach the agent.", nil, func() uint64 { _, _, lost := p.records.Stats(); return lost })
	gauge("weir_dns_records_waiting", "Records that the agent has not acknowledged.", func() int { _, waiting, _ := p.records.Stats(); return int(waiting) })
	gauge("weir_dns_agent_connected", "1 with a complete stream of rules from the agent.", func() int {
		if p.sync.Connected() {
			return 1
		}
		return 0
	})
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range c.metrics {
		ch <- m.desc
	}
	ch <- c.latency
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	for _, m := range c.metrics {
		ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value())
	}
	buckets, count := map[float64]uint64{}, uint64(0)
	for i, bound := range dnsproxy.Buckets {
		count += c.counts.Latency[i].Load()
		buckets[bound.Seconds()] = count
	}
	count += c.counts.Latency[len(dnsproxy.Buckets)].Load()
	ch <- prometheus.MustNewConstHistogram(c.latency, count, time.Duration(c.counts.LatencySum.Load()).Seconds(), buckets)
}
