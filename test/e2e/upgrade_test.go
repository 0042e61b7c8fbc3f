// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	flowpb "github.com/weirmesh/weir/gen/flow"
	observerpb "github.com/weirmesh/weir/gen/observer"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/pulse"
)

// upgradePods: many connections begin at d, on the server's own node, and at e, across, so that some do while programs are replaced.
const upgradePods = policyPods + `
---
apiVersion: v1
kind: Pod
metadata: {name: d, labels: {app: a, role: friend}, annotations: {weir.dev/ip-addresses: "10.244.2.104,fd00:10:244:2::104"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: e, labels: {app: a, role: friend}, annotations: {weir.dev/ip-addresses: "10.244.1.105,fd00:10:244:1::105"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
`

// Streams of the server's answers: one that lives through the upgrade, one that a policy of afterwards cuts.
const (
	keptPort = 7201
	cutPort  = 7202
)

// repliesOnly lets nobody begin a connection to a friend, nor the server begin any: answers pass only because their connection is tracked.
var repliesOnly = map[string]string{
	"default/quiet":   cnp("quiet", `{endpointSelector: {matchLabels: {role: friend}}, ingress: [{fromEndpoints: [{matchLabels: {app: nobody}}]}]}`),
	"default/silent":  cnp("silent", `{endpointSelector: {matchLabels: {app: server}}, egress: [{toEndpoints: [{matchLabels: {app: nobody}}]}]}`),
	"default/streams": cnp("streams", `{endpointSelector: {matchLabels: {app: server}}, ingress: [{fromEndpoints: [{matchLabels: {role: friend}}], toPorts: [{ports: [{port: "7201", endPort: 7202, protocol: UDP}]}]}]}`),
}

