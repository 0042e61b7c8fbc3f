// SPDX-License-Identifier: Apache-2.0

package random

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"

	"github.com/weirmesh/weir/test/reference"
)

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

const (
	namespaceKey   = "io.kubernetes.pod.namespace"
	namespaceLabel = "io.cilium.k8s.namespace.labels."
	accountKey     = "io.cilium.k8s.policy.serviceaccount"
	clusterKey     = "io.cilium.k8s.policy.cluster"
)

func (g *generator) policies() {
	for i := range g.IntN(3) {
		g.groups = append(g.groups, object{
			"apiVersion": "cilium.io/v2", "kind": "CiliumCIDRGroup", "metadata": object{"name": fmt.Sprintf("g%d", i), "labels": object{"kind": pick(g, "a", "b")}},
			"spec": object{"externalCIDRs": some(g, 1, 3, g.prefix)},
		})
	}
	g.c.Policies = append(g.c.Policies, g.groups...)
	for i := range 2 + g.IntN(6) {
		name := fmt.Sprintf("p%d", i)
		switch n := g.IntN(10); {
		case n < 5:
			g.add(g.cilium("CiliumNetworkPolicy", name, g.namespace()))
		case n < 7:
			g.add(g.cilium("CiliumClusterwideNetworkPolicy", name, ""))
		default:
			g.add(g.networkPolicy(name))
		}
	}
	if g.tiers {
		g.addTiers()
	}
}

func (g *generator) add(o object) { g.c.Policies = append(g.c.Policies, o) }

func (g *generator) namespace() string { return pick(g, g.c.Namespaces...).Name }

func (g *generator) cilium(kind, name, namespace string) object {
	meta := object{"name": name}
	if namespace != "" {
		meta["namespace"] = namespace
	}
	o := object{"apiVersion": "cilium.io/v2", "kind": kind, "metadata": meta}
	if g.chance(80) {
		o["spec"] = g.ciliumRule(namespace)
	}
	if o["spec"] == nil || g.chance(15) {
		o["specs"] = some(g, 1, 2, func() object { return g.ciliumRule(namespace) })
	}
	return o
}

func (g *generator) ciliumRule(namespace string) object {
	spec := object{}
	host := namespace == "" && g.chance(30)
	g.host = host
	if host {
		spec["nodeSelector"] = g.selector([]string{"disk", "zone"})
	} else {
		spec["endpointSelector"] = g.subject(namespace)
	}
	for {
		for _, side := range []reference.Side{reference.Ingress, reference.Egress} {
			if g.chance(60) {
				spec[string(side)] = some(g, 0, 3, func() object { return g.ciliumEntry(side, namespace, false) })
			}
			if g.chance(40) && !(g.requests && g.chance(80)) {
				spec[string(side)+"Deny"] = some(g, 0, 2, func() object { return g.ciliumEntry(side, namespace, true) })
			}
		}
		if g.hasEntries(spec) {
			break
		}
	}
	if g.chance(10) { // no effect
		spec["description"], spec["log"] = "some words", object{"value": "word"}
		spec["labels"] = []any{object{"key": "a", "value": "b", "source": "k8s"}, object{"key": "c"}}
	}
	if g.chance(25) {
		spec["enableDefaultDeny"] = object{pick(g, "ingress", "egress"): g.chance(20)}
	}
	return spec
}

func (g *generator) hasEntries(spec object) bool {
	for _, k := range []string{"ingress", "ingressDeny", "egress", "egressDeny"} {
		if l, ok := spec[k].([]any); ok && len(l) > 0 {
			return true
		}
	}
	return false
}

// subject draws an endpointSelector.
func (g *generator) subject(namespace string) object {
	if g.requests && g.chance(50) {
		return object{}
	}
	if namespace != "" {
		if g.chance(35) {
			return object{}
		}
		s := g.selector(sorted(podLabels))
		if g.chance(8) {
			put(s, pick(g, "k8s:", "k8s:", "any:", "")+namespaceKey, g.namespace())
		}
		return s
	}
	switch g.IntN(6) {
	case 0:
		return object{}
	case 1:
		return object{"matchExpressions": []any{object{"key": namespaceKey, "operator": pick(g, "NotIn", "In"), "values": []any{g.namespace()}}}}
	case 2:
		return object{"matchLabels": object{"reserved:" + pick(g, "init", "health"): ""}}
	}
	s := g.selector(sorted(podLabels))
	if g.chance(30) {
		put(s, namespaceLabel+"env", "prod")
	}
	return s
}

func put(selector object, key, value string) {
	m, ok := selector["matchLabels"].(object)
	if !ok {
		m = object{}
		selector["matchLabels"] = m
	}
	m[key] = value
}

