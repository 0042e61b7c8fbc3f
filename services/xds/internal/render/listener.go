// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	grpclogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/grpc/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	originalsrcv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_src/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// slot is a listener's place on a node.
type slot struct {
	number, port uint32
}

func (s slot) name() string { return fmt.Sprintf("slot-%d", s.number) }

// slotOf checks what an agent reported.
func slotOf(s *policyv1.Slot) (slot, error) {
	if s.GetNumber() < 1 || s.GetNumber() > maxSlot {
		return slot{}, fmt.Errorf("slot %d is not 1 to %d", s.GetNumber(), maxSlot)
	}
	if s.GetPort() != proxyPortBase+s.GetNumber() {
		return slot{}, fmt.Errorf("slot %d has port %d, not %d", s.GetNumber(), s.GetPort(), proxyPortBase+s.GetNumber())
	}
	return slot{number: s.GetNumber(), port: s.GetPort()}, nil
}

// frame is a slot's listener without its filter chains.
func (s slot) frame(f *policyv1.Filter, inspectTLS bool) *listenerv3.Listener {
	mark := uint32(markEgress)
	switch {
	case f.GetKind() == policyv1.FilterKind_FILTER_KIND_ROUTE:
		mark = markRoute
	case f.GetDirection() == policyv1.Direction_DIRECTION_INGRESS:
		mark = markIngress
	}
	l := &listenerv3.Listener{
		Name:                s.name(),
		Address:             address("127.0.0.1", s.port),
		AdditionalAddresses: []*listenerv3.AdditionalAddress{{Address: address("::1", s.port)}},
		Transparent:         wrapperspb.Bool(true),
		Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"weir": {Fields: map[string]*structpb.Value{
			"namespace": structpb.NewStringValue(f.GetNamespace()),
			"filter":    structpb.NewStringValue(f.GetKey()),
		}}}},
	}
	if f.GetKind() != policyv1.FilterKind_FILTER_KIND_ROUTE {
		// The cluster `original-dst` reads the address that this filter restores; of a transparent socket it is the socket's own.
		l.ListenerFilters = append(l.ListenerFilters, listenerFilter("envoy.filters.listener.original_dst", &originaldstv3.OriginalDst{}))
	}
	l.ListenerFilters = append(l.ListenerFilters, listenerFilter("envoy.filters.listener.original_src", &originalsrcv3.OriginalSrc{Mark: mark}))
	if inspectTLS {
		l.ListenerFilters = append(l.ListenerFilters, listenerFilter("envoy.filters.listener.tls_inspector", &tlsinspectorv3.TlsInspector{}))
	}
	return l
}

func listenerFilter(name string, m proto.Message) *listenerv3.ListenerFilter {
	return &listenerv3.ListenerFilter{Name: name, ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: pack(m)}}
}

func networkFilter(name string, m proto.Message) *listenerv3.Filter {
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: pack(m)}}
}

func address(ip string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

// pack is only for messages made here: they have no invalid text, the one thing that does not marshal.
func pack(m proto.Message) *anypb.Any {
	a := &anypb.Any{}
	if err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		panic(fmt.Sprintf("pack %s: %v", m.ProtoReflect().Descriptor().FullName(), err)) // guarded where a filter is rendered
	}
	return a
}

// logConfig is where a listener's access log goes.
func (s slot) logConfig() *grpclogv3.CommonGrpcAccessLogConfig {
	return &grpclogv3.CommonGrpcAccessLogConfig{
		LogName: s.name(),
		GrpcService: &corev3.GrpcService{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
			EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: AccessLog},
		}},
		TransportApiVersion: corev3.ApiVersion_V3,
		BufferFlushInterval: durationpb.New(100e6),
		BufferSizeBytes:     wrapperspb.UInt32(16 << 10),
	}
}

func (s slot) httpLog(o Options) *accesslogv3.AccessLog {
	return &accesslogv3.AccessLog{
		Name: "envoy.access_loggers.http_grpc",
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: pack(&grpclogv3.HttpGrpcAccessLogConfig{
			CommonConfig:                    s.logConfig(),
			AdditionalRequestHeadersToLog:   o.RequestHeaders,
			AdditionalResponseHeadersToLog:  o.ResponseHeaders,
			AdditionalResponseTrailersToLog: []string{"grpc-status", "grpc-message"},
		})},
	}
}

func (s slot) tcpLog() *accesslogv3.AccessLog {
	return &accesslogv3.AccessLog{
		Name: "envoy.access_loggers.tcp_grpc",
		ConfigType: &accesslogv3.AccessLog_TypedConfig{
			TypedConfig: pack(&grpclogv3.TcpGrpcAccessLogConfig{CommonConfig: s.logConfig()}),
		},
	}
}
