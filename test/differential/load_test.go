// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/test/reference"
)

// local is the node that a datapath under test is.
const local = "n1"

// Numbers that an agent gives; see the ranges of identities in the semantics page (6.1).
const (
	firstCIDR    = 0x01000001
	firstNode    = 0x02000001
	firstVariant = 0x03000001
)

// loaded is a world in the maps of a node.
type loaded struct {
	*node
	*Compiled
	networks  []netip.Prefix // that addresses inside are told apart by
	peers     map[string]uint32
	endpoints map[string]uint16 // by end
	policies  map[string]uint32 // by key of the resolved policy
	rules     map[string]uint32 // by the rules that decide
	prefixes  []netip.Prefix    // in ipcache
	addresses []netip.Addr      // of endpoints
	slots     map[string]uint16 // by key of the filter
	sent      map[frame]bool    // ICMP

	numbersFrom uint32
}

// noPods have addresses too: on this node, all but the last.
var noPods = []string{"entity:health", "entity:ingress", "entity:init", "entity:unmanaged"}

func (l *loaded) address(end string, v6 bool) netip.Addr {
	if i := slices.Index(noPods, end); i >= 0 {
		if v6 {
			return netip.MustParseAddr(fmt.Sprintf("fd00:1:1::f%d", i))
		}
		return netip.MustParseAddr(fmt.Sprintf("10.1.1.24%d", i))
	}
	return l.Compiled.address(end, v6)
}

func (l *loaded) isLocal(end string) bool { return end != "entity:unmanaged" && l.nodeOf(end) == local }

// load writes a world into the maps: policies, then who has them, then addresses. Its policies have numbers above numbersFrom.
func (n *node) load(c *Compiled, numbersFrom uint32) *loaded {
	l := &loaded{
		node: n, Compiled: c, numbersFrom: numbersFrom, peers: map[string]uint32{}, endpoints: map[string]uint16{}, policies: map[string]uint32{}, rules: map[string]uint32{},
		slots: map[string]uint16{}, sent: map[frame]bool{},
	}
	var ends []string
	for _, p := range c.cluster.Pods {
		if !p.HostNetwork {
			ends = append(ends, p.Namespace+"/"+p.Name)
		}
	}
	ends = append(ends, noPods...)
	for _, s := range c.subjects() {
		for _, d := range []policy.Direction{policy.Ingress, policy.Egress} {
			l.networks = append(l.networks, c.resolved[resolvedKey{s, d}].Networks()...)
		}
	}
	slices.SortFunc(l.networks, netip.Prefix.Compare)
	l.networks = slices.Compact(l.networks)
	for _, nd := range c.cluster.Nodes {
		ends = append(ends, "node:"+nd.Name)
	}
	for _, s := range c.subjects() {
		if l.isLocal(s) {
			l.setEndpoint(s, ends)
		}
	}
	for _, end := range ends {
		for _, v6 := range []bool{false, true} {
			l.place(end, v6)
		}
	}
	l.placeOutside()
	l.do(n.Policies().Bump())
	return l
}

// replaced takes away what a later world of the same ends has no use for.
func (l *loaded) replaced(by *loaded) {
	for _, p := range l.prefixes {
		if !slices.Contains(by.prefixes, p) {
			l.do(l.IPCache().Delete(p))
		}
	}
	for _, number := range l.policies {
		l.do(l.Policies().DeletePolicy(number))
	}
	l.do(l.Policies().Bump())
	l.drain()
}

func (l *loaded) do(err error) {
	if err != nil {
		l.Helper()
		l.Fatal(err)
	}
}

// setEndpoint gives a subject its number and policies.
func (l *loaded) setEndpoint(subject string, ends []string) {
	id := datapath.HostEndpoint
	if !strings.HasPrefix(subject, "node:") {
		id = uint16(100 + len(l.endpoints))
	}
	l.endpoints[subject] = id
	e := datapath.EndpointPolicy{IngressAudit: l.options.Audit, EgressAudit: l.options.Audit}
	for direction, number := range map[policy.Direction]*uint32{policy.Ingress: &e.Ingress, policy.Egress: &e.Egress} {
		switch r := l.resolved[resolvedKey{subject, direction}]; {
		case r.Key != "":
			*number = l.writePolicy(r, ends)
		case id == datapath.HostEndpoint:
			*number = l.allowAll()
		}
	}
	l.do(l.Policies().SetEndpoint(id, e))
}

