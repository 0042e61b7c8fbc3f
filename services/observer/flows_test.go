// SPDX-License-Identifier: Apache-2.0

package observer_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/gen/flow"
	hubble "github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/gen/relay"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	"github.com/weirmesh/weir/services/observer/internal/testflow"
)

func uuids(from, to int) []string {
	var out []string
	for i := from; i <= to; i++ {
		out = append(out, fmt.Sprintf("flow-%d", i))
	}
	return out
}

// TestSelection is the table of the API: which flows a request selects.
func TestSelection(t *testing.T) {
	c := newCluster(t)
	start := time.Now().Add(-time.Hour).Truncate(time.Second)
	c.publish(testflow.Flows("node-1", 1, 1, 10, start)) // flow-1 ... flow-10, a millisecond apart
	o := c.observer(nil)
	o.await("ten flows", &hubble.GetFlowsRequest{}, func(a *answer) bool { return len(a.flows) == 10 })
	at := func(n int) *timestamppb.Timestamp {
		return timestamppb.New(start.Add(time.Duration(n-1) * time.Millisecond))
	}
	odd := []*flow.FlowFilter{{Reply: []bool{true}}} // the flows with odd numbers
	tests := []struct {
		name    string
		request *hubble.GetFlowsRequest
		want    []string
	}{
		{"nothing", &hubble.GetFlowsRequest{}, uuids(1, 10)},
		{"number", &hubble.GetFlowsRequest{Number: 3}, uuids(8, 10)},
		{"number beyond", &hubble.GetFlowsRequest{Number: 30}, uuids(1, 10)},
		{"number of matching", &hubble.GetFlowsRequest{Number: 2, Whitelist: odd}, []string{"flow-7", "flow-9"}},
		{"first number", &hubble.GetFlowsRequest{First: true, Number: 3}, uuids(1, 3)},
		{"first number of matching", &hubble.GetFlowsRequest{First: true, Number: 2, Whitelist: odd}, []string{"flow-1", "flow-3"}},
		{"first", &hubble.GetFlowsRequest{First: true}, uuids(1, 10)},
		{"all", &hubble.GetFlowsRequest{Number: math.MaxUint64}, uuids(1, 10)},
		{"first all", &hubble.GetFlowsRequest{First: true, Number: math.MaxUint64}, uuids(1, 10)},
		{"since", &hubble.GetFlowsRequest{Since: at(6)}, uuids(6, 10)},
		{"since number is the oldest", &hubble.GetFlowsRequest{Since: at(6), Number: 2}, uuids(6, 7)},
		{"since first number", &hubble.GetFlowsRequest{Since: at(6), First: true, Number: 2}, uuids(6, 7)},
		{"since all", &hubble.GetFlowsRequest{Since: at(6), Number: math.MaxUint64}, uuids(6, 10)},
		{"until", &hubble.GetFlowsRequest{Until: at(4)}, uuids(1, 4)},
		{"until number counts from the newest", &hubble.GetFlowsRequest{Until: at(8), Number: 4}, uuids(7, 8)},
		{"until number with nothing left", &hubble.GetFlowsRequest{Until: at(4), Number: 4}, nil},
		{"until first number", &hubble.GetFlowsRequest{Until: at(4), First: true, Number: 2}, uuids(1, 2)},
		{"since until", &hubble.GetFlowsRequest{Since: at(3), Until: at(5)}, uuids(3, 5)},
		{"since until number", &hubble.GetFlowsRequest{Since: at(3), Until: at(8), Number: 2}, uuids(3, 4)},
		{"since the future", &hubble.GetFlowsRequest{Since: timestamppb.New(start.Add(24 * time.Hour))}, nil},
		{"blacklist", &hubble.GetFlowsRequest{Number: 2, Blacklist: odd}, []string{"flow-8", "flow-10"}},
		{"empty blacklist filter removes all", &hubble.GetFlowsRequest{Blacklist: []*flow.FlowFilter{{}}}, nil},
		{"empty whitelist filter wants all", &hubble.GetFlowsRequest{Whitelist: []*flow.FlowFilter{{}}}, uuids(1, 10)},
		{"white and black", &hubble.GetFlowsRequest{Whitelist: odd, Blacklist: []*flow.FlowFilter{{Uuid: []string{"flow-5"}}}},
			[]string{"flow-1", "flow-3", "flow-7", "flow-9"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, err := o.flows(tt.request)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, a.uuids()); diff != "" {
				t.Errorf("%v (-want +got):\n%s", tt.request, diff)
			}
		})
	}
	t.Run("our own: since number is the newest", func(t *testing.T) {
		for _, tt := range []struct {
			request *hubble.GetFlowsRequest
			want    []string
		}{
			{&hubble.GetFlowsRequest{Since: at(3), Number: 2}, uuids(9, 10)},
			{&hubble.GetFlowsRequest{Since: at(3), Until: at(8), Number: 2}, uuids(7, 8)},
			{&hubble.GetFlowsRequest{Since: at(9), Number: 5}, uuids(9, 10)},
			{&hubble.GetFlowsRequest{Since: at(3), First: true, Number: 2}, uuids(3, 4)},
			{&hubble.GetFlowsRequest{Number: 2}, uuids(9, 10)},
		} {
			a, err := o.weirFlows(tt.request)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, a.uuids()); diff != "" {
				t.Errorf("%v (-want +got):\n%s", tt.request, diff)
			}
		}
	})
}

