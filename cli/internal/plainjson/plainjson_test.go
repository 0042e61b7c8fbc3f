// SPDX-License-Identifier: Apache-2.0

package plainjson

import (
	"encoding/json"
	"math"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

func mustAny(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAppend(t *testing.T) {
	tests := []struct {
		name  string
		in    proto.Message
		extra []Field
		want  string
	}{
		{"empty", &flow.Flow{}, nil, `{}`},
		{"extra only", &flow.Flow{}, []Field{{"node", "a"}, {"b", `"`}}, `{"node":"a","b":"\""}`},
		{"drop reason in words", &flow.Flow{
			Verdict: flow.Verdict_DROPPED, DropReasonDesc: flow.DropReason_AUTH_REQUIRED,
			IsReply: wrapperspb.Bool(false), SocketCookie: math.MaxUint64,
		}, []Field{{"node", "n"}}, `{"node":"n","verdict":"DROPPED","drop_reason_desc":"Authentication required","is_reply":false,"socket_cookie":18446744073709551615}`},
		{"request without latency", &flow.Flow{L7: &flow.Layer7{Type: flow.L7FlowType_REQUEST}}, nil,
			`{"l7":{"type":"REQUEST","latency_ns":0}}`},
		{"statistics", &flow.Flow{Extensions: mustAny(t, &observerv1.FlowStats{
			Connection: 1 << 63, Forward: &observerv1.DirectionStats{Packets: 3, Bytes: 1 << 40}, Reverse: &observerv1.DirectionStats{},
			HandshakeRttUs: proto.Uint32(120), Retransmissions: proto.Uint32(0),
		})}, nil, `{"stats":{"connection":9223372036854775808,"forward":{"packets":3,"bytes":1099511627776},"reverse":{"packets":0,"bytes":0},"handshake_rtt_us":120,"retransmissions":0,"final":false}}`},
		{"known extension of another kind", &flow.Flow{Extensions: mustAny(t, &flow.Workload{Name: "a"})}, nil, `{"extensions":{"name":"a"}}`},
		{"unknown extension", &flow.Flow{Extensions: &anypb.Any{TypeUrl: "x/y.Z", Value: []byte{1}}}, nil, `{"extensions":{"@type":"x/y.Z","value":"AQ=="}}`},
		{"time", &flow.Flow{Time: &timestamppb.Timestamp{Seconds: 1714979289, Nanos: 120000000}}, nil, `{"time":"2024-05-06T07:08:09.12Z"}`},
		{"invalid time", &flow.Flow{Time: &timestamppb.Timestamp{Nanos: -1}}, nil, `{"time":null}`},
		{"unknown enum value", &flow.Flow{Verdict: 77}, nil, `{"verdict":77}`},
		{"escapes", &flow.Flow{NodeName: "a<b>\x1b\n\u2028é"}, nil, `{"node_name":"a\u003cb\u003e\u001b\n\u2028é"}`},
		{"oneof and nested", &flow.Flow{L4: &flow.Layer4{Protocol: &flow.Layer4_TCP{TCP: &flow.TCP{SourcePort: 1, Flags: &flow.TCPFlags{SYN: true}}}}}, nil,
			`{"l4":{"TCP":{"source_port":1,"flags":{"SYN":true}}}}`},
		{"list of messages", &flow.Endpoint{Workloads: []*flow.Workload{{Name: "a"}, {Kind: "b"}}}, nil, `{"workloads":[{"name":"a"},{"kind":"b"}]}`},
		{"map sorted", &policyv1.Node{Labels: map[string]string{"b": "2", "a": "1"}}, nil, `{"labels":{"a":"1","b":"2"}}`},
		{"double", &agentv1.DumpConntrackResponse{ExpiresIn: -1.5}, nil, `{"expires_in":-1.5}`},
		{"not a number", &agentv1.DumpConntrackResponse{ExpiresIn: math.NaN()}, nil, `{"expires_in":null}`},
		{"wrapper of number", &observer.ServerStatusResponse{NumConnectedNodes: wrapperspb.UInt32(0), UptimeNs: 5}, nil, `{"uptime_ns":5,"num_connected_nodes":0}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Append(nil, tt.in, tt.extra...)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != tt.want {
				t.Errorf("\n got %s\nwant %s", got, tt.want)
			}
			if !json.Valid(got) {
				t.Errorf("not JSON: %s", got)
			}
		})
	}
}

func FuzzAppend(f *testing.F) {
	seed, err := proto.Marshal(&flow.Flow{NodeName: "n", L7: &flow.Layer7{}, Extensions: mustAny(f, &observerv1.FlowStats{Final: true})})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, wire []byte) {
		var m flow.Flow
		if proto.Unmarshal(wire, &m) != nil {
			return
		}
		b, err := Append(nil, &m)
		if err != nil {
			t.Fatalf("%v: %v", &m, err)
		}
		if !json.Valid(b) {
			t.Fatalf("not JSON: %q", b)
		}
	})
}
