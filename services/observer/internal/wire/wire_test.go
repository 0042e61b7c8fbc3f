// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	"github.com/weirmesh/weir/services/observer/internal/testflow"
)

func encode(t testing.TB, m proto.Message) []byte {
	t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestAssembled: what is assembled by hand is what the library would have encoded.
func TestAssembled(t *testing.T) {
	f := testflow.Flow("node-1", 1, testflow.Base)
	stats := &observerv1.FlowStats{Connection: 7, Final: true}
	extended := proto.Clone(f).(*flow.Flow)
	var err error
	if extended.Extensions, err = anypb.New(stats); err != nil {
		t.Fatal(err)
	}
	agentEvent := &flow.AgentEvent{Type: flow.AgentEventType_AGENT_STARTED}
	times := []int64{0, 1, testflow.Base.UnixNano(), testflow.Base.UnixNano() + 123456789, 5e9, -1, -5e9, math.MaxInt64, math.MinInt64}
	for _, at := range times {
		for _, name := range []string{"", "default/node-1"} {
			var stamp *timestamppb.Timestamp
			if at != 0 {
				stamp = timestamppb.New(time.Unix(0, at))
			}
			e := Envelope{NodeName: name, Time: at}
			response := func(f *flow.Flow) *observer.GetFlowsResponse {
				return &observer.GetFlowsResponse{ResponseTypes: &observer.GetFlowsResponse_Flow{Flow: f}, NodeName: name, Time: stamp}
			}
			for _, tt := range []struct {
				what string
				data []byte
				got  proto.Message
				want proto.Message
			}{
				{"flow", AppendFlowResponse(nil, encode(t, f), e), &observer.GetFlowsResponse{}, response(f)},
				{"empty flow", AppendFlowResponse(nil, nil, e), &observer.GetFlowsResponse{}, response(&flow.Flow{})},
				{"agent event", AppendAgentEventResponse(nil, encode(t, agentEvent), e), &observer.GetAgentEventsResponse{},
					&observer.GetAgentEventsResponse{AgentEvent: agentEvent, NodeName: name, Time: stamp}},
				{"our own", AppendWeirResponse(nil, encode(t, f), encode(t, stats), e), &observerv1.GetFlowsResponse{},
					&observerv1.GetFlowsResponse{Item: &observerv1.GetFlowsResponse_Response{Response: response(extended)}}},
				{"our own, no statistics", AppendWeirResponse(nil, encode(t, f), nil, e), &observerv1.GetFlowsResponse{},
					&observerv1.GetFlowsResponse{Item: &observerv1.GetFlowsResponse_Response{Response: response(f)}}},
			} {
				if err := proto.Unmarshal(tt.data, tt.got); err != nil {
					t.Errorf("%s at %d: %v", tt.what, at, err)
					continue
				}
				if diff := cmp.Diff(tt.want, tt.got, protocmp.Transform()); diff != "" {
					t.Errorf("%s at %d (-want +got):\n%s", tt.what, at, diff)
				}
			}
		}
	}
}

func TestCodec(t *testing.T) {
	c := NewCodec()
	want := &observer.ServerStatusResponse{NumFlows: 7}
	raw := Raw(encode(t, want))
	for _, v := range []any{want, &raw} {
		data, err := c.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		got := &observer.ServerStatusResponse{}
		if err := c.Unmarshal(mem.BufferSlice{mem.SliceBuffer(data.Materialize())}, got); err != nil || !proto.Equal(want, got) {
			t.Errorf("%T: %v, %v", v, got, err)
		}
	}
	if err := c.Unmarshal(nil, &raw); err == nil {
		t.Error("a raw message is taken as a target")
	}
	if _, err := c.Marshal("text"); err == nil {
		t.Error("a string is encoded")
	}
	if c.Name() != "proto" {
		t.Errorf("name = %q", c.Name())
	}
}

// TestArena: messages do not overlap, also when one outgrows its room.
func TestArena(t *testing.T) {
	var a Arena
	var all []Raw
	for i := range 2000 {
		n := i % 300
		room := a.Room(n / (1 + i%2))
		for range n {
			room = append(room, byte(i))
		}
		all = append(all, a.Take(room))
	}
	for i, m := range all {
		if len(m) != i%300 {
			t.Fatalf("message %d has %d bytes", i, len(m))
		}
		for _, b := range m {
			if b != byte(i) {
				t.Fatalf("message %d was overwritten", i)
			}
		}
	}
}

func BenchmarkAppendFlowResponse(b *testing.B) {
	flow := encode(b, testflow.Flow("node-1", 1, testflow.Base))
	e := Envelope{NodeName: "default/node-1", Time: testflow.Base.UnixNano()}
	var a Arena
	b.ReportAllocs()
	for b.Loop() {
		a.Take(AppendFlowResponse(a.Room(len(flow)+80), flow, e))
	}
}
