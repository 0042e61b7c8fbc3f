// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"context"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

const l7Docs = `kind: CiliumNetworkPolicy
apiVersion: cilium.io/v2
metadata: {name: api, namespace: default, uid: p1, generation: 1}
spec: {endpointSelector: {matchLabels: {app: api}}, ingress: [{fromEndpoints: [{matchLabels: {app: web}}], toPorts: [{ports: [{port: "80", protocol: TCP}],
  rules: {http: [{method: GET, path: "/public/.*"}, {method: POST, headers: ["X-Token: 1"]}]}}]}]}
`

const l7Names = `kind: CiliumNetworkPolicy
apiVersion: cilium.io/v2
metadata: {name: names, namespace: default, uid: p2, generation: 1}
spec: {endpointSelector: {matchLabels: {app: web}}, egress: [{toEndpoints: [{matchLabels: {app: db}}],
  toPorts: [{ports: [{port: "53", protocol: UDP}], rules: {dns: [{matchPattern: "*.example.com"}]}}]},
  {toEndpoints: [{matchLabels: {app: api}}]}, {toFQDNs: [{matchPattern: "*.example.com"}], toPorts: [{ports: [{port: "443", protocol: TCP}]}]}]}
`

const l7SNI = `kind: CiliumNetworkPolicy
apiVersion: cilium.io/v2
metadata: {name: sni, namespace: default, uid: p3, generation: 1}
spec: {endpointSelector: {matchLabels: {app: db}}, egress: [{toEndpoints: [{matchLabels: {app: api}}],
  toPorts: [{ports: [{port: "443", protocol: TCP}], serverNames: ["*.example.com"]}]}]}
`

func TestExplainRequests(t *testing.T) {
	c, one, _ := two(t, l7Docs, l7Names, l7SNI, webService, configDoc("a", envoySpec))
	one.until("the policy", func() bool {
		return one.state["subject api"].GetSubject().GetIngress() != "" && one.has("endpoint web") && one.has("endpoint db")
	})
	q := c.query()
	get := func(path string, headers ...string) *policyv1.HTTPRequest {
		r := &policyv1.HTTPRequest{Path: path}
		for _, h := range headers {
			name, value, _ := strings.Cut(h, ": ")
			r.Headers = append(r.Headers, &policyv1.HTTPHeader{Name: name, Value: value})
		}
		return r
	}
	post := func(path string, headers ...string) *policyv1.HTTPRequest {
		r := get(path, headers...)
		r.Method = "POST"
		return r
	}
	ask := func(source, destination string, port uint32) *policyv1.ExplainConnectionRequest {
		return &policyv1.ExplainConnectionRequest{Source: source, Destination: destination, Port: port}
	}
	tests := []struct {
		name    string
		request *policyv1.ExplainConnectionRequest
		http    *policyv1.HTTPRequest
		dns     string
		sni     string
		verdict policyv1.Verdict
		refused bool
		items   string // "item=accepts" of the only side with items
	}{
		{"a request", ask("default/web", "default/api", 80), get("/public/a"), "", "", 1, false, "GET /public/.*=true POST header X-Token: 1=false"},
		{"another path", ask("default/web", "default/api", 80), get("/private"), "", "", 1, true, "GET /public/.*=false POST header X-Token: 1=false"},
		{"a path out of it", ask("default/web", "default/api", 80), get("/public/../private"), "", "", 1, true, "GET /public/.*=false POST header X-Token: 1=false"},
		{"a header", ask("default/web", "default/api", 80), post("/x", "x-token: 1"), "", "", 1, false, "GET /public/.*=false POST header X-Token: 1=true"},
		{"another header", ask("default/web", "default/api", 80), post("/x", "x-token: 2"), "", "", 1, true, "GET /public/.*=false POST header X-Token: 1=false"},
		{"nothing asked", ask("default/web", "default/api", 80), nil, "", "", 1, false, ""},
		{"another port", ask("default/web", "default/api", 81), get("/public/a"), "", "", 2, false, ""},
		{"a name", &policyv1.ExplainConnectionRequest{Source: "default/web", Destination: "default/db", Port: 53, Protocol: "UDP"}, nil, "a.example.com", "", 1, false, "names *.example.com=true"},
		{"another name", &policyv1.ExplainConnectionRequest{Source: "default/web", Destination: "default/db", Port: 53, Protocol: "UDP"}, nil, "a.example.org", "", 1, true, "names *.example.com=false"},
		{"a server name", ask("default/db", "default/api", 443), nil, "", "a.example.com", 2, false, "TLS to *.example.com=true"},
		{"another server name", ask("default/db", "default/api", 443), nil, "", "example.com", 2, true, "TLS to *.example.com=false"},
		{"no TLS", ask("default/db", "default/api", 443), get("/"), "", "", 2, true, "TLS to *.example.com=false"},
		{"a named destination", ask("default/web", "name:a.example.com", 443), nil, "", "", 1, false, ""},
		{"another named destination", ask("default/web", "name:example.com", 443), nil, "", "", 2, false, ""},
		{"the wrong question", ask("default/web", "default/api", 80), nil, "a.example.com", "", 1, false, ""},
	}
	for _, tt := range tests {
		tt.request.Http, tt.request.Dns, tt.request.Sni = tt.http, tt.dns, tt.sni
		r, err := q.ExplainConnection(context.Background(), tt.request)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		var items []string
		for _, s := range r.GetSides() {
			if !s.GetAsked() {
				continue
			}
			for _, i := range s.GetItems() {
				accepts := "=false"
				if i.GetAccepts() {
					accepts = "=true"
				}
				if i.GetRule().GetName() == "" {
					t.Errorf("%s: item of no rule: %v", tt.name, i)
				}
				items = append(items, i.GetItem()+accepts)
			}
		}
		if r.GetVerdict() != tt.verdict || r.GetRefused() != tt.refused || strings.Join(items, " ") != tt.items {
			t.Errorf("%s: verdict %v, refused %t, items %q; want %v, %t, %q", tt.name, r.GetVerdict(), r.GetRefused(), items, tt.verdict, tt.refused, tt.items)
		}
	}
	both := ask("default/web", "default/api", 80)
	both.Http, both.Dns = get("/"), "a"
	if _, err := q.ExplainConnection(context.Background(), both); grpcstatus.Code(err) != codes.InvalidArgument {
		t.Errorf("two questions: %v", err)
	}

	// Which names bear on an address outside is said, and which service is routed.
	r, err := q.ExplainConnection(context.Background(), ask("default/web", "192.0.2.1", 443))
	if err != nil || len(r.GetSides()) != 1 || len(r.GetSides()[0].GetNames()) != 1 || r.GetSides()[0].GetNames()[0].GetSelector() != "*.example.com" ||
		r.GetSides()[0].GetNames()[0].GetMatches() || r.GetVerdict() != policyv1.Verdict_VERDICT_DEFAULT_DENY {
		t.Errorf("an address outside: %v, %v", r, err)
	}
}

