// SPDX-License-Identifier: Apache-2.0

// Package label computes the identity-relevant labels of a pod: the set that, numbered, is its
// security identity. The rules are those of the policy specification, section 3.1.
package label

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/internal/reserved"
)

// Set is a label set in its one written form.
type Set = labelset.Set

// Pod is what the labels of a pod follow from.
type Pod struct {
	Labels         map[string]string
	Namespace      string
	ServiceAccount string
	// NamespaceLabels are those of the namespace object; nil while it is not known.
	NamespaceLabels map[string]string
	Cluster         string
	// Keep says which keys stay although the filter drops them; nil = none.
	Keep func(key string) bool
}

// Identity returns the identity-relevant labels of a pod.
func (p Pod) Identity() Set {
	all := map[string]string{}
	for key, value := range p.Labels {
		if (Relevant(key) || p.Keep != nil && p.Keep(key)) && !Added(key) {
			all[key] = value
		}
	}
	for key, value := range p.NamespaceLabels {
		all[reserved.NamespaceLabelsKey+key] = value
	}
	// The API server sets it on every namespace. Adding it here keeps a pod's identity the same
	// whether or not the namespace's object came first.
	all[reserved.NamespaceLabelsKey+reserved.MetadataName] = p.Namespace
	all[reserved.NamespaceKey] = p.Namespace
	all[reserved.ClusterKey] = p.Cluster
	if p.ServiceAccount != "" {
		all[reserved.ServiceAccountKey] = p.ServiceAccount
	}
	set := make(Set, 0, len(all))
	for _, key := range slices.Sorted(maps.Keys(all)) {
		set = append(set, labelset.Label{Source: reserved.Source, Key: key, Value: all[key]}.String())
	}
	slices.Sort(set) // '=' sorts after some characters of keys
	return set
}

// Added reports whether a key is one that Weir adds. A pod that carries it itself must not thereby
// look like a pod of another namespace or service account.
func Added(key string) bool {
	return key == reserved.NamespaceKey || key == reserved.ServiceAccountKey || key == reserved.ClusterKey || strings.HasPrefix(key, reserved.NamespaceLabelsKey)
}

// Keys that are dropped although they are a pod's own: they differ between pods that are alike, and
// every one would be an identity of its own.
var (
	droppedExact = []string{
		"pod-template-hash", "pod-template-generation", "controller-revision-hash", "controller-uid",
		"statefulset.kubernetes.io/pod-name", "apps.kubernetes.io/pod-index",
		"batch.kubernetes.io/job-completion-index", "batch.kubernetes.io/controller-uid", "etcd_node",
	}
	droppedPrefix = []string{"io.kubernetes", "kubernetes.io", "k8s.io", "topology.kubernetes.io", "annotation"}
)

// Relevant reports whether a pod's label of this key is part of its identity.
func Relevant(key string) bool {
	if key == reserved.NamespaceKey || strings.HasPrefix(key, "app.kubernetes.io") {
		return true
	}
	if slices.Contains(droppedExact, key) || strings.Contains(key, "beta.kubernetes.io") {
		return false
	}
	return !slices.ContainsFunc(droppedPrefix, func(p string) bool { return strings.HasPrefix(key, p) })
}

// maxKey and maxValue are the limits of Kubernetes: a prefix of 253, a slash, a name of 63.
const (
	maxKey   = 253 + 1 + 63
	maxValue = 63
)

// Check refuses labels of an object that Kubernetes would not have stored, so that nothing behind
// has to care for control characters or sizes.
func Check(labels map[string]string) error {
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		if key == "" || len(key) > maxKey || !plain(key, "/") {
			errs = append(errs, fmt.Errorf("label key %.80q is not valid", key))
		}
		if len(labels[key]) > maxValue || !plain(labels[key], "") {
			errs = append(errs, fmt.Errorf("value %.80q of label %.80q is not valid", labels[key], key))
		}
	}
	return errors.Join(errs...)
}

func plain(s, extra string) bool {
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '.':
		case strings.IndexByte(extra, c) >= 0:
		default:
			return false
		}
	}
	return true
}
