// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weirmesh/weir/internal/labelset"
)

// called gives a document another name; rules are asked in the order of names.
func called(name, doc string) string { return strings.Replace(doc, "name: p", "name: "+name, 1) }

func parsed(t *testing.T, o Options, docs ...string) []*Rule {
	t.Helper()
	var rules []*Rule
	for _, doc := range docs {
		object, err := Parse([]byte(doc), o)
		if err != nil {
			t.Fatalf("%s: %v", doc, err)
		}
		rules = append(rules, object.Rules...)
	}
	return rules
}

// show writes a filter as "http: a:GET /x, b:everything".
func (r *Resolved) show(f *Filter) string {
	if f == nil {
		return "plain"
	}
	name := func(rule int) string {
		if n := r.Rules[rule]; n.Implicit != "" {
			return n.Implicit
		}
		return r.Rules[rule].Ref.Name
	}
	var items []string
	for _, i := range f.HTTP {
		text := strings.TrimSpace(i.Method + " " + i.Path)
		if i.everything() {
			text = "everything"
		}
		items = append(items, name(i.Rule)+":"+text)
	}
	for _, i := range f.DNS {
		text := i.MatchName + i.MatchPattern
		if text == "" {
			text = "everything"
		}
		items = append(items, name(i.Rule)+":"+text)
	}
	for _, i := range f.TLS {
		text := "sni " + strings.Join(i.ServerNames, "|")
		if i.Any {
			text = "sni everything"
		}
		items = append(items, name(i.Rule)+":"+text)
	}
	kind := f.Kind.String()
	if f.Visibility {
		kind += " to be seen"
	}
	return strings.TrimSpace(kind + ": " + strings.Join(items, ", "))
}

// onTCP is a toPorts entry.
func onTCP(port, more string) string {
	text := `{ports: [{port: "` + port + `", protocol: TCP}]`
	if first, last, ok := strings.Cut(port, "-"); ok {
		text = `{ports: [{port: "` + first + `", endPort: ` + last + `, protocol: TCP}]`
	}
	return text + more + "}"
}

const (
	get      = ", rules: {http: [{method: GET}]}"
	put      = ", rules: {http: [{method: PUT}]}"
	noHTTP   = ", rules: {http: []}"
	sniA     = ", serverNames: [A.b.]"
	sniC     = `, serverNames: ["*.c", "d"]`
	names    = ", rules: {dns: [{matchName: a.b}, {}]}"
	noNames  = ", rules: {dns: []}"
	cli      = "fromEndpoints: [{matchLabels: {app: cli}}], "
	everyone = "fromEndpoints: [{}], "
)

