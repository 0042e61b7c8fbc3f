// SPDX-License-Identifier: Apache-2.0

package object

import (
	"errors"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/weirmesh/weir/services/policy/internal/label"
)

// defaultAffinity is Kubernetes' own: three hours.
const defaultAffinity = 10800

// maxAffinity is a day.
const maxAffinity = 86400

// FromService checks a service.
func FromService(s *corev1.Service) (*Service, error) {
	service := &Service{
		Namespace: s.Namespace, Name: s.Name, Type: string(s.Spec.Type), Labels: s.Labels,
		ExternalLocal:   s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal,
		InternalLocal:   s.Spec.InternalTrafficPolicy != nil && *s.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal,
		PublishNotReady: s.Spec.PublishNotReadyAddresses,
	}
	errs := []error{label.Check(s.Labels), label.Check(s.Spec.Selector)}
	if service.Type == "" {
		service.Type = string(corev1.ServiceTypeClusterIP)
	}
	if len(s.Spec.Selector) > 0 {
		service.Selector = s.Spec.Selector
	}
	ips := s.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{s.Spec.ClusterIP}
	}
	for i, ip := range ips {
		if ip == "" || ip == corev1.ClusterIPNone {
			continue
		}
		addr, err := parseAddr(fmt.Sprintf("spec.clusterIPs[%d]", i), ip)
		errs = append(errs, err)
		service.ClusterIPs = append(service.ClusterIPs, addr)
	}
	errs = append(errs, service.addAddresses(s), service.addChoice(s))
	for i, p := range s.Spec.Ports {
		field := fmt.Sprintf("spec.ports[%d]", i)
		port := ServicePort{Name: p.Name}
		var err, protocolErr, nodeErr error
		port.Port, err = parsePort(field, p.Port)
		port.Protocol, protocolErr = parseProtocol(field, p.Protocol)
		if p.NodePort != 0 && (s.Spec.Type == corev1.ServiceTypeNodePort || s.Spec.Type == corev1.ServiceTypeLoadBalancer) {
			port.NodePort, nodeErr = parsePort(field+".nodePort", p.NodePort)
		}
		errs = append(errs, err, protocolErr, nodeErr)
		service.Ports = append(service.Ports, port)
	}
	return service, errors.Join(errs...)
}

// addAddresses reads what a service is served at beside its cluster IPs.
func (service *Service) addAddresses(s *corev1.Service) error {
	var errs []error
	for i, ip := range s.Spec.ExternalIPs {
		addr, err := parseAddr(fmt.Sprintf("spec.externalIPs[%d]", i), ip)
		errs = append(errs, err)
		service.ExternalIPs = append(service.ExternalIPs, addr)
	}
	if s.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return errors.Join(errs...)
	}
	for i, ingress := range s.Status.LoadBalancer.Ingress {
		if ingress.IP == "" || ingress.IPMode != nil && *ingress.IPMode == corev1.LoadBalancerIPModeProxy {
			continue // a load balancer of its own, which sends to the node ports
		}
		addr, err := parseAddr(fmt.Sprintf("status.loadBalancer.ingress[%d].ip", i), ingress.IP)
		errs = append(errs, err)
		service.LoadBalancerIPs = append(service.LoadBalancerIPs, addr)
	}
	if ip := s.Spec.LoadBalancerIP; ip != "" && len(s.Status.LoadBalancer.Ingress) == 0 { //nolint:staticcheck // deprecated and in use
		addr, err := parseAddr("spec.loadBalancerIP", ip)
		errs = append(errs, err)
		service.LoadBalancerIPs = append(service.LoadBalancerIPs, addr)
	}
	for i, text := range s.Spec.LoadBalancerSourceRanges {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("spec.loadBalancerSourceRanges[%d]: %.60q is not a prefix", i, text))
			continue
		}
		service.SourceRanges = append(service.SourceRanges, prefix.Masked())
	}
	if port := s.Spec.HealthCheckNodePort; port != 0 && service.ExternalLocal {
		number, err := parsePort("spec.healthCheckNodePort", port)
		errs = append(errs, err)
		service.HealthCheckNodePort = number
	}
	return errors.Join(errs...)
}

