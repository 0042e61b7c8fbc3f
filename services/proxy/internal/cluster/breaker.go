// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"sync/atomic"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
)

// breakers are the bounds of a cluster.
type breakers struct {
	connections, pending, requests, retries int64
	// budget is the share of active requests that may be retries, in percent; 0 = retries counts instead.
	budget    float64
	budgetMin int64
}

// defaultBreakers are Envoy's.
func defaultBreakers() breakers {
	return breakers{connections: 1024, pending: 1024, requests: 1024, retries: 3}
}

func (b *breakers) read(t *clusterv3.CircuitBreakers_Thresholds) {
	set := func(to *int64, from interface{ GetValue() uint32 }, present bool) {
		if present {
			*to = int64(from.GetValue())
		}
	}
	set(&b.connections, t.GetMaxConnections(), t.GetMaxConnections() != nil)
	set(&b.pending, t.GetMaxPendingRequests(), t.GetMaxPendingRequests() != nil)
	set(&b.requests, t.GetMaxRequests(), t.GetMaxRequests() != nil)
	set(&b.retries, t.GetMaxRetries(), t.GetMaxRetries() != nil)
	if budget := t.GetRetryBudget(); budget != nil {
		b.budget, b.budgetMin = 20, 3
		if budget.GetBudgetPercent() != nil {
			b.budget = budget.GetBudgetPercent().GetValue()
		}
		set(&b.budgetMin, budget.GetMinRetryConcurrency(), budget.GetMinRetryConcurrency() != nil)
	}
}

// allowedRetries is how many retries may run beside so many requests.
func (b *breakers) allowedRetries(active int64) int64 {
	if b.budget == 0 {
		return b.retries
	}
	return max(b.budgetMin, int64(b.budget*float64(active)/100))
}

// Counters are what a cluster, by name, has going on and has done; they outlive its configurations.
type Counters struct {
	Connections, Pending, Requests, Retries atomic.Int64

	TotalConnections, ConnectFailures, TotalRequests, FailedRequests, TotalRetries atomic.Uint64
	Overflows, NoEndpoint, Ejections                                               atomic.Uint64
}

// enter adds one to a counter that has a bound; false = it is reached.
func enter(n *atomic.Int64, limit int64) bool {
	if n.Add(1) <= limit {
		return true
	}
	n.Add(-1)
	return false
}
