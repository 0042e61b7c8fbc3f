// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	flowpb "github.com/weirmesh/weir/gen/flow"
	observerpb "github.com/weirmesh/weir/gen/observer"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/pulse"
)

// policyPods: a may always reach server, b never; c sometimes. One of each kind of pair is on one node, the other across.
const policyPods = `
apiVersion: v1
kind: Pod
metadata: {name: a, labels: {app: a, role: friend}, annotations: {weir.dev/ip-addresses: "10.244.1.101,fd00:10:244:1::101"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: b, labels: {app: b, role: foe}, annotations: {weir.dev/ip-addresses: "10.244.2.102,fd00:10:244:2::102"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: c, labels: {app: c, role: guest}, annotations: {weir.dev/ip-addresses: "10.244.1.103,fd00:10:244:1::103"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}, annotations: {weir.dev/ip-addresses: "10.244.2.110,fd00:10:244:2::110"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [sleep, infinity]}]}
`

const pulsePort = 7100

var (
	addrA       = netip.MustParseAddr("10.244.1.101")
	addrB       = netip.MustParseAddr("10.244.2.102")
	addrC6      = netip.MustParseAddr("fd00:10:244:1::103")
	addrServer  = netip.MustParseAddr("10.244.2.110")
	addrServer6 = netip.MustParseAddr("fd00:10:244:2::110")
)

// variant is a set of policies for server, all of which allow a and forbid b; c as it says.
type variant struct {
	objects map[string]string // by "namespace/name"
	guest   bool
}

func cnp(name, spec string) string {
	return fmt.Sprintf("apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: %s, namespace: default}\nspec: %s\n", name, spec)
}

func knp(name, spec string) string {
	return fmt.Sprintf("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: %s, namespace: default}\nspec: %s\n", name, spec)
}

// randomVariant puts the objects together from ways to say the same thing.
func randomVariant(rng *rand.Rand) variant {
	v := variant{objects: map[string]string{}, guest: rng.IntN(2) == 0}
	peers := []string{"app: a", "role: friend"}
	ports := []string{
		`toPorts: [{ports: [{port: "7100"}]}]`,
		`toPorts: [{ports: [{port: "7000", endPort: 7200}]}]`,
		`toPorts: [{ports: [{port: "7100", protocol: UDP}, {port: "7100", protocol: TCP}, {port: "1", protocol: TCP}]}]`,
		"",
	}
	rule := func(peer string) string {
		r := fmt.Sprintf("{fromEndpoints: [{matchLabels: {%s}}]", peer)
		if p := ports[rng.IntN(len(ports))]; p != "" {
			r += ", " + p
		}
		return r + "}"
	}
	add := func(name, text string) { v.objects["default/"+name] = text }
	allow := []string{rule(peers[rng.IntN(2)])}
	for range rng.IntN(4) {
		allow = append(allow, rule(fmt.Sprintf("app: noise%d", rng.IntN(20))))
	}
	if v.guest {
		allow = append(allow, rule("app: c"))
	}
	rng.Shuffle(len(allow), func(i, j int) { allow[i], allow[j] = allow[j], allow[i] })
	add("main", cnp("main", "{endpointSelector: {matchLabels: {app: server}}, ingress: ["+strings.Join(allow, ", ")+"]}"))
	if rng.IntN(2) == 0 {
		add("second", knp("second", fmt.Sprintf("{podSelector: {matchLabels: {app: server}}, ingress: [{from: [{podSelector: {matchLabels: {%s}}}]}]}", peers[rng.IntN(2)])))
	}
	if rng.IntN(2) == 0 {
		add("third", cnp("third", fmt.Sprintf(`{endpointSelector: {matchLabels: {app: server}}, ingressDeny: [{fromEndpoints: [{matchLabels: {app: b}}]}, {fromCIDR: [198.51.100.%d/32]}]}`, rng.IntN(200))))
	}
	if rng.IntN(2) == 0 {
		add("egress", cnp("egress", fmt.Sprintf(`{endpointSelector: {matchLabels: {role: friend}}, egress: [{toEndpoints: [{matchLabels: {app: server}}]}, {toCIDR: [203.0.113.%d/32]}]}`, rng.IntN(200))))
	}
	return v
}

