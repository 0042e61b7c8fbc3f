// SPDX-License-Identifier: Apache-2.0

package desired

import (
	"net/netip"
	"slices"
	"strings"
)

// Peer is somebody whom policies tell apart and who has no cluster-wide identity.
type Peer struct {
	// Key is "cidr:<prefix>", "node:<name>", or an identity, with or without a variant, of the prefixes.
	Key string
	// Labels of its identity, sorted.
	Labels   []string
	Prefixes []netip.Prefix
}

// Selector is a set of peers, sorted.
type Selector struct {
	Key     string
	Members []string
}

// Change makes the selector with some members more and others less.
func (s *Selector) Change(joined, left []string) *Selector {
	members := slices.Clone(s.Members)
	for _, m := range left {
		if i, ok := slices.BinarySearch(members, m); ok {
			members = slices.Delete(members, i, i+1)
		}
	}
	for _, m := range joined {
		if i, ok := slices.BinarySearch(members, m); !ok {
			members = slices.Insert(members, i, strings.Clone(m))
		}
	}
	return &Selector{Key: s.Key, Members: members}
}

// Direction of a connection, seen from the subject; Hubble's numbers.
type Direction uint8

// Directions.
const (
	Ingress Direction = 1
	Egress  Direction = 2
)

// Verdict on a new connection; numbers of weir.policy.v1.Verdict.
type Verdict uint8

// Verdicts.
const (
	Allow       Verdict = 1
	DefaultDeny Verdict = 2
	Deny        Verdict = 3
)

// Policy is the resolved policy of one direction.
type Policy struct {
	Key       string
	Direction Direction
	// Selectors are keys; classes count by position.
	Selectors []string
	Classes   []PolicyClass
	Rules     []PolicyRule
}

// Whole says that classes name selectors and rules that are there.
func (p *Policy) Whole() bool {
	for _, c := range p.Classes {
		for _, s := range c.Selectors {
			if int(s) >= len(p.Selectors) {
				return false
			}
		}
		for _, r := range c.Ranges {
			for _, n := range r.Rules {
				if int(n) >= len(p.Rules) {
					return false
				}
			}
		}
	}
	return true
}

// PolicyClass decides for the peers that exactly these selectors match.
type PolicyClass struct {
	Selectors []uint32      `json:",omitempty"`
	Ranges    []PolicyRange `json:",omitempty"`
}

// PolicyRange decides for some ports. Rules are positions in Policy.Rules.
type PolicyRange struct {
	Proto       uint8
	First, Last uint16
	Verdict     Verdict
	Rules       []uint32 `json:",omitempty"`
}

// PolicyRule names a rule of a policy object.
type PolicyRule struct {
	Kind      string   `json:"kind,omitempty"`
	Namespace string   `json:"namespace,omitempty"`
	Name      string   `json:"name,omitempty"`
	UID       string   `json:"uid,omitempty"`
	Spec      uint32   `json:"spec,omitempty"`
	List      string   `json:"list,omitempty"`
	Index     uint32   `json:"index,omitempty"`
	Log       string   `json:"log,omitempty"`
	Labels    []string `json:"labels,omitempty"`
	Implicit  string   `json:"implicit,omitempty"`
}

// Subject says which policies an endpoint has; an empty key = that direction is not enforced.
type Subject struct {
	Key             string
	Ingress, Egress string
	Audit           bool
}
