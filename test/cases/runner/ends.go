// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/test/cases/format"
	"github.com/weirmesh/weir/test/cases/probe"
)

// made is a connection that was prepared between two ends.
type made struct {
	connection *probe.Connection
	from, to   *spot
	source     netip.Addr
	far        []probe.Far
	how        How
	// managed: Weir sees it, and makes flows of it.
	managed bool
	service bool
	// behind are tuples of the connection after a node took the client's place.
	behind []probe.Tuple
}

var protocols = map[string]int{format.TCP: 6, format.UDP: 17, format.SCTP: 132, format.ICMPv4: 1, format.ICMPv6: 58}

// connection prepares the connection of a flow.
func (g *game) connection(ctx context.Context, f format.Flow) (*made, error) {
	from, err := format.ParseEnd(f.From)
	if err != nil {
		return nil, err
	}
	to, err := format.ParseEnd(f.To)
	if err != nil {
		return nil, err
	}
	near := g.c.Nodes[0].Name
	if n := g.places.nodeOf(to); n != "" {
		near = n
	}
	m := &made{how: Live}
	if m.from, err = g.places.find(ctx, from, near); err != nil {
		return nil, err
	}
	spec := probe.Spec{Protocol: protocols[f.Protocol], From: m.from.from}
	if f.ICMP != nil {
		spec.ICMPType, spec.ICMPCode = byte(f.ICMP.Type), byte(f.ICMP.Code)
	} else if f.Protocol == format.ICMPv4 {
		spec.ICMPType = 8
	} else if f.Protocol == format.ICMPv6 {
		spec.ICMPType = 128
	}
	m.managed = m.from.managed
	if to.Kind == format.ServiceEnd {
		if from.Kind == format.NodeEnd {
			if spec.From, err = g.places.process(from.Name); err != nil {
				return nil, err
			}
		}
		m.service = true
		err = g.serviceSpec(m, &spec, to.Name, f)
	} else {
		if n := g.places.nodeOf(from); n != "" {
			near = n
		}
		if m.to, err = g.places.find(ctx, to, near); err != nil {
			return nil, err
		}
		m.managed = (m.managed || m.to.managed) && from != to
		err = g.directSpec(m, &spec, f)
	}
	if err != nil {
		return nil, err
	}
	m.source = spec.Source
	if f.Protocol == format.SCTP {
		m.how = Crafted
	}
	m.far = spec.Far
	if m.connection, err = g.net.New(spec); err != nil {
		return nil, err
	}
	return m, nil
}

// directSpec chooses the addresses of two ends.
func (g *game) directSpec(m *made, spec *probe.Spec, f format.Flow) error {
	for _, v4 := range families(f.Protocol) {
		src, dst := ofFamily(m.from.addrs, v4), ofFamily(m.to.addrs, v4)
		if !src.IsValid() || !dst.IsValid() {
			continue
		}
		spec.Source, spec.To = src, netip.AddrPortFrom(dst, uint16(f.Port))
		spec.Far = []probe.Far{{Place: m.to.at, Addr: spec.To}}
		return nil
	}
	return fmt.Errorf("%s and %s have no addresses of one family: %v, %v", f.From, f.To, m.from.addrs, m.to.addrs)
}

// families that a protocol may use, the first preferred: true is IPv4.
func families(protocol string) []bool {
	switch protocol {
	case format.ICMPv4:
		return []bool{true}
	case format.ICMPv6:
		return []bool{false}
	}
	return []bool{true, false}
}

func ofFamily(addrs []netip.Addr, v4 bool) netip.Addr {
	if i := slices.IndexFunc(addrs, func(a netip.Addr) bool { return a.Is4() == v4 }); i >= 0 {
		return addrs[i]
	}
	return netip.Addr{}
}

// serviceSpec chooses the address of a service, and listens at all its backends.
func (g *game) serviceSpec(m *made, spec *probe.Spec, name string, f format.Flow) error {
	service := g.plan.Services[name]
	if len(service.Addrs) == 0 {
		return errors.New("a headless service has no address")
	}
	for _, v4 := range families(f.Protocol) {
		src, dst := ofFamily(m.from.addrs, v4), ofFamily(service.Addrs, v4)
		if !src.IsValid() || !dst.IsValid() {
			continue
		}
		spec.Source, spec.To = src, netip.AddrPortFrom(dst, uint16(f.Port))
		for _, p := range service.Ports {
			if p.Port != f.Port || p.Protocol != f.Protocol {
				continue
			}
			for _, b := range p.Backends {
				if b.Addr.Is4() != v4 {
					continue
				}
				s, err := g.places.address(b.Addr)
				if b.Pod != "" {
					s, err = g.places.pod(b.Pod)
				}
				if err != nil {
					return err
				}
				m.managed = m.managed || s.managed
				far := probe.Far{Place: s.at, Addr: netip.AddrPortFrom(b.Addr, uint16(b.Port))}
				spec.Far = append(spec.Far, far)
				if from, err := format.ParseEnd(f.From); err == nil && from.Kind == format.AddressEnd {
					m.behind = append(m.behind, g.behind(spec.Protocol, far.Addr)...)
				}
			}
		}
		return nil
	}
	return fmt.Errorf("%s and %s have no addresses of one family", f.From, f.To)
}

// behind are the tuples that connections to an address have when a node took the client's place.
func (g *game) behind(protocol int, to netip.AddrPort) []probe.Tuple {
	var tuples []probe.Tuple
	for _, n := range g.plan.Nodes {
		for _, a := range n.Addrs {
			if a.Is4() == to.Addr().Is4() {
				tuples = append(tuples, probe.Tuple{Protocol: protocol, Src: netip.AddrPortFrom(a, 0), Dst: to})
			}
		}
	}
	return tuples
}
