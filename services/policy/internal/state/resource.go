// SPDX-License-Identifier: Apache-2.0

package state

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"

	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/label"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// Kind says what a resource is. Resources of one change are applied in the order of these numbers
// and removed in the reverse one, so that nothing ever points at what is not there: policies know a peer
// before an address is it, and addresses are the peers that a policy tells apart before a subject has it.
type Kind int

// Kinds of resources.
const (
	KindNamespace Kind = iota
	KindIdentity
	KindSelector
	KindPolicy
	KindPeer
	KindNode
	KindEndpoint
	KindSubject
	KindService
	KindPod
	kinds // how many there are
)

// Key names a resource: node, namespace by name, identity by number, service by namespace/name, pod
// and endpoint by the pod's uid, selector, policy and peer by their key, subject by its key. What several nodes have under one name, each
// its own, has `@node` at the end.
type Key struct {
	Kind Kind
	Name string
}

// Resource is one object of what agents are told. Implementations are the value types below; they
// are never changed after they were made.
type Resource interface {
	Key() Key
	// Scope is the only node that the resource is for; empty = all.
	Scope() string
	equal(Resource) bool
}

// Node is a member of the cluster.
type Node struct {
	Name            string
	Addresses       []netip.Addr
	PodCIDRs        []netip.Prefix
	Labels          map[string]string
	HealthAddresses []netip.Addr
}

// Namespace is a namespace.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// Identity is a number and what it means.
type Identity struct {
	Number uint32
	Labels label.Set
	// Node is the only one where it means that; empty = all.
	Node string
}

// Service is a service with its backends.
type Service struct {
	*object.Service
	Ports []ServicePort
}

// ServicePort is one port of a service.
type ServicePort struct {
	object.ServicePort
	// Route is the key of the filter that pods' connections to the cluster IPs go through first; empty = none.
	Route    string
	Backends []Backend
}

// Backend serves a port.
type Backend struct {
	Address netip.Addr
	Port    uint16
	Node    string
	// Terminating: it keeps its connections, and gets new ones only when there is no other.
	Terminating bool
	// Zones and Nodes prefer it, if the service's traffic is distributed by zone or node.
	Zones, Nodes []string
}

// Pod is what a node must know before it starts a pod.
type Pod struct {
	UID        string
	Namespace  string
	Name       string
	Node       string
	Identity   uint32
	Workload   object.Workload
	Addresses  []netip.Addr
	NamedPorts map[string]uint16
	Unmanaged  bool
}

// Endpoint is a pod with addresses.
type Endpoint struct {
	UID         string
	Node        string
	Namespace   string
	Name        string
	Addresses   []netip.Addr
	Identity    uint32
	Workload    object.Workload
	HostNetwork bool
	NamedPorts  map[string]uint16
	// Variants tell each of Addresses from others of the identity; nil = nothing does.
	Variants []string
}

// Selector is a set of peers.
type Selector struct{ *engine.Selector }

// Policy is a resolved policy.
type Policy struct{ *engine.Policy }

// Peer is a peer with addresses of its own.
type Peer struct {
	Name   string
	Labels label.Set
	At     []PeerPrefix
	// Own: on each node it has the node's own addresses only; else it never has these.
	Own bool
}

// PeerPrefix is an address of a peer. Node is whose address it is; empty = of no node.
type PeerPrefix struct {
	Prefix netip.Prefix
	Node   string
}

// On returns the prefixes that the peer has on a node.
func (r Peer) On(node string) []netip.Prefix {
	var all []netip.Prefix
	for _, at := range r.At {
		if (at.Node == node) == r.Own || at.Node == "" {
			all = append(all, at.Prefix)
		}
	}
	return all
}

// Subject says which policies an endpoint of a node has.
type Subject struct {
	Name, Node string
	engine.Subject
}

// Key implements Resource.
func (r Node) Key() Key { return Key{KindNode, r.Name} }

// Key implements Resource.
func (r Namespace) Key() Key { return Key{KindNamespace, r.Name} }

// Key implements Resource.
func (r Identity) Key() Key {
	return Key{KindIdentity, at(strconv.FormatUint(uint64(r.Number), 10), r.Node)}
}

// Key implements Resource.
func (r Service) Key() Key { return Key{KindService, r.Namespace + "/" + r.Name} }

// Key implements Resource.
func (r Pod) Key() Key { return Key{KindPod, r.UID} }

// Key implements Resource.
func (r Endpoint) Key() Key { return Key{KindEndpoint, r.UID} }

// Key implements Resource.
func (r Selector) Key() Key { return Key{KindSelector, r.Selector.Key} }

// Key implements Resource.
func (r Policy) Key() Key { return Key{KindPolicy, r.Policy.Key} }

