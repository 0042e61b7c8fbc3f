// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"cmp"
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
)

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
	}
	return fmt.Sprintf("verdict-%d", uint8(v))
}

// PolicyRange is what is decided for some ports of a protocol; both ends are in it. ICMP: the port is the type.
type PolicyRange struct {
	// Proto is the IP protocol number; 0 = any protocol that no other range of the row names, and then all ports.
	Proto       uint8
	First, Last uint16
	Verdict     PolicyVerdict
	// Rule is the agent's number of the deciding rules; 0 = none.
	Rule uint32
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
	peers      *ebpf.Map
	generation *ebpf.Map

	mu       sync.Mutex
	blocks   *blocks
	policies map[uint32]map[uint32]*block // policy -> peer -> ranges
	rows     int
}

// newPolicies takes over what the maps hold.
func newPolicies(endpoints, peers, ranges, generation *ebpf.Map) (*Policies, error) {
	p := &Policies{
		endpoints: endpoints, peers: peers, generation: generation, blocks: newBlocks(ranges), policies: map[uint32]map[uint32]*block{},
	}
	var key tcPolicyPeerKey
	var row tcPolicyPeer
	it := peers.Iterate()
	for it.Next(&key, &row) {
		b, err := p.blocks.adopt(uint32(row.Block>>32), uint32(row.Block))
		if err != nil {
			return nil, fmt.Errorf("policy %d, peer %d: %w", key.Policy, key.Peer, err)
		}
		p.put(key.Policy, key.Peer, b)
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("list policy_peers: %w", err)
	}
	p.blocks.settle()
	return p, nil
}

func (p *Policies) put(policy, peer uint32, b *block) {
	rows := p.policies[policy]
	if rows == nil {
		rows = map[uint32]*block{}
		p.policies[policy] = rows
	}
	if rows[peer] == nil {
		p.rows++
	}
	rows[peer] = b
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
	if policy == 0 || policy > MaxPolicy {
		return fmt.Errorf("policy number %d: want 1 to %d", policy, MaxPolicy)
	}
	words, err := encodeRanges(ranges)
	if err != nil {
		return fmt.Errorf("policy %d, peer %d: %w", policy, peer, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.policies[policy][peer]
	if old != nil && slices.Equal(old.words, words) {
		return nil
	}
	b, err := p.blocks.take(words)
	if err != nil {
		return fmt.Errorf("policy %d, peer %d: %w", policy, peer, err)
	}
	key := tcPolicyPeerKey{Policy: policy, Peer: peer}
	row := tcPolicyPeer{Block: uint64(b.base)<<32 | uint64(len(b.words))}
	row.Check = policyCheck(key, row.Block)
	if err := p.peers.Put(key, row); err != nil {
		p.blocks.release(b)
		return fmt.Errorf("policy %d, peer %d: %w", policy, peer, fullError(p.peers, tcMapPolicyPeers, err))
	}
	if old != nil {
		p.blocks.release(old)
	}
	p.put(policy, peer, b)
	return nil
}

// DeletePeer removes a row; no such row is not an error. The peer is then decided by the row of peer 0.
func (p *Policies) DeletePeer(policy, peer uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.deletePeer(policy, peer)
}

func (p *Policies) deletePeer(policy, peer uint32) error {
	rows := p.policies[policy]
	b := rows[peer]
	if b == nil {
		return nil
	}
	if err := p.peers.Delete(tcPolicyPeerKey{Policy: policy, Peer: peer}); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete policy %d, peer %d: %w", policy, peer, err)
	}
	p.blocks.release(b)
	delete(rows, peer)
	p.rows--
	if len(rows) == 0 {
		delete(p.policies, policy)
	}
	return nil
}

// DeletePolicy removes all rows of a policy. An endpoint that still names it is denied everything.
func (p *Policies) DeletePolicy(policy uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	// The row of peer 0 first: it would speak for the peers whose own rows go.
	peers := make([]uint32, 0, len(p.policies[policy]))
	for peer := range p.policies[policy] {
		peers = append(peers, peer)
	}
	slices.Sort(peers)
	for _, peer := range peers {
		if err := p.deletePeer(policy, peer); err != nil {
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
	p.mu.Lock()
	defer p.mu.Unlock()
	var row tcPolicyPeer
	key := tcPolicyPeerKey{Policy: policy, Peer: peer}
	err = p.peers.Lookup(key, &row)
	peerRow = err == nil
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		key.Peer = 0
		err = p.peers.Lookup(key, &row)
	}
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return PolicyDefaultDeny, 0, false, nil
	}
	if err != nil {
		return PolicyDefaultDeny, 0, false, fmt.Errorf("policy %d, peer %d: %w", policy, peer, err)
	}
	if row.Check != policyCheck(key, row.Block) {
		return PolicyDefaultDeny, 0, peerRow, fmt.Errorf("policy %d, peer %d: damaged row", policy, key.Peer)
	}
	words, err := p.blocks.read(uint32(row.Block>>32), uint32(row.Block))
	if err != nil {
		return PolicyDefaultDeny, 0, peerRow, fmt.Errorf("policy %d, peer %d: %w", policy, key.Peer, err)
	}
	word := decideRange(words, proto, port)
	return PolicyVerdict(word >> 32), uint32(word), peerRow, nil
}

// List returns all rows, sorted by policy and peer.
func (p *Policies) List() ([]PolicyRow, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]PolicyRow, 0, p.rows)
	for policy, rows := range p.policies {
		for peer, b := range rows {
			out = append(out, PolicyRow{Policy: policy, Peer: peer, Ranges: decodeRanges(b.words)})
		}
	}
	slices.SortFunc(out, func(a, b PolicyRow) int {
		if a.Policy != b.Policy {
			return cmp.Compare(a.Policy, b.Policy)
		}
		return cmp.Compare(a.Peer, b.Peer)
	})
	return out, nil
}

// Usage returns how full the maps are. Freed ranges that programs may still read count as used.
func (p *Policies) Usage() []MapUsage {
	p.mu.Lock()
	defer p.mu.Unlock()
	return []MapUsage{
		{Map: tcMapPolicyPeers, Entries: p.rows, Max: int(p.peers.MaxEntries())},
		{Map: tcMapPolicyRanges, Entries: p.blocks.used(), Max: p.blocks.max()},
	}
}
