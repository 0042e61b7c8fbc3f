// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/weirmesh/weir/internal/labelset"
)

// FuzzParse: whatever comes in, Parse refuses it with an *Error, or gives an object that can be resolved.
func FuzzParse(f *testing.F) {
	for _, r := range refusals {
		f.Add([]byte(r.doc))
	}
	f.Add([]byte(in(`{fromEndpoints: [{matchLabels: {app: web}}], toPorts: [{ports: [{port: http}, {port: "80", endPort: 90, protocol: TCP}]}]}`)))
	f.Add([]byte(out(`{toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}, {cidrGroupRef: g}]}`)))
	f.Add([]byte(outPort(`{ports: [{port: "443", endPort: 450, protocol: TCP}], rules: {http: [{path: "/a.*", headers: ["X-A: 1"], headerMatches: [{name: a, value: b, mismatch: ADD}]}]}}`)))
	f.Add([]byte(out(`{toFQDNs: [{matchPattern: "**.b"}], toPorts: [{ports: [{port: "443", protocol: TCP}], serverNames: ["*.b"]}, {ports: [{port: "53"}], rules: {dns: [{matchName: a.b}, {}]}}]}`)))
	f.Add([]byte(knp("{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}], ports: [{port: 80}]}]}")))
	f.Add([]byte(clusterOut("{action: Pass, to: [{networks: [10.0.0.0/8]}], protocols: [{sctp: {}}]}")))
	f.Add([]byte(admin("{action: Allow, from: [{namespaces: {}}], ports: [{namedPort: web}]}")))
	f.Add([]byte(group("{externalCIDRs: [10.0.0.0/8]}")))
	f.Fuzz(func(t *testing.T, raw []byte) {
		o := Options{NodeSelectorLabels: true, HostFirewall: true}
		object, err := Parse(raw, o)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.Message == "" || e.NotYet && e.Field == "" {
				t.Fatalf("%q: %#v", raw, err)
			}
			return
		}
		again, err := Parse(raw, o)
		if err != nil {
			t.Fatal(err)
		}
		object.LabelKeys()
		for _, d := range []Direction{Ingress, Egress} {
			s := &Subject{Labels: podLabels("shop", "web"), NamedPorts: []NamedPort{{"http", TCP, 80}}}
			a, err := Resolve(o, s, d, object.Rules, nil)
			if err != nil {
				if !strings.HasPrefix(err.Error(), "cannot merge ") {
					t.Fatal(err)
				}
				continue
			}
			b, _ := Resolve(o, s, d, again.Rules, nil)
			if a.Key != b.Key {
				t.Errorf("%q: key %s, and then %s", raw, a.Key, b.Key)
			}
			checkAgreement(t, a, &Peer{Key: "300", Labels: podLabels("shop", "cli")}, TCP, 80)
		}
	})
}

func podLabels(namespace, app string) labelset.Set {
	return labelset.Set{
		"k8s:app=" + app,
		"k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=" + namespace,
		"k8s:io.cilium.k8s.policy.cluster=default",
		"k8s:io.kubernetes.pod.namespace=" + namespace,
	}
}

