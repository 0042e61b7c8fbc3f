// SPDX-License-Identifier: Apache-2.0

package state

import (
	"github.com/weirmesh/weir/internal/reserved"
	"github.com/weirmesh/weir/services/policy/internal/label"
)

// Commit computes what the calls since the last Commit touched. Without a difference it returns the
// same snapshot again and an empty change.
func (s *State) Commit() (*Snapshot, Change) {
	s.placeRoutes()
	s.tellEngine()
	next := &Snapshot{Revision: s.snapshot.Revision + 1, parts: s.snapshot.parts, policy: s.snapshot.policy, render: s.snapshot.render}
	builders := [kinds]func() map[string]Resource{
		KindNode:      s.buildNodes,
		KindNamespace: s.buildNamespaces,
		KindIdentity:  s.buildIdentities,
		KindPeer:      s.buildPeers,
		KindService:   s.buildServices, // knows by itself what is stale
		KindPod:       s.buildPods,
		KindEndpoint:  s.buildEndpoints, // knows by itself what is stale
	}
	s.dirty[KindEndpoint] = len(s.stale) > 0
	s.dirty[KindService] = len(s.staleServices) > 0
	for kind, build := range builders {
		if build != nil && s.dirty[kind] {
			next.parts[kind] = &part{resources: build()}
			s.dirty[kind] = false
		}
	}
	view := s.engine.Commit()
	if s.open = s.open || s.Complete(); s.open {
		// Until the state is whole, policies would lack peers: agents keep what they have.
		next.policy = view
		next.render = s.buildRender(s.snapshot, next)
	}
	change := Diff(s.snapshot, next)
	if change.Empty() {
		next = s.snapshot
	}
	s.snapshot = next
	if s.open {
		s.noteForce(next.Revision)
	}
	return next, change
}

// Snapshot returns that of the last Commit.
func (s *State) Snapshot() *Snapshot { return s.snapshot }

// tellEngine brings the engine up to what policies depend on.
func (s *State) tellEngine() {
	s.putInForce()
	if s.variants.changed {
		s.refreshVariants()
	}
	s.tellServices()
	if s.staleNodes {
		s.staleNodes = false
		s.tellNodes()
	}
	s.tellPods()
	s.engine.Compile()
	s.refreshVariants()
	if s.staleNodes {
		s.staleNodes = false
		s.touch(KindPeer)
	}
}

// noteForce remembers at which revision versions of policies came in force.
func (s *State) noteForce(revision uint64) {
	for _, p := range s.policies {
		if p.changed || p.since == 0 && p.force != nil {
			p.changed, p.since = false, revision
		}
	}
	s.noteConfigs(revision)
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
		r := Identity{Number: number, Labels: u.labels}
		all[r.Key().Name] = r
	}
	// Each node has its own host. One for all nodes, so that none is ever gone.
	for name := range s.nodes {
		r := Identity{Number: reserved.Host, Labels: label.Set{labelHost}, Node: name}
		if s.apiServers[name] {
			r.Labels = label.Set{labelHost, labelAPIServer}
		}
		all[r.Key().Name] = r
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
