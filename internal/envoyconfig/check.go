// SPDX-License-Identifier: Apache-2.0

package envoyconfig

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
)

// readResources decodes the resources, then checks what no list of fields can say.
func (c *Config) readResources(raw []json.RawMessage) error {
	decoded := make([]proto.Message, len(raw))
	for i, r := range raw {
		path := resourcePath(i)
		m, err := decodeResource(path, r)
		if err != nil {
			return err
		}
		if err := c.keep(path, m); err != nil {
			return err
		}
		decoded[i] = m
	}
	check := &checker{config: c}
	for i, m := range decoded {
		if err := Walk(resourcePath(i), m, check.visit); err != nil {
			return err
		}
	}
	return nil
}

func resourcePath(i int) string { return fmt.Sprintf("spec.resources[%d]", i) }

// keep stores a resource by its type; a name stands for one of them.
func (c *Config) keep(path string, m proto.Message) error {
	r := &c.Resources
	var name string
	var taken bool
	switch m := m.(type) {
	case *listenerv3.Listener:
		name, taken = m.GetName(), slices.Contains(c.Listeners, m.GetName())
		c.Listeners = append(c.Listeners, name)
		r.Listeners = append(r.Listeners, m)
	case *routev3.RouteConfiguration:
		name, taken = m.GetName(), r.route(m.GetName()) != nil
		r.Routes = append(r.Routes, m)
	case *clusterv3.Cluster:
		name, taken = m.GetName(), r.cluster(m.GetName()) != nil
		r.Clusters = append(r.Clusters, m)
	}
	if taken {
		return fail(path+".name", "%q is the name of two resources of one type", name)
	}
	return checkName(path+".name", name)
}

// checkName: it becomes a part of resource names, which are shown and compared.
func checkName(path, name string) error {
	if name == "" || len(name) > 253 {
		return fail(path, "has %d characters, not 1 to 253", len(name))
	}
	if i := strings.IndexFunc(name, func(r rune) bool { return r > unicode.MaxASCII || !unicode.IsPrint(r) || r == '*' || r == '#' }); i >= 0 {
		return fail(path, "%q has a character that names may not have", name)
	}
	return nil
}

func (r *Resources) route(name string) *routev3.RouteConfiguration {
	for _, route := range r.Routes {
		if route.GetName() == name {
			return route
		}
	}
	return nil
}

func (r *Resources) cluster(name string) *clusterv3.Cluster {
	for _, cluster := range r.Clusters {
		if cluster.GetName() == name {
			return cluster
		}
	}
	return nil
}

// checker checks messages in today's form and counts what is bounded.
type checker struct {
	config                                            *Config
	routes, hosts, domains, regexes, chains, clusters int
}

func (c *checker) visit(path string, m proto.Message, root bool) error {
	if err := modernize(path, m); err != nil {
		return err
	}
	if err := c.message(path, m); err != nil {
		return err
	}
	if !root {
		return nil
	}
	return Validate(path, m)
}

// message checks one message.
func (c *checker) message(path string, m proto.Message) error {
	switch m := m.(type) {
	case *listenerv3.Listener:
		return c.listener(path, m)
	case *listenerv3.Filter:
		return present(path+".typed_config", m.GetTypedConfig() != nil)
	case *hcmv3.HttpFilter:
		return present(path+".typed_config", m.GetTypedConfig() != nil)
	case *hcmv3.HttpConnectionManager:
		return c.manager(path, m)
	case *hcmv3.Rds:
		if c.config.Resources.route(m.GetRouteConfigName()) == nil {
			return fail(path+".route_config_name", "%q is no route configuration of the object", m.GetRouteConfigName())
		}
	case *clusterv3.Cluster:
		return c.cluster(path, m)
	case *routev3.RouteConfiguration:
		return c.routeConfiguration(path, m)
	case *routev3.VirtualHost:
		return c.virtualHost(path, m)
	case *tcpproxyv3.TcpProxy:
		if m.GetCluster() != "" {
			return c.reference(path+".cluster", m.GetCluster())
		}
	case *tcpproxyv3.TcpProxy_WeightedCluster_ClusterWeight:
		return c.reference(path+".name", m.GetName())
	}
	return c.routeMessage(path, m)
}

