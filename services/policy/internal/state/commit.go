// SPDX-License-Identifier: Apache-2.0

package state

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/services/policy/internal/object"
)

// Commit computes what the calls since the last Commit touched. Without a difference it returns the
// same snapshot again and an empty change.
func (s *State) Commit() (*Snapshot, Change) {
	next := &Snapshot{Revision: s.snapshot.Revision + 1, parts: s.snapshot.parts}
	builders := [kinds]func() map[string]Resource{
		KindNode:      s.buildNodes,
		KindNamespace: s.buildNamespaces,
		KindIdentity:  s.buildIdentities,
		KindService:   s.buildServices,
		KindPod:       s.buildPods,
		KindEndpoint:  s.buildEndpoints,
	}
	for kind, build := range builders {
		if s.dirty[kind] {
			next.parts[kind] = &part{resources: build()}
			s.dirty[kind] = false
		}
	}
	change := Diff(s.snapshot, next)
	if change.Empty() {
		return s.snapshot, change
	}
	s.snapshot = next
	return next, change
}

func (s *State) buildNodes() map[string]Resource {
	all := make(map[string]Resource, len(s.nodes))
	for name, n := range s.nodes {
		node := Node{Name: name, Addresses: n.Addresses, PodCIDRs: n.PodCIDRs, Labels: n.Labels}
		if a := s.agents[name]; a != nil {
			node.HealthAddresses = a.health
		}
		all[name] = node
	}
	return all
}

func (s *State) buildNamespaces() map[string]Resource {
	all := make(map[string]Resource, len(s.namespaces))
	for name, n := range s.namespaces {
		all[name] = Namespace{Name: name, Labels: n.Labels}
	}
	return all
}

func (s *State) buildIdentities() map[string]Resource {
	all := make(map[string]Resource, len(s.byNumber))
	for number, u := range s.byNumber {
		all[identityKey(number).Name] = Identity{Number: number, Labels: u.labels}
	}
	return all
}

func (s *State) buildPods() map[string]Resource {
	all := map[string]Resource{}
	for _, p := range s.pods {
		o := p.object
		if o.Node == "" || o.HostNetwork || o.Finished {
			continue
		}
		r := Pod{
			UID: o.UID, Namespace: o.Namespace, Name: o.Name, Node: o.Node, Workload: o.Workload,
			Addresses: o.FixedAddresses, NamedPorts: o.NamedPorts, Unmanaged: o.Unmanaged,
		}
		switch {
		case o.Unmanaged:
			r.Identity = IdentityUnmanaged
		case p.inUse != nil:
			r.Identity = p.inUse.number
		default:
			continue // a pod never starts without its identity: the node is told when it has one
		}
		all[o.UID] = r
	}
	return all
}

// buildEndpoints gives each address to one endpoint: the newest registration of it.
func (s *State) buildEndpoints() map[string]Resource {
	all := map[string]Resource{}
	type claim struct {
		endpoint Endpoint
		sequence uint64
	}
	var claims []claim
	for _, p := range s.pods {
		o := p.object
		node := s.nodes[o.Node]
		if node == nil || o.Finished {
			continue
		}
		e := Endpoint{
			UID: o.UID, Node: o.Node, Namespace: o.Namespace, Name: o.Name,
			Workload: o.Workload, NamedPorts: o.NamedPorts,
		}
		switch {
		case o.HostNetwork:
			e.HostNetwork, e.Identity, e.Addresses = true, IdentityHost, node.Addresses
			if len(e.Addresses) > 0 {
				all[o.UID] = e // shares the node's addresses with others on purpose
			}
			continue
		case o.Unmanaged:
			e.Identity, e.Addresses = IdentityUnmanaged, o.StatusAddresses
			claims = append(claims, claim{endpoint: e})
		case p.inUse != nil:
			e.Identity = p.inUse.number
			var sequence uint64
			e.Addresses, sequence = s.addressesOf(o)
			claims = append(claims, claim{e, sequence})
		}
	}
	slices.SortFunc(claims, func(a, b claim) int {
		return cmp.Or(cmp.Compare(b.sequence, a.sequence), cmp.Compare(a.endpoint.UID, b.endpoint.UID))
	})
	owned := map[netip.Addr]bool{}
	for _, c := range claims {
		var addresses []netip.Addr
		for _, addr := range c.endpoint.Addresses {
			if !owned[addr] {
				owned[addr] = true
				addresses = append(addresses, addr)
			}
		}
		if len(addresses) > 0 {
			c.endpoint.Addresses = addresses
			all[c.endpoint.UID] = c.endpoint
		}
	}
	return all
}

// addressesOf returns a managed pod's addresses: those its agent registered or, before the agent
// was heard of, those of its status that it may have.
func (s *State) addressesOf(o *object.Pod) ([]netip.Addr, uint64) {
	candidates, sequence := o.StatusAddresses, uint64(0)
	if a := s.agents[o.Node]; a != nil {
		r, registered := a.endpoints[o.UID]
		if registered {
			candidates, sequence = r.addresses, r.sequence
		} else if a.heard {
			return nil, 0
		}
	}
	// Checked again: it may have been registered before its pod or its node was known.
	var addresses []netip.Addr
	for _, addr := range candidates {
		if s.mayHave(o.Node, addr, o.FixedAddresses) {
			addresses = append(addresses, addr)
		}
	}
	return addresses, sequence
}

func (s *State) buildServices() map[string]Resource {
	type name struct{ namespace, service string }
	slicesOf := map[name][]*object.EndpointSlice{}
	for _, slice := range s.slices {
		if slice.Service != "" {
			n := name{slice.Namespace, slice.Service}
			slicesOf[n] = append(slicesOf[n], slice)
		}
	}
	all := make(map[string]Resource, len(s.services))
	for _, o := range s.services {
		r := Service{Namespace: o.Namespace, Name: o.Name, Type: o.Type, ClusterIPs: o.ClusterIPs}
		for _, port := range o.Ports {
			r.Ports = append(r.Ports, ServicePort{
				ServicePort: port,
				Backends:    backends(port, slicesOf[name{o.Namespace, o.Name}]),
			})
		}
		all[r.Key().Name] = r
	}
	return all
}

// backends returns the ready backends of a port, sorted, each once. Slice ports are matched by name
// and protocol; their numbers are the target ports, already resolved per pod.
func backends(port object.ServicePort, all []*object.EndpointSlice) []Backend {
	var found []Backend
	for _, slice := range all {
		for _, p := range slice.Ports {
			if p.Name != port.Name || p.Protocol != port.Protocol {
				continue
			}
			for _, e := range slice.Endpoints {
				if e.Ready {
					found = append(found, Backend{Address: e.Address, Port: p.Port, Node: e.Node})
				}
			}
		}
	}
	slices.SortFunc(found, func(a, b Backend) int {
		return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Node, b.Node))
	})
	return slices.CompactFunc(found, func(a, b Backend) bool { return a.Address == b.Address && a.Port == b.Port })
}
