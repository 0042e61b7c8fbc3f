// SPDX-License-Identifier: Apache-2.0

package manifest_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/object"
)

// TestRaw: what is in a policy is handed on as it stands; only the metadata is the lab's.
func TestRaw(t *testing.T) {
	const head = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: a, namespace: shop, labels: {x: y}}\n"
	for _, tt := range []struct{ name, yaml, want string }{
		{"empty and absent", "spec: {endpointSelector: {}, ingress: [], egress: [{}], ingressDeny: null}\n",
			`{"spec": {"endpointSelector": {}, "ingress": [], "egress": [{}], "ingressDeny": null}}`},
		{"unknown fields", "spec: {nobody: {knows: [this]}}\nalso: 1\n", `{"spec": {"nobody": {"knows": ["this"]}}, "also": 1}`},
		{"types", "spec: {a: '80', b: 80, c: 1.5, d: true, e: 'true', f: 18446744073709551616, g: 2020-01-02, h: 1e3, i: ~, j: '<x>'}\n",
			`{"spec": {"a": "80", "b": 80, "c": 1.5, "d": true, "e": "true", "f": 18446744073709551616, "g": "2020-01-02", "h": 1e3, "i": null, "j": "<x>"}}`},
		{"several rules", "specs: [{ingress: [{}]}, {}]\n", `{"specs": [{"ingress": [{}]}, {}]}`},
		{"anchors", "spec: {a: &x {b: [1]}, c: *x}\n", `{"spec": {"a": {"b": [1]}, "c": {"b": [1]}}}`},
		{"not an object", "spec: 7\n", `{"spec": 7}`},
		{"nothing", "", `{}`},
		{"status is Weir's", "spec: {}\nstatus: {conditions: []}\n", `{"spec": {}}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			items, err := manifest.Parse("f.yaml", []byte(head+tt.yaml))
			if err != nil {
				t.Fatal(err)
			}
			data, err := object.JSON(items[0].Object)
			if err != nil {
				t.Fatal(err)
			}
			got, want := decode(t, string(data)), decode(t, tt.want)
			if got["apiVersion"] != "cilium.io/v2" || got["kind"] != "CiliumNetworkPolicy" || got["metadata"].(map[string]any)["name"] != "a" {
				t.Errorf("head: %s", data)
			}
			for _, field := range []string{"apiVersion", "kind", "metadata"} {
				delete(got, field)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %v\nwant %v", got, want)
			}
		})
	}
}

func decode(t *testing.T, text string) map[string]any {
	t.Helper()
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.UseNumber()
	var value map[string]any
	if err := decoder.Decode(&value); err != nil {
		t.Fatal(err)
	}
	return value
}

func TestRawFaults(t *testing.T) {
	for _, tt := range []struct{ name, yaml, want string }{
		{"no name", "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {}\n", "f.yaml:3: metadata.name: required"},
		{"no metadata", "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nspec: {}\n", "f.yaml:1: metadata.name: required"},
		{"another group", "apiVersion: example.org/v1\nkind: NetworkPolicy\nmetadata: {name: a}\n",
			`f.yaml:1: apiVersion: expected networking.k8s.io/v1 for kind NetworkPolicy, got "example.org/v1"`},
		{"namespace", "apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {name: a, namespace: b}\n",
			"f.yaml:3: metadata.namespace: kind CiliumClusterwideNetworkPolicy has no namespace"},
		{"field twice", "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: a}\nspec: {}\nspec: {}\n", "f.yaml:5: spec: given twice"},
		{"merge key", "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: a}\nspec:\n  a: &x {b: c}\n  d: {<<: *x}\n",
			`f.yaml:6: spec.d: expected the name of a field, got "<<"; merge keys are not read`},
		{"metadata", "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: a, labels: [b]}\n",
			"f.yaml:3: metadata.labels: expected a map of names and values, got a list"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := manifest.Parse("f.yaml", []byte(tt.yaml)); err == nil || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
	// Older and newer versions of a group are for Weir to judge.
	for _, version := range []string{"cilium.io/v2", "cilium.io/v2alpha1"} {
		if _, err := manifest.Parse("f.yaml", []byte("apiVersion: "+version+"\nkind: CiliumCIDRGroup\nmetadata: {name: a}\n")); err != nil {
			t.Errorf("%s: %v", version, err)
		}
	}
}

func TestServiceFaults(t *testing.T) {
	for _, tt := range []struct{ name, spec, want string }{
		{"node port of a ClusterIP", "ports: [{port: 1, nodePort: 30000}]", "spec.ports[0].nodePort: expected none in a service of type ClusterIP"},
		{"node port outside", "type: NodePort, ports: [{port: 1, nodePort: 80}]", "spec.ports[0].nodePort: expected 30000 to 32767, got 80"},
		{"headless balancer", "type: LoadBalancer, clusterIP: None, ports: [{port: 1}]", "spec.clusterIP: a headless service cannot be of type LoadBalancer"},
		{"external address", "externalIPs: [nowhere], ports: [{port: 1}]", `spec.externalIPs[0]: expected an address, got "nowhere"`},
		{"balancer address", "loadBalancerIP: 192.0.2.1, ports: [{port: 1}]", "spec.loadBalancerIP: expected none in a service of type ClusterIP"},
		{"ranges", "type: LoadBalancer, loadBalancerSourceRanges: [here], ports: [{port: 1}]", `spec.loadBalancerSourceRanges[0]: expected a prefix such as 203.0.113.0/24, got "here"`},
		{"affinity", "sessionAffinity: Client, ports: [{port: 1}]", `spec.sessionAffinity: expected None or ClientIP, got "Client"`},
		{"affinity time", "sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}, ports: [{port: 1}]",
			"spec.sessionAffinityConfig.clientIP.timeoutSeconds: expected 1 to 86400, got 0"},
		{"external traffic", "externalTrafficPolicy: Local, ports: [{port: 1}]", "spec.externalTrafficPolicy: expected none in a service that nobody reaches from outside"},
		{"health check", "type: LoadBalancer, healthCheckNodePort: 30000, ports: [{port: 1}]",
			"spec.healthCheckNodePort: expected none but in a LoadBalancer with externalTrafficPolicy Local"},
		{"distribution", "trafficDistribution: Near, ports: [{port: 1}]",
			`spec.trafficDistribution: expected PreferClose, PreferSameZone, PreferSameNode, got "Near"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := manifest.Parse("f.yaml", []byte("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {"+tt.spec+"}\n"))
			if err == nil || err.Error() != "f.yaml:4: "+tt.want {
				t.Errorf("got  %v\nwant f.yaml:4: %s", err, tt.want)
			}
		})
	}
	_, err := manifest.Parse("f.yaml", []byte("apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a}\naddressType: IPv4\nports: [{name: x}]\nendpoints: [{addresses: ['::1']}]\n"))
	const want = "f.yaml:5: ports[0].port: required by the lab\nf.yaml:6: endpoints[0].addresses[0]: expected an address of the family IPv4, got \"::1\""
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}
