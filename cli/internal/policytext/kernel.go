// SPDX-License-Identifier: Apache-2.0

package policytext

import (
	"fmt"
	"slices"
	"strings"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// HostEndpoint is the number of the node itself among its endpoints.
const HostEndpoint = 65535

// Kernel is what the maps of an end's node hold for a connection.
type Kernel struct {
	// Entry is nil when the node was not asked; Fault says why.
	Entry *agentv1.LookupPolicyResponse
	Fault string
	// Skipped says why there is nothing to ask.
	Skipped string
	// Address of the peer, and the entry that it leads to; nil = it was not looked up.
	Address   string
	AtAddress *agentv1.LookupPolicyResponse
}

// Differences says in what the kernel has something else than a side expects; empty = it agrees, or was not asked.
func (k *Kernel) Differences(side *policyv1.Side) []string {
	if k.Entry == nil {
		return nil
	}
	var out []string
	if got, want := k.Entry.GetVerdict(), side.GetVerdict(); got != want {
		out = append(out, fmt.Sprintf("its verdict is %s, and should be %s", Verdict(got), Verdict(want)))
	}
	if got, want := ruleSet(k.Entry.GetRules()), ruleSet(Decided(side)); !slices.Equal(got, want) {
		out = append(out, fmt.Sprintf("it names %s, and should name %s", ruleWords(got), ruleWords(want)))
	}
	if got, want := k.Entry.GetFilter(), side.GetFilter().GetKey(); got != want && k.Entry.GetVerdict() == side.GetVerdict() {
		out = append(out, fmt.Sprintf("what is allowed goes through %s, and should through %s", filterWords(got), filterWords(want)))
	}
	if k.AtAddress != nil && k.AtAddress.GetPeer() != k.Entry.GetPeer() {
		out = append(out, fmt.Sprintf("it takes %s for peer %d, and should for %d (%s)", k.Address, k.AtAddress.GetPeer(), k.Entry.GetPeer(), side.GetPeerKey()))
	}
	return out
}

// Passes reports whether the connection passes this side: what the kernel lets through though policy denies it (audit, a pause) passes.
func (k *Kernel) Passes(side *policyv1.Side) bool {
	return side.GetVerdict() == policyv1.Verdict_VERDICT_ALLOW || k.audit(side)
}

func (k *Kernel) audit(side *policyv1.Side) bool {
	if k.Entry != nil {
		return k.Entry.GetAudit()
	}
	return side.GetAudit()
}

// Decided returns the rules that decided a side.
func Decided(side *policyv1.Side) []*policyv1.PolicyRule {
	var out []*policyv1.PolicyRule
	for _, s := range side.GetRules() {
		if s.GetDecided() {
			out = append(out, s.GetRule())
		}
	}
	return out
}

// ruleSet names rules, sorted.
func ruleSet(list []*policyv1.PolicyRule) []string {
	var names []string
	for _, r := range list {
		names = append(names, Rule(r))
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func ruleWords(names []string) string {
	if len(names) == 0 {
		return "no rule"
	}
	return strings.Join(names, ", ")
}

func filterWords(key string) string {
	if key == "" {
		return "no filter"
	}
	return "filter " + key
}

// Through says what allowed connections pass: "slot 7 (port 20007)"; empty = nothing.
func Through(slot, port uint32, visibility bool) string {
	if slot == 0 {
		return ""
	}
	text := fmt.Sprintf("slot %d (port %d)", slot, port)
	if port == 0 {
		text = fmt.Sprintf("slot %d (no listener)", slot)
	}
	if visibility {
		text += ", to be seen"
	}
	return text
}

// words of the entry itself.
func (k *Kernel) words() string {
	e := k.Entry
	endpoint := fmt.Sprintf("endpoint %d", e.GetEndpointId())
	if e.GetEndpointId() == HostEndpoint {
		endpoint = "the node itself"
	}
	if e.GetPolicy() == 0 {
		return endpoint + " has no policy in this direction: everything passes"
	}
	row := "the row of every other peer"
	if e.GetPeerRow() {
		row = fmt.Sprintf("the row of peer %d", e.GetPeer())
	}
	text := fmt.Sprintf("%s, policy %d, %s: %s", endpoint, e.GetPolicy(), row, Verdict(e.GetVerdict()))
	if len(e.GetRules()) > 0 {
		text += " by " + strings.Join(ruleSet(e.GetRules()), ", ")
	}
	if e.GetSlot() > 0 {
		text += fmt.Sprintf(", through slot %d", e.GetSlot())
		if e.GetListenerPort() == 0 {
			text += ", which NOTHING LISTENS for"
		}
	}
	if e.GetAudit() {
		text += "; drops are let through (audit)"
	}
	return text
}
