// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	flowpb "github.com/weirmesh/weir/gen/flow"
	observerpb "github.com/weirmesh/weir/gen/observer"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/traffic"
)

// churnReplicas is more than what one CPU starts at a time.
const churnReplicas = 12

// crowd is a Deployment whose pods ask a pod and a service before anything else, once: a first connection that fails ends the container, and
// the restart shows.
func crowd(round int, service netip.AddrPort) string {
	first := fmt.Sprintf("e2e-traffic ask tcp 10.244.1.101:7002 10s && e2e-traffic ask udp '[fd00:10:244:2::103]:7002' 10s && e2e-traffic ask tcp %s 10s && exec e2e-traffic serve", service)
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: crowd%d}
spec:
  replicas: %d
  selector: {matchLabels: {app: crowd%d}}
  template:
    metadata: {labels: {app: crowd%d}}
    spec:
      containers: [{name: main, image: none, command: [sh, -c, %q], readinessProbe: {exec: {command: [e2e-traffic, ready, "7002"]}, periodSeconds: 1}}]
`, round, churnReplicas, round, round, first)
}

// heir is a pod with an address that another one had before.
func heir(round int) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: heir%d, labels: {app: heir%d}, annotations: {weir.dev/ip-addresses: "10.244.2.77,fd00:10:244:2::77"}}
spec: {nodeName: node2, containers: [%s]}
`, round, round, serving)
}

// TestStartOfPods starts and ends pods again and again.
func TestStartOfPods(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, truthPods+`
---
apiVersion: v1
kind: Service
metadata: {name: far}
spec: {selector: {app: c}, ports: [{port: 80, targetPort: 7002}]}
`, "--separate", "--agent-arg=--ct-timeouts=tcp-closed=3s")
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	t.Run("churn", func(t *testing.T) { churn(ctx, t, lab.For(t)) })
	t.Run("agent-killed", func(t *testing.T) { startWithoutAgent(ctx, t, lab.For(t)) })
	t.Run("agent-stuck", func(t *testing.T) { startWithStuckAgent(ctx, t, lab.For(t)) })
}

// awaitPods waits until all pods whose name begins so are ready, and returns them.
func awaitPods(ctx context.Context, t *testing.T, lab *cluster.Lab, prefix string, count int) []*labv1.Pod {
	t.Helper()
	var found []*labv1.Pod
	cluster.Eventually(t, func() error {
		found = nil
		for _, p := range lab.State(ctx).Pods {
			if !strings.HasPrefix(p.Name, prefix) {
				continue
			}
			if p.Restarts > 0 {
				t.Fatalf("pod %s: its container ended with %q: its first connections failed: %s", p.Name, p.Message, lab.Output(p.Namespace, p.Name))
			}
			if p.Ready == p.Containers && p.Status == "Running" {
				found = append(found, p)
			}
		}
		if len(found) != count {
			return fmt.Errorf("%d of %d pods %s are ready", len(found), count, prefix)
		}
		return nil
	})
	return found
}

func churn(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	before := len(endpointList(t, lab))
	service := vip(ctx, t, lab, "far", false)
	// Which pod must be named in the flows of which connection, by its client.
	type connection struct {
		client, server netip.AddrPort
		pod            string
	}
	var made []connection
	for round := range 3 {
		lab.Apply(ctx, crowd(round, service)+"---"+heir(round))
		pods := append(awaitPods(ctx, t, lab, fmt.Sprintf("crowd%d-", round), churnReplicas), awaitPods(ctx, t, lab, fmt.Sprintf("heir%d", round), 1)...)
		owner := map[netip.Addr]string{}
		for _, p := range pods {
			if len(p.Addresses) != 2 {
				t.Errorf("pod %s has the addresses %v, want one of each family", p.Name, p.Addresses)
			}
			for _, text := range p.Addresses {
				a, err := netip.ParseAddr(text)
				if err != nil {
					t.Fatal(err)
				}
				if other, taken := owner[a]; taken {
					t.Errorf("pods %s and %s have the address %s", p.Name, other, a)
				}
				owner[a] = p.Name
			}
			// The first connection to it is made the moment it is ready.
			server := netip.AddrPortFrom(netip.MustParseAddr(p.Addresses[0]), traffic.WhoPort)
			saw := ask(ctx, t, lab, "default/a", "tcp", server)
			if saw.Server != p.Name {
				t.Errorf("%s answers at %s, want %s", saw.Server, server, p.Name)
			}
			made = append(made, connection{netip.AddrPortFrom(pathAddresses["a"][0], saw.Local.Port()), server, p.Name})
		}
		listed := map[string]bool{}
		for _, e := range endpointList(t, lab) {
			listed[e.Pod] = e.State == "ready"
		}
		for _, p := range pods {
			if !listed[p.Name] {
				t.Errorf("pod %s is no ready endpoint", p.Name)
			}
		}
		lab.Delete(ctx, crowd(round, service)+"---"+heir(round))
		cluster.Eventually(t, func() error {
			if n := len(endpointList(t, lab)); n != before {
				return fmt.Errorf("%d endpoints are left, %d were there before", n, before)
			}
			if n := len(lab.State(ctx).Pods); n != 3 {
				return fmt.Errorf("%d pods are left, want 3", n)
			}
			return nil
		})
	}
	cluster.Eventually(t, func() error {
		a, err := lab.Flows(ctx, &observerpb.GetFlowsRequest{Number: 1 << 40})
		if err != nil {
			return err
		}
		for _, c := range made {
			same, nodes := tupleOf(c.client, c.server), map[string]bool{}
			for _, r := range a.Flows {
				f := r.GetFlow()
				if !same(f) {
					continue
				}
				// The last flow of a connection comes when the pod is long gone.
				stats := new(observerv1.FlowStats)
				if f.GetExtensions() != nil && f.GetExtensions().UnmarshalTo(stats) == nil && stats.Final {
					nodes[f.NodeName] = true
				}
				end := f.GetDestination()
				if f.GetIsReply().GetValue() {
					end = f.GetSource()
				}
				app, _, replica := strings.Cut(c.pod, "-")
				var workload string
				if len(end.GetWorkloads()) > 0 {
					workload = end.GetWorkloads()[0].GetName()
				}
				if end.GetPodName() != c.pod || replica && workload != app || !hasLabel(end, "k8s:app="+app) {
					t.Fatalf("flow of %s to %s: pod %q of workload %q with labels %v, want %s: %v", c.client, c.server, end.GetPodName(), workload, end.GetLabels(), c.pod, f)
				}
			}
			if !nodes["default/node1"] || strings.HasPrefix(c.server.String(), "10.244.2.") && !nodes["default/node2"] {
				return fmt.Errorf("connection %s to %s (%s): final flows of %v", c.client, c.server, c.pod, nodes)
			}
		}
		return nil
	})
}

