// SPDX-License-Identifier: Apache-2.0

package render

import (
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	networkrbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// tlsListener is the listener of a TLS filter: the server name decides, the rest passes unread.
func tlsListener(s slot, f *policyv1.Filter) *listenerv3.Listener {
	l := s.frame(f, true)
	if f.GetVisibility() {
		l.ListenerFiltersTimeout = durationpb.New(time.Second)
		l.ContinueOnListenerFiltersTimeout = true
	}
	l.FilterChains = []*listenerv3.FilterChain{{Name: "tls", Filters: tlsFilters(s, f)}}
	return l
}

func tlsFilters(s slot, f *policyv1.Filter) []*listenerv3.Filter {
	rules := tlsRules(f)
	return []*listenerv3.Filter{
		networkFilter("envoy.filters.network.rbac", &networkrbacv3.RBAC{Rules: rules, ShadowRules: rules, StatPrefix: "weir"}),
		networkFilter("envoy.filters.network.tcp_proxy", &tcpproxyv3.TcpProxy{
			StatPrefix:       "weir",
			ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: OriginalDst},
			IdleTimeout:      durationpb.New(0),
			AccessLog:        []*accesslogv3.AccessLog{s.tcpLog()},
		}),
	}
}
