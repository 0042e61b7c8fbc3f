// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	flowpb "github.com/weirmesh/weir/gen/flow"
	observerpb "github.com/weirmesh/weir/gen/observer"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/web"
)

// faultPods: three servers on node2, of which one is under a rule, one only seen, one neither; clients on both nodes.
const faultPods = l7Clients + `---
apiVersion: v1
kind: Pod
metadata: {name: ruled, labels: {app: ruled}, annotations: {weir.dev/ip-addresses: "10.244.2.81,fd00:10:244:2::81"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [e2e-traffic, http, "8080"], readinessProbe: {tcpSocket: {port: 8080}}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: seen, labels: {app: seen}, annotations: {weir.dev/ip-addresses: "10.244.2.82,fd00:10:244:2::82", policy.cilium.io/proxy-visibility: "<ingress/8080/TCP/HTTP>"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [e2e-traffic, http, "8080"], readinessProbe: {tcpSocket: {port: 8080}}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: plain, labels: {app: plain}, annotations: {weir.dev/ip-addresses: "10.244.2.83,fd00:10:244:2::83"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [e2e-traffic, http, "8080"], readinessProbe: {tcpSocket: {port: 8080}}}]}
`

const ruledPolicy = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: ruled}
spec:
  endpointSelector: {matchLabels: {app: ruled}}
  ingress:
  - toPorts: [{ports: [{port: "8080", protocol: TCP}], rules: {http: [{method: GET, path: "/open"}]}}]
