// SPDX-License-Identifier: Apache-2.0

package render

import (
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	httpoptionsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/internal/envoyconfig"
)

const httpOptions = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

// upstreamBinding takes source ports of the range that pods leave free: IP_LOCAL_PORT_RANGE.
func upstreamBinding() *corev3.BindConfig {
	return &corev3.BindConfig{SocketOptions: []*corev3.SocketOption{{
		Description: "IP_LOCAL_PORT_RANGE",
		Level:       0, Name: 51,
		Value: &corev3.SocketOption_IntValue{IntValue: upstreamPortMax<<16 | upstreamPortMin},
		State: corev3.SocketOption_STATE_PREBIND,
	}}}
}

// asDownstream speaks upstream what the client speaks.
func asDownstream() *anypb.Any {
	return pack(&httpoptionsv3.HttpProtocolOptions{
		UpstreamProtocolOptions: &httpoptionsv3.HttpProtocolOptions_UseDownstreamProtocolConfig{
			UseDownstreamProtocolConfig: &httpoptionsv3.HttpProtocolOptions_UseDownstreamHttpConfig{
				HttpProtocolOptions:  &corev3.Http1ProtocolOptions{EnableTrailers: true},
				Http2ProtocolOptions: &corev3.Http2ProtocolOptions{},
			},
		},
	})
}

// wide are thresholds that no honest load meets: limits are the tenants' (per namespace), not one for the whole node.
func wide() *clusterv3.CircuitBreakers {
	const many = 1 << 20
	var all []*clusterv3.CircuitBreakers_Thresholds
	for _, priority := range []corev3.RoutingPriority{corev3.RoutingPriority_DEFAULT, corev3.RoutingPriority_HIGH} {
		all = append(all, &clusterv3.CircuitBreakers_Thresholds{
			Priority: priority, MaxConnections: wrapperspb.UInt32(many), MaxPendingRequests: wrapperspb.UInt32(many), MaxRequests: wrapperspb.UInt32(many),
			RetryBudget: &clusterv3.CircuitBreakers_Thresholds_RetryBudget{
				BudgetPercent: &typev3.Percent{Value: 20}, MinRetryConcurrency: wrapperspb.UInt32(3),
			},
		})
	}
	return &clusterv3.CircuitBreakers{Thresholds: all}
}

// originalDst leads connections to where their clients wanted to go; no connection serves two of them.
func originalDst() *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                                  OriginalDst,
		ClusterDiscoveryType:                  &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST},
		LbPolicy:                              clusterv3.Cluster_CLUSTER_PROVIDED,
		ConnectTimeout:                        durationpb.New(10 * time.Second),
		CleanupInterval:                       durationpb.New(time.Minute),
		CircuitBreakers:                       wide(),
		TypedExtensionProtocolOptions:         map[string]*anypb.Any{httpOptions: asDownstream()},
		UpstreamBindConfig:                    upstreamBinding(),
		ConnectionPoolPerDownstreamConnection: true,
	}
}

// DefaultAccessLogPath is where the access-log service is of a proxy that does not say.
const DefaultAccessLogPath = "/run/weir/accesslog.sock"

// AccessLogCluster is the cluster of the node's access-log service. Its path is the proxy's own to say: it comes with the node's metadata.
func AccessLogCluster(path string) (*Resource, error) {
	if path == "" {
		path = DefaultAccessLogPath
	}
	return newResource("", "", &clusterv3.Cluster{
		Name:                 AccessLog,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(time.Second),
		TypedExtensionProtocolOptions: map[string]*anypb.Any{httpOptions: pack(&httpoptionsv3.HttpProtocolOptions{
			UpstreamProtocolOptions: &httpoptionsv3.HttpProtocolOptions_ExplicitHttpConfig_{
				ExplicitHttpConfig: &httpoptionsv3.HttpProtocolOptions_ExplicitHttpConfig{
					ProtocolConfig: &httpoptionsv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
						Http2ProtocolOptions: &corev3.Http2ProtocolOptions{},
					},
				},
			},
		})},
		LoadAssignment: &endpointv3.ClusterLoadAssignment{
			ClusterName: AccessLog,
			Endpoints: []*endpointv3.LocalityLbEndpoints{{LbEndpoints: []*endpointv3.LbEndpoint{{
				HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
					Address: &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: path}}},
				}},
			}}}},
		},
	})
}

// serviceCluster is the cluster of a service that a route names without saying more of it.
func serviceCluster(name string) *clusterv3.Cluster {
	c := &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: envoyconfig.ADS(), ServiceName: name},
		ConnectTimeout:       durationpb.New(5 * time.Second),
		CircuitBreakers:      wide(),
	}
	completeCluster(c)
	return c
}

// completeCluster adds what every cluster of a service needs on a node.
func completeCluster(c *clusterv3.Cluster) {
	c.UpstreamBindConfig = upstreamBinding()
	if len(c.GetTypedExtensionProtocolOptions()) == 0 {
		c.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpOptions: asDownstream()}
	}
}
