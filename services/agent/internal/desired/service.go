// SPDX-License-Identifier: Apache-2.0

package desired

import "net/netip"

// Service is a Kubernetes service.
type Service struct {
	Namespace, Name, Type string
	ClusterIPs            []netip.Addr
	// ExternalIPs and LoadBalancerIPs are further addresses at which the ports are served.
	ExternalIPs     []netip.Addr `json:",omitempty"`
	LoadBalancerIPs []netip.Addr `json:",omitempty"`
	// SourceRanges are the clients that may use LoadBalancerIPs; empty = all.
	SourceRanges []netip.Prefix `json:",omitempty"`
	// AffinitySeconds: a client keeps its backend for so long; 0 = it does not.
	AffinitySeconds uint32 `json:",omitempty"`
	// ExternalLocal and InternalLocal keep traffic on the node that it came to, or came from.
	ExternalLocal, InternalLocal bool `json:",omitempty"`
	// HealthCheckNodePort of the node says whether it has backends; 0 = none.
	HealthCheckNodePort uint16 `json:",omitempty"`
	// Maglev chooses backends by a table over the connection; else they are chosen at random.
	Maglev bool `json:",omitempty"`
	Ports  []ServicePort
}

// ServicePort is one port of a service. Proto is the IP protocol number.
type ServicePort struct {
	Name  string
	Proto uint8
	Port  uint16
	// NodePort is the port on every node; 0 = none.
	NodePort uint16 `json:",omitempty"`
	Backends []Backend
	// Route is the key of the filter that pods' connections to the cluster IPs pass first; empty = none.
	Route string `json:",omitempty"`
}

// Backend is one address that serves a port.
type Backend struct {
	Addr netip.AddrPort
	Node string `json:",omitempty"`
	// Terminating backends keep what they have, and get more only when nobody else is there.
	Terminating bool `json:",omitempty"`
}