func TestEffectiveRequests(t *testing.T) {
	c, one, two := two(t, l7Docs, l7Names)
	one.until("the policy", func() bool { return one.state["subject api"].GetSubject().GetIngress() != "" && one.has("endpoint db") })
	two.until("the policy", func() bool { return two.state["subject web"].GetSubject().GetEgress() != "" })
	rows := func(endpoint string, direction int) map[string]*policyv1.EffectiveRow {
		e, err := c.query().GetEffectivePolicy(context.Background(), &policyv1.GetEffectivePolicyRequest{Endpoint: endpoint})
		if err != nil {
			t.Fatal(err)
		}
		all := map[string]*policyv1.EffectiveRow{}
		for _, r := range e.GetDirections()[direction].GetRows() {
			all[r.GetPeers()+" "+r.GetPorts()] = r
		}
		return all
	}
	if r := rows("default/api", 0)["app=web in default 80/TCP"]; !slices.Equal(r.GetRequests(), []string{"GET /public/.*", "POST header X-Token: 1"}) {
		t.Errorf("requests of web are %v", r)
	}
	out := rows("default/web", 1)
	if r := out["app=db in default 53/UDP"]; !slices.Equal(r.GetRequests(), []string{"names *.example.com"}) {
		t.Errorf("names of web are %v", out)
	}
	if r := out["DNS names *.example.com 443/TCP"]; r.GetVerdict() != policyv1.Verdict_VERDICT_ALLOW || r.GetRules()[0].GetName() != "names" {
		t.Errorf("what has a name is %v", out)
	}
	for peers := range out {
		if strings.Contains(peers, "fqdn") {
			t.Errorf("a row for %s", peers)
		}
	}
}

func TestValidateRequests(t *testing.T) {
	c, one, _ := two(t, webService, configDoc("a", envoySpec), policyDoc(1, fromWeb))
	one.until("all endpoints", func() bool {
		return one.has("endpoint web") && one.has("endpoint db") && one.state["subject api"].GetSubject().GetIngress() != ""
	})
	r, err := c.query().ValidatePolicies(context.Background(), &policyv1.ValidatePoliciesRequest{
		Documents: []byte(strings.Join([]string{l7Docs, l7Names, configDoc("b", envoySpec), configDoc("c", "{resources: [{}]}"), configDoc("a", envoySpec)}, "---\n")),
	})
	if err != nil || len(r.GetDocuments()) != 5 {
		t.Fatalf("documents: %v, %v", r, err)
	}
	for i, want := range []string{
		"default/web -> default/api, 80/TCP: allowed by ingress for GET /public/.*, POST header X-Token: 1 only",
		"default/web -> DNS names *.example.com, any other protocol, 0-442/TCP, 444-65535/TCP: allowed now, would be denied by egress",
		"default/web:80: conflict, routed by CiliumEnvoyConfig default/a already",
		"",
		"default/web:80: goes through listener l, as now",
	} {
		d := r.GetDocuments()[i]
		if want != "" && !slices.Contains(d.GetChanges(), want) {
			t.Errorf("document %d: %q is not among\n%s\n%s", i, want, strings.Join(d.GetChanges(), "\n"), d.GetError())
		}
	}
	if bad := r.GetDocuments()[3]; bad.GetField() != "spec.resources[0]" || bad.GetName() != "c" || bad.GetKind() != "CiliumEnvoyConfig" {
		t.Errorf("the bad configuration is %v", bad)
	}
}
