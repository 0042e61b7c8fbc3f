// SPDX-License-Identifier: Apache-2.0

package random

import (
	"fmt"

	"github.com/weirmesh/weir/test/reference"
)

func (g *generator) networkPolicy(name string) object {
	spec := object{}
	if g.chance(70) {
		spec["podSelector"] = g.selector(sorted(podLabels))
	}
	if g.chance(60) {
		spec["policyTypes"] = pick(g, []any{"Ingress"}, []any{"Egress"}, []any{"Ingress", "Egress"}, []any{})
	}
	for _, side := range []reference.Side{reference.Ingress, reference.Egress} {
		if !g.chance(65) {
			continue
		}
		spec[string(side)] = some(g, 0, 3, func() object {
			rule := object{}
			if g.chance(80) {
				rule[map[reference.Side]string{reference.Ingress: "from", reference.Egress: "to"}[side]] = some(g, 0, 2, g.networkPolicyPeer)
			}
			if g.chance(60) {
				rule["ports"] = some(g, 0, 2, g.networkPolicyPort)
			}
			return rule
		})
	}
	return object{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": object{"name": name, "namespace": g.namespace()}, "spec": spec}
}

func (g *generator) networkPolicyPeer() object {
	switch g.IntN(16) {
	case 0: // invalid, but a lab has no API server that refuses it: selects nobody
		return pick(g, object{}, object{"ipBlock": object{"cidr": g.prefix()}, "podSelector": object{}})
	case 1, 2, 3:
		p := g.prefix()
		block := object{"cidr": p}
		if g.chance(60) {
			block["except"] = g.within(p)
		}
		return object{"ipBlock": block}
	case 4, 5, 6:
		return object{"namespaceSelector": g.namespaceSelector()}
	case 7, 8, 9:
		return object{"namespaceSelector": g.namespaceSelector(), "podSelector": g.selector(sorted(podLabels))}
	}
	s := g.selector(sorted(podLabels))
	if g.mesh && g.chance(20) {
		put(s, clusterKey, "west")
	}
	return object{"podSelector": s}
}

func (g *generator) namespaceSelector() object {
	if g.chance(25) {
		return object{"matchLabels": object{"kubernetes.io/metadata.name": g.namespace()}}
	}
	return g.selector([]string{"env", "team"})
}

func (g *generator) networkPolicyPort() object {
	p := object{}
	if g.chance(70) {
		p["protocol"] = pick(g, "TCP", "UDP", "SCTP")
	}
	switch n := g.IntN(10); {
	case n < 1:
	case n < 4:
		p["port"] = pick(g, "http", "dns", "none-such")
	case n < 7:
		first, last := g.portRange()
		p["port"], p["endPort"] = first, max(first, last)
	default:
		p["port"] = g.port()
	}
	return p
}

// addTiers adds cluster-wide policies: priorities differ, since equal ones are in any order.
func (g *generator) addTiers() {
	for i := range g.IntN(4) {
		spec := object{"priority": 10 + i*pick(g, 1, 7), "subject": g.tierPods()}
		if g.chance(3) { // a newer schema's
			spec["subject"] = object{"galaxies": object{}}
		}
		g.tier(fmt.Sprintf("admin%d", i), "Admin", spec)
	}
	if g.chance(60) {
		g.tier("base", "Baseline", object{"priority": 10, "subject": g.tierPods()})
	}
}

// tier draws the newer or the older kind.
func (g *generator) tier(name, tier string, spec object) {
	older := g.chance(30)
	o := object{"kind": "ClusterNetworkPolicy", "apiVersion": "policy.networking.k8s.io/v1alpha2", "metadata": object{"name": name}, "spec": spec}
	switch {
	case !older:
		spec["tier"] = tier
	case tier == "Admin":
		o["kind"], o["apiVersion"] = "AdminNetworkPolicy", "policy.networking.k8s.io/v1alpha1"
	default:
		o["kind"], o["apiVersion"], o["metadata"] = "BaselineAdminNetworkPolicy", "policy.networking.k8s.io/v1alpha1", object{"name": "default"}
		delete(spec, "priority")
	}
	for _, side := range []reference.Side{reference.Ingress, reference.Egress} {
		if g.chance(70) {
			spec[string(side)] = some(g, 1, 3, func() object { return g.tierRule(side, tier, older) })
		}
	}
	g.add(o)
}

func (g *generator) tierRule(side reference.Side, tier string, older bool) object {
	accept := "Accept"
	if older {
		accept = "Allow"
	}
	r := object{"action": pick(g, accept, "Deny", "Pass")}
	if older && tier == "Baseline" {
		r["action"] = pick(g, accept, "Deny")
	}
	named := true
	r[map[reference.Side]string{reference.Ingress: "from", reference.Egress: "to"}[side]] = some(g, 1, 2, func() object {
		switch n := g.IntN(20); {
		case !older && n == 19: // a newer schema's
			named = false
			return object{"galaxies": object{}}
		case side == reference.Egress && n < 6:
			named = false // names of ports go with pods only
			return object{"networks": some(g, 1, 2, func() string { return pick(g, g.familyPrefixes()...) })}
		case side == reference.Egress && n < 8 && g.c.Config.EnableNodeSelectorLabels:
			named = false
			return object{"nodes": g.selector([]string{"disk", "zone"})}
		}
		return g.tierPods()
	})
	switch {
	case g.chance(40):
	case older:
		r["ports"] = some(g, 1, 2, func() object { return g.olderPort(named) })
	default:
		r["protocols"] = some(g, 1, 2, func() object { return g.tierProtocol(named) })
	}
	return r
}

// tierPods draws a subject or peer.
func (g *generator) tierPods() object {
	if g.chance(60) {
		return object{"namespaces": g.namespaceSelector()}
	}
	return object{"pods": object{"namespaceSelector": g.namespaceSelector(), "podSelector": g.selector(sorted(podLabels))}}
}

func (g *generator) tierProtocol(named bool) object {
	if named && g.chance(25) {
		return object{"destinationNamedPort": pick(g, "http", "dns")}
	}
	if g.chance(8) { // refused by the schema; if met, all ports
		return object{pick(g, "tcp", "udp", "sctp"): object{}}
	}
	port := object{}
	if first, last := g.portRange(); first < last {
		port["range"] = object{"start": first, "end": last}
	} else {
		port["number"] = first
	}
	return object{pick(g, "tcp", "tcp", "udp", "sctp"): object{"destinationPort": port}}
}

func (g *generator) olderPort(named bool) object {
	if named && g.chance(25) {
		return object{"namedPort": pick(g, "http", "dns")}
	}
	protocol := pick(g, "TCP", "TCP", "UDP", "SCTP")
	if first, last := g.portRange(); first < last {
		return object{"portRange": object{"protocol": protocol, "start": first, "end": last}}
	} else {
		return object{"portNumber": object{"protocol": protocol, "port": first}}
	}
}
