// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/internal/reserved"
)

// Term is one condition on peers. It is never changed, and safe for concurrent use.
type Term struct {
	// Key is canonical: the same condition in two policies has the same key.
	Key string

	kind      termKind
	selectors []*Selector // any of them
	items     cidrItems
	networks  bool // ... also for every peer in the cluster, through Peer.Networks
	nodes     bool // ... for nodes
	pods      bool // ... for pods
	port      NamedPort
	name      NameSelector // canonical
}

type termKind uint8

const (
	termEndpoints termKind = iota // labels of something in the cluster that is no node
	termLabels                    // labels of anything
	termNodes                     // labels of remote nodes
	termCIDR
	termWorld // the world of one family
	termPort  // pods that give a port a name
	termName  // addresses outside that DNS gave a name
)

// endpointsTerm is a peer selector. Unless it names a reserved label it never matches what is outside or a node (spec 5.3).
func endpointsTerm(s *Selector) *Term {
	if s.mentions(isReserved) {
		return labelsTerm("labels:"+s.Key(), s)
	}
	return &Term{Key: "endpoints:" + s.Key(), kind: termEndpoints, selectors: []*Selector{s}}
}

func labelsTerm(key string, anyOf ...*Selector) *Term {
	return &Term{Key: key, kind: termLabels, selectors: anyOf}
}

// nodesTerm is a selector of remote nodes, of one cluster unless that is "".
func nodesTerm(s *Selector, cluster string) *Term {
	t := &Term{Key: "nodes:" + s.Key(), kind: termNodes, selectors: []*Selector{s}}
	if cluster != "" {
		// Nodes of the local cluster need not carry its name.
		t.selectors = append(t.selectors, newSelector([]requirement{{key: reserved.ClusterKey, op: opIn, values: []string{cluster}}}),
			newSelector([]requirement{{key: reserved.ClusterKey, op: opDoesNotExist}}))
		t.Key += "@" + cluster
	}
	return t
}

func portTerm(p NamedPort) *Term {
	return &Term{Key: "port:" + p.Name + "=" + strconv.Itoa(int(p.Port)) + "/" + protocolName(p.Proto), kind: termPort, port: p}
}

// nameTerm is for addresses with a name. Who they are is known on each node only: it matches no peer but one that comes with Names.
func nameTerm(s NameSelector) *Term {
	t := &Term{kind: termName, name: NameSelector{canonicalName(s.MatchName), canonicalName(s.MatchPattern)}}
	t.Key = "fqdn:" + t.name.MatchName
	if t.name.MatchPattern != "" {
		t.Key = "fqdn-pattern:" + t.name.MatchPattern
	}
	return t
}

// IsName reports whether it is a condition on DNS names: the only kind of term that no peer of the cluster meets.
func (t *Term) IsName() bool { return t.kind == termName }

// cidrTerm is a union of prefixes outside of the cluster, and inside as the options say.
func cidrTerm(o Options, items []cidrItem) *Term {
	t := &Term{kind: termCIDR, items: newCIDRItems(items), nodes: o.CIDRMatchesNodes, pods: o.CIDRMatchesPods}
	t.setCIDRKey()
	return t
}

// split returns a term for each item of a union of prefixes.
func (t *Term) split() []*Term {
	if t.kind != termCIDR || len(t.items) < 2 {
		return []*Term{t}
	}
	all := make([]*Term, len(t.items))
	for i := range t.items {
		all[i] = &Term{kind: termCIDR, items: t.items[i : i+1], networks: t.networks, nodes: t.nodes, pods: t.pods}
		all[i].setCIDRKey()
	}
	return all
}

// networksTerm is a union of prefixes anywhere.
func networksTerm(items []cidrItem) *Term {
	t := &Term{kind: termCIDR, items: newCIDRItems(items), networks: true}
	t.setCIDRKey()
	return t
}

// setCIDRKey writes short lists out, and long ones as a hash.
func (t *Term) setCIDRKey() {
	prefix := "cidr"
	if t.networks {
		prefix = "networks"
	}
	if t.nodes {
		prefix += "+nodes"
	}
	if t.pods {
		prefix += "+pods"
	}
	texts := make([]string, len(t.items))
	for i, item := range t.items {
		texts[i] = item.String()
	}
	text := strings.Join(texts, ",")
	if len(text) > 256 {
		sum := sha256.Sum256([]byte(text))
		text = "#" + hex.EncodeToString(sum[:])
	}
	t.Key = prefix + ":" + text
}

