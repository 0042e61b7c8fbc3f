// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that Codec extends
	"google.golang.org/grpc/mem"
)

// window is what a proxy may have sent ahead of our reading. With the 64 KiB that gRPC begins with, a busy node's proxy waited more for windows than for us.
const window = 1 << 20

// ServerOptions are what a gRPC server must be made with on which a Server is registered.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(codec{encoding.GetCodecV2("proto")}), grpc.InitialWindowSize(window), grpc.InitialConnWindowSize(window),
	}
}

// Register serves AccessLogService, whose messages come here as bytes.
func (s *Server) Register(on grpc.ServiceRegistrar) {
	generated := accesslogv3.AccessLogService_ServiceDesc
	on.RegisterService(&grpc.ServiceDesc{
		ServiceName: generated.ServiceName, Metadata: generated.Metadata, HandlerType: (*handler)(nil),
		Streams: []grpc.StreamDesc{{
			StreamName: generated.Streams[0].StreamName, ClientStreams: true,
			Handler: func(server any, g grpc.ServerStream) error { return server.(handler).streamAccessLogs(g) },
		}},
	}, s)
}

type handler interface {
	streamAccessLogs(g grpc.ServerStream) error
}

// message is an encoded StreamAccessLogsMessage; who received it frees it.
type message struct{ mem.Buffer }

// codec is gRPC's proto codec, except for messages.
type codec struct{ encoding.CodecV2 }

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(*message)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	m.Buffer = data.MaterializeToBuffer(mem.DefaultBufferPool())
	return nil
}
