// SPDX-License-Identifier: Apache-2.0

package server

import (
	"fmt"
	"net/netip"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/policy/internal/object"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// updateProto makes the message of a change for a node.
func updateProto(revision uint64, c state.Change, node string) *policyv1.Update {
	u := &policyv1.Update{Revision: revision}
	for _, r := range c.Upserts {
		u.Upserts = append(u.Upserts, resourceProto(r, node))
	}
	for _, s := range c.Selectors {
		u.SelectorChanges = append(u.SelectorChanges, &policyv1.SelectorChange{Key: s.Key, Joined: s.Joined, Left: s.Left})
	}
	for _, r := range c.Removals {
		u.Removals = append(u.Removals, &policyv1.ResourceKey{Kind: kindProto(r.Key.Kind), Key: r.Key.WireName()})
	}
	return u
}

func kindProto(kind state.Kind) policyv1.ResourceKind {
	switch kind {
	case state.KindNode:
		return policyv1.ResourceKind_RESOURCE_KIND_NODE
	case state.KindNamespace:
		return policyv1.ResourceKind_RESOURCE_KIND_NAMESPACE
	case state.KindIdentity:
		return policyv1.ResourceKind_RESOURCE_KIND_IDENTITY
	case state.KindService:
		return policyv1.ResourceKind_RESOURCE_KIND_SERVICE
	case state.KindPod:
		return policyv1.ResourceKind_RESOURCE_KIND_POD
	case state.KindEndpoint:
		return policyv1.ResourceKind_RESOURCE_KIND_ENDPOINT
	case state.KindPeer:
		return policyv1.ResourceKind_RESOURCE_KIND_PEER
	case state.KindSelector:
		return policyv1.ResourceKind_RESOURCE_KIND_SELECTOR
	case state.KindPolicy:
		return policyv1.ResourceKind_RESOURCE_KIND_POLICY
	case state.KindSubject:
		return policyv1.ResourceKind_RESOURCE_KIND_SUBJECT
	}
	return policyv1.ResourceKind_RESOURCE_KIND_UNSPECIFIED
}

// kindOf turns kindProto around; what it does not know is KindPolicy's trouble.
func kindOf(kind policyv1.ResourceKind) state.Kind {
	for k := state.KindNamespace; k <= state.KindPod; k++ {
		if kindProto(k) == kind {
			return k
		}
	}
	return state.KindPolicy
}

func resourceProto(resource state.Resource, node string) *policyv1.Resource {
	switch r := resource.(type) {
	case state.Node:
		return &policyv1.Resource{Resource: &policyv1.Resource_Node{Node: &policyv1.Node{
			Name: r.Name, Addresses: texts(r.Addresses), PodCidrs: texts(r.PodCIDRs), Labels: r.Labels,
			HealthAddresses: texts(r.HealthAddresses),
		}}}
	case state.Namespace:
		return &policyv1.Resource{Resource: &policyv1.Resource_Namespace{Namespace: &policyv1.Namespace{
			Name: r.Name, Labels: r.Labels,
		}}}
	case state.Identity:
		return &policyv1.Resource{Resource: &policyv1.Resource_Identity{Identity: &policyv1.Identity{
			Number: r.Number, Labels: r.Labels,
		}}}
	case state.Service:
		return &policyv1.Resource{Resource: &policyv1.Resource_Service{Service: serviceProto(r)}}
	case state.Pod:
		return &policyv1.Resource{Resource: &policyv1.Resource_Pod{Pod: &policyv1.Pod{
			Uid: r.UID, Namespace: r.Namespace, Name: r.Name, Identity: r.Identity, Workload: workloadProto(r.Workload),
			Addresses: texts(r.Addresses), NamedPorts: portsProto(r.NamedPorts), Unmanaged: r.Unmanaged,
		}}}
	case state.Endpoint:
		return &policyv1.Resource{Resource: &policyv1.Resource_Endpoint{Endpoint: &policyv1.Endpoint{
			Uid: r.UID, Node: r.Node, Namespace: r.Namespace, Name: r.Name, Addresses: texts(r.Addresses),
			Identity: r.Identity, Workload: workloadProto(r.Workload), HostNetwork: r.HostNetwork,
			NamedPorts: portsProto(r.NamedPorts), Variants: r.Variants,
		}}}
	case state.Selector:
		return &policyv1.Resource{Resource: &policyv1.Resource_Selector{Selector: &policyv1.Selector{Key: r.Selector.Key, Members: r.Members()}}}
	case state.Policy:
		return &policyv1.Resource{Resource: &policyv1.Resource_Policy{Policy: PolicyProto(r.Policy)}}
	case state.Peer:
		return &policyv1.Resource{Resource: &policyv1.Resource_Peer{Peer: &policyv1.Peer{
			Key: r.Name, Labels: r.Labels, Prefixes: texts(r.On(node)),
		}}}
	case state.Subject:
		return &policyv1.Resource{Resource: &policyv1.Resource_Subject{Subject: &policyv1.Subject{
			Key: r.Name, Ingress: r.Ingress, Egress: r.Egress, Audit: r.Audit,
		}}}
	}
	panic(fmt.Sprintf("resource of type %T has no message", resource))
}

func serviceProto(r state.Service) *policyv1.Service {
	s := &policyv1.Service{
		Namespace: r.Namespace, Name: r.Name, ClusterIps: texts(r.ClusterIPs), Type: r.Type, ExternalIps: texts(r.ExternalIPs),
		LoadBalancerIps: texts(r.LoadBalancerIPs), SourceRanges: texts(r.SourceRanges), AffinitySeconds: r.Affinity, ExternalLocal: r.ExternalLocal,
		InternalLocal: r.InternalLocal, HealthCheckNodePort: uint32(r.HealthCheckNodePort), Algorithm: algorithmProto(r.Algorithm),
	}
	for _, p := range r.Ports {
		port := &policyv1.ServicePort{Name: p.Name, Protocol: protocolProto(p.Protocol), Port: uint32(p.Port), NodePort: uint32(p.NodePort), Route: p.Route}
		for _, b := range p.Backends {
			port.Backends = append(port.Backends, &policyv1.Backend{
				Address: b.Address.String(), Port: uint32(b.Port), Node: b.Node, Terminating: b.Terminating,
			})
		}
		s.Ports = append(s.Ports, port)
	}
	return s
}

func algorithmProto(a object.Algorithm) policyv1.Algorithm {
	switch a {
	case object.Random:
		return policyv1.Algorithm_ALGORITHM_RANDOM
	case object.Maglev:
		return policyv1.Algorithm_ALGORITHM_MAGLEV
	}
	return policyv1.Algorithm_ALGORITHM_UNSPECIFIED
}

func protocolProto(p object.Protocol) policyv1.Protocol {
	switch p {
	case object.TCP:
		return policyv1.Protocol_PROTOCOL_TCP
	case object.UDP:
		return policyv1.Protocol_PROTOCOL_UDP
	case object.SCTP:
		return policyv1.Protocol_PROTOCOL_SCTP
	}
	return policyv1.Protocol_PROTOCOL_UNSPECIFIED
}

func workloadProto(w object.Workload) *policyv1.Workload {
	if w == (object.Workload{}) {
		return nil
	}
	return &policyv1.Workload{Kind: w.Kind, Name: w.Name}
}

func portsProto(ports map[string]uint16) map[string]uint32 {
	if len(ports) == 0 {
		return nil
	}
	all := make(map[string]uint32, len(ports))
	for name, port := range ports {
		all[name] = uint32(port)
	}
	return all
}

func texts[T fmt.Stringer](all []T) []string {
	var out []string
	for _, t := range all {
		out = append(out, t.String())
	}
	return out
}

// maxAddresses bounds what one registration may name.
const maxAddresses = 16

// addressesOf reads the addresses of a registration.
func addressesOf(e *policyv1.Endpoint) ([]netip.Addr, error) {
	if len(e.GetAddresses()) > maxAddresses {
		return nil, fmt.Errorf("%d addresses, more than %d", len(e.GetAddresses()), maxAddresses)
	}
	var all []netip.Addr
	for _, text := range e.GetAddresses() {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return nil, fmt.Errorf("%.60q is not an address", text)
		}
		all = append(all, addr.Unmap())
	}
	return all, nil
}