`

var (
	ruledAt = netip.MustParseAddrPort("10.244.2.81:8080")
	seenAt  = netip.MustParseAddrPort("10.244.2.82:8080")
	plainAt = netip.MustParseAddrPort("10.244.2.83:8080")
)

// TestProxyKilled kills the proxy under load: nothing at L4 notices, what is only seen goes on plainly, what is under a rule waits; no request that policy
// denies ever passes.
func TestProxyKilled(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, faultPods)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	lab.Apply(ctx, ruledPolicy)
	lab.InForce(ctx, "default/ruled")
	near, far := l7Everywhere[0], l7Everywhere[1]
	get := func(path string, status int) []web.Request {
		return []web.Request{{Method: "GET", URL: "http://server:8080" + path, Status: status}}
	}
	start := func(c l7Client, to netip.AddrPort, fresh bool, requests []web.Request) *web.Running {
		client := c.web(ctx, lab, to, web.Options{Fresh: fresh, Timeout: 2 * time.Second})
		return web.Load{Client: client, Every: 10 * time.Millisecond, Requests: requests}.Start(ctx)
	}
	denied := get("/secret", 403)
	loads := map[string]*web.Running{
		"plain, kept": start(near, plainAt, false, get("/", 200)), "plain, new": start(far, plainAt, true, get("/", 200)),
		"seen, new": start(near, seenAt, true, get("/", 200)), "seen, kept": start(far, seenAt, false, get("/", 200)),
		"ruled, new": start(near, ruledAt, true, get("/open", 200)), "ruled, kept": start(far, ruledAt, false, get("/open", 200)),
		"denied, new": start(near, ruledAt, true, denied), "denied, kept": start(far, ruledAt, false, denied),
	}
	for range 3 {
		lab.Control(ctx, "proxy/node2", labv1.ControlPartRequest_ACTION_KILL)
		// Without a proxy: seen goes straight on, ruled does not.
		client := near.web(ctx, lab, seenAt, web.Options{Fresh: true, Timeout: 2 * time.Second})
		cluster.Eventually(t, func() error {
			a, err := client.Do(ctx, "GET", "http://server:8080/")
			if err == nil && a.Status != 200 {
				err = fmt.Errorf("status %d", a.Status)
			}
			return err
		})
		client.Close()
		if err := connects(ctx, lab, "near", ruledAt, 700*time.Millisecond); err == nil {
			t.Error("a connection under a rule is accepted without a proxy")
		}
		begun := time.Now()
		lab.Control(ctx, "proxy/node2", labv1.ControlPartRequest_ACTION_START)
		cluster.Eventually(t, func() error { return connects(ctx, lab, "near", ruledAt, 500*time.Millisecond) })
		t.Logf("connections under a rule are accepted %s after the proxy's start", time.Since(begun).Round(time.Millisecond))
		awaitAnswers(t, 3, loads)
	}
	for name, load := range loads {
		r := load.Stop()
		t.Logf("%s: %s", name, r)
		switch {
		case len(r.Wrong) > 0 && !onlyUnavailable(r):
			t.Errorf("%s: wrong answers: %s", name, r)
		case strings.HasPrefix(name, "plain") && r.Failures() > 0:
			t.Errorf("%s: %s", name, r)
		}
		if strings.HasPrefix(name, "denied") && r.Servers["ruled"] > 0 {
			t.Errorf("%s: %d requests that policy denies reached the server", name, r.Servers["ruled"])
		}
	}
}

// awaitAnswers waits until each load has had some more right answers.
func awaitAnswers(t *testing.T, more int, loads map[string]*web.Running) {
	t.Helper()
	for name, load := range loads {
		before := load.Right()
		cluster.Eventually(t, func() error {
			if n := load.Right() - before; n < more {
				return fmt.Errorf("%s: %d right answers, want %d more", name, n, more)
			}
			return nil
		})
	}
}

// onlyUnavailable reports whether all wrong answers are 503: an upstream connection that ended with the proxy.
func onlyUnavailable(r web.Result) bool {
	for text := range r.Wrong {
		if !strings.Contains(text, ": 503 instead of") {
			return false
		}
	}
	return true
}

// TestAgentKilledL7: requests go on, are judged and are told later.
func TestAgentKilledL7(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, faultPods)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	lab.Apply(ctx, ruledPolicy)
	lab.InForce(ctx, "default/ruled")
	near := l7Everywhere[0]
	requests := []web.Request{{Method: "GET", URL: "http://server:8080/open", Status: 200}, {Method: "GET", URL: "http://server:8080/secret", Status: 403}}
	loads := map[string]*web.Running{}
	for _, fresh := range []bool{false, true} {
		client := near.web(ctx, lab, ruledAt, web.Options{Fresh: fresh})
		loads[fmt.Sprintf("new connections %t", fresh)] = web.Load{Client: client, Every: 10 * time.Millisecond, Requests: requests}.Start(ctx)
	}
	for range 2 {
		lab.Control(ctx, "agent/node2", labv1.ControlPartRequest_ACTION_KILL)
		awaitAnswers(t, 30, loads) // without an agent
		lab.Control(ctx, "agent/node2", labv1.ControlPartRequest_ACTION_START)
		cluster.Eventually(t, func() error {
			_, err := lab.Details(ctx, "nodes/node2/agent.sock")
			return err
		})
	}
	awaitAnswers(t, 30, loads)
	for name, load := range loads {
		if r := load.Stop(); r.Failures() > 0 || len(r.Wrong) > 0 {
			t.Errorf("while agents are killed, %s: %s", name, r)
		}
	}
}

// TestVisibility switches visibility on and off under load, at the pod and at its namespace: nothing is lost, only new connections are seen.
func TestVisibility(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, faultPods)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	request := []web.Request{{Method: "GET", URL: "http://server:8080/", Status: 200}}
	loads := map[string]*web.Running{}
	for _, c := range l7Everywhere {
		for _, fresh := range []bool{false, true} {
			client := c.web(ctx, lab, plainAt, web.Options{Fresh: fresh})
			loads[fmt.Sprintf("%s, new connections %t", c.name, fresh)] = web.Load{Client: client, Every: 10 * time.Millisecond, Requests: request}.Start(ctx)
		}
	}
	namespace := func(annotations string) {
		lab.Apply(ctx, "apiVersion: v1\nkind: Namespace\nmetadata: {name: default"+annotations+"}\n")
	}
	for range 3 {
		before := l7Flows(ctx, t, lab, "plain")
		namespace(`, annotations: {weir.dev/proxy-visibility: "<ingress/8080/TCP/HTTP>"}`)
		cluster.Eventually(t, func() error {
			if n := l7Flows(ctx, t, lab, "plain"); n <= before+5 {
				return fmt.Errorf("%d requests are seen, %d before", n, before)
			}
			return nil
		})
		namespace("")
		cluster.Eventually(t, func() error {
			begin := l7Flows(ctx, t, lab, "plain")
			time.Sleep(time.Second) // load that nobody looks at
			if n := l7Flows(ctx, t, lab, "plain"); n > begin {
				return errors.New("requests are still seen")
			}
			return nil
		})
	}
	awaitAnswers(t, 30, loads)
	for name, load := range loads {
		if r := load.Stop(); r.Failures() > 0 || len(r.Wrong) > 0 {
			t.Errorf("%s: %s", name, r)
		}
	}
}

// l7Flows counts the L7 flows to a pod.
func l7Flows(ctx context.Context, t *testing.T, lab *cluster.Lab, pod string) int {
	t.Helper()
	a, err := lab.Flows(ctx, &observerpb.GetFlowsRequest{Number: 1 << 40, Whitelist: []*flowpb.FlowFilter{{
		EventType: []*flowpb.EventTypeFilter{{Type: 129}}, DestinationPod: []string{"default/" + pod},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	return len(a.Flows)
}

// lateProxy makes an edit while the proxy that is to have it stands still: the edit is not in force.
func lateProxy(ctx context.Context, t *testing.T, lab *cluster.Lab, edit func()) {
	t.Helper()
	release := cluster.Hold(t, int(lab.Part(ctx, "proxy/node2").Pid))
	defer release()
	edit()
	cluster.Eventually(t, func() error {
		_, err := lab.Weir("policy", "wait", "default/ruled", "--timeout", "2s")
		if err == nil {
			t.Fatal("in force without the proxy")
		}
		if !strings.Contains(err.Error(), "its proxy has not taken") {
			return err
		}
		return nil
	})
}

// TestRuleEdit edits a rule under live connections: once the edit is in force, the very next request is judged by the new rule, on the same connection.
func TestRuleEdit(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, faultPods)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	lab.Apply(ctx, ruledPolicy)
	lab.InForce(ctx, "default/ruled")
	clients, ports := map[string]*web.Client{}, map[string]netip.AddrPort{}
	for _, c := range l7Everywhere {
		clients[c.name] = c.web(ctx, lab, ruledAt, web.Options{})
		first, err := clients[c.name].Do(ctx, "GET", "http://server:8080/open")
		if err != nil || first.Echo == nil {
			t.Fatalf("%s: %d %v", c.name, first.Status, err)
		}
		ports[c.name] = first.Echo.Client
	}
	const edits = 50
	for i := range edits {
		path := fmt.Sprintf("/edit%d", i)
		edit := func() { lab.Apply(ctx, strings.Replace(ruledPolicy, `"/open"`, `"`+path+`"`, 1)) }
		if i%10 == 5 {
			lateProxy(ctx, t, lab, edit)
		} else {
			edit()
		}
		if out, err := lab.Weir("policy", "wait", "default/ruled", "--timeout", "20s"); err != nil {
			t.Fatalf("edit %d: %v: %s", i, err, out)
		}
		for name, client := range clients {
			before, err := client.Do(ctx, "GET", fmt.Sprintf("http://server:8080/edit%d", i-1))
			if err != nil || before.Status != 403 {
				t.Fatalf("%s, edit %d: what was allowed before is answered with %d, %v", name, i, before.Status, err)
			}
			now, err := client.Do(ctx, "GET", "http://server:8080"+path)
			if err != nil || now.Status != 200 || now.Echo == nil {
				t.Fatalf("%s, edit %d: what is allowed now is answered with %d, %v", name, i, now.Status, err)
			}
			if now.Echo.Client != ports[name] {
				t.Fatalf("%s, edit %d: the server sees %s, before %s: another connection", name, i, now.Echo.Client, ports[name])
			}
		}
	}
	for _, client := range clients {
		client.Close()
	}
}

// TestReplicas kills each replica of the policy service and of the xDS server in turn: rules that are edited meanwhile come through by the other one, and no
// request is judged wrongly or lost.
func TestReplicas(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, faultPods, "--separate", "--policies=2", "--xds=2")
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	lab.Apply(ctx, ruledPolicy)
	near := l7Everywhere[0]
	client := near.web(ctx, lab, ruledAt, web.Options{})
	defer client.Close()
	judged := func(path string, status int) func() error {
		return func() error {
			a, err := client.Do(ctx, "GET", "http://server:8080"+path)
			if err == nil && a.Status != status {
				err = fmt.Errorf("%s is answered with %d, want %d", path, a.Status, status)
			}
			return err
		}
	}
	cluster.Eventually(t, judged("/secret", 403))
	cluster.Eventually(t, judged("/always", 403))
	load := near.web(ctx, lab, ruledAt, web.Options{Fresh: true})
	denied := web.Load{Client: load, Every: 10 * time.Millisecond, Requests: []web.Request{{Method: "GET", URL: "http://server:8080/secret", Status: 403}}}.Start(ctx)
	for i, part := range []string{"xds", "policy", "xds-2", "policy-2"} {
		lab.Control(ctx, part, labv1.ControlPartRequest_ACTION_KILL)
		path := fmt.Sprintf("/edit%d", i)
		lab.Apply(ctx, strings.Replace(ruledPolicy, `"/open"`, `"`+path+`"`, 1))
		cluster.Eventually(t, judged(path, 200))
		if err := judged("/open", 403)(); err != nil {
			t.Errorf("without %s: %v", part, err)
		}
		lab.Control(ctx, part, labv1.ControlPartRequest_ACTION_START)
		cluster.Eventually(t, func() error {
			_, err := lab.Details(ctx, part+".sock")
			return err
		})
	}
	awaitAnswers(t, 30, map[string]*web.Running{"denied": denied})
	if r := denied.Stop(); r.Failures() > 0 || len(r.Wrong) > 0 {
		t.Errorf("while replicas are killed: %s", r)
	}
}
