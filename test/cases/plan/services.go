// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/test/cases/format"
)

// The service by which clients find the API server.
const (
	apiNamespace, apiName = "default", "kubernetes"
	apiPort, apiTarget    = 443, 6443
)

func (b *builder) services() error {
	for _, s := range b.c.Services {
		if s.Namespace == apiNamespace && s.Name == apiName && len(s.Selector) == 0 {
			continue // with the API server's own addresses, below
		}
		if err := b.service(s); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) service(s format.Service) error {
	name := s.Namespace + "/" + s.Name
	if len(s.Ports) == 0 {
		s.Ports = []format.ServicePort{{Port: 80}}
	}
	planned := Service{}
	var ports []any
	for i, p := range s.Ports {
		port := map[string]any{"name": portName(i), "port": p.Port, "protocol": transport(p.Protocol)}
		if number, err := strconv.Atoi(p.TargetPort); err == nil {
			port["targetPort"] = number
		} else if p.TargetPort != "" {
			port["targetPort"] = p.TargetPort
		}
		ports = append(ports, port)
		planned.Ports = append(planned.Ports, ServicePort{Protocol: transport(p.Protocol), Port: p.Port, Backends: b.backends(s, p)})
	}
	spec := map[string]any{"ports": ports}
	switch a, err := netip.ParseAddr(s.ClusterIP); {
	case s.ClusterIP == "None":
		spec["clusterIP"] = "None"
	case s.ClusterIP == "":
		planned.Addrs = b.serviceAddrs()
	case err != nil:
		return fmt.Errorf("service %s: cluster_ip: expected an address or None, got %q", name, s.ClusterIP)
	default:
		planned.Addrs = []netip.Addr{a}
	}
	if len(planned.Addrs) > 0 {
		var texts, families []string
		for _, a := range planned.Addrs {
			texts = append(texts, a.String())
			families = append(families, familyOf(a))
		}
		spec["clusterIP"], spec["clusterIPs"], spec["ipFamilies"] = texts[0], texts, families
	}
	if len(s.Selector) > 0 {
		spec["selector"] = s.Selector
	}
	meta := map[string]any{"name": s.Name, "namespace": s.Namespace}
	if len(s.Labels) > 0 {
		meta["labels"] = s.Labels
	}
	b.Services[name] = planned
	b.object(map[string]any{"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec})
	if len(s.Selector) == 0 {
		b.slices(s)
	}
	return nil
}

// serviceAddrs are addresses of a service whose case gives none.
func (b *builder) serviceAddrs() []netip.Addr {
	b.next++
	var addrs []netip.Addr
	if b.c.HasFamily(format.IPv4) {
		addrs = append(addrs, netip.AddrFrom4([4]byte{10, 96, 200 + byte(b.next>>8), byte(b.next)}))
	}
	if b.c.HasFamily(format.IPv6) {
		raw := netip.MustParseAddr("fd00:10:96::c800").As16()
		raw[15] = byte(b.next)
		addrs = append(addrs, netip.AddrFrom16(raw))
	}
	return addrs
}

func portName(i int) string { return "p" + strconv.Itoa(i) }

func transport(protocol string) string {
	if protocol == "" {
		return format.TCP
	}
	return strings.ToUpper(protocol)
}

func familyOf(a netip.Addr) string {
	if a.Is4() {
		return format.IPv4
	}
	return format.IPv6
}

// backends are those that serve a port.
func (b *builder) backends(s format.Service, p format.ServicePort) []Backend {
	var backends []Backend
	if len(s.Selector) == 0 {
		port := p.Port
		if number, err := strconv.Atoi(p.TargetPort); err == nil {
			port = number
		}
		for _, text := range s.Endpoints {
			if a, err := netip.ParseAddr(text); err == nil {
				backends = append(backends, Backend{Pod: b.owner(a), Addr: a, Port: port})
			}
		}
		return backends
	}
	for _, pod := range b.c.Pods {
		if pod.Namespace != s.Namespace || b.Pods[pod.Namespace+"/"+pod.Name].Foreign || !selects(s.Selector, pod.Labels) {
			continue
		}
		port := targetPort(p, pod)
		if port == 0 {
			continue
		}
		for _, a := range b.Pods[pod.Namespace+"/"+pod.Name].Addrs {
			backends = append(backends, Backend{Pod: pod.Namespace + "/" + pod.Name, Addr: a, Port: port})
		}
	}
	return backends
}

// owner is the pod that has an address; "" = none.
func (b *builder) owner(a netip.Addr) string {
	for name, p := range b.Pods {
		if slices.Contains(p.Addrs, a) {
			return name
		}
	}
	return ""
}

func selects(selector, labels map[string]string) bool {
	for k, v := range selector {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// targetPort is the pod's port behind a service's; 0 = it has none of that name.
func targetPort(p format.ServicePort, pod format.Pod) int {
	if p.TargetPort == "" {
		return p.Port
	}
	if number, err := strconv.Atoi(p.TargetPort); err == nil {
		return number
	}
	for _, port := range pod.Ports {
		if port.Name == p.TargetPort && transport(port.Protocol) == transport(p.Protocol) {
			return port.Port
		}
	}
	return 0
}

// slices makes the EndpointSlices of a service without selector, one for each family.
func (b *builder) slices(s format.Service) {
	byFamily := map[string][]any{}
	for _, text := range s.Endpoints {
		a, err := netip.ParseAddr(text)
		if err != nil {
			continue
		}
		byFamily[familyOf(a)] = append(byFamily[familyOf(a)], map[string]any{"addresses": []string{a.String()}, "conditions": map[string]any{"ready": true}})
	}
	var ports []any
	for i, p := range s.Ports {
		port := p.Port
		if number, err := strconv.Atoi(p.TargetPort); err == nil {
			port = number
		}
		ports = append(ports, map[string]any{"name": portName(i), "port": port, "protocol": transport(p.Protocol)})
	}
	for _, family := range slices.Sorted(maps.Keys(byFamily)) {
		b.object(map[string]any{
			"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
			"metadata": map[string]any{
				"name": s.Name + "-" + strings.ToLower(family), "namespace": s.Namespace,
				"labels": map[string]string{"kubernetes.io/service-name": s.Name},
			},
			"addressType": family, "endpoints": byFamily[family], "ports": ports,
		})
	}
}

// apiServer tells where the API server is, as a cluster does: by the service default/kubernetes.
func (b *builder) apiServer() {
	s := format.Service{Name: apiName, Namespace: apiNamespace, Ports: []format.ServicePort{{Port: apiPort, TargetPort: strconv.Itoa(apiTarget)}}}
	given := b.c.Service(apiNamespace + "/" + apiName)
	if given != nil {
		if len(given.Selector) > 0 {
			return
		}
		s = *given
	}
	add := func(a netip.Addr) {
		if text := a.String(); a.IsValid() && !slices.Contains(s.Endpoints, text) {
			s.Endpoints = append(s.Endpoints, text)
		}
	}
	for _, n := range b.c.Nodes {
		if n.KubeAPIServer {
			for _, a := range b.Nodes[n.Name].Addrs {
				add(a)
			}
		}
	}
	for _, e := range b.c.Externals {
		if e.KubeAPIServer {
			a, _ := netip.ParseAddr(e.IP)
			add(a)
		}
	}
	if given == nil && len(s.Endpoints) == 0 {
		return
	}
	if err := b.service(s); err != nil && b.err == nil {
		b.err = err
	}
}
