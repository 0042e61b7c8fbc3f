// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
)

// HostEndpoint is the endpoint number under which the node's own traffic is checked.
const HostEndpoint = uint16(math.MaxUint16)

// MaxPolicy is the greatest policy number.
const MaxPolicy = 1<<30 - 1

// MaxRule is the greatest rule number.
const MaxRule = 1<<20 - 1

// ErrFull means that a map of fixed size has no room; the error's text names the map.
var ErrFull = errors.New("map is full")

// PolicyVerdict is what is decided for a packet.
type PolicyVerdict uint8

// Verdicts. PolicyNone: the direction is not enforced.
const (
	PolicyNone        = PolicyVerdict(tcPolicyVerdictPOLICY_NONE)
	PolicyAllow       = PolicyVerdict(tcPolicyVerdictPOLICY_ALLOW)
	PolicyDefaultDeny = PolicyVerdict(tcPolicyVerdictPOLICY_DEFAULT_DENY)
	PolicyDeny        = PolicyVerdict(tcPolicyVerdictPOLICY_DENY)
	// PolicyRedirect allows through the proxy's slot, and not without it.
	PolicyRedirect = PolicyVerdict(tcPolicyVerdictPOLICY_REDIRECT)
	// PolicyVisible allows; a connection that begins while the slot has a listener goes through it.
	PolicyVisible = PolicyVerdict(tcPolicyVerdictPOLICY_VISIBLE)
)

// Allows says whether a packet may pass, be it through the proxy.
func (v PolicyVerdict) Allows() bool {
	return v != PolicyDefaultDeny && v != PolicyDeny && v <= PolicyVisible
}

// String returns the verdict's name.
func (v PolicyVerdict) String() string {
	switch v {
	case PolicyNone:
		return "none"
	case PolicyAllow:
		return "allow"
	case PolicyDefaultDeny:
		return "default-deny"
	case PolicyDeny:
		return "deny"
	case PolicyRedirect:
		return "redirect"
	case PolicyVisible:
		return "visible"
	}
	return fmt.Sprintf("verdict-%d", uint8(v))
}

// PolicyRange is what is decided for some ports of a protocol; both ends are in it. ICMP: the port is the type.
type PolicyRange struct {
	// Proto is the IP protocol number; 0 = any protocol that no other range of the row names, and then all ports.
	Proto       uint8
	First, Last uint16
	Verdict     PolicyVerdict
	// Rule is the agent's number of the deciding rules, MaxRule at most; 0 = none.
	Rule uint32
	// Slot of the proxy, for PolicyRedirect and PolicyVisible alone; MaxSlot at most.
	Slot uint16
}

// EndpointPolicy says which policies hold for an endpoint; 0 = that direction is not enforced.
type EndpointPolicy struct {
	Ingress, Egress           uint32
	IngressAudit, EgressAudit bool
}

// PolicyRow is one row of a policy.
type PolicyRow struct {
	Policy, Peer uint32
	// Ranges in rising order; ports that none covers are PolicyDefaultDeny by rule 0.
	Ranges []PolicyRange
}

// MapUsage is the fill of a map.
type MapUsage struct {
	Map          string
	Entries, Max int
}

// Policies owns the maps of policy. Rows and endpoints take effect for new connections at once, and for live ones after Bump.
type Policies struct {
	endpoints  *ebpf.Map
	generation *ebpf.Map

	mu    sync.Mutex
	table *rowTable
}

// newPolicies takes over what the maps hold.
func newPolicies(endpoints, peers, ranges, generation *ebpf.Map) (*Policies, error) {
	table, err := newRowTable(tcMapPolicyPeers, peers, tcMapPolicyRanges, ranges)
	return &Policies{endpoints: endpoints, generation: generation, table: table}, err
}

// policyCheck is policy_check of lib/policy.h.
func policyCheck(key tcPolicyPeerKey, block uint64) uint64 {
	return (uint64(key.Policy)<<32 | uint64(key.Peer)) ^ block*policyCheckFactor
}

const policyCheckFactor = 0x9e3779b97f4a7c15

// SetPeer makes or replaces the row of a policy and a peer; peer 0 speaks for every peer without a row. Ports that no range covers are
// denied by rule 0. An equal row is left alone. A policy without a row for peer 0 denies such peers. The error is ErrFull when a map
// has no room; the old row, if any, then holds.
func (p *Policies) SetPeer(policy, peer uint32, ranges []PolicyRange) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.table.set(policy, peer, ranges)
}

// DeletePeer removes a row; no such row is not an error. The peer is then decided by the row of peer 0.
func (p *Policies) DeletePeer(policy, peer uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.table.delete(policy, peer)
}

