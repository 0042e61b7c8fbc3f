// SPDX-License-Identifier: Apache-2.0

package render

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/envoyconfig"
)

// config is a rendered Envoy configuration, less its listeners, which depend on slots.
type config struct {
	*envoyconfig.Config
	source    *policyv1.EnvoyConfig
	err       error // all of it is out
	listeners map[string]*configListener
	resources [numTypes]Set // Cluster and Route, by full name
	problems  []Problem
}

// configListener is a listener with full names in it, and what it leads to.
type configListener struct {
	message  *listenerv3.Listener
	routes   []string
	clusters []string
}

// prefix of the names of an object's resources.
func prefix(m envoyconfig.Meta) string { return m.Namespace + "/" + m.Name + "/" }

// renderConfig gives an object's resources their full names. Route configurations that stand in a listener become resources of their own, so that an
// edit of them does not replace the listener.
func renderConfig(in *policyv1.EnvoyConfig) (c *config) {
	meta := envoyconfig.Meta{Kind: in.GetKind(), Namespace: in.GetNamespace(), Name: in.GetName(), UID: in.GetUid(), Generation: in.GetGeneration()}
	c = &config{Config: &envoyconfig.Config{Meta: meta}}
	parsed, err := envoyconfig.ParseSpec(meta, in.GetSpec())
	if err != nil {
		c.err = err
		return c
	}
	c.Config = parsed
	c.listeners = map[string]*configListener{}
	c.resources[Cluster], c.resources[Route] = Set{}, Set{}
	owner := meta.Key()
	for _, r := range c.Resources.Clusters {
		cluster := proto.CloneOf(r)
		cluster.Name = prefix(meta) + r.GetName()
		completeCluster(cluster)
		c.add(owner, cluster)
	}
	for _, name := range c.serviceClusters() {
		c.add(owner, serviceCluster(name))
	}
	uses := map[string][]string{} // clusters by route configuration
	for _, r := range c.Resources.Routes {
		route := proto.CloneOf(r)
		route.Name = prefix(meta) + r.GetName()
		c.addRoute(owner, route, uses)
	}
	for _, r := range c.Resources.Listeners {
		l, err := c.listener(owner, proto.CloneOf(r), uses)
		if err != nil {
			c.problems = append(c.problems, Problem{Owner: owner, Error: err.Error()})
			continue
		}
		c.listeners[r.GetName()] = l
	}
	return c
}

// add makes a resource; what can not be made is a problem, and missing.
func (c *config) add(owner string, m proto.Message) {
	r, err := newResource(owner, c.Namespace, m)
	if err != nil {
		c.problems = append(c.problems, Problem{Owner: owner, Error: err.Error()})
		return
	}
	c.resources[r.Type][r.Name] = r
}

func (c *config) addRoute(owner string, route *routev3.RouteConfiguration, uses map[string][]string) {
	clusters, err := c.rename(route)
	if err != nil {
		c.problems = append(c.problems, Problem{Owner: owner, Error: err.Error()})
		return
	}
	uses[route.GetName()] = clusters
	// A cluster that comes a moment later must not refuse the routes.
	route.ValidateClusters = nil
	c.add(owner, route)
}

