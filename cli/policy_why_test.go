// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"strings"
	"testing"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

const apiPod = "default/api-6974d65d7d-s6mpb"

// connection is web on n1 to api on n2, allowed by a rule of api's.
func connection() *policyv1.ExplainConnectionResponse {
	return &policyv1.ExplainConnectionResponse{Verdict: allow, Sides: []*policyv1.Side{
		{
			Direction: egress, Endpoint: "default/web", Node: "n1", Identity: 300, Labels: []string{"k8s:app=web", "k8s:io.kubernetes.pod.namespace=default"},
			PeerIdentity: 301, PeerLabels: []string{"k8s:app=api"}, PeerKey: "301", Verdict: allow, Protocol: 6, Port: 80, Destination: "10.0.2.6",
		},
		{
			Direction: ingress, Endpoint: apiPod, Node: "n2", Identity: 301, Labels: []string{"k8s:app=api"}, PeerIdentity: 300, PeerLabels: []string{"k8s:app=web"},
			PeerKey: "300/http=80/TCP", Enforced: true, EnforcedBy: []string{"CiliumNetworkPolicy default/api"}, Verdict: allow, Protocol: 6, Port: 80, Destination: "10.0.2.6",
			Rules: []*policyv1.RuleStep{
				{Rule: rule("ingress", 0), PeerMatches: true, PortMatches: true, Decided: true, Reason: "it allows"},
				{Rule: rule("ingress", 1), PeerMatches: true, Reason: "the port is not among 81/TCP"},
				{Rule: &policyv1.PolicyRule{Implicit: "allow-localhost"}, PortMatches: true, Reason: "the peer is not the local node"},
			},
		},
	}}
}

// denied is the same without a rule that allows it.
func denied() *policyv1.ExplainConnectionResponse {
	return clone(connection(), func(r *policyv1.ExplainConnectionResponse) {
		r.Verdict, r.Sides[1].Verdict = defaultDeny, defaultDeny
		r.Sides[1].Rules[0].Decided, r.Sides[1].Rules[0].PortMatches = false, false
		r.Sides[1].Rules[1].Nearest = true
	})
}

// whyMesh is a mesh whose kernels have what connection says.
func whyMesh(t *testing.T, answer *policyv1.ExplainConnectionResponse) *mesh {
	m := newMesh(t)
	m.policy.explain = map[string]*policyv1.ExplainConnectionResponse{"default/web " + apiPod: answer}
	out := &agentv1.LookupPolicyResponse{EndpointId: 7, Peer: 301, Verdict: allow}
	in := &agentv1.LookupPolicyResponse{EndpointId: 9, Policy: 4, Peer: 50331649, PeerRow: true, Verdict: answer.GetSides()[1].GetVerdict(), Rule: 2}
	if in.GetVerdict() == allow {
		in.Rules = []*policyv1.PolicyRule{rule("ingress", 0)}
	}
	m.n1.entries = map[string]*agentv1.LookupPolicyResponse{"default/web egress 301": out, "default/web egress 10.0.2.6": out}
	m.n2.entries = map[string]*agentv1.LookupPolicyResponse{apiPod + " ingress 300/http=80/TCP": in, apiPod + " ingress 10.0.1.5": in}
	return m
}

