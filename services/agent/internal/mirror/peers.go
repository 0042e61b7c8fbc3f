// SPDX-License-Identifier: Apache-2.0

package mirror

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

const labelAPIServer = "reserved:kube-apiserver"

// applyPeer claims the prefixes of a peer that policies name.
func (m *Mirror) applyPeer(c desired.Change) {
	if old := m.peers[c.Key.Name]; old != nil {
		for _, p := range old.Prefixes {
			m.claims.unset("peer/"+old.Key, p)
		}
		delete(m.peers, old.Key)
	}
	p, ok := c.New.(*desired.Peer)
	if !ok {
		return
	}
	m.peers[p.Key] = p
	m.claimPeer(p)
}

func (m *Mirror) claimPeer(p *desired.Peer) {
	owner := "peer/" + p.Key
	entry, prefix := m.entryOf(p)
	for _, x := range p.Prefixes {
		if prefix {
			// What is in a pod CIDR is of the cluster, known or not.
			if m.inCluster(x) {
				m.claims.unset(owner, x)
				continue
			}
			m.claims.set(owner, rankPrefix, x, entry)
			continue
		}
		e := entry
		if e.Identity != identityHost {
			if own := m.nodes[m.cfg.Node]; own != nil && slices.Contains(own.Addresses, x.Addr()) {
				continue // to itself the node is the host
			}
			e.NodeAddr = m.nodeOf(x)
		}
		m.claims.set(owner, rankPeer, x, e)
	}
}

// nodeOf is the address of the node that has a prefix: of the node whose health endpoint it is, or the address itself.
func (m *Mirror) nodeOf(p netip.Prefix) netip.Addr {
	for _, c := range m.claims.rows[p] {
		if c.rank == rankNode && c.entry.NodeAddr.IsValid() {
			return c.entry.NodeAddr
		}
	}
	return p.Addr()
}

// entryOf is what a peer's prefixes get. A node by its labels keeps its identity; only policies know it by its number. prefix: the peer is a prefix outside of
// the cluster.
func (m *Mirror) entryOf(p *desired.Peer) (entry datapath.IPCacheEntry, prefix bool) {
	switch {
	case strings.HasPrefix(p.Key, "cidr:"):
		return datapath.IPCacheEntry{Identity: m.peerNumber(p.Key)}, true
	case strings.HasPrefix(p.Key, "node:"):
		entry.Identity, entry.Peer = identityRemoteNode, m.peerNumber(p.Key)
		if slices.Contains(p.Labels, labelAPIServer) {
			entry.Identity, entry.Flags = identityAPIServer, datapath.IPCacheNode
		}
		return entry, false
	}
	text, _, variant := strings.Cut(p.Key, "/")
	if n, err := strconv.ParseUint(text, 10, 32); err == nil {
		entry.Identity = uint32(n)
	}
	if entry.Identity == identityAPIServer {
		entry.Flags = datapath.IPCacheNode
	}
	if variant {
		entry.Peer = m.peerNumber(p.Key)
	}
	return entry, false
}

// claimPrefixes claims all peers anew: it depends on the nodes who is in the cluster.
func (m *Mirror) claimPrefixes() {
	for _, p := range m.peers {
		m.claimPeer(p)
	}
}

func (m *Mirror) inCluster(p netip.Prefix) bool {
	for _, n := range m.nodes {
		for _, c := range n.PodCIDRs {
			if c.Bits() <= p.Bits() && c.Contains(p.Addr()) {
				return true
			}
		}
	}
	return false
}

// PeerAt is the number by which policies know an address: of the narrowest prefix that is claimed, as ipcache has it.
func (m *Mirror) PeerAt(a netip.Addr) uint32 {
	m.mu.Lock()
	defer m.mu.Unlock()
	for bits := a.BitLen(); bits >= 0; bits-- {
		p, err := a.Prefix(bits)
		if err != nil {
			break
		}
		if e, ok := m.claims.effective(p); ok {
			if e.Peer != 0 {
				return e.Peer
			}
			return e.Identity
		}
	}
	if a.Is4() {
		return m.cfg.WorldIPv4
	}
	return m.cfg.WorldIPv6
}

// Unplaced is a prefix that policies name and ipcache has no room for. Its addresses look like those of the prefix around it.
type Unplaced struct {
	Peer, Around string
	Err          error
}

// unplaced lists what of policies has no room.
func (m *Mirror) unplaced() []Unplaced {
	var list []Unplaced
	for p, err := range m.claims.unplaced {
		if key := "cidr:" + p.String(); m.peers[key] != nil {
			list = append(list, Unplaced{Peer: key, Around: m.around(p), Err: err})
		}
	}
	return list
}

// Unplaced lists what of policies has no room.
func (m *Mirror) Unplaced() []Unplaced {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.unplaced()
}

// around names the peer that addresses of a prefix without a row are taken for.
func (m *Mirror) around(p netip.Prefix) string {
	for bits := p.Bits() - 1; bits >= 0; bits-- {
		wide := netip.PrefixFrom(p.Addr(), bits).Masked()
		if _, written := m.claims.written[wide]; !written {
			continue
		}
		if key := "cidr:" + wide.String(); m.peers[key] != nil {
			return key
		}
		if e, ok := m.claims.effective(wide); ok {
			return strconv.FormatUint(uint64(e.Identity), 10)
		}
	}
	world := m.cfg.WorldIPv6
	if p.Addr().Is4() {
		world = m.cfg.WorldIPv4
	}
	return strconv.FormatUint(uint64(world), 10)
}

// RefusedPods names the pods of other nodes whose addresses have no room.
func (m *Mirror) RefusedPods() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := map[string]string{}
	for p, err := range m.claims.unplaced {
		for _, c := range m.claims.rows[p] {
			if uid, ok := strings.CutPrefix(c.owner, "endpoint/"); ok {
				all[uid] = err.Error()
			}
		}
	}
	return all
}
