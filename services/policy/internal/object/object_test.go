// SPDX-License-Identifier: Apache-2.0

package object

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

func toJSON(t testing.TB, doc string) []byte {
	t.Helper()
	data, err := yaml.YAMLToJSON([]byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func addrs(all ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range all {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func TestDecode(t *testing.T) {
	tests := []struct {
		name string
		kind string
		doc  string
		want Object
		err  string // part of the error; empty = none
	}{
		{
			name: "node", kind: KindNode,
			doc: `{metadata: {name: n1, labels: {a: b}}, spec: {podCIDR: 10.244.1.7/24}, status: {addresses: [
				{type: Hostname, address: n1}, {type: InternalIP, address: "::ffff:172.30.0.11"}, {type: ExternalIP, address: "2001:db8::1"}]}}`,
			want: &Node{
				Name: "n1", Labels: map[string]string{"a": "b"}, Addresses: addrs("172.30.0.11", "2001:db8::1"),
				PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")},
			},
		},
		{name: "node with a bad prefix", kind: KindNode, doc: `{metadata: {name: n1}, spec: {podCIDRs: [10.0.0.0]}}`, err: "spec.podCIDRs[0]"},
		{
			name: "node with a bad address", kind: KindNode,
			doc: `{metadata: {name: n1}, status: {addresses: [{type: InternalIP, address: "fe80::1%eth0"}]}}`, err: "status.addresses[0]",
		},
		{name: "namespace", kind: KindNamespace, doc: `{metadata: {name: shop, labels: {a: b}}}`, want: &Namespace{Name: "shop", Labels: map[string]string{"a": "b"}}},
		{name: "namespace in a namespace", kind: KindNamespace, doc: `{metadata: {name: shop, namespace: x}}`, err: "metadata.namespace"},
		{
			name: "pod", kind: KindPod,
			doc: `{metadata: {name: a, namespace: shop, uid: u, labels: {app: a}, annotations: {weir.dev/ip-addresses: "10.0.0.1, 2001:db8::1,", weir.dev/unmanaged: "true"},
				ownerReferences: [{kind: StatefulSet, name: a}]},
				spec: {nodeName: n1, serviceAccountName: sa, containers: [{name: c, ports: [{name: http, containerPort: 80}, {containerPort: 81}]}, {name: d, ports: [{name: http, containerPort: 82}]}]},
				status: {phase: Failed, podIP: 10.0.0.1}}`,
			want: &Pod{
				UID: "u", Namespace: "shop", Name: "a", Labels: map[string]string{"app": "a"}, ServiceAccount: "sa", Node: "n1",
				Unmanaged: true, Finished: true, FixedAddresses: addrs("10.0.0.1", "2001:db8::1"), StatusAddresses: addrs("10.0.0.1"),
				Workload: Workload{"StatefulSet", "a"}, NamedPorts: map[string]uint16{"http": 80},
				Ports: []NamedPort{{"http", TCP, 80}},
			},
		},
		{name: "pod without uid", kind: KindPod, doc: `{metadata: {name: a, namespace: shop}}`, err: "metadata.uid"},
		{name: "pod without namespace", kind: KindPod, doc: `{metadata: {name: a, uid: u}}`, err: "metadata.namespace"},
		{name: "pod without name", kind: KindPod, doc: `{metadata: {namespace: a, uid: u}}`, err: "metadata.name"},
		{name: "pod with a bad port", kind: KindPod, doc: `{metadata: {name: a, namespace: b, uid: u}, spec: {containers: [{name: c, ports: [{containerPort: 70000}]}]}}`, err: "spec.containers[c].ports"},
		{name: "pod with a bad fixed address", kind: KindPod, doc: `{metadata: {name: a, namespace: b, uid: u, annotations: {weir.dev/ip-addresses: x}}}`, err: "weir.dev/ip-addresses"},
		{name: "pod with a bad label", kind: KindPod, doc: `{metadata: {name: a, namespace: b, uid: u, labels: {a: "b\0c"}}}`, err: "label"},
		{name: "pod with a bad service account", kind: KindPod, doc: `{metadata: {name: a, namespace: b, uid: u}, spec: {serviceAccountName: "a b"}}`, err: "serviceAccountName"},
		{name: "name with a slash", kind: KindPod, doc: `{metadata: {name: a/b, namespace: b, uid: u}}`, err: "metadata.name"},
		{
			name: "service", kind: KindService,
			doc: `{metadata: {name: web, namespace: shop}, spec: {clusterIP: 10.96.0.1, ports: [{port: 80}, {name: d, port: 53, protocol: UDP}, {name: s, port: 9, protocol: SCTP}]}}`,
			want: &Service{Namespace: "shop", Name: "web", Type: "ClusterIP", ClusterIPs: addrs("10.96.0.1"), Ports: []ServicePort{
				{Protocol: TCP, Port: 80}, {Name: "d", Protocol: UDP, Port: 53}, {Name: "s", Protocol: SCTP, Port: 9},
			}},
		},
		{name: "service with a bad protocol", kind: KindService, doc: `{metadata: {name: web, namespace: shop}, spec: {ports: [{port: 80, protocol: ICMP}]}}`, err: "spec.ports[0]"},
		{
			name: "endpoint slice", kind: KindEndpointSlice,
			doc: `{addressType: IPv4, metadata: {name: w1, namespace: shop, labels: {kubernetes.io/service-name: web}}, ports: [{name: h, port: 80}, {name: all}],
				endpoints: [{addresses: [10.0.0.1, 10.0.0.2], nodeName: n1, conditions: {ready: false}}, {addresses: [10.0.0.3]}]}`,
			want: &EndpointSlice{
				Namespace: "shop", Name: "w1", Service: "web", Ports: []SlicePort{{"h", TCP, 80}},
				Endpoints: []SliceEndpoint{
					{Address: addrs("10.0.0.1")[0], Node: "n1"}, {Address: addrs("10.0.0.3")[0], Ready: true, Serving: true},
				},
			},
		},
		{
			name: "slice of names", kind: KindEndpointSlice,
			doc:  `{addressType: FQDN, metadata: {name: w1, namespace: shop}, endpoints: [{addresses: [a.example]}]}`,
			want: &EndpointSlice{Namespace: "shop", Name: "w1"},
		},
		{name: "slice with an empty endpoint", kind: KindEndpointSlice, doc: `{addressType: IPv4, metadata: {name: w1, namespace: shop}, endpoints: [{addresses: []}]}`, err: "endpoints[0].addresses"},
		{name: "unknown kind", kind: "Secret", doc: `{metadata: {name: a, namespace: b}}`, err: "kind is not known"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, _, err := Decode(tt.kind, toJSON(t, tt.doc))
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Fatalf("error is %v, want %q", err, tt.err)
			}
			if err == nil && !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
		})
	}
}

func TestWorkload(t *testing.T) {
	tests := []struct {
		owner string
		hash  string
		want  Workload
	}{
		{"{kind: ReplicaSet, name: web-5d4}", "5d4", Workload{"Deployment", "web"}},
		{"{kind: ReplicaSet, name: web-5d4}", "other", Workload{"ReplicaSet", "web-5d4"}},
		{"{kind: Job, name: nightly-28391040}", "", Workload{"CronJob", "nightly"}},
		{"{kind: Job, name: once-42}", "", Workload{"Job", "once-42"}},
		{"{kind: Deployment, name: web}", "", Workload{"Deployment", "web"}},
		{"{kind: Node, name: n1, controller: false}, {kind: DaemonSet, name: d, controller: true}", "", Workload{"DaemonSet", "d"}},
		{"", "", Workload{}},
	}
	for _, tt := range tests {
		doc := fmt.Sprintf(`{metadata: {name: a, namespace: b, uid: u, labels: {pod-template-hash: "%s"}, ownerReferences: [%s]}}`, tt.hash, tt.owner)
		o, _, err := Decode(KindPod, toJSON(t, doc))
		if err != nil {
			t.Fatal(err)
		}
		if got := o.(*Pod).Workload; got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.owner, got, tt.want)
		}
	}
}

