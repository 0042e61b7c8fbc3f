// SPDX-License-Identifier: Apache-2.0

package state

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/internal/reserved"
	"github.com/weirmesh/weir/services/policy/internal/label"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

func TestSetNumberRefuses(t *testing.T) {
	s := New("default")
	for i, app := range []string{"a", "b"} {
		s.Upsert(&object.Pod{UID: app, Namespace: "n", Name: app, Node: fmt.Sprint(i), Labels: map[string]string{"app": app}})
	}
	acquire, _ := s.TakeIdentityChanges()
	if len(acquire) != 2 {
		t.Fatalf("%d sets asked for", len(acquire))
	}
	tests := []struct {
		set    label.Set
		number uint32
		want   string
	}{
		{acquire[0], 0, "out of range"},
		{acquire[0], 255, "out of range"},
		{acquire[0], 1 << 24, "out of range"},
		{acquire[0], 300, ""},
		{acquire[1], 300, "already means"},
		{acquire[0], 300, ""},
		{label.Set{"k8s:not=asked"}, 300, ""},
		{acquire[1], 301, ""},
	}
	for _, tt := range tests {
		err := s.SetNumber(tt.set, tt.number)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("SetNumber(%v, %d) = %v, want %q", tt.set, tt.number, err, tt.want)
		}
	}
	snapshot, _ := s.Commit()
	if snapshot.Count(KindIdentity) != 2 || snapshot.Count(KindPod) != 2 {
		t.Errorf("%d identities, %d pods", snapshot.Count(KindIdentity), snapshot.Count(KindPod))
	}
}

// Snapshots handed out earlier must not change under their readers.
func TestSnapshotsDoNotChange(t *testing.T) {
	s := New("default")
	s.Upsert(&object.Namespace{Name: "a"})
	first, _ := s.Commit()
	s.Upsert(&object.Namespace{Name: "b"})
	s.Delete(object.Key{Kind: object.KindNamespace, Name: "a"})
	second, change := s.Commit()
	if first.Count(KindNamespace) != 1 || second.Count(KindNamespace) != 1 || second.Revision != first.Revision+1 {
		t.Errorf("counts %d, %d, revisions %d, %d", first.Count(KindNamespace), second.Count(KindNamespace), first.Revision, second.Revision)
	}
	if _, ok := first.Get(Key{KindNamespace, "a"}); !ok {
		t.Error("the first snapshot lost its namespace")
	}
	if len(change.Upserts) != 1 || len(change.Removals) != 1 {
		t.Errorf("change is %+v", change)
	}
	if third, change := s.Commit(); third != second || !change.Empty() {
		t.Error("a commit without changes made a new snapshot")
	}
}

// TestIncrementalEndpoints compares endpoints computed step by step with those computed from nothing,
// over random histories of objects, sessions and registrations that fight for addresses.
func TestIncrementalEndpoints(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("WEIR_TEST_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed: WEIR_TEST_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, seed))
	const nodes, pods = 3, 8
	node := func() string { return fmt.Sprintf("n%d", r.IntN(nodes)) }
	address := func() netip.Addr { return netip.AddrFrom4([4]byte{10, 244, byte(r.IntN(nodes)), byte(r.IntN(4))}) }
	s := New("default")
	var number uint32 = 256
	seen := 0
	for step := range 20_000 {
		switch r.IntN(9) {
		case 0:
			n := r.IntN(nodes)
			s.Upsert(&object.Node{
				Name:      fmt.Sprintf("n%d", n),
				Addresses: []netip.Addr{netip.AddrFrom4([4]byte{172, 30, 0, byte(r.IntN(3))})},
				PodCIDRs:  []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(n), 0}), 24)},
			})
		case 1:
			if r.IntN(4) == 0 {
				s.Delete(object.Key{Kind: object.KindNode, Name: node()})
			}
		case 2, 3:
			p := r.IntN(pods)
			s.Upsert(&object.Pod{
				UID: fmt.Sprintf("%d-%d", p, r.IntN(2)), Namespace: "n", Name: fmt.Sprint(p), Node: node(),
				Labels: map[string]string{"app": fmt.Sprint(r.IntN(3))}, HostNetwork: r.IntN(8) == 0, Unmanaged: r.IntN(8) == 0,
				Finished: r.IntN(8) == 0, StatusAddresses: []netip.Addr{address()}, FixedAddresses: []netip.Addr{address()},
			})
		case 4:
			s.Delete(object.Key{Kind: object.KindPod, Namespace: "n", Name: fmt.Sprint(r.IntN(pods))})
		case 5:
			s.BeginSession(node())
		case 6:
			s.EndSessionStart(node())
		case 7:
			// Most are refused, as they should be.
			_ = s.Register(node(), fmt.Sprintf("%d-%d", r.IntN(pods), r.IntN(2)), []netip.Addr{address(), address()})
		case 8:
			s.Unregister(node(), fmt.Sprintf("%d-%d", r.IntN(pods), r.IntN(2)))
		}
		if r.IntN(3) == 0 {
			acquire, _ := s.TakeIdentityChanges()
			for _, set := range acquire {
				if err := s.SetNumber(set, number); err != nil {
					t.Fatal(err)
				}
				number++
			}
		}
		snapshot, _ := s.Commit()
		got := snapshot.parts[KindEndpoint].get()
		want := s.endpointsFromNothing()
		if len(got) != len(want) {
			t.Fatalf("step %d: %d endpoints, want %d", step, len(got), len(want))
		}
		for uid, w := range want {
			if g, ok := got[uid]; !ok || !g.equal(w) {
				t.Fatalf("step %d:\ngot  %+v\nwant %+v", step, g, w)
			}
		}
		seen = max(seen, len(got))
	}
	if seen < 3 {
		t.Errorf("at most %d endpoints at once: the histories test nothing", seen)
	}
}