// Key implements Resource.
func (r Peer) Key() Key { return Key{KindPeer, r.Name} }

// Key implements Resource.
func (r Subject) Key() Key { return Key{KindSubject, r.Name} }

// at names what each node has its own of.
func at(name, node string) string {
	if node == "" {
		return name
	}
	return name + "@" + node
}

// Scope implements Resource.
func (r Node) Scope() string { return "" }

// Scope implements Resource.
func (r Namespace) Scope() string { return "" }

// Scope implements Resource.
func (r Identity) Scope() string { return r.Node }

// Scope implements Resource.
func (r Service) Scope() string { return "" }

// Scope implements Resource. A pod concerns the node that will start it.
func (r Pod) Scope() string { return r.Node }

// Scope implements Resource.
func (r Endpoint) Scope() string { return "" }

// Scope implements Resource. Which nodes need it is said by the policy view.
func (r Selector) Scope() string { return "" }

// Scope implements Resource. Which nodes need it is said by the policy view.
func (r Policy) Scope() string { return "" }

// Scope implements Resource.
func (r Peer) Scope() string { return "" }

// Scope implements Resource.
func (r Subject) Scope() string { return r.Node }

func (r Node) equal(other Resource) bool {
	o, ok := other.(Node)
	return ok && r.Name == o.Name && slices.Equal(r.Addresses, o.Addresses) && slices.Equal(r.PodCIDRs, o.PodCIDRs) &&
		maps.Equal(r.Labels, o.Labels) && slices.Equal(r.HealthAddresses, o.HealthAddresses)
}

func (r Namespace) equal(other Resource) bool {
	o, ok := other.(Namespace)
	return ok && r.Name == o.Name && maps.Equal(r.Labels, o.Labels)
}

func (r Identity) equal(other Resource) bool {
	o, ok := other.(Identity)
	return ok && r.Number == o.Number && r.Node == o.Node && slices.Equal(r.Labels, o.Labels)
}

func (r Service) equal(other Resource) bool {
	o, ok := other.(Service)
	if !ok {
		return false
	}
	a, b := r.Service, o.Service
	return r.equalPorts(o) && (a == b || a.Namespace == b.Namespace && a.Name == b.Name && a.Type == b.Type && a.Affinity == b.Affinity &&
		a.ExternalLocal == b.ExternalLocal && a.InternalLocal == b.InternalLocal && a.HealthCheckNodePort == b.HealthCheckNodePort &&
		a.Distribution == b.Distribution && a.Algorithm == b.Algorithm && slices.Equal(a.ClusterIPs, b.ClusterIPs) &&
		slices.Equal(a.ExternalIPs, b.ExternalIPs) && slices.Equal(a.LoadBalancerIPs, b.LoadBalancerIPs) && slices.Equal(a.SourceRanges, b.SourceRanges))
}

func (r Service) equalPorts(o Service) bool {
	return slices.EqualFunc(r.Ports, o.Ports, func(a, b ServicePort) bool {
		return a.ServicePort == b.ServicePort && a.Route == b.Route && slices.EqualFunc(a.Backends, b.Backends, func(a, b Backend) bool {
			return a.Address == b.Address && a.Port == b.Port && a.Node == b.Node && a.Terminating == b.Terminating &&
				slices.Equal(a.Zones, b.Zones) && slices.Equal(a.Nodes, b.Nodes)
		})
	})
}

func (r Pod) equal(other Resource) bool {
	o, ok := other.(Pod)
	return ok && r.UID == o.UID && r.Namespace == o.Namespace && r.Name == o.Name && r.Node == o.Node &&
		r.Identity == o.Identity && r.Workload == o.Workload && slices.Equal(r.Addresses, o.Addresses) &&
		maps.Equal(r.NamedPorts, o.NamedPorts) && r.Unmanaged == o.Unmanaged
}

func (r Endpoint) equal(other Resource) bool {
	o, ok := other.(Endpoint)
	return ok && r.UID == o.UID && r.Node == o.Node && r.Namespace == o.Namespace && r.Name == o.Name &&
		slices.Equal(r.Addresses, o.Addresses) && r.Identity == o.Identity && r.Workload == o.Workload &&
		r.HostNetwork == o.HostNetwork && maps.Equal(r.NamedPorts, o.NamedPorts) && slices.Equal(r.Variants, o.Variants)
}

func (r Selector) equal(other Resource) bool { return r == other }

func (r Policy) equal(other Resource) bool { return r == other }

func (r Peer) equal(other Resource) bool {
	o, ok := other.(Peer)
	return ok && r.Name == o.Name && r.Own == o.Own && slices.Equal(r.Labels, o.Labels) && slices.Equal(r.At, o.At)
}

func (r Subject) equal(other Resource) bool { return r == other }