// allowAll is what the policy service gives a node that no policy selects while the host firewall is on: its connections are tracked, so that the first
// policy meets none of which nothing is known.
func (l *loaded) allowAll() uint32 {
	const key = "allow-all"
	if l.policies[key] == 0 {
		l.policies[key] = l.numbersFrom + uint32(len(l.policies)+1)
		l.do(l.Policies().SetPeer(l.policies[key], 0, []datapath.PolicyRange{{Last: 65535, Verdict: datapath.PolicyAllow}}))
	}
	return l.policies[key]
}

// writePolicy writes the rows of a resolved policy, once.
func (l *loaded) writePolicy(r *policy.Resolved, ends []string) uint32 {
	number, ok := l.policies[r.Key]
	if ok {
		return number
	}
	number = l.numbersFrom + uint32(len(l.policies)+1)
	l.policies[r.Key] = number
	row := func(peer uint32, terms []int) {
		var ranges []datapath.PolicyRange
		for _, x := range r.Class(terms) {
			verdict, slot := l.through(x.Verdict, x.Filter)
			ranges = append(ranges, datapath.PolicyRange{Proto: x.Proto, First: x.First, Last: x.Last, Verdict: verdict, Rule: l.rule(r, x.Rules), Slot: slot})
		}
		l.do(l.Policies().SetPeer(number, peer, ranges))
	}
	row(0, nil)
	for _, p := range l.allPeers(ends) {
		if terms := r.Match(p); len(terms) > 0 {
			row(l.peerNumber(p.Key), terms)
		}
	}
	return number
}

// through is the verdict of a range with a filter, and its slot. No slot has a listener here.
func (l *loaded) through(v policy.Verdict, f *policy.Filter) (datapath.PolicyVerdict, uint16) {
	if f == nil {
		return datapath.PolicyVerdict(v), 0
	}
	slot := l.slots[f.Key]
	if slot == 0 {
		slot = uint16(len(l.slots) + 1)
		l.slots[f.Key] = slot
	}
	if f.Visibility {
		return datapath.PolicyVisible, slot
	}
	return datapath.PolicyRedirect, slot
}

// rule numbers the rules that decide something, by their names.
func (l *loaded) rule(r *policy.Resolved, rules []int) uint32 {
	if len(rules) == 0 {
		return 0
	}
	var names []string
	for _, i := range rules {
		names = append(names, r.Rules[i].String())
	}
	key := strings.Join(names, "; ")
	if l.rules[key] == 0 {
		l.rules[key] = uint32(len(l.rules) + 1)
	}
	return l.rules[key]
}

// allPeers is everybody that this node's ipcache can name.
func (l *loaded) allPeers(ends []string) []*policy.Peer {
	var out []*policy.Peer
	for _, end := range ends {
		for _, v6 := range []bool{false, true} {
			if l.address(end, v6).IsValid() {
				out = append(out, l.peer(end, local, v6, l.networks))
			}
		}
	}
	for _, p := range l.outsidePrefixes() {
		out = append(out, l.prefixPeer(p))
	}
	return out
}

