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
	// Names are peers by DNS name; they are no part of classes.
	Names []PolicyName `json:",omitempty"`
	// Filters are those that ranges name.
	Filters []Filter `json:",omitempty"`
}

// Filter returns the filter of a key, or nil.
func (p *Policy) Filter(key string) *Filter {
	for i := range p.Filters {
		if p.Filters[i].Key == key {
			return &p.Filters[i]
		}
	}
	return nil
}

// Whole says that classes and names refer to selectors, rules and filters that are there.
func (p *Policy) Whole() bool {
	for _, c := range p.Classes {
		for _, s := range c.Selectors {
			if int(s) >= len(p.Selectors) {
				return false
			}
		}
		if !p.wholeRanges(c.Ranges) {
			return false
		}
	}
	for _, n := range p.Names {
		if !p.wholeRanges(n.Ranges) {
			return false
		}
	}
	return true
}

func (p *Policy) wholeRanges(list []PolicyRange) bool {
	for _, r := range list {
		if r.Filter != "" && p.Filter(r.Filter) == nil {
			return false
		}
		for _, n := range r.Rules {
			if int(n) >= len(p.Rules) {
				return false
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
	// Filter is the key of what allowed connections pass through; empty = nothing.
	Filter string `json:",omitempty"`
}

// PolicyName is what a policy allows to addresses that DNS gave a name that matches. Exactly one of the first two is set.
type PolicyName struct {
	MatchName    string        `json:",omitempty"`
	MatchPattern string        `json:",omitempty"`
	Ranges       []PolicyRange `json:",omitempty"`
}

// FilterKind is who reads a filtered connection; numbers of weir.policy.v1.FilterKind.
type FilterKind uint8

// Kinds of filters.
const (
	FilterHTTP  FilterKind = 1
	FilterTLS   FilterKind = 2
	FilterDNS   FilterKind = 3
	FilterRoute FilterKind = 4
)

// Filter is what allowed connections pass through. What it asks of requests is the proxy's affair, except for DNS.
type Filter struct {
	Key  string
	Kind FilterKind
	// Visibility: only to be seen.
	Visibility bool      `json:",omitempty"`
	DNS        []DNSRule `json:",omitempty"`
}

// DNSRule allows names. Both empty = every name.
type DNSRule struct {
	Rule         PolicyRule
	MatchName    string `json:",omitempty"`
	MatchPattern string `json:",omitempty"`
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
