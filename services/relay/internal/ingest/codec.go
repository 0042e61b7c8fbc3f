// SPDX-License-Identifier: Apache-2.0

package ingest

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that Codec extends
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	relayv1 "github.com/weirmesh/weir/gen/weir/relay/v1"
)

// requestBatch is the field number of PublishRequest.batch; a test compares it with the descriptor.
const requestBatch protowire.Number = 1

// Codec is the protobuf codec of gRPC, except that a PublishRequest's batch is not copied out of the
// received message: copying and clearing memory is most of what a relay does.
type Codec struct{ encoding.CodecV2 }

// NewCodec makes the codec.
func NewCodec() Codec { return Codec{encoding.GetCodecV2("proto")} }

// Unmarshal implements encoding.CodecV2.
func (c Codec) Unmarshal(data mem.BufferSlice, v any) error {
	request, ok := v.(*relayv1.PublishRequest)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	raw := data.Materialize()
	request.Reset()
	for len(raw) > 0 {
		number, typ, n := protowire.ConsumeTag(raw)
		if n < 0 {
			return fmt.Errorf("publish request: %w", protowire.ParseError(n))
		}
		raw = raw[n:]
		if number == requestBatch && typ == protowire.BytesType {
			value, n := protowire.ConsumeBytes(raw)
			if n < 0 {
				return fmt.Errorf("publish request: %w", protowire.ParseError(n))
			}
			request.Batch = value[:len(value):len(value)]
			raw = raw[n:]
			continue
		}
		n = protowire.ConsumeFieldValue(number, typ, raw)
		if n < 0 {
			return fmt.Errorf("publish request: %w", protowire.ParseError(n))
		}
		raw = raw[n:]
	}
	return nil
}