func TestFilters(t *testing.T) {
	ingress := func(name, peers, ports string) string { return called(name, in("{"+peers+"toPorts: ["+ports+"]}")) }
	egress := func(name, peers, ports string) string {
		return called(name, out("{"+strings.Replace(peers, "from", "to", 1)+"toPorts: ["+ports+"]}"))
	}
	off := func(doc string) string {
		return strings.Replace(doc, "endpointSelector: {}", "endpointSelector: {}, enableDefaultDeny: {ingress: false, egress: false}", 1)
	}
	dnsOf := func(protocol, port, more string) string {
		return `{ports: [{port: "` + port + `", protocol: ` + protocol + "}]" + more + "}"
	}
	tests := []struct {
		name      string
		direction Direction
		proto     uint8
		port      uint16
		docs      []string
		want      string // what the peer `cli` has
	}{
		{"rules", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", get))}, "http: a:GET"},
		{"another port", Ingress, TCP, 81, []string{ingress("a", cli, onTCP("80", get))}, "no"},
		{"for others", Ingress, TCP, 80, []string{ingress("a", strings.Replace(cli, "cli", "other", 1), onTCP("80", get)), ingress("b", cli, onTCP("80", ""))}, "plain"},
		{"two policies", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", get)), ingress("b", everyone, onTCP("80", put))}, "http: a:GET, b:PUT"},
		{"two peers and ports of a rule", Ingress, TCP, 80, []string{ingress("a", "fromEndpoints: [{matchLabels: {app: cli}}, {}], ",
			`{ports: [{port: "80", protocol: TCP}, {port: "79", endPort: 81, protocol: TCP}]`+get+"}")}, "http: a:GET"},
		{"two entries of a rule", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", get)+", "+onTCP("79-81", put))}, "http: a:PUT, a:GET"},
		{"a plain rule for the port", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", get)), ingress("b", cli, onTCP("80", ""))}, "http: a:GET, b:everything"},
		{"a plain range", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", get)), ingress("b", everyone, onTCP("79-99", ""))}, "http: a:GET, b:everything"},
		{"a rule without ports", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", get)), called("b", in("{fromEntities: [cluster]}"))}, "http: a:GET, b:everything"},
		{"a rule for anybody", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", get)), ingress("b", "", onTCP("80", ""))}, "http: a:GET, b:everything"},
		{"a NetworkPolicy", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", get)), called("b", knp("{podSelector: {}, ingress: [{}]}"))}, "http: a:GET, b:everything"},
		{"an empty list alone", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", noHTTP))}, "plain"},
		{"an empty list beside a list of the same selector", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", get)), ingress("b", cli, onTCP("80", noHTTP))}, "http: a:GET"},
		{"... of another selector", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", get)), ingress("b", everyone, onTCP("80", noHTTP))}, "http: a:GET, b:everything"},
		{"... that stands beside all", Ingress, TCP, 80, []string{ingress("a", "fromEntities: [cluster, all], ", onTCP("80", get)), ingress("b", "fromEntities: [cluster], ", onTCP("80", noHTTP))}, "http: a:GET"},
		{"... and all itself", Ingress, TCP, 80, []string{ingress("a", "fromEntities: [cluster], ", onTCP("80", get)), ingress("b", "fromEntities: [cluster, all], ", onTCP("80", noHTTP))}, "http: a:GET, b:everything"},
		{"... of other ports", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", get)), ingress("b", cli, onTCP("80-81", noHTTP))}, "http: a:GET, b:everything"},
		{"everything asked for", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", ", rules: {http: [{}]}"))}, "http: a:everything"},
		{"a deny", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", get)), called("b", inDeny("{"+cli+"}"))}, "no"},
		{"Accept of the Admin tier", Ingress, TCP, 80, []string{ingress("a", cli, onTCP("80", get)),
			called("b", cluster("{tier: Admin, priority: 1, subject: {namespaces: {}}, ingress: [{action: Accept, from: [{namespaces: {}}]}]}"))}, "plain"},
		{"the switch off", Ingress, TCP, 80, []string{off(ingress("a", cli, onTCP("80", get)))}, "http: a:GET, default-deny-off:everything"},
		{"the switch on elsewhere", Ingress, TCP, 80, []string{off(ingress("a", cli, onTCP("80", get))), called("b", in("{}"))}, "http: a:GET"},
		{"the switch off, names", Egress, UDP, 53, []string{off(egress("a", cli, dnsOf("UDP", "53", names)))}, "dns: a:a.b, default-deny-off:everything"},
		{"the switch off, server names", Egress, TCP, 443, []string{off(egress("a", cli, onTCP("443", sniA)))}, "tls: a:sni a.b, default-deny-off:sni everything"},

		{"names", Egress, UDP, 53, []string{egress("a", cli, dnsOf("ANY", "53", names))}, "dns: a:a.b"},
		{"names over TCP", Egress, TCP, 53, []string{egress("a", cli, dnsOf("ANY", "53", names))}, "dns: a:a.b"},
		{"names over SCTP", Egress, SCTP, 53, []string{egress("a", cli, dnsOf("ANY", "53", names))}, "no"},
		{"names and a plain rule for the port", Egress, UDP, 53, []string{egress("a", cli, dnsOf("UDP", "53", names)), egress("b", everyone, dnsOf("ANY", "53", ""))}, "dns: a:a.b, b:everything"},
		{"... of the other protocol", Egress, UDP, 53, []string{egress("a", cli, dnsOf("UDP", "53", names)), egress("b", everyone, dnsOf("TCP", "53", ""))}, "dns: a:a.b"},
		{"... for a range", Egress, UDP, 53, []string{egress("a", cli, dnsOf("UDP", "53", names)), egress("b", everyone, `{ports: [{port: "50", endPort: 60}]}`)}, "dns: a:a.b"},
		{"... for port 0", Egress, UDP, 53, []string{egress("a", cli, dnsOf("UDP", "53", names)), egress("b", everyone, `{ports: [{port: "0"}]}`)}, "dns: a:a.b"},
		{"... without ports", Egress, UDP, 53, []string{egress("a", cli, dnsOf("UDP", "53", names)), called("b", out("{toEntities: [cluster]}"))}, "dns: a:a.b"},
		{"... with an empty list", Egress, UDP, 53, []string{egress("a", cli, dnsOf("UDP", "53", names)), egress("b", cli, dnsOf("UDP", "53", noNames))}, "dns: a:a.b"},

		{"server names", Egress, TCP, 443, []string{egress("a", cli, onTCP("443", sniA))}, "tls: a:sni a.b"},
		{"server names and no TCP", Egress, UDP, 443, []string{egress("a", cli, `{ports: [{port: "443"}], serverNames: [a]}`)}, "no"},
		{"server names of the same selector", Egress, TCP, 443, []string{egress("a", cli, onTCP("443", sniA)), egress("b", cli, onTCP("443", sniC))}, "tls: a:sni a.b, b:sni *.c|d"},
		{"... are wanted of a plain rule too", Egress, TCP, 443, []string{egress("a", cli, onTCP("443", sniA)), egress("b", cli, onTCP("443", ""))}, "tls: a:sni a.b"},
		{"... of another selector are alternatives", Egress, TCP, 443, []string{egress("a", cli, onTCP("443", sniA)), egress("b", everyone, onTCP("443", ""))}, "tls: a:sni a.b, b:sni everything"},
		{"... of one of two selectors", Egress, TCP, 443, []string{egress("a", cli, onTCP("443", sniA)), egress("b", "fromEndpoints: [{matchLabels: {app: cli}}, {}], ", onTCP("443", ""))}, "tls: a:sni a.b, b:sni everything"},
		{"... on another range", Egress, TCP, 443, []string{egress("a", cli, onTCP("443", sniA)), egress("b", cli, onTCP("443-444", ""))}, "tls: a:sni a.b, b:sni everything"},
		{"server names and requests of two selectors", Egress, TCP, 443, []string{egress("a", cli, onTCP("443", sniA)), egress("b", everyone, onTCP("443", get)), egress("c", "", onTCP("443", ""))},
			"http: b:GET, c:everything, a:sni a.b, c:sni everything"},
		{"requests go before names", Egress, TCP, 53, []string{egress("a", cli, onTCP("53", names)), egress("b", everyone, onTCP("53", get))}, "http: b:GET"},
		{"server names go before names", Egress, TCP, 53, []string{egress("a", cli, onTCP("53", names)), egress("b", everyone, onTCP("53", sniA))}, "tls: b:sni a.b"},

		{"requests and names", Egress, TCP, 53, []string{egress("a", cli, onTCP("53", names)), egress("b", cli, onTCP("53", get))}, "cannot merge conflicting L7 parsers (dns/http): CiliumNetworkPolicy shop/a egress[0] and CiliumNetworkPolicy shop/b egress[0]"},
		{"server names and names", Egress, TCP, 53, []string{egress("a", cli, onTCP("53", names)), egress("b", cli, onTCP("53", sniA))}, "cannot merge conflicting L7 parsers (dns/tls)"},
		{"requests and server names", Egress, TCP, 443, []string{egress("a", cli, onTCP("443", get)), egress("b", cli, onTCP("443", sniA))}, "cannot merge L7 rules for cached selector endpoints:"},
		{"a prefix of two lists", Egress, TCP, 443, []string{called("a", out("{toCIDR: [10.0.0.0/8, 11.0.0.0/8], toPorts: ["+onTCP("443", get)+"]}")),
			called("b", out("{toCIDR: [10.0.0.0/8], toPorts: ["+onTCP("443", sniA)+"]}"))}, "cannot merge L7 rules for cached selector cidr:10.0.0.0/8"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := Resolve(Options{}, &Subject{Labels: podLabels("shop", "web")}, tt.direction, parsed(t, Options{}, tt.docs...), nil)
			if err != nil {
				if !strings.HasPrefix(err.Error(), tt.want) {
					t.Errorf("%v, want %s", err, tt.want)
				}
				return
			}
			p := &Peer{Key: "300", Labels: podLabels("shop", "cli")}
			checkAgreement(t, r, p, tt.proto, tt.port)
			d := r.Decide(p, tt.proto, tt.port)
			got := r.show(d.Filter)
			if d.Verdict != Allow {
				got = "no"
			}
			if got != tt.want {
				t.Errorf("%s, want %s", got, tt.want)
			}
		})
	}
}

// Prefixes of several lists are the same selectors, however many stand in each.
func TestFilterOfPrefix(t *testing.T) {
	r, err := Resolve(Options{}, &Subject{Labels: podLabels("shop", "web")}, Egress, parsed(t, Options{},
		called("a", out("{toCIDR: [10.0.0.0/8, 192.0.2.0/24], toPorts: ["+onTCP("80", get)+"]}")), called("b", out("{toCIDR: [192.0.2.0/24], toPorts: ["+onTCP("80", noHTTP)+"]}"))), nil)
	if err != nil {
		t.Fatal(err)
	}
	p := &Peer{Key: "192.0.2.1", Labels: labelset.Set{"reserved:world"}, Prefix: netip.MustParsePrefix("192.0.2.1/32")}
	checkAgreement(t, r, p, TCP, 80)
	if got := r.show(r.Decide(p, TCP, 80).Filter); got != "http: a:GET" {
		t.Errorf("%s, want the list alone", got)
	}
}

// The local node passes every filter; if it needs a rule, it is a peer like others.
func TestFilterLocalhost(t *testing.T) {
	host := &Peer{Key: "1", Labels: labelset.Set{"reserved:host"}}
	for _, off := range []bool{false, true} {
		doc := in("{toPorts: [" + onTCP("80", get) + "]}")
		if off {
			doc = strings.Replace(doc, "endpointSelector: {}", "endpointSelector: {}, enableDefaultDeny: {ingress: false}", 1)
		}
		for _, needs := range []bool{false, true} {
			o := Options{LocalhostNeedsRule: needs}
			s := &Subject{Labels: podLabels("shop", "web"), Visibility: []Visibility{{Ingress, 81, TCP, FilterHTTP}}}
			r, err := Resolve(o, s, Ingress, parsed(t, o, doc), nil)
			if err != nil {
				t.Fatal(err)
			}
			checkAgreement(t, r, host, TCP, 80)
			d := r.Decide(host, TCP, 80)
			if d.Verdict != Allow || (d.Filter != nil) != needs {
				t.Errorf("needs a rule %t, switch off %t: %+v", needs, off, d)
			}
			if seen := r.Decide(host, TCP, 81); off && (seen.Filter != nil) != needs {
				t.Errorf("to be seen, needs a rule %t: %+v", needs, seen)
			}
		}
	}
}

func TestVisibilityResolved(t *testing.T) {
	s := &Subject{Labels: podLabels("shop", "web"), Visibility: []Visibility{{Egress, 53, UDP, FilterDNS}, {Ingress, 80, TCP, FilterHTTP}, {Ingress, 82, TCP, FilterHTTP}}}
	peer := &Peer{Key: "300", Labels: podLabels("shop", "cli")}
	for _, tt := range []struct {
		name      string
		o         Options
		direction Direction
		docs      []string
		enforced  bool
		want      map[string]string
	}{
		{"no policy", Options{}, Ingress, nil, false, map[string]string{"80/TCP": "http to be seen:", "82/TCP": "http to be seen:", "81/TCP": "plain", "80/UDP": "plain", "53/UDP": "plain"}},
		{"no policy, names", Options{}, Egress, nil, false, map[string]string{"53/UDP": "dns to be seen:", "53/TCP": "plain"}},
		{"denied stays denied", Options{}, Ingress, []string{in("{}")}, true, map[string]string{"80/TCP": "no"}},
		{"a deny rule", Options{}, Ingress, []string{inDeny("{fromEndpoints: [{}]}"), called("b", in("{fromEntities: [all]}"))}, true, map[string]string{"80/TCP": "no"}},
		{"allowed", Options{}, Ingress, []string{in("{toPorts: [" + onTCP("80-81", "") + "]}")}, true, map[string]string{"80/TCP": "http to be seen:", "81/TCP": "plain", "82/TCP": "no"}},
		{"rules of policy decide", Options{}, Ingress, []string{in("{toPorts: [" + onTCP("80", get) + "]}")}, true, map[string]string{"80/TCP": "http: p:GET"}},
		{"never", Options{Enforcement: ModeNever}, Ingress, nil, false, map[string]string{"80/TCP": "plain"}},
		{"another cluster's", Options{ClusterName: "x"}, Ingress, nil, false, map[string]string{"80/TCP": "plain"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := Resolve(tt.o, s, tt.direction, parsed(t, tt.o, tt.docs...), nil)
			if err != nil {
				t.Fatal(err)
			}
			plain, err := Resolve(tt.o, &Subject{Labels: s.Labels}, tt.direction, parsed(t, tt.o, tt.docs...), nil)
			if err != nil {
				t.Fatal(err)
			}
			if r.Enforced != tt.enforced || r.DefaultDeny != plain.DefaultDeny || len(r.EnforcedBy) != len(plain.EnforcedBy) {
				t.Errorf("enforced %t by %v", r.Enforced, r.EnforcedBy)
			}
			for port, want := range tt.want {
				var number uint16
				var proto string
				if _, err := fmt.Sscanf(port, "%d/%s", &number, &proto); err != nil {
					t.Fatal(err)
				}
				d := r.Decide(peer, protocolNumber(proto), number)
				if got := lookup(r.Class(r.Match(peer)), protocolNumber(proto), number); r.Key != "" && (got.Verdict != d.Verdict || r.show(got.Filter) != r.show(d.Filter)) {
					t.Errorf("%s: class %+v, decided %+v", port, got, d)
				}
				got := r.show(d.Filter)
				if d.Verdict != Allow {
					got = "no"
				}
				if got != want || d.Verdict != plain.Decide(peer, protocolNumber(proto), number).Verdict {
					t.Errorf("%s: %s, want %s", port, got, want)
				}
			}
			if hasKey := r.Key != ""; hasKey != (tt.enforced || strings.HasPrefix(tt.name, "no policy")) {
				t.Errorf("key %q", r.Key)
			}
		})
	}
}

// A key stays when a rule is edited, and is another one's for another place, identity or rule.
func TestFilterKey(t *testing.T) {
	cliPeer := &Peer{Key: "300", Labels: podLabels("shop", "cli")}
	at := func(app, name, entries string, port uint16) (filter, policy string) {
		t.Helper()
		doc := called(name, cnp("{endpointSelector: {}, ingress: ["+entries+"]}"))
		r, err := Resolve(Options{}, &Subject{Labels: podLabels("shop", app)}, Ingress, parsed(t, Options{}, doc), nil)
		if err != nil {
			t.Fatal(err)
		}
		f := r.Decide(cliPeer, TCP, port).Filter
		if f == nil {
			return "", r.Key
		}
		return f.Key, r.Key
	}
	rule := func(port, more string) string { return "{" + everyone + "toPorts: [" + onTCP(port, more) + "]}" }
	first, firstPolicy := at("web", "a", rule("80", get), 80)
	if !strings.HasPrefix(first, "http-") || len(first) > 63 {
		t.Errorf("key %q", first)
	}
	for _, tt := range []struct {
		name         string
		app, policy  string
		entries      string
		port         uint16
		same         bool
		samePolicies bool
	}{
		{"the same", "web", "a", rule("80", get), 80, true, true},
		{"another method", "web", "a", rule("80", put), 80, true, false},
		{"more items", "web", "a", rule("80", ", rules: {http: [{method: GET}, {path: /x, headers: [a]}]}"), 80, true, false},
		{"another entry for other ports", "web", "a", "{" + everyone + "toPorts: [" + onTCP("80", get) + ", " + onTCP("90", put) + "]}", 80, true, false},
		{"for other peers", "web", "a", "{" + cli + "toPorts: [" + onTCP("80", get) + "]}", 80, true, false},
		{"another port", "web", "a", rule("81", get), 81, false, false},
		{"a range", "web", "a", rule("80-81", get), 80, false, false},
		{"another policy", "web", "b", rule("80", get), 80, false, false},
		{"another rule of it", "web", "a", "{}, " + rule("80", get), 80, false, false},
		{"one more rule", "web", "a", rule("80", get) + ", " + rule("80", put), 80, false, false},
		{"another identity", "api", "a", rule("80", get), 80, false, false},
		{"server names", "web", "a", rule("80", sniA), 80, false, false},
		{"none", "web", "a", rule("80", ""), 80, false, false},
	} {
		filter, policy := at(tt.app, tt.policy, tt.entries, tt.port)
		if (filter == first) != tt.same || (policy == firstPolicy) != tt.samePolicies {
			t.Errorf("%s: filter %s, policy %s; at first %s, %s", tt.name, filter, policy, first, firstPolicy)
		}
	}
	// Without filters identities share a policy.
	_, web := at("web", "a", rule("80", ""), 80)
	if _, api := at("api", "a", rule("80", ""), 80); web != api {
		t.Errorf("policies without filters: %s and %s", web, api)
	}
}

// Ports with different rules of one entry are ranges of their own, and one port by number and by name is told apart.
func TestFilterRanges(t *testing.T) {
	doc := in("{" + everyone + "toPorts: [" + onTCP("80", get) + ", " + onTCP("81", put) + ", " + onTCP("http", put) + ", " + onTCP("82-85", get) + "]}")
	key := map[string]bool{}
	for _, port := range []uint16{80, 90} {
		s := &Subject{Labels: podLabels("shop", "web"), NamedPorts: []NamedPort{{"http", TCP, port}}}
		r, err := Resolve(Options{}, s, Ingress, parsed(t, Options{}, doc), nil)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, x := range r.Class(r.Match(&Peer{Labels: podLabels("shop", "cli")})) {
			got = append(got, fmt.Sprintf("%d-%d %s", x.First, x.Last, r.show(x.Filter)))
			if x.First == 80 {
				key[x.Filter.Key] = true
			}
		}
		want := map[uint16]string{
			80: "80-80 http: p:GET, p:PUT; 81-81 http: p:PUT; 82-85 http: p:GET",
			90: "80-80 http: p:GET; 81-81 http: p:PUT; 82-85 http: p:GET; 90-90 http: p:PUT",
		}[port]
		if strings.Join(got, "; ") != want {
			t.Errorf("http = %d: %s, want %s", port, strings.Join(got, "; "), want)
		}
	}
	if len(key) != 2 {
		t.Errorf("port 80 has the keys %v, want one for each subject", key)
	}
}

func TestNames(t *testing.T) {
	doc := out(`{toFQDNs: [{matchName: A.b.}, {matchPattern: "*.C"}], toPorts: [` + onTCP("80", get) + `]}, {toFQDNs: [{matchPattern: "*.c."}]},
		{toEntities: [world], toPorts: [` + onTCP("80", put) + `]}, {toPorts: [` + onTCP("443", sniA) + `]}`)
	r, err := Resolve(Options{}, &Subject{Labels: podLabels("shop", "web")}, Egress, parsed(t, Options{}, doc), nil)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, n := range r.Names() {
		if !r.Terms[n.Term].IsName() {
			t.Errorf("term %d is %s", n.Term, r.Terms[n.Term].Key)
		}
		for _, x := range n.Ranges {
			got = append(got, fmt.Sprintf("%s%s %d-%d/%d %s", n.MatchName, n.MatchPattern, x.First, x.Last, x.Proto, r.show(x.Filter)))
		}
	}
	want := strings.Join([]string{
		"*.c 0-65535/0 plain", "*.c 0-79/6 plain", "*.c 80-80/6 http: p:GET, p:everything, p:PUT", "*.c 81-442/6 plain",
		"*.c 443-443/6 tls: p:sni everything, p:sni a.b", "*.c 444-65535/6 plain",
		"a.b 80-80/6 http: p:GET, p:PUT", "a.b 443-443/6 tls: p:sni a.b",
	}, "\n")
	if strings.Join(got, "\n") != want {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), want)
	}
	world := &Peer{Key: "2", Labels: labelset.Set{"reserved:world"}, Names: []string{"x.c"}}
	x := r.Explain(world, TCP, 8080)
	if x.Verdict != Allow || x.Steps[1].Reason != "it allows" || x.Steps[0].Reason != "the port is not among 80/TCP" {
		t.Errorf("%+v", x)
	}
	pod := &Peer{Key: "300", Labels: podLabels("shop", "cli"), Names: []string{"x.c"}}
	if d := r.Decide(pod, TCP, 8080); d.Verdict != DefaultDeny {
		t.Errorf("a pod with a name: %+v", d)
	}
	world.Names = []string{"y.d"}
	if x := r.Explain(world, TCP, 8080); x.Verdict != DefaultDeny || x.Steps[1].Reason != "the peer is not among the name *.c" {
		t.Errorf("%+v", x)
	}
}

// Of two selectors of one name the narrower has what both say.
func TestNamesWithin(t *testing.T) {
	doc := out(`{toFQDNs: [{matchPattern: "*.c"}], toPorts: [` + onTCP("80", get) + `]}, {toFQDNs: [{matchName: a.c}], toPorts: [` + onTCP("80", put) + `]}`)
	r, err := Resolve(Options{}, &Subject{Labels: podLabels("shop", "web")}, Egress, parsed(t, Options{}, doc), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range r.Names() {
		want := map[string]string{"*.c": "http: p:GET", "a.c": "http: p:GET, p:PUT"}[n.MatchName+n.MatchPattern]
		if got := r.show(n.Ranges[0].Filter); got != want {
			t.Errorf("%s%s: %s, want %s", n.MatchName, n.MatchPattern, got, want)
		}
	}
	for _, c := range []struct {
		wide, narrow string
		want         bool
	}{
		{"*", "*.a", true}, {"**", "**.a", true}, {"*.a", "x.a", true}, {"*.a", "x*.a", true}, {"*.a", "*.a", true}, {"**.a", "*.a", true}, {"**.a", "*.b.a", true},
		{"**.a", "**.b.a", true}, {"**.a", "x-*.a", true}, {"*.a", "**.a", false}, {"*.a", "*.b.a", false}, {"**.b.a", "*.a", false}, {"**.a", "*a", false},
		{"*.b.a", "*.c.a", false}, {"x*.a", "*.a", false}, {"x.a", "x.a", false},
	} {
		wide := NameSelector{MatchPattern: c.wide}
		if !strings.Contains(c.wide, "*") {
			wide = NameSelector{MatchName: c.wide}
		}
		narrow := NameSelector{MatchPattern: c.narrow}
		if !strings.Contains(c.narrow, "*") {
			narrow = NameSelector{MatchName: c.narrow}
		}
		if got := wide.covers(narrow); got != c.want {
			t.Errorf("%s covers %s: %t", c.wide, c.narrow, got)
		}
	}
}

func TestExplainFilters(t *testing.T) {
	doc := in("{" + cli + "toPorts: [" + onTCP("80", get) + "]}, {" + everyone + "toPorts: [" + onTCP("80", "") + "]}, {" + cli + "toPorts: [" + onTCP("80", noHTTP) + "]}")
	r, err := Resolve(Options{}, &Subject{Labels: podLabels("shop", "web")}, Ingress, parsed(t, Options{}, doc), nil)
	if err != nil {
		t.Fatal(err)
	}
	x := r.Explain(&Peer{Labels: podLabels("shop", "cli")}, TCP, 80)
	want := []string{
		"it allows the requests that its HTTP rules match", "it allows, whatever is asked", "it allows the port, but adds nothing to what other rules say of its requests",
	}
	for i, w := range want {
		if x.Steps[i].Reason != w {
			t.Errorf("%q, want %q", x.Steps[i].Reason, w)
		}
	}
	host := r.Explain(&Peer{Labels: labelset.Set{"reserved:host"}}, TCP, 80)
	if host.Filter != nil || host.Verdict != Allow {
		t.Errorf("%+v", host)
	}
}
