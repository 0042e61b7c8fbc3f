// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/vishvananda/netlink"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	flowpb "github.com/weirmesh/weir/gen/flow"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/services/agent"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/testns"
)

// lockDown is a policy by which identity 300 reaches port 8080 of its subject, and nobody anything else.
func lockDown() []*policyv1.Resource {
	rule := &policyv1.PolicyRule{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "lock-down", List: "ingress", Log: "seen",
		Labels: []string{"k8s:io.cilium.k8s.policy.name=lock-down"}}
	return []*policyv1.Resource{
		{Resource: &policyv1.Resource_Selector{Selector: &policyv1.Selector{Key: "app=test", Members: []string{"300"}}}},
		{Resource: &policyv1.Resource_Policy{Policy: &policyv1.Policy{Key: "p1", Direction: policyv1.Direction_DIRECTION_INGRESS, Selectors: []string{"app=test"},
			Rules: []*policyv1.PolicyRule{rule},
			Classes: []*policyv1.PolicyClass{{}, {Selectors: []uint32{0}, Ranges: []*policyv1.PolicyRange{
				{Protocol: 6, First: 8080, Last: 8080, Verdict: policyv1.Verdict_VERDICT_ALLOW, Rules: []uint32{0}},
				{Protocol: 6, First: 8081, Last: 8081, Verdict: policyv1.Verdict_VERDICT_DENY, Rules: []uint32{0}}}}}}}},
		{Resource: &policyv1.Resource_Subject{Subject: &policyv1.Subject{Key: "uid-b", Ingress: "p1"}}},
	}
}

// listen serves TCP ports in a pod until the test ends.
func (c *cluster) listen(pod string, ports ...string) {
	c.t.Helper()
	err := c.pods[pod].Do(func() error {
		for _, port := range ports {
			ln, err := net.Listen("tcp", net.JoinHostPort(c.address[pod], port))
			if err != nil {
				return err
			}
			c.t.Cleanup(func() { ln.Close() })
		}
		return nil
	})
	if err != nil {
		c.t.Fatal(err)
	}
}

// connects says whether a TCP connection to a pod's port comes about. A pod that drops the first SYN is told apart from one that answers late by the
// retransmissions in between.
func (c *cluster) connects(from, to, port string) bool {
	c.t.Helper()
	var open bool
	err := c.pods[from].Do(func() error {
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(c.address[to], port), 2500*time.Millisecond)
		if err == nil {
			open = true
			return conn.Close()
		}
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			return nil
		}
		return err
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return open
}

// A policy comes over the wire, is in the kernel when it is acknowledged, decides, and is named by the flows. A new agent changes nothing of that.
func TestPolicyFromWireToFlow(t *testing.T) {
	testns.Do(t, func() {
		c := newCluster(t)
		c.start()
		c.plug("a")
		c.plug("b")
		c.listen("b", "8080", "8081", "8082")
		if !c.connects("a", "b", "8082") {
			t.Error("without a policy port 8082 is closed")
		}
		c.central.push(t, lockDown()...)
		check := func(when string) {
			t.Helper()
			for port, want := range map[string]bool{"8080": true, "8081": false, "8082": false} {
				if c.connects("a", "b", port) != want {
					t.Errorf("%s: port %s: want open = %v", when, port, want)
				}
			}
		}
		check("policy")
		want := map[string]bool{}
		c.central.until(t, "flows that name the policy", func(a account) bool {
			for _, f := range a.decided {
				want[describe(f)] = true
			}
			return want["verdict 8080 FORWARDED L3-L4 lock-down"] && want["verdict 8081 DROPPED L3-L4 lock-down"] && want["verdict 8082 DROPPED none"] &&
				want["drop 8081 POLICY_DENY lock-down"] && want["drop 8082 POLICY_DENIED"]
		})
		c.kill()
		check("no agent")
		c.start()
		check("a new agent")
		c.kill()
	})
}

// describe says what a flow tells of a policy.
func describe(f *flowpb.Flow) string {
	matches := []string{"none", "L3-Only", "L3-L4", "L4-Only", "all", "L3-Proto", "Proto-Only"}
	port := f.GetL4().GetTCP().GetDestinationPort()
	words := []string{"drop", fmt.Sprint(port), f.DropReasonDesc.String()}
	if f.EventType.Type == 5 {
		words = []string{"verdict", fmt.Sprint(port), f.Verdict.String(), matches[f.PolicyMatchType]}
	}
	for _, p := range slices.Concat(f.IngressAllowedBy, f.IngressDeniedBy) {
		words = append(words, p.Name)
	}
	return strings.Join(words, " ")
}

// After a cleanup nothing of the agent is left and pods still reach each other; a new agent takes them over, and its policy holds again.
func TestCleanupLeavesPlainRouting(t *testing.T) {
	testns.Do(t, func() {
		c := newCluster(t)
		c.start()
		c.plug("a")
		c.plug("b")
		c.listen("b", "8080", "8082")
		c.central.push(t, lockDown()...)
		if c.connects("a", "b", "8082") {
			t.Error("the policy does not hold")
		}
		config := agent.DefaultConfig()
		set := pflag.NewFlagSet("agent", pflag.ContinueOnError)
		config.Add(set)
		if err := set.Parse(c.args); err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		if err := agent.Cleanup(config, &out); err == nil || !strings.Contains(err.Error(), "stop it first") {
			t.Errorf("cleanup beside a running agent: %v", err)
		}
		c.kill()
		for range 2 {
			if err := agent.Cleanup(config, &out); err != nil {
				t.Errorf("cleanup: %v\n%s", err, out.String())
			}
			if !c.connects("a", "b", "8082") {
				t.Errorf("pods do not reach each other after a cleanup:\n%s", out.String())
			}
		}
		if pins, err := os.ReadDir(config.BPFFS); err == nil && len(pins) > 0 {
			t.Errorf("left in %s: %v", config.BPFFS, pins)
		}
		if links, err := netdev.LinksWithPrefix("weir_"); err != nil || len(links) > 0 {
			t.Errorf("left: %v, %v", links, err)
		}
		rules, err := netlink.RuleList(netlink.FAMILY_ALL)
		if err != nil || slices.ContainsFunc(rules, func(r netlink.Rule) bool { return r.Table == 200 || r.Table == 201 }) {
			t.Errorf("rules of the proxy are left: %v, %v", rules, err)
		}
		for _, want := range []string{"route to pod default/a (" + c.address["a"] + ")", "detach all programs", "done:"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("the steps do not say %q:\n%s", want, out.String())
			}
		}
		c.start()
		if c.connects("a", "b", "8082") || !c.connects("a", "b", "8080") {
			t.Error("the policy does not hold with a new agent")
		}
		c.kill()
	})
}

