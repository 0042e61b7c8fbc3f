// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// filtered is connection with requests that a proxy reads, of which none accepts what is asked.
func filtered() *policyv1.ExplainConnectionResponse {
	return clone(connection(), func(r *policyv1.ExplainConnectionResponse) {
		r.Refused = true
		s := r.Sides[1]
		s.Filter, s.Asked, s.Refused = &policyv1.Filter{Key: "http-1", Kind: policyv1.FilterKind_FILTER_KIND_HTTP}, true, true
		s.Items = []*policyv1.FilterStep{
			{Rule: rule("ingress", 0), Item: "GET /public/.*", Reason: "the path is /private"},
			{Rule: rule("ingress", 1), Item: "POST"},
		}
	})
}

func TestPolicyWhyRequest(t *testing.T) {
	m := whyMesh(t, filtered())
	for _, peer := range []string{"300/http=80/TCP", "10.0.1.5"} {
		e := m.n2.entries[apiPod+" ingress "+peer]
		e.Slot, e.Filter, e.ListenerPort = 3, "http-1", 20003
	}
	out, errOut, code := m.run(t, "policy", "why", "web", apiPod, "80", "--http-path", "/private", "--http-header", "X-A: b: c", "--http-header", "x-b:")
	want := `   verdict    allow, by CiliumNetworkPolicy default/api ingress[0]
   requests   REFUSED: no item accepts what is asked
              no  GET /public/.*  CiliumNetworkPolicy default/api ingress[0]  the path is /private
              no  POST            CiliumNetworkPolicy default/api ingress[1]
   kernel     agrees: endpoint 9, policy 4, the row of peer 50331649: allow by CiliumNetworkPolicy default/api ingress[0], through slot 3
`
	if code != exitDenied || errOut != "" || !strings.HasSuffix(out, want) || !strings.Contains(out, "the connection is ALLOWED, what is asked on it is REFUSED\n") {
		t.Errorf("%d %s\n%s", code, errOut, out)
	}
	asked := &policyv1.HTTPRequest{Path: "/private", Headers: []*policyv1.HTTPHeader{{Name: "X-A", Value: "b: c"}, {Name: "x-b"}}}
	if !proto.Equal(m.policy.explained.GetHttp(), asked) {
		t.Errorf("asked for %v", m.policy.explained)
	}
	out, _, code = m.run(t, "policy", "why", "web", apiPod, "80", "--http-method", "GET", "-o", "json")
	if code != exitDenied || !strings.Contains(out, `"refused": true`) || !strings.Contains(out, `"passes": false`) {
		t.Errorf("%d %s", code, out)
	}

	// Accepted, and nothing asked.
	accepts := clone(filtered(), func(r *policyv1.ExplainConnectionResponse) {
		r.Refused, r.Sides[1].Refused = false, false
		r.Sides[1].Items[0].Accepts, r.Sides[1].Items[0].Reason = true, "sets header X-A: 1"
	})
	m.policy.explain["default/web "+apiPod] = accepts
	out = m.must(t, "policy", "why", "web", apiPod, "80", "--http-path", "/public/")
	if !strings.Contains(out, "requests   accepted\n") || !strings.Contains(out, "accepts  GET /public/.*  CiliumNetworkPolicy default/api ingress[0]  sets header X-A: 1\n") {
		t.Error(out)
	}
	accepts.Sides[1].Asked, accepts.Sides[1].Items[0].Accepts = false, false
	if out = m.must(t, "policy", "why", "web", apiPod, "80"); !strings.Contains(out, "requests   pass where an item accepts them (http-1)\n") {
		t.Error(out)
	}
	accepts.Sides[1].Filter.Visibility = true
	if out = m.must(t, "policy", "why", "web", apiPod, "80"); !strings.Contains(out, "requests   all pass; a proxy reads them") {
		t.Error(out)
	}

	// The kernel's filter is compared, and a listener that is not there is told.
	m.n2.entries[apiPod+" ingress 300/http=80/TCP"].ListenerPort = 0
	m.n2.entries[apiPod+" ingress 300/http=80/TCP"].Filter = ""
	out, errOut, code = m.run(t, "policy", "why", "web", apiPod, "80")
	if code != 1 || !strings.Contains(out, "goes through no filter, and should through filter http-1") || !strings.Contains(out, "NOTHING LISTENS") {
		t.Errorf("%d %s\n%s", code, errOut, out)
	}

	m.fails(t, "one question at a time: --http-..., --dns or --sni", "policy", "why", "web", apiPod, "80", "--http-path", "/", "--sni", "a")
	m.fails(t, "one question at a time: --http-..., --dns or --sni", "policy", "why", "web", apiPod, "53", "--dns", "a", "--sni", "a")
	m.fails(t, `invalid header "X-A": expected "NAME: VALUE"`, "policy", "why", "web", apiPod, "80", "--http-header", "X-A")
}

