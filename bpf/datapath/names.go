// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"

	"github.com/cilium/ebpf"
)

// Names owns the maps of what policies allow by the names of outside addresses. One process writes them: weir-dns. They hold for
// peers that are world or of a CIDR identity, where the ordinary decision is PolicyDefaultDeny or PolicyRedirect.
//
// Order of writes: the rows of a set (SetPolicy) before an address gets it, and the address loses it before they go.
type Names struct {
	mu        sync.Mutex
	addresses *ebpf.Map
	table     *rowTable
	used      int // addresses
}

// NamePolicy is a policy that has a row for a set of names.
type NamePolicy struct {
	Policy, Set uint32
}

// openPin opens a pinned map of this version's layout.
func openPin(bpffs, name string, opts *ebpf.LoadPinOptions) (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(bpffs, pinName(name)), opts)
	if err != nil {
		return nil, fmt.Errorf("pinned map %s: %w", pinName(name), err)
	}
	return m, nil
}

// OpenNames opens the maps under Config.PinPath of the node's datapath, with what an earlier process left in them. fs.ErrNotExist: none has been
// loaded yet.
func OpenNames(bpffs string) (*Names, error) {
	maps := map[string]*ebpf.Map{}
	for _, name := range []string{tcMapFqdn, tcMapFqdnPeers, tcMapFqdnRanges} {
		m, err := openPin(bpffs, name, nil)
		if err != nil {
			return nil, errors.Join(err, closeMaps(maps))
		}
		maps[name] = m
	}
	table, err := newRowTable(tcMapFqdnPeers, maps[tcMapFqdnPeers], tcMapFqdnRanges, maps[tcMapFqdnRanges])
	if err != nil {
		return nil, errors.Join(err, closeMaps(maps))
	}
	n := &Names{addresses: maps[tcMapFqdn], table: table}
	have, err := n.Addresses()
	if err != nil {
		return nil, errors.Join(err, closeMaps(maps))
	}
	n.used = len(have)
	return n, nil
}

// Close lets go of the maps; what they hold stays.
func (n *Names) Close() error {
	return errors.Join(n.addresses.Close(), n.table.peers.Close(), n.table.blocks.m.Close())
}

// SetAddress says which set of name selectors an address matches; not 0. The error is ErrFull when the map has no room.
func (n *Names) SetAddress(a netip.Addr, set uint32) error {
	if !a.IsValid() || set == 0 {
		return fmt.Errorf("address %v, set %d: want an address and a set", a, set)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	err := n.addresses.Update(addrOf(a), set, ebpf.UpdateNoExist)
	if err == nil {
		n.used++
		return nil
	}
	if errors.Is(err, ebpf.ErrKeyExist) {
		err = n.addresses.Update(addrOf(a), set, ebpf.UpdateExist)
	}
	if err != nil {
		return fmt.Errorf("names of %v: %w", a, fullError(n.addresses, tcMapFqdn, err))
	}
	return nil
}

// DeleteAddress forgets the names of an address; no such address is not an error.
func (n *Names) DeleteAddress(a netip.Addr) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	err := n.addresses.Delete(addrOf(a))
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("delete names of %v: %w", a, err)
	}
	n.used--
	return nil
}

// SetPolicy says what a policy allows for a set of names: PolicyAllow, PolicyRedirect and PolicyVisible count, all else leaves the decision as it
// was. An equal row is left alone. The error is ErrFull when a map has no room; the old row, if any, then holds.
func (n *Names) SetPolicy(policy, set uint32, ranges []PolicyRange) error {
	if set == 0 {
		return fmt.Errorf("policy %d: set 0 of names", policy)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.table.set(policy, set, ranges)
}

// DeletePolicy removes the row of a policy and a set; no such row is not an error.
func (n *Names) DeletePolicy(policy, set uint32) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.table.delete(policy, set)
}

// Addresses returns the set of each address.
func (n *Names) Addresses() (map[netip.Addr]uint32, error) {
	out := map[netip.Addr]uint32{}
	err := walkMap(n.addresses, func(k tcAddr, set uint32) { out[k.netip()] = set })
	if err != nil {
		return nil, fmt.Errorf("list names of addresses: %w", err)
	}
	return out, nil
}

// Policies returns which rows there are, sorted.
func (n *Names) Policies() ([]NamePolicy, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	rows := n.table.list()
	out := make([]NamePolicy, len(rows))
	for i, r := range rows {
		out[i] = NamePolicy{Policy: r.Policy, Set: r.Peer}
	}
	return out, nil
}

// Usage returns how full the maps are.
func (n *Names) Usage() []MapUsage {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append(n.table.usage(), MapUsage{Map: tcMapFqdn, Entries: n.used, Max: int(n.addresses.MaxEntries())})
}