func TestPolicyWhyAllowed(t *testing.T) {
	m := whyMesh(t, connection())
	want := `default/web -> default/api-6974d65d7d-s6mpb, 80/TCP: ALLOWED

1. Egress of default/web, on n1
   endpoint   identity 300: k8s:app=web (namespace default)
   peer       identity 301: k8s:app=api
   port       80/TCP at 10.0.2.6
   enforced   no: no policy selects the endpoint in this direction, so everything passes
   verdict    allow
   kernel     agrees: endpoint 7 has no policy in this direction: everything passes

2. Ingress of default/api-6974d65d7d-s6mpb, on n2
   endpoint   identity 301: k8s:app=api
   peer       identity 300 (300/http=80/TCP): k8s:app=web
   port       80/TCP at 10.0.2.6
   enforced   default deny, by CiliumNetworkPolicy default/api
   rules      won     CiliumNetworkPolicy default/api ingress[0]  peer and port match; it allows
              missed  CiliumNetworkPolicy default/api ingress[1]  the peer matches; the port is not among 81/TCP
              missed  allow-localhost                             the port matches; the peer is not the local node
   verdict    allow, by CiliumNetworkPolicy default/api ingress[0]
   kernel     agrees: endpoint 9, policy 4, the row of peer 50331649: allow by CiliumNetworkPolicy default/api ingress[0]
`
	// By the name of its Deployment, too.
	for _, name := range []string{apiPod, "api"} {
		if out := m.must(t, "policy", "why", "web", name, "80"); out != want {
			t.Errorf("got\n%swant\n%s", out, want)
		}
	}
	if r := m.policy.explained; r.GetPort() != 80 || r.GetProtocol() != "TCP" {
		t.Errorf("asked for %v", r)
	}
	m.fails(t, "destination: there is no pod default/none", "policy", "why", "web", "none", "80")
	m.fails(t, "source: there is no pod shop/web", "policy", "why", "shop/web", "none", "80")
}

func TestPolicyWhyDenied(t *testing.T) {
	m := whyMesh(t, denied())
	out, errOut, code := m.run(t, "policy", "why", "web", apiPod, "80")
	want := `   rules      missed   CiliumNetworkPolicy default/api ingress[0]  the peer matches; it allows
              nearest  CiliumNetworkPolicy default/api ingress[1]  the peer matches; the port is not among 81/TCP
              missed   allow-localhost                             the port matches; the peer is not the local node
   verdict    default deny: no rule allows it; CiliumNetworkPolicy default/api ingress[1] came nearest
   kernel     agrees: endpoint 9, policy 4, the row of peer 50331649: default deny
`
	if code != 2 || errOut != "" || !strings.HasSuffix(out, want) || !strings.HasPrefix(out, "default/web -> "+apiPod+", 80/TCP: DENIED\n") {
		t.Errorf("%d %s\n%s", code, errOut, out)
	}
	// A deny rule beats.
	m.policy.explain["default/web "+apiPod] = clone(connection(), func(r *policyv1.ExplainConnectionResponse) {
		r.Verdict, r.Sides[1].Verdict = deny, deny
		r.Sides[1].Rules[0].Decided = false
		r.Sides[1].Rules[2] = &policyv1.RuleStep{Rule: rule("ingressDeny", 0), Deny: true, PeerMatches: true, PortMatches: true, Decided: true, Reason: "it denies"}
	})
	entry := m.n2.entries[apiPod+" ingress 10.0.1.5"]
	entry.Verdict, entry.Rules = deny, []*policyv1.PolicyRule{rule("ingressDeny", 0)}
	out, _, code = m.run(t, "policy", "why", "web", apiPod, "80")
	for _, line := range []string{
		"rules      lost    CiliumNetworkPolicy default/api ingress[0]      peer and port match; it allows\n",
		"won     CiliumNetworkPolicy default/api ingressDeny[0]  peer and port match; it denies\n",
		"verdict    deny, by CiliumNetworkPolicy default/api ingressDeny[0]\n",
	} {
		if code != 2 || !strings.Contains(out, line) {
			t.Errorf("%d, no %q in\n%s", code, line, out)
		}
	}
}

