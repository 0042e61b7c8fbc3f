// SPDX-License-Identifier: Apache-2.0

package state

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/internal/reserved"
	"github.com/weirmesh/weir/services/policy/internal/label"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// claims are the addresses that pods other than host-network ones should have. An address goes to
// the newest registration of it.
type claims struct {
	byUID  map[string]claim
	byAddr map[netip.Addr]map[string]uint64 // uid -> sequence
}

type claim struct {
	addresses []netip.Addr
	sequence  uint64
}

func newClaims() claims {
	return claims{byUID: map[string]claim{}, byAddr: map[netip.Addr]map[string]uint64{}}
}

// set replaces a pod's claim and returns the uids of all whose addresses may have changed by that.
func (c *claims) set(uid string, next claim) map[string]bool {
	before := c.byUID[uid]
	if before.sequence == next.sequence && slices.Equal(before.addresses, next.addresses) {
		return nil
	}
	affected := map[string]bool{}
	for _, addr := range before.addresses {
		delete(c.byAddr[addr], uid)
		for other := range c.byAddr[addr] {
			affected[other] = true
		}
		if len(c.byAddr[addr]) == 0 {
			delete(c.byAddr, addr)
		}
	}
	delete(c.byUID, uid)
	if len(next.addresses) == 0 {
		return affected
	}
	c.byUID[uid] = next
	for _, addr := range next.addresses {
		if c.byAddr[addr] == nil {
			c.byAddr[addr] = map[string]uint64{}
		}
		for other := range c.byAddr[addr] {
			affected[other] = true
		}
		c.byAddr[addr][uid] = next.sequence
	}
	return affected
}

// owner returns who has an address: the newest claim, of equally old ones that with the least uid.
func (c *claims) owner(addr netip.Addr) string {
	best, newest := "", uint64(0)
	for uid, sequence := range c.byAddr[addr] {
		if best == "" || sequence > newest || sequence == newest && uid < best {
			best, newest = uid, sequence
		}
	}
	return best
}

// staleEndpoint says that a pod's endpoint must be computed anew.
func (s *State) staleEndpoint(uid string) { s.stale[uid] = true }

// staleNode says so of all pods of a node.
func (s *State) staleNode(node string) {
	for uid, p := range s.byUID {
		if p.object.Node == node {
			s.stale[uid] = true
		}
	}
}

// buildEndpoints computes what is stale, and what shares addresses with it: a registration in a
// large cluster touches one endpoint.
func (s *State) buildEndpoints() map[string]Resource {
	affected := maps.Clone(s.stale)
	for uid := range s.stale {
		maps.Copy(affected, s.claims.set(uid, s.claimOf(uid)))
	}
	clear(s.stale)
	all := maps.Clone(s.snapshot.parts[KindEndpoint].get())
	if all == nil {
		all = map[string]Resource{}
	}
	for uid := range affected {
		e, ok := s.endpoint(uid)
		if !ok {
			delete(all, uid)
			s.replaceVariants(uid, nil)
			continue
		}
		switch p := s.byUID[uid]; {
		case e.HostNetwork:
			s.replaceVariants(uid, nil)
		case p.object.Unmanaged:
			s.setVariants(&e, p.object, label.Set{"reserved:unmanaged"})
		default:
			s.setVariants(&e, p.object, p.inUse.labels)
		}
		all[uid] = e
	}
	return all
}

// claimOf returns the addresses that a pod should have; host-network pods have their node's instead.
func (s *State) claimOf(uid string) claim {
	p := s.byUID[uid]
	if p == nil || p.object.Finished || p.object.HostNetwork || s.nodes[p.object.Node] == nil {
		return claim{}
	}
	switch {
	case p.object.Unmanaged:
		return claim{addresses: p.object.StatusAddresses}
	case p.inUse != nil:
		return s.addressesOf(p.object)
	}
	return claim{}
}

// endpoint returns a pod's endpoint, if it has an address.
func (s *State) endpoint(uid string) (Endpoint, bool) {
	p := s.byUID[uid]
	if p == nil {
		return Endpoint{}, false
	}
	o := p.object
	e := Endpoint{
		UID: o.UID, Node: o.Node, Namespace: o.Namespace, Name: o.Name, Workload: o.Workload, NamedPorts: o.NamedPorts,
	}
	node := s.nodes[o.Node]
	switch {
	case o.HostNetwork:
		if node != nil && !o.Finished {
			e.HostNetwork, e.Identity, e.Addresses = true, reserved.Host, node.Addresses // shared on purpose
		}
		return e, len(e.Addresses) > 0
	case o.Unmanaged:
		e.Identity = reserved.Unmanaged
	case p.inUse != nil:
		e.Identity = p.inUse.number
	}
	for _, addr := range s.claims.byUID[uid].addresses {
		if s.claims.owner(addr) == uid {
			e.Addresses = append(e.Addresses, addr)
		}
	}
	return e, len(e.Addresses) > 0
}

// addressesOf returns a managed pod's addresses: those its agent registered or, before the agent
// was heard of, those of its status that it may have.
func (s *State) addressesOf(o *object.Pod) claim {
	candidates, sequence := o.StatusAddresses, uint64(0)
	if a := s.agents[o.Node]; a != nil {
		r, registered := a.endpoints[o.UID]
		if registered {
			candidates, sequence = r.addresses, r.sequence
		} else if a.heard {
			return claim{}
		}
	}
	// Checked again: it may have been registered before its pod or its node was known.
	var addresses []netip.Addr
	for _, addr := range candidates {
		if s.mayHave(o.Node, addr, o.FixedAddresses) {
			addresses = append(addresses, addr)
		}
	}
	return claim{addresses, sequence}
}
