// SPDX-License-Identifier: Apache-2.0

package label

import (
	"slices"
	"testing"

	"github.com/weirmesh/weir/internal/reserved"
)

func TestRelevant(t *testing.T) {
	tests := []struct {
		key  string
		want bool
	}{
		{"app", true},
		{"app.kubernetes.io/name", true},
		{"io.kubernetes.pod.namespace", true},
		{"io.kubernetes.pod.name", false},
		{"kubernetes.io/hostname", false},
		{"beta.kubernetes.io/arch", false},
		{"node.beta.kubernetes.io/arch", false},
		{"k8s.io/cluster-service", false},
		{"topology.kubernetes.io/zone", false},
		{"pod-template-hash", false},
		{"pod-template-hash-of-mine", true},
		{"pod-template-generation", false},
		{"controller-revision-hash", false},
		{"controller-uid", false},
		{"statefulset.kubernetes.io/pod-name", false},
		{"apps.kubernetes.io/pod-index", false},
		{"batch.kubernetes.io/job-completion-index", false},
		{"batch.kubernetes.io/controller-uid", false},
		{"annotation.example", false},
		{"etcd_node", false},
		{"example.com/kubernetes.io", true},
		{"k8s-app", true},
	}
	for _, tt := range tests {
		if got := Relevant(tt.key); got != tt.want {
			t.Errorf("Relevant(%q) = %t", tt.key, got)
		}
	}
}

func TestIdentity(t *testing.T) {
	pod := Pod{
		// "a" before "a.b" as keys, but "k8s:a.b=1" before "k8s:a=2" as texts: '.' sorts before '='.
		Labels:          map[string]string{"a": "2", "a.b": "1", "pod-template-hash": "x"},
		Namespace:       "shop",
		ServiceAccount:  "default",
		NamespaceLabels: map[string]string{"team": "a"},
		Cluster:         "default",
	}
	want := Set{
		"k8s:a.b=1",
		"k8s:a=2",
		"k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=shop",
		"k8s:io.cilium.k8s.namespace.labels.team=a",
		"k8s:io.cilium.k8s.policy.cluster=default",
		"k8s:io.cilium.k8s.policy.serviceaccount=default",
		"k8s:io.kubernetes.pod.namespace=shop",
	}
	if got := pod.Identity(); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// A pod must not be able to give itself another namespace or service account by its own labels.
func TestOwnLabelsDoNotOverrule(t *testing.T) {
	pod := Pod{
		Labels: map[string]string{
			reserved.NamespaceKey: "kube-system", reserved.ServiceAccountKey: "admin", reserved.ClusterKey: "other",
			reserved.NamespaceLabelsKey + reserved.MetadataName: "kube-system", reserved.NamespaceLabelsKey + "team": "root",
		},
		Namespace: "shop", Cluster: "default",
	}
	want := Pod{Namespace: "shop", Cluster: "default"}.Identity()
	if got := pod.Identity(); !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func FuzzIdentity(f *testing.F) {
	f.Add("app", "todoui", "default", "team", "a")
	f.Add("io.kubernetes.pod.namespace", "kube-system", "shop", "", "")
	f.Fuzz(func(t *testing.T, key, value, namespace, nsKey, nsValue string) {
		labels := map[string]string{key: value}
		if Check(labels) != nil || Check(map[string]string{nsKey: nsValue}) != nil || Check(map[string]string{"n": namespace}) != nil || namespace == "" {
			return
		}
		set := Pod{Labels: labels, Namespace: namespace, NamespaceLabels: map[string]string{nsKey: nsValue}, Cluster: "c"}.Identity()
		if err := set.Check(); err != nil {
			t.Errorf("labels that Kubernetes allows give a set that the broker refuses: %v: %q", err, set)
		}
		if !slices.Contains(set, "k8s:"+reserved.NamespaceKey+"="+namespace) {
			t.Errorf("the namespace is not in %q", set)
		}
	})
}
