// SPDX-License-Identifier: Apache-2.0

// Package policy is the semantics of network policy, once: it reads policy objects of all kinds, validates them, finds the rules that select an
// endpoint, and decides what a peer may do, with reasons. It is pure: no client, no I/O, no clock.
//
// The way through it: Parse makes an Object of Rules. Rules that select a Subject are resolved into a Resolved policy of one direction, whose Terms
// say how peers are told apart. All peers that the same terms match have one Class: what is decided for each protocol and port. Decide and Explain answer for
// one peer and port from the same code that makes classes.
//
// What rules say of requests above L4 comes with the ranges that they allow, as a Filter, whose Accepts functions are what proxies must do. Peers by DNS name
// are in no class: Names says what they add.
package policy

import (
	"net/netip"

	"github.com/weirmesh/weir/internal/labelset"
)

// Direction of a connection, seen from the subject; Hubble's numbers.
type Direction uint8

// Directions.
const (
	Ingress Direction = 1
	Egress  Direction = 2
)

// Ref names a policy object.
type Ref struct {
	Kind, Namespace, Name, UID string
}

// Verdict on a new connection; numbers as weir.policy.v1.Verdict.
type Verdict uint8

// Verdicts.
const (
	Allow       Verdict = 1
	DefaultDeny Verdict = 2
	Deny        Verdict = 3
)

// IP protocol numbers that policies name. AnyProtocol stands for every protocol that no other range of a class names.
const (
	AnyProtocol = 0
	ICMP        = 1
	TCP         = 6
	UDP         = 17
	ICMPv6      = 58
	SCTP        = 132
)

// Mode is the global enforcement mode (spec 4.1).
type Mode uint8

// Modes.
const (
	ModeDefault Mode = iota
	ModeAlways
	ModeNever
)

// Options are the cluster's choices that change what policies mean.
type Options struct {
	// ClusterName is the local cluster's name; "" means "default".
	ClusterName string
	// AllClusters: selectors without a cluster key reach all clusters of a mesh (default: the local one only).
	AllClusters bool
	Enforcement Mode
	// Audit: what policy would drop is let through and told (spec 4.2).
	Audit bool
	// LocalhostNeedsRule: the local node needs a rule to reach its pods (default: it may always, spec 12.3).
	LocalhostNeedsRule bool
	// HostFirewall: policies with a nodeSelector are enforced (else accepted and inert).
	HostFirewall bool
	// NodeSelectorLabels: fromNodes and toNodes may be used.
	NodeSelectorLabels bool
	// CIDRMatchesNodes and CIDRMatchesPods widen CIDR peers (policy-cidr-match-mode).
	CIDRMatchesNodes, CIDRMatchesPods bool
	// AlwaysDefaultDeny: enableDefaultDeny is ignored (enable-non-default-deny-policies=false).
	AlwaysDefaultDeny bool
	// DualStack: the world has an identity for each family (9, 10), not one (2).
	DualStack bool
}

// NamedPort is a container port with a name.
type NamedPort struct {
	Name  string // lower case
	Proto uint8
	Port  uint16
}

// Subject is an endpoint that policies may select.
type Subject struct {
	// Labels of its identity; of the node's labels for a host.
	Labels labelset.Set
	// Host: the node itself, which only node selectors select.
	Host bool
	// NamedPorts of the pod, sorted.
	NamedPorts []NamedPort
	// Node has the labels of the node that it runs on (`k8s:key=value`), for the `nodes` peers of a ClusterNetworkPolicy: they may mean the local host.
	Node labelset.Set
	// Visibility that the pod's annotation asks for.
	Visibility []Visibility
}

// Peer is the other end of a connection: everybody with the same labels, prefix and variant.
type Peer struct {
	// Key names it: "<identity>", "<identity>/<variant>", "cidr:<prefix>" or "node:<name>".
	Key string
	// Labels of its identity: `reserved:host`, `k8s:app=web`, `cidr:10.0.0.0/8`, ...
	Labels labelset.Set
	// Prefix of a peer outside of the cluster; invalid = it is in the cluster.
	Prefix netip.Prefix
	// Networks are the prefixes, of those that Resolved.Networks asked for, that its addresses lie in. Only for peers in the cluster.
	Networks []netip.Prefix
	// NamedPorts of pods, sorted.
	NamedPorts []NamedPort
	// Names that DNS gave an address outside of the cluster. For questions only: classes know peers without them, Resolved.Names is what a node needs.
	Names []string
}

// World is what rules may refer to beside labels. Implementations answer from one consistent state.
type World interface {
	// Services returns the services of a namespace ("" = all) with the name ("" = any) that the selector matches (nil = any).
	Services(namespace, name string, selector *Selector) []Service
	// CIDRGroups returns the prefixes of the groups with the name ("" = any) that the selector matches (nil = any).
	CIDRGroups(name string, selector *Selector) []netip.Prefix
	// NamedPorts returns the ports that any pod of the cluster gives this (lower case) name, each once. An egress rule with a named port has a Term for each.
	NamedPorts(name string) []NamedPort
}

// Service is a service as toServices sees it.
type Service struct {
	Namespace, Name string
	Labels          labelset.Set
	// Selector of its pods; nil = none, then Addresses are its endpoints.
	Selector  map[string]string
	Addresses []netip.Addr
}
