// SPDX-License-Identifier: Apache-2.0

// Package reserved holds the identity numbers that are not given: those with a meaning of their own
// (policy specification, section 6.1), and the fixed ones of the cluster's DNS pods.
package reserved

import (
	"slices"

	"github.com/weirmesh/weir/internal/labelset"
)

// Numbers with a meaning of their own.
const (
	Unknown       = 0
	Host          = 1
	World         = 2
	Unmanaged     = 3
	Health        = 4
	Init          = 5
	RemoteNode    = 6
	KubeAPIServer = 7
	Ingress       = 8
	WorldIPv4     = 9
	WorldIPv6     = 10
)

// Numbers that the identity broker gives.
const (
	FirstGiven = 256
	LastGiven  = 1<<24 - 1
)

// Keys of the labels that Weir adds to a pod's own. Their names are those that existing policies use.
const (
	Source             = "k8s"
	NamespaceKey       = "io.kubernetes.pod.namespace"
	NamespaceLabelsKey = "io.cilium.k8s.namespace.labels."
	ServiceAccountKey  = "io.cilium.k8s.policy.serviceaccount"
	ClusterKey         = "io.cilium.k8s.policy.cluster"
	// MetadataName is the label that the API server gives every namespace.
	MetadataName = "kubernetes.io/metadata.name"
)

// Identity is a number and its labels.
type Identity struct {
	Number uint32
	Labels labelset.Set
}

// dnsNamespace and dnsLabel tell the cluster's DNS pods.
const (
	dnsNamespace = "kube-system"
	dnsLabel     = "k8s-app"
)

// DNS returns the fixed identity of a pod, if it is one of the cluster's DNS: the identity broker and
// NATS may need names to start, so DNS must not wait for them. The label set is compiled in, not the
// pod's own: a number must mean one set, whatever else the pod carries.
func DNS(namespace string, labels map[string]string, cluster string) (Identity, bool) {
	number := dnsNumber(labels[dnsLabel])
	if namespace != dnsNamespace || number == 0 {
		return Identity{}, false
	}
	return dns(number, labels[dnsLabel], cluster), true
}

func dnsNumber(app string) uint32 {
	switch app {
	case "kube-dns":
		return 102
	case "coredns":
		return 104
	}
	return 0
}

func dns(number uint32, app, cluster string) Identity {
	labels := labelset.Set{
		Source + ":" + dnsLabel + "=" + app,
		Source + ":" + NamespaceLabelsKey + MetadataName + "=" + dnsNamespace,
		Source + ":" + ClusterKey + "=" + cluster,
		Source + ":" + NamespaceKey + "=" + dnsNamespace,
	}
	slices.Sort(labels)
	return Identity{Number: number, Labels: labels}
}

// All returns every reserved and fixed identity of a cluster, by number. Reserved labels have no
// value, and are written without `=`.
func All(cluster string) []Identity {
	names := []string{
		"host", "world", "unmanaged", "health", "init", "remote-node", "kube-apiserver", "ingress", "world-ipv4", "world-ipv6",
	}
	var all []Identity
	for i, name := range names {
		all = append(all, Identity{Number: uint32(i) + Host, Labels: labelset.Set{"reserved:" + name}})
	}
	for _, app := range []string{"kube-dns", "coredns"} {
		all = append(all, dns(dnsNumber(app), app, cluster))
	}
	return all
}
