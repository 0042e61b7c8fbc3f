// SPDX-License-Identifier: Apache-2.0

package listener

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/resource"
)

// arrival is what filter chains are chosen by.
type arrival struct {
	local, remote netip.AddrPort
	serverName    string
	tls           bool
	protocols     []string
}

// matcher is a compiled filter chain match.
type matcher struct {
	port        uint32 // 0 = any
	local       []netip.Prefix
	names       []string // in lower case; "*.x" = any name under x
	transport   string
	protocols   []string
	direct      []netip.Prefix
	sourceType  listenerv3.FilterChainMatch_ConnectionSourceType
	remote      []netip.Prefix
	remotePorts []uint32
}

func compileMatch(path string, in *listenerv3.FilterChainMatch) (matcher, error) {
	if in == nil {
		return matcher{}, nil
	}
	if err := fields.Only(in, path, "destination_port", "prefix_ranges", "direct_source_prefix_ranges", "source_type", "source_prefix_ranges",
		"source_ports", "server_names", "transport_protocol", "application_protocols"); err != nil {
		return matcher{}, err
	}
	m := matcher{
		port: in.GetDestinationPort().GetValue(), transport: in.GetTransportProtocol(), protocols: in.GetApplicationProtocols(),
		sourceType: in.GetSourceType(), remotePorts: in.GetSourcePorts(),
	}
	for _, name := range in.GetServerNames() {
		if strings.Contains(strings.TrimPrefix(name, "*."), "*") {
			return matcher{}, fmt.Errorf("%s.server_names: %q: only a whole first label may be *", path, name)
		}
		m.names = append(m.names, strings.ToLower(name))
	}
	for _, list := range []struct {
		to   *[]netip.Prefix
		from []*corev3.CidrRange
		name string
	}{
		{&m.local, in.GetPrefixRanges(), "prefix_ranges"},
		{&m.direct, in.GetDirectSourcePrefixRanges(), "direct_source_prefix_ranges"},
		{&m.remote, in.GetSourcePrefixRanges(), "source_prefix_ranges"},
	} {
		for i, r := range list.from {
			prefix, err := resource.Prefix(fields.Index(path, list.name, i), r)
			if err != nil {
				return matcher{}, err
			}
			*list.to = append(*list.to, prefix)
		}
	}
	return m, nil
}

// Each criterion says how well a matcher fits: none = not at all, 0 = it does not ask, more = the closer the better.
const none = -1

type criterion func(m *matcher, a *arrival) int

// criteria in Envoy's order: the chains that fit best by one are all that the next looks at.
func criteria() []criterion {
	return []criterion{
		func(m *matcher, a *arrival) int { return exact(m.port == 0, m.port == uint32(a.local.Port())) },
		func(m *matcher, a *arrival) int { return longest(m.local, a.local.Addr()) },
		func(m *matcher, a *arrival) int { return closestName(m.names, a.serverName) },
		func(m *matcher, a *arrival) int {
			return exact(m.transport == "", m.transport == "tls" && a.tls || m.transport == "raw_buffer" && !a.tls)
		},
		func(m *matcher, a *arrival) int {
			return exact(len(m.protocols) == 0, slices.ContainsFunc(m.protocols, func(p string) bool { return slices.Contains(a.protocols, p) }))
		},
		func(m *matcher, a *arrival) int { return longest(m.direct, a.remote.Addr()) },
		func(m *matcher, a *arrival) int {
			same := a.remote.Addr().Unmap().IsLoopback() || a.remote.Addr().Unmap() == a.local.Addr().Unmap()
			return exact(m.sourceType == listenerv3.FilterChainMatch_ANY,
				same == (m.sourceType == listenerv3.FilterChainMatch_SAME_IP_OR_LOOPBACK))
		},
		func(m *matcher, a *arrival) int { return longest(m.remote, a.remote.Addr()) },
		func(m *matcher, a *arrival) int {
			return exact(len(m.remotePorts) == 0, slices.Contains(m.remotePorts, uint32(a.remote.Port())))
		},
	}
}

func exact(open, fits bool) int {
	switch {
	case open:
		return 0
	case fits:
		return 1
	}
	return none
}

func longest(prefixes []netip.Prefix, a netip.Addr) int {
	if len(prefixes) == 0 {
		return 0
	}
	best := none
	for _, p := range prefixes {
		if p.Contains(a.Unmap()) {
			best = max(best, p.Bits()+1)
		}
	}
	return best
}

func closestName(names []string, have string) int {
	if len(names) == 0 {
		return 0
	}
	best := none
	for _, n := range names {
		switch {
		case n == have:
			return 1 << 20
		case strings.HasPrefix(n, "*.") && strings.HasSuffix(have, n[1:]) && len(have) > len(n)-1:
			best = max(best, len(n))
		}
	}
	return best
}

// find returns the chain for a connection; nil = none.
func (p *plan) find(a *arrival) *chain {
	// One chain that asks for nothing is what most listeners have.
	if len(p.chains) == 1 && p.chains[0].match.open() {
		return p.chains[0]
	}
	candidates := slices.Clone(p.chains)
	for _, fits := range criteria() {
		best := none
		for _, c := range candidates {
			best = max(best, fits(&c.match, a))
		}
		if best == none {
			return p.fallback
		}
		candidates = slices.DeleteFunc(candidates, func(c *chain) bool { return fits(&c.match, a) != best })
	}
	if len(candidates) == 0 {
		return p.fallback
	}
	return candidates[0]
}

func (m *matcher) open() bool {
	return m.port == 0 && len(m.local) == 0 && len(m.names) == 0 && m.transport == "" && len(m.protocols) == 0 && len(m.direct) == 0 &&
		m.sourceType == listenerv3.FilterChainMatch_ANY && len(m.remote) == 0 && len(m.remotePorts) == 0
}
