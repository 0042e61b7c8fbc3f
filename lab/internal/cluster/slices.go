// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/object"
)

// reconcileSlices makes the EndpointSlices of every service that selects pods: one for each family, and for each set of port numbers
// where named ports differ between pods.
func (c *Cluster) reconcileSlices() {
	pods := c.pods()
	zones := map[string]string{}
	for _, node := range list[*corev1.Node](c) {
		zones[node.Name] = node.Labels[corev1.LabelTopologyZone]
	}
	// A pod of another cluster is that cluster's endpoint.
	own := slices.DeleteFunc(pods, func(p *corev1.Pod) bool {
		name := p.Annotations[object.AnnotationCluster]
		return name != "" && name != c.config.Name
	})
	desired := map[object.Key]*discoveryv1.EndpointSlice{}
	for _, service := range list[*corev1.Service](c) {
		if len(service.Spec.Selector) == 0 {
			continue
		}
		for _, slice := range slicesOf(service, own, zones) {
			for c.handMade(object.KeyOf(slice)) {
				slice.Name += "-lab"
			}
			desired[object.KeyOf(slice)] = slice
		}
	}
	for _, current := range list[*discoveryv1.EndpointSlice](c) {
		if !ownSlice(current) {
			continue
		}
		key := object.KeyOf(current)
		slice, ok := desired[key]
		if !ok {
			c.remove(key)
			continue
		}
		delete(desired, key)
		slice.UID, slice.CreationTimestamp, slice.ResourceVersion = current.UID, current.CreationTimestamp, current.ResourceVersion
		if !sameJSON(slice, current) {
			c.put(slice)
		}
	}
	for _, slice := range desired {
		c.create(slice)
	}
}

// ownSlice reports whether an object is a slice that the lab made.
func ownSlice(o object.Object) bool {
	slice, ok := o.(*discoveryv1.EndpointSlice)
	return ok && slice.Labels[discoveryv1.LabelManagedBy] == object.SliceManager
}

// handMade reports whether a manifest has a slice of this name.
func (c *Cluster) handMade(key object.Key) bool {
	o, exists := c.objects[key]
	return exists && !ownSlice(o)
}

func slicesOf(service *corev1.Service, pods []*corev1.Pod, zones map[string]string) []*discoveryv1.EndpointSlice {
	selector := labels.SelectorFromSet(service.Spec.Selector)
	var result []*discoveryv1.EndpointSlice
	for _, family := range service.Spec.IPFamilies {
		groups := map[string]*discoveryv1.EndpointSlice{}
		var order []string
		group := func(ports []discoveryv1.EndpointPort) *discoveryv1.EndpointSlice {
			signature := portSignature(ports)
			if slice, ok := groups[signature]; ok {
				return slice
			}
			slice := newSlice(service, family, len(order), ports)
			groups[signature] = slice
			order = append(order, signature)
			return slice
		}
		for _, pod := range pods {
			if pod.Namespace != service.Namespace || !selector.Matches(labels.Set(pod.Labels)) || pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded {
				continue
			}
			addresses := podAddresses(pod, family)
			ports, ok := endpointPorts(service, pod)
			if len(addresses) == 0 || !ok {
				continue
			}
			slice := group(ports)
			slice.Endpoints = append(slice.Endpoints, endpoint(service, pod, addresses, zones[pod.Spec.NodeName]))
		}
		if len(order) == 0 {
			// A service without pods still has a slice: that it has none is known, not unknown.
			group(nil)
		}
		for _, signature := range order {
			result = append(result, groups[signature])
		}
	}
	return result
}

func newSlice(service *corev1.Service, family corev1.IPFamily, index int, ports []discoveryv1.EndpointPort) *discoveryv1.EndpointSlice {
	name := service.Name + "-" + strings.ToLower(string(family))
	if index > 0 {
		name = fmt.Sprintf("%s-%d", name, index)
	}
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: service.Namespace, Name: name,
			Labels: map[string]string{
				discoveryv1.LabelServiceName: service.Name,
				discoveryv1.LabelManagedBy:   object.SliceManager,
			},
			OwnerReferences: []metav1.OwnerReference{controller("v1", "Service", service)},
		},
		AddressType: discoveryv1.AddressType(family),
		Ports:       ports,
	}
	if service.Spec.ClusterIP == corev1.ClusterIPNone {
		slice.Labels[corev1.IsHeadlessService] = ""
	}
	return slice
}

func podAddresses(pod *corev1.Pod, family corev1.IPFamily) []string {
	var addresses []string
	for _, ip := range pod.Status.PodIPs {
		if address, err := netip.ParseAddr(ip.IP); err == nil && address.Is4() == (family == corev1.IPv4Protocol) {
			addresses = append(addresses, ip.IP)
		}
	}
	return addresses
}

// endpointPorts resolves a service's target ports in a pod; a name that the pod does not have leaves that port out.
func endpointPorts(service *corev1.Service, pod *corev1.Pod) ([]discoveryv1.EndpointPort, bool) {
	var ports []discoveryv1.EndpointPort
	for _, port := range service.Spec.Ports {
		var named []corev1.ContainerPort
		for _, container := range pod.Spec.Containers {
			for _, p := range container.Ports {
				if p.Protocol == port.Protocol {
					named = append(named, p)
				}
			}
		}
		number, ok := manifest.PortNumber(port.TargetPort, named)
		if !ok {
			continue
		}
		name, protocol := port.Name, port.Protocol
		ports = append(ports, discoveryv1.EndpointPort{Name: &name, Protocol: &protocol, Port: &number, AppProtocol: port.AppProtocol})
	}
	return ports, len(ports) > 0 || len(service.Spec.Ports) == 0
}

func portSignature(ports []discoveryv1.EndpointPort) string {
	var parts []string
	for _, port := range ports {
		parts = append(parts, fmt.Sprintf("%s/%s/%d", *port.Name, *port.Protocol, *port.Port))
	}
	slices.Sort(parts)
	return strings.Join(parts, ",")
}

func endpoint(service *corev1.Service, pod *corev1.Pod, addresses []string, zone string) discoveryv1.Endpoint {
	serving, terminating := podReady(pod), pod.DeletionTimestamp != nil
	ready := serving && !terminating || service.Spec.PublishNotReadyAddresses
	node := pod.Spec.NodeName
	e := discoveryv1.Endpoint{
		Addresses:  addresses,
		Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating},
		TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
		NodeName:   &node,
	}
	if pod.Spec.Hostname != "" && pod.Spec.Subdomain == service.Name {
		hostname := pod.Spec.Hostname
		e.Hostname = &hostname
	}
	if zone != "" {
		e.Zone = &zone
	}
	if ready {
		e.Hints = hints(service, e.NodeName, e.Zone)
	}
	return e
}

// hints say for whom an endpoint is, where a service wants its traffic distributed.
func hints(service *corev1.Service, node, zone *string) *discoveryv1.EndpointHints {
	if service.Spec.TrafficDistribution == nil {
		return nil
	}
	var forZones []discoveryv1.ForZone
	if zone != nil {
		forZones = []discoveryv1.ForZone{{Name: *zone}}
	}
	switch *service.Spec.TrafficDistribution {
	case corev1.ServiceTrafficDistributionPreferClose, corev1.ServiceTrafficDistributionPreferSameZone:
		if forZones == nil {
			return nil
		}
		return &discoveryv1.EndpointHints{ForZones: forZones}
	case corev1.ServiceTrafficDistributionPreferSameNode:
		return &discoveryv1.EndpointHints{ForZones: forZones, ForNodes: []discoveryv1.ForNode{{Name: *node}}}
	}
	return nil
}
