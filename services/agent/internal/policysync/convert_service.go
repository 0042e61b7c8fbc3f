// SPDX-License-Identifier: Apache-2.0

package policysync

import (
	"fmt"
	"net/netip"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

func serviceOf(s *policyv1.Service) (desired.Upsert, error) {
	name := s.GetNamespace() + "/" + s.GetName()
	var errs []error
	list := func(field string, texts []string) []netip.Addr {
		l, err := addresses(field, texts)
		errs = append(errs, err)
		return l
	}
	svc := &desired.Service{Namespace: s.GetNamespace(), Name: s.GetName(), Type: s.GetType(), AffinitySeconds: s.GetAffinitySeconds(),
		ClusterIPs: list("cluster_ips", s.GetClusterIps()), ExternalIPs: list("external_ips", s.GetExternalIps()),
		LoadBalancerIPs: list("load_balancer_ips", s.GetLoadBalancerIps()), ExternalLocal: s.GetExternalLocal(), InternalLocal: s.GetInternalLocal(),
		Maglev: s.GetAlgorithm() == policyv1.Algorithm_ALGORITHM_MAGLEV}
	ranges, err := prefixes("source_ranges", s.GetSourceRanges())
	if err != nil {
		// A range that cannot be read must not let everybody in; nobody has this address.
		errs = append(errs, err)
		ranges = append(ranges, netip.PrefixFrom(netip.IPv4Unspecified(), 32))
	}
	svc.SourceRanges = ranges
	if p := s.GetHealthCheckNodePort(); p > 65535 {
		errs = append(errs, fmt.Errorf("health_check_node_port %d is no port", p))
	} else {
		svc.HealthCheckNodePort = uint16(p)
	}
	for _, p := range s.GetPorts() {
		port, err := servicePortOf(p)
		errs = append(errs, err...)
		if port.Port != 0 {
			svc.Ports = append(svc.Ports, port)
		}
	}
	return desired.Upsert{Key: desired.Key{Kind: desired.KindService, Name: name}, Resource: svc}, wrap("service", name, errs...)
}

// servicePortOf returns port 0 for what cannot be served at all.
func servicePortOf(p *policyv1.ServicePort) (desired.ServicePort, []error) {
	proto, ok := protocols[p.GetProtocol()]
	if !ok {
		return desired.ServicePort{}, []error{fmt.Errorf("port %q: protocol %d is unknown", p.GetName(), p.GetProtocol())}
	}
	if p.GetPort() == 0 || p.GetPort() > 65535 {
		return desired.ServicePort{}, []error{fmt.Errorf("port %q: %d is no port", p.GetName(), p.GetPort())}
	}
	var errs []error
	port := desired.ServicePort{Name: p.GetName(), Proto: proto, Port: uint16(p.GetPort()), Route: p.GetRoute()}
	if n := p.GetNodePort(); n > 65535 {
		errs = append(errs, fmt.Errorf("port %q: node port %d is no port", p.GetName(), n))
	} else {
		port.NodePort = uint16(n)
	}
	for _, b := range p.GetBackends() {
		a, err := netip.ParseAddr(b.GetAddress())
		if err != nil || b.GetPort() == 0 || b.GetPort() > 65535 {
			errs = append(errs, fmt.Errorf("port %q: backend %q port %d: not an address and a port", p.GetName(), b.GetAddress(), b.GetPort()))
			continue
		}
		port.Backends = append(port.Backends, desired.Backend{Addr: netip.AddrPortFrom(a.Unmap(), uint16(b.GetPort())), Node: b.GetNode(), Terminating: b.GetTerminating()})
	}
	return port, errs
}