// LabelKeys returns the label keys (without source) that it names, sorted.
func (t *Term) LabelKeys() []string {
	var keys []string
	for _, s := range t.selectors {
		keys = s.appendKeys(keys)
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}

// Matches reports whether a peer meets the condition. Safe for concurrent use.
func (t *Term) Matches(p *Peer) bool {
	switch t.kind {
	case termEndpoints:
		return t.selectors[0].Matches(p.Labels) && !p.Prefix.IsValid() && !isOutside(p) && !isNode(p)
	case termLabels:
		return slices.ContainsFunc(t.selectors, func(s *Selector) bool { return s.Matches(p.Labels) })
	case termNodes:
		return has(p.Labels, "reserved:remote-node") && t.selectors[0].Matches(p.Labels) &&
			(len(t.selectors) == 1 || t.selectors[1].Matches(p.Labels) || t.selectors[2].Matches(p.Labels))
	case termCIDR:
		return t.matchesCIDR(p)
	case termWorld:
		return slices.ContainsFunc(t.selectors, func(s *Selector) bool { return s.Matches(p.Labels) }) && t.items.contains(worldPrefix(p, t.items[0].prefix))
	case termName:
		return (p.Prefix.IsValid() || isOutside(p)) && slices.ContainsFunc(p.Names, func(name string) bool { return MatchName(t.name, name) })
	default:
		return slices.Contains(p.NamedPorts, t.port)
	}
}

func (t *Term) matchesCIDR(p *Peer) bool {
	if p.Prefix.IsValid() {
		return t.items.contains(p.Prefix)
	}
	if isOutside(p) {
		return slices.ContainsFunc(t.items, func(i cidrItem) bool { return i.contains(worldPrefix(p, i.prefix)) })
	}
	if t.networks || t.nodes && isNode(p) || t.pods && !isNode(p) {
		return t.items.within(p.Networks)
	}
	return false
}

// worldPrefix is the prefix of a peer that is the rest of the world. `reserved:world` of a cluster with one family has a family only if the peer has
// a prefix: else it is of the family that is asked for, since there is no other.
func worldPrefix(p *Peer, asked netip.Prefix) netip.Prefix {
	switch v4 := netip.PrefixFrom(netip.IPv4Unspecified(), 0); {
	case p.Prefix.IsValid():
		return p.Prefix
	case has(p.Labels, "reserved:world-ipv4"):
		return v4
	case has(p.Labels, "reserved:world-ipv6"), asked.Addr().Is6():
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	default:
		return v4
	}
}

func isOutside(p *Peer) bool {
	for _, l := range p.Labels {
		if strings.HasPrefix(l, "reserved:world") {
			return true
		}
	}
	return false
}

func isNode(p *Peer) bool {
	for _, l := range p.Labels {
		if rest, ok := strings.CutPrefix(l, "reserved:"); ok {
			rest = strings.TrimSuffix(rest, "=")
			if rest == "host" || rest == "remote-node" {
				return true
			}
		}
	}
	return false
}

// Words says what it matches, for people.
func (t *Term) Words() string {
	switch t.kind {
	case termName:
		return "the name " + t.name.MatchName + t.name.MatchPattern
	case termPort:
		return "pods that call " + strconv.Itoa(int(t.port.Port)) + "/" + protocolName(t.port.Proto) + " " + t.port.Name
	case termCIDR:
		texts := make([]string, 0, 4)
		for i, item := range t.items {
			if i == 3 && len(t.items) > 4 {
				texts = append(texts, strconv.Itoa(len(t.items)-i)+" more")
				break
			}
			text := item.prefix.String()
			for j, e := range item.except {
				text += map[bool]string{true: " except ", false: " "}[j == 0] + e.String()
			}
			texts = append(texts, text)
		}
		return "CIDR " + strings.Join(texts, ", ")
	case termNodes:
		return "remote nodes with " + t.selectors[0].String()
	case termEndpoints:
		return "endpoints with " + t.selectors[0].String()
	}
	if name, ok := strings.CutPrefix(t.Key, "entity:"); ok {
		return "entity " + name
	}
	return "labels " + strings.TrimPrefix(t.Key, "labels:")
}

func itoa(i int) string { return strconv.Itoa(i) }