func TestFollow(t *testing.T) {
	c := newCluster(t)
	start := time.Now().Add(-time.Minute).Truncate(time.Second)
	c.publish(testflow.Flows("node-1", 1, 1, 5, start))
	o := c.observer(nil)
	o.await("five flows", &hubble.GetFlowsRequest{}, func(a *answer) bool { return len(a.flows) == 5 })
	open := func(request *hubble.GetFlowsRequest) func(n int) []string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		t.Cleanup(cancel)
		stream, err := o.hubble.GetFlows(ctx, request)
		if err != nil {
			t.Fatal(err)
		}
		// The node status comes first: from here on everything is new to a request that follows.
		if r, err := stream.Recv(); err != nil || r.GetNodeStatus() == nil {
			t.Fatalf("first message = %v, %v", r, err)
		}
		return func(n int) []string {
			t.Helper()
			var a answer
			for len(a.flows) < n {
				r, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatalf("after %v: %v", a.uuids(), err)
				}
				a.add(r)
			}
			return a.uuids()
		}
	}
	last := open(&hubble.GetFlowsRequest{Follow: true, Number: 2})
	since := open(&hubble.GetFlowsRequest{Follow: true, Since: timestamppb.New(start.Add(3 * time.Millisecond)), Number: 1})
	until := open(&hubble.GetFlowsRequest{Follow: true, Number: 1, Until: timestamppb.New(start.Add(6 * time.Millisecond))})
	if got := last(2); !slices.Equal(got, uuids(4, 5)) {
		t.Errorf("the last two = %v", got)
	}
	if got := since(2); !slices.Equal(got, uuids(4, 5)) { // number is no limit here
		t.Errorf("since = %v", got)
	}
	c.publish(testflow.Flows("node-1", 1, 6, 5, start.Add(5*time.Millisecond)))
	if got := last(5); !slices.Equal(got, uuids(6, 10)) {
		t.Errorf("new after last = %v", got)
	}
	if got := since(5); !slices.Equal(got, uuids(6, 10)) {
		t.Errorf("new after since = %v", got)
	}
	if got := until(100); !slices.Equal(got, uuids(5, 7)) { // ends by itself
		t.Errorf("until = %v", got)
	}

	// Follow alone begins with what is new.
	only := open(&hubble.GetFlowsRequest{Follow: true, Whitelist: []*flow.FlowFilter{{Uuid: []string{"flow-1", "flow-12"}}}})
	c.publish(testflow.Flows("node-1", 1, 11, 5, start.Add(20*time.Millisecond)))
	if got := only(1); !slices.Equal(got, []string{"flow-12"}) {
		t.Errorf("follow = %v", got)
	}
}