// startWithoutAgent: what one node's agent does not do, the other node's pods do not wait for.
func startWithoutAgent(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	lab.Control(ctx, "agent/node2", labv1.ControlPartRequest_ACTION_KILL)
	lab.Apply(ctx, podOn("node1", "early"))
	pod := awaitPods(ctx, t, lab, "early", 1)[0]
	server := netip.AddrPortFrom(netip.MustParseAddr(pod.Addresses[0]), traffic.WhoPort)
	// Its peers are those of its own node, and those of the other, whose datapath lives on.
	if saw := ask(ctx, t, lab, "default/a", "tcp", server); saw.Server != "early" {
		t.Errorf("a to early: %s answers", saw.Server)
	}
	blind := ask(ctx, t, lab, "default/c", "tcp", server)
	if blind.Server != "early" {
		t.Errorf("c to early: %s answers", blind.Server)
	}
	out, err := lab.Weir("status")
	line := statusLine(out, "agent/node2")
	if line == "" || strings.Contains(line, " ready ") {
		t.Errorf("weir status (%v) of the dead agent: %q", err, line)
	}
	lab.Control(ctx, "agent/node2", labv1.ControlPartRequest_ACTION_START)
	awaitAgents(ctx, t, lab)
	// Its rings kept what was: it did not know the pod then, and does not say otherwise now.
	during := netip.AddrPortFrom(pathAddresses["c"][0], blind.Local.Port())
	saw := ask(ctx, t, lab, "default/c", "tcp", server)
	after := netip.AddrPortFrom(pathAddresses["c"][0], saw.Local.Port())
	lab.Expect(ctx, cluster.Wanted{What: "c to early, while node2's agent was dead", Match: func(f *flowpb.Flow) bool {
		return tupleOf(during, server)(f) && f.NodeName == "default/node2" && f.GetSource().GetPodName() == "c" && f.GetDestination().GetIdentity() == 3 && f.GetDestination().GetPodName() == ""
	}}, cluster.Wanted{What: "c to early, after node2's agent came back", Match: func(f *flowpb.Flow) bool {
		return tupleOf(after, server)(f) && f.NodeName == "default/node2" && f.GetSource().GetPodName() == "c" && f.GetDestination().GetPodName() == "early"
	}})
	lab.Delete(ctx, podOn("node1", "early"))
}

// startWithStuckAgent: an agent that is connected and does not answer is waited for, for a second, and named.
func startWithStuckAgent(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	awaitAgents(ctx, t, lab)
	release := cluster.Hold(t, int(lab.Part(ctx, "agent/node2").Pid))
	defer release()
	lab.Apply(ctx, podOn("node1", "patient"))
	pod := awaitPods(ctx, t, lab, "patient", 1)[0]
	if saw := ask(ctx, t, lab, "default/c", "tcp", netip.AddrPortFrom(netip.MustParseAddr(pod.Addresses[0]), traffic.WhoPort)); saw.Server != "patient" {
		t.Errorf("c to patient: %s answers", saw.Server)
	}
	d, err := lab.Details(ctx, "nodes/node1/agent.sock")
	if err != nil {
		t.Fatal(err)
	}
	if d["late node node2"] == "" {
		t.Errorf("node1's agent names no late node: %v", d)
	}
}

// awaitAgents waits until both agents have told the policy service that they hold its newest state.
func awaitAgents(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	t.Helper()
	cluster.Eventually(t, func() error {
		d, err := lab.Details(ctx, "policy.sock")
		if err != nil {
			return err
		}
		for _, node := range []string{"node1", "node2"} {
			if !strings.Contains(d["agent "+node], "behind 0,") {
				return fmt.Errorf("agent of %s: %q of %v", node, d["agent "+node], d)
			}
		}
		return nil
	})
}

func podOn(node, name string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: %s}}
spec: {nodeName: %s, containers: [%s]}
`, name, name, node, serving)
}

func statusLine(out, part string) string {
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, part+" ") {
			return strings.TrimSpace(line)
		}
	}
	return ""
}
