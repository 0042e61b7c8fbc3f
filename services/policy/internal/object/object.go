// SPDX-License-Identifier: Apache-2.0

// Package object holds the cluster's objects as far as Weir reads them, checked: what Kubernetes
// objects become before anything is decided. A wrong field is an error with the field's name, so
// that the caller can report it and keep the last good object.
package object

import (
	"fmt"
	"net/netip"
	"slices"
)

// Kinds that Weir's policy service reads.
const (
	KindNode          = "Node"
	KindNamespace     = "Namespace"
	KindPod           = "Pod"
	KindService       = "Service"
	KindEndpointSlice = "EndpointSlice"
)

// Kinds lists them.
func Kinds() []string {
	return slices.Concat([]string{KindNode, KindNamespace, KindPod, KindService, KindEndpointSlice}, PolicyKinds(), EnvoyKinds())
}

// Key names an object. Namespace is empty for nodes and namespaces.
type Key struct {
	Kind      string
	Namespace string
	Name      string
}

// String returns Kind namespace/name.
func (k Key) String() string {
	if k.Namespace == "" {
		return k.Kind + " " + k.Name
	}
	return k.Kind + " " + k.Namespace + "/" + k.Name
}

// Object is one of the pointers below. Objects are never changed after they were made.
type Object interface {
	Key() Key
}

// Node is a member of the cluster.
type Node struct {
	Name      string
	Addresses []netip.Addr
	PodCIDRs  []netip.Prefix
	Labels    map[string]string
}

// Namespace is a namespace.
type Namespace struct {
	Name   string
	Labels map[string]string
	// Visibility is the annotation for pods without one of their own.
	Visibility Visibility
}

// Visibility is an annotation that has traffic read by a proxy; the zero value = none is given.
type Visibility struct{ Annotation, Text string }

// Pod is a pod.
type Pod struct {
	UID            string
	Namespace      string
	Name           string
	Labels         map[string]string
	ServiceAccount string
	// Node is where the pod is bound; empty = not scheduled.
	Node        string
	HostNetwork bool
	// Unmanaged: the annotation AnnotationUnmanaged leaves the pod alone.
	Unmanaged bool
	// Cluster and Reserved are the annotations of that name; empty = not given.
	Cluster, Reserved string
	// Finished: all containers have ended for good; the pod has no network any more.
	Finished bool
	// FixedAddresses are asked for by the annotation AnnotationAddresses.
	FixedAddresses []netip.Addr
	// StatusAddresses are what the pod's status says.
	StatusAddresses []netip.Addr
	Workload        Workload
	NamedPorts      map[string]uint16
	// Visibility is the pod's own annotation.
	Visibility Visibility
	// Ports are the named container ports with their protocols, sorted by name and protocol; names in lower case.
	Ports []NamedPort
}

// NamedPort is a container port with a name.
type NamedPort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}

// Annotations of pods.
const (
	AnnotationAddresses = "weir.dev/ip-addresses"
	AnnotationUnmanaged = "weir.dev/unmanaged"
	// What a proxy reads of a pod's traffic; of a namespace, for its pods that do not say. The older names are for pods alone.
	AnnotationVisibility       = "weir.dev/proxy-visibility"
	AnnotationVisibilityPolicy = "policy.cilium.io/proxy-visibility"
	AnnotationVisibilityOld    = "io.cilium.proxy-visibility"
	// With --stand-ins only: a pod stands for one of another cluster of the mesh, or for an endpoint of a reserved identity ("init", "ingress").
	AnnotationCluster  = "weir.dev/cluster"
	AnnotationReserved = "weir.dev/reserved"
)

// Workload is what owns a pod; the zero value = nothing.
type Workload struct {
	Kind string
	Name string
}

// Protocol of a port.
type Protocol string

// Protocols that a service can have.
const (
	TCP  Protocol = "TCP"
	UDP  Protocol = "UDP"
	SCTP Protocol = "SCTP"
)

// Service is a service.
type Service struct {
	Namespace string
	Name      string
	Type      string
	Labels    map[string]string
	// Selector of its pods; nil = none, its endpoint slices are made by hand.
	Selector map[string]string
	// ClusterIPs are empty for a headless service.
	ClusterIPs []netip.Addr
	// ExternalIPs and LoadBalancerIPs are further addresses that it is served at.
	ExternalIPs     []netip.Addr
	LoadBalancerIPs []netip.Addr
	// SourceRanges are the clients of LoadBalancerIPs; empty = all.
	SourceRanges []netip.Prefix
	// Affinity is how long a client stays with its backend, in seconds; 0 = not at all.
	Affinity uint32
	// ExternalLocal, InternalLocal: traffic stays on the node.
	ExternalLocal, InternalLocal bool
	HealthCheckNodePort          uint16
	Distribution                 Distribution
	Algorithm                    Algorithm
	// PublishNotReady: endpoints that are not ready count as ready.
	PublishNotReady bool
	Ports           []ServicePort
}

// Distribution says which backends a node prefers.
type Distribution uint8

// Distributions. Where no backend is as near as asked for, all are used.
const (
	Anywhere Distribution = iota
	SameZone
	SameNode
)

// Algorithm chooses a backend.
type Algorithm uint8

// Algorithms; 0 = the agent's default.
const (
	DefaultAlgorithm Algorithm = iota
	Random
	Maglev
)

// AnnotationAlgorithm of a service: random or maglev.
const AnnotationAlgorithm = "weir.dev/load-balancing-algorithm"

// ServicePort is a port of a service.
type ServicePort struct {
	Name     string
	Protocol Protocol
	Port     uint16
	// NodePort is open on every node; 0 = none.
	NodePort uint16
}

// EndpointSlice is a part of the backends of a service.
type EndpointSlice struct {
	Namespace string
	Name      string
	// Service is the name of the service it belongs to; empty = of none.
	Service   string
	Ports     []SlicePort
	Endpoints []SliceEndpoint
}

// SlicePort is a port of all endpoints of a slice; its number is already that of the backend.
type SlicePort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}

// SliceEndpoint is one endpoint of a slice.
type SliceEndpoint struct {
	Address netip.Addr
	Ready   bool
	// Serving, Terminating: it answers and is going away; it is not Ready then.
	Serving, Terminating bool
	Node                 string
	Zone                 string
	// ForZones, ForNodes are hints: whom it is meant for; empty = nobody said.
	ForZones, ForNodes []string
}

// Key implements Object.
func (n *Node) Key() Key { return Key{Kind: KindNode, Name: n.Name} }

// Key implements Object.
func (n *Namespace) Key() Key { return Key{Kind: KindNamespace, Name: n.Name} }

// Key implements Object.
func (p *Pod) Key() Key { return Key{Kind: KindPod, Namespace: p.Namespace, Name: p.Name} }

// Key implements Object.
func (service *Service) Key() Key {
	return Key{Kind: KindService, Namespace: service.Namespace, Name: service.Name}
}

// Key implements Object.
func (s *EndpointSlice) Key() Key {
	return Key{Kind: KindEndpointSlice, Namespace: s.Namespace, Name: s.Name}
}

// parseAddr reads one address; v4 in v6 form becomes v4, zones are refused.
func parseAddr(field, s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("%s: %q is not an address", field, s)
	}
	if addr.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%s: %q has a zone", field, s)
	}
	return addr.Unmap(), nil
}
