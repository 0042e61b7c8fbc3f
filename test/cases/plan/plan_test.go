// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/weirmesh/weir/test/cases/format"
)

const world = `
id: x
config: {ip_families: [IPv4, IPv6], policy_enforcement: always, host_firewall: true, policy_default_local_cluster: false, cluster_name: east}
namespaces: [{name: shop, labels: {team: a}}]
nodes: [{name: n1, ip: 10.0.0.1, labels: {role: w}}, {name: cp, ip: 10.0.0.9, kube_apiserver: true}]
externals: [{ip: 192.0.2.9, kube_apiserver: true}]
pods:
- {name: web, namespace: shop, labels: {app: web}, ip: 10.1.0.10, ip6: "fd00:1::10", service_account: s, ports: [{name: http, port: 8080}]}
- {name: bare, namespace: shop}
- {name: host, namespace: shop, host_network: true, node: cp}
- {name: far, namespace: shop, labels: {app: web}, ip: 10.2.0.1, cluster: west}
services:
- {name: web, namespace: shop, cluster_ip: 10.96.0.5, selector: {app: web}, ports: [{port: 80, target_port: http}]}
- {name: old, namespace: shop, endpoints: [192.0.2.7, 10.1.0.10], ports: [{port: 81, protocol: UDP}]}
policies: [{kind: NetworkPolicy, metadata: {name: p, namespace: elsewhere}}]
expect:
- {from: "ip:203.0.113.1", to: shop/web, port: 80, verdict: allow}
- {from: "entity:ingress", to: "svc:shop/web", port: 80, verdict: allow}
- {from: "ip:10.1.0.10", to: "node:cp", port: 80, verdict: allow}
`

// build plans the world, and returns its objects by "Kind namespace/name".
func build(t *testing.T) (*Plan, map[string]map[string]any) {
	t.Helper()
	c, err := format.Parse([]byte(world))
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(c, func(pod string) []string { return []string{"helper", pod} })
	if err != nil {
		t.Fatal(err)
	}
	objects := map[string]map[string]any{}
	for d := yaml.NewDecoder(bytes.NewReader(p.Manifests)); ; {
		var o map[string]any
		if err := d.Decode(&o); errors.Is(err, io.EOF) {
			return p, objects
		} else if err != nil {
			t.Fatalf("%v in\n%s", err, p.Manifests)
		}
		meta, _ := o["metadata"].(map[string]any)
		key := fmt.Sprintf("%v %v", o["kind"], meta["name"])
		if ns, ok := meta["namespace"]; ok {
			key = fmt.Sprintf("%v %v/%v", o["kind"], ns, meta["name"])
		}
		objects[key] = o
	}
}

func TestManifests(t *testing.T) {
	_, objects := build(t)
	for key, parts := range map[string][]string{
		"Namespace shop":                        {"team:a", "kubernetes.io/metadata.name:shop"},
		"Namespace elsewhere":                   {"kubernetes.io/metadata.name:elsewhere"},
		"Node n1":                               {"role:w", "address:10.0.0.1", "address:fd00:ca5e:"},
		"Node cp":                               {"address:10.0.0.9"},
		"Pod shop/web":                          {"weir.dev/ip-addresses:10.1.0.10,fd00:1::10", "serviceAccountName:s", "containerPort:8080", "name:http", "command:[helper shop/web]", "nodeName:n1"},
		"Pod shop/bare":                         {"weir.dev/ip-addresses:100.127."},
		"Pod shop/host":                         {"hostNetwork:true", "nodeName:cp"},
		"Pod shop/far":                          {"weir.dev/cluster:west"},
		"Pod weircases/ingress":                 {"weir.dev/reserved:ingress"},
		"Service shop/web":                      {"clusterIP:10.96.0.5", "selector:map[app:web]", "targetPort:http"},
		"EndpointSlice shop/old-ipv4":           {"addresses:[192.0.2.7]", "addresses:[10.1.0.10]", "port:81", "protocol:UDP", "kubernetes.io/service-name:old"},
		"Service default/kubernetes":            {"port:443"},
		"EndpointSlice default/kubernetes-ipv4": {"addresses:[10.0.0.9]", "addresses:[192.0.2.9]", "port:6443"},
		"Host weircases-outside":                {"192.0.2.7", "192.0.2.9", "203.0.113.1"},
	} {
		text := fmt.Sprint(objects[key])
		for _, part := range parts {
			if !strings.Contains(text, part) {
				t.Errorf("%s: %q is not in %s", key, part, text)
			}
		}
	}
	if text := fmt.Sprint(objects["Host weircases-outside"]); strings.Contains(text, "10.1.0.10") {
		t.Errorf("the address of a pod is outside: %s", text)
	}
	if text := fmt.Sprint(objects["Pod shop/host"]); strings.Contains(text, "ip-addresses") {
		t.Errorf("a host-network pod has an address of its own: %s", text)
	}
}

func TestFlagsAndServices(t *testing.T) {
	p, _ := build(t)
	for _, want := range []string{
		"--ip-families=IPv4,IPv6", "--policy-arg=--policy-enforcement=always", "--policy-arg=--host-firewall=true",
		"--policy-arg=--policy-default-local-cluster=false", "--cluster-name=east", "--policy-arg=--stand-ins",
	} {
		if !slices.Contains(p.Flags, want) {
			t.Errorf("%s is not in %v", want, p.Flags)
		}
	}
	// Backends by selector are this cluster's; the second family of the pod is one, too.
	if got := fmt.Sprint(p.Services["shop/web"].Ports); got != "[{TCP 80 [{shop/web 10.1.0.10 8080} {shop/web fd00:1::10 8080}]}]" {
		t.Errorf("web: %s", got)
	}
	if got := fmt.Sprint(p.Services["shop/old"].Ports); got != "[{UDP 81 [{ 192.0.2.7 81} {shop/web 10.1.0.10 81}]}]" {
		t.Errorf("old: %s", got)
	}
}
