// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

func TestPolicyList(t *testing.T) {
	m := newMesh(t)
	m.policy.lists = [][]*policyv1.PolicyObject{{
		object(named("CiliumClusterwideNetworkPolicy", "", "everyone"), lagging),
		object(invalid),
		object(named("NetworkPolicy", "shop", "new"), func(p *policyv1.PolicyObject) {
			p.Valid, p.EnforcedGeneration, p.EnforcingNodes, p.NotYet, p.Error, p.Object = false, 0, 0, "spec.x", "not yet", []byte("{")
		}),
		object(named("NetworkPolicy", "shop", "old\x1b"), func(p *policyv1.PolicyObject) { p.Conflicts = []string{"shop/a: two listeners"} }),
	}}
	want := `NAMESPACE   NAME       KIND                             GENERATION   VALID     IN FORCE                              ENDPOINTS   AGE
-           everyone   CiliumClusterwideNetworkPolicy   12           yes       generation 12 in force on 1/2 nodes   1           30m
default     api        CiliumNetworkPolicy              13           no        generation 12 in force on 2/2 nodes   1           30m
shop        new        NetworkPolicy                    12           not yet   in force on no node                   1           -
shop        old^[      NetworkPolicy                    12           yes       generation 12 in force on 2/2 nodes   1           30m

CiliumClusterwideNetworkPolicy everyone: generation 12 is not in force yet on n2 (holds revision 4)
CiliumNetworkPolicy default/api: not valid: spec.ingress[0].fromEntities[0]: unsupported entity: nobody; generation 12 stays in force
NetworkPolicy shop/new: refused whole: Weir does not enforce spec.x yet; nothing of it is in force
NetworkPolicy shop/old^[: conflict: shop/a: two listeners
`
	if out := m.must(t, "policy", "list"); out != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
	if out := m.must(t, "policy", "list", "-o", "wide"); !strings.Contains(out, "30m   n2        0           u1\n") || !strings.Contains(out, "LAGGING   CONFLICTS   UID\n") {
		t.Errorf("wide\n%s", out)
	}
	var list []struct {
		Name  string
		Valid *bool
	}
	if err := json.Unmarshal([]byte(m.must(t, "policy", "list", "-n", "shop", "--kind", "NetworkPolicy", "-o", "json")), &list); err != nil || len(list) != 2 ||
		list[0].Name != "new" || list[0].Valid == nil || *list[0].Valid {
		t.Errorf("json: %+v, %v", list, err)
	}
	if m.policy.listed.GetNamespace() != "shop" || m.policy.listed.GetKind() != "NetworkPolicy" {
		t.Errorf("asked for %v", m.policy.listed)
	}
	m.policy.lists = nil
	if out, errOut, code := m.run(t, "policy", "list"); out != "" || errOut != "there are no policies: everything passes\n" || code != 0 {
		t.Errorf("none: %d, %q, %q", code, out, errOut)
	}
	if out := m.must(t, "policy", "list", "-o", "json"); out != "[]\n" {
		t.Errorf("none: %q", out)
	}
	m.fails(t, "unknown output format: yaml, expected table, wide, json", "policy", "list", "-o", "yaml")
	m.policy.err = status.Error(codes.Internal, "broken")
	m.fails(t, "policy: broken", "policy", "list")
}

// Another replica answers where the first one is away.
func TestPolicyReplicas(t *testing.T) {
	m := newMesh(t)
	m.policy.lists = [][]*policyv1.PolicyObject{{object()}}
	dir := filepath.Join(m.env["WEIR_RUN_DIR"], "l")
	if err := os.Rename(filepath.Join(dir, "policy.sock"), filepath.Join(dir, "policy-2.sock")); err != nil {
		t.Fatal(err)
	}
	if out := m.must(t, "policy", "list"); !strings.Contains(out, "default     api ") {
		t.Errorf("%s", out)
	}
	if err := os.Remove(filepath.Join(dir, "policy-2.sock")); err != nil {
		t.Fatal(err)
	}
	m.fails(t, "policy does not run: "+dir+"/policy.sock is missing", "policy", "list")
}

