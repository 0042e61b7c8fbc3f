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
			Identity: e.GetIdentity(), Workload: workload(e.GetWorkload()), HostNetwork: e.GetHostNetwork()}
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
	}
	return desired.Upsert{}, errors.New("resource of an unknown kind")
}

func serviceOf(s *policyv1.Service) (desired.Upsert, error) {
	name := s.GetNamespace() + "/" + s.GetName()
	ips, err := addresses("cluster_ips", s.GetClusterIps())
	errs := []error{err}
	svc := &desired.Service{Namespace: s.GetNamespace(), Name: s.GetName(), Type: s.GetType(), ClusterIPs: ips}
	for _, p := range s.GetPorts() {
		proto, ok := protocols[p.GetProtocol()]
		if !ok {
			errs = append(errs, fmt.Errorf("port %q: protocol %d is unknown", p.GetName(), p.GetProtocol()))
			continue
		}
		if p.GetPort() == 0 || p.GetPort() > 65535 {
			errs = append(errs, fmt.Errorf("port %q: %d is no port", p.GetName(), p.GetPort()))
			continue
		}
		port := desired.ServicePort{Name: p.GetName(), Proto: proto, Port: uint16(p.GetPort())}
		for _, b := range p.GetBackends() {
			a, err := netip.ParseAddr(b.GetAddress())
			if err != nil || b.GetPort() == 0 || b.GetPort() > 65535 {
				errs = append(errs, fmt.Errorf("port %q: backend %q port %d: not an address and a port", p.GetName(), b.GetAddress(), b.GetPort()))
				continue
			}
			port.Backends = append(port.Backends, netip.AddrPortFrom(a.Unmap(), uint16(b.GetPort())))
		}
		svc.Ports = append(svc.Ports, port)
	}
	return desired.Upsert{Key: desired.Key{Kind: desired.KindService, Name: name}, Resource: svc}, wrap("service", name, errs...)
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