// What the command line asks of policy, and the exit from a wrong one.
func TestPolicyOfARunningAgent(t *testing.T) {
	testns.Do(t, func() {
		c := newCluster(t)
		c.start()
		c.plug("a")
		c.plug("b")
		c.listen("b", "8082")
		c.central.push(t, lockDown()...)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		conn := c.dial()
		defer conn.Close()
		client := agentv1.NewAgentServiceClient(conn)
		ask := func(endpoint, peer string, port uint32) string {
			r, err := client.LookupPolicy(ctx, &agentv1.LookupPolicyRequest{Endpoint: endpoint, Direction: policyv1.Direction_DIRECTION_INGRESS, Peer: peer, Protocol: 6, Port: port})
			if err != nil {
				return status.Code(err).String()
			}
			words := []string{r.Verdict.String(), r.PolicyKey}
			for _, rule := range r.Rules {
				words = append(words, rule.Name)
			}
			return strings.Join(words, " ")
		}
		for _, tt := range []struct {
			endpoint, peer string
			port           uint32
			want           string
		}{
			{"default/b", "300", 8080, "VERDICT_ALLOW p1 lock-down"}, {"uid-b", c.address["a"], 8081, "VERDICT_DENY p1 lock-down"}, {"default/b", "192.0.2.1", 8080, "VERDICT_DEFAULT_DENY p1"},
			{"default/a", "300", 1, "VERDICT_ALLOW "}, {"host", "300", 1, "VERDICT_ALLOW "}, {"default/c", "300", 1, "NotFound"}, {"default/b", "node:x", 1, "NotFound"},
			{"default/b", "300", 65536, "InvalidArgument"},
		} {
			if got := ask(tt.endpoint, tt.peer, tt.port); got != tt.want {
				t.Errorf("%s from %s to %d: %s, want %s", tt.endpoint, tt.peer, tt.port, got, tt.want)
			}
		}
		dump, err := client.DumpPolicy(ctx, &agentv1.DumpPolicyRequest{Endpoint: "default/b"})
		rows := map[string]bool{}
		for _, r := range drain(t, dump, err) {
			rows[fmt.Sprintf("%s %d %d-%d %s %d", r.PeerKey, r.Protocol, r.First, r.Last, r.Verdict, len(r.Rules))] = true
		}
		for _, want := range []string{" 0 0-65535 VERDICT_DEFAULT_DENY 0", "300 6 8080-8080 VERDICT_ALLOW 1", "300 6 8081-8081 VERDICT_DENY 1"} {
			if !rows[want] {
				t.Errorf("dump has no %q: %v", want, rows)
			}
		}

		if _, err := client.PausePolicy(ctx, &agentv1.PausePolicyRequest{Pod: "default/b"}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("a pause without an end: %v", err)
		}
		if _, err := client.PausePolicy(ctx, &agentv1.PausePolicyRequest{Pod: "default/b", Seconds: 600, Reason: "wrong policy"}); err != nil {
			t.Fatal(err)
		}
		if !c.connects("a", "b", "8082") {
			t.Error("a paused policy drops")
		}
		c.central.until(t, "an audited verdict and the pause's event", func(a account) bool {
			return a.notices["policy-paused"] == 1 && slices.ContainsFunc(a.decided, func(f *flowpb.Flow) bool { return f.Verdict == flowpb.Verdict_AUDIT })
		})
		c.kill()
		c.start()
		if !c.connects("a", "b", "8082") {
			t.Error("a new agent has forgotten the pause")
		}
		list, err := client.ListEndpoints(ctx, &agentv1.ListEndpointsRequest{}, grpc.WaitForReady(true))
		if err != nil || !slices.ContainsFunc(list.Endpoints, func(e *agentv1.LocalEndpoint) bool {
			return e.PodName == "b" && e.IngressEnforced && e.Audit && e.PausedUntil != nil
		}) {
			t.Errorf("endpoints %v, %v", list, err)
		}
		st, err := statusv1.NewStatusServiceClient(conn).GetStatus(ctx, &statusv1.GetStatusRequest{})
		if err != nil || !slices.ContainsFunc(st.Details, func(d *statusv1.Detail) bool {
			return d.Name == "policy paused" && strings.Contains(d.Value, "default/b")
		}) {
			t.Errorf("status %v, %v", st, err)
		}
		if r, err := client.ResumePolicy(ctx, &agentv1.ResumePolicyRequest{Pod: "default/b"}); err != nil || !r.Resumed {
			t.Errorf("resume: %v, %v", r, err)
		}
		if c.connects("a", "b", "8082") {
			t.Error("a resumed policy does not drop")
		}
		c.kill()
	})
}