func TestPolicyWhyName(t *testing.T) {
	answer := &policyv1.ExplainConnectionResponse{Verdict: allow, Sides: []*policyv1.Side{{
		Direction: egress, Endpoint: "default/web", Node: "n1", Identity: 300, PeerIdentity: 2, PeerKey: "2", Enforced: true, Verdict: allow, Protocol: 6, Port: 443,
		Destination: "name:api.example.com", Names: []*policyv1.NameStep{
			{Selector: "*.example.com", Rules: []*policyv1.PolicyRule{rule("egress", 0)}, Matches: true},
			{Selector: "example.org", Rules: []*policyv1.PolicyRule{rule("egress", 1)}},
		},
	}}}
	m := whyMesh(t, connection())
	m.policy.explain["default/web name:api.example.com"] = answer
	out := m.must(t, "policy", "why", "web", "name:api.example.com", "443")
	for _, want := range []string{
		"default/web -> name:api.example.com, 443/TCP: ALLOWED\n",
		"names      the name matches *.example.com, by CiliumNetworkPolicy default/api egress[0]\n",
		"           an address that DNS named so passes: example.org, by CiliumNetworkPolicy default/api egress[1]\n",
		"kernel     not asked: it knows addresses;",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	out = m.must(t, "policy", "why", "web", "name:api.example.com", "443", "-o", "json")
	if !strings.Contains(out, `"skipped":`) || !strings.Contains(out, `"sure": true`) {
		t.Error(out)
	}
}

func TestPolicyWhyRoute(t *testing.T) {
	m := whyMesh(t, clone(connection(), func(r *policyv1.ExplainConnectionResponse) {
		r.Route = &policyv1.Route{Kind: "CiliumEnvoyConfig", Namespace: "default", Name: "web", Listener: "l"}
	}))
	if out := m.must(t, "policy", "why", "web", apiPod, "80"); !strings.Contains(out, "The connection goes to listener l of CiliumEnvoyConfig default/web first;") {
		t.Error(out)
	}
	if out := m.must(t, "policy", "why", "web", apiPod, "80", "-o", "json"); !strings.Contains(out, `"listener": "l"`) {
		t.Error(out)
	}
	// A request without a slot is not compared.
	m.n2.entries[apiPod+" ingress 10.0.1.5"] = &agentv1.LookupPolicyResponse{EndpointId: 9, Policy: 4, Peer: 50331649, PeerRow: true, Verdict: allow, Rules: []*policyv1.PolicyRule{rule("ingress", 0)}}
	m.must(t, "policy", "why", "web", apiPod, "80")
}

func TestPolicyEnvoyConfigs(t *testing.T) {
	m := newMesh(t)
	config := &policyv1.PolicyObject{
		Kind: "CiliumEnvoyConfig", Namespace: "default", Name: "web", Generation: 2, Valid: true, EnforcedGeneration: 2, EnforcingNodes: 1, Nodes: 2,
		Object: []byte("{}"), Services: []string{"default/web:80"}, Notes: []string{"spec.services[1]: there is no service default/none"},
		Conflicts: []string{"spec.services[0]: port 81 of service default/web is routed by CiliumEnvoyConfig default/other already"},
		Lagging:   []*policyv1.NodeLag{{Node: "n1", Reason: "its proxy refused CiliumEnvoyConfig/default/web: no cluster"}},
	}
	m.policy.lists = [][]*policyv1.PolicyObject{{config}}
	out := m.must(t, "policy", "list", "--kind", "CiliumEnvoyConfig")
	for _, want := range []string{"1/2 nodes   -  ", "n1 (its proxy refused", "conflict: spec.services[0]", "there is no service default/none"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	out = m.must(t, "policy", "get", "default/web")
	for _, want := range []string{"Routes:      default/web:80\n", "Conflict:    spec.services[0]: port 81", "already\n", "Note:        spec.services[1]"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "Selects") {
		t.Errorf("it selects endpoints:\n%s", out)
	}
}