// serviceClusters are the names of clusters that routes may use without a resource of the object: services, and their ports.
func (c *config) serviceClusters() []string {
	found := map[string]bool{}
	note := func(name string) {
		if !slices.ContainsFunc(c.Resources.Clusters, func(r *clusterv3.Cluster) bool { return r.GetName() == name }) {
			found[name] = true
		}
	}
	for _, name := range c.references() {
		note(name)
	}
	names := make([]string, 0, len(found))
	for name := range found {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// references are the names of all clusters that the object's routes and filters lead to, as the user wrote them.
func (c *config) references() []string {
	var all []string
	visit := func(_ string, m proto.Message, _ bool) error {
		all = append(all, clustersOf(m)...)
		return nil
	}
	for _, m := range c.Resources.All() {
		if err := envoyconfig.Walk("", m, visit); err != nil {
			continue // it was walked when it was checked; the listener that needs it will say so
		}
	}
	return all
}

// clustersOf returns the clusters that one message leads to.
func clustersOf(m proto.Message) []string {
	switch m := m.(type) {
	case *routev3.RouteAction:
		if name := m.GetCluster(); name != "" {
			return []string{name}
		}
	case *routev3.WeightedCluster_ClusterWeight:
		return []string{m.GetName()}
	case *tcpproxyv3.TcpProxy:
		if name := m.GetCluster(); name != "" {
			return []string{name}
		}
	case *tcpproxyv3.TcpProxy_WeightedCluster_ClusterWeight:
		return []string{m.GetName()}
	}
	return nil
}

// fullCluster is the name of a cluster as proxies know it: those of the object have its prefix, services have their own name.
func (c *config) fullCluster(name string) string {
	if slices.ContainsFunc(c.Resources.Clusters, func(r *clusterv3.Cluster) bool { return r.GetName() == name }) {
		return prefix(c.Meta) + name
	}
	return name
}

// rename gives the clusters and route configurations below m their full names, and returns the clusters'.
func (c *config) rename(m proto.Message) ([]string, error) {
	var used []string
	err := envoyconfig.Walk("resource", m, func(_ string, m proto.Message, _ bool) error {
		switch m := m.(type) {
		case *routev3.RouteAction:
			if a, ok := m.GetClusterSpecifier().(*routev3.RouteAction_Cluster); ok {
				a.Cluster = c.fullCluster(a.Cluster)
			}
		case *routev3.WeightedCluster_ClusterWeight:
			m.Name = c.fullCluster(m.GetName())
		case *tcpproxyv3.TcpProxy:
			if a, ok := m.GetClusterSpecifier().(*tcpproxyv3.TcpProxy_Cluster); ok {
				a.Cluster = c.fullCluster(a.Cluster)
			}
		case *tcpproxyv3.TcpProxy_WeightedCluster_ClusterWeight:
			m.Name = c.fullCluster(m.GetName())
		case *hcmv3.Rds:
			m.RouteConfigName = prefix(c.Meta) + m.GetRouteConfigName()
		}
		used = append(used, clustersOf(m)...)
		return nil
	})
	slices.Sort(used)
	return slices.Compact(used), err
}

// listener gives a listener full names and moves its route configurations out of it.
func (c *config) listener(owner string, m *listenerv3.Listener, uses map[string][]string) (*configListener, error) {
	l := &configListener{message: m}
	name := m.GetName()
	chains := m.GetFilterChains()
	if m.GetDefaultFilterChain() != nil {
		chains = append(slices.Clone(chains), m.GetDefaultFilterChain())
	}
	for i, chain := range chains {
		for j, filter := range chain.GetFilters() {
			manager := &hcmv3.HttpConnectionManager{}
			if !filter.GetTypedConfig().MessageIs(manager) {
				continue
			}
			if err := filter.GetTypedConfig().UnmarshalTo(manager); err != nil {
				return nil, fmt.Errorf("listener %s: %w", name, err)
			}
			inline := manager.GetRouteConfig()
			if inline == nil {
				continue
			}
			// No name of a user's has the sign #.
			inline.Name = fmt.Sprintf("%s%s#%d.%d", prefix(c.Meta), name, i, j)
			c.addRoute(owner, inline, uses)
			// rename, below, puts the prefix before it.
			manager.RouteSpecifier = &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
				ConfigSource: envoyconfig.ADS(), RouteConfigName: strings.TrimPrefix(inline.GetName(), prefix(c.Meta)),
			}}
			filter.ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: pack(manager)}
		}
	}
	clusters, err := c.rename(m)
	if err != nil {
		return nil, fmt.Errorf("listener %s: %w", name, err)
	}
	l.clusters = clusters
	if l.routes, err = routesOf(m); err != nil {
		return nil, fmt.Errorf("listener %s: %w", name, err)
	}
	for _, route := range l.routes {
		l.clusters = append(l.clusters, uses[route]...)
	}
	slices.Sort(l.clusters)
	l.clusters = slices.Compact(l.clusters)
	return l, nil
}

