// SPDX-License-Identifier: Apache-2.0

package api

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/query"
	"github.com/weirmesh/weir/services/observer/internal/store"
	"github.com/weirmesh/weir/services/observer/internal/testflow"
)

// The handlers are tested through gRPC in services/observer; here is what needs no server.

// TestLostEvents is the table of how our places are told in Hubble's language.
func TestLostEvents(t *testing.T) {
	for place, want := range map[flowv1.Place]flow.LostEventSource{
		flowv1.Place_PLACE_KERNEL:   flow.LostEventSource_PERF_EVENT_RING_BUFFER,
		flowv1.Place_PLACE_AGENT:    flow.LostEventSource_OBSERVER_EVENTS_QUEUE,
		flowv1.Place_PLACE_SPOOL:    flow.LostEventSource_OBSERVER_EVENTS_QUEUE,
		flowv1.Place_PLACE_RELAY:    flow.LostEventSource_OBSERVER_EVENTS_QUEUE,
		flowv1.Place_PLACE_NATS:     flow.LostEventSource_OBSERVER_EVENTS_QUEUE,
		flowv1.Place_PLACE_OBSERVER: flow.LostEventSource_HUBBLE_RING_BUFFER,
	} {
		got := lostEvent(&event.Gap{Place: place, Count: 7, CPU: -1, FirstTime: 1e9, LastTime: 2e9})
		if got.GetSource() != want || got.GetNumEventsLost() != 7 || got.GetCpu() != nil || got.GetFirst().GetSeconds() != 1 || got.GetLast().GetSeconds() != 2 {
			t.Errorf("%s = %v", place, got)
		}
	}
	if got := lostEvent(&event.Gap{CPU: 0}); got.GetCpu() == nil || got.GetFirst() != nil {
		t.Errorf("CPU 0, no times = %v", got)
	}
}

func TestCapacity(t *testing.T) {
	for _, tt := range []struct {
		stats store.Stats
		want  uint64
	}{
		{store.Stats{MaxBytes: 800_000}, 1000},
		{store.Stats{MaxBytes: 1000, Events: 10, Bytes: 100}, 100},
		{store.Stats{MaxBytes: 1000, Events: 50, Bytes: 1001}, 50},
	} {
		if got := capacity(tt.stats); got != tt.want {
			t.Errorf("%+v: %d, want %d", tt.stats, got, tt.want)
		}
	}
}

func TestUnixNano(t *testing.T) {
	for _, tt := range []struct {
		at   time.Time
		want int64
	}{
		{time.Unix(5, 6), 5e9 + 6},
		{time.Unix(-62135596800, 0), -1 << 62},
		{time.Unix(253402300799, 0), 1 << 62},
	} {
		if got := unixNano(tt.at); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.at, got, tt.want)
		}
	}
}

// counter is a sink.
type counter struct{ flows int }

func (*counter) Start() error                            { return nil }
func (*counter) Gap(*event.Gap) error                    { return nil }
func (*counter) Lost(uint64, time.Time, time.Time) error { return nil }

func (c *counter) Event(*event.Source, int) error {
	c.flows++
	return nil
}

// FuzzGetFlowsRequest: whatever a client sends is refused, or answered within what it asked for.
func FuzzGetFlowsRequest(f *testing.F) {
	for _, request := range []*observer.GetFlowsRequest{
		{Number: 3}, {First: true, Number: 2}, {First: true, Follow: true},
		{Since: timestamppb.New(testflow.Base), Until: timestamppb.New(testflow.Base.Add(3 * time.Millisecond))},
		{FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"source.pod_name"}}},
		{Whitelist: []*flow.FlowFilter{{SourcePod: []string{"default/"}}}, Blacklist: []*flow.FlowFilter{{Uuid: []string{"flow-2"}}}},
	} {
		data, err := proto.Marshal(request)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	b, err := batch.Parse(testflow.Encode(testflow.Flows("node-1", 1, 1, 10, testflow.Base)))
	if err != nil {
		f.Fatal(err)
	}
	s := store.New(1 << 20)
	source := event.NewSource(b, 1, testflow.Base.UnixNano())
	var events []event.Event
	for i := range b.Len() {
		events = append(events, event.Event{Source: source, Index: int32(i)})
	}
	s.Append(events)
	engine := query.New(s, nil, time.Now)
	f.Fuzz(func(t *testing.T, data []byte) {
		request := &observer.GetFlowsRequest{}
		if proto.Unmarshal(data, request) != nil {
			return
		}
		c, err := compile(request)
		if err != nil {
			return
		}
		c.sel.Follow = false // it would wait
		got := &counter{}
		if err := engine.Run(t.Context(), c.sel, batch.Flow, newMatcher(c.filter), got); err != nil {
			t.Fatalf("%v: %v", request, err)
		}
		if n := c.sel.Number; got.flows > 10 || n > 0 && uint64(got.flows) > n {
			t.Fatalf("%v: %d flows", request, got.flows)
		}
		masker := newMasker(c.mask)
		item, _ := masker.apply(source, 0)
		if err := proto.Unmarshal(item, &flow.Flow{}); err != nil {
			t.Fatalf("%v: a flow became unreadable: %v", request, err)
		}
	})
}
