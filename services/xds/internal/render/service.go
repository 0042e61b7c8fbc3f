// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/envoyconfig"
)

// maxEndpoints is what one cluster may have.
const maxEndpoints = 10_000

// service keeps the endpoints that were rendered of it: by cluster, and by node where traffic stays on its node.
type service struct {
	*policyv1.Service
	rendered map[string]*Resource
}

func serviceKey(s *policyv1.Service) string { return s.GetNamespace() + "/" + s.GetName() }

// endpoints returns the endpoints of one of the service's clusters, `namespace/name` or `namespace/name:port`.
func (s *service) endpoints(cluster, node string) (*Resource, error) {
	if !s.GetInternalLocal() {
		node = ""
	}
	key := cluster + "@" + node
	if r, ok := s.rendered[key]; ok {
		return r, nil
	}
	_, _, port, ok := envoyconfig.ParseCluster(cluster)
	if !ok {
		return nil, fmt.Errorf("%q is not the cluster of a service", cluster)
	}
	r, err := assignment(cluster, s.backends(port, node))
	if err != nil {
		return nil, err
	}
	s.rendered[key] = r
	return r, nil
}

// backends returns those of a port (number or name; "" = all TCP ports), sorted, each once. Node "" = on any.
func (s *service) backends(port, node string) []*policyv1.Backend {
	var all []*policyv1.Backend
	for _, p := range s.GetPorts() {
		if p.GetProtocol() != policyv1.Protocol_PROTOCOL_TCP || port != "" && port != p.GetName() && port != strconv.Itoa(int(p.GetPort())) {
			continue
		}
		for _, b := range p.GetBackends() {
			if node == "" || b.GetNode() == node {
				all = append(all, b)
			}
		}
	}
	slices.SortFunc(all, compareBackends)
	all = slices.CompactFunc(all, func(a, b *policyv1.Backend) bool {
		return a.GetAddress() == b.GetAddress() && a.GetPort() == b.GetPort()
	})
	return all[:min(len(all), maxEndpoints)]
}

func compareBackends(a, b *policyv1.Backend) int {
	if c := strings.Compare(a.GetAddress(), b.GetAddress()); c != 0 {
		return c
	}
	if c := int(a.GetPort()) - int(b.GetPort()); c != 0 {
		return c
	}
	// Of two entries for one address, the one that serves stays.
	switch {
	case a.GetTerminating() == b.GetTerminating():
		return 0
	case b.GetTerminating():
		return -1
	}
	return 1
}

// assignment makes the endpoints of a cluster. Terminating ones get nothing new, unless no other is there.
func assignment(cluster string, backends []*policyv1.Backend) (*Resource, error) {
	anyReady := slices.ContainsFunc(backends, func(b *policyv1.Backend) bool { return !b.GetTerminating() })
	// gRPC clients leave out localities that have no name or no weight.
	locality := &endpointv3.LocalityLbEndpoints{Locality: &corev3.Locality{}, LoadBalancingWeight: wrapperspb.UInt32(1)}
	for _, b := range backends {
		if _, err := netip.ParseAddr(b.GetAddress()); err != nil || b.GetPort() == 0 || b.GetPort() > 65535 {
			continue
		}
		health := corev3.HealthStatus_HEALTHY
		if b.GetTerminating() && anyReady {
			health = corev3.HealthStatus_DRAINING
		}
		locality.LbEndpoints = append(locality.LbEndpoints, &endpointv3.LbEndpoint{
			HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: address(b.GetAddress(), b.GetPort())}},
			HealthStatus:   health,
		})
	}
	m := &endpointv3.ClusterLoadAssignment{ClusterName: cluster}
	if len(locality.GetLbEndpoints()) > 0 {
		m.Endpoints = []*endpointv3.LocalityLbEndpoints{locality}
	}
	return newResource("", "", m)
}