// DeletePolicy removes all rows of a policy. An endpoint that still names it is denied everything.
func (p *Policies) DeletePolicy(policy uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	// The row of peer 0 first: it would speak for the peers whose own rows go.
	peers := make([]uint32, 0, len(p.table.policies[policy]))
	for peer := range p.table.policies[policy] {
		peers = append(peers, peer)
	}
	slices.Sort(peers)
	for _, peer := range peers {
		if err := p.table.delete(policy, peer); err != nil {
			return err
		}
	}
	return nil
}

// SetEndpoint names the policies of an endpoint, both directions at once. The zero EndpointPolicy means that nothing is enforced.
func (p *Policies) SetEndpoint(id uint16, e EndpointPolicy) error {
	if e.Ingress > MaxPolicy || e.Egress > MaxPolicy {
		return fmt.Errorf("policies %d and %d of endpoint %d: want at most %d", e.Ingress, e.Egress, id, MaxPolicy)
	}
	if err := p.endpoints.Put(uint32(id), e.word()); err != nil {
		return fmt.Errorf("policy of endpoint %d: %w", id, err)
	}
	return nil
}

const policyAudit = 1 << 31

func (e EndpointPolicy) word() uint64 {
	in, out := uint64(e.Ingress), uint64(e.Egress)
	if e.IngressAudit && e.Ingress != 0 {
		in |= policyAudit
	}
	if e.EgressAudit && e.Egress != 0 {
		out |= policyAudit
	}
	return in | out<<32
}

func endpointPolicyOf(word uint64) EndpointPolicy {
	in, out := uint32(word), uint32(word>>32)
	return EndpointPolicy{
		Ingress: in & MaxPolicy, Egress: out & MaxPolicy, IngressAudit: in&policyAudit != 0, EgressAudit: out&policyAudit != 0,
	}
}

// Endpoint returns the policies of an endpoint.
func (p *Policies) Endpoint(id uint16) (EndpointPolicy, error) {
	var word uint64
	if err := p.endpoints.Lookup(uint32(id), &word); err != nil {
		return EndpointPolicy{}, fmt.Errorf("policy of endpoint %d: %w", id, err)
	}
	return endpointPolicyOf(word), nil
}

// Endpoints returns the policies of all endpoints where a direction is enforced.
func (p *Policies) Endpoints() (map[uint16]EndpointPolicy, error) {
	out := map[uint16]EndpointPolicy{}
	var id uint32
	var word uint64
	it := p.endpoints.Iterate()
	for it.Next(&id, &word) {
		if word != 0 {
			out[uint16(id)] = endpointPolicyOf(word)
		}
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("list policy_endpoints: %w", err)
	}
	return out, nil
}

// Bump makes the programs decide every live connection anew, each at its next packet. Call it after a change of rows, endpoints or
// identities is written.
func (p *Policies) Bump() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	generation, err := p.readGeneration()
	if err != nil {
		return err
	}
	// 32 bits are kept in a connection; 0 is what it has before it is decided.
	generation++
	if uint32(generation) == 0 {
		generation++
	}
	if err := p.generation.Put(uint32(0), generation); err != nil {
		return fmt.Errorf("policy generation: %w", err)
	}
	return nil
}

func (p *Policies) readGeneration() (uint64, error) {
	var generation uint64
	if err := p.generation.Lookup(uint32(0), &generation); err != nil {
		return 0, fmt.Errorf("policy generation: %w", err)
	}
	return generation, nil
}

// Generation returns how often Bump was called since the maps were made, about.
func (p *Policies) Generation() (uint64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.readGeneration()
}

// Lookup reads from the maps what a policy decides for a packet, as the programs do. peerRow says that the peer has a row of its own.
func (p *Policies) Lookup(policy, peer uint32, proto uint8, port uint16) (verdict PolicyVerdict, rule uint32, peerRow bool, err error) {
	r, peerRow, err := p.LookupRange(policy, peer, proto, port)
	return r.Verdict, r.Rule, peerRow, err
}

// LookupRange is Lookup with the slot: the range that it returns is that of the one port.
func (p *Policies) LookupRange(policy, peer uint32, proto uint8, port uint16) (r PolicyRange, peerRow bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return lookupRow(p.table.peers, p.table.blocks.m, policy, peer, proto, port)
}

// List returns all rows, sorted by policy and peer.
func (p *Policies) List() ([]PolicyRow, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.table.list(), nil
}

// Usage returns how full the maps are. Freed ranges that programs may still read count as used.
func (p *Policies) Usage() []MapUsage {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.table.usage()
}