// A kernel that has something else, or cannot be asked, makes the answer unsure, whatever the verdict is.
func TestPolicyWhyUnsure(t *testing.T) {
	entry := func(m *mesh) *agentv1.LookupPolicyResponse { return m.n2.entries[apiPod+" ingress 300/http=80/TCP"] }
	for name, tt := range map[string]struct {
		change       func(*mesh)
		line, errOut string
	}{
		"verdict": {
			func(m *mesh) { entry(m).Verdict = defaultDeny },
			"kernel     DISAGREES: its verdict is default deny, and should be allow\n              it has: endpoint 9, policy 4,",
			"not sure: the kernel of n2 DISAGREES on the ingress of " + apiPod + ": its verdict is default deny, and should be allow\n",
		},
		"rules": {
			func(m *mesh) { entry(m).Rules = []*policyv1.PolicyRule{rule("ingress", 7)} },
			"it names CiliumNetworkPolicy default/api ingress[7], and should name CiliumNetworkPolicy default/api ingress[0]\n",
			"not sure: the kernel of n2 DISAGREES on the ingress of " + apiPod + ": it names CiliumNetworkPolicy default/api ingress[7], and should name CiliumNetworkPolicy default/api ingress[0]\n",
		},
		"no rule": {
			func(m *mesh) { entry(m).Rules = nil }, "it names no rule, and should name",
			"not sure: the kernel of n2 DISAGREES on the ingress of " + apiPod + ": it names no rule, and should name CiliumNetworkPolicy default/api ingress[0]\n",
		},
		"peer of the address": {
			func(m *mesh) {
				m.n2.entries[apiPod+" ingress 10.0.1.5"] = clone(entry(m), func(e *agentv1.LookupPolicyResponse) { e.Peer = 9 })
			},
			"it takes 10.0.1.5 for peer 9, and should for 50331649 (300/http=80/TCP)\n",
			"not sure: the kernel of n2 DISAGREES on the ingress of " + apiPod + ": it takes 10.0.1.5 for peer 9, and should for 50331649 (300/http=80/TCP)\n",
		},
		"peer not known": {
			func(m *mesh) { delete(m.n2.entries, apiPod+" ingress 300/http=80/TCP") },
			"kernel     NOT ASKED: agent/n2: peer \"300/http=80/TCP\": not known\n",
			"not sure: the kernel of n2 was not asked: agent/n2: peer \"300/http=80/TCP\": not known\n",
		},
		"node elsewhere": {
			func(m *mesh) { m.policy.explain["default/web "+apiPod].Sides[1].Node = "n3" },
			"kernel     NOT ASKED: the agent of node n3 is not on this machine\n",
			"not sure: the kernel of n3 was not asked: the agent of node n3 is not on this machine\n",
		},
		"lagging": {
			func(m *mesh) {
				entry(m).Verdict = deny
				m.policy.lists = [][]*policyv1.PolicyObject{{object(), object(lagging)}}
			},
			"\nNot in force yet: CiliumNetworkPolicy default/api on n2 (holds revision 4)\n",
			"not sure: the kernel of n2 DISAGREES on the ingress of " + apiPod + ": its verdict is deny, and should be allow\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := whyMesh(t, connection())
			tt.change(m)
			out, errOut, code := m.run(t, "policy", "why", "web", apiPod, "80")
			if code != 1 || errOut != tt.errOut || !strings.Contains(out, tt.line) {
				t.Errorf("%d %s%s", code, errOut, out)
			}
		})
	}
	m := whyMesh(t, denied())
	m.stop["nodes/n1/agent"]()
	out, errOut, code := m.run(t, "policy", "why", "web", apiPod, "80")
	if code != 1 || !strings.Contains(out, "kernel     NOT ASKED: agent/n1 does not run") || !strings.HasPrefix(errOut, "not sure: the kernel of n1 was not asked") {
		t.Errorf("%d %s%s", code, errOut, out)
	}
}

// What only audit lets through passes, and says so.
func TestPolicyWhyAudit(t *testing.T) {
	m := whyMesh(t, denied())
	m.n2.entries[apiPod+" ingress 10.0.1.5"].Audit = true
	out := m.must(t, "policy", "why", "web", apiPod, "80")
	for _, line := range []string{
		": ALLOWED by audit alone: policy denies it\n", "came nearest; IT PASSES all the same, and is told as AUDIT\n", "default deny; drops are let through (audit)\n",
	} {
		if !strings.Contains(out, line) {
			t.Errorf("no %q in\n%s", line, out)
		}
	}
}

