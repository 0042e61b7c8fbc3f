// SPDX-License-Identifier: Apache-2.0

package random

import (
	"math/rand/v2"
	"net/netip"
	"strconv"

	"github.com/weirmesh/weir/test/reference"
)

// NewRequests makes the world of a seed whose policies speak of requests, names and server names too, with a request on each packet. Its packets, too, are
// others than those of New.
func NewRequests(seed uint64, packets int) *World {
	g := &generator{Rand: rand.New(rand.NewPCG(seed, 0x77656972_37)), c: &reference.Cluster{}, requests: true}
	g.cluster()
	g.annotations()
	g.policies()
	g.learnt()
	w := &World{Seed: seed, Cluster: g.c}
	for range packets {
		p := g.packet()
		if g.chance(70) {
			p.Protocol, p.Code = "TCP", 0
			p.Port = pick(g, 80, 80, 8080, 8081, 443, 443, 53)
			if g.chance(25) {
				p.Protocol, p.Port = pick(g, "UDP", "TCP"), 53
			}
		}
		w.Packets = append(w.Packets, p)
		w.Requests = append(w.Requests, g.request(p))
	}
	return w
}

// request draws one that goes with a port, mostly.
func (g *generator) request(p reference.Packet) reference.Request {
	kind := "http"
	switch p.Port {
	case 53:
		kind = "dns"
	case 443:
		kind = "tls"
	}
	if g.chance(10) {
		kind = pick(g, "http", "dns", "tls")
	}
	switch kind {
	case "http":
		return reference.Request{HTTP: g.httpRequest()}
	case "dns":
		return reference.Request{DNS: &reference.DNSQuery{Name: g.name()}}
	}
	if hello := g.hello(); hello != nil {
		return reference.Request{TLS: hello}
	}
	return reference.Request{HTTP: g.httpRequest()}
}

func (g *generator) annotations() {
	for i := range g.c.Pods {
		if !g.chance(70) {
			continue
		}
		g.c.Pods[i].Annotations = map[string]string{
			pick(g, "policy.cilium.io/proxy-visibility", "io.cilium.proxy-visibility"): pick(g,
				"<egress/53/UDP/DNS>,<ingress/80/TCP/HTTP>", "<egress/53/UDP/DNS>,<ingress/8080/TCP/HTTP>,<egress/8081/TCP/HTTP>",
				"<Ingress/80/ANY/HTTP>", "<Egress/53/ANY/dns>, <Egress/80/TCP/HTTP>", "<ingress/443/TCP/HTTP>,<ingress/443/TCP/Kafka>",
				"<ingress/53/UDP/DNS>", "<ingress/8080/TCP/Kafka>", "<egress/443/tcp/http>,<egress/8080/UDP/HTTP>", "true", ""),
		}
	}
}

// learnt gives addresses outside some names.
func (g *generator) learnt() {
	for range g.IntN(8) {
		g.c.Learnt = append(g.c.Learnt, reference.Learnt{Node: pick(g, g.c.Nodes...).Name, Name: g.name(), Addr: netip.MustParseAddr(g.address())})
	}
}

// widen has an entry reach many peers, mostly: what rules say of requests is seen where they meet.
func (g *generator) widen(entry object, stem string) {
	if g.chance(25) {
		return
	}
	for k := range entry {
		if k != "authentication" {
			delete(entry, k)
		}
	}
	switch g.IntN(5) {
	case 0:
		entry[stem+"Endpoints"] = []any{object{}}
	case 1:
		entry[stem+"Entities"] = []any{pick(g, "all", "cluster", "world")}
	case 2:
		entry[stem+"Entities"] = []any{"cluster", "world"}
	case 3:
		entry[stem+"CIDR"] = some(g, 1, 2, g.prefix)
	}
}

// layer7Ports draws a toPorts entry with rules for requests, of a kind that goes with the port, mostly: one of two kinds on a port is a conflict.
func (g *generator) layer7Ports(side reference.Side) object {
	kind := pick(g, "http", "http", "tls", "dns")
	ports := map[string][]string{"http": {"80", "80", "8080", "8081", "http"}, "tls": {"443"}, "dns": {"53", "53", "dns"}}[kind]
	if g.chance(6) {
		ports = []string{"80", "443", "53", "8080"}
	}
	if kind == "dns" && side == reference.Ingress {
		kind, ports = "http", []string{"80"}
	}
	port := object{"port": pick(g, ports...), "protocol": "TCP"}
	if n, err := strconv.Atoi(port["port"].(string)); err == nil && kind != "dns" && g.chance(25) {
		port["endPort"] = n + pick(g, -1, 0, 1, 2, 400)
	}
	entry := object{"ports": []any{port}}
	switch kind {
	case "http":
		entry["rules"] = object{"http": some(g, 0, 3, g.httpRule)}
		if g.chance(10) {
			entry["rules"] = object{"http": []any{object{}}}
		}
	case "dns":
		port["protocol"] = pick(g, "UDP", "ANY", "TCP")
		if g.chance(20) {
			delete(port, "protocol")
		}
		entry["rules"] = object{"dns": some(g, 0, 3, g.dnsRule)}
	default:
		if g.chance(15) {
			port["protocol"] = "ANY"
		}
		entry["serverNames"] = some(g, 0, 2, g.serverName)
	}
	return entry
}

// fqdn draws an item of toFQDNs.
func (g *generator) fqdn() object {
	if g.chance(40) {
		return object{"matchName": g.name()}
	}
	return object{"matchPattern": g.pattern()}
}