// outsidePrefixes is what addresses outside are told apart by, and the world.
func (l *loaded) outsidePrefixes() []netip.Prefix {
	out := slices.Clone(l.Compiled.prefixes)
	for _, f := range l.cluster.Config.IPFamilies {
		if f == "IPv4" {
			out = append(out, netip.MustParsePrefix("0.0.0.0/0"))
		} else {
			out = append(out, netip.MustParsePrefix("::/0"))
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out)
}

func (l *loaded) peerNumber(key string) uint32 {
	var n uint32
	if _, err := fmt.Sscanf(key, "%d", &n); err == nil && !strings.Contains(key, "/") {
		return n
	}
	if n, ok := l.peers[key]; ok {
		return n
	}
	n = uint32(firstVariant)
	switch {
	case strings.HasPrefix(key, "cidr:"):
		n = firstCIDR
	case strings.HasPrefix(key, "node:"):
		n = firstNode
	}
	n += uint32(len(l.peers))
	l.peers[key] = n
	return n
}

// place writes what the node knows of an end's address.
func (l *loaded) place(end string, v6 bool) {
	address := l.address(end, v6)
	if !address.IsValid() {
		return
	}
	p := l.peer(end, local, v6, l.networks)
	entry := datapath.IPCacheEntry{Identity: l.identity(p), Peer: l.peerNumber(p.Key)}
	if entry.Peer == entry.Identity {
		entry.Peer = 0
	}
	if !l.isLocal(end) {
		entry.NodeAddr = netip.MustParseAddr("172.30.0.12")
	}
	l.upsert(netip.PrefixFrom(address, address.BitLen()), entry)
	if l.isLocal(end) && !strings.HasPrefix(end, "node:") {
		l.do(l.Endpoints().Upsert(address, datapath.Endpoint{
			ID: l.endpoints[end], Identity: entry.Identity, Peer: entry.Peer, IfIndex: l.iface(end),
		}))
		l.addresses = append(l.addresses, address)
	}
}

func (l *loaded) iface(end string) uint32 { return l.ifaces[l.endpoints[end]-100] }

// identity of a peer in the cluster.
func (l *loaded) identity(p *policy.Peer) uint32 {
	base, _, _ := strings.Cut(p.Key, "/")
	if strings.HasPrefix(base, "node:") {
		return datapath.IdentityRemoteNode
	}
	return l.peerNumber(base)
}

func (l *loaded) upsert(prefix netip.Prefix, entry datapath.IPCacheEntry) {
	l.do(l.IPCache().Upsert(prefix, entry))
	l.prefixes = append(l.prefixes, prefix)
}

func (l *loaded) placeOutside() {
	for _, p := range l.outsidePrefixes() {
		l.upsert(p, datapath.IPCacheEntry{Identity: l.peerNumber(l.prefixPeer(p).Key)})
	}
}

// unload takes everything away again.
func (l *loaded) unload() {
	for _, p := range l.prefixes {
		l.do(l.IPCache().Delete(p))
	}
	for _, a := range l.addresses {
		l.do(l.Endpoints().Delete(a))
	}
	for _, id := range l.endpoints {
		l.do(l.Policies().SetEndpoint(id, datapath.EndpointPolicy{}))
		if _, err := l.Conntrack().Purge(id); err != nil {
			l.Fatal(err)
		}
	}
	for _, number := range l.policies {
		l.do(l.Policies().DeletePolicy(number))
	}
	l.drain()
}

// way returns the program that a packet from one end to the other meets first on this node, and its interface; "" if there is none.
func (l *loaded) way(from, to string) (program string, ifindex uint32) {
	toHost := to == "node:"+local
	switch {
	case !l.isEndpoint(from) && !l.isEndpoint(to) && !l.options.HostFirewall:
		return "", 0
	case l.isEndpoint(from):
		return "from_pod", l.iface(from)
	case from == "node:"+local && l.isEndpoint(to):
		return "from_host", l.host
	case from == "node:"+local:
		return "to_network", l.uplink
	case l.isEndpoint(to) || toHost:
		return "from_network", l.uplink
	}
	return "", 0
}

func (l *loaded) isEndpoint(end string) bool {
	return !strings.HasPrefix(end, "node:") && l.endpoints[end] != 0
}

// expected is what records must tell of a packet: the verdicts up to the first that drops.
func (l *loaded) expected(from, to string, p reference.Packet) (out []expectation) {
	for _, side := range []struct {
		subject, peer string
		direction     policy.Direction
	}{{from, to, policy.Egress}, {to, from, policy.Ingress}} {
		id, ok := l.endpoints[side.subject]
		r := l.resolved[resolvedKey{side.subject, side.direction}]
		switch {
		case id == datapath.HostEndpoint && r.Key == "":
			out = append(out, expectation{at{id, uint8(side.direction)}, told{datapath.PolicyAllow, 0}})
			continue
		case !ok || r == nil || r.Key == "":
			continue
		}
		d := r.Decide(l.peer(side.peer, local, p.V6, l.networks), p.ProtocolNumber(), uint16(p.Port))
		verdict, _ := l.through(d.Verdict, d.Filter)
		switch verdict {
		case datapath.PolicyRedirect:
			return out // the drop for want of a listener tells
		case datapath.PolicyVisible:
			verdict = datapath.PolicyAllow // it goes straight on
		}
		out = append(out, expectation{at{id, uint8(side.direction)}, told{verdict, l.rule(r, d.Rules)}})
		if d.Verdict != policy.Allow && !l.options.Audit {
			return out
		}
	}
	return out
}

type expectation struct {
	at   at
	told told
}