// changes is how many changes of policy a test makes: 200, or WEIR_SOAK_CHANGES.
func changes(t *testing.T) int {
	n, err := strconv.Atoi(os.Getenv("WEIR_SOAK_CHANGES"))
	if os.Getenv("WEIR_SOAK_CHANGES") == "" {
		return 200
	}
	if err != nil || n < 1 {
		t.Fatalf("WEIR_SOAK_CHANGES=%q: want a positive number", os.Getenv("WEIR_SOAK_CHANGES"))
	}
	return n
}

// world is the traffic of a policy test: what a sends must arrive, what b sends must not.
type world struct {
	server      *pulse.Server
	friend, foe *pulse.Client
	friend6     *pulse.Client
	lab         *cluster.Lab
	guest       string // namespace of c
	serverNetns string
}

func startWorld(ctx context.Context, t *testing.T, lab *cluster.Lab) *world {
	t.Helper()
	w := &world{lab: lab, guest: lab.Netns(ctx, "default", "c"), serverNetns: lab.Netns(ctx, "default", "server")}
	var err error
	if w.server, err = pulse.Listen(w.serverNetns, pulsePort); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.server.Close)
	start := func(pod string, to netip.Addr, hopeless bool) *pulse.Client {
		c, err := pulse.Start(ctx, pulse.Load{From: lab.Netns(ctx, "default", pod), To: netip.AddrPortFrom(to, pulsePort), Every: 4 * time.Millisecond, Connect: 25 * time.Millisecond, Hopeless: hopeless})
		if err != nil {
			t.Fatalf("load of %s: %v", pod, err)
		}
		return c
	}
	w.friend, w.friend6 = start("a", addrServer, false), start("a", addrServer6, false)
	w.foe = start("b", addrServer, true)
	return w
}

// finish stops the traffic and judges it.
func (w *world) finish(ctx context.Context, t *testing.T) {
	t.Helper()
	foe := w.foe.Stop()
	for _, c := range []struct {
		client *pulse.Client
		from   netip.Addr
	}{{w.friend, addrA}, {w.friend6, netip.MustParseAddr("fd00:10:244:1::101")}} {
		r := c.client.Stop()
		for _, err := range r.Errors {
			t.Errorf("allowed traffic of %s failed: %v", c.from, err)
		}
		cluster.Eventually(t, func() error {
			if got := w.server.Datagrams(c.from); got != r.Datagrams {
				return fmt.Errorf("%s sent %d datagrams, all allowed: %d arrived", c.from, r.Datagrams, got)
			}
			return nil
		})
		t.Logf("%s: %d datagrams, %d connections, %d segments sent again", c.from, r.Datagrams, r.Connections, r.Retransmitted)
	}
	if n := w.server.Datagrams(addrB) + w.server.Connections(addrB) + foe.Connections; n != 0 {
		t.Errorf("%d packets or connections of the forbidden client came through", n)
	}
	if foe.Datagrams == 0 {
		t.Error("the forbidden client sent nothing: the test shows nothing")
	}
	t.Logf("forbidden: %d datagrams sent, %d arrived", foe.Datagrams, w.server.Datagrams(addrB))
	a, err := w.lab.Flows(ctx, &observerpb.GetFlowsRequest{Number: 1 << 40, Whitelist: []*flowpb.FlowFilter{{SourcePod: []string{"default/a"}, Verdict: []flowpb.Verdict{flowpb.Verdict_DROPPED}}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range a.Flows {
		t.Errorf("a packet that is always allowed was dropped: %v", f.GetFlow())
	}
}

// TestPolicyChanges changes policies under traffic and lets pods come and go: what old and new policy allow is never dropped, what both forbid never
// passes; what changes, changes.
func TestPolicyChanges(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, policyPods, "--separate")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))

	now := randomVariant(rng)
	apply(ctx, lab, variant{}, now)
	lab.InForce(ctx, objectNames(now)...)
	w := startWorld(ctx, t, lab)
	for i := range changes(t) {
		next := randomVariant(rng)
		apply(ctx, lab, now, next)
		now = next
		if i%3 == 0 { // somebody who may, or may not, by his labels
			lab.Apply(ctx, comer(i, rng))
		}
		if i%3 == 2 {
			lab.Delete(ctx, comer(i-2, rng))
		}
		if i%10 != 9 {
			continue
		}
		lab.InForce(ctx, objectNames(now)...)
		before := w.server.Datagrams(addrC6)
		c, err := pulse.Start(ctx, pulse.Load{From: w.guest, To: netip.AddrPortFrom(addrServer6, pulsePort), Every: time.Millisecond, Hopeless: true})
		if err != nil {
			t.Fatal(err)
		}
		cluster.Eventually(t, func() error {
			if w.server.Datagrams(addrC6) == before && now.guest {
				return fmt.Errorf("change %d allows c, and nothing arrives", i)
			}
			return nil
		})
		r := c.Stop()
		if got := w.server.Datagrams(addrC6); !now.guest && got != before {
			t.Fatalf("change %d forbids c: %d of %d datagrams arrived", i, got-before, r.Datagrams)
		}
	}
	w.finish(ctx, t)
}

