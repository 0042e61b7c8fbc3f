// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/internal/labelset"
)

// parse reads a document that must be good.
func parse(t testing.TB, doc string, o Options) *Object {
	t.Helper()
	object, err := Parse([]byte(doc), o)
	if err != nil {
		t.Fatalf("%s\n%v", doc, err)
	}
	return object
}

// TestPeerScope: what a peer selector matches once its scope is added (spec 3.2 to 3.4, 5.3).
func TestPeerScope(t *testing.T) {
	peers := map[string]*Peer{
		"own":      {Labels: podLabels("shop", "web")},
		"own db":   {Labels: podLabels("shop", "db")},
		"pay":      {Labels: podLabels("pay", "web")},
		"mesh":     {Labels: labelset.Set{"k8s:app=web", "k8s:io.cilium.k8s.policy.cluster=c2", "k8s:io.kubernetes.pod.namespace=shop"}},
		"host":     {Labels: labelset.Set{"reserved:host"}},
		"remote":   {Labels: labelset.Set{"reserved:kube-apiserver", "reserved:remote-node"}},
		"health":   {Labels: labelset.Set{"reserved:health"}},
		"world":    {Labels: labelset.Set{"reserved:world-ipv6"}},
		"cidr":     {Labels: labelset.Set{"cidr:10.0.0.0/8", "reserved:world"}, Prefix: netip.MustParsePrefix("10.0.0.0/8")},
		"odd pod":  {Labels: labelset.Set{"k8s:io.cilium.k8s.policy.cluster=default", "k8s:io.kubernetes.pod.namespace=shop", "k8s:reserved.host=", "k8s:world="}},
		"dual app": {Labels: labelset.Set{"container:app=web", "k8s:app=db", "k8s:io.cilium.k8s.policy.cluster=default", "k8s:io.kubernetes.pod.namespace=shop"}},
	}
	tests := []struct {
		selector string
		all      bool // AllClusters
		cnp      string
		ccnp     string
	}{
		{"{}", false, "dual app,odd pod,own,own db", "dual app,odd pod,own,own db,pay"},
		{"{}", true, "dual app,mesh,odd pod,own,own db", "dual app,mesh,odd pod,own,own db,pay"},
		{"{matchLabels: {app: web}}", false, "dual app,own", "dual app,own,pay"},
		{`{matchLabels: {"any:app": web}}`, false, "dual app,own", "dual app,own,pay"},
		{`{matchLabels: {"k8s:app": web}}`, false, "own", "own,pay"},
		{`{matchLabels: {"container:app": web}}`, false, "dual app", "dual app"},
		{`{matchLabels: {k8s.app: web}}`, false, "", ""},
		{"{matchLabels: {io.kubernetes.pod.namespace: pay}}", false, "pay", "pay"},
		{`{matchLabels: {"k8s:io.kubernetes.pod.namespace": pay}}`, false, "pay", "pay"},
		{`{matchExpressions: [{key: "any:io.kubernetes.pod.namespace", operator: Exists}]}`, false, "dual app,odd pod,own,own db,pay", "dual app,odd pod,own,own db,pay"},
		{`{matchExpressions: [{key: io.kubernetes.pod.namespace, operator: NotIn, values: [shop]}]}`, false, "pay", "pay"},
		{`{matchExpressions: [{key: io.kubernetes.pod.namespace, operator: NotIn, values: [shop]}]}`, true, "health,pay", "health,pay"},
		{`{matchLabels: {io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name: pay}}`, false, "pay", "pay"},
		{`{matchExpressions: [{key: io.cilium.k8s.policy.cluster, operator: Exists}]}`, false, "dual app,mesh,odd pod,own,own db", "dual app,mesh,odd pod,own,own db,pay"},
		{`{matchLabels: {io.cilium.k8s.policy.cluster: c2}}`, false, "mesh", "mesh"},
		{`{matchLabels: {"reserved:host": ""}}`, false, "host", "host"},
		{`{matchExpressions: [{key: reserved.host, operator: Exists}]}`, false, "host", "host"},
		{`{matchExpressions: [{key: "k8s:reserved.host", operator: Exists}]}`, false, "odd pod", "odd pod"},
		{`{matchExpressions: [{key: world, operator: Exists}]}`, false, "odd pod", "odd pod"},
		{`{matchLabels: {"reserved:world": ""}}`, false, "cidr,world", "cidr,world"},
		{`{matchLabels: {"reserved:kube-apiserver": ""}}`, false, "remote", "remote"},
		{`{matchLabels: {"reserved:host": "", app: web}}`, false, "", ""},
		{`{matchExpressions: [{key: "reserved:host", operator: DoesNotExist}, {key: "k8s:app", operator: DoesNotExist}]}`, false, "cidr,health,odd pod,remote,world", "cidr,health,odd pod,remote,world"},
		{`{matchExpressions: [{key: app, operator: In, values: [db, web]}, {key: app, operator: NotIn, values: [web]}]}`, false, "own db", "own db"},
		{`{matchExpressions: [{key: tier, operator: DoesNotExist}]}`, false, "dual app,odd pod,own,own db", "dual app,odd pod,own,own db,pay"},
	}
	for _, tt := range tests {
		for kind, want := range map[string]string{"cnp": tt.cnp, "ccnp": tt.ccnp} {
			doc := cnp("{endpointSelector: {}, ingress: [{fromEndpoints: [" + tt.selector + "]}]}")
			if kind == "ccnp" {
				doc = ccnp("{endpointSelector: {}, ingress: [{fromEndpoints: [" + tt.selector + "]}]}")
			}
			term := parse(t, doc, Options{AllClusters: tt.all}).Rules[0].peers.terms[0]
			var got []string
			for name, p := range peers {
				if term.Matches(p) {
					got = append(got, name)
				}
			}
			slices.Sort(got)
			if strings.Join(got, ",") != want {
				t.Errorf("%s %s (%s): matches %v, want %s", kind, tt.selector, term.Key, got, want)
			}
		}
	}
}

