// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/internal/labelset"
)

// Whoever a term matches has one of its anchors.
func TestAnchors(t *testing.T) {
	peers := []*Peer{
		{Labels: labelset.Set{"k8s:app=web", "k8s:io.cilium.k8s.policy.cluster=default", "k8s:io.kubernetes.pod.namespace=shop"}},
		{Labels: labelset.Set{"k8s:app=api", "k8s:io.cilium.k8s.policy.cluster=default", "k8s:io.kubernetes.pod.namespace=other"}},
		{Labels: labelset.Set{"reserved:host"}},
		{Labels: labelset.Set{"reserved:kube-apiserver", "reserved:remote-node"}},
		{Labels: labelset.Set{"k8s:io.cilium.k8s.policy.cluster=default", "node:zone=a", "reserved:remote-node"}},
		{Labels: labelset.Set{"reserved:health"}},
		{Labels: labelset.Set{"reserved:world"}},
		{Labels: labelset.Set{"reserved:world-ipv6"}, Prefix: netip.MustParsePrefix("::/0")},
		{Labels: labelset.Set{"cidr:10.1.0.0/16", "reserved:world"}, Prefix: netip.MustParsePrefix("10.1.0.0/16")},
	}
	entries := []string{
		"fromEndpoints: [{}]", "fromEndpoints: [{matchLabels: {app: web}}]",
		"fromEndpoints: [{matchExpressions: [{key: app, operator: In, values: [web, api]}, {key: io.kubernetes.pod.namespace, operator: Exists}]}]",
		"fromEndpoints: [{matchExpressions: [{key: app, operator: NotIn, values: [web]}]}]", "fromEndpoints: [{matchExpressions: [{key: any:app, operator: Exists}]}]",
		"fromEndpoints: [{matchLabels: {\"reserved:host\": \"\"}}]", "fromEndpoints: [{matchExpressions: [{key: reserved:host, operator: DoesNotExist}]}]",
		"fromEntities: [world]", "fromEntities: [world-ipv6]", "fromEntities: [cluster]", "fromEntities: [kube-apiserver]", "fromEntities: [remote-node, health]",
		"fromCIDR: [10.0.0.0/8]", "fromCIDRSet: [{cidr: 0.0.0.0/0, except: [10.1.0.0/16]}]",
		"fromNodes: [{matchLabels: {zone: a}}]", "fromNodes: [{}]",
	}
	matched := 0
	for _, scope := range []string{"kind: CiliumNetworkPolicy\nmetadata: {name: p, namespace: shop}", "kind: CiliumClusterwideNetworkPolicy\nmetadata: {name: p}"} {
		for _, entry := range entries {
			for _, pods := range []bool{false, true} {
				o := Options{NodeSelectorLabels: true, CIDRMatchesPods: pods}
				object, err := Parse(fmt.Appendf(nil, "apiVersion: cilium.io/v2\n%s\nspec: {endpointSelector: {}, ingress: [{%s}]}\n", scope, entry), o)
				if err != nil {
					t.Fatalf("%s: %v", entry, err)
				}
				r, err := Resolve(o, &Subject{Labels: peers[0].Labels}, Ingress, object.Rules, nil)
				if err != nil {
					t.Fatal(err)
				}
				for _, term := range r.Terms {
					anchors := term.Anchors()
					if outside, ok := term.Outside(); ok {
						for _, p := range peers {
							if term.Matches(p) && p.Prefix.IsValid() && !slices.ContainsFunc(outside, func(o netip.Prefix) bool {
								return o.Bits() <= p.Prefix.Bits() && o.Contains(p.Prefix.Addr())
							}) {
								t.Errorf("%s matches %v, which lies in none of %v", term.Key, p.Prefix, outside)
							}
						}
					}
					for _, p := range peers {
						if !term.Matches(p) || anchors == nil {
							continue
						}
						matched++
						if !slices.ContainsFunc(p.Labels, func(l string) bool {
							_, l, _ = strings.Cut(l, ":")
							key, value, _ := strings.Cut(l, "=")
							return slices.Contains(anchors, key) || slices.Contains(anchors, key+"="+value)
						}) {
							t.Errorf("%s (%s) matches %v, which has none of %v", entry, term.Key, p.Labels, anchors)
						}
					}
				}
			}
		}
	}
	if matched < 20 {
		t.Errorf("only %d matches were looked at", matched)
	}
}