// values of label keys; keys that are not here have none.
var values = map[string][]string{
	"app": podLabels["app"], "tier": podLabels["tier"], "app.kubernetes.io/part-of": {"x", "y"}, "env": {"prod", "dev"}, "team": {"a", "b"},
	"disk": {"ssd", "hdd"}, "zone": {"a", "b"}, "kind": {"a", "b"},
	namespaceKey: {"shop", "dev", "pay"}, namespaceLabel + "env": {"prod", "dev"}, accountKey: {"leia", "default"}, clusterKey: {"default", "east", "west"},
}

// selector draws one over these keys; {} too.
func (g *generator) selector(keys []string) object {
	s := object{}
	if g.chance(15) {
		return s
	}
	for range max(g.IntN(2), g.IntN(2)) + g.IntN(5)/4 {
		k := pick(g, keys...)
		put(s, k, pick(g, values[k]...))
	}
	if s["matchLabels"] == nil || g.chance(25) {
		s["matchExpressions"] = some(g, 1, 2, func() object { return g.expression(pick(g, keys...)) })
	}
	return s
}

func (g *generator) expression(key string) object {
	op := pick(g, "In", "NotIn", "Exists", "DoesNotExist")
	e := object{"key": key, "operator": op}
	if op == "In" || op == "NotIn" {
		e["values"] = some(g, 1, 2, func() string { return pick(g, values[key]...) })
	}
	return e
}

func (g *generator) ciliumEntry(side reference.Side, namespace string, deny bool) object {
	e := object{}
	stem := map[reference.Side]string{reference.Ingress: "from", reference.Egress: "to"}[side]
	if g.chance(85) {
		member, items := g.ciliumPeers(side, namespace)
		if g.requests && !deny && side == reference.Egress && g.chance(20) {
			member, items = "FQDNs", some(g, 0, 2, g.fqdn)
		}
		e[stem+member] = items
	}
	if g.chance(5) && !deny {
		e["authentication"] = object{"mode": "disabled"}
	}
	switch {
	case g.requests && !deny && !g.host && g.chance(60):
		g.widen(e, stem)
		e["toPorts"] = some(g, 1, 2, func() object { return g.layer7Ports(side) })
	case g.chance(55):
		e["toPorts"] = g.toPorts(side, deny)
	case g.chance(20):
		e["icmps"] = some(g, 1, 1, func() object { return object{"fields": some(g, 0, 3, g.icmpField)} })
	}
	return e
}

func (g *generator) ciliumPeers(side reference.Side, namespace string) (member string, items []any) {
	least := 1
	if g.chance(6) {
		least = 0
	}
	most := max(least, 2)
	switch n := g.IntN(23); {
	case n == 22: // nobody provides them
		return "Groups", []any{object{"aws": object{"securityGroupsIds": []any{"sg-1"}, "region": "here"}}}
	case n < 8:
		return "Endpoints", some(g, least, most, func() object { return g.endpointPeer(namespace) })
	case n < 13:
		entities := []string{"all", "world", "host", "remote-node", "kube-apiserver", "cluster", "cluster-mesh", "none", "health", "ingress", "init", "unmanaged"}
		if g.dual { // the families of a single stack's world are open
			entities = append(entities, "world-ipv4", "world-ipv6")
		}
		return "Entities", some(g, least, most, func() string { return pick(g, entities...) })
	case n < 16:
		return "CIDR", some(g, least, most, g.prefix)
	case n < 19:
		return "CIDRSet", some(g, least, most, g.cidrSet)
	case n < 20 && g.c.Config.EnableNodeSelectorLabels:
		return "Nodes", some(g, least, most, func() object { return g.selector([]string{"disk", "zone"}) })
	case n < 22 && side == reference.Egress:
		return "Services", some(g, least, most, g.toService)
	}
	return "Endpoints", some(g, least, most, func() object { return g.endpointPeer(namespace) })
}

func (g *generator) endpointPeer(namespace string) object {
	if g.chance(8) { // reserved:world in dual stack is open
		names := []string{"host", "remote-node", "kube-apiserver", "health"}
		if !g.dual {
			names = append(names, "world")
		}
		key := pick(g, "reserved:", "reserved:", "reserved.") + pick(g, names...)
		if g.chance(25) {
			return object{"matchExpressions": []any{object{"key": key, "operator": pick(g, "Exists", "DoesNotExist")}}}
		}
		s := object{"matchLabels": object{key: ""}}
		if g.chance(20) {
			put(s, "app", "web")
		}
		return s
	}
	s := g.selector(sorted(podLabels))
	source := pick(g, "", "", "k8s:", "any:")
	switch g.IntN(12) {
	case 0, 1:
		put(s, source+namespaceKey, g.namespace())
	case 2:
		extend(s, g.expression(namespaceKey), source)
	case 3, 4:
		extend(s, g.expression(namespaceLabel+"env"), source)
	case 5:
		extend(s, g.expression(accountKey), source)
	case 6:
		extend(s, g.expression(clusterKey), source)
	}
	return s
}

func extend(s, expression object, source string) {
	expression["key"] = source + expression["key"].(string)
	l, _ := s["matchExpressions"].([]any)
	s["matchExpressions"] = append(slices.Clone(l), expression)
}

