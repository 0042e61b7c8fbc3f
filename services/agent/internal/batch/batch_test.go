// SPDX-License-Identifier: Apache-2.0

package batch_test

import (
	"fmt"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/google/go-cmp/cmp"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/internal/batch/batchtest"
	"github.com/weirmesh/weir/services/agent/internal/batch"
)

func decode(t *testing.T, s *batch.Sealed) *flowv1.Batch {
	t.Helper()
	b, err := batchtest.Decode(s.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSealedBatchDecodes(t *testing.T) {
	s := batch.NewSealer("node-1", "east", 7)
	if _, ok := s.Seal(); ok {
		t.Fatal("an empty batch was sealed")
	}
	loss := &flowv1.Loss{Place: flowv1.Place_PLACE_KERNEL, Cause: flowv1.Cause_CAUSE_FULL, Count: 9, Cpu: proto.Uint32(1)}
	s.AddLoss(300, loss)
	s.AddFlow(200, []byte("flow"), []byte("stats"), &batch.Meta{SourceNamespace: "default", DestinationNamespace: "", Verdict: 1, EventType: 4})
	s.AddFlow(400, []byte("flow2"), nil, &batch.Meta{SourceNamespace: "app", DestinationNamespace: "default", Verdict: 2, EventType: 129})
	s.AddAgentEvent(100, []byte("event"))
	sealed, ok := s.Seal()
	if !ok || sealed.First != 1 || sealed.Last() != 4 || sealed.MinTime != 100 || sealed.MaxTime != 400 {
		t.Fatalf("sealed %+v", sealed)
	}
	lossBytes, _ := proto.Marshal(loss)
	want := &flowv1.Batch{
		Header: &flowv1.BatchHeader{Node: "node-1", Cluster: "east", Epoch: 7, First: 1, Count: 4, MinTime: 100, MaxTime: 400,
			Namespaces: []string{"", "app", "default"}, Verdicts: 1<<1 | 1<<2, EventTypes: 1<<4 | 1<<31},
		Records: []*flowv1.Record{
			{Time: 300, Item: &flowv1.Record_Loss{Loss: loss}},
			{Time: 200, Item: &flowv1.Record_Flow{Flow: []byte("flow")}, Stats: []byte("stats")},
			{Time: 400, Item: &flowv1.Record_Flow{Flow: []byte("flow2")}},
			{Time: 100, Item: &flowv1.Record_AgentEvent{AgentEvent: []byte("event")}},
		},
	}
	if diff := cmp.Diff(want, decode(t, sealed), protocmp.Transform()); diff != "" {
		t.Errorf("batch (-want +got):\n%s", diff)
	}
	if len(sealed.Losses) != 1 || len(lossBytes) == 0 {
		t.Errorf("losses %v", sealed.Losses)
	}

	s.AddAgentEvent(500, []byte("event"))
	next, _ := s.Seal()
	want = &flowv1.Batch{
		Header:  &flowv1.BatchHeader{Node: "node-1", Cluster: "east", Epoch: 7, First: 5, Count: 1, MinTime: 500, MaxTime: 500},
		Records: []*flowv1.Record{{Time: 500, Item: &flowv1.Record_AgentEvent{AgentEvent: []byte("event")}}},
	}
	if diff := cmp.Diff(want, decode(t, next), protocmp.Transform()); diff != "" || next.Losses != nil {
		t.Errorf("second batch (-want +got):\n%s", diff)
	}
}

// Namespaces are remembered per batch, not per sealer.
func TestNamespacesOfEachBatch(t *testing.T) {
	s := batch.NewSealer("n", "default", 1)
	m := &batch.Meta{SourceNamespace: "a", DestinationNamespace: "b"}
	for range 2 {
		s.AddAgentEvent(1, []byte("x"))
		s.AddFlow(1, []byte("f"), nil, m)
		s.AddFlow(1, []byte("f"), nil, m)
		sealed, _ := s.Seal()
		if got := decode(t, sealed).Header.Namespaces; !cmp.Equal(got, []string{"a", "b"}) {
			t.Errorf("namespaces %q", got)
		}
		s.AddFlow(1, []byte("f"), nil, m)
		sealed, _ = s.Seal()
		if got := decode(t, sealed).Header; !cmp.Equal(got.Namespaces, []string{"a", "b"}) || got.Cluster != "" {
			t.Errorf("header %v", got)
		}
	}
}

func TestFull(t *testing.T) {
	tests := []struct {
		name  string
		size  int
		space func(i int) string
		want  int
	}{
		{"by records", 100, func(int) string { return "a" }, batch.MaxRecords},
		{"by bytes", 10000, func(int) string { return "a" }, 45},
		{"by namespaces", 10, func(i int) string { return fmt.Sprint(i) }, 256},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := batch.NewSealer("n", "default", 1)
			for i := 0; !s.Full(); i++ {
				s.AddFlow(1, make([]byte, tt.size), nil, &batch.Meta{SourceNamespace: tt.space(i), DestinationNamespace: tt.space(i)})
			}
			if s.Len() != tt.want {
				t.Errorf("full with %d records, want %d", s.Len(), tt.want)
			}
			sealed, _ := s.Seal()
			if len(sealed.Bytes) > batch.MaxBytes {
				t.Errorf("%d bytes", len(sealed.Bytes))
			}
		})
	}
}

func BenchmarkAddFlow(b *testing.B) {
	s := batch.NewSealer("n", "default", 1)
	flow, stats := make([]byte, 420), make([]byte, 80)
	m := &batch.Meta{SourceNamespace: "default", DestinationNamespace: "kube-system", Verdict: 1, EventType: 4}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		s.AddFlow(int64(i)+1_700_000_000_000_000_000, flow, stats, m)
		if s.Full() {
			s.Seal()
		}
	}
}
