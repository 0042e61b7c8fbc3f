// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/weirmesh/weir/lab/internal/object"
)

func (v *validator) service(service *corev1.Service) {
	spec := &service.Spec
	switch spec.Type {
	case "":
		spec.Type = corev1.ServiceTypeClusterIP
	case corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer:
	case corev1.ServiceTypeExternalName:
		v.at("spec.type", "ExternalName is a name of DNS alone, which the lab's zone does not have: expected ClusterIP, NodePort or LoadBalancer")
	default:
		v.at("spec.type", "expected ClusterIP, NodePort or LoadBalancer, got %q", spec.Type)
	}
	headless := spec.ClusterIP == corev1.ClusterIPNone || slices.Contains(spec.ClusterIPs, corev1.ClusterIPNone)
	if headless && spec.Type != corev1.ServiceTypeClusterIP {
		v.at("spec.clusterIP", "a headless service cannot be of type %s", spec.Type)
	}
	if len(spec.Ports) == 0 && !headless {
		v.at("spec.ports", "required: at least one port")
	}
	seen := map[string]int{}
	names := map[string]int{}
	for i := range spec.Ports {
		port := &spec.Ports[i]
		path := fmt.Sprintf("spec.ports[%d]", i)
		v.portNumber(path+".port", port.Port, true)
		if port.Protocol == "" {
			port.Protocol = corev1.ProtocolTCP
		}
		v.protocol(path+".protocol", port.Protocol)
		if port.Name == "" && len(spec.Ports) > 1 {
			v.at(path+".name", "required when a service has several ports")
		}
		if port.Name != "" {
			v.problems(path+".name", validation.IsDNS1123Label(port.Name))
			if first, twice := names[port.Name]; twice {
				v.at(path+".name", "%q is also the name of ports[%d]", port.Name, first)
			}
			names[port.Name] = i
		}
		key := fmt.Sprintf("%d/%s", port.Port, port.Protocol)
		if first, twice := seen[key]; twice {
			v.at(path+".port", "%s is also ports[%d]", key, first)
		}
		seen[key] = i
		switch {
		case port.TargetPort == intstr.IntOrString{}:
			port.TargetPort = intstr.FromInt32(port.Port)
		case port.TargetPort.Type == intstr.Int:
			v.portNumber(path+".targetPort", port.TargetPort.IntVal, true)
		default:
			v.problems(path+".targetPort", validation.IsValidPortName(port.TargetPort.StrVal))
		}
	}
	for i, text := range spec.ClusterIPs {
		if _, err := netip.ParseAddr(text); err != nil && text != corev1.ClusterIPNone {
			v.at(fmt.Sprintf("spec.clusterIPs[%d]", i), "expected an address or None, got %q", text)
		}
	}
	if _, err := netip.ParseAddr(spec.ClusterIP); spec.ClusterIP != "" && !headless && err != nil {
		v.at("spec.clusterIP", "expected an address or None, got %q", spec.ClusterIP)
	}
	for i, family := range spec.IPFamilies {
		if family != corev1.IPv4Protocol && family != corev1.IPv6Protocol {
			v.at(fmt.Sprintf("spec.ipFamilies[%d]", i), "expected IPv4 or IPv6, got %q", family)
		}
	}
	v.labels("spec.selector", spec.Selector)
	if spec.ExternalName != "" {
		v.at("spec.externalName", "not supported by the lab")
	}
	v.serviceOutside(spec)
	v.serviceTraffic(spec)
}

// serviceOutside checks how a service is reached from outside of the cluster.
func (v *validator) serviceOutside(spec *corev1.ServiceSpec) {
	nodePorts := spec.Type == corev1.ServiceTypeNodePort || spec.Type == corev1.ServiceTypeLoadBalancer
	for i, port := range spec.Ports {
		path := fmt.Sprintf("spec.ports[%d].nodePort", i)
		switch {
		case port.NodePort == 0:
		case !nodePorts:
			v.at(path, "expected none in a service of type %s", spec.Type)
		case port.NodePort < firstNodePort || port.NodePort > lastNodePort:
			v.at(path, "expected %d to %d, got %d", firstNodePort, lastNodePort, port.NodePort)
		}
	}
	for i, text := range spec.ExternalIPs {
		if address, err := netip.ParseAddr(text); err != nil || address.Zone() != "" || address.Is4In6() {
			v.at(fmt.Sprintf("spec.externalIPs[%d]", i), "expected an address, got %q", text)
		}
	}
	for i, text := range spec.LoadBalancerSourceRanges {
		if _, err := netip.ParsePrefix(strings.TrimSpace(text)); err != nil {
			v.at(fmt.Sprintf("spec.loadBalancerSourceRanges[%d]", i), "expected a prefix such as 203.0.113.0/24, got %q", text)
		}
	}
	balancer := spec.Type == corev1.ServiceTypeLoadBalancer
	if spec.LoadBalancerIP != "" {
		if _, err := netip.ParseAddr(spec.LoadBalancerIP); err != nil {
			v.at("spec.loadBalancerIP", "expected an address, got %q", spec.LoadBalancerIP)
		}
	}
	for path, given := range map[string]bool{
		"spec.loadBalancerIP":           spec.LoadBalancerIP != "",
		"spec.loadBalancerSourceRanges": len(spec.LoadBalancerSourceRanges) > 0,
		"spec.loadBalancerClass":        spec.LoadBalancerClass != nil,
	} {
		if given && !balancer {
			v.at(path, "expected none in a service of type %s", spec.Type)
		}
	}
	switch spec.ExternalTrafficPolicy {
	case "":
		if nodePorts || len(spec.ExternalIPs) > 0 {
			spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
		}
	case corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal:
		if !nodePorts && len(spec.ExternalIPs) == 0 {
			v.at("spec.externalTrafficPolicy", "expected none in a service that nobody reaches from outside")
		}
	default:
		v.at("spec.externalTrafficPolicy", "expected Cluster or Local, got %q", spec.ExternalTrafficPolicy)
	}
	if port := spec.HealthCheckNodePort; port != 0 {
		v.portNumber("spec.healthCheckNodePort", port, true)
		if !balancer || spec.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
			v.at("spec.healthCheckNodePort", "expected none but in a LoadBalancer with externalTrafficPolicy Local")
		}
	}
}

