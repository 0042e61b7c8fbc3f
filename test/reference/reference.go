// SPDX-License-Identifier: Apache-2.0

// Package reference is the second opinion on network policy: plain loops over the objects as users write them, for one packet at a time. It is a
// direct reading of the semantics page (its sections are named as "spec N" in comments) and shares nothing with the compiler. It is slow, and it
// assumes that objects are valid: what it cannot read is a panic, which its callers turn into a fault.
package reference

import (
	"fmt"
	"net/netip"
	"strings"
)

// Verdict of one side of a packet.
type Verdict int

// Verdicts; numbers as Weir's own.
const (
	Allow       Verdict = 1
	DefaultDeny Verdict = 2
	Deny        Verdict = 3
)

func (v Verdict) String() string {
	switch v {
	case Allow:
		return "allow"
	case DefaultDeny:
		return "default deny"
	case Deny:
		return "deny"
	}
	return fmt.Sprintf("verdict %d", int(v))
}

// Side of a connection.
type Side string

// Sides, named as the lists of policies are.
const (
	Ingress Side = "ingress"
	Egress  Side = "egress"
)

// Packet is the first of a new connection.
type Packet struct {
	// From and To are ends as in case files: "namespace/pod", "ip:ADDRESS", "node:NAME", "entity:NAME".
	From, To string
	// V6 chooses the family, where an end has both.
	V6 bool
	// Protocol is TCP, UDP, SCTP, ICMP or ICMPv6.
	Protocol string
	// Port is the destination port, after service translation; the type for ICMP.
	Port int
	// Code of an ICMP message.
	Code int
}

func (p Packet) String() string {
	family := "IPv4"
	if p.V6 {
		family = "IPv6"
	}
	return fmt.Sprintf("%s -> %s %d/%s %s", p.From, p.To, p.Port, p.Protocol, family)
}

// Decide returns what both sides say. The packet passes if both are Allow (spec 1, rule 1).
func (c *Cluster) Decide(p Packet) (egress, ingress Verdict) {
	from, to := c.end(p.From, p.V6), c.end(p.To, p.V6)
	if from.same(to) {
		return Allow, Allow // spec 12.2
	}
	if p.ProtocolNumber() == 1 && p.Port == 3 && p.Code == 4 || p.ProtocolNumber() == 58 && p.Port == 2 {
		return Allow, Allow // fragmentation needed (spec 9.6), and its like of IPv6
	}
	return c.decide(Egress, from, to, p), c.decide(Ingress, to, from, p)
}

// decide answers for one side: policies of subject, about peer.
func (c *Cluster) decide(side Side, subject, peer end, p Packet) Verdict {
	if !c.isSubject(subject) || c.Config.PolicyEnforcement == "never" {
		return Allow
	}
	// spec 17: the Admin tier comes first and ends the matter, unless it passes.
	if v := c.tier("Admin", side, subject, peer, p); v != 0 {
		return v
	}
	pot := c.pot(side, subject, peer, p)
	enforced := pot.enforced || c.Config.PolicyEnforcement == "always" || subject.entity == "init"
	switch {
	case pot.denied: // spec 1, rule 6
		return Deny
	case pot.allowed:
		return Allow
	case enforced && c.localhost(side, subject, peer):
		return Allow
	case enforced:
		return DefaultDeny
	}
	// Rules with the switch off alone allow everything at the lowest rank, beneath this tier (spec 4, 18).
	if v := c.tier("Baseline", side, subject, peer, p); v != 0 {
		return v
	}
	return Allow
}

// localhost: the local node may always reach its pods (spec 12.3).
func (c *Cluster) localhost(side Side, subject, peer end) bool {
	return side == Ingress && c.Config.AllowLocalhost != "policy" && subject.kind != nodeEnd && peer.kind == nodeEnd && peer.node == subject.node
}

// isSubject: who has policies at all.
func (c *Cluster) isSubject(e end) bool {
	switch e.kind {
	case podEnd:
		return e.pod.clusterName(c) == c.clusterName()
	case nodeEnd:
		return c.Config.HostFirewall // spec 6.3
	case entityEnd:
		return e.entity != "unmanaged"
	}
	return false // a node-external end has no policy
}

// pot is what all rules of NetworkPolicies and Cilium policies say together (spec 1, rule 4).
type pot struct{ enforced, denied, allowed bool }

func (c *Cluster) pot(side Side, subject, peer end, p Packet) pot {
	var out pot
	for _, o := range c.Policies {
		switch text(o["kind"]) {
		case "NetworkPolicy":
			c.networkPolicy(o, side, subject, peer, p, &out)
		case "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy":
			for _, spec := range specsOf(o) {
				c.ciliumRule(o, spec, side, subject, peer, p, &out)
			}
		}
	}
	return out
}

// protocolNumber of a packet; names as in policies and case files.
var protocolNumbers = map[string]int{"ICMP": 1, "TCP": 6, "UDP": 17, "ICMPV6": 58, "SCTP": 132}

// ProtocolNumber returns the IP protocol number of a packet.
func (p Packet) ProtocolNumber() uint8 { return uint8(protocolNumbers[strings.ToUpper(p.Protocol)]) }

// inPrefix: containment, one family only.
func inPrefix(prefix string, a netip.Addr) bool {
	if !a.IsValid() {
		return false
	}
	if !strings.Contains(prefix, "/") { // a bare address (spec 7.1)
		return netip.MustParseAddr(prefix) == a
	}
	return netip.MustParsePrefix(prefix).Masked().Contains(a)
}
