// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/internal/labelset"
)

// Object is one valid policy object.
type Object struct {
	Ref        Ref
	Generation int64
	// Rules of all directions and rule objects, in the order of the text.
	Rules []*Rule
	// CIDRGroup of an object of kind CiliumCIDRGroup; it has no rules.
	CIDRGroup *CIDRGroup
	// Warnings: what the object says and does not get, in words ("spec.ingress[0].fromGroups: ... it matches nothing").
	Warnings []string
}

// LabelKeys returns the label keys (without source) that its selectors name, sorted: the identity label filter must keep them.
func (o *Object) LabelKeys() []string {
	var keys []string
	for _, r := range o.Rules {
		keys = r.subject.appendKeys(keys)
		for _, t := range r.peers.terms {
			for _, s := range t.selectors {
				keys = s.appendKeys(keys)
			}
		}
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}

// UsesServices reports whether it has toServices peers: then the label keys of services' pod selectors count as named too.
func (o *Object) UsesServices() bool {
	return slices.ContainsFunc(o.Rules, func(r *Rule) bool { return len(r.peers.services) > 0 })
}

// CIDRGroup is a named list of prefixes.
type CIDRGroup struct {
	Name string
	// Labels of the object, with source `cidrgroup`.
	Labels   labelset.Set
	Prefixes []netip.Prefix
}

// Tier says when a rule is asked (spec 17).
type Tier uint8

// Tiers in the order in which they are asked.
const (
	TierAdmin Tier = iota
	TierPolicy
	TierBaseline
)

// Action is what a rule does with what it matches.
type Action uint8

// Actions. Pass exists in the tiers Admin and Baseline only.
const (
	ActionAllow Action = iota
	ActionDeny
	ActionPass
)

// Rule is one entry of a direction list. An object that switches a direction on without entries (KNP `ingress: []`) has a rule that allows nothing.
// It is never changed, and safe for concurrent use.
type Rule struct {
	Ref Ref
	// Spec is the position of the rule object: 0 = spec, or specs[i] (after spec, if both are there).
	Spec int
	// List is ingress, ingressDeny, egress or egressDeny; Index the position in it.
	List  string
	Index int

	Direction Direction
	Tier      Tier
	// Priority within the tiers Admin and Baseline: lower first.
	Priority int
	Action   Action
	// Deny is Action == ActionDeny.
	Deny bool
	// DefaultDeny: it puts its subjects in default deny for its direction.
	DefaultDeny bool
	// Log is carried into flow logs.
	Log string
	// Labels that flows show of the policy, as `source:key=value`.
	Labels []string

	// Authentication mode; "" = not said.
	Authentication string
	// FQDNs of toFQDNs.
	FQDNs []NameSelector
	// L7 members of the toPorts entries that have some.
	L7 []*L7Ports

	subject  *Selector
	host     bool // subjects are nodes
	peers    peerPart
	ports    portPart
	nothing  bool   // it matches nothing
	path     string // of the entry
	fqdnPath string
}

// peerPart is what a rule says about peers. Neither any nor absent: the union of the rest, which may be nobody.
type peerPart struct {
	absent bool
	any    bool
	terms  []*Term
	// cidrs are known from the text; with groups or services (known from the World) they are put together when a subject is resolved.
	cidrs    []cidrItem
	groups   []groupRef
	services []serviceRef
	// anyNode are node selectors that also mean the subject's own node.
	anyNode []*Selector
	// networks: CIDRs also match in the cluster.
	networks bool
}

// groupRef is a reference to CIDR groups.
type groupRef struct {
	name     string
	selector *Selector
	except   []netip.Prefix
}

// serviceRef is a reference to services.
type serviceRef struct {
	namespace, name string
	selector        *Selector
}

// finish makes the term of prefixes that need no World.
func (p *peerPart) finish(o Options) {
	if len(p.cidrs) > 0 && len(p.groups) == 0 {
		p.terms = append(p.terms, p.cidrTerm(o, p.cidrs))
		p.cidrs = nil
	}
}

func (p *peerPart) cidrTerm(o Options, items []cidrItem) *Term {
	if p.networks {
		return networksTerm(items)
	}
	return cidrTerm(o, items)
}

// Selects reports whether the rule applies to a subject.
func (r *Rule) Selects(s *Subject) bool { return r.host == s.Host && r.subject.Matches(s.Labels) }

// Name names the rule.
func (r *Rule) Name() RuleName {
	return RuleName{Ref: r.Ref, Spec: r.Spec, List: r.List, Index: r.Index, Log: r.Log, Labels: r.Labels}
}

// compareRules is the order in which rules are asked, and a fixed one among equals.
func compareRules(a, b *Rule) int {
	if c := cmp.Compare(a.Tier, b.Tier); c != 0 {
		return c
	}
	return cmp.Or(cmp.Compare(a.Priority, b.Priority), compareRefs(a.Ref, b.Ref), cmp.Compare(a.Spec, b.Spec),
		cmp.Compare(a.List, b.List), cmp.Compare(a.Index, b.Index))
}

func compareRefs(a, b Ref) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
}

// String is such as `CiliumNetworkPolicy shop/api`.
func (r Ref) String() string {
	if r.Namespace == "" {
		return r.Kind + " " + r.Name
	}
	return r.Kind + " " + r.Namespace + "/" + r.Name
}

// RuleName names a rule to people and in flows. Exactly one of Ref.Name and Implicit is set.
type RuleName struct {
	Ref    Ref
	Spec   int
	List   string
	Index  int
	Log    string
	Labels []string
	// Implicit decider, which no user wrote: one of the Implicit constants.
	Implicit string
}

// Deciders that are not rules of objects.
const (
	// ImplicitLocalhost: the local node may always reach its pods (spec 12.3).
	ImplicitLocalhost = "allow-localhost"
	// ImplicitDefaultDenyOff: only rules with the default deny switch off select the endpoint (spec 4).
	ImplicitDefaultDenyOff = "default-deny-off"
	// ImplicitDefaultAllow: no policy that isolates selects the endpoint, and no rule of a ClusterNetworkPolicy decided (spec 17).
	ImplicitDefaultAllow = "default-allow"
)

// String is such as `CiliumNetworkPolicy shop/api ingress[0]`; rule objects after the first have their position before the list.
func (n RuleName) String() string {
	if n.Implicit != "" {
		return n.Implicit
	}
	list := n.List
	if n.Spec > 0 {
		list = fmt.Sprintf("rule %d %s", n.Spec, list)
	}
	return fmt.Sprintf("%s %s[%d]", n.Ref, list, n.Index)
}
