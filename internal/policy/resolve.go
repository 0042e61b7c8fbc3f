// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"

	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/internal/reserved"
)

// Resolved is what all rules together decide for a subject in one direction. It is never changed, and safe for concurrent use.
type Resolved struct {
	// Key is a hash of the content: the same selectors, rules, what rules say of requests, and options have the same key; with filters, the same identity
	// too. "" = everything passes and nothing is looked at: no key, no policy.
	Key       string
	Direction Direction
	// Enforced: some policy selects the subject in this direction (or the mode enforces always). Else everything passes, and the rest is empty, but for a
	// subject with a visibility annotation: it has a Key, and its classes say what is to be seen.
	Enforced bool
	// DefaultDeny: what no rule allows is denied.
	DefaultDeny bool
	// EnforcedBy says what put the subject in default deny: "CiliumNetworkPolicy shop/api", "policy-enforcement=always", "reserved:init".
	EnforcedBy []string
	// Terms tell peers apart. "Any peer" is no term: a peer that matches none has the class of no terms.
	Terms []*Term
	// Rules that select the subject, in the order in which they are asked, and the implicit deciders. Decisions name them by position.
	Rules []RuleName

	entries  []entry  // in the order in which they are asked
	fallback int      // position of the implicit decider that allows what nothing decides; -1 = default deny
	ports    []string // names of
	filtered bool     // some port of an entry has rules for requests or server names
	visible  []Visibility
	identity labelset.Set // of the subject, if there are filters
}

// entry is a rule, resolved for one subject.
type entry struct {
	rule      int // position in Resolved.Rules
	tier      Tier
	action    Action
	localhost bool // the implicit exception for the local node, below all rules
	any       bool // any peer
	terms     []int
	anyPort   bool
	ports     []portRange

	source *Rule // nil for an implicit one
}

// portRange is a range of destination ports, or types, of one protocol.
type portRange struct {
	proto       uint8
	first, last uint16
	term        int // the peer must match this term too (a named port of its); -1 = none
	// name of the port, if the rule has one instead of a number.
	name string
	// l7 are the other members of the toPorts entry; nil = none.
	l7 *L7Ports
}

// elsewhere reports whether a subject belongs to another cluster of the mesh: its own cluster enforces there.
func (o Options) elsewhere(s *Subject) bool {
	const prefix = reserved.Source + ":" + reserved.ClusterKey + "="
	for _, l := range s.Labels {
		if name, ok := strings.CutPrefix(l, prefix); ok {
			return name != o.cluster()
		}
	}
	return false
}

// Resolve puts together the rules of one direction that select the subject; others in rules are passed over. The error is a conflict, and names the rules.
// A nil World has nothing in it.
func Resolve(o Options, s *Subject, d Direction, rules []*Rule, w World) (*Resolved, error) {
	r := &Resolved{Direction: d, fallback: -1}
	if o.Enforcement == ModeNever || s.Host && !o.HostFirewall || o.elsewhere(s) {
		return r, nil
	}
	selected := make([]*Rule, 0, min(len(rules), 16))
	var last *Rule // rules of one rule object come together, and share its selector
	selects := false
	for _, rule := range rules {
		if rule.Direction != d {
			continue
		}
		if last == nil || last.subject != rule.subject {
			last, selects = rule, rule.Selects(s)
		}
		if selects {
			selected = append(selected, rule)
		}
	}
	slices.SortFunc(selected, compareRules)
	r.enforcement(o, s, selected)
	r.visibility(s, selected)
	if !r.Enforced && len(r.visible) == 0 {
		return r, nil
	}
	c := &compiler{o: o, s: s, w: w, r: r, positions: map[string]int{}, split: mergedBySelector(selected)}
	baseline, _ := slices.BinarySearchFunc(selected, TierBaseline, func(rule *Rule, t Tier) int { return cmp.Compare(rule.Tier, t) })
	for _, rule := range selected[:baseline] {
		c.rule(rule)
	}
	if d == Ingress && !s.Host && !o.LocalhostNeedsRule && (r.DefaultDeny || r.filtered || len(r.visible) > 0) {
		c.implicit(ImplicitLocalhost, entry{tier: TierPolicy, localhost: true, terms: []int{c.term(hostTerm())}, anyPort: true})
	}
	for _, rule := range selected[baseline:] {
		c.rule(rule)
	}
	if !r.DefaultDeny {
		r.fallback = len(r.Rules)
		name := ImplicitDefaultAllow
		if slices.ContainsFunc(selected, func(rule *Rule) bool { return rule.Tier == TierPolicy }) {
			name = ImplicitDefaultDenyOff
		}
		r.Rules = append(r.Rules, RuleName{Implicit: name})
	}
	if err := r.conflict(); err != nil {
		return nil, err
	}
	c.sortTerms()
	slices.Sort(r.ports)
	r.ports = slices.Compact(r.ports)
	r.Key = r.hash()
	return r, nil
}

