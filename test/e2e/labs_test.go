// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"testing"
	"time"

	flowpb "github.com/weirmesh/weir/gen/flow"
	observerpb "github.com/weirmesh/weir/gen/observer"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/traffic"
)

// relayAddresses are where the lab's two relays listen.
var relayAddresses = map[string]string{"relay": "172.30.0.2:4244", "relay-2": "172.30.0.3:4244"}

// TestRelays moves the agents between two relays under load, by killing each in turn: nothing is lost and nothing comes twice.
func TestRelays(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, truthPods, "--separate", "--relays=2", shortTimeouts)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	want := observe(ctx, t, lab, false, 200, 10*time.Second, func() {
		for i := range 4 {
			dead, alive := "relay", "relay-2"
			if i%2 == 1 {
				dead, alive = alive, dead
			}
			lab.Control(ctx, dead, labv1.ControlPartRequest_ACTION_KILL)
			cluster.Eventually(t, func() error {
				for _, node := range []string{"node1", "node2"} {
					d, err := lab.Details(ctx, "nodes/"+node+"/agent.sock")
					if err != nil {
						return err
					}
					if d["relay"] != relayAddresses[alive] {
						return fmt.Errorf("agent of %s is at relay %q, want %s", node, d["relay"], relayAddresses[alive])
					}
				}
				// The load goes through the one that is left, before that one dies.
				d, err := lab.Details(ctx, alive+".sock")
				if err != nil {
					return err
				}
				if stored, err := strconv.Atoi(d["batches stored"]); err != nil || stored < 10 {
					return fmt.Errorf("%s stored %q batches", alive, d["batches stored"])
				}
				return nil
			})
			lab.Control(ctx, dead, labv1.ControlPartRequest_ACTION_START)
			cluster.Eventually(t, func() error {
				_, err := lab.Details(ctx, dead+".sock")
				return err
			})
		}
	})
	expectAll(ctx, t, lab, want)
	checkNumbers(ctx, t, lab)
}

// expectAll waits until the flows say what was captured: nothing lost, nothing twice.
func expectAll(ctx context.Context, t *testing.T, lab *cluster.Lab, want sums) {
	t.Helper()
	cluster.Eventually(t, func() error {
		a, err := lab.Flows(ctx, &observerpb.GetFlowsRequest{Number: 1 << 40})
		if err != nil {
			return err
		}
		if len(a.Gaps) > 0 {
			return fmt.Errorf("flows were lost: %v", a.Gaps)
		}
		uuids := map[string]bool{}
		for _, f := range a.Flows {
			if uuids[f.GetFlow().GetUuid()] {
				t.Fatalf("flow %s came twice", f.GetFlow().GetUuid())
			}
			uuids[f.GetFlow().GetUuid()] = true
		}
		return compare(want, a.Flows)
	})
}

// TestTwoLabs runs two labs side by side, with equal nodes, pods and addresses: each observer tells of its own lab's traffic, all of it and
// nothing else.
func TestTwoLabs(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	labs := []*cluster.Lab{cluster.Up(t, truthPods, shortTimeouts), cluster.Up(t, truthPods, shortTimeouts)}
	t.Run("traffic", func(t *testing.T) {
		for i, lab := range labs {
			t.Run(fmt.Sprint(i+1), func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
				defer cancel()
				lab := lab.For(t)
				expectAll(ctx, t, lab, observe(ctx, t, lab, false, 80, 5*time.Second, func() {}))
			})
		}
	})
	// One goes, the other stays.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	labs[0].Down()
	to := netip.AddrPortFrom(pathAddresses["c"][0], traffic.WhoPort)
	saw := ask(ctx, t, labs[1], "default/a", "tcp", to)
	same := tupleOf(saw.Client, to)
	labs[1].Expect(ctx, cluster.Wanted{What: "a to c, after the other lab's end", Match: func(f *flowpb.Flow) bool {
		return same(f) && f.NodeName == "default/node2" && f.GetIsReply().GetValue()
	}})
}
