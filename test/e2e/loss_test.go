// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	observerpb "github.com/weirmesh/weir/gen/observer"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	"github.com/weirmesh/weir/test/e2e/cluster"
)

// TestPartsKilled kills each central part for 5 s under load: the agents' spools keep what the parts could not take, so nothing
// is lost and nothing comes twice.
func TestPartsKilled(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, truthPods, "--separate", shortTimeouts)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	want := observe(ctx, t, lab, false, 400, 20*time.Second, func() {
		for _, part := range []string{"relay", "nats", "observer"} {
			lab.Control(ctx, part, labv1.ControlPartRequest_ACTION_KILL)
			time.Sleep(5 * time.Second) // the outage itself, not a wait for something
			lab.Control(ctx, part, labv1.ControlPartRequest_ACTION_START)
			time.Sleep(time.Second)
		}
	})
	var uuids map[string]bool
	cluster.Eventually(t, func() error {
		a, err := lab.Flows(ctx, &observerpb.GetFlowsRequest{Number: 1 << 40})
		if err != nil {
			return err
		}
		if len(a.Gaps) > 0 {
			return fmt.Errorf("flows were lost: %v", a.Gaps)
		}
		uuids = map[string]bool{}
		for _, f := range a.Flows {
			if uuids[f.GetFlow().GetUuid()] {
				t.Fatalf("flow %s came twice", f.GetFlow().GetUuid())
			}
			uuids[f.GetFlow().GetUuid()] = true
		}
		return compare(want, a.Flows)
	})
	t.Logf("%d flows, each once", len(uuids))
	checkNumbers(ctx, t, lab)
}

// TestAgentKilled kills an agent with SIGKILL under load: traffic goes on, the rings keep its records, and what was sealed and not
// acknowledged is reported lost.
func TestAgentKilled(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, truthPods, "--separate", shortTimeouts)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	want := observe(ctx, t, lab, false, 300, 8*time.Second, func() {
		for range 3 {
			time.Sleep(2 * time.Second) // load runs meanwhile
			lab.Control(ctx, "agent/node1", labv1.ControlPartRequest_ACTION_CRASH)
		}
	})
	cluster.Eventually(t, func() error {
		a, err := lab.Flows(ctx, &observerpb.GetFlowsRequest{Number: 1 << 40})
		if err != nil {
			return err
		}
		var lost uint64
		for _, g := range a.Gaps {
			if !g.Withdrawn {
				lost += g.Count
			}
		}
		missing, err := missingFinals(want, a.Flows)
		if err != nil {
			return err
		}
		if uint64(missing) > lost {
			return fmt.Errorf("%d final flows are missing, %d flows reported lost: %v", missing, lost, a.Gaps)
		}
		t.Logf("%d final flows missing, %d flows reported lost", missing, lost)
		return nil
	})
	checkNumbers(ctx, t, lab)
}

// missingFinals counts connections without their final flow, and fails when a flow differs from the capture or comes twice.
func missingFinals(want sums, flows []*observerpb.GetFlowsResponse) (int, error) {
	got, err := finals(flows)
	if err != nil {
		return 0, err
	}
	missing := 0
	for k, w := range want {
		g := got[k]
		if g.connections > w.connections {
			return 0, fmt.Errorf("%s: %d final flows, %d connections", k, g.connections, w.connections)
		}
		missing += w.connections - g.connections
		if g.connections == w.connections && g != w {
			return 0, fmt.Errorf("%s: flows say %+v, captured %+v", k, g, w)
		}
	}
	return missing, nil
}

// checkNumbers checks that every number that an agent gave has arrived once or is reported lost.
func checkNumbers(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	t.Helper()
	cluster.Eventually(t, func() error {
		l, err := observerv1.NewObserverServiceClient(lab.Conn()).GetLosses(ctx, &observerv1.GetLossesRequest{})
		if err != nil {
			return err
		}
		for _, n := range l.Nodes {
			var given, received, lost uint64
			for _, e := range n.Epochs {
				given += e.LastSequence
				received += e.Received
				lost += e.Lost
			}
			if given == 0 || received+lost != given {
				return fmt.Errorf("%s gave %d numbers, %d arrived, %d are reported lost: %v", n.NodeName, given, received, lost, n.Epochs)
			}
		}
		return nil
	})
}
