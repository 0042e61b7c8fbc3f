// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/itchyny/gojq"

	"github.com/weirmesh/weir/gen/flow"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// jq runs a program over lines of JSON, as `| jq -c PROGRAM` does; an error on any line fails the test.
func jq(t *testing.T, program, lines string) []string {
	t.Helper()
	query, err := gojq.Parse(program)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(lines) {
		var value any
		if err := json.Unmarshal([]byte(line), &value); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		for iter := query.Run(value); ; {
			v, ok := iter.Next()
			if !ok {
				break
			}
			if err, failed := v.(error); failed {
				t.Fatalf("jq %s: %v on %s", program, err, line)
			}
			b, err := gojq.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, string(b))
		}
	}
	return out
}

// The recipes that people copy from articles, with -o flat, and beside flows also losses and requests without latency.
func TestRecipes(t *testing.T) {
	drop := func(reason flow.DropReason) func(*flow.Flow) {
		return func(f *flow.Flow) {
			f.Verdict, f.DropReason, f.DropReasonDesc = flow.Verdict_DROPPED, uint32(reason), reason
			f.EventType = &flow.CiliumEventType{Type: 1, SubType: int32(reason)}
		}
	}
	http := func(typ flow.L7FlowType, latency uint64) func(*flow.Flow) {
		return func(f *flow.Flow) {
			f.L7 = &flow.Layer7{Type: typ, LatencyNs: latency, Record: &flow.Layer7_Http{Http: &flow.HTTP{}}}
		}
	}
	loss := gapOf(&observerv1.Gap{NodeName: "n", Count: 1})

	c := serveWeir(t, &fakeObserver{flows: []*observerv1.GetFlowsResponse{
		flowAt(1, drop(flow.DropReason_POLICY_DENIED)), loss, flowAt(2, drop(flow.DropReason_AUTH_REQUIRED))}})
	out, errOut, code := c.run(t, "observe", "--namespace", "production", "--verdict", "DROPPED", "-o", "flat")
	if code != 0 || !strings.Contains(errOut, "EVENTS LOST: n ") {
		t.Errorf("exit code %d, stderr %q", code, errOut)
	}
	got := jq(t, `select(.drop_reason_desc == "Authentication required")`, out)
	if len(got) != 1 || !strings.Contains(got[0], `"1970-01-01T00:00:02Z"`) {
		t.Errorf("authentication drops: %v", got)
	}

	c = serveWeir(t, &fakeObserver{flows: []*observerv1.GetFlowsResponse{
		flowAt(1, http(flow.L7FlowType_REQUEST, 0)), loss, flowAt(2, http(flow.L7FlowType_RESPONSE, 12_500_000))}})
	out, _, _ = c.run(t, "observe", "--namespace", "production", "--protocol", "http", "-o", "flat")
	if got := fmt.Sprint(jq(t, ".l7.latency_ns / 1000000", out)); got != "[0 12.5]" {
		t.Errorf("latencies: %s", got)
	}
}
