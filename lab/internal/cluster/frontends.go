// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/lab/internal/object"
)

// Node ports are of the range that Kubernetes has by default.
const (
	firstNodePort = 30000
	lastNodePort  = 32767
)

// nodePort is a port that a service has on every node.
type nodePort struct {
	port     int32
	protocol corev1.Protocol
}

// healthCheck stands in the place of a protocol for a health check port, which no service port can share.
const healthCheck corev1.Protocol = "health check"

// outsidePorts reports whether a service has ports on the nodes.
func outsidePorts(spec *corev1.ServiceSpec) bool {
	switch spec.Type {
	case corev1.ServiceTypeNodePort:
		return true
	case corev1.ServiceTypeLoadBalancer:
		return spec.AllocateLoadBalancerNodePorts == nil || *spec.AllocateLoadBalancerNodePorts
	}
	return false
}

// wantsHealthCheck reports whether a load balancer asks the nodes which of them have endpoints.
func wantsHealthCheck(spec *corev1.ServiceSpec) bool {
	return spec.Type == corev1.ServiceTypeLoadBalancer && spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
}

// admitOutside checks what a service asks for on the outside, and takes it.
func (a *allocator) admitOutside(service *corev1.Service) (field string, err error) {
	key := object.KeyOf(service)
	spec := &service.Spec
	for i, port := range spec.Ports {
		wanted := nodePort{port.NodePort, port.Protocol}
		if port.NodePort == 0 {
			continue
		}
		if owner, taken := a.portOwner(wanted); taken && owner != key {
			return fmt.Sprintf("spec.ports[%d].nodePort", i), fmt.Errorf("%d/%s belongs to %s", port.NodePort, port.Protocol, owner)
		}
		a.ports[wanted] = key
	}
	if spec.HealthCheckNodePort != 0 {
		for taken, owner := range a.ports {
			if taken.port == spec.HealthCheckNodePort && (owner != key || taken.protocol != healthCheck) {
				return "spec.healthCheckNodePort", fmt.Errorf("%d belongs to %s", taken.port, owner)
			}
		}
		a.ports[nodePort{spec.HealthCheckNodePort, healthCheck}] = key
	}
	if spec.Type != corev1.ServiceTypeLoadBalancer {
		return "", nil
	}
	if address, err := netip.ParseAddr(spec.LoadBalancerIP); err == nil {
		for _, owners := range []map[netip.Addr]object.Key{a.taken, a.balanced} {
			if owner, taken := owners[address]; taken && owner != key {
				return "spec.loadBalancerIP", fmt.Errorf("%s belongs to %s", address, owner)
			}
		}
		a.balanced[address] = key
	}
	return "", nil
}

func (a *allocator) portOwner(p nodePort) (object.Key, bool) {
	if owner, taken := a.ports[p]; taken {
		return owner, true
	}
	owner, taken := a.ports[nodePort{p.port, healthCheck}]
	return owner, taken
}

// completeOutside gives a service its node ports and its load balancer's addresses.
func (a *allocator) completeOutside(service, previous *corev1.Service) {
	key := object.KeyOf(service)
	spec := &service.Spec
	a.releaseOutside(key)
	if outsidePorts(spec) {
		a.completePorts(spec, previous, key)
	}
	if wantsHealthCheck(spec) {
		if spec.HealthCheckNodePort == 0 && previous != nil {
			spec.HealthCheckNodePort = previous.Spec.HealthCheckNodePort
		}
		if spec.HealthCheckNodePort == 0 {
			spec.HealthCheckNodePort = a.freePort()
		}
		a.ports[nodePort{spec.HealthCheckNodePort, healthCheck}] = key
	}
	service.Status.LoadBalancer = corev1.LoadBalancerStatus{}
	if spec.Type != corev1.ServiceTypeLoadBalancer {
		return
	}
	vip := corev1.LoadBalancerIPModeVIP
	for _, address := range a.balancerAddresses(service, previous) {
		a.balanced[address] = key
		service.Status.LoadBalancer.Ingress = append(service.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: address.String(), IPMode: &vip})
	}
}

// completePorts takes the ports that are given, then those that the service had, and finds new ones for the rest.
func (a *allocator) completePorts(spec *corev1.ServiceSpec, previous *corev1.Service, key object.Key) {
	for i := range spec.Ports {
		if port := &spec.Ports[i]; port.NodePort != 0 {
			a.ports[nodePort{port.NodePort, port.Protocol}] = key
		}
	}
	for i := range spec.Ports {
		port := &spec.Ports[i]
		if port.NodePort == 0 && previous != nil {
			for _, old := range previous.Spec.Ports {
				_, taken := a.portOwner(nodePort{old.NodePort, port.Protocol})
				if old.Port == port.Port && old.Protocol == port.Protocol && !taken {
					port.NodePort = old.NodePort
				}
			}
		}
		if port.NodePort == 0 {
			port.NodePort = a.freePort()
		}
		a.ports[nodePort{port.NodePort, port.Protocol}] = key
	}
}

// balancerAddresses are the one that a service asks for, those that it had, or new ones of the pool.
func (a *allocator) balancerAddresses(service, previous *corev1.Service) []netip.Addr {
	if address, err := netip.ParseAddr(service.Spec.LoadBalancerIP); err == nil {
		return []netip.Addr{address}
	}
	if previous != nil && previous.Spec.LoadBalancerIP == "" && len(previous.Status.LoadBalancer.Ingress) > 0 {
		return balancerIngress(previous)
	}
	var addresses []netip.Addr
	for _, family := range service.Spec.IPFamilies {
		pool := a.balancers[0]
		if family == corev1.IPv6Protocol {
			pool = a.balancers[1]
		}
		if address, ok := a.freeAddress(pool); ok {
			addresses = append(addresses, address)
		}
	}
	return addresses
}

// balancerIngress are the addresses that a load balancer gave a service.
func balancerIngress(service *corev1.Service) []netip.Addr {
	var addresses []netip.Addr
	for _, ingress := range service.Status.LoadBalancer.Ingress {
		if address, err := netip.ParseAddr(ingress.IP); err == nil {
			addresses = append(addresses, address)
		}
	}
	return addresses
}

// freeAddress returns the first address of a pool that is not taken; the pool's own is left out.
func (a *allocator) freeAddress(pool netip.Prefix) (netip.Addr, bool) {
	if !pool.IsValid() {
		return netip.Addr{}, false
	}
	for address := pool.Masked().Addr().Next(); pool.Contains(address); address = address.Next() {
		_, cluster := a.taken[address]
		_, balanced := a.balanced[address]
		if !cluster && !balanced {
			return address, true
		}
	}
	return netip.Addr{}, false
}

// freePort returns a node port that no protocol has; 0 = there is none left, and a service does without.
func (a *allocator) freePort() int32 {
	for range lastNodePort - firstNodePort + 1 {
		port := a.nextPort
		if a.nextPort++; a.nextPort > lastNodePort {
			a.nextPort = firstNodePort
		}
		free := true
		for taken := range a.ports {
			free = free && taken.port != port
		}
		if free {
			return port
		}
	}
	return 0
}

// releaseOutside frees a service's ports and its load balancer's addresses.
func (a *allocator) releaseOutside(key object.Key) {
	for port, owner := range a.ports {
		if owner == key {
			delete(a.ports, port)
		}
	}
	for address, owner := range a.balanced {
		if owner == key {
			delete(a.balanced, address)
		}
	}
}