// checkAgreement checks that the class of a peer, and the explanation, say what Decide says.
func checkAgreement(t *testing.T, r *Resolved, p *Peer, proto uint8, port uint16) {
	t.Helper()
	want := r.Decide(p, proto, port)
	ranges := r.Class(r.Match(p))
	if got := lookup(ranges, proto, port); !reflect.DeepEqual(got, want) {
		t.Errorf("%s %d/%d: class %+v, decide %+v, ranges %+v", p.Key, port, proto, got, want, ranges)
	}
	for i, x := range ranges {
		if x.First > x.Last || x.Proto == AnyProtocol && (x.First != 0 || x.Last != maxPort || i > 0) {
			t.Errorf("range %+v at %d", x, i)
		}
		if i == 0 || ranges[i-1].Proto < x.Proto {
			continue
		}
		before := ranges[i-1]
		if before.Proto > x.Proto || before.Last >= x.First {
			t.Errorf("%+v before %+v", before, x)
		}
		if before.Last+1 == x.First && before.Verdict == x.Verdict && slices.Equal(before.Rules, x.Rules) && before.Filter == nil && x.Filter == nil {
			t.Errorf("%+v and %+v are not merged", before, x)
		}
	}
	x := r.Explain(p, proto, port)
	if !reflect.DeepEqual(x.Decision, want) {
		t.Errorf("explanation %+v, decide %+v", x.Decision, want)
	}
	decided := 0
	for _, s := range x.Steps {
		if s.Decided {
			decided++
		}
		if s.Reason == "" || s.Decided && !(s.PeerMatches && s.PortMatches) {
			t.Errorf("step %+v", s)
		}
	}
	if decided != len(want.Rules) {
		t.Errorf("%d steps decided, %d rules did: %+v", decided, len(want.Rules), x)
	}
}

// checkAnchors checks that a peer has an anchor of every term that it matches.
func checkAnchors(t *testing.T, r *Resolved, p *Peer) {
	t.Helper()
	for _, i := range r.Match(p) {
		anchors := r.Terms[i].Anchors()
		if anchors != nil && !slices.ContainsFunc(p.Labels, func(l string) bool {
			_, l, _ = strings.Cut(l, ":")
			key, value, _ := strings.Cut(l, "=")
			return slices.Contains(anchors, key) || slices.Contains(anchors, key+"="+value)
		}) {
			t.Errorf("%s matches %v, which has none of %v", r.Terms[i].Key, p.Labels, anchors)
		}
	}
}

// checkFilters checks that a key says which filter it is.
func checkFilters(t *testing.T, ranges []Range, known map[string]*Filter) {
	t.Helper()
	for _, x := range ranges {
		f := x.Filter
		if f == nil {
			continue
		}
		if before := known[f.Key]; before != nil && !reflect.DeepEqual(before, f) {
			t.Errorf("key %s is of %+v, and of %+v", f.Key, before, f)
		}
		known[f.Key] = f
		if x.Verdict != Allow || len(f.Key) > 63 || f.Visibility && len(f.HTTP)+len(f.DNS)+len(f.TLS) > 0 {
			t.Errorf("range %+v, filter %+v", x, f)
		}
	}
}

// checkNames checks that an address outside, which nothing is known of but its name, has what Names says.
func checkNames(t *testing.T, r *Resolved) {
	t.Helper()
	for _, n := range r.Names() {
		p := &Peer{Key: "2", Labels: labelset.Set{"reserved:world"}, Names: []string{strings.ReplaceAll(n.MatchName+n.MatchPattern, "*", "q")}}
		var want []int
		for i, x := range r.Terms {
			if i == n.Term || x.Key == entityWorld || x.IsName() && x.name.covers(n.NameSelector) {
				want = append(want, i)
			}
		}
		if !slices.Equal(r.Match(p), want) {
			continue // others match it too
		}
		for _, port := range []uint16{79, 80, 81, 443, 500} {
			d := r.Decide(p, TCP, port)
			if got := lookup(n.Ranges, TCP, port); d.Verdict == Allow && !reflect.DeepEqual(got, d) || got.Verdict == Allow && d.Verdict != Allow && d.Verdict != Deny {
				t.Errorf("%+v, port %d: %+v, decided is %+v", n, port, got, d)
			}
		}
	}
}

// worldOf is a World for random policies.
type worldOf struct{}

func (worldOf) Services(namespace, name string, s *Selector) []Service {
	if name == "pods" {
		return []Service{{Namespace: "a", Name: name, Selector: map[string]string{"app": "x"}}}
	}
	return []Service{{Namespace: "a", Name: name, Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("fd00::1")}}}
}

func (worldOf) CIDRGroups(string, *Selector) []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::/16")}
}

func (worldOf) NamedPorts(name string) []NamedPort {
	return []NamedPort{{name, TCP, 80}, {name, TCP, 81}, {name, UDP, 80}}
}

