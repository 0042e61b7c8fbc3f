// SPDX-License-Identifier: Apache-2.0

package l7bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	grpclogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/grpc/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	resourcev3 "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/internal/spiffe"
)

const (
	node       = "bench"
	logCluster = "weir-access-log"
)

// Weir is a weir-proxy and the server that configures it.
type Weir struct {
	*Process
	cache   cachev3.SnapshotCache
	version int
	server  *grpc.Server
	lines   atomic.Uint64
}

// Rules of the one policy that every request is judged by, if there is one.
const rulePath = "/.*"

// StartWeir starts a weir-proxy with one thread. With rules every request is judged by a policy.
func StartWeir(ctx context.Context, bin, dir string, cpu int, s Shape, rules bool) (*Weir, error) {
	w := &Weir{cache: cachev3.NewSnapshotCache(true, cachev3.IDHash{}, nil)}
	if err := w.Configure(ctx, s, rules); err != nil {
		return nil, err
	}
	files, err := w.serve(ctx, dir)
	if err != nil {
		return nil, err
	}
	args := []string{
		"--node", node, "--xds", files.address, "--tls-cert", files.cert, "--tls-key", files.key, "--tls-ca", files.ca,
		"--socket", filepath.Join(dir, "proxy.sock"), "--admin-listen", "127.0.0.1:0", "--access-log", filepath.Join(dir, "log.sock"),
	}
	if w.Process, err = start(ctx, "weir-proxy", cpu, dir, s.address(), filepath.Join(bin, "weir-proxy"), args...); err != nil {
		w.server.Stop()
		return nil, err
	}
	return w, nil
}

// Stop ends proxy and server.
func (w *Weir) Stop() error {
	err := w.Process.Stop()
	w.server.Stop()
	return err
}

// Lines of the access log that came.
func (w *Weir) Lines() uint64 { return w.lines.Load() }

type served struct{ address, cert, key, ca string }

// serve serves configuration by mutual TLS, and takes access logs on a socket.
func (w *Weir) serve(ctx context.Context, dir string) (served, error) {
	ca, err := spiffe.NewCA("weir.bench")
	if err != nil {
		return served{}, err
	}
	files := served{cert: filepath.Join(dir, "proxy.crt"), key: filepath.Join(dir, "proxy.key"), ca: filepath.Join(dir, "ca.crt")}
	issue := func(id spiffe.ID, cert, key string) error {
		c, k, err := ca.Issue(id, time.Hour)
		return errors.Join(err, os.WriteFile(cert, c, 0o600), os.WriteFile(key, k, 0o600))
	}
	err = errors.Join(os.WriteFile(files.ca, ca.CertPEM(), 0o600),
		issue(spiffe.ID{TrustDomain: "weir.bench", Service: "proxy", Node: node}, files.cert, files.key),
		issue(spiffe.ID{TrustDomain: "weir.bench", Service: "xds"}, filepath.Join(dir, "xds.crt"), filepath.Join(dir, "xds.key")))
	if err != nil {
		return served{}, err
	}
	source, err := spiffe.Load(spiffe.Files{Cert: filepath.Join(dir, "xds.crt"), Key: filepath.Join(dir, "xds.key"), CA: files.ca})
	if err != nil {
		return served{}, err
	}
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return served{}, fmt.Errorf("serve configuration: %w", err)
	}
	files.address = listener.Addr().String()
	w.server = grpc.NewServer(grpc.Creds(source.ServerCredentials()), grpc.MaxSendMsgSize(256<<20))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(w.server, serverv3.NewServer(ctx, w.cache, nil))
	go func() { _ = w.server.Serve(listener) }() // ends with Stop
	logs, err := lc.Listen(ctx, "unix", filepath.Join(dir, "log.sock"))
	if err != nil {
		return served{}, fmt.Errorf("take access logs: %w", err)
	}
	taker := grpc.NewServer()
	alsv3.RegisterAccessLogServiceServer(taker, logTaker{&w.lines})
	go func() { _ = taker.Serve(logs) }()
	context.AfterFunc(ctx, taker.Stop)
	return files, nil
}

type logTaker struct{ lines *atomic.Uint64 }

// StreamAccessLogs counts.
func (l logTaker) StreamAccessLogs(stream alsv3.AccessLogService_StreamAccessLogsServer) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		l.lines.Add(uint64(len(m.GetHttpLogs().GetLogEntry())))
	}
}

// Configure changes the proxy's configuration.
func (w *Weir) Configure(ctx context.Context, s Shape, rules bool) error {
	w.version++
	clusters := []types.Resource{staticCluster("origin", tcpAddress(s.Origin), false)}
	if s.Log {
		clusters = append(clusters, staticCluster(logCluster, &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: s.logPath()}}}, true))
	}
	var listeners []types.Resource
	for _, port := range s.ports() {
		l, err := listener(port, s, rules)
		if err != nil {
			return err
		}
		listeners = append(listeners, l)
	}
	snapshot, err := cachev3.NewSnapshot(strconv.Itoa(w.version), map[resourcev3.Type][]types.Resource{
		resourcev3.ClusterType: clusters, resourcev3.ListenerType: listeners, resourcev3.RouteType: {routes(s)},
	})
	if err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	return w.cache.SetSnapshot(ctx, node, snapshot)
}

