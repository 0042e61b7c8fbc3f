// SPDX-License-Identifier: Apache-2.0

package state

import (
	"cmp"
	"slices"

	"github.com/weirmesh/weir/internal/reserved"
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
		KindEndpoint:  s.buildEndpoints, // knows by itself what is stale
	}
	for kind, build := range builders {
		if s.dirty[kind] || Kind(kind) == KindEndpoint && len(s.stale) > 0 {
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
			r.Identity = reserved.Unmanaged
		case p.inUse != nil:
			r.Identity = p.inUse.number
		default:
			continue // a pod never starts without its identity: the node is told when it has one
		}
		all[o.UID] = r
	}
	return all
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