// enforcement finds out what the subject's direction is (spec 4).
func (r *Resolved) enforcement(o Options, s *Subject, selected []*Rule) {
	r.Enforced = len(selected) > 0
	for _, rule := range selected {
		if rule.DefaultDeny {
			r.EnforcedBy = append(r.EnforcedBy, rule.Ref.String())
		}
	}
	slices.Sort(r.EnforcedBy)
	r.EnforcedBy = slices.Compact(r.EnforcedBy)
	if o.Enforcement == ModeAlways {
		r.EnforcedBy = append(r.EnforcedBy, "policy-enforcement=always")
	} else if !s.Host && has(s.Labels, "reserved:init") {
		r.EnforcedBy = append(r.EnforcedBy, "reserved:init")
	}
	r.DefaultDeny = len(r.EnforcedBy) > 0
	// A host's connections are tracked from the time that the host firewall is on, so that a policy that comes later knows them.
	r.Enforced = r.Enforced || r.DefaultDeny || s.Host
}

// compiler fills a Resolved.
type compiler struct {
	o         Options
	s         *Subject
	w         World
	r         *Resolved
	positions map[string]int // of terms, by key
	split     bool           // each peer is a term of its own: rules are merged by selector
}

func (c *compiler) term(t *Term) int {
	i, ok := c.positions[t.Key]
	if !ok {
		i = len(c.r.Terms)
		c.positions[t.Key] = i
		c.r.Terms = append(c.r.Terms, t)
	}
	return i
}

func (c *compiler) implicit(name string, e entry) {
	e.rule = len(c.r.Rules)
	c.r.Rules = append(c.r.Rules, RuleName{Implicit: name})
	c.r.entries = append(c.r.entries, e)
}

func (c *compiler) rule(rule *Rule) {
	e := entry{rule: len(c.r.Rules), tier: rule.Tier, action: rule.Action, source: rule}
	c.r.Rules = append(c.r.Rules, rule.Name())
	if !rule.nothing {
		e.any = rule.peers.any || rule.peers.absent
		if !e.any || c.split {
			c.peers(&e, &rule.peers)
		}
		e.anyPort = !rule.ports.given
		for _, spec := range rule.ports.specs {
			c.ports(&e, spec)
		}
	}
	c.r.entries = append(c.r.entries, e)
}

func (c *compiler) peers(e *entry, p *peerPart) {
	add := func(t *Term) {
		all := []*Term{t}
		if c.split {
			all = t.split()
		}
		for _, t := range all {
			if i := c.term(t); !slices.Contains(e.terms, i) {
				e.terms = append(e.terms, i)
			}
		}
	}
	for _, t := range p.terms {
		add(t)
	}
	items := slices.Clone(p.cidrs)
	if c.w != nil {
		for _, g := range p.groups {
			for _, prefix := range c.w.CIDRGroups(g.name, g.selector) {
				items = append(items, cidrItem{prefix.Masked(), g.except})
			}
		}
		for _, ref := range p.services {
			for _, service := range c.w.Services(ref.namespace, ref.name, ref.selector) {
				if len(service.Selector) > 0 {
					add(c.podsOf(service))
					continue
				}
				for _, a := range service.Addresses {
					items = append(items, addressItem(a))
				}
			}
		}
	}
	if len(items) > 0 {
		add(p.cidrTerm(c.o, items))
	}
	if t := localNode(p.anyNode, c.s); t != nil {
		add(t)
	}
}

// podsOf is the term for the pods of a service: those that its selector selects in its namespace.
func (c *compiler) podsOf(s Service) *Term {
	all := []requirement{inNamespace(s.Namespace)}
	for k, v := range s.Selector {
		all = append(all, requirement{source: reserved.Source, key: k, op: opIn, values: []string{v}})
	}
	if _, ok := s.Selector[reserved.ClusterKey]; !ok && !c.o.AllClusters {
		all = append(all, inCluster(c.o.cluster()))
	}
	return endpointsTerm(newSelector(all))
}

func (c *compiler) ports(e *entry, spec portSpec) {
	protocols := slices.DeleteFunc(spec.protocols(), func(proto uint8) bool { return !spec.l7.reads(proto) })
	c.r.filtered = c.r.filtered || spec.l7.kind() != 0
	if spec.name == "" {
		for _, proto := range protocols {
			e.ports = append(e.ports, portRange{proto: proto, first: spec.first, last: spec.last, term: -1, l7: spec.l7})
		}
		return
	}
	add := func(p NamedPort, term int) {
		e.ports = append(e.ports, portRange{proto: p.Proto, first: p.Port, last: p.Port, term: term, name: spec.name, l7: spec.l7})
	}
	if c.r.Direction == Ingress {
		for _, p := range c.s.NamedPorts {
			if p.Name == spec.name && slices.Contains(protocols, p.Proto) {
				add(p, -1)
			}
		}
		return
	}
	c.r.ports = append(c.r.ports, spec.name)
	if c.w == nil {
		return
	}
	for _, p := range c.w.NamedPorts(spec.name) {
		if p.Name == spec.name && slices.Contains(protocols, p.Proto) {
			add(p, c.term(portTerm(p)))
		}
	}
}