func objectNames(v variant) []string {
	var all []string
	for n := range v.objects {
		all = append(all, n)
	}
	return all
}

// apply goes from one set of objects to the next: new ones first, so that no moment lacks one that allows a.
func apply(ctx context.Context, lab *cluster.Lab, from, to variant) {
	var docs []string
	for n, o := range to.objects {
		if from.objects[n] != o {
			docs = append(docs, o)
		}
	}
	if len(docs) > 0 {
		lab.Apply(ctx, strings.Join(docs, "---\n"))
	}
	docs = nil
	for n, o := range from.objects {
		if _, ok := to.objects[n]; !ok {
			docs = append(docs, o)
		}
	}
	if len(docs) > 0 {
		lab.Delete(ctx, strings.Join(docs, "---\n"))
	}
}

func comer(i int, rng *rand.Rand) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: comer%d, labels: {app: noise%d, unique: "%d"}}
spec: {nodeName: node%d, terminationGracePeriodSeconds: 0, containers: [{name: main, image: none, command: [sleep, infinity]}]}
`, i, rng.IntN(20), i, 1+i%2)
}

// TestAgentKilledUnderPolicy kills and restarts agents under load while policies hold: nothing that policy allows is lost, nothing that it forbids passes,
// connections live on; a change made meanwhile comes into force.
func TestAgentKilledUnderPolicy(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, policyPods, "--separate")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	rng := rand.New(rand.NewPCG(1, 1))
	now := randomVariant(rng)
	apply(ctx, lab, variant{}, now)
	lab.InForce(ctx, objectNames(now)...)
	w := startWorld(ctx, t, lab)
	for i := range 4 {
		node := fmt.Sprintf("agent/node%d", 1+i%2)
		lab.Control(ctx, node, labv1.ControlPartRequest_ACTION_KILL)
		next := randomVariant(rng)
		apply(ctx, lab, now, next)
		now = next
		time.Sleep(time.Second) // the outage itself
		lab.Control(ctx, node, labv1.ControlPartRequest_ACTION_START)
		lab.InForce(ctx, objectNames(now)...)
	}
	w.finish(ctx, t)
}

// TestPolicyCut: a connection that a new policy forbids stops in both directions, also a stream of answers that nobody asks for again; a flow says so.
func TestPolicyCut(t *testing.T) {
	lab := cluster.Up(t, policyPods)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	server, err := pulse.Listen(lab.Netns(ctx, "default", "server"), pulsePort)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	stream, err := pulse.Stream(lab.Netns(ctx, "default", "c"), lab.Netns(ctx, "default", "server"), netip.AddrPortFrom(addrServer6, pulsePort+1), time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	cluster.Eventually(t, func() error {
		if n := stream.Arrived(); n < 50 {
			return fmt.Errorf("%d datagrams of the stream arrived", n)
		}
		return nil
	})
	lab.Apply(ctx, cnp("cut", `{endpointSelector: {matchLabels: {app: server}}, ingressDeny: [{fromEndpoints: [{matchLabels: {app: c}}]}]}`))
	lab.InForce(ctx, "default/cut")
	time.Sleep(time.Second) // the bound that is promised
	before, sent := stream.Arrived(), stream.Sent()
	cluster.Eventually(t, func() error {
		if n := stream.Sent() - sent; n < 200 {
			return fmt.Errorf("%d datagrams were sent after the cut", n)
		}
		return nil
	})
	if n := stream.Arrived() - before; n != 0 {
		t.Errorf("%d datagrams of the server's stream arrived more than 1 s after the policy that forbids the connection", n)
	}
	lab.Expect(ctx, cluster.Wanted{What: "a drop flow of the cut connection that names the policy", Match: func(f *flowpb.Flow) bool {
		return f.GetVerdict() == flowpb.Verdict_DROPPED && f.GetDropReasonDesc() == flowpb.DropReason_POLICY_DENY && len(f.GetIngressDeniedBy()) == 1 && f.GetIngressDeniedBy()[0].GetName() == "cut"
	}})
}
