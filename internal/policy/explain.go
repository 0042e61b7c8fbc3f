// SPDX-License-Identifier: Apache-2.0

package policy

// Explanation says how a decision came about.
type Explanation struct {
	Decision
	Direction   Direction
	Enforced    bool
	DefaultDeny bool
	EnforcedBy  []string
	// Steps has every rule that selects the subject, and the implicit deciders, in the order in which they are asked.
	Steps []Step
	// Nearest is the step of the allow rule that came nearest, for a default deny; -1 = none.
	Nearest int
}

// Step is a rule that was looked at.
type Step struct {
	// Rule is its position in Resolved.Rules.
	Rule        int
	Action      Action
	PeerMatches bool
	PortMatches bool
	// Decided: it is among the rules that decided.
	Decided bool
	// Reason why it did not match, or why it lost, or what it did, in words.
	Reason string
}

// Explain decides as Decide, and says for each rule whether it matches, and why not.
func (r *Resolved) Explain(p *Peer, proto uint8, port uint16) Explanation { return Explanation{} }
