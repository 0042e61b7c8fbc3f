// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/weirmesh/weir/test/reference"
)

// knownWorld is around the policies of known disagreements.
const knownWorld = `
nodes: [{name: n1, ip: 172.30.0.11}, {name: n2, ip: 172.30.0.12}]
namespaces: [{name: shop}]
pods:
- {name: a, namespace: shop, node: n1, ip: 10.1.1.2, labels: {app: a}}
- {name: b, namespace: shop, node: n2, ip: 10.1.2.3, labels: {app: b}}
- {name: far, namespace: shop, node: n2, ip: 10.1.2.4, labels: {app: b}, cluster: west}
services: [{name: s, namespace: shop, selector: {app: b}}]
`

// TestKnown holds what the two sides once read differently, made small, with what the page says.
func TestKnown(t *testing.T) {
	n := newNode(t)
	const knp, cnp = `{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p, namespace: shop}, spec: `,
		`{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p, namespace: shop}, spec: `
	const base = `{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, metadata: {name: q}, spec: {tier: Baseline, priority: 1, subject: {namespaces: {}}, `
	for _, c := range []struct {
		name, config, policies, to string
		want                       reference.Verdict // of the egress of shop/a
	}{
		{"peers of a NetworkPolicy are local, whatever the option says (13)", `{policy_default_local_cluster: false}`,
			knp + `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{podSelector: {}}]}]}}`, "shop/far", reference.DefaultDeny},
		{"services reach as endpoints do (8.1)", `{policy_default_local_cluster: false}`,
			cnp + `{endpointSelector: {}, egress: [{toServices: [{k8sService: {serviceName: s}}]}]}}`, "shop/far", reference.Allow},
		{"and not by default", `{}`,
			cnp + `{endpointSelector: {}, egress: [{toServices: [{k8sService: {serviceName: s}}]}]}}`, "shop/far", reference.DefaultDeny},
		{"an empty peer of a NetworkPolicy selects nobody (13)", `{}`,
			knp + `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{}]}]}}`, "shop/b", reference.DefaultDeny},
		{"a block beside a selector, too", `{policy_cidr_match_mode: [pods]}`,
			knp + `{podSelector: {}, policyTypes: [Egress], egress: [{to: [{podSelector: {}, ipBlock: {cidr: 0.0.0.0/0}}]}]}}`, "shop/b", reference.DefaultDeny},
		{"a subject of a newer schema: Deny is for all (17)", `{}`,
			`{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, metadata: {name: p}, spec: {tier: Admin, priority: 1, subject: {galaxies: {}}, egress: [{action: Pass, to: [{namespaces: {}}]}]}}`,
			"shop/b", reference.Deny},
		{"the switch off allows beneath the Baseline tier (4, 18)", `{}`,
			cnp + `{endpointSelector: {}, enableDefaultDeny: {egress: false}, egress: [{}]}}` + "\n- " + base + `egress: [{action: Deny, to: [{namespaces: {}}]}]}}`, "shop/b", reference.Deny},
		{"what it allows by a rule, it allows", `{}`,
			cnp + `{endpointSelector: {}, enableDefaultDeny: {egress: false}, egress: [{toEndpoints: [{}]}]}}` + "\n- " + base + `egress: [{action: Deny, to: [{namespaces: {}}]}]}}`, "shop/b", reference.Allow},
	} {
		var cluster reference.Cluster
		if err := yaml.Unmarshal([]byte(knownWorld+"config: "+c.config+"\npolicies:\n- "+c.policies+"\n"), &cluster); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		s := scenario{cluster: &cluster, packets: []reference.Packet{{From: "shop/a", To: c.to, Protocol: "TCP", Port: 80}}}
		if egress, _ := cluster.Decide(s.packets[0]); egress != c.want {
			t.Errorf("%s: the reference says %v, want %v", c.name, egress, c.want)
		}
		for side, look := range map[string]comparison{"compiler": compilerFault, "datapath": n.fault} {
			if f := look(s, nil); f != nil {
				t.Errorf("%s: %s: %s", c.name, side, f.text)
			}
		}
	}
}