// routesOf returns the route configurations that a listener names.
func routesOf(m *listenerv3.Listener) ([]string, error) {
	var names []string
	err := envoyconfig.Walk("listener", m, func(_ string, m proto.Message, _ bool) error {
		if rds, ok := m.(*hcmv3.Rds); ok {
			names = append(names, rds.GetRouteConfigName())
		}
		return nil
	})
	slices.Sort(names)
	return slices.Compact(names), err
}

// routeListener puts an object's listener in a slot.
func routeListener(s slot, f *policyv1.Filter, in *configListener, o Options) (*listenerv3.Listener, error) {
	user := proto.CloneOf(in.message)
	l := s.frame(f, needsTLSInspector(user))
	l.FilterChains, l.DefaultFilterChain = user.GetFilterChains(), user.GetDefaultFilterChain()
	l.PerConnectionBufferLimitBytes = user.GetPerConnectionBufferLimitBytes()
	chains := l.GetFilterChains()
	if l.GetDefaultFilterChain() != nil {
		chains = append(slices.Clone(chains), l.GetDefaultFilterChain())
	}
	for _, chain := range chains {
		for _, filter := range chain.GetFilters() {
			if err := completeFilter(s, filter, o); err != nil {
				return nil, err
			}
		}
	}
	return l, nil
}

func needsTLSInspector(l *listenerv3.Listener) bool {
	return len(l.GetListenerFilters()) > 0 || slices.ContainsFunc(l.GetFilterChains(), func(chain *listenerv3.FilterChain) bool {
		m := chain.GetFilterChainMatch()
		return len(m.GetServerNames()) > 0 || m.GetTransportProtocol() != "" || len(m.GetApplicationProtocols()) > 0
	})
}

// completeFilter adds what all filters of ours have: the access log, and paths in one form.
func completeFilter(s slot, filter *listenerv3.Filter, o Options) error {
	m, err := filter.GetTypedConfig().UnmarshalNew()
	if err != nil {
		return fmt.Errorf("filter %s: %w", filter.GetName(), err)
	}
	switch m := m.(type) {
	case *hcmv3.HttpConnectionManager:
		base := managerBase(s, o)
		// What the user set wins, but for what policy and flows stand on.
		proto.Merge(base, m)
		base.NormalizePath, base.MergeSlashes = managerBase(s, o).NormalizePath, true
		base.PathWithEscapedSlashesAction = hcmv3.HttpConnectionManager_UNESCAPE_AND_REDIRECT
		filter.ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: pack(base)}
	case *tcpproxyv3.TcpProxy:
		m.AccessLog = []*accesslogv3.AccessLog{s.tcpLog()}
		filter.ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: pack(m)}
	}
	return nil
}

// APIListenerName is the name under which gRPC clients find a routed service: `xds:///<name>`.
func APIListenerName(r *policyv1.Route) string {
	return fmt.Sprintf("%s.%s:%d", r.GetServiceNamespace(), r.GetServiceName(), r.GetServicePort())
}

// apiListener lets a gRPC client follow the routes of a listener by itself. It has the routes and no filter but the router.
func apiListener(f *policyv1.Filter, in *configListener) (*listenerv3.Listener, error) {
	chains := slices.Clone(in.message.GetFilterChains())
	if in.message.GetDefaultFilterChain() != nil {
		chains = append(chains, in.message.GetDefaultFilterChain())
	}
	for _, chain := range chains {
		for _, filter := range chain.GetFilters() {
			m := &hcmv3.HttpConnectionManager{}
			if filter.GetTypedConfig().UnmarshalTo(m) != nil || m.GetRds() == nil {
				continue
			}
			api := &hcmv3.HttpConnectionManager{
				StatPrefix:     m.GetStatPrefix(),
				RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: m.GetRds()},
				HttpFilters:    []*hcmv3.HttpFilter{httpFilter(httpRouter, &routerv3.Router{})},
			}
			return &listenerv3.Listener{
				Name:        APIListenerName(f.GetRoute()),
				ApiListener: &listenerv3.ApiListener{ApiListener: pack(api)},
			}, nil
		}
	}
	return nil, errors.New("the listener has no HTTP connection manager")
}
