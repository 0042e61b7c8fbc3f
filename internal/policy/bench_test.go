// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"runtime"
	"strconv"
	"testing"

	"github.com/weirmesh/weir/internal/labelset"
)

// bigCluster is 1,000 policies over 10,000 identities in 100 namespaces.
func bigCluster(b *testing.B) ([]*Rule, []*Peer) {
	b.Helper()
	var rules []*Rule
	for i := range 1000 {
		namespace, app := "ns"+strconv.Itoa(i%100), "app"+strconv.Itoa(i/100)
		doc := fmt.Sprintf(`{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "p%d", "namespace": "%s"}, "spec": {
			"endpointSelector": {"matchLabels": {"app": "%s"}},
			"ingress": [{"fromEndpoints": [{"matchLabels": {"app": "app%d"}}], "toPorts": [{"ports": [{"port": "8080", "protocol": "TCP"}]}]},
				{"fromEndpoints": [{"matchLabels": {"io.kubernetes.pod.namespace": "ns%d"}}]}],
			"egress": [{"toCIDRSet": [{"cidr": "10.%d.0.0/16", "except": ["10.%d.1.0/24"]}]}, {"toEntities": ["cluster"]}]}}`,
			i, namespace, app, i%7, i%13, i%256, i%256)
		rules = append(rules, parse(b, doc, Options{}).Rules...)
	}
	var peers []*Peer
	for i := range 10000 {
		namespace, app := "ns"+strconv.Itoa(i%100), "app"+strconv.Itoa(i/100)
		peers = append(peers, &Peer{Key: strconv.Itoa(i), Labels: append(labelset.Set{}, append(podLabels(namespace, app), "k8s:tier=t"+strconv.Itoa(i%5))...)})
	}
	return rules, peers
}

// BenchmarkCompile resolves every identity's policy in both directions; the terms of all are then matched with every identity, and classes made.
func BenchmarkCompile(b *testing.B) {
	rules, peers := bigCluster(b)
	b.ReportAllocs()
	for b.Loop() {
		policies := map[string]*Resolved{}
		for _, p := range peers {
			for _, d := range []Direction{Ingress, Egress} {
				r, err := Resolve(Options{}, &Subject{Labels: p.Labels}, d, rules, nil)
				if err != nil {
					b.Fatal(err)
				}
				policies[r.Key] = r
			}
		}
		terms := map[string]*Term{}
		for _, r := range policies {
			for _, t := range r.Terms {
				terms[t.Key] = t
			}
		}
		members := map[string]int{}
		for _, t := range terms {
			for _, p := range peers {
				if t.Matches(p) {
					members[t.Key]++
				}
			}
		}
		for _, r := range policies {
			for i := range r.Terms {
				r.Class([]int{i})
			}
		}
		b.ReportMetric(float64(len(policies)), "policies")
		b.ReportMetric(float64(len(terms)), "terms")
	}
	runtime.KeepAlive(peers)
}

func BenchmarkSelects(b *testing.B) {
	rules, peers := bigCluster(b)
	s := &Subject{Labels: peers[42].Labels}
	b.ReportAllocs()
	for b.Loop() {
		for _, r := range rules {
			r.Selects(s)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(rules)), "ns/rule")
}

func BenchmarkTerm(b *testing.B) {
	rules, peers := bigCluster(b)
	t := rules[0].peers.terms[0]
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		t.Matches(peers[i%len(peers)])
	}
}

func BenchmarkParse(b *testing.B) {
	raw := []byte(`{"apiVersion":"cilium.io/v2","kind":"CiliumNetworkPolicy","metadata":{"name":"p","namespace":"shop"},"spec":{"endpointSelector":{"matchLabels":{"app":"a"}},
		"ingress":[{"fromEndpoints":[{"matchLabels":{"app":"b"}}],"toPorts":[{"ports":[{"port":"8080","protocol":"TCP"}]}]}]}}`)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(raw, Options{}); err != nil {
			b.Fatal(err)
		}
	}
}
