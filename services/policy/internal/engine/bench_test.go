// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"strconv"
	"testing"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// size of a cluster: namespaces of 100 identities; each policy lets two apps, a prefix and the whole namespace in.
type size struct{ policies, identities int }

func build(b *testing.B, s size) *Engine {
	b.Helper()
	e := New(policy.Options{})
	namespaces := s.identities / 100
	for i := range s.identities {
		labels := pod(fmt.Sprint("ns", i%namespaces), fmt.Sprint("app", i/namespaces))
		e.SetPeer(peerOf(strconv.Itoa(256+i), labels))
		e.SetSubject(SubjectID{fmt.Sprint("n", i%100), strconv.Itoa(i)}, &policy.Subject{Labels: labels})
	}
	for i, o := range objects(b, s) {
		e.SetObject(object.Key{Kind: object.KindCiliumNetworkPolicy, Namespace: o.Ref.Namespace, Name: strconv.Itoa(i)}, o)
	}
	e.Commit()
	return e
}

func objects(b *testing.B, s size) []*policy.Object {
	b.Helper()
	namespaces := s.identities / 100
	var all []*policy.Object
	for i := range s.policies {
		o, err := policy.Parse(fmt.Appendf(nil, `{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p%d, namespace: ns%d, uid: p}, spec: {
			endpointSelector: {matchLabels: {app: app%d}}, ingress: [
			{fromEndpoints: [{matchLabels: {app: app%d}}], toPorts: [{ports: [{port: "80", protocol: TCP}]}]}, {fromEndpoints: [{matchLabels: {app: app%d}}]},
			{fromCIDR: [10.%d.%d.0/24]}, {fromEndpoints: [{}], toPorts: [{ports: [{port: "9090", protocol: TCP}]}]}]}}`,
			i, i%namespaces, (i/namespaces)%100, (i/namespaces+1)%100, (i/namespaces+2)%100, i/256%256, i%256), policy.Options{})
		if err != nil {
			b.Fatal(err)
		}
		all = append(all, o)
	}
	return all
}

var sizes = []size{{100, 1000}, {1000, 1000}, {1000, 10_000}}

// BenchmarkWhole compiles a cluster from nothing.
func BenchmarkWhole(b *testing.B) {
	for _, s := range sizes {
		b.Run(fmt.Sprintf("%d policies %d identities", s.policies, s.identities), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				e := build(b, s)
				b.ReportMetric(float64(len(e.view.Policies)), "policies")
				b.ReportMetric(float64(len(e.view.Selectors)), "selectors")
			}
		})
	}
}

// BenchmarkNewIdentity adds a peer that some selectors match, and takes it away.
func BenchmarkNewIdentity(b *testing.B) {
	for _, s := range sizes {
		b.Run(fmt.Sprintf("%d policies %d identities", s.policies, s.identities), func(b *testing.B) {
			e := build(b, s)
			p := peerOf("100000", pod("ns0", "app1", "k8s:new=yes"))
			for b.Loop() {
				e.SetPeer(p)
				e.Commit()
				e.DeletePeer(p.Key)
				e.Commit()
			}
		})
	}
}

// BenchmarkNewPod adds a pod of a known identity, and takes it away.
func BenchmarkNewPod(b *testing.B) {
	e := build(b, sizes[2])
	s := &policy.Subject{Labels: pod("ns0", "app1")}
	for b.Loop() {
		e.SetSubject(SubjectID{"n1", "new"}, s)
		e.Commit()
		e.DeleteSubject(SubjectID{"n1", "new"})
		e.Commit()
	}
}

// BenchmarkChangedPolicy replaces a policy by another version and back.
func BenchmarkChangedPolicy(b *testing.B) {
	e := build(b, sizes[2])
	all := objects(b, sizes[2])
	key := object.Key{Kind: object.KindCiliumNetworkPolicy, Namespace: "ns0", Name: "0"}
	for b.Loop() {
		e.SetObject(key, all[100]) // the same namespace's, for another app
		e.Commit()
		e.SetObject(key, all[0])
		e.Commit()
	}
}