// FuzzDecode: no bytes make Decode panic, and what it accepts is what the rest relies on.
func FuzzDecode(f *testing.F) {
	for i, doc := range []string{
		`{metadata: {name: n1}, spec: {podCIDRs: [10.244.1.0/24]}, status: {addresses: [{type: InternalIP, address: 172.30.0.11}]}}`,
		`{metadata: {name: shop, labels: {a: b}}}`,
		`{metadata: {name: a, namespace: shop, uid: u, annotations: {weir.dev/ip-addresses: "10.0.0.1"}}, spec: {containers: [{ports: [{name: p, containerPort: 1}]}]}}`,
		`{metadata: {name: web, namespace: shop}, spec: {clusterIPs: [10.96.0.1], ports: [{port: 80}]}}`,
		`{metadata: {name: w, namespace: shop}, ports: [{port: 80}], endpoints: [{addresses: [10.0.0.1]}]}`,
	} {
		f.Add(i, toJSON(f, doc))
	}
	f.Fuzz(func(t *testing.T, kind int, data []byte) {
		kinds := Kinds()
		k := kinds[((kind%len(kinds))+len(kinds))%len(kinds)]
		o, key, err := Decode(k, data)
		if err != nil {
			return
		}
		if o.Key() != key || key.Name == "" {
			t.Errorf("key is %v, the object's %v", key, o.Key())
		}
		switch o := o.(type) {
		case *Pod:
			if o.UID == "" || o.Namespace == "" {
				t.Errorf("accepted %+v", o)
			}
			for _, a := range append(o.FixedAddresses, o.StatusAddresses...) {
				if !a.IsValid() || a.Is4In6() || a.Zone() != "" {
					t.Errorf("accepted address %v", a)
				}
			}
		case *Service:
			for _, p := range o.Ports {
				if p.Port == 0 || p.Protocol == "" {
					t.Errorf("accepted port %+v", p)
				}
			}
		case *EndpointSlice:
			for _, e := range o.Endpoints {
				if !e.Address.IsValid() {
					t.Errorf("accepted endpoint %+v", e)
				}
			}
		}
	})
}
