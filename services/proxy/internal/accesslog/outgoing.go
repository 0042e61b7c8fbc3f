// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"context"
	"fmt"
	"strconv"
	"time"

	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
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

// deliver sends a message, again and again until it went or ctx has ended for a while.
func (o *outgoing) deliver(ctx context.Context, t taken) bool {
	logs := o.logs(t)
	deadline, cancel := afterEnd(ctx, lastFlush)
	defer cancel()
	for {
		if o.try(deadline, logs) {
			o.service.delivered(o.sink, t)
			return true
		}
		wait := time.NewTimer(retry)
		select {
		case <-deadline.Done():
			wait.Stop()
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
func (o *outgoing) try(ctx context.Context, logs []byte) bool {
	message := logs
	if o.stream == nil {
		identifier, err := o.begin(ctx)
		if err != nil {
			o.service.config.Log.Debug("access log has no stream", "error", err)
			return false
		}
		message = append(identifier, logs...)
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
	b, ok := v.([]byte)
	if !ok {
		return nil, fmt.Errorf("access log: %T is not encoded", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
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

// Numbers of StreamAccessLogsMessage.
const (
	messageHTTP, messageTCP protowire.Number = 2, 3
	logEntry                protowire.Number = 1
)

// logs makes a message of some entries; the first one carries the tags.
func (o *outgoing) logs(t taken) []byte {
	w := &encoder{b: make([]byte, 0, int(t.bytes)+128)}
	field := messageHTTP
	if o.sink.stream.tcp {
		field = messageTCP
	}
	outer := w.open(field)
	for i, e := range t.entries {
		if i > 0 {
			w.raw(logEntry, e.encoded)
			continue
		}
		at := w.open(logEntry)
		w.b = append(w.b, e.encoded...)
		// A message that comes twice is one: this adds to the entry's own properties.
		common := w.open(entryCommon)
		w.pair(commonTags, TagSequence, strconv.FormatUint(e.number, 10))
		if t.lost > 0 {
			w.pair(commonTags, TagLost, strconv.FormatUint(t.lost, 10))
		}
		w.close(common)
		w.close(at)
	}
	w.close(outer)
	return w.b
}
