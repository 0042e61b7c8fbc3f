// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	flowpb "github.com/weirmesh/weir/gen/flow"
	observerpb "github.com/weirmesh/weir/gen/observer"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	"github.com/weirmesh/weir/test/e2e/cluster"
)

// TestRingsTooSmall makes the rings and the connection table too small on purpose: what the kernel counted = what was delivered + what
// is reported lost, for connections and for drops (spoofed sources, fragments without a beginning, a full table).
func TestRingsTooSmall(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, truthPods, "--separate", shortTimeouts, "--agent-arg=--ring-bytes=8192", "--agent-arg=--ct-max=60", "--agent-arg=--metrics-listen=127.0.0.1:9962")
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	const spoofed, orphans = 300, 200
	for _, cmd := range [][]string{
		{"e2e-traffic", "spoof", fmt.Sprint(spoofed), "10.244.1.102"},
		{"e2e-traffic", "orphan-fragments", fmt.Sprint(orphans), "10.244.1.102"},
		// More connections at a time than the table holds: most are refused, and try again.
		{"e2e-traffic", "fill", "200", "10.244.2.103"},
	} {
		if _, err := lab.Exec(ctx, "default/a", cmd...); err != nil {
			t.Fatal(err)
		}
	}
	cluster.Eventually(t, func() error {
		m, err := lab.Metrics(ctx, "node1", 9962)
		if err != nil {
			return err
		}
		a, err := lab.Flows(ctx, &observerpb.GetFlowsRequest{Number: 1 << 40})
		if err != nil {
			return err
		}
		var lost uint64
		for _, g := range a.Gaps {
			if g.Place != flowv1.Place_PLACE_KERNEL {
				return fmt.Errorf("a loss that this test does not cause: %v", g)
			}
			if g.NodeName == "default/node1" {
				lost += g.Count
			}
		}
		finals, drops, records := map[string]int{}, map[string]float64{}, 0
		for _, r := range a.Flows {
			f := r.GetFlow()
			if f.NodeName != "default/node1" || f.Type == flowpb.FlowType_SOCK {
				continue
			}
			records++
			if f.Verdict == flowpb.Verdict_DROPPED {
				drops[f.DropReasonDesc.String()]++
			}
			stats := new(observerv1.FlowStats)
			if f.GetExtensions() != nil && f.GetExtensions().UnmarshalTo(stats) == nil && stats.Final {
				finals["all"]++
			}
		}
		if live := m["weir_agent_connections"]; live != 0 {
			return fmt.Errorf("%v connections are still tracked", live)
		}
		created, unreported := m["weir_agent_connections_created_total"], m["weir_agent_connections_unreported_total"]
		if created == 0 || created != float64(finals["all"])+unreported {
			return fmt.Errorf("the kernel tracked %v connections; %d final flows, %v reported without", created, finals["all"], unreported)
		}
		var kernelDrops, flowDrops float64
		for _, reason := range []string{"INVALID_SOURCE_IP", "FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND", "CT_MAP_INSERTION_FAILED"} {
			n := m.Sum("weir_agent_drops_total", `reason="`+reason+`"`)
			if n == 0 || drops[reason] > n {
				return fmt.Errorf("%s: the kernel dropped %v, %v flows say so", reason, n, drops[reason])
			}
			kernelDrops, flowDrops = kernelDrops+n, flowDrops+drops[reason]
		}
		if n := m.Sum("weir_agent_drops_total", `reason="INVALID_SOURCE_IP"`); n != spoofed {
			return fmt.Errorf("%v spoofed packets were counted, %d sent", n, spoofed)
		}
		if n := m.Sum("weir_agent_drops_total", `reason="FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND"`); n != orphans {
			return fmt.Errorf("%v fragments without a beginning were counted, %d sent", n, orphans)
		}
		if missing := kernelDrops - flowDrops; missing > 0 && m.Sum("weir_agent_kernel_records_lost_total", `type="drop"`) < missing {
			return fmt.Errorf("%v drops have no flow, the rings lost %v drop records", missing, m.Sum("weir_agent_kernel_records_lost_total", `type="drop"`))
		}
		kernelLost, written := m.Sum("weir_agent_kernel_records_lost_total", ""), m.Sum("weir_agent_kernel_records_written_total", "")-m.Sum("weir_agent_kernel_records_written_total", `type="translation"`)
		if kernelLost == 0 {
			t.Fatal("no ring was full: the test proves nothing")
		}
		if lost != uint64(kernelLost) || records != int(written) {
			return fmt.Errorf("the rings lost %v records, %d are reported lost; they held %v, %d flows came", kernelLost, lost, written, records)
		}
		t.Logf("%v connections, %v drops, %v records written, %v lost and told", created, kernelDrops, written, kernelLost)
		return nil
	})
	checkNumbers(ctx, t, lab)
}

// TestClocks runs two nodes whose clocks are two seconds apart: every flow keeps its node's time, and the answer is in the order of these
// times as far as the observer's window (1 s) reaches. docs/TIME.md says the same to users.
func TestClocks(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, truthPods, shortTimeouts, "--agent-arg=node2:--clock-offset=2s")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if _, err := lab.Exec(ctx, "default/a", "e2e-traffic", "run", "--count=20", "--over=5s", "--targets=10.244.2.103"); err != nil {
		t.Fatal(err)
	}
	cluster.Eventually(t, func() error {
		a, err := lab.Flows(ctx, &observerpb.GetFlowsRequest{Number: 1 << 40})
		if err != nil {
			return err
		}
		type seen struct{ node1, node2 time.Time }
		syns := map[uint32]seen{}
		last := map[string]time.Time{}
		for _, r := range a.Flows {
			f := r.GetFlow()
			at := f.Time.AsTime()
			if at.Before(last[f.NodeName]) {
				return fmt.Errorf("%s goes back in time: %s after %s", f.NodeName, at, last[f.NodeName])
			}
			last[f.NodeName] = at
			tcp := f.GetL4().GetTCP()
			if tcp.GetDestinationPort() != 7000 || !tcp.GetFlags().GetSYN() || f.GetIsReply().GetValue() {
				continue
			}
			s := syns[tcp.SourcePort]
			if f.NodeName == "default/node1" {
				s.node1 = at
			} else {
				s.node2 = at
			}
			syns[tcp.SourcePort] = s
		}
		both := 0
		for port, s := range syns {
			if s.node1.IsZero() || s.node2.IsZero() {
				continue
			}
			both++
			if d := s.node2.Sub(s.node1); d < 1900*time.Millisecond || d > 2900*time.Millisecond {
				return fmt.Errorf("port %d: node2's time is %s after node1's, its clock 2 s ahead", port, d)
			}
		}
		if both < 3 {
			return fmt.Errorf("%d connections seen on both nodes", both)
		}
		return nil
	})
}
