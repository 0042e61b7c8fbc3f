// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

func pod(namespace, app string, more ...string) labelset.Set {
	s := labelset.Set(append([]string{
		"k8s:app=" + app, "k8s:io.cilium.k8s.policy.cluster=default", "k8s:io.kubernetes.pod.namespace=" + namespace,
	}, more...))
	slices.Sort(s)
	return s
}

func parse(t *testing.T, kind, namespace, name, spec string) (object.Key, *policy.Object) {
	t.Helper()
	group := "cilium.io/v2"
	if kind == object.KindNetworkPolicy {
		group = "networking.k8s.io/v1"
	}
	scope := ""
	if namespace != "" {
		scope = ", namespace: " + namespace
	}
	o, err := policy.Parse(fmt.Appendf(nil, "apiVersion: %s\nkind: %s\nmetadata: {name: %s%s, uid: %s}\nspec: %s\n", group, kind, name, scope, name, spec), policy.Options{})
	if err != nil {
		t.Fatalf("%s: %v", spec, err)
	}
	return object.Key{Kind: kind, Namespace: namespace, Name: name}, o
}

func peerOf(key string, labels labelset.Set) *policy.Peer {
	return &policy.Peer{Key: key, Labels: labels}
}

const webToAPI = `{endpointSelector: {matchLabels: {app: api}}, ingress: [{fromEndpoints: [{matchLabels: {app: web}}]}]}`

// What is not concerned costs nothing.
func TestWorkIsInProportion(t *testing.T) {
	e := New(policy.Options{})
	for i := range 100 {
		e.SetPeer(peerOf(strconv.Itoa(256+i), pod("shop", fmt.Sprint("app", i))))
	}
	e.SetPeer(peerOf("1000", pod("shop", "web")))
	e.SetSubject(SubjectID{"n1", "a"}, &policy.Subject{Labels: pod("shop", "api")})
	e.SetSubject(SubjectID{"n1", "other"}, &policy.Subject{Labels: pod("shop", "other")})
	for i := range 20 {
		e.SetObject(parse(t, object.KindCiliumNetworkPolicy, "shop", fmt.Sprint("p", i),
			fmt.Sprintf(`{endpointSelector: {matchLabels: {app: api}}, ingress: [{fromEndpoints: [{matchLabels: {app: app%d}}]}]}`, i)))
	}
	e.SetObject(parse(t, object.KindCiliumNetworkPolicy, "shop", "web", webToAPI))
	before := e.Commit()
	work := func(what string, want Counters, wantView bool, f func()) {
		t.Helper()
		counts, view := e.Counters(), e.Commit()
		f()
		after := e.Commit()
		got := e.Counters()
		got = Counters{Resolved: got.Resolved - counts.Resolved, Matched: got.Matched - counts.Matched, Decided: got.Decided - counts.Decided}
		if got != want {
			t.Errorf("%s: work is %+v, want %+v", what, got, want)
		}
		if (view != after) != wantView {
			t.Errorf("%s: a new view: %v, want %v", what, view != after, wantView)
		}
	}
	if len(before.Policies) != 1 || len(before.Selectors) != 22 { // 21 selectors and the local host
		t.Fatalf("%d policies, %d selectors", len(before.Policies), len(before.Selectors))
	}
	work("a pod of a known class", Counters{}, true, func() {
		e.SetSubject(SubjectID{"n2", "b"}, &policy.Subject{Labels: pod("shop", "api")})
	})
	work("it goes", Counters{}, true, func() { e.DeleteSubject(SubjectID{"n2", "b"}) })
	work("the same again", Counters{}, false, func() {
		e.SetPeer(peerOf("1000", pod("shop", "web")))
		e.SetSubject(SubjectID{"n1", "a"}, &policy.Subject{Labels: pod("shop", "api")})
	})
	work("a peer that no selector can match", Counters{}, false, func() { e.SetPeer(peerOf("1001", pod("shop", "nobody"))) })
	work("a peer that one selector matches, in a class that is there", Counters{Matched: 1}, true, func() {
		e.SetPeer(peerOf("1002", pod("shop", "web", "k8s:tier=front")))
	})
	work("a policy that selects nobody", Counters{}, false, func() {
		e.SetObject(parse(t, object.KindCiliumNetworkPolicy, "elsewhere", "web", webToAPI))
	})
	work("a policy of one class", Counters{Resolved: 2, Decided: 1}, true, func() {
		e.SetObject(parse(t, object.KindCiliumNetworkPolicy, "shop", "closed", `{endpointSelector: {matchLabels: {app: other}}, egress: [{}]}`))
	})
}