func TestPolicyGet(t *testing.T) {
	m := newMesh(t)
	m.policy.lists = [][]*policyv1.PolicyObject{{
		object(), object(named("NetworkPolicy", "default", "api"), invalid, lagging, func(p *policyv1.PolicyObject) { p.Conflicts = []string{"default/a: x"} }),
		object(named("CiliumClusterwideNetworkPolicy", "", "everyone"), func(p *policyv1.PolicyObject) { p.Endpoints = 0 }),
	}}
	yaml := `apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: api
  creationTimestamp: "2024-05-06T06:40:00Z"
spec:
  ingress:
    - {}
`
	for args, want := range map[string]string{
		"default/api --kind CiliumNetworkPolicy": `Policy:      CiliumNetworkPolicy default/api
Generation:  12, made 30m ago
Valid:       yes
In force:    generation 12 in force on 2/2 nodes
Selects:     1 endpoint
Conflicts:   none

` + yaml,
		"everyone": `Policy:      CiliumClusterwideNetworkPolicy everyone
Generation:  12, made 30m ago
Valid:       yes
In force:    generation 12 in force on 2/2 nodes
Selects:     no endpoint: nothing is enforced by it
Conflicts:   none

` + yaml,
		"everyone -o yaml": yaml,
		"everyone -o json": `{
  "apiVersion": "cilium.io/v2",
  "kind": "CiliumNetworkPolicy",
  "metadata": {
    "name": "api",
    "creationTimestamp": "2024-05-06T06:40:00Z"
  },
  "spec": {
    "ingress": [
      {}
    ]
  }
}
`,
	} {
		if out := m.must(t, append([]string{"policy", "get"}, strings.Fields(args)...)...); out != want {
			t.Errorf("%s: got\n%swant\n%s", args, out, want)
		}
	}
	out := m.must(t, "policy", "get", "default/api", "--kind", "NetworkPolicy")
	for _, line := range []string{
		"Valid:       NO: not valid: CiliumNetworkPolicy default/api: spec.ingress[0].fromEntities[0]: unsupported entity: nobody; generation 12 stays in force\n",
		"Lagging:     node n2: holds revision 4\n", "Conflict:    default/a: x; it keeps the policy that it had\n",
	} {
		if !strings.Contains(out, line) {
			t.Errorf("no %q in\n%s", line, out)
		}
	}
	m.fails(t, "several policies are called api: CiliumNetworkPolicy default/api, NetworkPolicy default/api; name one by NAMESPACE/NAME and --kind", "policy", "get", "api")
	m.fails(t, "there is no policy default/none", "policy", "get", "default/none")
	m.fails(t, `expected NAMESPACE/NAME or NAME, got "a/b/c"`, "policy", "get", "a/b/c")
	m.fails(t, "weir policy get takes one argument, a policy, got 0: see `weir policy get --help`", "policy", "get")
}

