// SPDX-License-Identifier: Apache-2.0

// Package wire sends messages that are already encoded: the observer's answers are assembled from
// the bytes that the agents sealed, without decoding a flow.
package wire

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that Codec extends
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// Raw is an encoded message. It must not change after it was sent.
type Raw []byte

// Codec is the protobuf codec of gRPC, except that it sends a *Raw as it is.
type Codec struct{ proto encoding.CodecV2 }

// NewCodec makes the codec.
func NewCodec() Codec { return Codec{proto: encoding.GetCodecV2("proto")} }

// Name implements encoding.CodecV2.
func (Codec) Name() string { return "proto" }

// Marshal implements encoding.CodecV2.
func (c Codec) Marshal(v any) (mem.BufferSlice, error) {
	if raw, ok := v.(*Raw); ok {
		return mem.BufferSlice{mem.SliceBuffer(*raw)}, nil
	}
	return c.proto.Marshal(v)
}

// Unmarshal implements encoding.CodecV2.
func (c Codec) Unmarshal(data mem.BufferSlice, v any) error {
	if _, ok := v.(*Raw); ok {
		return fmt.Errorf("unmarshal into %T", v)
	}
	return c.proto.Unmarshal(data, v)
}

// Field numbers; a test compares them with the descriptors.
const (
	responseFlow     protowire.Number = 1    // observer.GetFlowsResponse
	responseNodeName protowire.Number = 1000 // also of GetAgentEventsResponse
	responseTime     protowire.Number = 1001
	responseAgent    protowire.Number = 1      // observer.GetAgentEventsResponse
	itemResponse     protowire.Number = 1      // weir.observer.v1.GetFlowsResponse
	flowExtensions   protowire.Number = 150000 // flow.Flow
	anyURL           protowire.Number = 1
	anyValue         protowire.Number = 2
	timeSeconds      protowire.Number = 1
	timeNanos        protowire.Number = 2
)

// statsURL is the type of the extension.
const statsURL = "type.googleapis.com/weir.observer.v1.FlowStats"

// Envelope is what a response carries besides its item; empty name and zero time = left out.
type Envelope struct {
	NodeName string
	// Time is Unix nanoseconds.
	Time int64
}

// AppendFlowResponse appends an encoded observer.GetFlowsResponse of an encoded flow.
func AppendFlowResponse(dst, flow []byte, e Envelope) []byte {
	dst = protowire.AppendTag(dst, responseFlow, protowire.BytesType)
	dst = protowire.AppendBytes(dst, flow)
	return appendEnvelope(dst, e)
}

// AppendAgentEventResponse appends an encoded observer.GetAgentEventsResponse.
func AppendAgentEventResponse(dst, agentEvent []byte, e Envelope) []byte {
	dst = protowire.AppendTag(dst, responseAgent, protowire.BytesType)
	dst = protowire.AppendBytes(dst, agentEvent)
	return appendEnvelope(dst, e)
}

// AppendWeirResponse appends an encoded weir.observer.v1.GetFlowsResponse of an encoded flow; stats,
// if any, become the flow's extension.
func AppendWeirResponse(dst, flow, stats []byte, e Envelope) []byte {
	flowLen := len(flow)
	anyLen := 0
	if len(stats) > 0 {
		anyLen = protowire.SizeTag(anyURL) + protowire.SizeBytes(len(statsURL)) + protowire.SizeTag(anyValue) + protowire.SizeBytes(len(stats))
		flowLen += protowire.SizeTag(flowExtensions) + protowire.SizeBytes(anyLen)
	}
	inner := protowire.SizeTag(responseFlow) + protowire.SizeBytes(flowLen) + sizeEnvelope(e)
	dst = protowire.AppendTag(dst, itemResponse, protowire.BytesType)
	dst = protowire.AppendVarint(dst, uint64(inner))
	dst = protowire.AppendTag(dst, responseFlow, protowire.BytesType)
	dst = protowire.AppendVarint(dst, uint64(flowLen))
	dst = append(dst, flow...)
	if len(stats) > 0 {
		dst = protowire.AppendTag(dst, flowExtensions, protowire.BytesType)
		dst = protowire.AppendVarint(dst, uint64(anyLen))
		dst = protowire.AppendTag(dst, anyURL, protowire.BytesType)
		dst = protowire.AppendString(dst, statsURL)
		dst = protowire.AppendTag(dst, anyValue, protowire.BytesType)
		dst = protowire.AppendBytes(dst, stats)
	}
	return appendEnvelope(dst, e)
}

func appendEnvelope(dst []byte, e Envelope) []byte {
	if e.NodeName != "" {
		dst = protowire.AppendTag(dst, responseNodeName, protowire.BytesType)
		dst = protowire.AppendString(dst, e.NodeName)
	}
	if e.Time != 0 {
		seconds, nanos := split(e.Time)
		dst = protowire.AppendTag(dst, responseTime, protowire.BytesType)
		dst = protowire.AppendVarint(dst, uint64(sizeTime(seconds, nanos)))
		if seconds != 0 {
			dst = protowire.AppendTag(dst, timeSeconds, protowire.VarintType)
			dst = protowire.AppendVarint(dst, uint64(seconds))
		}
		if nanos != 0 {
			dst = protowire.AppendTag(dst, timeNanos, protowire.VarintType)
			dst = protowire.AppendVarint(dst, uint64(nanos))
		}
	}
	return dst
}

func sizeEnvelope(e Envelope) int {
	n := 0
	if e.NodeName != "" {
		n += protowire.SizeTag(responseNodeName) + protowire.SizeBytes(len(e.NodeName))
	}
	if e.Time != 0 {
		n += protowire.SizeTag(responseTime) + protowire.SizeBytes(sizeTime(split(e.Time)))
	}
	return n
}

func sizeTime(seconds, nanos int64) int {
	n := 0
	if seconds != 0 {
		n += protowire.SizeTag(timeSeconds) + protowire.SizeVarint(uint64(seconds))
	}
	if nanos != 0 {
		n += protowire.SizeTag(timeNanos) + protowire.SizeVarint(uint64(nanos))
	}
	return n
}

// split returns Unix nanoseconds as a Timestamp has them: nanos are never negative.
func split(t int64) (seconds, nanos int64) {
	seconds, nanos = t/1e9, t%1e9
	if nanos < 0 {
		seconds, nanos = seconds-1, nanos+1e9
	}
	return seconds, nanos
}

// Arena hands out memory for messages in large pieces, since one allocation for each would be most
// of what sending costs. A piece is never reused: it goes when its last message was sent.
type Arena struct{ free []byte }

const arenaPiece = 32 << 10

// Room returns an empty slice with room for n bytes; append to it, then call Take.
func (a *Arena) Room(n int) []byte {
	if cap(a.free)-len(a.free) < n {
		a.free = make([]byte, 0, max(arenaPiece, n))
	}
	return a.free[len(a.free):]
}

// Take keeps what was appended to the last Room.
func (a *Arena) Take(message []byte) Raw {
	if cap(a.free)-len(a.free) >= len(message) {
		a.free = a.free[:len(a.free)+len(message)]
	}
	return Raw(message[:len(message):len(message)])
}
