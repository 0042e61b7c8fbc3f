// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

func policyDoc(generation int, spec string) string {
	return fmt.Sprintf(`kind: CiliumNetworkPolicy
apiVersion: cilium.io/v2
metadata: {name: api, namespace: default, uid: p1, generation: %d}
spec: %s
`, generation, spec)
}

const (
	fromWeb = "{endpointSelector: {matchLabels: {app: api}}, ingress: [{fromEndpoints: [{matchLabels: {app: web}}], toPorts: [{ports: [{port: \"80\", protocol: TCP}]}]}]}"
	broken  = "{endpointSelector: {matchLabels: {app: api}}, ingress: [{fromEntities: [nobody]}]}"
)

func (c *cluster) query() policyv1.PolicyQueryServiceClient {
	c.t.Helper()
	conn, err := grpc.NewClient("unix://"+c.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	return policyv1.NewPolicyQueryServiceClient(conn)
}

// two returns a cluster of two nodes with api on n1 and web on n2, both registered, and its agents.
func two(t *testing.T, docs ...string) (*cluster, *agent, *agent) {
	t.Helper()
	c := newCluster(t, append([]string{nodeDoc(1), nodeDoc(2), podDoc("api", "n1", "api"), podDoc("web", "n2", "web"), podDoc("db", "n2", "db")}, docs...)...)
	c.start()
	one, two := c.connect("n1", endpoint("api", "n1", "10.244.1.5")), c.connect("n2", endpoint("web", "n2", "10.244.2.5"), endpoint("db", "n2", "10.244.2.6"))
	one.until("first state", func() bool { return one.synced && one.has("subject api") })
	two.until("first state", func() bool { return two.synced && two.has("subject web") })
	return c, one, two
}

func TestPolicyReachesItsNode(t *testing.T) {
	c, one, two := two(t)
	c.source.send(added, policyDoc(1, fromWeb))
	one.until("the policy", func() bool { return one.state["subject api"].GetSubject().GetIngress() != "" })
	key := one.state["subject api"].GetSubject().GetIngress()
	p := one.state["policy "+key].GetPolicy()
	if p == nil || p.GetDirection() != policyv1.Direction_DIRECTION_INGRESS || len(p.GetClasses()) < 2 {
		t.Fatalf("policy is %v", p)
	}
	for _, s := range p.GetSelectors() {
		if !one.has("selector " + s) {
			t.Errorf("selector %q is missing", s)
		}
	}
	if rule := p.GetRules()[0]; rule.GetName() != "api" || rule.GetKind() != "CiliumNetworkPolicy" || rule.GetList() != "ingress" {
		t.Errorf("rule is %v", rule)
	}
	c.source.send(added, podDoc("marker", "n2", "marker"))
	two.until("the marker", func() bool { return two.has("pod marker") })
	for _, k := range two.keys() {
		if strings.HasPrefix(k, "policy ") || strings.HasPrefix(k, "selector ") {
			t.Errorf("n2 has no subject of the policy and was told %s", k)
		}
	}
}

func TestStatusOfPolicies(t *testing.T) {
	c, one, two := two(t)
	two.until("all endpoints", func() bool { return two.has("endpoint api") && two.has("endpoint web") && two.has("endpoint db") })
	two.noAck = true
	c.source.send(added, policyDoc(7, fromWeb))
	one.until("the policy", func() bool { return one.state["subject api"].GetSubject().GetIngress() != "" })
	// n2 has nothing of it to hold, and counts.
	c.status("CiliumNetworkPolicy default/api", "generation 7 in force on 2/2 nodes")
	c.status("CiliumNetworkPolicy default/api", `"status":"True","observedGeneration":7`)

	// What is not valid has no effect, and says why.
	c.source.send(modified, policyDoc(8, broken))
	c.status("CiliumNetworkPolicy default/api", "unsupported entity: nobody")
	c.status("CiliumNetworkPolicy default/api", "generation 7 in force on 2/2 nodes")
	list, err := c.query().ListPolicies(context.Background(), &policyv1.ListPoliciesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if p := list.GetPolicies()[0]; p.GetValid() || p.GetGeneration() != 8 || p.GetEnforcedGeneration() != 7 || p.GetEnforcingNodes() != 2 || p.GetEndpoints() != 1 {
		t.Errorf("policy is %v", p)
	}

	// A node that does not acknowledge is named, and so is what an agent refuses.
	one.noAck = true
	c.source.send(modified, policyDoc(9, strings.Replace(fromWeb, "80", "81", 1)))
	c.status("CiliumNetworkPolicy default/api", "generation 9 in force on 1/2 nodes; n1: holds revision")
	one.until("the change", func() bool {
		return one.state["policy "+one.state["subject api"].GetSubject().GetIngress()].GetPolicy().GetClasses()[1].GetRanges()[0].GetFirst() == 81
	})
	one.ack(one.last)
	c.status("CiliumNetworkPolicy default/api", "generation 9 in force on 2/2 nodes")
	refusal := &policyv1.Refusal{
		Revision: one.last, Error: "policy_peers is full",
		Resource: &policyv1.ResourceKey{Kind: policyv1.ResourceKind_RESOURCE_KIND_POLICY, Key: one.state["subject api"].GetSubject().GetIngress()},
	}
	one.send(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Refusal{Refusal: refusal}})
	c.status("CiliumNetworkPolicy default/api", "n1: policy_peers is full")
	refusal.Error = ""
	one.send(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Refusal{Refusal: refusal}})
	c.status("CiliumNetworkPolicy default/api", "generation 9 in force on 2/2 nodes")
}