func TestBadRequests(t *testing.T) {
	c := newCluster(t)
	o := c.observer(nil)
	tests := []struct {
		name    string
		request *hubble.GetFlowsRequest
		code    codes.Code
		text    string
		weir    string // our own API says InvalidArgument and this
	}{
		{"first and follow", &hubble.GetFlowsRequest{First: true, Follow: true}, codes.InvalidArgument,
			"first cannot be specified with follow", "first cannot be specified with follow"},
		{"mask", &hubble.GetFlowsRequest{FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"no_such"}}}, codes.Unknown, "invalid fieldmask", "invalid fieldmask"},
		{"since", &hubble.GetFlowsRequest{Since: &timestamppb.Timestamp{Nanos: -1}}, codes.Unknown, "since: ", "since: "},
		{"filter", &hubble.GetFlowsRequest{Whitelist: []*flow.FlowFilter{{Protocol: []string{"x"}}}}, codes.Unknown,
			`invalid protocol filter: unknown protocol: "x"`, `filter field protocol: invalid protocol filter: unknown protocol: "x"`},
		{"blacklist filter", &hubble.GetFlowsRequest{Blacklist: []*flow.FlowFilter{{SourceIp: []string{"x"}}}}, codes.Unknown,
			`invalid IP address "x" in filter: `, `filter field source_ip: invalid IP address "x"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := o.flows(tt.request)
			if status.Code(err) != tt.code || !strings.HasPrefix(status.Convert(err).Message(), tt.text) {
				t.Errorf("got %v, want %s %q", err, tt.code, tt.text)
			}
			_, err = o.weirFlows(tt.request)
			if status.Code(err) != codes.InvalidArgument || !strings.HasPrefix(status.Convert(err).Message(), tt.weir) {
				t.Errorf("our own: got %v, want InvalidArgument %q", err, tt.weir)
			}
		})
	}
}

// TestWireIsExact: a flow that nobody had to decode arrives as the agent made it, in the right envelope.
func TestWireIsExact(t *testing.T) {
	c := newCluster(t)
	start := time.Now().Add(-time.Minute)
	want := testflow.Flow("node-1", 1, start)
	c.publish(testflow.Batch("node-1", 1, 1, testflow.Record(want)))
	o := c.observer(nil)
	o.await("a flow", &hubble.GetFlowsRequest{}, func(a *answer) bool { return len(a.flows) == 1 })
	envelope := func(f *flow.Flow) *hubble.GetFlowsResponse {
		return &hubble.GetFlowsResponse{
			ResponseTypes: &hubble.GetFlowsResponse_Flow{Flow: f}, NodeName: "default/node-1", Time: timestamppb.New(start),
		}
	}
	check := func(name string, got, want *hubble.GetFlowsResponse) {
		t.Helper()
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	for _, tt := range []struct {
		name    string
		request *hubble.GetFlowsRequest
		want    *hubble.GetFlowsResponse
	}{
		{"as it is", &hubble.GetFlowsRequest{}, envelope(want)},
		{"filtered", &hubble.GetFlowsRequest{Whitelist: []*flow.FlowFilter{{SourcePod: []string{"prod/"}}}}, envelope(want)},
		{"masked", &hubble.GetFlowsRequest{FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"uuid", "source.pod_name"}}},
			&hubble.GetFlowsResponse{ResponseTypes: &hubble.GetFlowsResponse_Flow{Flow: &flow.Flow{
				Uuid: want.GetUuid(), Source: &flow.Endpoint{PodName: want.GetSource().GetPodName()},
			}}}},
		{"masked with time", &hubble.GetFlowsRequest{FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"time", "tunnel.IP.source"}}},
			&hubble.GetFlowsResponse{ResponseTypes: &hubble.GetFlowsResponse_Flow{Flow: &flow.Flow{
				Time: want.GetTime(), Tunnel: &flow.Tunnel{IP: &flow.IP{}},
			}}, Time: want.GetTime()}},
	} {
		a, err := o.flows(tt.request)
		if err != nil || len(a.flows) != 1 {
			t.Fatalf("%s: %v, %v", tt.name, a, err)
		}
		check(tt.name, a.all[len(a.all)-1], tt.want)
	}

	a, err := o.weirFlows(&hubble.GetFlowsRequest{})
	if err != nil || len(a.flows) != 1 {
		t.Fatalf("our own: %v, %v", a, err)
	}
	got := a.all[len(a.all)-1]
	var stats observerv1.FlowStats
	if err := got.GetFlow().GetExtensions().UnmarshalTo(&stats); err != nil || stats.GetForward().GetPackets() != 3 {
		t.Errorf("statistics = %v, %v", &stats, err)
	}
	got = proto.Clone(got).(*hubble.GetFlowsResponse)
	got.GetFlow().Extensions = nil
	check("our own", got, envelope(want))
}

// TestOrder: nodes are merged by time; a node whose clock is far ahead delays nobody.
func TestOrder(t *testing.T) {
	c := newCluster(t)
	now := time.Now()
	c.publish(testflow.Batch("node-1", 1, 1,
		testflow.Record(testflow.Flow("node-1", 10, now.Add(-300*time.Millisecond))),
		testflow.Record(testflow.Flow("node-1", 30, now.Add(-100*time.Millisecond)))))
	c.publish(testflow.Batch("node-2", 1, 1,
		testflow.Record(testflow.Flow("node-2", 0, now.Add(-400*time.Millisecond))),
		testflow.Record(testflow.Flow("node-2", 20, now.Add(-200*time.Millisecond)))))
	ahead := testflow.Flow("node-3", 40, now.Add(2*time.Second))
	c.publish(testflow.Batch("node-3", 1, 1, testflow.Record(ahead)))
	o := c.observer(func(config *configType) {
		config.Window, config.Settle, config.Patience = 2*time.Second, time.Second, 5*time.Second
	})
	a := o.await("five flows", &hubble.GetFlowsRequest{}, func(a *answer) bool { return len(a.flows) == 5 })
	if got, want := a.uuids(), []string{"flow-0", "flow-10", "flow-20", "flow-30", "flow-40"}; !slices.Equal(got, want) {
		t.Errorf("order = %v, want %v", got, want)
	}
	if got := a.flows[4].GetTime().AsTime(); !got.Equal(ahead.GetTime().AsTime()) {
		t.Errorf("the time of the node ahead was changed to %s", got)
	}
}

// TestNodesAndStatus: what a client learns besides flows.
func TestNodesAndStatus(t *testing.T) {
	c := newCluster(t)
	c.publish(testflow.Flows("node-1", 1, 1, 4, time.Now().Add(-time.Second)))
	c.publish(testflow.Flows("node-2", 1, 1, 2, time.Now().Add(-time.Second)))
	o := c.observer(func(config *configType) { config.Silence = time.Hour })
	o.await("six flows", &hubble.GetFlowsRequest{}, func(a *answer) bool { return len(a.flows) == 6 })
	ctx := t.Context()
	s, err := o.hubble.ServerStatus(ctx, &hubble.ServerStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if s.GetNumFlows() != 6 || s.GetSeenFlows() != 6 || s.GetMaxFlows() < 6 || s.GetNumConnectedNodes().GetValue() != 2 ||
		s.GetNumUnavailableNodes() == nil || s.GetNumUnavailableNodes().GetValue() != 0 || s.GetUptimeNs() == 0 || s.GetVersion() == "" {
		t.Errorf("status = %v", s)
	}
	n, err := o.hubble.GetNodes(ctx, &hubble.GetNodesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(n.GetNodes()) != 2 || n.GetNodes()[0].GetName() != "default/node-1" || n.GetNodes()[0].GetState() != relay.NodeState_NODE_CONNECTED ||
		n.GetNodes()[0].GetSeenFlows() != 4 || n.GetNodes()[0].GetNumFlows() != 4 || n.GetNodes()[0].GetVersion() != "Weir 0.1.0" || !n.GetNodes()[0].GetTls().GetEnabled() {
		t.Errorf("nodes = %v", n)
	}
	ns, err := o.hubble.GetNamespaces(ctx, &hubble.GetNamespacesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want := &hubble.GetNamespacesResponse{Namespaces: []*hubble.Namespace{{Cluster: "default", Namespace: "default"}, {Cluster: "default", Namespace: "prod"}}}
	if diff := cmp.Diff(want, ns, protocmp.Transform()); diff != "" {
		t.Errorf("namespaces (-want +got):\n%s", diff)
	}
	a, err := o.flows(&hubble.GetFlowsRequest{Number: 1})
	if err != nil {
		t.Fatal(err)
	}
	if len(a.nodes) != 1 || a.all[0].GetNodeStatus().GetStateChange() != relay.NodeState_NODE_CONNECTED ||
		!slices.Equal(a.all[0].GetNodeStatus().GetNodeNames(), []string{"default/node-1", "default/node-2"}) || a.all[0].GetNodeName() != "default/test" {
		t.Errorf("first messages = %v", a.nodes)
	}
}

func TestAgentAndDebugEvents(t *testing.T) {
	c := newCluster(t)
	start := time.Now().Add(-time.Minute).Truncate(time.Second)
	started := &flow.AgentEvent{Type: flow.AgentEventType_AGENT_STARTED, Notification: &flow.AgentEvent_AgentStart{
		AgentStart: &flow.TimeNotification{Time: timestamppb.New(start)},
	}}
	created := &flow.AgentEvent{Type: flow.AgentEventType_ENDPOINT_CREATED}
	c.publish(testflow.Batch("node-1", 1, 1,
		testflow.AgentEventRecord(start, started),
		testflow.Record(testflow.Flow("node-1", 1, start.Add(time.Millisecond))),
		testflow.AgentEventRecord(start.Add(2*time.Millisecond), created)))
	o := c.observer(nil)
	o.await("the flow", &hubble.GetFlowsRequest{}, func(a *answer) bool { return len(a.flows) == 1 })
	events := func(request *hubble.GetAgentEventsRequest) []*hubble.GetAgentEventsResponse {
		t.Helper()
		stream, err := o.hubble.GetAgentEvents(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		var out []*hubble.GetAgentEventsResponse
		for {
			r, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return out
			}
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, r)
		}
	}
	first := &hubble.GetAgentEventsResponse{AgentEvent: started, NodeName: "default/node-1", Time: timestamppb.New(start)}
	second := &hubble.GetAgentEventsResponse{AgentEvent: created, NodeName: "default/node-1", Time: timestamppb.New(start.Add(2 * time.Millisecond))}
	for _, tt := range []struct {
		name    string
		request *hubble.GetAgentEventsRequest
		want    []*hubble.GetAgentEventsResponse
	}{
		{"all", &hubble.GetAgentEventsRequest{}, []*hubble.GetAgentEventsResponse{first, second}},
		{"last", &hubble.GetAgentEventsRequest{Number: 1}, []*hubble.GetAgentEventsResponse{second}},
		{"first", &hubble.GetAgentEventsRequest{Number: 1, First: true}, []*hubble.GetAgentEventsResponse{first}},
	} {
		if diff := cmp.Diff(tt.want, events(tt.request), protocmp.Transform()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
	debug, err := o.hubble.GetDebugEvents(t.Context(), &hubble.GetDebugEventsRequest{Number: 5})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := debug.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("debug events: %v, %v", r, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	debug, err = o.hubble.GetDebugEvents(ctx, &hubble.GetDebugEventsRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if r, err := debug.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("debug events after cancel: %v, %v", r, err)
	}
}