// TestSelects: which subjects a rule selects (spec 3.4, 6.3, 13, 17).
func TestSelects(t *testing.T) {
	subjects := map[string]*Subject{
		"shop":   {Labels: podLabels("shop", "web")},
		"pay":    {Labels: podLabels("pay", "web")},
		"health": {Labels: labelset.Set{"reserved:health"}},
		"init":   {Labels: labelset.Set{"reserved:init"}},
		"host":   {Labels: labelset.Set{"k8s:pool=front", "reserved:host"}, Host: true},
	}
	cilium := func(selector string) string { return "{endpointSelector: " + selector + ", ingress: [{}]}" }
	tests := []struct{ doc, want string }{
		{cnp(cilium("{}")), "shop"},
		{cnp(cilium("{matchLabels: {app: web}}")), "shop"},
		{cnp(cilium(`{matchLabels: {"reserved:init": ""}}`)), ""},
		{cnp(cilium(`{matchLabels: {"k8s:io.kubernetes.pod.namespace": pay}}`)), "shop"},
		{cnp(cilium(`{matchLabels: {io.kubernetes.pod.namespace: pay}}`)), ""},
		{cnp(cilium(`{matchExpressions: [{key: "k8s:io.kubernetes.pod.namespace", operator: In, values: [pay]}]}`)), ""},
		{ccnp(cilium("{}")), "health,init,pay,shop"},
		{ccnp(cilium(`{matchLabels: {"reserved:init": ""}}`)), "init"},
		{ccnp(cilium(`{matchExpressions: [{key: io.kubernetes.pod.namespace, operator: NotIn, values: [pay]}]}`)), "health,init,shop"},
		{ccnp("{nodeSelector: {}, ingress: [{}]}"), "host"},
		{ccnp("{nodeSelector: {matchLabels: {pool: back}}, ingress: [{}]}"), ""},
		{knp("{}"), "shop"},
		{knp("{podSelector: null}"), "shop"},
		{knp("{podSelector: {matchLabels: {app: db}}}"), ""},
		{cluster("{tier: Admin, priority: 1, subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}"), "pay,shop"},
		{cluster("{tier: Admin, priority: 1, subject: {namespaces: {matchLabels: {kubernetes.io/metadata.name: pay}}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}"), "pay"},
		{cluster("{tier: Admin, priority: 1, subject: {newer: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}"), "pay,shop"},
	}
	for _, tt := range tests {
		rule := parse(t, tt.doc, Options{}).Rules[0]
		var got []string
		for name, s := range subjects {
			if rule.Selects(s) {
				got = append(got, name)
			}
		}
		slices.Sort(got)
		if strings.Join(got, ",") != tt.want {
			t.Errorf("%s: selects %v, want %s", tt.doc, got, tt.want)
		}
	}
}

// TestLook compares the search in sorted labels with a plain walk.
func TestLook(t *testing.T) {
	d := dice{rand.New(rand.NewPCG(1, 2))}
	keys := []string{"a", "a-b", "a.b", "a/b", "a_b", "ab", "b", "host", "world"}
	for range 5000 {
		var labels labelset.Set
		for range d.IntN(6) {
			labels = append(labels, pick(d, "k8s", "k8s", "k8s", "node", "container")+":"+pick(d, keys...)+"="+pick(d, "", "x", "y"))
		}
		if d.IntN(3) == 0 {
			labels = append(labels, "reserved:"+pick(d, keys...))
		}
		slices.Sort(labels)
		labels = slices.Compact(labels)
		q := requirement{source: pick(d, anySource, "k8s", "node", "reserved"), key: pick(d, keys[:8]...), values: []string{pick(d, "", "x")}}
		q = newSelector([]requirement{q}).requirements[0]
		present, in := false, false
		for _, l := range labels {
			source, rest, _ := strings.Cut(l, ":")
			key, value, _ := strings.Cut(rest, "=")
			if key == q.key && (q.source == anySource || q.source == source) {
				present, in = true, in || value == q.values[0]
			}
		}
		// Two labels with one key and source do not occur in an identity; the search sees the first only.
		if p, i := q.look(labels); p != present || i != in && !repeated(labels, q.key) {
			t.Fatalf("%s in %v: got %t, %t, want %t, %t", q, labels, p, i, present, in)
		}
	}
}

