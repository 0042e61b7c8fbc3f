// SPDX-License-Identifier: Apache-2.0

package ingest

import (
	"bytes"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	relayv1 "github.com/weirmesh/weir/gen/weir/relay/v1"
)

func TestCodec(t *testing.T) {
	c := NewCodec()
	for _, want := range []proto.Message{&relayv1.PublishRequest{Batch: []byte("batch")}, &relayv1.PublishRequest{}, &relayv1.PublishResponse{Epoch: 7, Error: "x"}} {
		data, err := c.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		got := proto.Clone(want)
		proto.Reset(got)
		if err := c.Unmarshal(data, got); err != nil || !proto.Equal(want, got) {
			t.Errorf("%v became %v, %v", want, got, err)
		}
	}
	if n := (&relayv1.PublishRequest{}).ProtoReflect().Descriptor().Fields().ByName("batch").Number(); n != requestBatch {
		t.Errorf("the batch is field %d", n)
	}
}

// FuzzCodec: the request is refused, or is what the library reads.
func FuzzCodec(f *testing.F) {
	f.Add([]byte{0x0a, 0x01, 'x'})
	f.Add([]byte{0x0a, 0x01, 'x', 0x10, 0x05})
	f.Fuzz(func(t *testing.T, data []byte) {
		var got, want relayv1.PublishRequest
		err := NewCodec().Unmarshal(mem.BufferSlice{mem.SliceBuffer(bytes.Clone(data))}, &got)
		if proto.Unmarshal(data, &want) != nil {
			return // the library looks into more, such as overlong tags
		}
		if err != nil || !bytes.Equal(got.GetBatch(), want.GetBatch()) {
			t.Fatalf("got %q, %v; the library reads %q", got.GetBatch(), err, want.GetBatch())
		}
	})
}