// routeMessage checks what routes are made of.
func (c *checker) routeMessage(path string, m proto.Message) error {
	switch m := m.(type) {
	case *routev3.RouteMatch:
		return atMost(path+".headers", len(m.GetHeaders())+len(m.GetQueryParameters()), MaxMatchers)
	case *routev3.RouteAction:
		if _, ok := m.GetClusterSpecifier().(*routev3.RouteAction_Cluster); ok {
			return c.reference(path+".cluster", m.GetCluster())
		}
	case *routev3.WeightedCluster_ClusterWeight:
		return c.reference(path+".name", m.GetName())
	case *routev3.DirectResponseAction:
		return atMost(path+".body", len(m.GetBody().GetInlineString())+len(m.GetBody().GetInlineBytes()), MaxBody)
	case *routev3.RetryPolicy:
		return atMost(path+".num_retries", int(m.GetNumRetries().GetValue()), 10)
	case *corev3.HeaderValueOption:
		return checkHeader(path+".header", m.GetHeader())
	case *matcherv3.RegexMatcher:
		return c.regex(path+".regex", m.GetRegex())
	case *rbacv3.RBAC:
		return atMost(path+".policies", len(m.GetPolicies()), 256)
	}
	return nil
}

func present(path string, ok bool) error {
	if !ok {
		return fail(path, "is missing")
	}
	return nil
}

func atMost(path string, n, limit int) error {
	if n > limit {
		return fail(path, "%d is more than %d", n, limit)
	}
	return nil
}

func (c *checker) listener(path string, m *listenerv3.Listener) error {
	chains := m.GetFilterChains()
	if c.chains += len(chains) + 1; c.chains > MaxChains {
		return fail(path+".filter_chains", "more than %d in all", MaxChains)
	}
	if len(chains) == 0 && m.GetDefaultFilterChain() == nil {
		return fail(path+".filter_chains", "is empty")
	}
	if err := atMost(path+".per_connection_buffer_limit_bytes", int(m.GetPerConnectionBufferLimitBytes().GetValue()), 1<<20); err != nil {
		return err
	}
	for i, chain := range chains {
		if err := atMost(fmt.Sprintf("%s.filter_chains[%d].filters", path, i), len(chain.GetFilters()), MaxFilters); err != nil {
			return err
		}
		for j := range i {
			if proto.Equal(matchOf(chains[j]), matchOf(chain)) {
				return fail(fmt.Sprintf("%s.filter_chains[%d].filter_chain_match", path, i), "is the same as that of filter_chains[%d]", j)
			}
		}
	}
	return nil
}

func matchOf(chain *listenerv3.FilterChain) *listenerv3.FilterChainMatch {
	if m := chain.GetFilterChainMatch(); m != nil {
		return m
	}
	return &listenerv3.FilterChainMatch{}
}

const routerType = typePrefix + "envoy.extensions.filters.http.router.v3.Router"

func (c *checker) manager(path string, m *hcmv3.HttpConnectionManager) error {
	filters := m.GetHttpFilters()
	if err := atMost(path+".http_filters", len(filters), MaxFilters); err != nil {
		return err
	}
	if len(filters) == 0 || filters[len(filters)-1].GetTypedConfig().GetTypeUrl() != routerType {
		return fail(path+".http_filters", "the last one is not envoy.filters.http.router")
	}
	for i, f := range filters[:len(filters)-1] {
		if f.GetTypedConfig().GetTypeUrl() == routerType {
			return fail(fmt.Sprintf("%s.http_filters[%d]", path, i), "envoy.filters.http.router is not the last one")
		}
	}
	if m.GetCodecType() == hcmv3.HttpConnectionManager_HTTP3 {
		return fail(path+".codec_type", "HTTP3 is not supported")
	}
	return nil
}

