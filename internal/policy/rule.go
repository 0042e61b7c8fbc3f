// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"net/netip"

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
	// Warnings: what the object says and does not get, in words ("fromGroups: no provider, matches nothing").
	Warnings []string
}

// LabelKeys returns the label keys (without source) that its selectors name, sorted: the identity label filter must keep them.
func (o *Object) LabelKeys() []string { return nil }

// UsesServices reports whether it has toServices peers: then the label keys of services' pod selectors count as named too.
func (o *Object) UsesServices() bool { return false }

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
}

// Selects reports whether the rule applies to a subject.
func (r *Rule) Selects(s *Subject) bool { return false }

// Name names the rule.
func (r *Rule) Name() RuleName {
	return RuleName{Ref: r.Ref, Spec: r.Spec, List: r.List, Index: r.Index, Log: r.Log, Labels: r.Labels}
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

// String is such as `CiliumNetworkPolicy shop/api ingress[0]`.
func (n RuleName) String() string { return fmt.Sprint(n.Ref, n.List, n.Index) }
