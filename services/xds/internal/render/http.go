// SPDX-License-Identifier: Apache-2.0

package render

import (
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	httpinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/envoyconfig"
)

const (
	httpRBAC   = "envoy.filters.http.rbac"
	httpRouter = "envoy.filters.http.router"
	httpName   = "envoy.filters.network.http_connection_manager"
)

// httpListener is the listener of an HTTP filter. It says nothing of the rules, which are in the route configuration named as the filter: an edit of
// them meets the next request of live connections. TLS items are the exception: those connections pass unread or not at all.
func httpListener(s slot, f *policyv1.Filter, o Options) *listenerv3.Listener {
	if f.GetVisibility() {
		return seenListener(s, f, o)
	}
	l := s.frame(f, len(f.GetTls()) > 0)
	l.FilterChains = []*listenerv3.FilterChain{{Name: "http", Filters: []*listenerv3.Filter{networkFilter(httpName, httpManager(s, f, o))}}}
	if len(f.GetTls()) > 0 {
		l.FilterChains = append([]*listenerv3.FilterChain{{
			Name:             "tls",
			FilterChainMatch: &listenerv3.FilterChainMatch{TransportProtocol: "tls"},
			Filters:          tlsFilters(s, f),
		}}, l.FilterChains...)
	}
	return l
}

// seenListener is the listener of what is only seen: it refuses and changes nothing, and what is no HTTP goes on unread.
func seenListener(s slot, f *policyv1.Filter, o Options) *listenerv3.Listener {
	l := s.frame(f, true)
	l.ListenerFilters = append(l.ListenerFilters, listenerFilter("envoy.filters.listener.http_inspector", &httpinspectorv3.HttpInspector{}))
	manager := httpManager(s, f, o)
	manager.NormalizePath, manager.MergeSlashes = wrapperspb.Bool(false), false
	manager.PathWithEscapedSlashesAction = hcmv3.HttpConnectionManager_KEEP_UNCHANGED
	l.FilterChains = []*listenerv3.FilterChain{{
		Name: "http",
		// TLS may name these protocols too.
		FilterChainMatch: &listenerv3.FilterChainMatch{TransportProtocol: "raw_buffer", ApplicationProtocols: []string{"http/1.0", "http/1.1", "h2c"}},
		Filters:          []*listenerv3.Filter{networkFilter(httpName, manager)},
	}}
	l.DefaultFilterChain = &listenerv3.FilterChain{Name: "unread", Filters: tlsFilters(s, f)}
	// Protocols in which the server speaks first wait for nobody.
	l.ListenerFiltersTimeout = durationpb.New(time.Second)
	l.ContinueOnListenerFiltersTimeout = true
	return l
}

func httpManager(s slot, f *policyv1.Filter, o Options) *hcmv3.HttpConnectionManager {
	m := managerBase(s, o)
	m.StatPrefix = "weir"
	m.RouteSpecifier = &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{ConfigSource: envoyconfig.ADS(), RouteConfigName: f.GetKey()}}
	m.HttpFilters = []*hcmv3.HttpFilter{
		// Without the route configuration's rules nothing passes.
		httpFilter(httpRBAC, &httprbacv3.RBAC{Rules: &rbacv3.RBAC{Action: rbacv3.RBAC_ALLOW}}),
		httpFilter(httpRouter, &routerv3.Router{SuppressEnvoyHeaders: true}),
	}
	m.UpgradeConfigs = []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}}
	return m
}

// managerBase is what every connection manager of ours has: it changes as little of a request as can be, but for its path, which is judged in one form
// and sent on in that form.
func managerBase(s slot, o Options) *hcmv3.HttpConnectionManager {
	return &hcmv3.HttpConnectionManager{
		CodecType:                    hcmv3.HttpConnectionManager_AUTO,
		NormalizePath:                wrapperspb.Bool(true),
		MergeSlashes:                 true,
		PathWithEscapedSlashesAction: hcmv3.HttpConnectionManager_UNESCAPE_AND_REDIRECT,
		ServerHeaderTransformation:   hcmv3.HttpConnectionManager_PASS_THROUGH,
		GenerateRequestId:            wrapperspb.Bool(false),
		PreserveExternalRequestId:    true,
		SkipXffAppend:                true,
		HttpProtocolOptions:          &corev3.Http1ProtocolOptions{AcceptHttp_10: true, DefaultHostForHttp_10: "localhost", EnableTrailers: true},
		// Long polls and streams are the application's own affair.
		StreamIdleTimeout:     durationpb.New(0),
		RequestHeadersTimeout: durationpb.New(30 * time.Second),
		LocalReplyConfig:      localReply(),
		AccessLog:             []*accesslogv3.AccessLog{s.httpLog(o)},
		AccessLogOptions:      &hcmv3.HttpConnectionManager_HcmAccessLogOptions{FlushAccessLogOnNewRequest: true},
	}
}

// localReply gives refusals the body that users know.
func localReply() *hcmv3.LocalReplyConfig {
	return &hcmv3.LocalReplyConfig{Mappers: []*hcmv3.ResponseMapper{{
		Filter: &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_StatusCodeFilter{
			StatusCodeFilter: &accesslogv3.StatusCodeFilter{Comparison: &accesslogv3.ComparisonFilter{
				Op:    accesslogv3.ComparisonFilter_EQ,
				Value: &corev3.RuntimeUInt32{DefaultValue: 403, RuntimeKey: "weir.denied_status"},
			}},
		}},
		Body: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: deniedBody}},
	}}}
}

func httpFilter(name string, m proto.Message) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(m)}}
}

// httpRoutes is the route configuration of an HTTP filter: its rules, and what becomes of headers.
func httpRoutes(f *policyv1.Filter) (*routev3.RouteConfiguration, error) {
	routes, err := variants(f.GetHttp())
	if err != nil {
		return nil, err
	}
	return filterRoutes(f.GetKey(), httpRules(f), routes), nil
}

// deniedRoutes refuse everything: what a filter has whose rules could not be rendered.
func deniedRoutes(f *policyv1.Filter) *routev3.RouteConfiguration {
	return filterRoutes(f.GetKey(), &rbacv3.RBAC{Action: rbacv3.RBAC_ALLOW}, []*routev3.Route{passRoute()})
}

func filterRoutes(name string, rules *rbacv3.RBAC, routes []*routev3.Route) *routev3.RouteConfiguration {
	perRoute := pack(&httprbacv3.RBACPerRoute{Rbac: &httprbacv3.RBAC{Rules: rules, ShadowRules: rules}})
	return &routev3.RouteConfiguration{
		Name: name,
		VirtualHosts: []*routev3.VirtualHost{{
			Name: "weir", Domains: []string{"*"}, Routes: routes,
			TypedPerFilterConfig: map[string]*anypb.Any{httpRBAC: perRoute},
		}},
		ValidateClusters: wrapperspb.Bool(false),
	}
}

// passRoute leads every request to where its client wanted to go.
func passRoute() *routev3.Route {
	return &routev3.Route{
		Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
		Action: &routev3.Route_Route{Route: &routev3.RouteAction{
			ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: OriginalDst},
			Timeout:          durationpb.New(0),
		}},
	}
}