// endpointsFromNothing computes all endpoints without what is remembered of earlier ones.
func (s *State) endpointsFromNothing() map[string]Resource {
	remembered := s.claims
	defer func() { s.claims = remembered }()
	s.claims = newClaims()
	for uid := range s.byUID {
		s.claims.set(uid, s.claimOf(uid))
	}
	all := map[string]Resource{}
	for uid := range s.byUID {
		if e, ok := s.endpoint(uid); ok {
			all[uid] = e
		}
	}
	return all
}

// BenchmarkRegister is the cost of one registration in a cluster of 5,000 pods on 100 nodes.
func BenchmarkRegister(b *testing.B) {
	const nodes, pods = 100, 5000
	s := New("default")
	for n := range nodes {
		s.Upsert(&object.Node{
			Name: fmt.Sprintf("n%d", n), PodCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(n), 0}), 24)},
		})
		s.BeginSession(fmt.Sprintf("n%d", n))
	}
	address := func(p int) netip.Addr { return netip.AddrFrom4([4]byte{10, 244, byte(p % nodes), byte(p/nodes + 2)}) }
	for p := range pods {
		s.Upsert(&object.Pod{
			UID: fmt.Sprint(p), Namespace: "default", Name: fmt.Sprintf("p%d", p), Node: fmt.Sprintf("n%d", p%nodes),
			Labels: map[string]string{"app": fmt.Sprint(p % 500)},
		})
	}
	acquire, _ := s.TakeIdentityChanges()
	for i, set := range acquire {
		if err := s.SetNumber(set, uint32(256+i)); err != nil {
			b.Fatal(err)
		}
	}
	for p := range pods {
		if err := s.Register(fmt.Sprintf("n%d", p%nodes), fmt.Sprint(p), []netip.Addr{address(p)}); err != nil {
			b.Fatal(err)
		}
	}
	s.Commit()
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		p := i % pods
		other := netip.AddrFrom4([4]byte{10, 244, byte(p % nodes), byte(100 + i%100)})
		if err := s.Register(fmt.Sprintf("n%d", p%nodes), fmt.Sprint(p), []netip.Addr{other}); err != nil {
			b.Fatal(err)
		}
		if _, change := s.Commit(); change.Empty() {
			b.Fatal("nothing changed")
		}
	}
}

// TestStandInsAreForLabs: else whoever may write pods could be anybody.
func TestStandInsAreForLabs(t *testing.T) {
	pod := &object.Pod{UID: "u", Namespace: "shop", Name: "a", Node: "n1", Cluster: "west", Reserved: "ingress"}
	for on, want := range map[bool]uint32{false: 0, true: reserved.Ingress} {
		s := New("default")
		s.SetStandIns(on)
		s.Upsert(pod)
		labels, number := s.labelsOf(pod)
		if number != want || on == slices.Contains(labels, "k8s:io.cilium.k8s.policy.cluster=default") {
			t.Errorf("stand-ins %t: %v, number %d", on, labels, number)
		}
	}
}