func (c *checker) cluster(path string, m *clusterv3.Cluster) error {
	if c.clusters++; c.clusters > MaxClusters {
		return fail(path, "more than %d clusters", MaxClusters)
	}
	if m.GetType() != clusterv3.Cluster_EDS {
		return fail(path+".type", "%s is not allowed: endpoints come from services (EDS)", m.GetType())
	}
	switch m.GetLbPolicy() {
	case clusterv3.Cluster_ROUND_ROBIN, clusterv3.Cluster_LEAST_REQUEST, clusterv3.Cluster_RANDOM:
	default:
		return fail(path+".lb_policy", "%s is not supported", m.GetLbPolicy())
	}
	if m.GetEdsClusterConfig() == nil {
		m.EdsClusterConfig = &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ADS()}
	}
	field, service := ".eds_cluster_config.service_name", m.GetEdsClusterConfig().GetServiceName()
	if service == "" {
		field, service = ".name", m.GetName()
	}
	if !c.config.Serves(service) {
		return fail(path+field, "%q is no service of spec.services or spec.backendServices (namespace/name or namespace/name:port)", service)
	}
	m.EdsClusterConfig.ServiceName = service
	return atMost(path+".per_connection_buffer_limit_bytes", int(m.GetPerConnectionBufferLimitBytes().GetValue()), 1<<20)
}

// reference checks the name of a cluster that a route or filter leads to.
func (c *checker) reference(path, name string) error {
	if c.config.Resources.cluster(name) == nil && !c.config.Serves(name) {
		return fail(path, "%q is neither a cluster of the object nor one of its services (namespace/name or namespace/name:port)", name)
	}
	return nil
}

func (c *checker) routeConfiguration(path string, m *routev3.RouteConfiguration) error {
	if c.hosts += len(m.GetVirtualHosts()); c.hosts > MaxHosts {
		return fail(path+".virtual_hosts", "more than %d in all", MaxHosts)
	}
	if err := atMost(path+".max_direct_response_body_size_bytes", int(m.GetMaxDirectResponseBodySizeBytes().GetValue()), MaxBody); err != nil {
		return err
	}
	domains, names := map[string]bool{}, map[string]bool{}
	for i, host := range m.GetVirtualHosts() {
		at := fmt.Sprintf("%s.virtual_hosts[%d]", path, i)
		if names[host.GetName()] {
			return fail(at+".name", "%q is the name of two virtual hosts", host.GetName())
		}
		names[host.GetName()] = true
		for j, domain := range host.GetDomains() {
			if domains[strings.ToLower(domain)] {
				return fail(fmt.Sprintf("%s.domains[%d]", at, j), "%q is there twice", domain)
			}
			domains[strings.ToLower(domain)] = true
		}
	}
	return nil
}

func (c *checker) virtualHost(path string, m *routev3.VirtualHost) error {
	if c.routes += len(m.GetRoutes()); c.routes > MaxRoutes {
		return fail(path+".routes", "more than %d in all", MaxRoutes)
	}
	if c.domains += len(m.GetDomains()); c.domains > MaxDomains {
		return fail(path+".domains", "more than %d in all", MaxDomains)
	}
	return nil
}

func (c *checker) regex(path, text string) error {
	if c.regexes++; c.regexes > MaxRegexes {
		return fail(path, "more than %d regular expressions", MaxRegexes)
	}
	if err := atMost(path, len(text), MaxRegex); err != nil {
		return fail(path, "has %d characters, more than %d", len(text), MaxRegex)
	}
	if _, err := regexp.Compile(text); err != nil {
		return fail(path, "%s", strings.TrimPrefix(err.Error(), "error parsing regexp: "))
	}
	return nil
}

// Validate runs a message's own rules.
func Validate(path string, m proto.Message) error {
	v, ok := m.(interface{ Validate() error })
	if !ok {
		return nil
	}
	err := v.Validate()
	if err == nil {
		return nil
	}
	reason := err.Error()
	for {
		part, ok := err.(interface { //nolint:errorlint // each one is asked for its own field
			Field() string
			Reason() string
			Cause() error
		})
		if !ok {
			return fail(path, "%s", reason)
		}
		path, reason = path+"."+snake(part.Field()), part.Reason()
		if part.Cause() == nil {
			return fail(path, "%s", reason)
		}
		err = part.Cause()
		reason = err.Error()
	}
}

// snake makes the name of a field of the name of a Go field.
func snake(name string) string {
	var b strings.Builder
	for i, r := range name {
		if r == '[' {
			b.WriteString(name[i:])
			break
		}
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}
