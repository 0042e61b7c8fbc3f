// SPDX-License-Identifier: Apache-2.0

package mirror

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// frontend is a row, and the key of the route that its connections pass first; its slot is looked for when the row is wanted.
type frontend struct {
	datapath.Service
	route    string
	unrouted error // there is no slot for it
}

// frontendsOf lists what clients of a service can address, with backends of the same family.
func (m *Mirror) frontendsOf(s *desired.Service) []frontend {
	var all []frontend
	for i := range s.Ports {
		p := &s.Ports[i]
		var group uint32
		add := func(kind datapath.FrontendKind, a netip.Addr, port uint16) {
			row := frontend{Service: datapath.Service{Frontend: datapath.Frontend{Addr: a, Port: port, Proto: p.Proto}, Kind: kind, Backends: m.backendsOf(p, a.Is4()),
				Affinity: time.Duration(s.AffinitySeconds) * time.Second}}
			if kind == datapath.ClusterIP {
				row.route = p.Route
			}
			if s.Maglev {
				row.Algorithm = datapath.Maglev
			}
			if kind == datapath.ClusterIP {
				row.InternalLocal = s.InternalLocal
			} else {
				row.ExternalLocal = s.ExternalLocal
			}
			if kind == datapath.LoadBalancer || kind == datapath.NodePort && s.Type == "LoadBalancer" {
				row.SourceRanges = s.SourceRanges
			}
			if row.Affinity > 0 {
				if group == 0 {
					// A client keeps its backend whichever address of the port it uses.
					group = m.cfg.ServiceIDs.Of(row.Frontend)
				}
				row.AffinityGroup = group
			}
			all = append(all, row)
		}
		for _, a := range s.ClusterIPs {
			add(datapath.ClusterIP, a, p.Port)
		}
		if p.NodePort != 0 {
			for _, a := range nodePortAddresses(s) {
				add(datapath.NodePort, a, p.NodePort)
			}
		}
		for _, a := range s.ExternalIPs {
			add(datapath.ExternalIP, a, p.Port)
		}
		for _, a := range s.LoadBalancerIPs {
			add(datapath.LoadBalancer, a, p.Port)
		}
	}
	return all
}

// nodePortAddresses stand for all addresses of nodes, of the families that the service has.
func nodePortAddresses(s *desired.Service) []netip.Addr {
	var all []netip.Addr
	for _, a := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		if slices.ContainsFunc(s.ClusterIPs, func(ip netip.Addr) bool { return ip.Is4() == a.Is4() }) {
			all = append(all, a)
		}
	}
	return all
}

// backendsOf lists a port's backends of one family, each once.
func (m *Mirror) backendsOf(p *desired.ServicePort, four bool) []datapath.Backend {
	var list []datapath.Backend
	for _, b := range p.Backends {
		if b.Addr.Addr().Is4() == four {
			list = append(list, datapath.Backend{AddrPort: b.Addr, Local: b.Node == m.cfg.Node, Terminating: b.Terminating})
		}
	}
	slices.SortFunc(list, func(a, b datapath.Backend) int {
		if c := a.AddrPort.Compare(b.AddrPort); c != 0 {
			return c
		}
		return cmp.Compare(b2i(a.Terminating), b2i(b.Terminating)) // one that is ready counts
	})
	return slices.CompactFunc(list, func(a, b datapath.Backend) bool { return a.AddrPort == b.AddrPort })
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}