type dice struct{ *rand.Rand }

func pick[T any](d dice, of ...T) T { return of[d.IntN(len(of))] }

func some[T any](d dice, most int, make func() T) []T {
	list := []T{}
	for range d.IntN(most + 1) {
		list = append(list, make())
	}
	return list
}

type object = map[string]any

func (d dice) selector() any {
	s := object{}
	if d.IntN(2) == 0 {
		s["matchLabels"] = object{pick(d, "app", "k8s:app", "any:app", "io.kubernetes.pod.namespace", "reserved:host"): pick(d, "x", "z", "a", "")}
	}
	if d.IntN(3) == 0 {
		e := object{"key": pick(d, "app", "reserved:world", "k8s:io.cilium.k8s.policy.cluster"), "operator": pick(d, "Exists", "DoesNotExist")}
		if d.IntN(2) == 0 {
			e["operator"], e["values"] = pick(d, "In", "NotIn"), []any{pick(d, "x", "z", "default")}
		}
		s["matchExpressions"] = []any{e}
	}
	return s
}

func (d dice) port() any {
	p := object{"port": pick(d, "0", "80", "81", "web", "443", "65535"), "protocol": pick(d, "TCP", "UDP", "SCTP", "ANY")}
	if d.IntN(3) == 0 {
		p["endPort"] = pick(d, 79, 82, 500, 65535)
	}
	return p
}

// toPorts is one entry, often with rules for requests.
func (d dice) toPorts(side string, deny bool) any {
	plain := object{"ports": some(d, 3, d.port)}
	if deny {
		return plain
	}
	port := object{"port": pick(d, "80", "81", "web", "443"), "protocol": "TCP"}
	if d.IntN(3) == 0 {
		port["endPort"] = pick(d, 79, 82, 500)
	}
	ports := []any{port}
	switch d.IntN(6) {
	case 0:
		return object{"ports": ports, "rules": object{"http": some(d, 2, func() any {
			return pick[any](d, object{}, object{"method": "GET"}, object{"path": "/a.*", "headers": []any{"X-A: 1"}},
				object{"headerMatches": []any{object{"name": "X-A", "value": "1", "mismatch": pick(d, "", "ADD", "LOG")}}})
		})}}
	case 1:
		return object{"ports": ports, "serverNames": some(d, 2, func() string { return pick(d, "a.b", "*.b", "**.c") })}
	case 2:
		if side == "to" {
			of := object{"port": pick(d, "80", "81", "443"), "protocol": pick(d, "UDP", "TCP", "ANY")}
			return object{"ports": []any{of}, "rules": object{"dns": some(d, 2, func() any {
				return pick[any](d, object{}, object{"matchName": "a.b"}, object{"matchPattern": "*.b", "matchName": "c"})
			})}}
		}
	}
	return plain
}

func (d dice) visibility() []Visibility {
	return some(d, 3, func() Visibility {
		return Visibility{pick(d, Ingress, Egress), pick[uint16](d, 80, 81, 90), pick[uint8](d, TCP, UDP), pick(d, FilterHTTP, FilterDNS)}
	})
}

func (d dice) prefix() any {
	return pick[any](d, "10.0.0.0/8", "10.1.0.0/16", "10.1.0.1/32", "0.0.0.0/0", "::/0", "fd00::/16")
}