var (
	prefixes4 = []string{
		"0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "10.1.1.2/32", "172.30.0.0/24", "192.0.2.0/23", "192.0.2.0/24", "192.0.2.64/26",
		"192.0.2.65/32", "198.51.0.0/16", "203.0.113.0/24", "192.0.0.0/8",
	}
	prefixes6 = []string{"::/0", "2001:db8::/32", "2001:db8::/48", "2001:db8::1/128", "2001:db8:1::/48", "2000::/3", "fd00:1::/32", "fd30::/64"}
)

func (g *generator) familyPrefixes() []string {
	switch {
	case g.dual:
		return append(slices.Clone(prefixes4), prefixes6...)
	case g.v4:
		return prefixes4
	}
	return prefixes6
}

// prefix draws one, sometimes with host bits.
func (g *generator) prefix() string {
	p := pick(g, g.familyPrefixes()...)
	if p == "192.0.2.0/24" && g.chance(30) {
		return "192.0.2.77/24"
	}
	return p
}

func (g *generator) cidrSet() object {
	set := object{}
	switch n := g.IntN(10); {
	case n < 7:
		p := g.prefix()
		set["cidr"] = p
		if g.chance(60) {
			set["except"] = g.within(p)
		}
		return set
	case n < 9:
		set["cidrGroupRef"] = pick(g, "g0", "g1", "none")
	default:
		set["cidrGroupSelector"] = g.selector([]string{"kind"})
	}
	if g.chance(40) {
		set["except"] = some(g, 1, 2, g.prefix)
	}
	return set
}

// within draws prefixes in a prefix.
func (g *generator) within(prefix string) []any {
	outer := netip.MustParsePrefix(prefix).Masked()
	out := []any{}
	for _, p := range g.familyPrefixes() {
		inner := netip.MustParsePrefix(p)
		if inner.Bits() > outer.Bits() && outer.Contains(inner.Addr()) && g.chance(40) {
			out = append(out, p)
		}
	}
	return out
}

func (g *generator) toService() object {
	if g.chance(60) {
		s := object{"serviceName": pick(g, "s0", "s1", "none")}
		if g.chance(60) {
			s["namespace"] = g.namespace()
		}
		return object{"k8sService": s}
	}
	s := object{"selector": g.selector([]string{"kind"})}
	if g.chance(50) {
		s["namespace"] = g.namespace()
	}
	return object{"k8sServiceSelector": s}
}

func (g *generator) toPorts(side reference.Side, deny bool) []any {
	return some(g, 0, 2, func() object {
		if g.requests && !deny && !g.host && g.chance(60) {
			return g.layer7Ports(side)
		}
		switch g.IntN(16) {
		case 0:
			return object{}
		case 1:
			return object{"ports": []any{}}
		case 2:
			if !deny { // no rules: plain ports
				port := object{"port": strconv.Itoa(g.port()), "protocol": "TCP"}
				return object{"ports": []any{port}, "rules": pick(g, object{"http": []any{}}, object{})}
			}
		}
		return object{"ports": some(g, 1, 2, g.ciliumPort)}
	})
}

func (g *generator) ciliumPort() object {
	p := object{}
	if g.chance(80) {
		p["protocol"] = pick(g, "TCP", "TCP", "UDP", "SCTP", "ANY", "tcp")
	}
	switch n := g.IntN(12); {
	case n < 1:
		p["port"] = "0"
	case n < 4:
		p["port"] = pick(g, "http", "HTTP", "dns", "none-such")
		if g.chance(10) {
			p["endPort"] = 9000
		}
	case n < 8:
		first, last := g.portRange()
		p["port"], p["endPort"] = strconv.Itoa(first), last
	default:
		p["port"] = strconv.Itoa(g.port())
	}
	return p
}

func (g *generator) port() int {
	n := pick(g, 53, 80, 81, 443, 8080, 8081, 1, 65535)
	g.ports = append(g.ports, n)
	return n
}

func (g *generator) portRange() (first, last int) {
	first = g.port()
	last = min(first+pick(g, -1, 0, 1, 10, 1000, 60000), 65535)
	g.ports = append(g.ports, max(last, 1))
	return first, max(last, 0)
}

func (g *generator) icmpField() object {
	if g.v6 && g.chance(50) {
		if g.chance(40) {
			name := pick(g, reference.ICMPTypes(true)...)
			return object{"family": "IPv6", "type": name}
		}
		n := pick(g, 128, 128, 129, 1, 0)
		g.types = append(g.types, n)
		return object{"family": "IPv6", "type": n}
	}
	n := pick(g, 0, 8, 8, 13, 128)
	g.types = append(g.types, n)
	f := object{"type": n}
	if g.chance(40) {
		f["type"] = pick(g, reference.ICMPTypes(false)...)
	}
	if g.chance(40) {
		f["family"] = "IPv4"
	}
	return f
}
