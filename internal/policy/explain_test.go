// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weirmesh/weir/internal/labelset"
)

func TestExplain(t *testing.T) {
	named := func(doc, name string) string { return strings.Replace(doc, "name: p", "name: "+name, 1) }
	adminTier := func(rules string) string {
		return named(cluster("{tier: Admin, priority: 1, subject: {namespaces: {}}, ingress: ["+rules+"]}"), "first")
	}
	cli := &Peer{Labels: podLabels("shop", "cli")}
	world := &Peer{Labels: labelset.Set{"cidr:10.0.0.0/8", "reserved:world"}, Prefix: netip.MustParsePrefix("10.0.0.0/8")}
	host := &Peer{Labels: labelset.Set{"reserved:host"}}
	db := named(in(`{fromEndpoints: [{matchLabels: {app: db}}], toPorts: [{ports: [{port: "80", endPort: 90, protocol: TCP}]}]}`), "db")
	far := named(in(`{fromEndpoints: [{matchLabels: {app: cli}}], toPorts: [{ports: [{port: "443", protocol: TCP}]}]}`), "far")
	tests := []struct {
		name    string
		peer    *Peer
		docs    []string
		nearest int
		want    []string // "rule peer port decided: reason"
	}{
		{"allowed", cli, []string{in("{fromEndpoints: [{}]}")}, -1, []string{
			"CiliumNetworkPolicy shop/p ingress[0] true true true: it allows",
			"allow-localhost false true false: the peer is not the local node",
		}},
		{"missed", cli, []string{db, far, named(in("{}"), "none"), named(in("{fromEntities: []}"), "void"), named(inDeny("{}"), "odd")}, 1, []string{
			"CiliumNetworkPolicy shop/db ingress[0] false true false: app=db is wanted, and the peer has k8s:app=cli",
			"CiliumNetworkPolicy shop/far ingress[0] true false false: the port is not among 443/TCP",
			"CiliumNetworkPolicy shop/none ingress[0] false false false: it names neither peer nor port, so it allows nothing",
			"CiliumNetworkPolicy shop/odd ingressDeny[0] false false false: it names neither peer nor port, so it denies nothing",
			"CiliumNetworkPolicy shop/void ingress[0] false true false: it selects no peer",
			"allow-localhost false true false: the peer is not the local node",
		}},
		{"nearest by label", cli, []string{db, named(in("{fromEntities: [host]}"), "host")}, 0, []string{
			"CiliumNetworkPolicy shop/db ingress[0] false true false: app=db is wanted, and the peer has k8s:app=cli",
			"CiliumNetworkPolicy shop/host ingress[0] false true false: the peer is not among entity host",
			"allow-localhost false true false: the peer is not the local node",
		}},
		{"beaten", cli, []string{in("{fromEndpoints: [{}]}"), named(inDeny(`{toPorts: [{ports: [{port: "80", protocol: TCP}]}]}`), "never")}, -1, []string{
			"CiliumNetworkPolicy shop/never ingressDeny[0] true true true: it denies",
			"CiliumNetworkPolicy shop/p ingress[0] true true false: it would allow, but is beaten by the deny rule CiliumNetworkPolicy shop/never ingressDeny[0]",
			"allow-localhost false true false: the peer is not the local node",
		}},
		{"local node", host, []string{in("{}")}, -1, []string{
			"CiliumNetworkPolicy shop/p ingress[0] false false false: it names neither peer nor port, so it allows nothing",
			"allow-localhost true true true: the local node may always reach its pods",
		}},
		{"local node by rule", host, []string{in("{fromEntities: [host]}")}, -1, []string{
			"CiliumNetworkPolicy shop/p ingress[0] true true true: it allows",
			"allow-localhost true true false: not needed: CiliumNetworkPolicy shop/p ingress[0] allows",
		}},
		{"prefix", world, []string{in("{fromCIDRSet: [{cidr: 10.1.0.0/16, except: [10.1.1.0/24, 10.1.2.0/24]}]}"), named(in("{fromEndpoints: [{}]}"), "all")}, 1, []string{
			"CiliumNetworkPolicy shop/all ingress[0] false true false: k8s:io.kubernetes.pod.namespace=shop is wanted, and the peer has no io.kubernetes.pod.namespace; " +
				"k8s:io.cilium.k8s.policy.cluster=default is wanted, and the peer has no io.cilium.k8s.policy.cluster",
			"CiliumNetworkPolicy shop/p ingress[0] false true false: the peer is not among CIDR 10.1.0.0/16 except 10.1.1.0/24 10.1.2.0/24",
			"allow-localhost false true false: the peer is not the local node",
		}},
		{"tiers", cli, []string{
			adminTier("{action: Pass, from: [{namespaces: {}}]}, {action: Deny, from: [{namespaces: {}}]}"), in("{fromEndpoints: [{}]}"),
		}, -1, []string{
			"ClusterNetworkPolicy first ingress[0] true true false: it passes the decision to the next tier",
			"ClusterNetworkPolicy first ingress[1] true true false: not asked: an earlier rule of its tier passed the decision on",
			"CiliumNetworkPolicy shop/p ingress[0] true true true: it allows",
			"allow-localhost false true false: the peer is not the local node",
		}},
		{"decided by an admin", cli, []string{
			adminTier("{action: Deny, from: [{namespaces: {}}]}, {action: Accept, from: [{namespaces: {}}]}"), in("{fromEndpoints: [{}]}"),
		}, -1, []string{
			"ClusterNetworkPolicy first ingress[0] true true true: it denies",
			"ClusterNetworkPolicy first ingress[1] true true false: not asked: ClusterNetworkPolicy first ingress[0] comes first in its tier",
			"CiliumNetworkPolicy shop/p ingress[0] true true false: not asked: ClusterNetworkPolicy first ingress[0] decided in an earlier tier",
			"allow-localhost false true false: the peer is not the local node",
		}},
		{"passed, and default deny", cli, []string{adminTier("{action: Pass, from: [{namespaces: {}}]}"), in("{}")}, -1, []string{
			"ClusterNetworkPolicy first ingress[0] true true false: it passes the decision to the next tier",
			"CiliumNetworkPolicy shop/p ingress[0] false false false: it names neither peer nor port, so it allows nothing",
			"allow-localhost false true false: the peer is not the local node",
		}},
		{"baseline under default deny", cli, []string{in("{}"), named(cluster("{tier: Baseline, priority: 1, subject: {namespaces: {}}, ingress: [{action: Accept, from: [{namespaces: {}}]}]}"), "base")}, -1, []string{
			"CiliumNetworkPolicy shop/p ingress[0] false false false: it names neither peer nor port, so it allows nothing",
			"allow-localhost false true false: the peer is not the local node",
			"ClusterNetworkPolicy base ingress[0] true true false: not asked: the endpoint is in default deny, which is final",
		}},
		{"nothing decides", cli, []string{adminTier("{action: Deny, from: [{namespaces: {matchLabels: {a: b}}}]}")}, -1, []string{
			"ClusterNetworkPolicy first ingress[0] false true false: k8s:io.cilium.k8s.namespace.labels.a=b is wanted, and the peer has no io.cilium.k8s.namespace.labels.a",
			"default-allow true true true: no rule matches, and nothing puts the endpoint in default deny",
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := resolve(t, Options{}, web(), Ingress, tt.docs...)
			x := r.Explain(tt.peer, TCP, 80)
			var got []string
			for _, s := range x.Steps {
				got = append(got, fmt.Sprintf("%s %t %t %t: %s", r.Rules[s.Rule], s.PeerMatches, s.PortMatches, s.Decided, s.Reason))
			}
			if strings.Join(got, "\n") != strings.Join(tt.want, "\n") {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
			if x.Nearest != tt.nearest {
				t.Errorf("nearest %d, want %d", x.Nearest, tt.nearest)
			}
		})
	}
}
