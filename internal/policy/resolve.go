// SPDX-License-Identifier: Apache-2.0

package policy

import "net/netip"

// Resolved is what all rules together decide for a subject in one direction. It is never changed.
type Resolved struct {
	// Key is a hash of the content: the same selectors, rules and options have the same key.
	Key       string
	Direction Direction
	// Enforced: some policy selects the subject in this direction (or the mode enforces always). Else everything passes, and the rest is empty.
	Enforced bool
	// DefaultDeny: what no rule allows is denied.
	DefaultDeny bool
	// EnforcedBy says what put the subject in default deny: "CiliumNetworkPolicy shop/api", "policy-enforcement=always", "reserved:init".
	EnforcedBy []string
	// Terms tell peers apart. "Any peer" is no term: a peer that matches none has the class of no terms.
	Terms []*Term
	// Rules that select the subject, and the implicit deciders. Decisions name them by position.
	Rules []RuleName
}

// Term is one condition on peers.
type Term struct {
	// Key is canonical: the same selector in two policies has the same key.
	Key string
}

// Matches reports whether a peer meets the condition. Safe for concurrent use.
func (t *Term) Matches(p *Peer) bool { return false }

// Range says what is decided for some ports of a protocol.
type Range struct {
	// Proto is an IP protocol number; AnyProtocol (0) = every protocol that no other range of the class names, and then all ports.
	Proto uint8
	// First and Last port; the type for ICMP and ICMPv6.
	First, Last uint16
	Verdict     Verdict
	// Rules that decided, as positions in Resolved.Rules, rising.
	Rules []int
}

// Decision is what is decided for one peer and port.
type Decision struct {
	Verdict Verdict
	// Rules that decided, as positions in Resolved.Rules, rising: all that allow, or all that deny, or the first of a tier. Empty for DefaultDeny.
	Rules []int
}

// Resolve puts together the rules of one direction that select the subject; others in rules are passed over. The error is a conflict, and names the rules.
// A nil World has nothing in it.
func Resolve(o Options, s *Subject, d Direction, rules []*Rule, w World) (*Resolved, error) {
	return nil, nil
}

// Networks returns the prefixes that addresses IN the cluster must be told apart by: a peer's Networks are those of them that its addresses lie in.
func (r *Resolved) Networks() []netip.Prefix { return nil }

// NamedPorts returns the names (lower case) that egress rules use: the values that pods give them tell pods of one identity apart.
func (r *Resolved) NamedPorts() []string { return nil }

// Prefixes returns the prefixes (also those of `except`) that must be peers of their own, so that every peer lies within or outside of each. It may
// hold 0.0.0.0/0 and ::/0, for which the world's own peers will do.
func (r *Resolved) Prefixes() []netip.Prefix { return nil }

// Match returns the positions of the terms that a peer matches, rising. All peers with the same ones have one Class.
func (r *Resolved) Match(p *Peer) []int { return nil }

// Class says what is decided for peers that exactly these terms match (rising): sorted by protocol and port, merged, without overlap. What no range
// covers is DefaultDeny by no rule.
func (r *Resolved) Class(terms []int) []Range { return nil }

// Decide says what is decided for one peer, protocol and port (the type for ICMP).
func (r *Resolved) Decide(p *Peer, proto uint8, port uint16) Decision { return Decision{} }