// sortTerms puts terms into an order that depends on nothing but their keys.
func (c *compiler) sortTerms() {
	slices.SortFunc(c.r.Terms, func(a, b *Term) int { return cmp.Compare(a.Key, b.Key) })
	moved := make([]int, len(c.r.Terms))
	for i, t := range c.r.Terms {
		moved[c.positions[t.Key]] = i
	}
	for i := range c.r.entries {
		e := &c.r.entries[i]
		for j := range e.terms {
			e.terms[j] = moved[e.terms[j]]
		}
		slices.Sort(e.terms)
		for j := range e.ports {
			if e.ports[j].term >= 0 {
				e.ports[j].term = moved[e.ports[j].term]
			}
		}
		slices.SortFunc(e.ports, func(a, b portRange) int {
			return cmp.Or(cmp.Compare(a.proto, b.proto), cmp.Compare(a.first, b.first), cmp.Compare(a.last, b.last), cmp.Compare(a.term, b.term),
				cmp.Compare(a.l7.order(), b.l7.order()), cmp.Compare(a.name, b.name))
		})
		e.ports = slices.Compact(e.ports)
	}
}

// hash is over everything that decides and that decisions are told by. It is taken for every subject that a changed rule selects.
func (r *Resolved) hash() string {
	d := digest(make([]byte, 0, 4096))
	d.number(2) // of this form
	d.number(int(r.Direction))
	d.flag(r.Enforced)
	d.flag(r.DefaultDeny)
	d.texts(r.EnforcedBy)
	d.texts(r.ports)
	d.number(len(r.Terms))
	for _, t := range r.Terms {
		d.text(t.Key)
	}
	d.number(len(r.Rules))
	for i := range r.Rules {
		n := &r.Rules[i]
		for _, text := range [...]string{n.Ref.Kind, n.Ref.Namespace, n.Ref.Name, n.Ref.UID, n.List, n.Log, n.Implicit} {
			d.text(text)
		}
		d.number(n.Spec)
		d.number(n.Index)
		d.texts(n.Labels)
	}
	d.number(len(r.entries))
	for i := range r.entries {
		e := &r.entries[i]
		for _, n := range [...]int{e.rule, int(e.tier), int(e.action), len(e.terms), len(e.ports)} {
			d.number(n)
		}
		for _, f := range [...]bool{e.localhost, e.any, e.anyPort} {
			d.flag(f)
		}
		for _, t := range e.terms {
			d.number(t)
		}
		for _, p := range e.ports {
			for _, n := range [...]int{int(p.proto), int(p.first), int(p.last), p.term} {
				d.number(n)
			}
			d.text(p.name)
			d.requests(p.l7)
		}
	}
	d.texts(r.identity)
	d.number(len(r.visible))
	for _, v := range r.visible {
		d.number(int(v.order()))
		d.number(int(v.Kind))
	}
	sum := sha256.Sum256(d)
	return hex.EncodeToString(sum[:16])
}

// digest is a text that says each thing in one way: lengths go before what they count.
type digest []byte

func (d *digest) number(n int) { *d = binary.AppendVarint(*d, int64(n)) }

func (d *digest) flag(f bool) {
	if f {
		*d = append(*d, 1)
	} else {
		*d = append(*d, 0)
	}
}

func (d *digest) text(s string) {
	d.number(len(s))
	*d = append(*d, s...)
}

func (d *digest) texts(all []string) {
	d.number(len(all))
	for _, s := range all {
		d.text(s)
	}
}

// Networks returns the prefixes that addresses IN the cluster must be told apart by: a peer's Networks are those of them that its addresses lie in.
func (r *Resolved) Networks() []netip.Prefix {
	return r.prefixes(func(t *Term) bool { return t.networks || t.nodes || t.pods })
}

// Prefixes returns the prefixes (also those of `except`) that must be peers of their own, so that every peer lies within or outside of each. It may
// hold 0.0.0.0/0 and ::/0, for which the world's own peers will do.
func (r *Resolved) Prefixes() []netip.Prefix { return r.prefixes(func(*Term) bool { return true }) }

func (r *Resolved) prefixes(of func(*Term) bool) []netip.Prefix {
	var all []netip.Prefix
	for _, t := range r.Terms {
		if t.kind == termCIDR && of(t) {
			all = t.items.appendPrefixes(all)
		}
	}
	slices.SortFunc(all, comparePrefixes)
	return slices.Compact(all)
}

// NamedPorts returns the names (lower case) that egress rules use, sorted: the values that pods give them tell pods of one identity apart.
func (r *Resolved) NamedPorts() []string { return r.ports }

// Match returns the positions of the terms that a peer matches, rising. All peers with the same ones have one Class.
func (r *Resolved) Match(p *Peer) []int {
	var matched []int
	for i, t := range r.Terms {
		if t.Matches(p) {
			matched = append(matched, i)
		}
	}
	return matched
}
