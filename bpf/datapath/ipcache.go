// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"net/netip"
)

// IPCacheFlags say what a prefix is.
type IPCacheFlags uint32

const (
	// IPCacheLocalPods marks this node's pod range: a packet to an address in it without an endpoint is dropped (reason 151).
	IPCacheLocalPods = IPCacheFlags(tcIpcacheFlagsIPCACHE_LOCAL_PODS)
	// IPCacheServices marks a range of ClusterIPs: a packet to it that was not translated at the socket is dropped (reason 158 when
	// the service has no backend, else 174).
	IPCacheServices = IPCacheFlags(tcIpcacheFlagsIPCACHE_SERVICES)
	// IPCacheNoMasquerade marks addresses outside of the cluster that see the pods' own addresses.
	IPCacheNoMasquerade = IPCacheFlags(tcIpcacheFlagsIPCACHE_NO_MASQUERADE)
)

// IPCacheEntry is what is known of a prefix.
type IPCacheEntry struct {
	// Identity of the addresses. Packets to an identity of world or CIDR kind (2, 9, 10, from 16777216) are masqueraded; packets to identity 1 are
	// traced as to-host.
	Identity uint32
	// NodeAddr is the node that has the address; invalid = this one, or none.
	NodeAddr netip.Addr
	Flags    IPCacheFlags
}

// IPCacheRow is one prefix.
type IPCacheRow struct {
	Prefix netip.Prefix
	IPCacheEntry
}

// IPCache owns the longest-prefix map prefix -> identity. Replacing is atomic; add the specific before taking away the wide.
type IPCache struct{}

// Upsert makes or replaces the row of a prefix.
func (c *IPCache) Upsert(prefix netip.Prefix, entry IPCacheEntry) error { return errors.ErrUnsupported }

// Delete removes the row of a prefix; no such row is not an error.
func (c *IPCache) Delete(prefix netip.Prefix) error { return errors.ErrUnsupported }

// List returns all rows.
func (c *IPCache) List() ([]IPCacheRow, error) { return nil, errors.ErrUnsupported }