// logPath is the access log's socket.
func (s Shape) logPath() string { return filepath.Join(s.Dir, "log.sock") }

func tcpAddress(address string) *corev3.Address {
	host, port, _ := net.SplitHostPort(address)
	n, _ := strconv.Atoi(port)
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: host, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(n)},
	}}}
}

func staticCluster(name string, address *corev3.Address, http2 bool) *clusterv3.Cluster {
	c := &clusterv3.Cluster{
		Name: name, ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}, ConnectTimeout: durationpb.New(5 * time.Second),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: address}}}},
		}}},
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxConnections: wrapperspb.UInt32(20000), MaxPendingRequests: wrapperspb.UInt32(20000), MaxRequests: wrapperspb.UInt32(20000),
		}}},
	}
	if http2 {
		options := must(&httpv3.HttpProtocolOptions{UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{
			ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &corev3.Http2ProtocolOptions{}},
			},
		}})
		c.TypedExtensionProtocolOptions = map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}
	}
	return c
}

// must packs a message that this package made; it cannot fail.
func must(m proto.Message) *anypb.Any {
	a, err := anypb.New(m)
	if err != nil {
		panic(err)
	}
	return a
}

func routes(s Shape) *routev3.RouteConfiguration {
	to := &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: "origin"}, Timeout: durationpb.New(0)}}
	host := &routev3.VirtualHost{Name: "all", Domains: []string{"*"}}
	for i := range s.Routes {
		host.Routes = append(host.Routes, &routev3.Route{
			Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: fmt.Sprintf("/route/%d/", i)}}, Action: to,
		})
	}
	host.Routes = append(host.Routes, &routev3.Route{Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}}, Action: to})
	return &routev3.RouteConfiguration{Name: "routes", VirtualHosts: []*routev3.VirtualHost{host}}
}

func listener(port int, s Shape, rules bool) (*listenerv3.Listener, error) {
	manager := &hcmv3.HttpConnectionManager{
		StatPrefix: "bench", CodecType: hcmv3.HttpConnectionManager_AUTO,
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
			RouteConfigName: "routes", ConfigSource: &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3, ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}},
		}},
		NormalizePath: wrapperspb.Bool(true), MergeSlashes: true, ServerHeaderTransformation: hcmv3.HttpConnectionManager_PASS_THROUGH,
		GenerateRequestId: wrapperspb.Bool(false), SkipXffAppend: true,
	}
	if rules {
		manager.HttpFilters = append(manager.HttpFilters, &hcmv3.HttpFilter{Name: "envoy.filters.http.rbac", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: must(rule())}})
	}
	manager.HttpFilters = append(manager.HttpFilters, &hcmv3.HttpFilter{
		Name: "envoy.filters.http.router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: must(&routerv3.Router{SuppressEnvoyHeaders: true})},
	})
	if s.Log {
		manager.AccessLog = []*accesslogv3.AccessLog{{Name: "envoy.access_loggers.http_grpc", ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: must(&grpclogv3.HttpGrpcAccessLogConfig{
			CommonConfig: &grpclogv3.CommonGrpcAccessLogConfig{
				LogName: "slot-" + strconv.Itoa(port), TransportApiVersion: corev3.ApiVersion_V3,
				GrpcService: &corev3.GrpcService{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: logCluster}}},
			},
		})}}}
		manager.AccessLogOptions = &hcmv3.HttpConnectionManager_HcmAccessLogOptions{FlushAccessLogOnNewRequest: true}
	}
	packed, err := anypb.New(manager)
	if err != nil {
		return nil, fmt.Errorf("configure: %w", err)
	}
	return &listenerv3.Listener{
		Name: "slot-" + strconv.Itoa(port), Address: tcpAddress("127.0.0.1:" + strconv.Itoa(port)),
		FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{{
			Name: "envoy.filters.network.http_connection_manager", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: packed},
		}}}},
	}, nil
}

func rule() *rbacv3.RBAC {
	path := &rbacconfigv3.Permission{Rule: &rbacconfigv3.Permission_UrlPath{UrlPath: &matcherv3.PathMatcher{Rule: &matcherv3.PathMatcher_Path{
		Path: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: rulePath}}},
	}}}}
	method := &rbacconfigv3.Permission{Rule: &rbacconfigv3.Permission_Header{Header: &routev3.HeaderMatcher{
		Name: ":method", HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: "GET|HEAD"}}}},
	}}}
	both := &rbacconfigv3.Permission{Rule: &rbacconfigv3.Permission_AndRules{AndRules: &rbacconfigv3.Permission_Set{Rules: []*rbacconfigv3.Permission{method, path}}}}
	return &rbacv3.RBAC{Rules: &rbacconfigv3.RBAC{Action: rbacconfigv3.RBAC_ALLOW, Policies: map[string]*rbacconfigv3.Policy{
		"bench/rule/ingress[0]#0": {
			Permissions: []*rbacconfigv3.Permission{both},
			Principals:  []*rbacconfigv3.Principal{{Identifier: &rbacconfigv3.Principal_Any{Any: true}}},
		},
	}}}
}
