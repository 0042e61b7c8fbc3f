// SPDX-License-Identifier: Apache-2.0

package route

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/mutation"
)

// FilterCompiler compiles the configuration that a route has for the filter of that name.
type FilterCompiler func(filter string, config *anypb.Any, path string) (any, error)

type compiler struct {
	filter   FilterCompiler
	matchers *match.Compiler
	clusters map[string]struct{}
	upgrades map[string]bool
	maxBody  uint32
}

const defaultDirectBody = 4096

// Compile compiles a route configuration. What is not implemented is an error that names the field's path.
func Compile(c *routev3.RouteConfiguration, filter FilterCompiler, matchers *match.Compiler) (*Table, error) {
	if err := fields.Only(c, "", "name", "virtual_hosts", "response_headers_to_add", "response_headers_to_remove", "request_headers_to_add",
		"request_headers_to_remove", "most_specific_header_mutations_wins", "validate_clusters", "max_direct_response_body_size_bytes",
		"ignore_port_in_host_matching", "typed_per_filter_config", "metadata"); err != nil {
		return nil, err
	}
	t := &Table{
		name: c.GetName(), ignorePort: c.GetIgnorePortInHostMatching(), specificLast: c.GetMostSpecificHeaderMutationsWins(),
		exact: map[string]*Host{}, clusters: map[string]struct{}{}, upgrades: map[string]bool{},
	}
	comp := &compiler{filter: filter, matchers: matchers, clusters: t.clusters, upgrades: t.upgrades, maxBody: defaultDirectBody}
	if m := c.GetMaxDirectResponseBodySizeBytes(); m != nil {
		comp.maxBody = m.GetValue()
	}
	var err error
	if t.level, err = comp.level(c, ""); err != nil {
		return nil, err
	}
	for i, v := range c.GetVirtualHosts() {
		path := fields.Index("", "virtual_hosts", i)
		host, err := comp.host(v, path)
		if err != nil {
			return nil, err
		}
		if err := t.add(host, v.GetDomains(), path); err != nil {
			return nil, err
		}
	}
	longestFirst := func(a, b wildcard) int { return len(b.text) - len(a.text) }
	slices.SortStableFunc(t.suffixes, longestFirst)
	slices.SortStableFunc(t.prefixes, longestFirst)
	return t, nil
}

// leveled is a message that has header changes and filter configurations.
type leveled interface {
	GetRequestHeadersToAdd() []*corev3.HeaderValueOption
	GetRequestHeadersToRemove() []string
	GetResponseHeadersToAdd() []*corev3.HeaderValueOption
	GetResponseHeadersToRemove() []string
	GetTypedPerFilterConfig() map[string]*anypb.Any
}

func (c *compiler) level(m leveled, path string) (l level, err error) {
	if l.request, err = mutation.Compile(m.GetRequestHeadersToAdd(), m.GetRequestHeadersToRemove(), path, "request_"); err != nil {
		return l, err
	}
	if l.response, err = mutation.Compile(m.GetResponseHeadersToAdd(), m.GetResponseHeadersToRemove(), path, "response_"); err != nil {
		return l, err
	}
	configs := m.GetTypedPerFilterConfig()
	if len(configs) == 0 {
		return l, nil
	}
	l.overrides = make(map[string]Override, len(configs))
	for _, name := range slices.Sorted(maps.Keys(configs)) {
		o, err := c.override(name, configs[name], fields.Key(path, "typed_per_filter_config", name))
		if err != nil {
			return l, err
		}
		l.overrides[name] = o
	}
	return l, nil
}

func (c *compiler) override(name string, config *anypb.Any, path string) (Override, error) {
	var wrapper routev3.FilterConfig
	if config.MessageIs(&wrapper) {
		if err := config.UnmarshalTo(&wrapper); err != nil {
			return Override{}, fmt.Errorf("%s: %w", path, err)
		}
		if wrapper.GetDisabled() {
			return Override{Disabled: true}, nil
		}
		config, path = wrapper.GetConfig(), fields.Join(path, "config")
	}
	if c.filter == nil {
		return Override{}, fields.NotSupported(path)
	}
	compiled, err := c.filter(name, config, path)
	return Override{Config: compiled}, err
}

func (c *compiler) host(v *routev3.VirtualHost, path string) (*Host, error) {
	if err := fields.Only(v, path, "name", "domains", "routes", "request_headers_to_add", "request_headers_to_remove", "response_headers_to_add",
		"response_headers_to_remove", "typed_per_filter_config", "retry_policy", "per_request_buffer_limit_bytes", "request_body_buffer_limit",
		"metadata"); err != nil {
		return nil, err
	}
	h := &Host{name: v.GetName(), routes: make([]*Route, 0, len(v.GetRoutes()))}
	var err error
	if h.level, err = c.level(v, path); err != nil {
		return nil, err
	}
	for i, r := range v.GetRoutes() {
		route, err := c.route(r, v, fields.Index(path, "routes", i))
		if err != nil {
			return nil, err
		}
		h.routes = append(h.routes, route)
	}
	return h, nil
}

func (t *Table) add(h *Host, domains []string, path string) error {
	for i, d := range domains {
		at := fields.Index(path, "domains", i)
		name := strings.ToLower(d)
		taken := false
		switch {
		case name == "":
			return fmt.Errorf("%s: empty", at)
		case name == "*":
			taken, t.any = t.any != nil, h
		case strings.HasPrefix(name, "*"):
			taken, t.suffixes = addWildcard(t.suffixes, wildcard{name[1:], h})
		case strings.HasSuffix(name, "*"):
			taken, t.prefixes = addWildcard(t.prefixes, wildcard{name[:len(name)-1], h})
		default:
			_, taken = t.exact[name]
			t.exact[name] = h
		}
		if taken {
			return fmt.Errorf("%s: %q stands twice", at, d)
		}
	}
	return nil
}

func addWildcard(list []wildcard, w wildcard) (taken bool, _ []wildcard) {
	taken = slices.ContainsFunc(list, func(x wildcard) bool { return x.text == w.text })
	return taken, append(list, w)
}
