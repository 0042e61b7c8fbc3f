// SPDX-License-Identifier: Apache-2.0

package reference

import (
	"cmp"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// casesEnv names a folder of case files to check the evaluator against, instead of the repository's own.
const casesEnv = "WEIR_POLICY_CASES"

func TestCases(t *testing.T) {
	folder := os.Getenv(casesEnv)
	if folder == "" {
		folder = "../cases/testdata"
	}
	cases, err := ReadCases(folder)
	if err != nil {
		t.Fatal(err)
	}
	checked, skipped := 0, 0
	for _, c := range cases {
		t.Run(c.ID, func(t *testing.T) {
			if field := prepare(c); field != "" {
				skipped += len(c.Expect)
				t.Skipf("not enforced: %s", field)
			}
			for i := range c.Expect {
				e := &c.Expect[i]
				p, ok := c.packet(t, e)
				if !ok {
					skipped++
					continue
				}
				checked++
				egress, ingress := c.ClusterAt(e.At).Ask(p, e.Request())
				if got := e.Disagreement(egress, ingress, c.Config.PolicyAuditMode); got != "" { // audit tells and lets pass
					t.Errorf("%d: %v: %s: egress %+v, ingress %+v; want %s %s %s: %s", i, p, got, egress, ingress, e.Verdict, e.L7, e.Direction, e.Reason)
				}
			}
		})
	}
	t.Logf("%d expectations checked, %d are about more than a new connection and its request", checked, skipped)
	if checked == 0 {
		t.Error("nothing was checked")
	}
}

// prepare takes out the objects that the case expects to be refused, and returns the first field that is not enforced.
func prepare(c *Case) string {
	notYet := ""
	versions := map[string]int{}
	count := func(all []map[string]any) {
		for _, o := range all {
			versions[objectName(o)]++
		}
	}
	count(c.Policies)
	for _, change := range c.Changes {
		count(change.Add)
	}
	valid := func(all []map[string]any) []map[string]any {
		return slices.DeleteFunc(all, func(o map[string]any) bool {
			name := strings.TrimPrefix(metadata(o, "namespace")+"/"+metadata(o, "name"), "/")
			for _, v := range c.Validation {
				if v.Policy == name && v.Valid != nil && !*v.Valid && versions[objectName(o)] == 1 {
					return true // the last version; those before are good
				}
			}
			versions[objectName(o)]--
			notYet = cmp.Or(notYet, NotYet(o))
			return false
		})
	}
	c.Policies = valid(c.Policies)
	for i := range c.Changes {
		c.Changes[i].Add = valid(c.Changes[i].Add)
	}
	return notYet
}

// packet of an expectation; false if there is more to it than the first packet of a connection.
func (c *Case) packet(t *testing.T, e *Expect) (Packet, bool) {
	for k := range e.Other {
		if !slices.Contains([]string{"flow_verdict", "flow_policy_log", "rcode", "status", "body", "established"}, k) {
			return Packet{}, false
		}
	}
	for _, v := range c.Validation { // what was in force before stays
		if v.Endpoint != "" && (v.Endpoint == e.From || v.Endpoint == e.To) {
			return Packet{}, false
		}
	}
	p := Packet{From: e.From, To: e.To, Protocol: e.Protocol, Port: e.Port}
	if e.ICMP != nil {
		p.Port, p.Code = e.ICMP.Type, e.ICMP.Code
	}
	p.V6 = p.ProtocolNumber() == 58 || strings.Count(e.From+e.To, ":") > 2
	if name, ok := strings.CutPrefix(e.To, "svc:"); ok {
		return c.backend(t, p, name)
	}
	return p, true
}

// backend translates a service end to the first pod behind it.
func (c *Case) backend(t *testing.T, p Packet, name string) (Packet, bool) {
	for _, s := range c.Services {
		if s.Namespace+"/"+s.Name != name {
			continue
		}
		for i := range c.Pods {
			pod := &c.Pods[i]
			if !c.behind(s, end{}, end{kind: podEnd, pod: pod}) || len(s.Selector) == 0 {
				continue
			}
			for _, port := range s.Ports {
				if port.Port != p.Port {
					continue
				}
				if port.TargetPort != nil {
					target := text(port.TargetPort)
					n, err := strconv.Atoi(target)
					for _, have := range pod.Ports {
						if err != nil && have.Name == target {
							n = have.Port
						}
					}
					p.Port = n
				}
				p.To = pod.Namespace + "/" + pod.Name
				return p, true
			}
		}
	}
	t.Logf("no pod is behind %s", name)
	return p, false
}

// world of the tables: two namespaces, two nodes, three pods.
const tableWorld = `
nodes: [{name: n1, ip: 172.30.0.1, labels: {disk: ssd}}, {name: n2, ip: 172.30.0.2, labels: {disk: hdd}, kube_apiserver: true}]
namespaces: [{name: shop, labels: {env: prod}}, {name: dev, labels: {env: dev}}]
pods:
- {name: web, namespace: shop, labels: {app: web}, ip: 10.1.0.1, ip6: "fd00::1", node: n1, ports: [{name: http, port: 8080}]}
- {name: db, namespace: shop, labels: {app: db}, ip: 10.1.0.2, node: n1}
- {name: web, namespace: dev, labels: {app: web}, ip: 10.1.0.3, node: n2}
policies:
- `

const cnp = `{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p, namespace: shop}, spec: {endpointSelector: {matchLabels: {app: web}}, `

func TestDecide(t *testing.T) {
	in := func(from string, protocol string, port int) Packet {
		return Packet{From: from, To: "shop/web", Protocol: protocol, Port: port}
	}
	out := func(to string, protocol string, port int) Packet {
		return Packet{From: "shop/web", To: to, Protocol: protocol, Port: port}
	}
	type want struct {
		packet  Packet
		verdict Verdict // of the side of shop/web
	}
	for _, c := range []struct {
		name, policy string
		want         []want
	}{
		{"an empty rule switches on and allows nothing (5.1)", cnp + `ingress: [{}]}}`, []want{
			{in("shop/db", "TCP", 80), DefaultDeny}, {in("node:n1", "TCP", 80), Allow}, {in("node:n2", "TCP", 80), DefaultDeny}, {out("shop/db", "TCP", 80), Allow}}},
		{"an empty list of peers selects nobody", cnp + `ingress: [{fromEndpoints: [], toPorts: [{ports: [{port: "80"}]}]}]}}`, []want{
			{in("shop/db", "TCP", 80), DefaultDeny}, {in("ip:192.0.2.1", "TCP", 80), DefaultDeny}}},
		{"ports without peers: anybody", cnp + `ingress: [{toPorts: [{ports: [{port: "80"}]}]}]}}`, []want{
			{in("ip:192.0.2.1", "SCTP", 80), Allow}, {in("dev/web", "UDP", 80), Allow}, {in("dev/web", "ICMP", 8), DefaultDeny}, {in("dev/web", "TCP", 81), DefaultDeny}}},
		{"an entry without ports matches none", cnp + `ingress: [{fromEntities: [all], toPorts: [{ports: []}]}]}}`, []want{{in("shop/db", "TCP", 80), DefaultDeny}}},
		{"null is absent", cnp + `ingress: [{fromEndpoints: null, toPorts: [{ports: [{port: "80"}]}]}]}}`, []want{{in("dev/web", "TCP", 80), Allow}}},
		{"{} is the namespace (3.4)", cnp + `ingress: [{fromEndpoints: [{}]}]}}`, []want{
			{in("shop/db", "TCP", 80), Allow}, {in("dev/web", "TCP", 80), DefaultDeny}, {in("ip:192.0.2.1", "TCP", 80), DefaultDeny}, {in("node:n2", "TCP", 80), DefaultDeny}}},
		{"a namespace label reaches over", cnp + `ingress: [{fromEndpoints: [{matchLabels: {io.cilium.k8s.namespace.labels.env: dev}}]}]}}`, []want{
			{in("dev/web", "TCP", 80), Allow}, {in("shop/db", "TCP", 80), DefaultDeny}}},
		{"NotIn a namespace never reaches outside (5.3)", cnp + `ingress: [{fromEndpoints: [{matchExpressions: [{key: io.kubernetes.pod.namespace, operator: NotIn, values: [shop]}]}]}]}}`, []want{
			{in("dev/web", "TCP", 80), Allow}, {in("shop/db", "TCP", 80), DefaultDeny}, {in("ip:192.0.2.1", "TCP", 80), DefaultDeny}}},
		{"a reserved key", cnp + `ingress: [{fromEndpoints: [{matchLabels: {"reserved.remote-node": ""}}]}]}}`, []want{
			{in("node:n2", "TCP", 80), Allow}, {in("shop/db", "TCP", 80), DefaultDeny}}},
		{"the subject's forced namespace", strings.Replace(cnp, "{app: web}", `{"k8s:io.kubernetes.pod.namespace": dev}`, 1) + `ingress: [{}]}}`, []want{{in("shop/db", "TCP", 80), DefaultDeny}}},
		{"and what stays beside it", strings.Replace(cnp, "{app: web}", `{io.kubernetes.pod.namespace: dev}`, 1) + `ingress: [{}]}}`, []want{{in("shop/db", "TCP", 80), Allow}}},
		{"deny wins, and what it does not cover falls to default deny", cnp + `ingress: [{fromEndpoints: [{}]}], ingressDeny: [{toPorts: [{ports: [{port: "80"}]}]}]}}`, []want{
			{in("shop/db", "TCP", 80), Deny}, {in("shop/db", "TCP", 81), Allow}, {in("dev/web", "TCP", 81), DefaultDeny}, {in("node:n1", "TCP", 80), Deny}, {in("node:n1", "TCP", 81), Allow}}},
		{"the switch off", cnp + `enableDefaultDeny: {ingress: false}, ingressDeny: [{fromEntities: [world]}]}}`, []want{
			{in("ip:192.0.2.1", "TCP", 80), Deny}, {in("dev/web", "TCP", 80), Allow}}},
		{"entities", cnp + `egress: [{toEntities: [kube-apiserver, host]}]}}`, []want{
			{out("node:n2", "TCP", 80), Allow}, {out("node:n1", "TCP", 80), Allow}, {out("shop/db", "TCP", 80), DefaultDeny}}},
		{"CIDR never matches pods or nodes (7.1)", cnp + `egress: [{toCIDR: [0.0.0.0/0]}]}}`, []want{
			{out("ip:192.0.2.1", "TCP", 80), Allow}, {out("ip:10.1.0.2", "TCP", 80), DefaultDeny}, {out("node:n2", "TCP", 80), DefaultDeny}, {out("ip:2001:db8::1", "TCP", 80), DefaultDeny}}},
		{"except is a hole (7.2)", cnp + `egress: [{toCIDRSet: [{cidr: 192.0.2.1/24, except: [192.0.2.64/26]}]}]}}`, []want{
			{out("ip:192.0.2.1", "TCP", 80), Allow}, {out("ip:192.0.2.64", "TCP", 80), DefaultDeny}}},
		{"named port of the subject", cnp + `ingress: [{toPorts: [{ports: [{port: HTTP, protocol: TCP}]}]}]}}`, []want{
			{in("shop/db", "TCP", 8080), Allow}, {in("shop/db", "UDP", 8080), DefaultDeny}, {in("shop/db", "TCP", 80), DefaultDeny}}},
		{"ICMP types", cnp + `ingress: [{icmps: [{fields: [{type: 0}, {family: IPv6, type: EchoRequest}]}]}]}}`, []want{
			{in("shop/db", "ICMP", 0), Allow}, {in("shop/db", "ICMP", 8), DefaultDeny}, {in("shop/db", "ICMPv6", 128), Allow}, {in("shop/db", "ICMPv6", 0), DefaultDeny}}},
		{"a rule of a NetworkPolicy with nothing in it allows all (13)", `{kind: NetworkPolicy, metadata: {name: p, namespace: shop}, spec: {podSelector: {}, ingress: [{}]}}`, []want{
			{in("ip:192.0.2.1", "TCP", 80), Allow}, {out("shop/db", "TCP", 80), Allow}}},
		{"policyTypes", `{kind: NetworkPolicy, metadata: {name: p, namespace: shop}, spec: {policyTypes: [Egress], ingress: [{}]}}`, []want{
			{in("ip:192.0.2.1", "TCP", 80), Allow}, {out("shop/db", "TCP", 80), DefaultDeny}}},
		{"ports of a NetworkPolicy are TCP", `{kind: NetworkPolicy, metadata: {name: p, namespace: shop}, spec: {ingress: [{ports: [{port: 80, endPort: 90}]}]}}`, []want{
			{in("dev/web", "TCP", 90), Allow}, {in("dev/web", "UDP", 90), DefaultDeny}, {in("dev/web", "TCP", 91), DefaultDeny}}},
		{"first match of a tier (17)", `{kind: ClusterNetworkPolicy, metadata: {name: p}, spec: {tier: Baseline, priority: 1, subject: {namespaces: {}}, egress: [
			{action: Accept, to: [{networks: [10.1.0.2/32]}], protocols: [{tcp: {destinationPort: {range: {start: 80, end: 81}}}}]}, {action: Deny, to: [{networks: [0.0.0.0/0]}]}]}}`, []want{
			{out("shop/db", "TCP", 81), Allow}, {out("shop/db", "TCP", 82), Deny}, {out("ip:192.0.2.1", "ICMP", 8), Deny}, {out("ip:2001:db8::1", "TCP", 81), Allow}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var cluster Cluster
			if err := yaml.Unmarshal([]byte(tableWorld+c.policy+"\n"), &cluster); err != nil {
				t.Fatal(err)
			}
			for _, w := range c.want {
				egress, ingress := cluster.Decide(w.packet)
				got := ingress
				if w.packet.From == "shop/web" {
					got = egress
				}
				if got != w.verdict {
					t.Errorf("%v: %v, want %v", w.packet, got, w.verdict)
				}
			}
		})
	}
}