// Node ports are of the range that Kubernetes has by default.
const (
	firstNodePort = 30000
	lastNodePort  = 32767
)

// affinityTimeout is how long Kubernetes keeps a client with its endpoint when a service does not say; maxAffinity the most that it takes.
const (
	affinityTimeout = 10800
	maxAffinity     = 86400
)

// serviceTraffic checks how a service chooses endpoints.
func (v *validator) serviceTraffic(spec *corev1.ServiceSpec) {
	switch spec.SessionAffinity {
	case "":
		spec.SessionAffinity = corev1.ServiceAffinityNone
	case corev1.ServiceAffinityNone:
	case corev1.ServiceAffinityClientIP:
		if spec.SessionAffinityConfig == nil {
			spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{}
		}
		if spec.SessionAffinityConfig.ClientIP == nil {
			spec.SessionAffinityConfig.ClientIP = &corev1.ClientIPConfig{}
		}
		client := spec.SessionAffinityConfig.ClientIP
		if client.TimeoutSeconds == nil {
			timeout := int32(affinityTimeout)
			client.TimeoutSeconds = &timeout
		}
		if *client.TimeoutSeconds < 1 || *client.TimeoutSeconds > maxAffinity {
			v.at("spec.sessionAffinityConfig.clientIP.timeoutSeconds", "expected 1 to %d, got %d", maxAffinity, *client.TimeoutSeconds)
		}
	default:
		v.at("spec.sessionAffinity", "expected None or ClientIP, got %q", spec.SessionAffinity)
	}
	if policy := spec.InternalTrafficPolicy; policy != nil && *policy != corev1.ServiceInternalTrafficPolicyCluster && *policy != corev1.ServiceInternalTrafficPolicyLocal {
		v.at("spec.internalTrafficPolicy", "expected Cluster or Local, got %q", *policy)
	}
	if d := spec.TrafficDistribution; d != nil {
		known := []string{corev1.ServiceTrafficDistributionPreferClose, corev1.ServiceTrafficDistributionPreferSameZone, corev1.ServiceTrafficDistributionPreferSameNode}
		if !slices.Contains(known, *d) {
			v.at("spec.trafficDistribution", "expected %s, got %q", strings.Join(known, ", "), *d)
		}
	}
}

// slice checks an EndpointSlice, which is for a service without a selector.
func (v *validator) slice(slice *discoveryv1.EndpointSlice) {
	is4 := slice.AddressType == discoveryv1.AddressTypeIPv4
	if !is4 && slice.AddressType != discoveryv1.AddressTypeIPv6 {
		v.at("addressType", "expected IPv4 or IPv6, got %q", slice.AddressType)
	}
	if slice.Labels[discoveryv1.LabelServiceName] == "" {
		v.note("label " + discoveryv1.LabelServiceName + ", which is missing: without it the slice")
	}
	if slice.Labels[discoveryv1.LabelManagedBy] == object.SliceManager {
		v.at("metadata.labels."+discoveryv1.LabelManagedBy, "%s is the lab itself", object.SliceManager)
	}
	for i := range slice.Endpoints {
		path := fmt.Sprintf("endpoints[%d]", i)
		if len(slice.Endpoints[i].Addresses) == 0 {
			v.at(path+".addresses", "required: at least one address")
		}
		for j, text := range slice.Endpoints[i].Addresses {
			if address, err := netip.ParseAddr(text); err != nil || address.Is4() != is4 || address.Zone() != "" || address.Is4In6() {
				v.at(fmt.Sprintf("%s.addresses[%d]", path, j), "expected an address of the family %s, got %q", slice.AddressType, text)
			}
		}
	}
	for i := range slice.Ports {
		port := &slice.Ports[i]
		path := fmt.Sprintf("ports[%d]", i)
		if port.Name == nil {
			port.Name = new(string)
		}
		if port.Protocol == nil {
			tcp := corev1.ProtocolTCP
			port.Protocol = &tcp
		}
		v.protocol(path+".protocol", *port.Protocol)
		if port.Port == nil {
			v.at(path+".port", "required by the lab")
			continue
		}
		v.portNumber(path+".port", *port.Port, true)
	}
}
