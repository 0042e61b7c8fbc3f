// SPDX-License-Identifier: Apache-2.0

package observer_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/gen/flow"
	hubble "github.com/weirmesh/weir/gen/observer"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	"github.com/weirmesh/weir/services/observer/internal/testflow"
)

// losses asks for the counted losses, as "node place cause count".
func (c *client) losses() []string {
	c.t.Helper()
	r, err := c.weir.GetLosses(c.t.Context(), &observerv1.GetLossesRequest{})
	if err != nil {
		c.t.Fatal(err)
	}
	var out []string
	for _, l := range r.GetLosses() {
		out = append(out, fmt.Sprintf("%s %s %s %d", l.GetNodeName(),
			strings.TrimPrefix(l.GetPlace().String(), "PLACE_"), strings.TrimPrefix(l.GetCause().String(), "CAUSE_"), l.GetCount()))
	}
	return out
}

func (c *client) received(node string) uint64 {
	c.t.Helper()
	r, err := c.weir.GetLosses(c.t.Context(), &observerv1.GetLossesRequest{})
	if err != nil {
		c.t.Fatal(err)
	}
	for _, n := range r.GetNodes() {
		if n.GetNodeName() == node {
			return n.GetReceived()
		}
	}
	return 0
}

// TestLosses: every kind of loss is counted once, told to readers of both APIs, and the same at two
// observers; a second copy of a batch changes nothing.
func TestLosses(t *testing.T) {
	c := newCluster(t)
	start := time.Now().Add(-time.Minute).Truncate(time.Second)
	cpu := uint32(3)
	kernel := testflow.LossRecord(start, &flowv1.Loss{Place: flowv1.Place_PLACE_KERNEL, Cause: flowv1.Cause_CAUSE_FULL, Count: 17, Cpu: &cpu,
		FirstTime: start.UnixNano(), LastTime: start.Add(time.Second).UnixNano()})
	spool := testflow.LossRecord(start.Add(time.Second), &flowv1.Loss{Place: flowv1.Place_PLACE_SPOOL, Cause: flowv1.Cause_CAUSE_FULL,
		Epoch: 1, First: 6, Last: 8, Count: 3})
	batches := []*flowv1.Batch{
		testflow.Batch("node-1", 1, 1, testflow.Record(testflow.Flow("node-1", 1, start)), kernel),
		testflow.Flows("node-1", 1, 3, 3, start.Add(10*time.Millisecond)), // 3..5; 6..8 are lost in the spool
		testflow.Batch("node-1", 1, 9, spool),
		testflow.Flows("node-2", 1, 1, 2, start), // 3..4 never come
		testflow.Flows("node-2", 1, 5, 2, start.Add(20*time.Millisecond)),
		// A new agent on node-3 says where the old epoch ended: 3 of its 5 records came.
		testflow.Flows("node-3", 1, 1, 3, start),
		testflow.Batch("node-3", 2, 1, testflow.LossRecord(start.Add(2*time.Second), &flowv1.Loss{
			Place: flowv1.Place_PLACE_SPOOL, Cause: flowv1.Cause_CAUSE_RESTART, Epoch: 1, First: 1, Last: 5, Count: 5})),
	}
	for _, b := range batches {
		c.publish(b)
		c.publish(b) // JetStream's memory of ids does not help here: these have none
	}
	want := []string{
		"default/node-1 KERNEL FULL 17", "default/node-1 SPOOL FULL 3",
		"default/node-2 RELAY MISSING 2", "default/node-3 SPOOL RESTART 2",
	}
	wantLost := map[flow.LostEventSource]uint64{
		flow.LostEventSource_PERF_EVENT_RING_BUFFER: 17, flow.LostEventSource_OBSERVER_EVENTS_QUEUE: 3 + 2 + 2,
	}
	for i := range 2 {
		o := c.observer(func(config *configType) { config.Instance = fmt.Sprintf("test-%d", i) })
		eventually(t, "the losses", func() bool { return slices.Equal(o.losses(), want) })
		a, err := o.flows(&hubble.GetFlowsRequest{Whitelist: []*flow.FlowFilter{{Uuid: []string{"none"}}}})
		if err != nil {
			t.Fatal(err)
		}
		got := map[flow.LostEventSource]uint64{}
		for _, l := range a.lost {
			got[l.GetLostEvents().GetSource()] += l.GetLostEvents().GetNumEventsLost()
			if l.GetLostEvents().GetSource() == flow.LostEventSource_PERF_EVENT_RING_BUFFER &&
				(l.GetLostEvents().GetCpu().GetValue() != 3 || l.GetNodeName() != "default/node-1") {
				t.Errorf("lost event of the kernel = %v", l)
			}
		}
		if diff := cmp.Diff(wantLost, got); diff != "" {
			t.Errorf("lost events (-want +got):\n%s", diff)
		}
		if len(a.flows) != 0 {
			t.Errorf("flows = %v", a.uuids())
		}
		if n := o.received("default/node-1"); n != 6 {
			t.Errorf("node-1: %d records received, want 6", n)
		}
		all, err := o.flows(&hubble.GetFlowsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if n := len(all.flows); n != 1+3+2+2+3 {
			t.Errorf("%d flows, want 11: %v", n, all.uuids())
		}
		// Our own API tells gaps to those whom a lost flow could have concerned.
		for _, tt := range []struct {
			name    string
			request *hubble.GetFlowsRequest
			want    int
		}{
			{"all", &hubble.GetFlowsRequest{}, 4},
			{"a node's", &hubble.GetFlowsRequest{Whitelist: []*flow.FlowFilter{{NodeName: []string{"node-2"}}}}, 1},
			{"another node's", &hubble.GetFlowsRequest{Whitelist: []*flow.FlowFilter{{NodeName: []string{"node-9"}}}}, 0},
			{"before", &hubble.GetFlowsRequest{Until: timestamppb.New(start.Add(-time.Second))}, 0},
		} {
			a, err := o.weirFlows(tt.request)
			if err != nil {
				t.Fatal(err)
			}
			if len(a.gaps) != tt.want || len(a.lost) != 0 {
				t.Errorf("%s: gaps = %v, want %d", tt.name, a.gaps, tt.want)
			}
		}
		for _, g := range func() []*observerv1.Gap { a, _ := o.weirFlows(&hubble.GetFlowsRequest{}); return a.gaps }() {
			if g.GetNodeName() != "default/node-2" {
				continue
			}
			want := &observerv1.Gap{NodeName: "default/node-2", Place: flowv1.Place_PLACE_RELAY, Cause: flowv1.Cause_CAUSE_MISSING,
				Epoch: 1, First: 3, Last: 4, Count: 2,
				FirstTime: timestamppb.New(start.Add(time.Millisecond)), LastTime: timestamppb.New(start.Add(20 * time.Millisecond))}
			if diff := cmp.Diff(want, g, protocmp.Transform()); diff != "" {
				t.Errorf("gap (-want +got):\n%s", diff)
			}
		}
	}
}

// TestLateBatchWithdraws: what was missing comes after all.
func TestLateBatchWithdraws(t *testing.T) {
	c := newCluster(t)
	o := c.observer(nil)
	start := time.Now().Truncate(time.Second)
	c.publish(testflow.Flows("node-1", 1, 1, 2, start))
	c.publish(testflow.Flows("node-1", 1, 5, 2, start.Add(time.Second)))
	eventually(t, "the gap", func() bool { return slices.Equal(o.losses(), []string{"default/node-1 RELAY MISSING 2"}) })
	c.publish(testflow.Flows("node-1", 1, 3, 2, start.Add(500*time.Millisecond)))
	eventually(t, "the withdrawal", func() bool { return len(o.losses()) == 0 })
	a := o.await("all flows", &hubble.GetFlowsRequest{}, func(a *answer) bool { return len(a.flows) == 6 })
	if len(a.gaps) != 2 || a.gaps[0].GetWithdrawn() || !a.gaps[1].GetWithdrawn() || a.gaps[0].GetFirst() != 3 || a.gaps[1].GetLast() != 4 {
		t.Errorf("gaps = %v", a.gaps)
	}
	stock, err := o.flows(&hubble.GetFlowsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(stock.lost) != 1 {
		t.Errorf("lost events = %v, want the one that was true then", stock.lost)
	}
}

// TestDamagedBatches: what the stream holds and nobody can read is counted, and stops nothing.
func TestDamagedBatches(t *testing.T) {
	c := newCluster(t)
	start := time.Now().Add(-time.Minute)
	damaged := testflow.Flows("node-1", 1, 3, 2, start)
	damaged.Header.Count = 3 // the header promises 3..5
	c.publish(testflow.Flows("node-1", 1, 1, 2, start))
	c.publishRaw("node-1", testflow.Encode(damaged))
	c.publishRaw("node-1", []byte("no batch at all"))
	c.publish(testflow.Flows("node-1", 1, 6, 2, start))
	o := c.observer(nil)
	eventually(t, "the loss", func() bool { return slices.Equal(o.losses(), []string{"default/node-1 NATS INVALID 3"}) })
	o.await("the readable flows", &hubble.GetFlowsRequest{}, func(a *answer) bool { return len(a.flows) == 4 })
}

// TestRestarts: NATS and observers come back, and nothing is forgotten or counted twice.
func TestRestarts(t *testing.T) {
	c := newCluster(t)
	start := time.Now().Add(-time.Minute).Truncate(time.Second)
	c.publish(testflow.Flows("node-1", 1, 1, 5, start))
	o := c.observer(nil)
	o.await("five flows", &hubble.GetFlowsRequest{}, func(a *answer) bool { return len(a.flows) == 5 })

	listen := strings.TrimPrefix(c.url, "tls://")
	c.nats.Shutdown()
	a, err := o.flows(&hubble.GetFlowsRequest{})
	if err != nil || len(a.flows) != 5 {
		t.Errorf("while NATS is away: %v, %v", a, err)
	}
	c.startNATS(listen)
	c.ensureStream()
	c.publish(testflow.Flows("node-1", 1, 6, 5, start.Add(time.Second)))
	want := uuids(1, 10)
	o.await("ten flows after NATS came back", &hubble.GetFlowsRequest{}, func(a *answer) bool { return slices.Equal(a.uuids(), want) })
	o.stop()

	again := c.observer(nil)
	again.await("ten flows after the observer came back", &hubble.GetFlowsRequest{}, func(a *answer) bool { return slices.Equal(a.uuids(), want) })
	if l := again.losses(); len(l) != 0 {
		t.Errorf("losses = %v", l)
	}
}

// TestPast: `since` reaches beyond memory, into JetStream, without a seam.
func TestPast(t *testing.T) {
	c := newCluster(t)
	start := time.Now().Add(-time.Hour).Truncate(time.Second)
	const batches, perBatch = 60, 100
	for i := range batches {
		node := fmt.Sprintf("node-%d", i%2+1)
		first := i/2*perBatch + 1
		c.publish(testflow.Flows(node, 1, uint64(first), perBatch, start.Add(time.Duration(i)*100*time.Millisecond)))
		if i == 20 {
			c.publish(testflow.Flows(node, 1, uint64(first), perBatch, start.Add(time.Duration(i)*100*time.Millisecond))) // again
		}
	}
	// Memory holds a part of it, and reading begins in the middle of the stream.
	o := c.observer(func(config *configType) { config.MemoryBytes, config.ReplayBytes = 1<<20, 2<<20 })
	inMemory := o.await("a full memory", &hubble.GetFlowsRequest{}, func(a *answer) bool {
		return len(a.flows) > 500 && a.flows[len(a.flows)-1].GetUuid() == fmt.Sprintf("flow-%d", batches/2*perBatch)
	})
	if len(inMemory.flows) >= batches*perBatch/2 {
		t.Fatalf("memory holds %d flows; the test needs less", len(inMemory.flows))
	}
	count := func(a *answer, err error) int {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, f := range a.flows {
			key := f.GetNodeName() + f.GetUuid()
			if seen[key] {
				t.Errorf("%s came twice", key)
			}
			seen[key] = true
		}
		if len(a.gaps)+len(a.lost) > 0 {
			t.Errorf("gaps %v, lost %v", a.gaps, a.lost)
		}
		return len(a.flows)
	}
	all := &hubble.GetFlowsRequest{Since: timestamppb.New(start)}
	if n := count(o.flows(all)); n != batches*perBatch {
		t.Errorf("since the start: %d flows, want %d", n, batches*perBatch)
	}
	if n := count(o.flows(&hubble.GetFlowsRequest{Since: &timestamppb.Timestamp{Seconds: -62135596800}})); n != batches*perBatch {
		t.Errorf("since the year 1: %d flows", n)
	}
	a, err := o.flows(&hubble.GetFlowsRequest{Since: timestamppb.New(start), Number: 3})
	if count(a, err) != 3 || !slices.Equal(a.uuids(), uuids(1, 3)) {
		t.Errorf("the first three = %v", a.uuids())
	}
	late := start.Add(1500 * time.Millisecond)
	a, err = o.flows(&hubble.GetFlowsRequest{Since: timestamppb.New(late), Until: timestamppb.New(late.Add(time.Second))})
	for _, f := range a.flows {
		if at := f.GetTime().AsTime(); at.Before(late) || at.After(late.Add(time.Second)) {
			t.Fatalf("a flow of %s is not in the window", at)
		}
	}
	if n := count(a, err); n < 900 {
		t.Errorf("a window in the past: %d flows", n)
	}
	newest := batches*perBatch - 500
	a, err = o.weirFlows(&hubble.GetFlowsRequest{Since: timestamppb.New(start), Number: uint64(newest)})
	if n := count(a, err); n != newest {
		t.Errorf("our own newest since: %d flows, want %d", n, newest)
	}
	if got := a.flows[len(a.flows)-1].GetUuid(); got != inMemory.flows[len(inMemory.flows)-1].GetUuid() {
		t.Errorf("the last one is %s", got)
	}
}