// TestAgentUpgradedUnderPolicy replaces the agents, one after the other and under load, by a build whose programs and pinned connections differ
// (bpf/datapath/layout_next.go): nothing that policy allows is lost, nothing that it forbids passes, connections live on with their totals, and policy
// holds for them as before.
func TestAgentUpgradedUnderPolicy(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	bin := binaries(t)
	next := nextAgent(t)
	lab := cluster.Up(t, upgradePods, "--separate", "--bin", bin)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	vary := func() variant {
		v := randomVariant(rng)
		for n, text := range repliesOnly {
			v.objects[n] = text
		}
		return v
	}
	now := vary()
	apply(ctx, lab, variant{}, now)
	lab.InForce(ctx, objectNames(now)...)
	w := startWorld(ctx, t, lab)
	server := lab.Netns(ctx, "default", "server")
	streams := map[uint16]*pulse.Streamed{}
	for _, port := range []uint16{keptPort, cutPort} {
		s, err := pulse.Stream(lab.Netns(ctx, "default", "a"), server, netip.AddrPortFrom(addrServer6, port), time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.Close)
		streams[port] = s
	}
	busy := map[string]*pulse.Client{}
	for name, to := range map[string]netip.Addr{"d": addrServer, "e": addrServer6} {
		c, err := pulse.Start(ctx, pulse.Load{From: lab.Netns(ctx, "default", name), To: netip.AddrPortFrom(to, pulsePort), Every: 2 * time.Millisecond, Connect: 2 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		busy[name] = c
	}

	for _, node := range []string{"node1", "node2"} {
		pins := filepath.Join("/sys/fs/bpf/weir", lab.Name, node)
		before := layouts(t, pins)
		lab.Control(ctx, "agent/"+node, labv1.ControlPartRequest_ACTION_KILL)
		// Another program for the agents that are started from now on; for the first node, while the other still has the old one.
		link(t, next, filepath.Join(bin, "weir-agent"))
		following := vary()
		apply(ctx, lab, now, following)
		now = following
		lab.Control(ctx, "agent/"+node, labv1.ControlPartRequest_ACTION_START)
		lab.InForce(ctx, objectNames(now)...)
		if after := layouts(t, pins); len(before) != 1 || len(after) != 1 || before[0] == after[0] {
			t.Errorf("pins of ct on %s: %v, and %v after the upgrade: want one each, of another layout", node, before, after)
		}
	}

	for name, c := range busy {
		r := c.Stop()
		for _, err := range r.Errors {
			t.Errorf("allowed traffic of %s failed: %v", name, err)
		}
		from := map[string]netip.Addr{"d": netip.MustParseAddr("10.244.2.104"), "e": netip.MustParseAddr("fd00:10:244:1::105")}[name]
		cluster.Eventually(t, func() error {
			if got := w.server.Datagrams(from); got != r.Datagrams {
				return fmt.Errorf("%s sent %d datagrams, all allowed: %d arrived", name, r.Datagrams, got)
			}
			return nil
		})
		t.Logf("%s: %d datagrams, %d connections, %d segments sent again", name, r.Datagrams, r.Connections, r.Retransmitted)
	}
	w.finish(ctx, t)
	answersAllPassed(ctx, t, lab)

	cut(ctx, t, lab, streams[cutPort])
	streams[keptPort].Close()
	for _, node := range []string{"node1", "node2"} {
		// What was cut at the server's node left it no more.
		for port, want := range map[uint16]uint64{keptPort: streams[keptPort].Sent(), cutPort: streams[cutPort].Arrived()} {
			if got := answers(ctx, t, lab, node, netip.AddrPortFrom(addrServer6, port)); got != want {
				t.Errorf("%s has counted %d answers of port %d, want %d", node, got, port, want)
			}
		}
	}
}

// cut forbids the connection of a stream that began before the upgrade.
func cut(ctx context.Context, t *testing.T, lab *cluster.Lab, stream *pulse.Streamed) {
	t.Helper()
	lab.Apply(ctx, cnp("cut", `{endpointSelector: {matchLabels: {app: server}}, ingressDeny: [{fromEndpoints: [{matchLabels: {app: a}}], toPorts: [{ports: [{port: "7202", protocol: UDP}]}]}]}`))
	cluster.Eventually(t, func() error {
		before, sent := stream.Arrived(), stream.Sent()
		for deadline := time.Now().Add(time.Second); stream.Sent()-sent < 100 && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		if n := stream.Arrived() - before; n != 0 || stream.Sent()-sent < 100 {
			return fmt.Errorf("%d of %d datagrams of a connection that is forbidden now arrived", n, stream.Sent()-sent)
		}
		return nil
	})
}

// answersAllPassed looks for answers of the server that were dropped.
func answersAllPassed(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	t.Helper()
	a, err := lab.Flows(ctx, &observerpb.GetFlowsRequest{Number: 1 << 40, Whitelist: []*flowpb.FlowFilter{{
		SourcePod: []string{"default/server"}, DestinationPod: []string{"default/a", "default/d", "default/e"}, Verdict: []flowpb.Verdict{flowpb.Verdict_DROPPED},
	}, {
		SourcePod: []string{"default/d", "default/e"}, DestinationPod: []string{"default/server"}, Verdict: []flowpb.Verdict{flowpb.Verdict_DROPPED},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range a.Flows {
		if i == 10 {
			t.Errorf("and %d more", len(a.Flows)-i)
			break
		}
		t.Errorf("a packet of a connection that is allowed was dropped: %v", f.GetFlow())
	}
}

// answers is what an agent's table has counted from a server's address and port.
func answers(ctx context.Context, t *testing.T, lab *cluster.Lab, node string, from netip.AddrPort) uint64 {
	t.Helper()
	conn, err := grpc.NewClient("unix:///run/weir/"+lab.Name+"/nodes/"+node+"/agent.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := agentv1.NewAgentServiceClient(conn).DumpConntrack(ctx, &agentv1.DumpConntrackRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var found []*agentv1.DumpConntrackResponse
	for {
		c, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("connections of %s: %v", node, err)
		}
		if c.Destination == from.String() {
			found = append(found, c)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%s has %d connections to %s, want 1: %v", node, len(found), from, found)
	}
	return found[0].ReversePackets
}

// layouts are the pins of ct.
func layouts(t *testing.T, pins string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(pins, "ct_v*"))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// binaries is a folder with links to all programs, for a test that exchanges one.
func binaries(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	from := filepath.Dir(cluster.Bin(t, "weir-agent"))
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		link(t, filepath.Join(from, e.Name()), filepath.Join(dir, e.Name()))
	}
	return dir
}

// link makes a link, or lets one point elsewhere, in one step.
func link(t *testing.T, to, name string) {
	t.Helper()
	if err := errors.Join(os.Symlink(to, name+".new"), os.Rename(name+".new", name)); err != nil {
		t.Fatal(err)
	}
}

// nextAgent builds the agent whose layout is one ahead.
func nextAgent(t *testing.T) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "weir-agent-next")
	build := exec.Command("go", "build", "-trimpath", "-tags", "weir_next_layout", "-o", name, "./cmd/weir-agent")
	build.Dir = filepath.Join(cluster.Root(t), "services", "agent")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the next agent: %v\n%s", err, out)
	}
	return name
}
