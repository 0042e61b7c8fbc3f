// SPDX-License-Identifier: Apache-2.0

// Package random makes worlds for policy: a cluster, valid policies of all kinds, and packets. A seed gives the same world always. What it makes is
// biased towards what goes wrong: few label values, so that selectors overlap; ports at the edges of ranges; prefixes in one another; empty lists.
//
// It keeps away from what the semantics page leaves open, each place says so with the word "open".
package random

import (
	"fmt"
	"math/rand/v2"

	"github.com/weirmesh/weir/test/reference"
)

// World is a cluster with its policies, and packets in it.
type World struct {
	Seed    uint64
	Cluster *reference.Cluster
	Packets []reference.Packet
	// Requests on the packets' connections, one for each; none in worlds of New.
	Requests []reference.Request
	// Next are policies that take the place of those of the cluster.
	Next []map[string]any
}

// New makes the world of a seed, with so many packets.
func New(seed uint64, packets int) *World {
	g := &generator{Rand: rand.New(rand.NewPCG(seed, 0x77656972)), c: &reference.Cluster{}}
	g.cluster()
	g.policies()
	w := &World{Seed: seed, Cluster: g.c}
	for range packets {
		w.Packets = append(w.Packets, g.packet())
	}
	first := g.c.Policies
	g.c.Policies, g.groups = nil, nil
	g.policies()
	w.Next, g.c.Policies = g.c.Policies, first
	return w
}

type object = map[string]any

type generator struct {
	*rand.Rand
	c      *reference.Cluster
	ports  []int // that policies named
	types  []int // of ICMP
	dual   bool
	v4, v6 bool
	groups []object
	// tiers and mesh: what open questions need to know.
	tiers, mesh bool
	// requests: policies speak of them; host: not this one, which is for nodes.
	requests, host bool
	// acted are the headers that rules for requests change.
	acted []string
}

func (g *generator) chance(percent int) bool { return g.IntN(100) < percent }

func pick[T any](g *generator, of ...T) T { return of[g.IntN(len(of))] }

// some returns n to m draws.
func some[T any](g *generator, n, m int, draw func() T) []any {
	out := []any{}
	for range n + g.IntN(m-n+1) {
		out = append(out, any(draw()))
	}
	return out
}

func (g *generator) cluster() {
	g.config()
	for _, name := range []string{"shop", "dev", "pay"}[:2+g.IntN(2)] {
		g.c.Namespaces = append(g.c.Namespaces, reference.Namespace{Name: name, Labels: g.labels(map[string][]string{
			"env": {"prod", "dev"}, "team": {"a", "b"},
		})})
	}
	for i := range 2 + g.IntN(2) {
		n := reference.Node{Name: fmt.Sprintf("n%d", i+1), Labels: g.labels(map[string][]string{"disk": {"ssd", "hdd"}, "zone": {"a", "b"}})}
		if g.v4 {
			n.IP = fmt.Sprintf("172.30.0.%d", 11+i)
		}
		if g.v6 {
			n.IP6 = fmt.Sprintf("fd30::%d", 11+i)
		}
		n.KubeAPIServer = g.chance(25)
		g.c.Nodes = append(g.c.Nodes, n)
	}
	g.mesh = !g.tiers && g.chance(15)
	for i := range 4 + g.IntN(4) {
		g.c.Pods = append(g.c.Pods, g.pod(i))
	}
	for i := range g.IntN(3) {
		g.c.Services = append(g.c.Services, g.service(i))
	}
	for _, a := range []string{"192.0.2.65", "203.0.113.9"} {
		if g.chance(40) && g.v4 {
			g.c.Externals = append(g.c.Externals, reference.External{IP: a, KubeAPIServer: g.chance(70)})
		}
	}
}

func (g *generator) config() {
	f := &g.c.Config
	switch g.IntN(10) {
	case 0, 1:
		f.IPFamilies, g.v4 = []string{"IPv4"}, true
	case 2:
		f.IPFamilies, g.v6 = []string{"IPv6"}, true
	default:
		f.IPFamilies, g.v4, g.v6, g.dual = []string{"IPv4", "IPv6"}, true, true, true
	}
	g.tiers = g.chance(35)
	f.SCTP = true
	f.HostFirewall = g.chance(35)
	f.EnableNodeSelectorLabels = g.chance(35)
	if g.chance(15) {
		f.AllowLocalhost = "policy"
	}
	if g.chance(12) {
		f.PolicyEnforcement = pick(g, "always", "always", "always", "never")
	}
	f.PolicyAuditMode = g.chance(8)
	no := false
	if g.chance(10) {
		f.EnableNonDefaultDenyPolicies = &no
	}
	if g.chance(10) {
		f.PolicyDefaultLocalCluster = &no
	}
	if g.chance(10) {
		f.ClusterName = "east"
	}
	if g.chance(20) {
		f.PolicyCIDRMatchMode = pick(g, []string{"pods"}, []string{"nodes"}, []string{"nodes", "pods"})
	}
}

