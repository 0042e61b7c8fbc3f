// SPDX-License-Identifier: Apache-2.0

package reference

import (
	"fmt"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

func TestAsk(t *testing.T) {
	in := func(from string, port int) Packet {
		return Packet{From: from, To: "shop/web", Protocol: "TCP", Port: port}
	}
	out := func(to, protocol string, port int) Packet {
		return Packet{From: "shop/web", To: to, Protocol: protocol, Port: port}
	}
	get := func(path string) Request { return Request{HTTP: &HTTPRequest{Method: "GET", Path: path}} }
	put := Request{HTTP: &HTTPRequest{Method: "PUT", Path: "/"}}
	ask := func(name string) Request { return Request{DNS: &DNSQuery{name}} }
	hello := func(name string) Request { return Request{TLS: &TLSHello{name}} }
	const http = `toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{method: GET}]}}]`
	const dns = `toPorts: [{ports: [{port: "53", protocol: UDP}], rules: {dns: [{matchName: a.b}, {}]}}]`
	const sni = `toPorts: [{ports: [{port: "443", protocol: TCP}], serverNames: ["*.b"]}]`
	type want struct {
		packet  Packet
		request Request
		answer  string // of the side of shop/web
	}
	for _, c := range []struct {
		name, policy string
		want         []want
	}{
		{"requests", cnp + `ingress: [{` + http + `}]}}`, []want{
			{in("shop/db", 80), get("/"), "http passes"}, {in("shop/db", 80), put, "http refuses"}, {in("shop/db", 80), get("/a%2Fb"), "http refuses"},
			{in("node:n1", 80), put, "passes"}, {in("node:n2", 80), put, "http refuses"}, {in("shop/db", 81), get("/"), "default deny"}}},
		{"any plain rule lifts them (9.3)", cnp + `ingress: [{` + http + `}, {fromEntities: [cluster]}]}}`, []want{
			{in("shop/db", 80), put, "http passes"}, {in("ip:192.0.2.1", 80), put, "http refuses"}}},
		{"an empty list lifts nothing of its selector (9.4)", cnp + `ingress: [{` + http + `}, {` + strings.Replace(http, "{method: GET}", "", 1) + `}]}}`, []want{{in("shop/db", 80), put, "http refuses"}}},
		{"it does of another", cnp + `ingress: [{` + http + `}, {fromEndpoints: [{}], ` + strings.Replace(http, "{method: GET}", "", 1) + `}]}}`, []want{{in("shop/db", 80), put, "http passes"}}},
		{"it does not of one that stands beside all", cnp + `ingress: [{fromEntities: [world, all], ` + http + `}, {fromEntities: [world], ` + strings.Replace(http, "{method: GET}", "", 1) + `}]}}`,
			[]want{{in("ip:192.0.2.1", 80), put, "http refuses"}}},
		{"the switch off completes them (4)", cnp + `enableDefaultDeny: {ingress: false}, ingress: [{` + http + `}]}}`, []want{{in("shop/db", 80), put, "http passes"}, {in("shop/db", 81), put, "passes"}}},
		{"names", cnp + `egress: [{` + dns + `}]}}`, []want{
			{out("shop/db", "UDP", 53), ask("A.B."), "dns passes"}, {out("shop/db", "UDP", 53), ask("c.b"), "dns refuses"}, {out("shop/db", "TCP", 53), ask("a.b"), "default deny"}}},
		{"names and a wide rule", cnp + `egress: [{` + dns + `}, {toEntities: [cluster]}]}}`, []want{{out("shop/db", "UDP", 53), ask("c.b"), "dns refuses"}}},
		{"names and one for the port", cnp + `egress: [{` + dns + `}, {toEntities: [cluster], toPorts: [{ports: [{port: "53"}]}]}]}}`, []want{{out("shop/db", "UDP", 53), ask("c.b"), "dns passes"}}},
		{"server names (9.5)", cnp + `egress: [{` + sni + `}]}}`, []want{
			{out("shop/db", "TCP", 443), hello("A.b"), "tls passes"}, {out("shop/db", "TCP", 443), hello("b"), "tls refuses"}, {out("shop/db", "TCP", 443), hello(""), "tls refuses"}, {out("shop/db", "TCP", 443), put, "tls refuses"}}},
		{"they bind a plain rule of the same selector", cnp + `egress: [{` + sni + `}, {toPorts: [{ports: [{port: "443", protocol: TCP}]}]}]}}`, []want{{out("shop/db", "TCP", 443), put, "tls refuses"}}},
		{"and not of another", cnp + `egress: [{` + sni + `}, {toEndpoints: [{}], toPorts: [{ports: [{port: "443", protocol: TCP}]}]}]}}`, []want{
			{out("shop/db", "TCP", 443), put, "tls passes"}, {out("dev/web", "TCP", 443), put, "tls refuses"}}},
		{"requests and server names of two selectors", cnp + `egress: [{` + sni + `}, {toEndpoints: [{}], ` + strings.ReplaceAll(http, `"80"`, `"443"`) + `}]}}`, []want{
			{out("shop/db", "TCP", 443), hello("a.b"), "http passes"}, {out("shop/db", "TCP", 443), hello("c"), "http refuses"}, {out("shop/db", "TCP", 443), get("/"), "http passes"}, {out("shop/db", "TCP", 443), put, "http refuses"}}},
		{"Accept of the Admin tier passes all (17)", cnp + `ingress: [{` + http + `}]}}` + "\n- " + `{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, metadata: {name: q}, spec: {tier: Admin, priority: 1, subject: {namespaces: {}}, ingress: [{action: Accept, from: [{namespaces: {}}]}]}}`,
			[]want{{in("shop/db", 80), put, "passes"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var cluster Cluster
			if err := yaml.Unmarshal([]byte(tableWorld+c.policy+"\n"), &cluster); err != nil {
				t.Fatal(err)
			}
			for _, w := range c.want {
				a, ingress := cluster.Ask(w.packet, w.request)
				if w.packet.From != "shop/web" {
					a = ingress
				}
				if got := say(a); got != w.answer {
					t.Errorf("%v %+v: %s, want %s", w.packet, w.request, got, w.answer)
				}
			}
		})
	}
}

// An item acts on a request once, however many peers and ports of its rule cover the packet.
func TestItemActsOnce(t *testing.T) {
	var cluster Cluster
	policy := cnp + `ingress: [{fromEntities: [cluster, all], toPorts: [{ports: [{port: "80", protocol: TCP}, {port: "79", endPort: 81, protocol: TCP}],
      rules: {http: [{headerMatches: [{name: X-A, value: "1", mismatch: ADD}]}]}}]}]}}`
	if err := yaml.Unmarshal([]byte(tableWorld+policy+"\n"), &cluster); err != nil {
		t.Fatal(err)
	}
	_, a := cluster.Ask(Packet{From: "shop/db", To: "shop/web", Protocol: "TCP", Port: 80}, Request{HTTP: &HTTPRequest{Method: "GET", Path: "/"}})
	if got := fmt.Sprintf("%s %s", say(a), a.Headers); got != "http passes [X-A: 1]" {
		t.Error(got)
	}
}

func say(a Answer) string {
	if a.Verdict != Allow {
		return a.Verdict.String()
	}
	return strings.TrimSpace(a.Proxy + map[bool]string{true: " passes", false: " refuses"}[a.Passes])
}

func TestVisible(t *testing.T) {
	for annotation, want := range map[string]string{
		"<ingress/80/TCP/HTTP>":                              "http",
		"<Ingress/80/any/http>, <Egress/53/UDP/DNS>":         "http",
		"<ingress/80/UDP/HTTP>":                              "",
		"<egress/80/TCP/HTTP>":                               "",
		"<ingress/80/TCP/HTTP>,<ingress/80/TCP/Kafka>":       "",
		"<ingress/80/TCP/HTTP>,<ingress/53/UDP/DNS>":         "",
		"<ingress/80/TCP/HTTP>,<ingress/70000/TCP/HTTP>":     "",
		"<ingress/80/TCP/HTTP>,<ingress/80/ANY/HTTP>,":       "",
		"<ingress/80/TCP/Kafka>,<ingress/8080/TCP/HTTP>":     "",
		"<ingress/80/SCTP/HTTP>,<ingress/80/TCP/HTTP>":       "http",
		"<ingress/80/TCP/HTTP>,<egress/9092/TCP/Kafka>":      "",
		"<ingress/80/TCP/HTTP>   ,   <ingress/81/TCP/Kafka>": "http",
	} {
		pod := &Pod{Annotations: map[string]string{"io.cilium.proxy-visibility": annotation}}
		if got := visible(end{kind: podEnd, pod: pod}, Ingress, Packet{Protocol: "TCP", Port: 80}); got != want {
			t.Errorf("%s: %q, want %q", annotation, got, want)
		}
	}
}

func TestNormalise(t *testing.T) {
	for target, want := range map[string]string{
		"/": "/", "//a": "/a", "/a/../b": "/b", "/a/..": "/", "/a//../b": "/a/b", "/..": "/", "/a/.": "/a/", "/%2e%2E/a": "/a", "/a?b=/../c": "/a?b=/../c", "/%20": "/%20",
		"/...": "/...", "/%252e": "/%252e", "*": "*", "/a/%2%65%2%65/b": "/b", "/../a": "/a", "/a/../../b/.": "/b/", "/x/../public": "/public",
	} {
		if got, redirected := Normalise(target); got != want || redirected {
			t.Errorf("%s: %s %t, want %s", target, got, redirected, want)
		}
	}
	if got, redirected := Normalise("/a%2f..%5Cb"); got != "/b" || !redirected {
		t.Errorf("%s %t", got, redirected)
	}
}

func TestHistory(t *testing.T) {
	c := &Case{}
	if err := yaml.Unmarshal([]byte(tableWorld+cnp+`egress: [{`+`toPorts: [{ports: [{port: "53", protocol: UDP}], rules: {dns: [{matchName: a.b}]}}]}, {toFQDNs: [{matchPattern: "*"}]}]}}
dns_answers: [{client: shop/web, name: a.b, ips: [192.0.2.1], ttl: 10}, {client: shop/web, name: c.b, ips: [192.0.2.2], ttl: 10}, {client: shop/web, name: a.b, ips: [192.0.2.3], ttl: 10, at: 5}]
connections: [{from: shop/web, to: "ip:192.0.2.1", open_at: 9, close_at: 20}, {from: shop/web, to: "ip:192.0.2.1", open_at: 20, close_at: 30}]
policy_changes: [{at: 40, add: [{kind: CiliumNetworkPolicy, metadata: {name: p, namespace: shop}, spec: {endpointSelector: {}, egress: [{}]}}]}]
`), c); err != nil {
		t.Fatal(err)
	}
	known := func(at float64) string {
		var all []string
		for _, ip := range []string{"192.0.2.1", "192.0.2.2", "192.0.2.3"} {
			egress, _ := c.ClusterAt(at).Ask(Packet{From: "shop/web", To: "ip:" + ip, Protocol: "TCP", Port: 443}, Request{})
			if egress.Verdict == Allow {
				all = append(all, ip)
			}
		}
		return fmt.Sprint(all)
	}
	for at, want := range map[float64]string{0: "[192.0.2.1]", 6: "[192.0.2.1 192.0.2.3]", 12: "[192.0.2.1 192.0.2.3]", 16: "[192.0.2.1]", 19: "[192.0.2.1]", 21: "[]", 41: "[]"} {
		if got := known(at); got != want {
			t.Errorf("at %v: %s, want %s", at, got, want)
		}
	}
}