func TestSelectorSince(t *testing.T) {
	e := New(policy.Options{})
	e.SetSubject(SubjectID{"n1", "a"}, &policy.Subject{Labels: pod("shop", "api")})
	e.SetObject(parse(t, object.KindCiliumNetworkPolicy, "shop", "web", webToAPI))
	for i := range 100 {
		e.SetPeer(peerOf(strconv.Itoa(256+i), pod("shop", "web")))
	}
	r := rand.New(rand.NewPCG(1, 2))
	selector := func() *Selector {
		for _, s := range e.Commit().Selectors {
			if s.Key != "entity:host" {
				return s
			}
		}
		t.Fatal("no selector")
		return nil
	}
	var versions []*Selector
	var members []map[string]bool
	model := map[string]bool{}
	for i := range 100 {
		model[strconv.Itoa(256+i)] = true
	}
	for range 200 {
		for range r.IntN(3) {
			key := strconv.Itoa(256 + r.IntN(150))
			if model[key] {
				e.DeletePeer(key)
				delete(model, key)
			} else {
				e.SetPeer(peerOf(key, pod("shop", "web")))
				model[key] = true
			}
		}
		versions, members = append(versions, selector()), append(members, maps.Clone(model))
	}
	for range 500 {
		i := r.IntN(len(versions))
		j := i + r.IntN(len(versions)-i)
		old, new := versions[i], versions[j]
		if want := slices.Sorted(maps.Keys(members[j])); !slices.Equal(new.Members(), want) || new.Size() != len(want) {
			t.Fatalf("version %d has %v, want %v", j, new.Members(), want)
		}
		joined, left := new.Since(old)
		got := maps.Clone(members[i])
		for _, m := range joined {
			if got[m] {
				t.Errorf("%s joined and was there", m)
			}
			got[m] = true
		}
		for _, m := range left {
			if !got[m] {
				t.Errorf("%s left and was not there", m)
			}
			delete(got, m)
		}
		if !maps.Equal(got, members[j]) {
			t.Fatalf("from %d to %d: joined %v, left %v", i, j, joined, left)
		}
	}
}

// plain is a view without what depends on its history.
func plain(v *View) map[string]any {
	all := map[string]any{}
	for key, p := range v.Policies {
		all["policy "+key] = *p
	}
	for key, s := range v.Selectors {
		all["selector "+key] = [2]any{s.Members(), append([]string{}, s.Named...)}
	}
	for key, p := range v.CIDRs {
		all[key] = *p
	}
	for key, n := range v.Nodes {
		all["node "+key] = *n
	}
	for key, f := range v.Filters {
		all["filter "+key] = *f
	}
	return all
}

