// SPDX-License-Identifier: Apache-2.0

package state

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/services/policy/internal/label"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// Kind says what a resource is. Resources of one change are applied in the order of these numbers
// and removed in the reverse one, so that nothing ever points at what is not there.
type Kind int

// Kinds of resources.
const (
	KindNode Kind = iota
	KindNamespace
	KindIdentity
	KindService
	KindPod
	KindEndpoint
	kinds // how many there are
)

// Key names a resource: node, namespace by name, identity by number, service by namespace/name, pod
// and endpoint by the pod's uid.
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
}

// Service is a service with its ready backends.
type Service struct {
	Namespace  string
	Name       string
	Type       string
	ClusterIPs []netip.Addr
	Ports      []ServicePort
}

// ServicePort is one port of a service.
type ServicePort struct {
	object.ServicePort
	Backends []Backend
}

// Backend serves a port.
type Backend struct {
	Address netip.Addr
	Port    uint16
	Node    string
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
}

// Key implements Resource.
func (r Node) Key() Key { return Key{KindNode, r.Name} }

// Key implements Resource.
func (r Namespace) Key() Key { return Key{KindNamespace, r.Name} }

// Key implements Resource.
func (r Identity) Key() Key { return identityKey(r.Number) }

// Key implements Resource.
func (r Service) Key() Key { return Key{KindService, r.Namespace + "/" + r.Name} }

// Key implements Resource.
func (r Pod) Key() Key { return Key{KindPod, r.UID} }

// Key implements Resource.
func (r Endpoint) Key() Key { return Key{KindEndpoint, r.UID} }

// Scope implements Resource.
func (r Node) Scope() string { return "" }

// Scope implements Resource.
func (r Namespace) Scope() string { return "" }

// Scope implements Resource.
func (r Identity) Scope() string { return "" }

// Scope implements Resource.
func (r Service) Scope() string { return "" }

// Scope implements Resource. A pod concerns the node that will start it.
func (r Pod) Scope() string { return r.Node }

// Scope implements Resource.
func (r Endpoint) Scope() string { return "" }

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
	return ok && r.Number == o.Number && slices.Equal(r.Labels, o.Labels)
}

func (r Service) equal(other Resource) bool {
	o, ok := other.(Service)
	return ok && r.Namespace == o.Namespace && r.Name == o.Name && r.Type == o.Type &&
		slices.Equal(r.ClusterIPs, o.ClusterIPs) &&
		slices.EqualFunc(r.Ports, o.Ports, func(a, b ServicePort) bool {
			return a.ServicePort == b.ServicePort && slices.Equal(a.Backends, b.Backends)
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
		r.HostNetwork == o.HostNetwork && maps.Equal(r.NamedPorts, o.NamedPorts)
}
