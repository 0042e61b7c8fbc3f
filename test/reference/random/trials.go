// SPDX-License-Identifier: Apache-2.0

package random

import (
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/weirmesh/weir/test/reference"
)

// asksOfTrial is how much is asked under one list of rules.
const asksOfTrial = 12

// HTTPTrial is a list of rules.http, with requests and what must become of them. Targets are such as a client may send: each `%` begins a code, and there
// is no `#`, no backslash and no space in them.
type HTTPTrial struct {
	// Rules are the items, as written in a policy.
	Rules []map[string]any
	Asks  []HTTPAsk
}

// HTTPAsk is a request, and what must become of it.
type HTTPAsk struct {
	Request reference.HTTPRequest
	// Passes, with Headers; else it is refused with 403, or, if Location is not empty, sent there with 307.
	Passes   bool
	Headers  []string
	Location string
}

// RandomHTTP makes the trial of a seed, always the same.
//
//nolint:revive // the name that those who ask real proxies know
func RandomHTTP(seed uint64) HTTPTrial {
	g := trialGenerator(seed, 1)
	t := HTTPTrial{}
	for _, item := range some(g, 1, 4, g.httpRule) {
		t.Rules = append(t.Rules, item.(object))
	}
	for range asksOfTrial {
		ask := HTTPAsk{Request: *g.httpRequest()}
		ask.Passes, ask.Headers, ask.Location = reference.HTTPPasses(t.Rules, &ask.Request)
		t.Asks = append(t.Asks, ask)
	}
	return t
}

// DNSTrial is a list of rules.dns, with queries and what must become of them.
type DNSTrial struct {
	// Rules are the items, as written in a policy.
	Rules []map[string]any
	Asks  []DNSAsk
}

// DNSAsk is a query for a name, and whether it passes; else it is refused.
type DNSAsk struct {
	// Name is one that fits into a query: labels of 1 to 63 bytes, with or without the last dot; "." is the root.
	Name   string
	Passes bool
}

// RandomDNS makes the trial of a seed, always the same.
//
//nolint:revive // the name that those who ask real proxies know
func RandomDNS(seed uint64) DNSTrial {
	g := trialGenerator(seed, 2)
	t := DNSTrial{}
	for range 1 + g.IntN(3) {
		t.Rules = append(t.Rules, g.dnsRule())
	}
	for range asksOfTrial {
		name := g.name()
		t.Asks = append(t.Asks, DNSAsk{name, reference.DNSPasses(t.Rules, name)})
	}
	return t
}

// SNITrial is a list of serverNames, with connections and what must become of them.
type SNITrial struct {
	ServerNames []string
	Asks        []SNIAsk
}

// SNIAsk is a connection, with TLS or without, and whether it passes; else it is reset.
type SNIAsk struct {
	TLS    bool
	Name   string // "" = none
	Passes bool
}

// RandomSNI makes the trial of a seed, always the same.
//
//nolint:revive // the name that those who ask real proxies know
func RandomSNI(seed uint64) SNITrial {
	g := trialGenerator(seed, 3)
	t := SNITrial{}
	for range 1 + g.IntN(3) {
		t.ServerNames = append(t.ServerNames, g.serverName())
	}
	for range asksOfTrial {
		hello := g.hello()
		ask := SNIAsk{TLS: hello != nil}
		if hello != nil {
			ask.Name = hello.SNI
		}
		ask.Passes = reference.SNIPasses(t.ServerNames, ask.Name, ask.TLS)
		t.Asks = append(t.Asks, ask)
	}
	return t
}

func trialGenerator(seed, kind uint64) *generator {
	return &generator{Rand: rand.New(rand.NewPCG(seed, 0x7765697200+kind)), c: &reference.Cluster{}}
}

// httpRule draws an item of rules.http; expressions and requests have few words, so that they meet.
func (g *generator) httpRule() object {
	item := object{}
	if g.chance(40) {
		item["method"] = pick(g, "GET", "GET", "GET|HEAD", "P.*", "[A-Z]+", "^PUT$", "DELETE", "")
	}
	if g.chance(65) {
		item["path"] = pick(g, "/", "/public", "/public/.*", "^/item/[0-9]+$", "/api/v1/.*", ".*", "/(public|admin)(/.*)?", `/public\?x=1`, "/a|/ab", "/.*/", `/item/%20.*`,
			"/[^/]*", "", `/admin/?`, "/a/b", `\Q/a.b\E`, `/a\.b`)
	}
	if g.chance(20) {
		item["host"] = pick(g, `shop\.example\.com`, "shop.example.com", `shop\.example\.com(:[0-9]+)?`, `.*\.example\.com`, "x")
	}
	if g.chance(25) {
		item["headers"] = some(g, 1, 2, func() string {
			return pick(g, "X-A: 1", "x-a: 1", "X-A", "X-A:", "X-A 1", "X-A:1", "X-B: 1,2", "X-B: a b", "Content-Type: application/json")
		})
	}
	if g.chance(25) {
		item["headerMatches"] = some(g, 1, 2, func() object {
			m := object{"name": pick(g, "X-A", "x-b", "X-C")}
			if g.chance(85) {
				m["value"] = pick(g, "1", "2", "a b")
			}
			if g.chance(70) {
				m["mismatch"] = pick(g, "LOG", "ADD", "DELETE", "REPLACE")
				if name := strings.ToLower(m["name"].(string)); slices.Contains(g.acted, name) { // in what order two act on one header is open
					m["mismatch"] = "LOG"
				} else if m["mismatch"] != "LOG" {
					g.acted = append(g.acted, name)
				}
			}
			return m
		})
	}
	return item
}

