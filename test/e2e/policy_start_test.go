// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test/e2e/cluster"
)

// startPolicies: newcomers of kind "out" are limited by their own egress, those of kind "in" by the ingress of whom they reach. Both may reach c and nobody
// else; the heir of an address may do so by its label.
var startPolicies = strings.Join([]string{
	cnp("out", `{endpointSelector: {matchLabels: {kind: out}}, egress: [{toEndpoints: [{matchLabels: {app: c}}], toPorts: [{ports: [{port: "7002"}]}]}]}`),
	cnp("c-in", `{endpointSelector: {matchLabels: {app: c}}, ingress: [{fromEndpoints: [{matchLabels: {kind: in}}, {matchLabels: {kind: out}}, {matchLabels: {heir: lawful}}]}]}`),
	cnp("b-in", `{endpointSelector: {matchLabels: {app: b}}, ingress: [{fromEndpoints: [{matchLabels: {app: nobody}}]}]}`),
	cnp("a-out", `{endpointSelector: {matchLabels: {app: a}}, egress: [{toEndpoints: [{matchLabels: {heir: lawful}}]}]}`),
}, "---\n")

// newcomers is a Deployment whose pods first connect to somebody whom they may reach and somebody whom they may not; a wrong verdict ends the container.
func newcomers(round int, kind string, replicas int) string {
	first := "e2e-traffic ask tcp 10.244.2.103:7002 10s && e2e-traffic ask udp '[fd00:10:244:2::103]:7002' 10s && ! e2e-traffic ask tcp 10.244.1.102:7002 700ms && ! e2e-traffic ask udp '[fd00:10:244:1::102]:7002' 300ms && exec e2e-traffic serve"
	name := fmt.Sprintf("new%d%s", round, kind)
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: %s}
spec:
  replicas: %d
  selector: {matchLabels: {app: %s}}
  template:
    metadata: {labels: {app: %s, kind: %s}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{name: main, image: none, command: [sh, -c, %q], readinessProbe: {exec: {command: [e2e-traffic, ready, "7002"]}, periodSeconds: 1}}]
`, name, replicas, name, name, kind, first)
}

// TestStartWithPolicy starts 200 pods in a churn, each of which connects at once to one allowed and one forbidden peer; and gives an address again and again to
// somebody who may, and to somebody who may not.
func TestStartWithPolicy(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, truthPods+"---\n"+startPolicies, "--separate")
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	lab.InForce(ctx, "default/out", "default/c-in", "default/b-in", "default/a-out")
	const rounds, replicas = 5, 20
	for round := range rounds {
		both := newcomers(round, "out", replicas) + "---" + newcomers(round, "in", replicas)
		lab.Apply(ctx, both)
		awaitPods(ctx, t, lab, fmt.Sprintf("new%d", round), 2*replicas)
		lab.Delete(ctx, both)
		inherit(ctx, t, lab, round)
	}
}

// inherit starts a pod at an address that another pod has just left, whose rights it must not have.
func inherit(ctx context.Context, t *testing.T, lab *cluster.Lab, round int) {
	lawful := round%2 == 0
	word := "unlawful"
	if lawful {
		word = "lawful"
	}
	manifest := fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: heir, labels: {app: heir%d, heir: %s}, annotations: {weir.dev/ip-addresses: "10.244.2.77,fd00:10:244:2::77"}}
spec: {nodeName: node2, terminationGracePeriodSeconds: 0, containers: [%s]}
`, round, word, serving)
	lab.Apply(ctx, manifest)
	awaitPods(ctx, t, lab, "heir", 1)
	for what, try := range map[string]struct{ from, to string }{
		"of the heir to c": {"default/heir", "10.244.2.103:7002"},
		"of a to the heir": {"default/a", "[fd00:10:244:2::77]:7002"},
	} {
		_, err := lab.Exec(ctx, try.from, "e2e-traffic", "ask", "tcp", try.to, "700ms")
		if lawful != (err == nil) {
			t.Errorf("round %d: the connection %s, which is %s: %v", round, what, word, err)
		}
	}
	lab.Delete(ctx, manifest)
	cluster.Eventually(t, func() error {
		for _, p := range lab.State(ctx).Pods {
			if p.Name == "heir" {
				return fmt.Errorf("pod %s is still there", p.Name)
			}
		}
		return nil
	})
}
