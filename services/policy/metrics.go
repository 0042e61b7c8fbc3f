// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/weirmesh/weir/services/policy/internal/broker"
	"github.com/weirmesh/weir/services/policy/internal/hub"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// collector exports what the hub knows at the time of the scrape.
type collector struct {
	hub       *hub.Hub
	resources *prometheus.Desc
	missing   *prometheus.Desc
	revision  *prometheus.Desc
	lag       *prometheus.Desc
	numbers   *broker.Broker
	failures  *prometheus.Desc
	policies  *prometheus.Desc
	work      *prometheus.Desc
	commits   *prometheus.Desc
	refusals  *prometheus.Desc
	proxies   *prometheus.Desc
	faults    *prometheus.Desc
	warnings  *prometheus.Desc
	xds       *prometheus.Desc
}

func newCollector(h *hub.Hub, numbers *broker.Broker) *collector {
	return &collector{
		hub:       h,
		numbers:   numbers,
		failures:  prometheus.NewDesc("weir_policy_broker_failures_total", "Calls of the identity broker that failed and were made again.", nil, nil),
		resources: prometheus.NewDesc("weir_policy_resources", "Resources by kind.", []string{"kind"}, nil),
		missing:   prometheus.NewDesc("weir_policy_label_sets_without_number", "Label sets in use that have no identity number.", nil, nil),
		policies:  prometheus.NewDesc("weir_policy_objects", "Policy objects, by whether their newest version is valid.", []string{"valid"}, nil),
		work:      prometheus.NewDesc("weir_policy_compiler_work_total", "Work of the compiler: policies resolved, selectors tried on peers, classes of peers decided.", []string{"kind"}, nil),
		commits:   prometheus.NewDesc("weir_policy_commit_seconds", "Time that changes took to be computed.", nil, nil),
		refusals:  prometheus.NewDesc("weir_policy_agent_refusals", "What a connected agent does not enforce.", []string{"node"}, nil),
		proxies:   prometheus.NewDesc("weir_policy_proxy_resources", "What proxies are rendered from, by kind.", []string{"kind"}, nil),
		faults:    prometheus.NewDesc("weir_policy_proxy_refusals", "Resources that proxies refuse, of all connected xDS servers.", nil, nil),
		warnings:  prometheus.NewDesc("weir_policy_object_warnings", "Objects with an annotation that has no effect because it is wrong.", nil, nil),
		xds:       prometheus.NewDesc("weir_policy_xds_servers", "Connected xDS servers.", nil, nil),
		revision:  prometheus.NewDesc("weir_policy_revision", "Revision of the state.", nil, nil),
		lag:       prometheus.NewDesc("weir_policy_agent_lag", "Revisions that a connected agent does not hold yet.", []string{"node"}, nil),
	}
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	st := c.hub.Status()
	for name, kind := range map[string]state.Kind{
		"node": state.KindNode, "namespace": state.KindNamespace, "identity": state.KindIdentity,
		"service": state.KindService, "pod": state.KindPod, "endpoint": state.KindEndpoint,
		"selector": state.KindSelector, "policy": state.KindPolicy, "peer": state.KindPeer, "subject": state.KindSubject,
	} {
		ch <- prometheus.MustNewConstMetric(c.resources, prometheus.GaugeValue, float64(st.Snapshot.Count(kind)), name)
	}
	ch <- prometheus.MustNewConstMetric(c.missing, prometheus.GaugeValue, float64(st.MissingNumbers))
	ch <- prometheus.MustNewConstMetric(c.revision, prometheus.GaugeValue, float64(st.Revision))
	_, failures := c.numbers.Status()
	ch <- prometheus.MustNewConstMetric(c.failures, prometheus.CounterValue, float64(failures))
	ch <- prometheus.MustNewConstMetric(c.policies, prometheus.GaugeValue, float64(st.Policies-st.Invalid), "true")
	ch <- prometheus.MustNewConstMetric(c.policies, prometheus.GaugeValue, float64(st.Invalid), "false")
	for kind, n := range map[string]uint64{"resolved": st.Compiler.Resolved, "matched": st.Compiler.Matched, "decided": st.Compiler.Decided} {
		ch <- prometheus.MustNewConstMetric(c.work, prometheus.CounterValue, float64(n), kind)
	}
	ch <- prometheus.MustNewConstSummary(c.commits, st.Commits, st.CommitTime.Seconds(), nil)
	for name, kind := range map[string]state.RenderKind{
		"config": state.RenderConfig, "service": state.RenderService, "filter": state.RenderFilter, "node": state.RenderNode,
	} {
		ch <- prometheus.MustNewConstMetric(c.proxies, prometheus.GaugeValue, float64(st.Snapshot.Render().Count(kind)), name)
	}
	ch <- prometheus.MustNewConstMetric(c.faults, prometheus.GaugeValue, float64(len(st.Faults)))
	ch <- prometheus.MustNewConstMetric(c.warnings, prometheus.GaugeValue, float64(len(st.Warnings)))
	ch <- prometheus.MustNewConstMetric(c.xds, prometheus.GaugeValue, float64(len(st.XDS)))
	for _, a := range st.Agents {
		ch <- prometheus.MustNewConstMetric(c.refusals, prometheus.GaugeValue, float64(len(a.Refusals)), a.Node)
		ch <- prometheus.MustNewConstMetric(c.lag, prometheus.GaugeValue, float64(st.Revision-min(a.Held, st.Revision)), a.Node)
	}
}