func (d dice) entry(side string, deny bool) any {
	e := object{}
	switch d.IntN(9) {
	case 8:
		if side == "to" && !deny {
			e["toFQDNs"] = some(d, 2, func() any {
				return pick[any](d, object{"matchName": "a.b."}, object{"matchPattern": "*.b"}, object{"matchPattern": "*"}, object{"matchName": "A.b"})
			})
		}
	case 0, 1:
		e[side+"Endpoints"] = some(d, 2, d.selector)
	case 2:
		e[side+"Entities"] = some(d, 2, func() string { return pick(d, "all", "world", "host", "cluster", "none", "world-ipv6", "remote-node") })
	case 3:
		e[side+"CIDR"] = some(d, 3, d.prefix)
	case 4:
		e[side+"CIDRSet"] = some(d, 2, func() any {
			return pick[any](d, object{"cidr": "10.0.0.0/8", "except": []any{"10.1.0.0/16"}}, object{"cidrGroupRef": "g"}, object{"cidr": "0.0.0.0/0", "except": []any{"10.0.0.0/9"}})
		})
	case 5:
		if side == "to" {
			e["toServices"] = []any{object{"k8sService": object{"serviceName": pick(d, "pods", "addresses")}}}
		}
	}
	switch d.IntN(4) {
	case 0, 1:
		e["toPorts"] = some(d, 2, func() any { return d.toPorts(side, deny) })
	case 2:
		e["icmps"] = some(d, 1, func() any {
			return object{"fields": some(d, 2, func() any { return object{"type": pick(d, 0, 8, 128), "family": pick(d, "IPv4", "IPv6")} })}
		})
	}
	return e
}

func (d dice) cilium(i int) object {
	s := object{"endpointSelector": pick[any](d, object{}, object{"matchLabels": object{"app": "x"}})}
	lists := []string{"ingress", "egress", "ingressDeny", "egressDeny"}
	for _, l := range lists {
		if d.IntN(2) == 0 {
			s[l] = some(d, 3, func() any {
				return d.entry(map[bool]string{true: "from", false: "to"}[l[0] == 'i'], strings.HasSuffix(l, "Deny"))
			})
		}
	}
	s[pick(d, lists[:2]...)] = []any{object{}}
	if d.IntN(3) == 0 {
		s["enableDefaultDeny"] = object{"ingress": d.IntN(2) == 0, "egress": d.IntN(2) == 0}
	}
	return object{"apiVersion": "cilium.io/v2", "kind": pick(d, "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy"),
		"metadata": object{"name": "p" + strconv.Itoa(i), "namespace": "a"}, "spec": s}
}

func (d dice) kubernetes(i int) object {
	side := pick(d, "ingress", "egress")
	peers := map[string]string{"ingress": "from", "egress": "to"}[side]
	return object{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": object{"name": "k" + strconv.Itoa(i), "namespace": "a"},
		"spec": object{"policyTypes": pick(d, []string{}, []string{"Egress"}), side: some(d, 2, func() any {
			return object{
				peers: some(d, 2, func() any {
					return pick[any](d, object{"podSelector": object{}}, object{"namespaceSelector": object{}, "podSelector": object{"matchLabels": object{"app": "z"}}},
						object{"ipBlock": object{"cidr": d.prefix()}}, object{})
				}),
				"ports": some(d, 2, func() any {
					return pick[any](d, object{}, object{"port": 80, "endPort": 443}, object{"port": "web", "protocol": "UDP"}, object{"protocol": "SCTP"})
				}),
			}
		})}}
}

func (d dice) cluster(i int) object {
	rules := func(side string) []any {
		return some(d, 3, func() any {
			r := object{"action": pick(d, "Accept", "Deny", "Pass")}
			r[side] = []any{pick[any](d, object{"namespaces": object{}}, object{"pods": object{"namespaceSelector": object{}, "podSelector": object{"matchLabels": object{"app": "z"}}}}, object{"newer": 1})}
			if side == "to" && d.IntN(2) == 0 {
				r[side] = append(r[side].([]any), pick[any](d, object{"networks": []any{d.prefix()}}, object{"nodes": object{}}))
			}
			if d.IntN(2) == 0 {
				r["protocols"] = []any{pick[any](d, object{"tcp": object{}}, object{"udp": object{"destinationPort": object{"number": 80}}},
					object{"tcp": object{"destinationPort": object{"range": object{"start": 80, "end": 443}}}})}
			}
			return r
		})
	}
	return object{"apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy", "metadata": object{"name": "c" + strconv.Itoa(i)},
		"spec": object{"tier": pick(d, "Admin", "Baseline"), "priority": d.IntN(3), "subject": object{"namespaces": object{}}, "ingress": rules("from"), "egress": rules("to")}}
}

