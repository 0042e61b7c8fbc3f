// SPDX-License-Identifier: Apache-2.0

package publish

import (
	"bytes"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	relayv1 "github.com/weirmesh/weir/gen/weir/relay/v1"
)

func TestCodecEqualsProto(t *testing.T) {
	for _, m := range []proto.Message{
		&relayv1.PublishRequest{}, &relayv1.PublishRequest{Batch: []byte{1}}, &relayv1.PublishRequest{Batch: bytes.Repeat([]byte("batch"), 100000)},
		&relayv1.PublishResponse{Epoch: 1, First: 2, Error: "x"},
	} {
		got, err := codec{}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		want, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Materialize(), want) {
			t.Errorf("%T: %d bytes, want %d that are the same", m, got.Len(), len(want))
		}
		back := m.ProtoReflect().New().Interface()
		if err := (codec{}).Unmarshal(mem.BufferSlice{mem.SliceBuffer(want)}, back); err != nil || !proto.Equal(back, m) {
			t.Errorf("%T does not come back: %v", m, err)
		}
	}
	if _, err := (codec{}).Marshal("text"); err == nil {
		t.Error("text was taken")
	}
}
