// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weirmesh/weir/bpf/datapath"
	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/endpoint"
	"github.com/weirmesh/weir/services/agent/internal/policysync"
)

const waitPolicy = "policy state"

// word turns PLACE_KERNEL into kernel.
func word(enum, prefix string) string { return strings.ToLower(strings.TrimPrefix(enum, prefix)) }

// policyChanged keeps readiness: an agent is ready when it has state, be it the last one from disk.
func (n *node) policyChanged(s policysync.Status) {
	if s.Complete || !s.StateTime.IsZero() {
		n.report.Done(waitPolicy)
	}
}

// ready says why a pod could not be started now.
func (n *node) ready() error {
	d := n.store.Node(n.config.Node)
	if d == nil || len(d.PodCIDRs) == 0 {
		return errors.New("the policy service has not named this node and its pod CIDRs yet")
	}
	return nil
}

// details is what an operator reads first.
func (n *node) details() []status.Detail {
	p, sp, fl := n.policy.Status(), n.spool.Stats(), n.pipeline.Stats()
	pods := 0
	for _, e := range n.endpoints.List() {
		if e.UID != endpoint.HealthUID {
			pods++
		}
	}
	details := []status.Detail{
		{Name: "endpoints", Value: fmt.Sprint(pods)},
		{Name: "kernel path", Value: strings.Join(n.datapath.Path(), ", ")},
		{Name: "policy", Value: policyWords(p, len(n.config.Policy), time.Now())},
		{Name: "identities", Value: fmt.Sprint(n.store.Count(desired.KindIdentity))},
		{Name: "services", Value: fmt.Sprintf("%d addresses, %d connections translated packet by packet", len(n.mirror.ServiceRows()), n.sweeps.services.Load())},
		{Name: "connections", Value: fmt.Sprintf("%d of %d (%d half-open, %d wait for collection)",
			n.sweeps.live.Load(), n.config.ConntrackMax, n.sweeps.halfOpen.Load(), n.sweeps.left.Load())},
		{Name: "relay", Value: orElse(n.publisher.Relay(), "not connected")},
		{Name: "spool", Value: fmt.Sprintf("%d of %d KiB, %d batches", sp.Bytes>>10, sp.MaxBytes>>10, sp.Batches)},
		{Name: "flows", Value: fmt.Sprintf("%d since the start, epoch %d, next number %d", fl.Flows, fl.Epoch, fl.Next)},
	}
	if c, err := n.datapath.Counters(); err != nil {
		details = append(details, status.Detail{Name: "kernel counters", Value: err.Error()})
	} else {
		lost := c.Lost.Trace + c.Lost.Drop + c.Lost.Translation + c.Lost.Final + c.Lost.Verdict
		details = append(details, status.Detail{Name: "kernel records", Value: fmt.Sprintf("%d written, %d lost in full rings",
			c.Written.Trace+c.Written.Drop+c.Written.Translation+c.Written.Final+c.Written.Verdict, lost)})
		if dropped := c.DropsOverflow + n.dropped(); dropped > 0 {
			details = append(details, status.Detail{Name: "packets dropped", Value: fmt.Sprint(dropped)})
		}
		if c.ConnsRefused > 0 {
			details = append(details, status.Detail{Name: "connections refused", Value: fmt.Sprintf("%d packets, since the table was full", c.ConnsRefused)})
		}
	}
	details = append(details, n.proxyDetails()...)
	details = append(details, n.policyDetails()...)
	for name, count := range n.endpoints.LateNodes() {
		details = append(details, status.Detail{Name: "late node " + name, Value: fmt.Sprintf("%d addresses", count)})
	}
	return details
}