func TestPolicyValidate(t *testing.T) {
	m := newMesh(t)
	file := filepath.Join(t.TempDir(), "p.yaml")
	if err := os.WriteFile(file, []byte("kind: x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	good := &policyv1.Validated{Kind: "NetworkPolicy", Namespace: "default", Name: "good", Changes: []string{"a -> b, all ports: allowed now, would be denied by ingress", "b: ingress becomes default deny"}}
	m.policy.documents = []*policyv1.Validated{good}
	want := file + `, document 1: NetworkPolicy default/good: valid
  b: ingress becomes default deny
  a -> b, all ports: allowed now, would be denied by ingress
`
	if out := m.must(t, "policy", "validate", file); out != want || string(m.policy.validated.GetDocuments()) != "kind: x\n" || m.policy.validated.GetFile() != file {
		t.Errorf("got\n%swant\n%s, asked %v", out, want, m.policy.validated)
	}

	m.policy.documents = []*policyv1.Validated{
		good,
		{Kind: "NetworkPolicy", Name: "bad", Error: "NetworkPolicy bad: spec.egress[0]: port must be \x1bspecified", Field: "spec.egress[0]"},
		{Error: "line 3: not a mapping"},
		{Kind: "NetworkPolicy", Name: "l7", Error: "NetworkPolicy l7: spec.x: later", Field: "spec.x", NotYet: "spec.x"},
	}
	m.in = strings.NewReader("---\nfrom stdin")
	out, errOut, code := m.run(t, "policy", "validate", "-")
	want = `standard input, document 2: NetworkPolicy bad: NOT VALID
  field spec.egress[0]: port must be ^[specified
standard input, document 3: (no policy): NOT VALID
  line 3: not a mapping
standard input, document 4: NetworkPolicy l7: NOT YET
  field spec.x: it is valid, but Weir does not enforce it yet, and refuses the policy whole
`
	if code != 1 || !strings.HasSuffix(out, want) || errOut != "standard input: of 4 documents 2 not valid and 1 not enforceable yet\n" {
		t.Errorf("%d %s\n%s", code, errOut, out)
	}
	if got := string(m.policy.validated.GetDocuments()); got != "---\nfrom stdin" {
		t.Errorf("sent %q", got)
	}
	m.in = strings.NewReader("x")
	if out, _, code = m.run(t, "policy", "validate", "-", "-o", "json"); code != 1 || !strings.Contains(out, `"not_yet": "spec.x"`) {
		t.Errorf("json: %d %s", code, out)
	}
	m.policy.documents = nil
	m.fails(t, file+": there is no document in it", "policy", "validate", file)
	m.fails(t, "open "+file+"x: no such file or directory", "policy", "validate", file+"x")
}

func TestPolicyEffective(t *testing.T) {
	m := newMesh(t)
	m.policy.effective = map[string]*policyv1.GetEffectivePolicyResponse{"default/api-6974d65d7d-s6mpb": {Directions: []*policyv1.EffectiveDirection{
		{Direction: ingress, Enforced: true, EnforcedBy: []string{"CiliumNetworkPolicy default/api"}, Rows: []*policyv1.EffectiveRow{
			{Peers: "any other peer", Ports: "all ports", Verdict: defaultDeny},
			{Peers: "app=web in default", Ports: "80/TCP", Verdict: allow, Endpoints: []string{"default/a", "default/b", "default/c", "default/d", "default/e"}, Rules: []*policyv1.PolicyRule{rule("ingress", 0)}},
			{Peers: "app=web in default", Ports: "all other ports", Verdict: defaultDeny},
			{Peers: "CIDR 10.0.0.0/8", Ports: "all ports", Verdict: deny, Rules: []*policyv1.PolicyRule{rule("ingressDeny", 1)}},
			{Peers: "entity host", Ports: "all ports", Verdict: allow, Rules: []*policyv1.PolicyRule{{Implicit: "allow-localhost"}}},
		}},
		{Direction: egress},
	}}}
	want := `Who may reach default/api-6974d65d7d-s6mpb (ingress): default deny, by CiliumNetworkPolicy default/api
  VERDICT        PEERS                PORTS       NOW                                                   BY
  allow          app=web in default   80/TCP      default/a, default/b, default/c, default/d and 1 more   CiliumNetworkPolicy default/api ingress[0]
  allow          entity host          all ports   -                                                     allow-localhost
  deny           CIDR 10.0.0.0/8      all ports   -                                                     CiliumNetworkPolicy default/api ingressDeny[1]
  default deny   any other peer       all ports   -                                                     -

What default/api-6974d65d7d-s6mpb may reach (egress): everything; no policy selects it in this direction
`
	// A Deployment's name does, too.
	if out := m.must(t, "policy", "effective", "api"); strings.Join(strings.Fields(out), " ") != strings.Join(strings.Fields(want), " ") {
		t.Errorf("got\n%swant\n%s", out, want)
	}
	if out := m.must(t, "policy", "effective", "default/api-6974d65d7d-s6mpb", "-o", "json"); !strings.Contains(out, `"peers": "CIDR 10.0.0.0/8"`) {
		t.Errorf("%s", out)
	}
	m.fails(t, "endpoint: there is no pod default/none", "policy", "effective", "none")
	m.n1.pods = append(m.n1.pods, pod("default", "api-6974d65d7d-zzzzz", "10.0.1.9", 8))
	m.fails(t, "endpoint: there is no pod default/api", "policy", "effective", "api")
}

func TestPolicyWait(t *testing.T) {
	m := newMesh(t)
	m.policy.lists = [][]*policyv1.PolicyObject{{}, {object(lagging)}, {object(func(p *policyv1.PolicyObject) { p.EnforcedGeneration = 11 })}, {object()}}
	if out := m.must(t, "policy", "wait", "default/api"); out != "CiliumNetworkPolicy default/api: generation 12 in force on 2/2 nodes, after 0s\n" || len(m.policy.lists) != 1 {
		t.Errorf("%s, %d answers left", out, len(m.policy.lists))
	}
	// What the lab has and the policy service has not seen yet is waited for.
	m.lab.object = `{"metadata":{"generation":13}}`
	m.fails(t, "CiliumNetworkPolicy default/api: after 1ms: generation 12 in force on 2/2 nodes; the policy service has not seen generation 13 yet, only 12",
		"policy", "wait", "default/api", "--timeout", "1ms")
	m.lab.object = `{"metadata":{"generation":12}}`
	m.must(t, "policy", "wait", "default/api", "--timeout", "1ms")
	m.fails(t, "CiliumNetworkPolicy default/api: after 1ms: generation 12 in force on 2/2 nodes; the policy service has not seen generation 14 yet, only 12",
		"policy", "wait", "api", "--timeout", "1ms", "--generation", "14")

	m.policy.lists = [][]*policyv1.PolicyObject{{object(lagging)}}
	m.fails(t, "CiliumNetworkPolicy default/api: after 1ms: generation 12 in force on 1/2 nodes; lagging: n2 (holds revision 4)", "policy", "wait", "api", "--timeout", "1ms")
	// The variable of the global flag means the time to connect.
	m.env["WEIR_TIMEOUT"] = "1h"
	m.fails(t, "after 1ms there is no policy none", "policy", "wait", "none", "--timeout", "1ms")
	// An old generation that is not valid is no answer yet; the newest is.
	m.policy.lists = [][]*policyv1.PolicyObject{{object(invalid)}}
	m.fails(t, "CiliumNetworkPolicy default/api: not valid: spec.ingress[0].fromEntities[0]: unsupported entity: nobody; generation 12 stays in force", "policy", "wait", "api")
}

func TestPolicyPause(t *testing.T) {
	m := newMesh(t)
	want := "Policy of pod default/api-6974d65d7d-s6mpb on n2 is paused until 07:15:00 UTC: what it would drop passes, and is told as AUDIT.\n" +
		"End it before with `weir policy resume default/api-6974d65d7d-s6mpb`.\n"
	if out := m.must(t, "policy", "pause", "api", "--for", "5m", "--reason", "INC-1"); out != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
	if p := m.n2.paused[0]; p.GetPod() != "default/api-6974d65d7d-s6mpb" || p.GetSeconds() != 300 || p.GetReason() != "INC-1" || len(m.n1.paused) != 0 {
		t.Errorf("asked for %v", p)
	}
	for _, node := range []string{"node/n1", "node:n1"} {
		want = "Policy of node n1 is paused until 07:10:01 UTC: what it would drop passes, and is told as AUDIT.\nEnd it before with `weir policy resume node/n1`.\n"
		if out := m.must(t, "policy", "pause", node, "--for", "1s"); out != want || m.n1.paused[0].GetPod() != "" {
			t.Errorf("got\n%swant\n%s", out, want)
		}
	}
	if out := m.must(t, "policy", "resume", "node/n1"); out != "Policy of node n1 is in force again.\n" {
		t.Error(out)
	}
	if out := m.must(t, "policy", "resume", "web"); out != "Policy of pod default/web on n1 was not paused.\n" || strings.Join(m.n1.resumed, ",") != ",default/web" {
		t.Errorf("%s %q", out, m.n1.resumed)
	}
	m.fails(t, "--for 0s: a pause takes 1s to 24h0m0s", "policy", "pause", "web")
	m.fails(t, "--for 25h0m0s: a pause takes 1s to 24h0m0s", "policy", "pause", "web", "--for", "25h")
	m.fails(t, "there is no pod shop/web", "policy", "pause", "shop/web", "--for", "1m")
	m.fails(t, "the agent of node n3 is not on this machine", "policy", "pause", "node/n3", "--for", "1m")
	m.n1.pods = append(m.n1.pods, pod("default", "api-6974d65d7d-zzzzz", "10.0.1.9", 8))
	m.fails(t, "default/api has several pods, name one of default/api-6974d65d7d-zzzzz, default/api-6974d65d7d-s6mpb", "policy", "pause", "api", "--for", "1m")
}

func TestBPFPolicyList(t *testing.T) {
	m := newMesh(t)
	m.n2.rows = []*agentv1.DumpPolicyResponse{
		{Policy: 2, Direction: ingress, Endpoints: []uint32{9, 65535}, Last: 65535, Verdict: defaultDeny},
		{Policy: 2, Direction: ingress, Endpoints: []uint32{9}, Peer: 1, PeerKey: "1", Protocol: 6, First: 80, Last: 80, Verdict: allow, Rule: 4, Rules: []*policyv1.PolicyRule{rule("ingress", 0)}},
		{Policy: 2, Direction: ingress, Endpoints: []uint32{9}, Peer: 1, PeerKey: "1", Protocol: 6, First: 81, Last: 81, Verdict: allow, Slot: 7, ListenerPort: 20007, Visibility: true},
		{Policy: 3, Peer: 16777217, PeerKey: "cidr:10.0.0.0/8", Protocol: 58, First: 1, Last: 4, Verdict: deny},
	}
	want := `NODE   POLICY   DIRECTION   ENDPOINTS   PEER              PROTOCOL   PORTS      VERDICT        THROUGH                           RULES
n2     2        ingress     9,host      any other         any        all        default deny   -                                 -
n2     2        ingress     9           1 (host)          TCP        80         allow          -                                 CiliumNetworkPolicy default/api ingress[0]
n2     2        ingress     9           1 (host)          TCP        81         allow          slot 7 (port 20007), to be seen   -
n2     3        -           -           cidr:10.0.0.0/8   ICMPv6     type 1-4   deny           -                                 -
`
	if out := m.must(t, "bpf", "policy", "list"); out != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
	// A pod is asked for on its node alone.
	m.n1.dumped, m.n2.dumped = nil, nil
	if out := m.must(t, "bpf", "policy", "list", "--endpoint", "default/api"); out != want || len(m.n1.dumped) != 0 || m.n2.dumped[0] != "default/api-6974d65d7d-s6mpb" {
		t.Errorf("asked %q and %q\n%s", m.n1.dumped, m.n2.dumped, out)
	}
	m.fails(t, "there is no pod default/none", "bpf", "policy", "list", "--endpoint", "default/none")
	if out := m.must(t, "bpf", "policy", "list", "--node", "n2", "-o", "json"); !strings.Contains(out, `"peer": 0`) || !strings.Contains(out, `"verdict": "VERDICT_DENY"`) {
		t.Errorf("%s", out)
	}
}
