// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
)

// rowTable owns a map of rows, each a policy and a peer (or a set of names), and the map of their ranges.
type rowTable struct {
	peers    *ebpf.Map
	name     string // of peers
	blocks   *blocks
	policies map[uint32]map[uint32]*block // policy -> peer -> ranges
	rows     int
}

// newRowTable takes over what the maps hold.
func newRowTable(name string, peers *ebpf.Map, rangesName string, ranges *ebpf.Map) (*rowTable, error) {
	t := &rowTable{peers: peers, name: name, blocks: newBlocks(rangesName, ranges), policies: map[uint32]map[uint32]*block{}}
	var key tcPolicyPeerKey
	var row tcPolicyPeer
	it := peers.Iterate()
	for it.Next(&key, &row) {
		b, err := t.blocks.adopt(uint32(row.Block>>32), uint32(row.Block))
		if err != nil {
			return nil, fmt.Errorf("policy %d, peer %d: %w", key.Policy, key.Peer, err)
		}
		t.put(key.Policy, key.Peer, b)
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("list %s: %w", name, err)
	}
	t.blocks.settle()
	return t, nil
}

func (t *rowTable) put(policy, peer uint32, b *block) {
	rows := t.policies[policy]
	if rows == nil {
		rows = map[uint32]*block{}
		t.policies[policy] = rows
	}
	if rows[peer] == nil {
		t.rows++
	}
	rows[peer] = b
}

// set makes or replaces a row; an equal one is left alone.
func (t *rowTable) set(policy, peer uint32, ranges []PolicyRange) error {
	if policy == 0 || policy > MaxPolicy {
		return fmt.Errorf("policy number %d: want 1 to %d", policy, MaxPolicy)
	}
	words, err := encodeRanges(ranges)
	if err != nil {
		return fmt.Errorf("policy %d, peer %d: %w", policy, peer, err)
	}
	old := t.policies[policy][peer]
	if old != nil && slices.Equal(old.words, words) {
		return nil
	}
	b, err := t.blocks.take(words)
	if err != nil {
		return fmt.Errorf("policy %d, peer %d: %w", policy, peer, err)
	}
	key := tcPolicyPeerKey{Policy: policy, Peer: peer}
	row := tcPolicyPeer{Block: uint64(b.base)<<32 | uint64(len(b.words))}
	row.Check = policyCheck(key, row.Block)
	if err := t.peers.Put(key, row); err != nil {
		t.blocks.release(b)
		return fmt.Errorf("policy %d, peer %d: %w", policy, peer, fullError(t.peers, t.name, err))
	}
	if old != nil {
		t.blocks.release(old)
	}
	t.put(policy, peer, b)
	return nil
}

// delete removes a row; no such row is not an error.
func (t *rowTable) delete(policy, peer uint32) error {
	rows := t.policies[policy]
	b := rows[peer]
	if b == nil {
		return nil
	}
	if err := t.peers.Delete(tcPolicyPeerKey{Policy: policy, Peer: peer}); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete policy %d, peer %d: %w", policy, peer, err)
	}
	t.blocks.release(b)
	delete(rows, peer)
	t.rows--
	if len(rows) == 0 {
		delete(t.policies, policy)
	}
	return nil
}

func (t *rowTable) list() []PolicyRow {
	out := make([]PolicyRow, 0, t.rows)
	for policy, rows := range t.policies {
		for peer, b := range rows {
			out = append(out, PolicyRow{Policy: policy, Peer: peer, Ranges: decodeRanges(b.words)})
		}
	}
	slices.SortFunc(out, func(a, b PolicyRow) int {
		return cmp.Or(cmp.Compare(a.Policy, b.Policy), cmp.Compare(a.Peer, b.Peer))
	})
	return out
}

// usage returns how full the maps are. Freed ranges that programs may still read count as used.
func (t *rowTable) usage() []MapUsage {
	return []MapUsage{
		{Map: t.name, Entries: t.rows, Max: int(t.peers.MaxEntries())},
		{Map: t.blocks.name, Entries: t.blocks.used(), Max: t.blocks.max()},
	}
}

// lookupRow reads from the maps what holds for a packet, as policy_decide does. own says that the peer has a row of its own.
func lookupRow(peers, ranges *ebpf.Map, policy, peer uint32, proto uint8, port uint16) (found PolicyRange, own bool, err error) {
	found = PolicyRange{Proto: proto, First: port, Last: port, Verdict: PolicyDefaultDeny}
	var row tcPolicyPeer
	key := tcPolicyPeerKey{Policy: policy, Peer: peer}
	err = peers.Lookup(key, &row)
	own = err == nil
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		key.Peer = 0
		err = peers.Lookup(key, &row)
	}
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return found, false, nil
	}
	if err != nil {
		return found, own, fmt.Errorf("policy %d, peer %d: %w", policy, peer, err)
	}
	if row.Check != policyCheck(key, row.Block) {
		return found, own, fmt.Errorf("policy %d, peer %d: damaged row", policy, key.Peer)
	}
	words, err := readBlock(ranges, uint32(row.Block>>32), uint32(row.Block))
	if err != nil {
		return found, own, fmt.Errorf("policy %d, peer %d: %w", policy, key.Peer, err)
	}
	return decisionOf(proto, port, port, decideRange(words, proto, port)), own, nil
}