// dropped counts packets in the map of drops.
func (n *node) dropped() uint64 {
	rows, err := n.datapath.Drops()
	if err != nil {
		n.log.Warn("dropped packets were not read", "error", err)
	}
	var total uint64
	for _, r := range rows {
		total += r.Packets
	}
	return total
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

func policyWords(p policysync.Status, replicas int, now time.Time) string {
	switch {
	case p.Connected && p.Complete:
		return fmt.Sprintf("state from %s, revision %d, %d of %d replicas connected", p.Address, p.Revision, p.Streams, replicas)
	case p.StateTime.IsZero():
		return "no state yet"
	}
	return fmt.Sprintf("not connected, state is %s old", now.Sub(p.StateTime).Round(time.Second))
}

// collector exports what the agent knows at the time of the scrape. Losses are the reporter's.
type collector struct {
	node  *node
	descs map[string]*prometheus.Desc
}

var help = map[string]string{
	"weir_agent_endpoints":                    "Endpoints of this node.",
	"weir_agent_flows_total":                  "Flows encoded.",
	"weir_agent_records_total":                "Kernel records read.",
	"weir_agent_batches_total":                "Batches sealed.",
	"weir_agent_spool_bytes":                  "Bytes that wait for a relay.",
	"weir_agent_spool_bytes_max":              "Bound of the spool.",
	"weir_agent_policy_connected":             "1 with a stream to a policy service.",
	"weir_agent_policy_state_age_seconds":     "Age of the policy state in use.",
	"weir_agent_relay_connected":              "1 with a stream to a relay.",
	"weir_agent_policies":                     "Policies that this node holds, each of one direction.",
	"weir_agent_policies_refused":             "Policies that are not in force as they should be.",
	"weir_agent_policy_selectors":             "Selectors of these policies.",
	"weir_agent_policy_endpoints":             "Endpoints for which a policy is in force.",
	"weir_agent_policy_pauses":                "Pauses of policy, of pods and of the node.",
	"weir_agent_slots_resting":                "Slots that nothing uses, and that no other filter gets yet.",
	"weir_agent_proxy_redirected_total":       "Connections that began on a slot.",
	"weir_agent_proxy_not_seen_total":         "Connections that were only to be seen, and went straight on without a proxy.",
	"weir_agent_proxy_no_listener_total":      "Packets dropped that would have begun a connection on a slot without listener.",
	"weir_agent_proxy_lost_total":             "Packets dropped of connections that the proxy has no socket for any more.",
	"weir_agent_proxy_moved_total":            "Packets that met a change of their connection's slot, which was reset.",
	"weir_agent_proxy_listening":              "1 while the node's proxy listens.",
	"weir_agent_proxy_missed_listeners_total": "Listeners that did not come before the entry that needs them.",
	"weir_agent_access_log_entries_total":     "Entries that the proxy has sent.",
	"weir_agent_requests_total":               "Requests and responses that proxies and weir-dns told and flows were made of.",
	"weir_agent_dns_connected":                "1 while weir-dns is connected.",
	"weir_agent_dns_behind":                   "Revisions that weir-dns has not taken.",
	"weir_agent_dns_names":                    "Names that weir-dns knows.",
	"weir_agent_dns_addresses":                "Addresses that weir-dns knows.",
	"weir_agent_dns_evicted_total":            "Addresses that fell out of weir-dns's full cache.",
	"weir_agent_connections":                  "Live entries of the connection table.",
	"weir_agent_service_connections":          "Connections of services that are translated packet by packet.",
	"weir_agent_service_frontends":            "Addresses at which services are served.",
	"weir_agent_services_refused":             "Services that are not in the kernel as they should be.",
	"weir_agent_connections_max":              "Bound of the connection table.",
	"weir_agent_connections_created_total":    "Connections that the kernel has tracked.",
	"weir_agent_connections_refused_total":    "Packets dropped since the connection table was full.",
	"weir_agent_connections_unreported_total": "Connections whose final record found a ring full.",
}

// labelled metrics and their labels.
var labelled = map[string]struct {
	help   string
	labels []string
}{
	"weir_agent_kernel_records_written_total": {"Records that programs wrote, by type.", []string{"type"}},
	"weir_agent_kernel_records_lost_total":    {"Records that found a ring full, by type.", []string{"type"}},
	"weir_agent_map_entries":                  {"Entries of a kernel map.", []string{"map"}},
	"weir_agent_map_entries_max":              {"Bound of a kernel map.", []string{"map"}},
	"weir_agent_drops_total":                  {"Drops, each with a record that was written or lost, by Hubble's reason and the connection's direction.", []string{"reason", "direction"}},
	"weir_agent_drop_packets_total":           {"Dropped packets, as segments on the wire.", []string{"reason", "direction"}},
	"weir_agent_drop_bytes_total":             {"Their IP length.", []string{"reason", "direction"}},
}

func newCollector(n *node) *collector {
	c := &collector{node: n, descs: map[string]*prometheus.Desc{}}
	for name, text := range help {
		c.descs[name] = prometheus.NewDesc(name, text, nil, nil)
	}
	for name, l := range labelled {
		c.descs[name] = prometheus.NewDesc(name, l.help, l.labels, nil)
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	n := c.node
	put := func(kind prometheus.ValueType, name string, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(c.descs[name], kind, v, labels...)
	}
	flag := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	p, sp, fl := n.policy.Status(), n.spool.Stats(), n.pipeline.Stats()
	put(prometheus.GaugeValue, "weir_agent_endpoints", float64(len(n.endpoints.List())))
	put(prometheus.CounterValue, "weir_agent_flows_total", float64(fl.Flows))
	put(prometheus.CounterValue, "weir_agent_records_total", float64(fl.Records))
	put(prometheus.CounterValue, "weir_agent_batches_total", float64(fl.Batches))
	put(prometheus.GaugeValue, "weir_agent_spool_bytes", float64(sp.Bytes))
	put(prometheus.GaugeValue, "weir_agent_spool_bytes_max", float64(sp.MaxBytes))
	put(prometheus.GaugeValue, "weir_agent_policy_connected", flag(p.Connected))
	if !p.StateTime.IsZero() {
		put(prometheus.GaugeValue, "weir_agent_policy_state_age_seconds", time.Since(p.StateTime).Seconds())
	}
	put(prometheus.GaugeValue, "weir_agent_relay_connected", flag(n.publisher.Relay() != ""))
	put(prometheus.GaugeValue, "weir_agent_connections", float64(n.sweeps.live.Load()))
	put(prometheus.GaugeValue, "weir_agent_service_connections", float64(n.sweeps.services.Load()))
	put(prometheus.GaugeValue, "weir_agent_service_frontends", float64(len(n.mirror.ServiceRows())))
	put(prometheus.GaugeValue, "weir_agent_services_refused", float64(len(n.mirror.Refused())))
	put(prometheus.GaugeValue, "weir_agent_connections_max", float64(n.config.ConntrackMax))
	if k, err := n.datapath.Counters(); err == nil {
		put(prometheus.CounterValue, "weir_agent_connections_created_total", float64(k.ConnsCreated))
		put(prometheus.CounterValue, "weir_agent_connections_refused_total", float64(k.ConnsRefused))
		put(prometheus.CounterValue, "weir_agent_connections_unreported_total", float64(k.ConnsUnreported))
		put(prometheus.CounterValue, "weir_agent_proxy_redirected_total", float64(k.Proxy.Redirected))
		put(prometheus.CounterValue, "weir_agent_proxy_not_seen_total", float64(k.Proxy.NotSeen))
		put(prometheus.CounterValue, "weir_agent_proxy_no_listener_total", float64(k.Proxy.NoListener))
		put(prometheus.CounterValue, "weir_agent_proxy_lost_total", float64(k.Proxy.Lost))
		put(prometheus.CounterValue, "weir_agent_proxy_moved_total", float64(k.Proxy.Moved))
		for name, r := range map[string]datapath.RecordCounts{"weir_agent_kernel_records_written_total": k.Written, "weir_agent_kernel_records_lost_total": k.Lost} {
			put(prometheus.CounterValue, name, float64(r.Trace), "trace")
			put(prometheus.CounterValue, name, float64(r.Drop), "drop")
			put(prometheus.CounterValue, name, float64(r.Translation), "translation")
			put(prometheus.CounterValue, name, float64(r.Final), "final")
			put(prometheus.CounterValue, name, float64(r.Verdict), "verdict")
		}
	}
	c.policies(put)
	c.proxies(put, flag)
	c.drops(put)
}

func (c *collector) proxies(put func(prometheus.ValueType, string, float64, ...string), flag func(bool) float64) {
	n := c.node
	st, dns, q := n.slots.Stats(), n.names.Status(), n.requests.Stats()
	put(prometheus.GaugeValue, "weir_agent_slots_resting", float64(st.Resting))
	put(prometheus.GaugeValue, "weir_agent_proxy_listening", flag(n.slots.Proxy()))
	put(prometheus.CounterValue, "weir_agent_proxy_missed_listeners_total", float64(st.Missed))
	put(prometheus.CounterValue, "weir_agent_access_log_entries_total", float64(n.accessLog.Stats().Entries))
	put(prometheus.CounterValue, "weir_agent_requests_total", float64(q.Taken))
	put(prometheus.GaugeValue, "weir_agent_dns_connected", flag(dns.Connected))
	put(prometheus.GaugeValue, "weir_agent_dns_behind", float64(dns.Revision-dns.Acked))
	put(prometheus.GaugeValue, "weir_agent_dns_names", float64(dns.Names))
	put(prometheus.GaugeValue, "weir_agent_dns_addresses", float64(dns.Addresses))
	put(prometheus.CounterValue, "weir_agent_dns_evicted_total", float64(dns.Evicted))
}

func (c *collector) policies(put func(prometheus.ValueType, string, float64, ...string)) {
	st := c.node.policies.Stats()
	put(prometheus.GaugeValue, "weir_agent_policies", float64(st.Policies))
	put(prometheus.GaugeValue, "weir_agent_policies_refused", float64(st.Refused))
	put(prometheus.GaugeValue, "weir_agent_policy_selectors", float64(st.Selectors))
	put(prometheus.GaugeValue, "weir_agent_policy_endpoints", float64(st.Enforced))
	put(prometheus.GaugeValue, "weir_agent_policy_pauses", float64(len(c.node.policies.Pauses())))
	for _, u := range c.node.usage() {
		put(prometheus.GaugeValue, "weir_agent_map_entries", float64(u.entries), u.name)
		put(prometheus.GaugeValue, "weir_agent_map_entries_max", float64(u.max), u.name)
	}
}

// drops sums the rows of the map of drops.
func (c *collector) drops(put func(prometheus.ValueType, string, float64, ...string)) {
	rows, err := c.node.datapath.Drops()
	if err != nil {
		return
	}
	type key struct{ reason, direction string }
	sums := map[key]datapath.DropRow{}
	for _, r := range rows {
		k := key{flowpb.DropReason(r.Reason).String(), flowpb.TrafficDirection(r.Direction).String()}
		s := sums[k]
		s.Records, s.Packets, s.Bytes = s.Records+r.Records, s.Packets+r.Packets, s.Bytes+r.Bytes
		sums[k] = s
	}
	for k, s := range sums {
		put(prometheus.CounterValue, "weir_agent_drops_total", float64(s.Records), k.reason, k.direction)
		put(prometheus.CounterValue, "weir_agent_drop_packets_total", float64(s.Packets), k.reason, k.direction)
		put(prometheus.CounterValue, "weir_agent_drop_bytes_total", float64(s.Bytes), k.reason, k.direction)
	}
}