// labels draws a value, or none, for each key.
func (g *generator) labels(keys map[string][]string) map[string]string {
	out := map[string]string{}
	for _, k := range sorted(keys) {
		if values := keys[k]; g.chance(75) {
			out[k] = pick(g, values...)
		}
	}
	return out
}

var podLabels = map[string][]string{"app": {"web", "api", "db"}, "tier": {"front", "back", ""}, "app.kubernetes.io/part-of": {"x", "y"}}

func (g *generator) pod(i int) reference.Pod {
	p := reference.Pod{
		Name: fmt.Sprintf("p%d", i), Namespace: pick(g, g.c.Namespaces...).Name, Labels: g.labels(podLabels),
		Node: pick(g, "n1", "n1", "n1", "n2"), ServiceAccount: pick(g, "", "", "leia", "han"),
	}
	if g.chance(10) {
		p.HostNetwork = true
		return p
	}
	foreign := g.mesh && i > 2 && g.chance(30)
	if foreign {
		p.Cluster, p.Node = "west", "n2"
	}
	if g.v4 {
		p.IP = fmt.Sprintf("10.1.%d.%d", p.Node[1]-'0', 2+i)
	}
	if g.v6 {
		p.IP6 = fmt.Sprintf("fd00:1:%d::%d", p.Node[1]-'0', 2+i)
	}
	if foreign {
		return p
	}
	for _, name := range []string{"http", "dns"} {
		if g.chance(60) {
			p.Ports = append(p.Ports, reference.Port{Name: name, Port: pick(g, 53, 80, 8080, 8081), Protocol: pick(g, "TCP", "TCP", "UDP", "")})
		}
	}
	return p
}

func (g *generator) service(i int) reference.Service {
	s := reference.Service{Name: fmt.Sprintf("s%d", i), Namespace: pick(g, g.c.Namespaces...).Name, Labels: g.labels(map[string][]string{"kind": {"a", "b"}})}
	if g.chance(70) {
		s.Selector = map[string]string{"app": pick(g, "web", "api", "db")}
		return s
	}
	for range 1 + g.IntN(2) {
		s.Endpoints = append(s.Endpoints, g.address())
	}
	return s
}

// address of anybody: outside mostly.
func (g *generator) address() string {
	if g.v6 && (!g.v4 || g.chance(40)) {
		return pick(g, "2001:db8::1", "2001:db8::1:1", "2001:db8:1::1", "2001:db9::1", "fd00:1:1::77", "fd30::77")
	}
	return pick(g, "192.0.2.1", "192.0.2.64", "192.0.2.65", "192.0.2.127", "192.0.3.1", "198.51.100.7", "203.0.113.9", "10.1.1.200", "10.9.9.9", "172.30.0.200")
}

func (g *generator) packet() reference.Packet {
	var p reference.Packet
	for p.From == p.To {
		p.From, p.To = g.end(), g.end()
		if g.chance(70) { // at least one end is a pod
			p.To = g.podName()
		} else if g.chance(50) {
			p.From = g.podName()
		}
		p.V6 = g.v6 && (!g.v4 || g.chance(40))
		p.From, p.To = g.ofFamily(p.From, p.V6), g.ofFamily(p.To, p.V6)
	}
	switch protocol := g.IntN(10); {
	case protocol < 5:
		p.Protocol = "TCP"
	case protocol < 7:
		p.Protocol = "UDP"
	case protocol < 8:
		p.Protocol = "SCTP"
	case p.V6:
		p.Protocol = "ICMPv6"
	default:
		p.Protocol = "ICMP"
	}
	if p.Protocol == "ICMP" || p.Protocol == "ICMPv6" {
		p.Port = pick(g, append([]int{0, 3, 8, 8, 13, 128, 128}, g.types...)...)
		if g.chance(20) {
			p.Port = g.IntN(256)
		}
		if p.V6 && p.Port == 2 {
			p.Port = 1 // packet-too-big always passes, before policy is asked
		}
		return p
	}
	p.Port = pick(g, append([]int{53, 80, 8080, 65535}, g.ports...)...) + pick(g, 0, 0, 0, 1, -1)
	p.Port = min(max(p.Port, 1), 65535)
	return p
}

func (g *generator) podName() string {
	p := pick(g, g.c.Pods...)
	if p.HostNetwork { // once more: its node is drawn often enough
		p = pick(g, g.c.Pods...)
	}
	return p.Namespace + "/" + p.Name
}

// end draws an end; an outside address is drawn when the family is known.
func (g *generator) end() string {
	switch n := g.IntN(20); {
	case n < 12:
		return g.podName()
	case n < 15:
		return "node:" + pick(g, g.c.Nodes...).Name
	case n < 17:
		return "entity:" + pick(g, "health", "ingress", "init", "unmanaged")
	}
	return "ip:"
}

func (g *generator) ofFamily(end string, v6 bool) string {
	if end != "ip:" {
		return end
	}
	for {
		a := g.address()
		if (len(a) > 4 && a[4] == ':') == v6 {
			return end + a
		}
	}
}
