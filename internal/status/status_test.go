// SPDX-License-Identifier: Apache-2.0

package status

import (
	"context"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
)

func TestReporter(t *testing.T) {
	r := New("policy", "2")
	var seen []bool
	r.OnReady(func(ready bool) { seen = append(seen, ready) })
	r.Waiting("source")
	r.Waiting("identity broker")
	r.Details(func() []Detail { return []Detail{{"endpoints", "3"}} })
	r.Details(func() []Detail { return []Detail{{"agents", "2"}} })
	r.Loss("stream", "queue full").Add(2)
	r.Loss("stream", "queue full").Add(1)
	r.Loss("source", "broken object")

	got, err := r.GetStatus(context.Background(), &statusv1.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got.GetPart() != "policy" || got.GetInstance() != "2" || got.GetReady() ||
		!slices.Equal(got.GetWaitingFor(), []string{"identity broker", "source"}) {
		t.Errorf("status is %v", got)
	}
	if len(got.GetDetails()) != 2 || got.GetDetails()[0].GetName() != "endpoints" || got.GetDetails()[1].GetValue() != "2" {
		t.Errorf("details are %v", got.GetDetails())
	}
	// A counter at 0 is not shown.
	if len(got.GetLosses()) != 1 || got.GetLosses()[0].GetCount() != 3 {
		t.Errorf("losses are %v", got.GetLosses())
	}
	r.Done("source")
	r.Done("source")
	r.Done("identity broker")
	r.Waiting("source")
	if want := []bool{true, false, true, false}; !slices.Equal(seen, want) {
		t.Errorf("readiness was %v, want %v", seen, want)
	}
}

func TestHandler(t *testing.T) {
	r := New("policy", "")
	registry := prometheus.NewRegistry()
	registry.MustRegister(r)
	r.Loss("stream", "queue full").Add(2)
	r.Waiting("source")
	get := func(path string) (int, string) {
		w := httptest.NewRecorder()
		r.Handler(registry).ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code, w.Body.String()
	}
	if code, _ := get("/healthz"); code != http.StatusOK {
		t.Errorf("healthz: %d", code)
	}
	if code, body := get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "source") {
		t.Errorf("readyz while waiting: %d %q", code, body)
	}
	r.Done("source")
	if code, _ := get("/readyz"); code != http.StatusOK {
		t.Errorf("readyz: %d", code)
	}
	want := `weir_losses_total{cause="queue full",part="policy",place="stream"} 2`
	if code, body := get("/metrics"); code != http.StatusOK || !strings.Contains(body, want) {
		t.Errorf("metrics: %d\n%s\nwant %s", code, body, want)
	}
}
