// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"testing"

	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/internal/policy"
)

// big is a cluster of 100 namespaces: each identity is an app in a namespace, each policy selects one app and allows others of its namespace, a
// namespace, a prefix and an entity.
type big struct {
	documents  [][]byte
	identities []labelset.Set
}

func newBig(policies, identities int) *big {
	c := &big{}
	for i := range policies {
		c.documents = append(c.documents, fmt.Appendf(nil, `{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "p%d", "namespace": "ns%d"}, "spec": {
			"endpointSelector": {"matchLabels": {"app": "app%d"}},
			"ingress": [{"fromEndpoints": [{"matchLabels": {"app": "app%d"}}], "toPorts": [{"ports": [{"port": "8080", "protocol": "TCP"}]}]},
				{"fromEndpoints": [{"matchLabels": {"io.kubernetes.pod.namespace": "ns%d"}}]}],
			"egress": [{"toCIDRSet": [{"cidr": "10.%d.0.0/16", "except": ["10.%d.1.0/24"]}]}, {"toEntities": ["cluster"]}]}}`,
			i, i%100, i/100, i%7, i%13, i%256, i%256))
	}
	for i := range identities {
		s := labelset.Set{
			"k8s:app=app" + strconv.Itoa(i/100), "k8s:io.cilium.k8s.policy.cluster=default", "k8s:io.cilium.k8s.policy.serviceaccount=default",
			"k8s:io.kubernetes.pod.namespace=ns" + strconv.Itoa(i%100), "k8s:tier=t" + strconv.Itoa(i%5),
		}
		slices.Sort(s)
		c.identities = append(c.identities, s)
	}
	return c
}

// compiledBig is what is kept of a compiled cluster.
type compiledBig struct {
	policies map[string]*policy.Resolved
	members  map[string][]int32 // of terms
	classes  int
}

// compile makes everything anew: what a policy service does when it starts. Changes cost a part of it.
func (c *big) compile(b *testing.B) *compiledBig {
	out := &compiledBig{policies: map[string]*policy.Resolved{}, members: map[string][]int32{}}
	rules := map[string][]*policy.Rule{} // by namespace: those of a namespace select only there
	for _, raw := range c.documents {
		o, err := policy.Parse(raw, policy.Options{})
		if err != nil {
			b.Fatal(err)
		}
		rules[o.Ref.Namespace] = append(rules[o.Ref.Namespace], o.Rules...)
	}
	for i, labels := range c.identities {
		rules := rules["ns"+strconv.Itoa(i%100)]
		for _, d := range []policy.Direction{policy.Ingress, policy.Egress} {
			r, err := policy.Resolve(policy.Options{}, &policy.Subject{Labels: labels}, d, rules, nil)
			if err != nil {
				b.Fatal(err)
			}
			if out.policies[r.Key] == nil {
				out.policies[r.Key] = r
			}
		}
	}
	byAnchor := map[string][]int32{}
	for i, labels := range c.identities {
		for _, text := range labels {
			l, err := labelset.Parse(text)
			if err != nil {
				b.Fatal(err)
			}
			byAnchor[l.Key] = append(byAnchor[l.Key], int32(i))
			byAnchor[l.Key+"="+l.Value] = append(byAnchor[l.Key+"="+l.Value], int32(i))
		}
	}
	for _, r := range out.policies {
		classes := map[string]bool{}
		for _, t := range r.Terms {
			if _, ok := out.members[t.Key]; !ok {
				out.members[t.Key] = c.membersOf(t, byAnchor)
			}
		}
		for i, t := range r.Terms {
			if len(out.members[t.Key]) > 0 && !classes[t.Key] {
				classes[t.Key] = true
				out.classes += len(r.Class([]int{i}))
			}
		}
	}
	return out
}

func (c *big) membersOf(t *policy.Term, byAnchor map[string][]int32) []int32 {
	members := []int32{}
	for _, a := range t.Anchors() {
		for _, i := range byAnchor[a] {
			if t.Matches(&policy.Peer{Key: strconv.Itoa(int(i)), Labels: c.identities[i]}) {
				members = append(members, i)
			}
		}
	}
	return members
}

// BenchmarkCompile compiles 1,000 policies for 10,000 identities from nothing, and twice and four times as many of either.
func BenchmarkCompile(b *testing.B) {
	for _, size := range []struct{ policies, identities int }{{1000, 10_000}, {2000, 10_000}, {4000, 10_000}, {1000, 20_000}, {1000, 40_000}} {
		b.Run(fmt.Sprintf("policies=%d/identities=%d", size.policies, size.identities), func(b *testing.B) {
			c := newBig(size.policies, size.identities)
			var kept *compiledBig
			before := heap()
			for b.Loop() {
				kept = c.compile(b)
			}
			b.ReportMetric(float64(heap()-before)/(1<<20), "MiB")
			b.ReportMetric(float64(len(kept.policies)), "resolved")
			b.ReportMetric(float64(len(kept.members)), "terms")
			runtime.KeepAlive(kept)
			runtime.KeepAlive(c)
		})
	}
}

// heap is what is in use after a collection.
func heap() uint64 {
	runtime.GC()
	runtime.GC() // what finalizers held
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
