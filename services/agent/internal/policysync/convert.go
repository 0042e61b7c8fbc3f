// SPDX-License-Identifier: Apache-2.0

package policysync

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// keyOf turns a key of the wire into ours.
func keyOf(k *policyv1.ResourceKey) (desired.Key, error) {
	kind, ok := kinds[k.GetKind()]
	if !ok {
		return desired.Key{}, fmt.Errorf("resource kind %d is unknown", k.GetKind())
	}
	return desired.Key{Kind: kind, Name: k.GetKey()}, nil
}

var kinds = map[policyv1.ResourceKind]desired.Kind{
	policyv1.ResourceKind_RESOURCE_KIND_NODE:      desired.KindNode,
	policyv1.ResourceKind_RESOURCE_KIND_ENDPOINT:  desired.KindEndpoint,
	policyv1.ResourceKind_RESOURCE_KIND_SERVICE:   desired.KindService,
	policyv1.ResourceKind_RESOURCE_KIND_NAMESPACE: desired.KindNamespace,
	policyv1.ResourceKind_RESOURCE_KIND_IDENTITY:  desired.KindIdentity,
	policyv1.ResourceKind_RESOURCE_KIND_POD:       desired.KindPod,
	policyv1.ResourceKind_RESOURCE_KIND_PEER:      desired.KindPeer,
	policyv1.ResourceKind_RESOURCE_KIND_SELECTOR:  desired.KindSelector,
	policyv1.ResourceKind_RESOURCE_KIND_POLICY:    desired.KindPolicy,
	policyv1.ResourceKind_RESOURCE_KIND_SUBJECT:   desired.KindSubject,
}

// wireKind is a kind on the wire.
func wireKind(k desired.Kind) policyv1.ResourceKind {
	for wire, kind := range kinds {
		if kind == k {
			return wire
		}
	}
	return policyv1.ResourceKind_RESOURCE_KIND_UNSPECIFIED
}

// upsertOf turns a resource of the wire into ours. What cannot be read is an error that names the resource and the field.
func upsertOf(r *policyv1.Resource) (desired.Upsert, error) {
	switch x := r.GetResource().(type) {
	case *policyv1.Resource_Node:
		n := x.Node
		u := desired.Upsert{Key: desired.Key{Kind: desired.KindNode, Name: n.GetName()}}
		own, err1 := addresses("addresses", n.GetAddresses())
		health, err2 := addresses("health_addresses", n.GetHealthAddresses())
		cidrs, err3 := prefixes("pod_cidrs", n.GetPodCidrs())
		u.Resource = &desired.Node{Name: n.GetName(), Addresses: own, PodCIDRs: cidrs, Labels: n.GetLabels(), Health: health}
		return u, wrap("node", n.GetName(), err1, err2, err3)
	case *policyv1.Resource_Endpoint:
		e := x.Endpoint
		u := desired.Upsert{Key: desired.Key{Kind: desired.KindEndpoint, Name: e.GetUid()}}
		list, err := addresses("addresses", e.GetAddresses())
		u.Resource = &desired.Endpoint{UID: e.GetUid(), Node: e.GetNode(), Namespace: e.GetNamespace(), Name: e.GetName(), Addresses: list,
			Identity: e.GetIdentity(), Workload: workload(e.GetWorkload()), HostNetwork: e.GetHostNetwork(), Variants: e.GetVariants()}
		if n := len(e.GetVariants()); err == nil && n != 0 && n != len(list) {
			err = fmt.Errorf("variants: %d for %d addresses", n, len(list))
		}
		return u, wrap("endpoint", e.GetNamespace()+"/"+e.GetName(), err)
	case *policyv1.Resource_Service:
		return serviceOf(x.Service)
	case *policyv1.Resource_Namespace:
		n := x.Namespace
		return desired.Upsert{Key: desired.Key{Kind: desired.KindNamespace, Name: n.GetName()},
			Resource: &desired.Namespace{Name: n.GetName(), Labels: n.GetLabels()}}, nil
	case *policyv1.Resource_Identity:
		i := x.Identity
		labels := slices.Sorted(slices.Values(i.GetLabels()))
		return desired.Upsert{Key: desired.Key{Kind: desired.KindIdentity, Name: strconv.FormatUint(uint64(i.GetNumber()), 10)},
			Resource: &desired.Identity{Number: i.GetNumber(), Labels: labels}}, nil
	case *policyv1.Resource_Pod:
		p := x.Pod
		list, err := addresses("addresses", p.GetAddresses())
		return desired.Upsert{Key: desired.Key{Kind: desired.KindPod, Name: p.GetUid()},
			Resource: &desired.Pod{UID: p.GetUid(), Namespace: p.GetNamespace(), Name: p.GetName(), Identity: p.GetIdentity(),
				Workload: workload(p.GetWorkload()), Addresses: list, NamedPorts: p.GetNamedPorts(), Unmanaged: p.GetUnmanaged()},
		}, wrap("pod", p.GetNamespace()+"/"+p.GetName(), err)
	case *policyv1.Resource_Peer:
		p := x.Peer
		list, err := prefixes("prefixes", p.GetPrefixes())
		return desired.Upsert{Key: desired.Key{Kind: desired.KindPeer, Name: p.GetKey()},
			Resource: &desired.Peer{Key: p.GetKey(), Labels: slices.Sorted(slices.Values(p.GetLabels())), Prefixes: list}}, wrap("peer", p.GetKey(), err)
	case *policyv1.Resource_Selector:
		s := x.Selector
		return desired.Upsert{Key: desired.Key{Kind: desired.KindSelector, Name: s.GetKey()},
			Resource: &desired.Selector{Key: s.GetKey(), Members: slices.Compact(slices.Sorted(slices.Values(s.GetMembers())))}}, nil
	case *policyv1.Resource_Policy:
		return policyOf(x.Policy)
	case *policyv1.Resource_Subject:
		s := x.Subject
		return desired.Upsert{Key: desired.Key{Kind: desired.KindSubject, Name: s.GetKey()},
			Resource: &desired.Subject{Key: s.GetKey(), Ingress: s.GetIngress(), Egress: s.GetEgress(), Audit: s.GetAudit()}}, nil
	}
	return desired.Upsert{}, errors.New("resource of an unknown kind")
}

var protocols = map[policyv1.Protocol]uint8{
	policyv1.Protocol_PROTOCOL_TCP:  6,
	policyv1.Protocol_PROTOCOL_UDP:  17,
	policyv1.Protocol_PROTOCOL_SCTP: 132,
}

func workload(w *policyv1.Workload) desired.Workload {
	return desired.Workload{Kind: w.GetKind(), Name: w.GetName()}
}

func wrap(kind, name string, errs ...error) error {
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%s %s: %w", kind, name, err)
	}
	return nil
}

// addresses skips what it cannot read and names it in the error.
func addresses(field string, texts []string) ([]netip.Addr, error) {
	var list []netip.Addr
	var errs []error
	for _, t := range texts {
		a, err := netip.ParseAddr(t)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", field, err))
			continue
		}
		list = append(list, a.Unmap())
	}
	return list, errors.Join(errs...)
}

func prefixes(field string, texts []string) ([]netip.Prefix, error) {
	var list []netip.Prefix
	var errs []error
	for _, t := range texts {
		p, err := netip.ParsePrefix(t)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", field, err))
			continue
		}
		list = append(list, p.Masked())
	}
	return list, errors.Join(errs...)
}
