// SPDX-License-Identifier: Apache-2.0

package state

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// HealthUID is the uid under which an agent registers its node's health endpoint, which is no pod.
const HealthUID = "health"

// maxPending bounds what an agent can register for pods that are not known here (yet).
const maxPending = 1024

// What Register returns; ErrNotYours means that the caller is at fault or hostile.
var (
	ErrNotYours   = errors.New("the pod is bound to another node")
	ErrAddress    = errors.New("the address is not one that the pod may have")
	ErrUnknownPod = errors.New("the pod is not known yet; its addresses spread when it is")
	ErrTooMany    = errors.New("too many endpoints of unknown pods")
)

// agent is what one node's agent told.
type agent struct {
	// heard: it said at least once which endpoints it has. Until then those of its pods are taken
	// from the pods' status, so that a new policy service does not make their addresses vanish.
	heard     bool
	endpoints map[string]registration // by pod uid
	// confirmed are the uids registered since the session began; nil outside a session's start.
	confirmed map[string]bool
	health    []netip.Addr
	// reported: it said at least once which slots it has given.
	reported bool
	slots    []Slot
}

type registration struct {
	addresses []netip.Addr
	sequence  uint64
}

// BeginSession says that a node's agent connected and will now register all its endpoints. What it
// registered before stays until EndSessionStart.
func (s *State) BeginSession(node string) {
	a := s.agents[node]
	if a == nil {
		a = &agent{endpoints: map[string]registration{}}
		s.agents[node] = a
	}
	a.confirmed = map[string]bool{}
}

// EndSessionStart says that the agent has registered all it has: what is left from before is gone.
func (s *State) EndSessionStart(node string) {
	a := s.agents[node]
	if a == nil || a.confirmed == nil {
		return
	}
	for uid := range a.endpoints {
		if !a.confirmed[uid] {
			delete(a.endpoints, uid)
		}
	}
	if !a.confirmed[HealthUID] && a.health != nil {
		a.health = nil
		s.touchNodes()
	}
	a.confirmed, a.heard = nil, true
	s.staleNode(node)
}

// Register takes in an endpoint of a node's agent. The pod must be bound to that node and the
// addresses must be the pod's fixed ones or lie in the node's pod CIDRs. ErrUnknownPod means that
// the endpoint was kept and will appear with its pod. The newest registration of an address wins.
func (s *State) Register(node, uid string, addresses []netip.Addr) error {
	a := s.agents[node]
	if a == nil {
		return fmt.Errorf("node %s has no session", node)
	}
	if len(addresses) == 0 {
		return fmt.Errorf("%w: it has none", ErrAddress)
	}
	if uid == HealthUID {
		if err := s.checkAddresses(node, addresses, nil); err != nil {
			return err
		}
		s.confirm(a, uid)
		a.health = slices.Clone(addresses)
		s.touchNodes()
		return nil
	}
	p, known := s.byUID[uid]
	if !known {
		if len(a.endpoints) >= maxPending+len(s.byUID) {
			return ErrTooMany
		}
	} else {
		if p.object.Node != node {
			return fmt.Errorf("%w (%q)", ErrNotYours, p.object.Node)
		}
		if err := s.checkAddresses(node, addresses, p.object.FixedAddresses); err != nil {
			return err
		}
	}
	s.confirm(a, uid)
	s.sequence++
	a.endpoints[uid] = registration{addresses: slices.Clone(addresses), sequence: s.sequence}
	s.staleEndpoint(uid)
	if !known {
		return ErrUnknownPod
	}
	return nil
}

func (s *State) confirm(a *agent, uid string) {
	if a.confirmed != nil {
		a.confirmed[uid] = true
	}
}

// Unregister says that a local endpoint of a node is gone.
func (s *State) Unregister(node, uid string) {
	a := s.agents[node]
	if a == nil {
		return
	}
	if uid == HealthUID {
		a.health = nil
		s.touchNodes()
		return
	}
	delete(a.endpoints, uid)
	s.staleEndpoint(uid)
}

func (s *State) checkAddresses(node string, addresses, fixed []netip.Addr) error {
	for _, addr := range addresses {
		if !s.mayHave(node, addr, fixed) {
			return fmt.Errorf("%w: %s is neither in the pod cidrs of %s nor fixed", ErrAddress, addr, node)
		}
	}
	return nil
}

func (s *State) mayHave(node string, addr netip.Addr, fixed []netip.Addr) bool {
	if !addr.IsValid() || addr.Zone() != "" || addr.Is4In6() {
		return false
	}
	if slices.Contains(fixed, addr) {
		return true
	}
	n := s.nodes[node]
	return n != nil && slices.ContainsFunc(n.PodCIDRs, func(p netip.Prefix) bool { return p.Contains(addr) })
}