// TestHistoryDoesNotMatter compares an engine that went through a random history with one that was told only how it ended.
func TestHistoryDoesNotMatter(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("WEIR_TEST_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed: WEIR_TEST_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, seed))
	apps := []string{"a", "b", "c", "d"}
	specs := []string{
		`{endpointSelector: {matchLabels: {app: %[1]s}}, ingress: [{fromEndpoints: [{matchLabels: {app: %[2]s}}]}]}`,
		`{endpointSelector: {matchLabels: {app: %[1]s}}, egress: [{toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]}, {toEntities: [world]}]}`,
		`{endpointSelector: {matchLabels: {app: %[1]s}}, egressDeny: [{toCIDR: [10.1.2.0/24]}]}`,
		`{endpointSelector: {}, ingress: [{fromEntities: [cluster]}], egress: [{toEndpoints: [{matchLabels: {app: %[2]s}}], toPorts: [{ports: [{port: web}]}]}]}`,
		`{endpointSelector: {matchExpressions: [{key: app, operator: NotIn, values: [%[1]s]}]}, egress: [{toServices: [{k8sService: {serviceName: %[2]s, namespace: shop}}]}]}`,
		`{endpointSelector: {matchLabels: {app: %[1]s}}, ingress: [{fromCIDRSet: [{cidrGroupRef: g}]}]}`,
		`{endpointSelector: {matchLabels: {app: %[1]s}}, ingress: [{fromEndpoints: [{matchLabels: {app: %[2]s}}],
			toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{path: "/%[2]s"}]}}]}]}`,
		`{endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{path: "/%[1]s"}, {method: GET}]}}]}]}`,
		`{endpointSelector: {matchLabels: {app: %[1]s}}, egress: [{toFQDNs: [{matchName: %[2]s.example}]},
			{toEndpoints: [{matchLabels: {app: %[2]s}}], toPorts: [{ports: [{port: "53"}], rules: {dns: [{matchPattern: "*.%[1]s"}]}}]}]}`,
	}
	type told struct {
		objects  map[object.Key]*policy.Object
		peers    map[string]*policy.Peer
		subjects map[SubjectID]*policy.Subject
		services map[string]policy.Service
		group    *policy.CIDRGroup
		ports    int
		api      []netip.Addr
	}
	now := told{map[object.Key]*policy.Object{}, map[string]*policy.Peer{}, map[SubjectID]*policy.Subject{}, map[string]policy.Service{}, nil, 0, nil}
	e := New(policy.Options{})
	port := policy.NamedPort{Name: "web", Proto: policy.TCP, Port: 8080}
	for step := range 3000 {
		namespace := []string{"shop", "other"}[r.IntN(2)]
		app := apps[r.IntN(len(apps))]
		switch r.IntN(8) {
		case 0, 1:
			key, o := parse(t, object.KindCiliumNetworkPolicy, namespace, fmt.Sprint("p", r.IntN(5)), fmt.Sprintf(specs[r.IntN(len(specs))], app, apps[r.IntN(len(apps))]))
			if r.IntN(3) == 0 {
				o = nil
				delete(now.objects, key)
			} else {
				now.objects[key] = o
			}
			e.SetObject(key, o)
		case 2, 3:
			p := peerOf(fmt.Sprint(256+r.IntN(6)), pod(namespace, app))
			if r.IntN(2) == 0 {
				p = &policy.Peer{Key: p.Key + "/v", Labels: p.Labels, NamedPorts: []policy.NamedPort{port}}
			}
			if r.IntN(3) == 0 {
				delete(now.peers, p.Key)
				e.DeletePeer(p.Key)
			} else {
				now.peers[p.Key] = p
				e.SetPeer(p)
			}
		case 4:
			id := SubjectID{fmt.Sprint("n", r.IntN(3)), fmt.Sprint(r.IntN(4))}
			if r.IntN(3) == 0 {
				delete(now.subjects, id)
				e.DeleteSubject(id)
			} else {
				now.subjects[id] = &policy.Subject{Labels: pod(namespace, app)}
				if r.IntN(3) == 0 {
					now.subjects[id].Visibility = []policy.Visibility{{Direction: policy.Ingress, Port: 81, Proto: policy.TCP, Kind: policy.FilterHTTP}}
				}
				e.SetSubject(id, now.subjects[id])
			}
		case 5:
			s := policy.Service{Namespace: "shop", Name: app, Selector: map[string]string{"app": apps[r.IntN(len(apps))]}}
			if r.IntN(3) == 0 {
				s.Selector, s.Addresses = nil, []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 2, byte(r.IntN(3))})}
			}
			if r.IntN(3) == 0 {
				delete(now.services, app)
				e.DeleteService("shop", app)
			} else {
				now.services[app] = s
				e.SetService(s)
			}
		case 6:
			now.group = nil
			if r.IntN(3) > 0 {
				now.group = &policy.CIDRGroup{Name: "g", Prefixes: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(r.IntN(3)), 0, 0}), 16)}}
			}
			e.SetGroup("g", now.group)
		case 7:
			if now.ports == 0 || r.IntN(2) == 0 {
				now.ports++
				e.AddPort(port)
			} else {
				now.ports--
				e.RemovePort(port)
			}
			now.api = nil
			if r.IntN(2) == 0 {
				now.api = []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 2, byte(r.IntN(3))})}
			}
			e.SetAPIServers(now.api)
		}
		if step%3 != 0 {
			continue
		}
		e.Commit()
		if step%30 != 0 {
			continue
		}
		for range Rests {
			e.Rest()
		}
		got := plain(e.Commit())
		fresh := New(policy.Options{})
		for id, s := range now.subjects {
			fresh.SetSubject(id, s)
		}
		for key, o := range now.objects {
			fresh.SetObject(key, o)
		}
		for _, p := range now.peers {
			fresh.SetPeer(p)
		}
		for _, s := range now.services {
			fresh.SetService(s)
		}
		fresh.SetGroup("g", now.group)
		for range now.ports {
			fresh.AddPort(port)
		}
		fresh.SetAPIServers(now.api)
		want := plain(fresh.Commit())
		for key := range want {
			if !reflect.DeepEqual(got[key], want[key]) {
				t.Fatalf("step %d: %s is\n%+v\nwant\n%+v", step, key, got[key], want[key])
			}
		}
		if len(got) != len(want) {
			t.Fatalf("step %d: %v, want %v", step, slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
		}
		for key := range now.objects {
			if e.Selected(key) != fresh.Selected(key) {
				t.Fatalf("step %d: %v selects %d, want %d", step, key, e.Selected(key), fresh.Selected(key))
			}
		}
	}
}
