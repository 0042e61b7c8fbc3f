// SPDX-License-Identifier: Apache-2.0

package hub

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/weirmesh/weir/services/policy/internal/object"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// follower is an agent as far as state goes: it applies updates and checks that nothing points at what is not there.
type follower struct {
	t         *testing.T
	node      string
	sent      *state.Snapshot
	resources map[state.Key]state.Resource
	members   map[string]map[string]bool
}

// apply takes in a part of what leads to a snapshot.
func (f *follower) apply(c state.Change, to *state.Snapshot) {
	f.t.Helper()
	for _, r := range c.Upserts {
		f.resources[r.Key()] = r
		if s, ok := r.(state.Selector); ok {
			f.members[s.Selector.Key] = map[string]bool{}
			for _, m := range s.Members() {
				f.members[s.Selector.Key][m] = true
			}
		}
	}
	for _, s := range c.Selectors {
		all, ok := f.members[s.Key]
		if !ok {
			f.t.Fatalf("%s: change of selector %s, which is not there", f.node, s.Key)
		}
		for _, m := range s.Joined {
			all[m] = true
		}
		for _, m := range s.Left {
			delete(all, m)
		}
	}
	for _, r := range c.Removals {
		if f.resources[r.Key] == nil {
			f.t.Fatalf("%s: %v is removed and was not there", f.node, r.Key)
		}
		delete(f.resources, r.Key)
		if r.Key.Kind == state.KindSelector {
			delete(f.members, r.Key.Name)
		}
	}
	used := map[string]bool{}
	for _, r := range f.resources {
		s, ok := r.(state.Subject)
		if !ok {
			continue
		}
		if _, stays := to.Policy().Nodes[f.node].Subjects[s.Name]; stays {
			used[s.Ingress], used[s.Egress] = true, true
		}
	}
	for _, r := range f.resources {
		switch r := r.(type) {
		case state.Policy:
			for _, s := range r.Selectors {
				if f.members[s] == nil {
					f.t.Fatalf("%s: policy %s without selector %s", f.node, r.Policy.Key, s)
				}
			}
		case state.Subject:
			for _, key := range []string{r.Ingress, r.Egress} {
				if key != "" && f.resources[state.Key{Kind: state.KindPolicy, Name: key}] == nil {
					f.t.Fatalf("%s: subject %s without policy %s", f.node, r.Name, key)
				}
			}
		case state.Endpoint:
			if _, stays := to.Get(r.Key()); stays { // who is about to go needs no class
				f.known(r, used)
			}
		}
	}
}

// known checks that every policy in use has a class for an address: the selectors that its peer is a member of are those of a class.
func (f *follower) known(e state.Endpoint, used map[string]bool) {
	f.t.Helper()
	if e.HostNetwork {
		return
	}
	for i := range e.Addresses {
		peer := strconv.Itoa(int(e.Identity))
		if i < len(e.Variants) && e.Variants[i] != "" {
			peer += "/" + e.Variants[i]
		}
		for _, r := range f.resources {
			p, ok := r.(state.Policy)
			if !ok || !used[p.Policy.Key] {
				continue
			}
			var in []int
			for i, s := range p.Selectors {
				if f.members[s][peer] {
					in = append(in, i)
				}
			}
			found := false
			for _, c := range p.Classes {
				found = found || slices.Equal(c.Selectors, in)
			}
			if !found {
				f.t.Fatalf("%s: policy %s has no class for peer %s, which selectors %v match", f.node, p.Policy.Key, peer, in)
			}
		}
	}
}

// text is what the follower holds, for comparison.
func (f *follower) text() map[string]string {
	all := map[string]string{}
	for key, r := range f.resources {
		if key.Kind == state.KindSelector {
			all[fmt.Sprint(key)] = fmt.Sprint(slices.Sorted(maps.Keys(f.members[key.Name])))
			continue
		}
		switch r := r.(type) {
		case state.Policy:
			all[fmt.Sprint(key)] = fmt.Sprintf("%+v", *r.Policy)
		case state.Service:
			all[fmt.Sprint(key)] = fmt.Sprintf("%+v %+v", *r.Service, r.Ports)
		default:
			all[fmt.Sprint(key)] = fmt.Sprintf("%+v", r)
		}
	}
	return all
}