func repeated(labels labelset.Set, key string) bool {
	n := 0
	for _, l := range labels {
		if _, ok := cut(l, "k8s", key); ok {
			n++
		}
	}
	return n > 1
}

// TestCIDRItems compares the search in long lists with a plain walk.
func TestCIDRItems(t *testing.T) {
	d := dice{rand.New(rand.NewPCG(3, 4))}
	prefix := func() netip.Prefix {
		a := netip.AddrFrom4([4]byte{10, byte(d.IntN(2)), byte(d.IntN(4)), byte(d.IntN(256))})
		if d.IntN(4) == 0 {
			a = netip.AddrFrom16([16]byte{0xfd, byte(d.IntN(2)), 15: byte(d.IntN(4))})
		}
		p, _ := a.Prefix(d.IntN(a.BitLen() + 1))
		return p
	}
	for range 200 {
		var items []cidrItem
		for range 30 {
			item := cidrItem{prefix: prefix()}
			if hole := prefix(); covers(item.prefix, hole) {
				item.except = []netip.Prefix{hole}
			}
			items = append(items, item)
		}
		union := newCIDRItems(items)
		for range 50 {
			p := prefix()
			want := slices.ContainsFunc(items, func(i cidrItem) bool {
				return i.prefix.Overlaps(p) && i.prefix.Bits() <= p.Bits() &&
					(len(i.except) == 0 || !i.except[0].Overlaps(p) || i.except[0].Bits() > p.Bits())
			})
			if union.contains(p) != want {
				t.Fatalf("%s in %v: want %t", p, union, want)
			}
		}
	}
}

func TestKeys(t *testing.T) {
	// The same conditions, written in another order, in other kinds and scopes, have the same key.
	a := parse(t, from(`{matchLabels: {"k8s:b": v, "k8s:a": x}}`), Options{}).Rules[0].peers.terms[0]
	b := parse(t, from(`{matchExpressions: [{key: "k8s:a", operator: In, values: [x]}], matchLabels: {"k8s:b": v}}`), Options{}).Rules[0].peers.terms[0]
	c := parse(t, knp("{ingress: [{from: [{podSelector: {matchLabels: {b: v, a: x}}}]}]}"), Options{}).Rules[0].peers.terms[0]
	if a.Key != b.Key || a.Key != c.Key {
		t.Errorf("keys %q, %q, %q", a.Key, b.Key, c.Key)
	}
	if want := "endpoints:k8s:a=x,k8s:b=v,k8s:io.cilium.k8s.policy.cluster=default,k8s:io.kubernetes.pod.namespace=shop"; a.Key != want {
		t.Errorf("key %q, want %q", a.Key, want)
	}
	object := parse(t, in("{fromEndpoints: [{matchLabels: {team: a}, matchExpressions: [{key: any:tier, operator: Exists}]}]}"), Options{})
	want := "[io.cilium.k8s.policy.cluster io.kubernetes.pod.namespace team tier]"
	if got := fmt.Sprint(object.LabelKeys()); got != want {
		t.Errorf("label keys %s, want %s", got, want)
	}
	if got := fmt.Sprint(object.Rules[0].peers.terms[0].LabelKeys()); got != want {
		t.Errorf("label keys of the term %s, want %s", got, want)
	}
	long := cidrTerm(Options{}, slices.Repeat([]cidrItem{{prefix: netip.MustParsePrefix("2001:db8::/32")}}, 50))
	if want := "cidr:2001:db8::/32"; long.Key != want {
		t.Errorf("key %q, want %q", long.Key, want)
	}
	var many []cidrItem
	for i := range 50 {
		many = append(many, cidrItem{prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i)}), 16)})
	}
	if got := cidrTerm(Options{CIDRMatchesPods: true}, many).Key; !strings.HasPrefix(got, "cidr+pods:#") || len(got) > 100 {
		t.Errorf("key %q", got)
	}
}

// TestClustersOfKubernetes: peers of a NetworkPolicy are of the local cluster unless the pod selector names clusters, whatever the option says (spec 13).
func TestClustersOfKubernetes(t *testing.T) {
	mesh := &Peer{Labels: labelset.Set{"k8s:app=web", "k8s:io.cilium.k8s.policy.cluster=west", "k8s:io.kubernetes.pod.namespace=shop"}}
	for selector, want := range map[string]bool{
		"{}": false, "{matchExpressions: [{key: io.cilium.k8s.policy.cluster, operator: Exists}]}": true,
	} {
		doc := "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: shop}\nspec: {podSelector: {}, ingress: [{from: [{podSelector: " + selector + "}]}]}"
		if got := parse(t, doc, Options{AllClusters: true}).Rules[0].peers.terms[0].Matches(mesh); got != want {
			t.Errorf("%s matches a pod of another cluster: %v, want %v", selector, got, want)
		}
	}
}
