// SPDX-License-Identifier: Apache-2.0

package mirror

import (
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
)

// routes lists the routes to all pod CIDRs, and to the pods whose fixed addresses lie outside of them.
func (m *Mirror) routes() []netdev.Route {
	var all []netdev.Route
	for _, n := range m.nodes {
		for _, p := range n.PodCIDRs {
			if r, ok := m.route(n, p.Masked()); ok {
				all = append(all, r)
			}
		}
	}
	for _, e := range m.endpoints {
		n := m.nodes[e.Node]
		if n == nil || n.Name == m.cfg.Node {
			continue
		}
		for _, a := range e.Addresses {
			if _, local := m.local[a]; local || within(n, a) {
				continue
			}
			if r, ok := m.route(n, hostPrefix(a)); ok {
				all = append(all, r)
			}
		}
	}
	if own := m.nodes[m.cfg.Node]; own != nil {
		for a, l := range m.local {
			// A pod that the mesh leaves alone has a route through its own interface.
			if within(own, a) || l.peer.Identity == identityUnmanaged {
				continue
			}
			if r, ok := m.route(own, hostPrefix(a)); ok {
				all = append(all, r)
			}
		}
	}
	return all
}

// route leads to a prefix of a node.
func (m *Mirror) route(n *desired.Node, p netip.Prefix) (netdev.Route, bool) {
	r := netdev.Route{Prefix: p}
	if n.Name == m.cfg.Node {
		r.Source = m.cfg.NodeIPv6
		if p.Addr().Is4() {
			r.Source = m.cfg.NodeIPv4
		}
		return r, true
	}
	if r.Via = nodeAddr(n, p.Addr(), false); !r.Via.IsValid() {
		m.log.Warn("node has no address of a prefix's family", "node", n.Name, "prefix", p)
		return r, false
	}
	return r, true
}

// within says that an address lies in a pod CIDR of a node.
func within(n *desired.Node, a netip.Addr) bool {
	return slices.ContainsFunc(n.PodCIDRs, func(p netip.Prefix) bool { return p.Contains(a) })
}

// strays says that an endpoint may need routes of its own.
func (m *Mirror) strays(e *desired.Endpoint) bool {
	if e == nil || e.HostNetwork {
		return false
	}
	n := m.nodes[e.Node]
	return n != nil && slices.ContainsFunc(e.Addresses, func(a netip.Addr) bool { return !within(n, a) })
}

// outside says that a local address needs a route of its own.
func (m *Mirror) outside(a netip.Addr) bool {
	own := m.nodes[m.cfg.Node]
	return own != nil && !within(own, a)
}
