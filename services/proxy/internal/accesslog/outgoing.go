// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"context"
	"fmt"
	"time"

	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
)

// outgoing is the stream of one sink.
type outgoing struct {
	service *Service
	sink    *sink
	stream  grpc.ClientStream
	cancel  context.CancelFunc
}

// retry is how soon a stream that broke is made again.
const retry = 100 * time.Millisecond

// deliver sends a message, again and again until it went or ctx has ended for a while: then its entries are lost.
func (o *outgoing) deliver(ctx context.Context, c *chunk) bool {
	entries := uint64(c.count) //nolint:gosec // not negative
	defer o.service.release(o.sink, c.size)
	message := c.message(o.sink.stream.tcp)
	defer message.Free()
	deadline, cancel := afterEnd(ctx, lastFlush)
	defer cancel()
	for {
		if o.try(deadline, message) {
			o.service.sent.Add(entries)
			return true
		}
		wait := time.NewTimer(retry)
		select {
		case <-deadline.Done():
			wait.Stop()
			o.service.config.Lost(entries)
			return false
		case <-wait.C:
		}
	}
}

// afterEnd returns a context that ends some time after another did.
func afterEnd(ctx context.Context, grace time.Duration) (context.Context, context.CancelFunc) {
	later, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(grace, cancel) })
	return later, func() { stop(); cancel() }
}

// try makes the stream if there is none, and sends.
func (o *outgoing) try(ctx context.Context, logs mem.Buffer) bool {
	message := mem.BufferSlice{logs}
	if o.stream == nil {
		identifier, err := o.begin(ctx)
		if err != nil {
			o.service.config.Log.Debug("access log has no stream", "error", err)
			return false
		}
		message = mem.BufferSlice{mem.SliceBuffer(identifier), logs}
	}
	stop := context.AfterFunc(ctx, o.cancel)
	err := o.stream.SendMsg(message)
	stop()
	if err != nil {
		o.cancel()
		o.stream = nil
		return false
	}
	return true
}

// begin makes the stream, and returns what its first message begins with.
func (o *outgoing) begin(ctx context.Context) ([]byte, error) {
	conn, err := o.service.conn(o.sink.stream.cluster)
	if err != nil {
		return nil, err
	}
	identifier, err := proto.Marshal(&alsv3.StreamAccessLogsMessage{
		Identifier: &alsv3.StreamAccessLogsMessage_Identifier{Node: o.service.config.Node, LogName: o.sink.stream.name},
	})
	if err != nil {
		return nil, err
	}
	// The stream lives longer than this call: it ends by close.
	streamCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, cancel)
	stream, err := conn.NewStream(streamCtx, &alsv3.AccessLogService_ServiceDesc.Streams[0],
		alsv3.AccessLogService_StreamAccessLogs_FullMethodName, grpc.WaitForReady(true), grpc.ForceCodecV2(codec{}))
	if err == nil && !stop() {
		err = ctx.Err()
	}
	if err != nil {
		cancel()
		return nil, err
	}
	o.stream, o.cancel = stream, cancel
	return identifier, nil
}

// codec passes on what is encoded already. The answer, which comes at the end and says nothing, is not looked at.
type codec struct{}

// Marshal implements encoding.CodecV2.
func (codec) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.(mem.BufferSlice)
	if !ok {
		return nil, fmt.Errorf("access log: %T is not encoded", v)
	}
	b.Ref() // gRPC frees it, and who sends it may send it again
	return b, nil
}

// Unmarshal implements encoding.CodecV2.
func (codec) Unmarshal(mem.BufferSlice, any) error { return nil }

// Name implements encoding.CodecV2.
func (codec) Name() string { return "proto" }

// close ends the stream; what was sent has time to arrive.
func (o *outgoing) close() {
	if o.stream == nil {
		return
	}
	defer o.cancel()
	timer := time.AfterFunc(lastFlush, o.cancel)
	defer timer.Stop()
	err := o.stream.CloseSend()
	if err == nil {
		err = o.stream.RecvMsg(nil)
	}
	if err != nil {
		o.service.config.Log.Debug("access log stream ended", "error", err)
	}
}
