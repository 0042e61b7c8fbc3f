// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
)

// IPCacheFlags say what a prefix is.
type IPCacheFlags uint32

const (
	// IPCacheLocalPods marks this node's pod range: a packet to an address in it without an endpoint is dropped (reason 151).
	IPCacheLocalPods = IPCacheFlags(tcIpcacheFlagsIPCACHE_LOCAL_PODS)
	// IPCacheServices marks a range of ClusterIPs: a packet to it that was not translated at the socket is dropped (reason 158 when
	// there is a service, which has no backend then, else 174).
	IPCacheServices = IPCacheFlags(tcIpcacheFlagsIPCACHE_SERVICES)
	// IPCacheNoMasquerade marks addresses outside of the cluster that see the pods' own addresses.
	IPCacheNoMasquerade = IPCacheFlags(tcIpcacheFlagsIPCACHE_NO_MASQUERADE)
	// IPCacheNode marks an address of a node whose identity is neither 1 nor 6: node ports are served there.
	IPCacheNode = IPCacheFlags(tcIpcacheFlagsIPCACHE_NODE)
)

// IPCacheEntry is what is known of a prefix.
type IPCacheEntry struct {
	// Identity of the addresses; 0 = world. Packets to an identity of world or CIDR kind (2, 9, 10, from 16777216) are masqueraded;
	// packets to identity 1 are traced as to-host.
	Identity uint32
	// NodeAddr is the node that has the address; invalid = this one, or none.
	NodeAddr netip.Addr
	Flags    IPCacheFlags
	// Peer is the number that policies know the addresses by; 0 = the identity.
	Peer uint32
}

// IPCacheRow is one prefix.
type IPCacheRow struct {
	Prefix netip.Prefix
	IPCacheEntry
}

// IPCache owns the longest-prefix map prefix -> identity. Replacing is atomic; add the specific before taking away the wide.
type IPCache struct {
	m *ebpf.Map
}

// ipcacheKey maps an IPv4 prefix to ::ffff:0:0/96.
func ipcacheKey(p netip.Prefix) (tcIpcacheKey, error) {
	if !p.IsValid() {
		return tcIpcacheKey{}, fmt.Errorf("prefix %v: invalid", p)
	}
	p = p.Masked()
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	return tcIpcacheKey{Prefixlen: uint32(bits), Addr: p.Addr().As16()}, nil
}

func (k tcIpcacheKey) prefix() netip.Prefix {
	a, bits := netip.AddrFrom16(k.Addr), int(k.Prefixlen)
	if a.Is4In6() && bits >= 96 {
		a, bits = a.Unmap(), bits-96
	}
	return netip.PrefixFrom(a, bits)
}

// Upsert makes or replaces the row of a prefix.
func (c *IPCache) Upsert(prefix netip.Prefix, entry IPCacheEntry) error {
	key, err := ipcacheKey(prefix)
	if err != nil {
		return err
	}
	row := tcIpcacheEntry{Identity: entry.Identity, Flags: uint32(entry.Flags), Peer: entry.Peer}
	if entry.NodeAddr.IsValid() {
		row.Node = addrOf(entry.NodeAddr)
	}
	if err := c.m.Put(key, row); err != nil {
		return fmt.Errorf("ipcache %v: %w", prefix, err)
	}
	return nil
}

// Delete removes the row of a prefix; no such row is not an error.
func (c *IPCache) Delete(prefix netip.Prefix) error {
	key, err := ipcacheKey(prefix)
	if err != nil {
		return err
	}
	if err := c.m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete ipcache %v: %w", prefix, err)
	}
	return nil
}

// List returns all rows.
func (c *IPCache) List() ([]IPCacheRow, error) {
	var rows []IPCacheRow
	var key tcIpcacheKey
	var value tcIpcacheEntry
	it := c.m.Iterate()
	for it.Next(&key, &value) {
		row := IPCacheRow{Prefix: key.prefix(), IPCacheEntry: IPCacheEntry{
			Identity: value.Identity, Flags: IPCacheFlags(value.Flags), Peer: value.Peer,
		}}
		if value.Node != (tcAddr{}) {
			row.NodeAddr = value.Node.netip()
		}
		rows = append(rows, row)
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("list ipcache: %w", err)
	}
	return rows, nil
}
