// SPDX-License-Identifier: Apache-2.0

package state

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/internal/reserved"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// apiService is the service whose endpoints are the Kubernetes API servers.
const apiService = "default/kubernetes"

func (s *State) addSlice(o *object.EndpointSlice) {
	if o.Service == "" {
		return
	}
	name := o.Namespace + "/" + o.Service
	if s.slicesOf[name] == nil {
		s.slicesOf[name] = map[object.Key]*object.EndpointSlice{}
	}
	s.slicesOf[name][o.Key()] = o
	s.staleServices[name] = true
}

func (s *State) dropSlice(key object.Key) {
	o := s.slices[key]
	delete(s.slices, key)
	if o == nil || o.Service == "" {
		return
	}
	name := o.Namespace + "/" + o.Service
	if delete(s.slicesOf[name], key); len(s.slicesOf[name]) == 0 {
		delete(s.slicesOf, name)
	}
	s.staleServices[name] = true
}

// buildServices computes what is stale.
func (s *State) buildServices() map[string]Resource {
	all := maps.Clone(s.snapshot.parts[KindService].get())
	if all == nil {
		all = map[string]Resource{}
	}
	for name := range s.staleServices {
		namespace, service := cutName(name)
		o := s.services[object.Key{Kind: object.KindService, Namespace: namespace, Name: service}]
		if o == nil {
			delete(all, name)
			continue
		}
		r := Service{Service: o}
		for _, port := range o.Ports {
			p := ServicePort{ServicePort: port, Backends: s.backends(o, port, s.slicesOf[name])}
			if route, ok := s.routing.ports[name][port.Port]; ok && port.Protocol == object.TCP {
				p.Route = route.Key()
			}
			r.Ports = append(r.Ports, p)
		}
		all[name] = r
	}
	clear(s.staleServices)
	return all
}

// tellServices tells the engine of stale services, before buildServices forgets which they are.
func (s *State) tellServices() {
	for name := range s.staleServices {
		if name == apiService {
			s.staleNodes = true
		}
		namespace, service := cutName(name)
		o := s.services[object.Key{Kind: object.KindService, Namespace: namespace, Name: service}]
		if o == nil {
			s.engine.DeleteService(namespace, service)
			continue
		}
		told := policy.Service{Namespace: o.Namespace, Name: o.Name, Selector: o.Selector}
		for key, value := range o.Labels {
			told.Labels = append(told.Labels, labelset.Label{Source: reserved.Source, Key: key, Value: value}.String())
		}
		slices.Sort(told.Labels)
		if o.Selector == nil {
			told.Addresses = s.addressesBehind(name)
		}
		s.engine.SetService(told)
	}
}

// addressesBehind returns the addresses of a service's endpoint slices, sorted, each once.
func (s *State) addressesBehind(service string) []netip.Addr {
	var all []netip.Addr
	for _, slice := range s.slicesOf[service] {
		for _, e := range slice.Endpoints {
			all = append(all, e.Address)
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

// backends returns the backends of a port that serve, sorted, each once, those that are going away last. Slice ports are matched by name
// and protocol; their numbers are the target ports, already resolved per pod.
func (s *State) backends(service *object.Service, port object.ServicePort, all map[object.Key]*object.EndpointSlice) []Backend {
	var found []Backend
	for _, slice := range all {
		for _, p := range slice.Ports {
			if p.Name != port.Name || p.Protocol != port.Protocol {
				continue
			}
			for i := range slice.Endpoints {
				e := &slice.Endpoints[i]
				ready := e.Ready || service.PublishNotReady
				if !ready && (!e.Serving || !e.Terminating) {
					continue
				}
				b := Backend{Address: e.Address, Port: p.Port, Node: e.Node, Terminating: !ready}
				if service.Distribution != object.Anywhere {
					b.Zones, b.Nodes = s.hints(e)
				}
				found = append(found, b)
			}
		}
	}
	slices.SortFunc(found, func(a, b Backend) int {
		return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Port, b.Port), readyFirst(a, b), cmp.Compare(a.Node, b.Node))
	})
	found = slices.CompactFunc(found, func(a, b Backend) bool { return a.Address == b.Address && a.Port == b.Port })
	slices.SortStableFunc(found, readyFirst)
	return found
}

func readyFirst(a, b Backend) int {
	switch {
	case a.Terminating == b.Terminating:
		return 0
	case b.Terminating:
		return -1
	}
	return 1
}

// hints returns the zones and nodes that an endpoint is for: as its slice says or, without hints, its own.
func (s *State) hints(e *object.SliceEndpoint) (zones, nodes []string) {
	zones, nodes = e.ForZones, e.ForNodes
	if len(zones) == 0 {
		zone := e.Zone
		if n := s.nodes[e.Node]; zone == "" && n != nil {
			zone = n.Labels[corev1.LabelTopologyZone]
		}
		if zone != "" {
			zones = []string{zone}
		}
	}
	if len(nodes) == 0 && e.Node != "" {
		nodes = []string{e.Node}
	}
	return zones, nodes
}

func cutName(name string) (namespace, rest string) {
	namespace, rest, _ = strings.Cut(name, "/")
	return namespace, rest
}