func (g *generator) httpRequest() *reference.HTTPRequest {
	q := &reference.HTTPRequest{
		Method: pick(g, "GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "GETX", "get"), Path: g.target(),
		Host: pick(g, "shop.example.com", "shop.example.com", "shopXexample.com", "shop.example.com:8080", "x"),
	}
	for range max(0, g.IntN(5)-1) {
		q.Headers = append(q.Headers, pick(g, "X-A: 1", "x-a: 2", "X-B: 1", "X-B: 2", "X-B: a b", "X-C: 1", "Content-Type: application/json", "Content-Type: application/json; charset=utf-8"))
	}
	return q
}

// target draws a request target; half of them are plain.
func (g *generator) target() string {
	if g.chance(50) {
		return pick(g, "/", "/public", "/public/", "/public/x", "/public?x=1", "/admin", "/item/42", "/item/4a", "/api/v1/products?page=2", "/a", "/ab", "/a.b", "/a/b")
	}
	var path strings.Builder
	for range 1 + g.IntN(4) {
		path.WriteString(pick(g, "/", "/", "/", "/", "//", "%2F", "%5c"))
		path.WriteString(pick(g, "public", "public", "admin", "item", "42", "api", "v1", "a", "b", "a.b", "..", "..", ".", "%2e%2e", "%2E.", "%61", "%70ublic", "%20x", "%252e", "...", ""))
	}
	target := path.String()
	if !strings.HasPrefix(target, "/") {
		target = "/" + target
	}
	if g.chance(20) {
		target += pick(g, "?", "?x=1", "?a=/../b", "?%2F=%2e", "?x=1?y")
	}
	return target
}

func (g *generator) dnsRule() object {
	item := object{}
	switch n := g.IntN(20); {
	case n == 0: // matches nothing
	case n == 1: // either
		item["matchName"], item["matchPattern"] = g.name(), g.pattern()
	case n < 8:
		item["matchName"] = g.name()
	default:
		item["matchPattern"] = g.pattern()
	}
	return item
}

func (g *generator) pattern() string {
	return pick(g, "*", "*.cilium.io", "*cilium.io", "sub*.cilium.io", "part*ial.com", "**.cilium.io", "*.*.svc.cluster.local", "**.cluster.local", "**.", "*.", "**", "***.io",
		"*.IO.", "a*b*.io", "**.*.io", "www.*.io", "*-*.io", "_*.io", "**.a.**.io", "cilium.io")
}

// name draws a name that fits into a query.
func (g *generator) name() string {
	if g.chance(4) {
		return "."
	}
	labels := make([]string, 0, 5)
	for range g.IntN(4) {
		labels = append(labels, pick(g, "www", "sub", "subdomain", "a", "ab", "axb", "part-extra-ial", "partial", "_sip", "svc", "WWW", "x-y", "0"))
	}
	labels = append(labels, pick(g, []string{"cilium", "io"}, []string{"CILIUM", "Io"}, []string{"subcilium", "io"}, []string{"com"}, []string{"partial", "com"}, []string{"svc", "cluster", "local"},
		[]string{"io"}, []string{"cluster", "local"})...)
	name := strings.Join(labels, ".")
	if g.chance(25) {
		name += "."
	}
	return name
}

func (g *generator) serverName() string {
	return pick(g, "*", "*.cilium.io", "sub*.cilium.io", "**.cilium.io", "a.**.com", "cilium.io", "CILIUM.io.", "**", "*.com", "***.io", "www.cilium.io")
}

func (g *generator) hello() *reference.TLSHello {
	switch g.IntN(12) {
	case 0:
		return nil
	case 1:
		return &reference.TLSHello{}
	}
	name := g.name()
	for name == "." || slices.Contains([]string{"_"}, name[:1]) {
		name = g.name()
	}
	return &reference.TLSHello{SNI: strings.TrimSuffix(name, ".")}
}