// peers are ends of many kinds; port terms and networks are set at random, as variants are.
func (d dice) peers(r *Resolved) []*Peer {
	var all []*Peer
	for i, labels := range []labelset.Set{
		podLabels("a", "x"), podLabels("a", "z"), podLabels("b", "x"), {"reserved:host"}, {"reserved:remote-node"}, {"reserved:health"},
		{"reserved:kube-apiserver", "reserved:remote-node"}, {"reserved:world-ipv4"}, {"reserved:world-ipv6"}, {"reserved:world"},
	} {
		p := &Peer{Key: strconv.Itoa(i), Labels: labels}
		if i < 3 {
			p.NamedPorts = some(d, 2, func() NamedPort { return NamedPort{"web", pick[uint8](d, TCP, UDP), pick[uint16](d, 80, 81)} })
			for _, n := range r.Networks() {
				if d.IntN(2) == 0 {
					p.Networks = append(p.Networks, n)
				}
			}
		}
		all = append(all, p)
	}
	for _, n := range r.Prefixes() {
		p := &Peer{Key: "cidr:" + n.String(), Labels: labelset.Set{"cidr:" + n.String(), "reserved:world-ipv4"}, Prefix: n}
		if d.IntN(2) == 0 {
			p.Names = []string{pick(d, "a.b", "c.b.", "x")}
		}
		all = append(all, p)
	}
	return all
}

// FuzzClass: for random policies and peers, classes and explanations agree with Decide, and do not depend on the order of rules.
func FuzzClass(f *testing.F) {
	for i := range uint64(200) {
		f.Add(i)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		d := dice{rand.New(rand.NewPCG(seed, 0))}
		o := Options{
			Enforcement: pick(d, ModeDefault, ModeDefault, ModeAlways), LocalhostNeedsRule: d.IntN(2) == 0, AllClusters: d.IntN(3) == 0,
			CIDRMatchesPods: d.IntN(3) == 0, CIDRMatchesNodes: d.IntN(3) == 0,
		}
		var rules []*Rule
		for i := range 1 + d.IntN(5) {
			raw, err := json.Marshal(pick(d, d.cilium, d.kubernetes, d.cluster)(i))
			if err != nil {
				t.Fatal(err)
			}
			parsed, err := Parse(raw, o)
			if err != nil {
				t.Fatalf("%s: %v", raw, err)
			}
			rules = append(rules, parsed.Rules...)
		}
		s := &Subject{Labels: podLabels("a", "x"), NamedPorts: []NamedPort{{"web", TCP, 80}}, Visibility: d.visibility()}
		filters := map[string]*Filter{}
		for _, direction := range []Direction{Ingress, Egress} {
			r, err := Resolve(o, s, direction, rules, worldOf{})
			if err != nil {
				if !strings.HasPrefix(err.Error(), "cannot merge ") {
					t.Fatal(err)
				}
				continue
			}
			checkNames(t, r)
			mixed := slices.Clone(rules)
			d.Shuffle(len(mixed), func(i, j int) { mixed[i], mixed[j] = mixed[j], mixed[i] })
			if again, _ := Resolve(o, s, direction, mixed, worldOf{}); again.Key != r.Key {
				t.Errorf("another order of rules gives another key")
			}
			for _, p := range d.peers(r) {
				checkAnchors(t, r, p)
				checkFilters(t, r.Class(r.Match(p)), filters)
				for _, proto := range []uint8{ICMP, TCP, UDP, ICMPv6, SCTP, 47} {
					for _, port := range []uint16{0, 8, 79, 80, 81, 82, 83, 443, 500, 65535, uint16(d.IntN(maxPort))} {
						checkAgreement(t, r, p, proto, port)
						if t.Failed() {
							t.Fatal(fmt.Sprint("seed ", seed))
						}
					}
				}
			}
		}
	})
}