// addChoice reads how a backend is chosen.
func (service *Service) addChoice(s *corev1.Service) error {
	var errs []error
	if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		service.Affinity = defaultAffinity
		if c := s.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
			if t := *c.ClientIP.TimeoutSeconds; t < 1 || t > maxAffinity {
				errs = append(errs, fmt.Errorf("spec.sessionAffinityConfig.clientIP.timeoutSeconds: %d is not in 1..%d", t, maxAffinity))
			} else {
				service.Affinity = uint32(t)
			}
		}
	}
	if d := s.Spec.TrafficDistribution; d != nil {
		switch *d {
		case corev1.ServiceTrafficDistributionPreferClose, corev1.ServiceTrafficDistributionPreferSameZone:
			service.Distribution = SameZone
		case corev1.ServiceTrafficDistributionPreferSameNode:
			service.Distribution = SameNode
		case "":
		default:
			errs = append(errs, fmt.Errorf("spec.trafficDistribution: %.60q is not PreferClose, PreferSameZone or PreferSameNode", *d))
		}
	}
	switch a := s.Annotations[AnnotationAlgorithm]; a {
	case "":
	case "random":
		service.Algorithm = Random
	case "maglev":
		service.Algorithm = Maglev
	default:
		errs = append(errs, fmt.Errorf("metadata.annotations[%s]: %.60q is not random or maglev", AnnotationAlgorithm, a))
	}
	return errors.Join(errs...)
}

// FromEndpointSlice checks an endpoint slice. Slices of names instead of addresses are empty here.
func FromEndpointSlice(s *discoveryv1.EndpointSlice) (*EndpointSlice, error) {
	slice := &EndpointSlice{Namespace: s.Namespace, Name: s.Name, Service: s.Labels[discoveryv1.LabelServiceName]}
	if s.AddressType == discoveryv1.AddressTypeFQDN {
		return slice, nil
	}
	var errs []error
	for i, p := range s.Ports {
		if p.Port == nil {
			continue // "all ports", which no service's port can mean
		}
		field := fmt.Sprintf("ports[%d]", i)
		number, err := parsePort(field, *p.Port)
		var named string
		if p.Name != nil {
			named = *p.Name
		}
		var proto corev1.Protocol
		if p.Protocol != nil {
			proto = *p.Protocol
		}
		protocol, protocolErr := parseProtocol(field, proto)
		errs = append(errs, err, protocolErr)
		slice.Ports = append(slice.Ports, SlicePort{Name: named, Protocol: protocol, Port: number})
	}
	for i, e := range s.Endpoints {
		if len(e.Addresses) == 0 {
			errs = append(errs, fmt.Errorf("endpoints[%d].addresses is empty", i))
			continue
		}
		// Only the first address counts (Kubernetes' own rule for readers).
		addr, err := parseAddr(fmt.Sprintf("endpoints[%d].addresses[0]", i), e.Addresses[0])
		errs = append(errs, err)
		endpoint := sliceEndpoint(&e)
		endpoint.Address = addr
		slice.Endpoints = append(slice.Endpoints, endpoint)
	}
	return slice, errors.Join(errs...)
}

// sliceEndpoint reads what is said of one endpoint beside its address. An absent `ready` means yes, an absent `serving` is as `ready`.
func sliceEndpoint(e *discoveryv1.Endpoint) SliceEndpoint {
	c := e.Conditions
	endpoint := SliceEndpoint{Ready: c.Ready == nil || *c.Ready, Terminating: c.Terminating != nil && *c.Terminating}
	endpoint.Serving = endpoint.Ready
	if c.Serving != nil {
		endpoint.Serving = *c.Serving
	}
	if e.NodeName != nil {
		endpoint.Node = *e.NodeName
	}
	if e.Zone != nil {
		endpoint.Zone = *e.Zone
	}
	if e.Hints != nil {
		for _, z := range e.Hints.ForZones {
			endpoint.ForZones = append(endpoint.ForZones, z.Name)
		}
		for _, n := range e.Hints.ForNodes {
			endpoint.ForNodes = append(endpoint.ForNodes, n.Name)
		}
	}
	return endpoint
}