func TestExplain(t *testing.T) {
	c, one, _ := two(t, policyDoc(1, fromWeb))
	one.until("the policy", func() bool {
		return one.state["subject api"].GetSubject().GetIngress() != "" && one.has("endpoint web") && one.has("endpoint db")
	})
	q := c.query()
	tests := []struct {
		source, destination string
		port                uint32
		want                policyv1.Verdict
		code                codes.Code
	}{
		{"default/web", "default/api", 80, policyv1.Verdict_VERDICT_ALLOW, 0},
		{"default/web", "default/api", 81, policyv1.Verdict_VERDICT_DEFAULT_DENY, 0},
		{"default/db", "10.244.1.5", 80, policyv1.Verdict_VERDICT_DEFAULT_DENY, 0},
		{"default/api", "default/db", 80, policyv1.Verdict_VERDICT_ALLOW, 0},
		{"192.0.2.1", "default/api", 80, policyv1.Verdict_VERDICT_DEFAULT_DENY, 0},
		{"node:n1", "default/api", 80, policyv1.Verdict_VERDICT_ALLOW, 0},
		{"node:n2", "default/api", 80, policyv1.Verdict_VERDICT_DEFAULT_DENY, 0},
		{"default/none", "default/api", 80, 0, codes.NotFound},
		{"nonsense", "default/api", 80, 0, codes.InvalidArgument},
		{"default/web", "svc:default/none", 80, 0, codes.NotFound},
		{"default/web", "default/api", 70000, 0, codes.InvalidArgument},
	}
	for _, tt := range tests {
		r, err := q.ExplainConnection(context.Background(), &policyv1.ExplainConnectionRequest{Source: tt.source, Destination: tt.destination, Port: tt.port})
		if grpcstatus.Code(err) != tt.code || r.GetVerdict() != tt.want {
			t.Errorf("%s -> %s %d: %v, %v, want %v, %v", tt.source, tt.destination, tt.port, r, err, tt.want, tt.code)
		}
	}
	r, err := q.ExplainConnection(context.Background(), &policyv1.ExplainConnectionRequest{Source: "default/db", Destination: "default/api", Port: 80})
	if err != nil {
		t.Fatal(err)
	}
	side := r.GetSides()[len(r.GetSides())-1]
	if !side.GetEnforced() || len(side.GetEnforcedBy()) != 1 || !strings.Contains(side.GetEnforcedBy()[0], "default/api") || side.GetPeerKey() == "" ||
		len(side.GetRules()) == 0 || side.GetRules()[0].GetRule().GetName() != "api" || side.GetRules()[0].GetPeerMatches() || !side.GetRules()[0].GetPortMatches() {
		t.Errorf("side is %v", side)
	}

	e, err := q.GetEffectivePolicy(context.Background(), &policyv1.GetEffectivePolicyRequest{Endpoint: "default/api"})
	if err != nil {
		t.Fatal(err)
	}
	in, out := e.GetDirections()[0], e.GetDirections()[1]
	if !in.GetEnforced() || out.GetEnforced() {
		t.Errorf("effective policy is %v", e)
	}
	found := false
	for _, row := range in.GetRows() {
		if row.GetPeers() == "app=web in default" && row.GetPorts() == "80/TCP" && row.GetVerdict() == policyv1.Verdict_VERDICT_ALLOW &&
			strings.Join(row.GetEndpoints(), " ") == "default/web" {
			found = true
		}
	}
	if !found {
		t.Errorf("no row for web: %v", in.GetRows())
	}
}

func TestValidatePolicies(t *testing.T) {
	c, one, _ := two(t)
	one.until("all endpoints", func() bool { return one.has("endpoint web") && one.has("endpoint db") })
	r, err := c.query().ValidatePolicies(context.Background(), &policyv1.ValidatePoliciesRequest{
		Documents: []byte("# nothing\n---\n" + policyDoc(1, fromWeb) + "---\n" + policyDoc(1, broken) + "---\nkind: Pod\n"),
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.GetDocuments()) != 3 {
		t.Fatalf("documents: %v", r.GetDocuments())
	}
	good, bad, other := r.GetDocuments()[0], r.GetDocuments()[1], r.GetDocuments()[2]
	all := strings.Join(good.GetChanges(), "\n")
	for _, want := range []string{
		"default/api: ingress becomes default deny", "default/db -> default/api, all ports: allowed now, would be denied by ingress",
		"the world outside -> default/api, all ports: allowed now, would be denied by ingress",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("%q is not among the changes:\n%s", want, all)
		}
	}
	if good.GetError() != "" || good.GetName() != "api" {
		t.Errorf("the good one is %v", good)
	}
	if !strings.Contains(bad.GetError(), "unsupported entity: nobody") || bad.GetField() != "spec.ingress[0].fromEntities[0]" {
		t.Errorf("the bad one is %v", bad)
	}
	if other.GetError() == "" {
		t.Error("a pod is a policy")
	}
	// Nothing changed.
	if list, err := c.query().ListPolicies(context.Background(), &policyv1.ListPoliciesRequest{}); err != nil || len(list.GetPolicies()) != 0 {
		t.Errorf("policies: %v, %v", list, err)
	}
}
