// SPDX-License-Identifier: Apache-2.0

package limit_test

import (
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/weirmesh/weir/services/proxy/internal/limit"
	"github.com/weirmesh/weir/services/proxy/internal/model"
)

var _ model.Limits = (*limit.Tenants)(nil)

// refusals reads weir_proxy_refused_total.
func refusals(t *testing.T, registry *prometheus.Registry, namespace, cause string) float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "weir_proxy_refused_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if labels["namespace"] == namespace && labels["cause"] == cause {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func TestOneTenantsBound(t *testing.T) {
	registry := prometheus.NewRegistry()
	l := limit.New(limit.Config{Requests: 2, Buffer: 100}, registry)
	first, ok := l.Request("a")
	if !ok {
		t.Fatal("the first request was refused")
	}
	if _, ok := l.Request("a"); !ok {
		t.Fatal("the second request was refused")
	}
	if _, ok := l.Request("a"); ok {
		t.Fatal("a third request passed a bound of 2")
	}
	if _, ok := l.Request("b"); !ok {
		t.Fatal("the neighbour was refused")
	}
	first()
	first() // a second release gives nothing back
	if _, ok := l.Request("a"); !ok {
		t.Fatal("refused although one was released")
	}
	if _, ok := l.Request("a"); ok {
		t.Fatal("releasing twice gave room for two")
	}
	if got := refusals(t, registry, "a", limit.CauseRequests); got != 2 {
		t.Fatalf("refused of a = %v, want 2", got)
	}
	if _, ok := l.Buffer("a", 101); ok {
		t.Fatal("more bytes than the bound passed")
	}
	if _, ok := l.Buffer("a", 0); !ok {
		t.Fatal("no bytes were refused")
	}
	if n, err := testutil.GatherAndCount(registry, "weir_proxy_in_use"); err != nil || n != 6 {
		t.Fatalf("weir_proxy_in_use has %d series, %v", n, err)
	}
}

func TestSharedBoundShedsWhoHoldsMost(t *testing.T) {
	registry := prometheus.NewRegistry()
	l := limit.New(limit.Config{TotalConnections: 10}, registry)
	for range 10 {
		if _, ok := l.Connection("flood"); !ok {
			t.Fatal("refused below the bound")
		}
	}
	if _, ok := l.Connection("flood"); ok {
		t.Fatal("the flood passed the total")
	}
	for i := range 5 {
		if _, ok := l.Connection("small"); !ok {
			t.Fatalf("the neighbour's connection %d was refused", i)
		}
	}
	if _, ok := l.Connection("small"); ok {
		t.Fatal("more than an equal share passed a full total")
	}
	if got := refusals(t, registry, "flood", limit.CauseTotalConnections); got != 1 {
		t.Fatalf("refused of flood = %v, want 1", got)
	}
}

func TestAcceptRate(t *testing.T) {
	registry := prometheus.NewRegistry()
	l := limit.New(limit.Config{AcceptRate: 0.0001}, registry)
	if _, ok := l.Connection("a"); !ok {
		t.Fatal("the burst's one was refused")
	}
	if _, ok := l.Connection("a"); ok {
		t.Fatal("the rate was passed")
	}
	if _, ok := l.Connection("b"); !ok {
		t.Fatal("the neighbour was refused")
	}
	if got := refusals(t, registry, "a", limit.CauseAcceptRate); got != 1 {
		t.Fatalf("refused = %v, want 1", got)
	}
}

// TestActiveTenantsAreCountedExactly: the equal share would be wrong for ever after a miscount.
func TestActiveTenantsAreCountedExactly(t *testing.T) {
	l := limit.New(limit.Config{Requests: 1, TotalRequests: 1}, prometheus.NewRegistry())
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for range 2000 {
				if release, ok := l.Request("a"); ok {
					release()
				}
			}
		})
	}
	group.Wait()
	release, ok := l.Request("a")
	if !ok {
		t.Fatal("refused although nothing is held")
	}
	release()
}

func TestValidate(t *testing.T) {
	if err := (limit.Config{Connections: -1, AcceptRate: -1}).Validate(); err == nil {
		t.Fatal("negative bounds were accepted")
	}
	if err := (limit.Config{}).Validate(); err != nil {
		t.Fatal(err)
	}
}