// Ends that are no pods: the node, an address, a service, the pod itself.
func TestPolicyWhyEnds(t *testing.T) {
	m := newMesh(t)
	host := clone(connection(), func(r *policyv1.ExplainConnectionResponse) {
		s := r.Sides[0]
		s.Endpoint, s.Identity, s.PeerKey, s.PeerIdentity, s.PeerLabels = "node:n1", 1, "cidr:192.0.2.0/24", 0, []string{"cidr:192.0.2.0/24"}
		s.Destination, s.Protocol, s.Port = "192.0.2.7", 1, 8
		r.Sides = r.Sides[:1]
	})
	m.policy.explain = map[string]*policyv1.ExplainConnectionResponse{
		"node:n1 192.0.2.7":           host,
		"default/web default/web":     {Verdict: allow},
		"default/web svc:default/api": connection(),
		"default/web svc:shop/api":    {Verdict: allow},
		"default/web fd00::1":         {Verdict: allow},
		"192.0.2.1 " + apiPod:         {Verdict: allow, Sides: connection().Sides[1:]},
		"192.0.2.1 192.0.2.2":         {Verdict: allow},
	}
	full := whyMesh(t, connection())
	m.n1.entries, m.n2.entries = full.n1.entries, full.n2.entries
	m.n1.entries["host egress cidr:192.0.2.0/24"] = &agentv1.LookupPolicyResponse{EndpointId: 65535, Verdict: allow, Peer: 16777217}
	m.n2.entries[apiPod+" ingress 192.0.2.1"] = m.n2.entries[apiPod+" ingress 10.0.1.5"]
	want := `node:n1 -> 192.0.2.7, ICMP type 8: ALLOWED

1. Egress of node:n1, on n1
   endpoint   identity 1: k8s:app=web (namespace default)
   peer       cidr:192.0.2.0/24: cidr:192.0.2.0/24
   port       ICMP type 8 at 192.0.2.7
   enforced   no: no policy selects the endpoint in this direction, so everything passes
   verdict    allow
   kernel     agrees: the node itself has no policy in this direction: everything passes

2. Ingress of 192.0.2.7
   no policy can select it: it is outside of the cluster, or the mesh leaves it alone
`
	if out := m.must(t, "policy", "why", "node:n1", "192.0.2.7", "icmp"); out != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
	// An echo request is of the addresses' family.
	if m.must(t, "policy", "why", "web", "fd00::1", "icmp"); m.policy.explained.GetProtocol() != "ICMPv6" || m.policy.explained.GetPort() != 128 {
		t.Errorf("asked for %v", m.policy.explained)
	}
	for args, line := range map[string]string{
		"web web 80":            "1. Egress of default/web\n   not checked: a pod that reaches itself always passes\n",
		"web svc:api 8080":      "default/web -> svc:default/api, 8080/TCP: ALLOWED\nThe service leads to its backends; this is about " + apiPod + " (10.0.2.6), 80/TCP.\n",
		"192.0.2.1 api 80":      "1. Egress of 192.0.2.1\n   no policy can select it",
		"192.0.2.1 192.0.2.2 1": "2. Ingress of 192.0.2.2\n   no policy can select it",
	} {
		if out := m.must(t, append([]string{"policy", "why"}, strings.Fields(args)...)...); !strings.Contains(out, line) {
			t.Errorf("%s: no %q in\n%s", args, line, out)
		}
	}
}