// TestFollowers sends random histories to agents that lag in different ways, in small updates: after each update nothing points at what is not there, and
// in the end every agent holds what a new one would be sent.
func TestFollowers(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("WEIR_TEST_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed: WEIR_TEST_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, seed))
	st := state.New("default")
	const nodes = 3
	var followers []*follower
	for i := range nodes {
		st.Upsert(&object.Node{
			Name: fmt.Sprint("n", i), Addresses: []netip.Addr{netip.AddrFrom4([4]byte{172, 30, 0, byte(i)})},
			PodCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(i), 0}), 24)},
			Labels:   map[string]string{"topology.kubernetes.io/zone": fmt.Sprint(i % 2)},
		})
		for range 2 {
			followers = append(followers, &follower{t: t, node: fmt.Sprint("n", i), resources: map[state.Key]state.Resource{}, members: map[string]map[string]bool{}})
		}
	}
	st.MarkSynced()
	specs := []string{
		`{endpointSelector: {matchLabels: {app: a%d}}, ingress: [{fromEndpoints: [{matchLabels: {app: a%d}}]}]}`,
		`{endpointSelector: {matchLabels: {app: a%d}}, egress: [{toEndpoints: [{matchLabels: {app: a%d}}], toPorts: [{ports: [{port: web}]}]}]}`,
		`{endpointSelector: {matchLabels: {app: a%d}}, egress: [{toEntities: [world]}], egressDeny: [{toCIDR: [10.%d.0.0/16]}]}`,
		`{endpointSelector: {matchLabels: {pod-template-hash: h%d}}, ingress: [{fromEntities: [nobody%d]}]}`,
		`{endpointSelector: {matchLabels: {app: a%d}}, ingress: [{toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{path: "/%d"}]}}]}]}`,
		`{endpointSelector: {matchLabels: {app: a%d}}, egress: [{toFQDNs: [{matchName: a%d.example}]},
			{toEndpoints: [{}], toPorts: [{ports: [{port: "53"}], rules: {dns: [{matchPattern: "*"}]}}]}]}`,
		`{endpointSelector: {matchLabels: {pod-template-hash: h%d}}, ingress: [{fromEndpoints: [{matchLabels: {pod-template-hash: h%d}}]}]}`,
	}
	numbers := map[string]uint32{}
	proxies := []*proxyFollower{newProxyFollower(t), newProxyFollower(t)}
	for i := range nodes {
		st.BeginSession(fmt.Sprint("n", i))
	}
	for step := range 1500 {
		for range 1 + r.IntN(3) {
			switch r.IntN(5) {
			case 0, 1:
				i := r.IntN(12)
				node := r.IntN(nodes)
				st.Upsert(&object.Pod{
					UID: fmt.Sprintf("%d-%d", i, node), Namespace: "shop", Name: fmt.Sprint(i), Node: fmt.Sprint("n", node),
					Labels: map[string]string{"app": fmt.Sprint("a", r.IntN(3)), "pod-template-hash": fmt.Sprint("h", r.IntN(2))}, Unmanaged: r.IntN(10) == 0,
					StatusAddresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(node), byte(i)})},
					Ports:           []object.NamedPort{{Name: "web", Protocol: object.TCP, Port: uint16(8080 + i%2)}},
				})
			case 2:
				st.Delete(object.Key{Kind: object.KindPod, Namespace: "shop", Name: fmt.Sprint(r.IntN(12))})
			case 3:
				spec := fmt.Sprintf(specs[r.IntN(len(specs))], r.IntN(3), r.IntN(3))
				o, _, err := object.Decode(object.KindCiliumNetworkPolicy, policyJSON(t, fmt.Sprint("p", r.IntN(6)), step+1, spec))
				if err != nil {
					t.Fatal(err)
				}
				st.Upsert(o)
			case 4:
				st.Delete(object.Key{Kind: object.KindCiliumNetworkPolicy, Namespace: "shop", Name: fmt.Sprint("p", r.IntN(6))})
			}
		}
		acquire, _ := st.TakeIdentityChanges()
		for _, set := range acquire {
			if numbers[set.Key()] == 0 {
				numbers[set.Key()] = uint32(256 + len(numbers))
			}
			if err := st.SetNumber(set, numbers[set.Key()]); err != nil {
				t.Fatal(err)
			}
		}
		snapshot, _ := st.Commit()
		if r.IntN(3) == 0 { // of the filters that there are now
			reportSlots(t, r, st, fmt.Sprint("n", r.IntN(nodes)))
			snapshot, _ = st.Commit()
		}
		together := step%20 == 19 // nobody lags longer than what rests is kept
		for _, f := range followers {
			if !together && r.IntN(4) > 0 {
				continue // it lags
			}
			for _, c := range chunk(state.Diff(f.sent, snapshot).For(f.node), 1+r.IntN(6)) {
				f.apply(c, snapshot)
			}
			f.sent = snapshot
		}
		for _, p := range proxies {
			if together || r.IntN(4) == 0 {
				p.follow(snapshot.Render(), 1+r.IntN(4))
			}
		}
		if together {
			st.Rest()
		}
	}
	for _, p := range proxies {
		fresh := newProxyFollower(t)
		fresh.follow(p.sent, 1000)
		if got, want := p.text(), fresh.text(); !maps.Equal(got, want) {
			t.Errorf("an xDS server holds\n%v\nwant\n%v", got, want)
		}
	}
	for _, f := range followers {
		fresh := &follower{t: t, node: f.node, resources: map[state.Key]state.Resource{}, members: map[string]map[string]bool{}}
		for _, c := range chunk(state.Diff(nil, f.sent).For(f.node), 1000) {
			fresh.apply(c, f.sent)
		}
		got, want := f.text(), fresh.text()
		for key := range want {
			if got[key] != want[key] {
				t.Errorf("%s: %s is\n%s\nwant\n%s", f.node, key, got[key], want[key])
			}
		}
		if len(got) != len(want) {
			t.Errorf("%s holds %d resources, want %d", f.node, len(got), len(want))
		}
	}
}

func policyJSON(t *testing.T, name string, generation int, spec string) []byte {
	t.Helper()
	data, err := yaml.YAMLToJSON(fmt.Appendf(nil, "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: %s, namespace: shop, uid: %s, generation: %d}\nspec: %s\n",
		name, name, generation, spec))
	if err != nil {
		t.Fatal(err)
	}
	return data
}
