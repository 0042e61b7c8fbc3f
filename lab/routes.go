// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/fabric"
)

// router keeps the fabric's own routes in line with the cluster: to pods outside of all pod CIDRs by way of their node, and to what services
// have on the outside by way of the nodes that take it. It is what a network around a cluster learns by BGP or from a load balancer.
type router struct {
	cluster *cluster.Cluster
	nodes   []cluster.NodeConfig
	set     func([]fabric.Route) error
	unset   func([]fabric.Route) error
	log     *slog.Logger

	present map[netip.Prefix]fabric.Route
}

func (l *Lab) newRouter() *router {
	name := l.config.fabricNetns()
	return &router{
		cluster: l.cluster, nodes: l.nodes, log: l.log.With("component", "routes"), present: map[netip.Prefix]fabric.Route{},
		set:   func(routes []fabric.Route) error { return fabric.SetRoutes(name, fabric.Bridge, routes) },
		unset: func(routes []fabric.Route) error { return fabric.DeleteRoutes(name, fabric.Bridge, routes) },
	}
}

// Run follows the cluster until ctx ends.
func (r *router) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		r.follow(ctx)
	}
	return nil
}

// follow returns when its watch fell behind, or at the end.
func (r *router) follow(ctx context.Context) {
	watch := r.cluster.Watch("Pod", "Service", "EndpointSlice")
	defer watch.Close()
	for {
		if _, err := watch.Next(ctx); err != nil {
			return
		}
		r.sync()
	}
}

// sync brings the routes in line.
func (r *router) sync() {
	wanted := map[netip.Prefix]fabric.Route{}
	for _, route := range slices.Concat(r.toPods(), r.toServices()) {
		if _, twice := wanted[route.To]; !twice && len(route.Via) > 0 {
			wanted[route.To] = route
		}
	}
	var gone, fresh []fabric.Route
	for prefix, route := range r.present {
		if _, still := wanted[prefix]; !still {
			gone = append(gone, route)
		}
	}
	for prefix, route := range wanted {
		if before, known := r.present[prefix]; !known || !slices.Equal(before.Via, route.Via) {
			fresh = append(fresh, route)
			if known {
				// A replacement adds a next hop to an IPv6 route instead of taking its place.
				gone = append(gone, before)
			}
		}
	}
	if len(gone) > 0 {
		if err := r.unset(gone); err != nil {
			r.log.Warn("routes were not removed", "error", err)
		}
	}
	if len(fresh) > 0 {
		if err := r.set(fresh); err != nil {
			r.log.Warn("routes were not set", "error", err)
		}
	}
	r.present = wanted
}

func (r *router) toPods() []fabric.Route {
	var routes []fabric.Route
	for _, pod := range cluster.List[*corev1.Pod](r.cluster) {
		i := slices.IndexFunc(r.nodes, func(n cluster.NodeConfig) bool { return n.Name == pod.Spec.NodeName })
		if i < 0 || pod.Spec.HostNetwork {
			continue
		}
		for _, ip := range pod.Status.PodIPs {
			address, err := netip.ParseAddr(ip.IP)
			if err != nil {
				continue
			}
			// All nodes' CIDRs but its own lead to the wrong one.
			if !slices.ContainsFunc(r.nodes[i].PodCIDRs, func(p netip.Prefix) bool { return p.Contains(address) }) {
				routes = append(routes, fabric.Route{To: single(address), Via: gateways(r.nodes[i:i+1], address)})
			}
		}
	}
	return routes
}

func (r *router) toServices() []fabric.Route {
	var routes []fabric.Route
	endpoints := cluster.List[*discoveryv1.EndpointSlice](r.cluster)
	for _, service := range cluster.List[*corev1.Service](r.cluster) {
		nodes := r.nodes
		if service.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal {
			// A load balancer asks the nodes which of them have endpoints.
			if with := r.withEndpoints(service, endpoints); len(with) > 0 {
				nodes = with
			}
		}
		for _, address := range outsideAddresses(service) {
			if !r.isNode(address) {
				routes = append(routes, fabric.Route{To: single(address), Via: gateways(nodes, address)})
			}
		}
	}
	return routes
}

// outsideAddresses are those of a service that the fabric must be told: its load balancer's, external ones, and ClusterIPs outside of the
// ranges that it knows.
func outsideAddresses(service *corev1.Service) []netip.Addr {
	texts := slices.Clone(service.Spec.ExternalIPs)
	for _, ingress := range service.Status.LoadBalancer.Ingress {
		texts = append(texts, ingress.IP)
	}
	texts = append(texts, service.Spec.ClusterIPs...)
	var addresses []netip.Addr
	for _, text := range texts {
		if address, err := netip.ParseAddr(text); err == nil && !serviceV4.Contains(address) && !serviceV6.Contains(address) {
			addresses = append(addresses, address)
		}
	}
	return addresses
}

// withEndpoints are the nodes that have ready endpoints of a service.
func (r *router) withEndpoints(service *corev1.Service, all []*discoveryv1.EndpointSlice) []cluster.NodeConfig {
	has := map[string]bool{}
	for _, slice := range all {
		if slice.Namespace != service.Namespace || slice.Labels[discoveryv1.LabelServiceName] != service.Name {
			continue
		}
		for _, endpoint := range slice.Endpoints {
			if endpoint.NodeName != nil && (endpoint.Conditions.Ready == nil || *endpoint.Conditions.Ready) {
				has[*endpoint.NodeName] = true
			}
		}
	}
	return slices.DeleteFunc(slices.Clone(r.nodes), func(n cluster.NodeConfig) bool { return !has[n.Name] })
}

func (r *router) isNode(address netip.Addr) bool {
	return slices.ContainsFunc(r.nodes, func(n cluster.NodeConfig) bool { return slices.Contains(n.Addresses, address) })
}

// gateways are the nodes' addresses of an address's family.
func gateways(nodes []cluster.NodeConfig, to netip.Addr) []netip.Addr {
	var via []netip.Addr
	for _, node := range nodes {
		if address := first(node.Addresses, func(a netip.Addr) bool { return a.Is4() == to.Is4() }); address.IsValid() {
			via = append(via, address)
		}
	}
	return via
}