func TestPolicyWhyJSON(t *testing.T) {
	m := whyMesh(t, denied())
	m.stop["nodes/n1/agent"]()
	out, _, code := m.run(t, "policy", "why", "web", apiPod, "53/udp", "-o", "json")
	var got struct {
		Source, Destination, Protocol, Verdict string
		Port                                   int
		Passes, Sure                           bool
		Sides                                  []struct {
			Endpoint string
			Enforced *bool
			Rules    []struct {
				Nearest     bool
				PeerMatches *bool `json:"peer_matches"`
			}
			Kernel struct {
				Asked, Agrees bool
				Fault         string
				Entry         struct{ Policy int }
				Differences   []string
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != 1 {
		t.Fatalf("%v, %d\n%s", err, code, out)
	}
	if got.Source != "default/web" || got.Destination != apiPod || got.Port != 53 || got.Protocol != "UDP" || got.Verdict != "VERDICT_DEFAULT_DENY" || got.Passes || got.Sure ||
		len(got.Sides) != 2 || got.Sides[0].Kernel.Asked || got.Sides[0].Kernel.Fault == "" || got.Sides[0].Enforced == nil || !got.Sides[1].Kernel.Agrees ||
		got.Sides[1].Kernel.Entry.Policy != 4 || got.Sides[1].Kernel.Differences == nil || !got.Sides[1].Rules[1].Nearest || *got.Sides[1].Rules[2].PeerMatches {
		t.Errorf("%+v\n%s", got, out)
	}
}

// A rule that hands the decision on has neither won nor lost, and keys that Weir adds are shortened.
func TestPolicyWhyWords(t *testing.T) {
	m := whyMesh(t, clone(connection(), func(r *policyv1.ExplainConnectionResponse) {
		s := r.Sides[1]
		s.EnforcedBy = nil
		s.Rules[1] = &policyv1.RuleStep{Rule: rule("ingress", 1), PeerMatches: true, PortMatches: true, Reason: "it passes the decision to the next tier"}
		s.Rules[2] = &policyv1.RuleStep{Rule: rule("ingress", 2), Reason: "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=a is wanted, and the peer has k8s:io.cilium.k8s.namespace.labels.team=b"}
	}))
	out := m.must(t, "policy", "why", "web", apiPod, "80")
	for _, line := range []string{
		"enforced   by rules that switch no default deny on: what none of them denies passes\n", "              passed  CiliumNetworkPolicy default/api ingress[1]  peer and port match; it passes",
		"              missed  CiliumNetworkPolicy default/api ingress[2]  namespace=a is wanted, and the peer has namespace label team=b\n",
	} {
		if !strings.Contains(out, line) {
			t.Errorf("no %q in\n%s", line, out)
		}
	}
}

func TestParsePort(t *testing.T) {
	for _, tt := range []struct {
		text     string
		port     uint32
		protocol string
	}{
		{"80", 80, "TCP"}, {"0", 0, "TCP"}, {"65535/udp", 65535, "UDP"}, {"9/SCTP", 9, "SCTP"}, {"8/icmp", 8, "ICMP"}, {"3/ICMPv4", 3, "ICMP"},
		{"icmp", 8, "ICMP"}, {"icmpv6", 128, "ICMPv6"}, {"255/icmpv6", 255, "ICMPv6"},
		{"", 0, ""}, {"65536", 0, ""}, {"256/icmp", 0, ""}, {"-1", 0, ""}, {"80/", 0, ""}, {"80/x", 0, ""}, {"/tcp", 0, ""}, {"http", 0, ""}, {"80/tcp/x", 0, ""}, {"icmp/8", 0, ""},
	} {
		port, protocol, err := parsePort(tt.text)
		if port != tt.port || protocol != tt.protocol || (err != nil) != (tt.protocol == "") {
			t.Errorf("%q: %d %q %v", tt.text, port, protocol, err)
		}
	}
}

func TestEnd(t *testing.T) {
	for text, want := range map[string]string{
		"web": "default/web", "shop/web": "shop/web", "192.0.2.1": "192.0.2.1", "fd00::1": "fd00::1", "node:n1": "node:n1", "svc:web": "svc:default/web", "svc:shop/web": "svc:shop/web",
	} {
		if got := end(text); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}
