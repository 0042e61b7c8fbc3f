// SPDX-License-Identifier: Apache-2.0

package intake

import (
	"log/slog"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/gen/flow"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/merge"
	"github.com/weirmesh/weir/services/observer/internal/store"
	"github.com/weirmesh/weir/services/observer/internal/testflow"
)

// sink counts what comes out.
type sink struct {
	records int
	lost    uint64
	gaps    []event.Gap
}

func (s *sink) Record(*event.Source, int) { s.records++ }

func (s *sink) Gap(g *event.Gap) {
	s.gaps = append(s.gaps, *g)
	if g.Withdrawn {
		s.lost -= g.Count
	} else {
		s.lost += g.Count
	}
}

func (s *sink) Batch(*event.Source, int) {}

func config() Config {
	return Config{Merge: merge.Config{Window: time.Second}, Patience: 10 * time.Second, FromStart: true}
}

func message(seq uint64, at time.Duration, b *flowv1.Batch) Message {
	return Message{Seq: seq, Time: testflow.Base.Add(at).UnixNano(), Data: testflow.Encode(b)}
}

// TestSkippedMessages: a jump in the stream's places is the storage's loss; one in the numbers alone
// is not.
func TestSkippedMessages(t *testing.T) {
	s := &sink{}
	p := New(config(), s, s, slog.New(slog.DiscardHandler))
	p.Message(message(1, 0, testflow.Flows("node-1", 1, 1, 2, testflow.Base)))
	p.Message(message(4, 0, testflow.Flows("node-1", 1, 5, 2, testflow.Base)))
	if len(s.gaps) != 1 || s.gaps[0].Place != flowv1.Place_PLACE_NATS || s.gaps[0].Cause != flowv1.Cause_CAUSE_EXPIRED || s.gaps[0].First != 3 || s.gaps[0].StreamSeq != 4 {
		t.Errorf("gaps = %+v", s.gaps)
	}
	p.Message(message(5, 0, testflow.Flows("node-1", 1, 9, 2, testflow.Base)))
	p.Tick(testflow.Base.Add(9*time.Second).UnixNano(), false)
	if len(s.gaps) != 1 {
		t.Errorf("gaps = %+v", s.gaps[1:])
	}
	p.Tick(testflow.Base.Add(30*time.Second).UnixNano(), true)
	if len(s.gaps) != 1 || s.records != 6 {
		t.Errorf("while the stream is away: gaps %+v, %d records", s.gaps[1:], s.records)
	}
	p.Tick(testflow.Base.Add(31*time.Second).UnixNano(), false)
	if len(s.gaps) != 2 || s.gaps[1].Cause != flowv1.Cause_CAUSE_MISSING {
		t.Errorf("gaps = %+v", s.gaps)
	}
}

// TestUnreadable: an unreadable message is counted, an unreadable loss too.
func TestUnreadable(t *testing.T) {
	s := &sink{}
	p := New(config(), s, nil, slog.New(slog.DiscardHandler))
	p.Message(Message{Seq: 1, Time: 1, Data: []byte("x")})
	good := testflow.Batch("node-1", 1, 1, &flowv1.Record{Time: 5, Item: &flowv1.Record_Flow{}})
	data := testflow.Encode(good)
	// A flow (field 2) of two bytes becomes a loss (field 4) that no library would read.
	broken := testflow.Encode(testflow.Batch("node-1", 1, 1, &flowv1.Record{Time: 5, Item: &flowv1.Record_Flow{Flow: []byte{0xff, 0xff}}}))
	for i := range broken {
		if i > 0 && broken[i] == 0xff && broken[i-2] == 0x12 {
			broken[i-2] = 0x22
			break
		}
	}
	p.Message(Message{Seq: 2, Time: 2, Data: broken})
	p.Message(Message{Seq: 3, Time: 3, Data: data})
	p.Flush()
	if c := p.Counters(); c.Unreadable != 1 || c.Batches != 2 || c.Duplicates != 1 {
		t.Errorf("counters = %+v", c)
	}
	if len(s.gaps) != 1 || s.gaps[0].Place != flowv1.Place_PLACE_AGENT || s.gaps[0].Cause != flowv1.Cause_CAUSE_INVALID || s.gaps[0].Count != 1 {
		t.Errorf("gaps = %+v", s.gaps)
	}
}

// TestMemory: agent events have their own store, gaps stand where they were told.
func TestMemory(t *testing.T) {
	flows, agentEvents := store.New(1<<20), store.New(1<<20)
	gaps := 0
	memory := NewMemory(flows, agentEvents, func(*event.Gap) { gaps++ })
	p := New(config(), memory, nil, slog.New(slog.DiscardHandler))
	p.Message(message(1, 0, testflow.Batch("node-1", 1, 1,
		testflow.Record(testflow.Flow("node-1", 1, testflow.Base)),
		testflow.AgentEventRecord(testflow.Base, &flow.AgentEvent{Type: flow.AgentEventType_AGENT_STARTED}),
		testflow.LossRecord(testflow.Base, &flowv1.Loss{Place: flowv1.Place_PLACE_KERNEL, Count: 5}),
		testflow.Record(testflow.Flow("node-1", 4, testflow.Base)))))
	p.Flush()
	if _, next := flows.Bounds(); next != 0 {
		t.Errorf("%d events before Commit", next)
	}
	memory.Commit()
	buf := make([]event.Event, 10)
	n, _ := flows.Read(0, buf)
	if n != 3 || buf[0].Index != 0 || buf[1].Gap == nil || buf[2].Index != 3 || gaps != 1 {
		t.Errorf("flows = %v, %d gaps", buf[:n], gaps)
	}
	if n, _ = agentEvents.Read(0, buf); n != 1 || buf[0].Source.First != 2 {
		t.Errorf("agent events = %v", buf[:n])
	}
}

// FuzzMessage: whatever is in the stream, reading goes on, and what comes out is bounded by what came in.
func FuzzMessage(f *testing.F) {
	f.Add(testflow.Encode(testflow.Flows("node-1", 1, 3, 3, testflow.Base)))
	f.Add(testflow.Encode(testflow.Batch("node-1", 2, 1, testflow.LossRecord(testflow.Base, &flowv1.Loss{
		Place: flowv1.Place_PLACE_SPOOL, Cause: flowv1.Cause_CAUSE_RESTART, Epoch: 1, First: 1, Last: 9, Count: 9}))))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := &sink{}
		p := New(config(), s, nil, slog.New(slog.DiscardHandler))
		p.Message(message(1, 0, testflow.Flows("node-1", 1, 1, 2, testflow.Base)))
		p.Message(Message{Seq: 2, Time: testflow.Base.UnixNano(), Data: data})
		p.Message(message(3, 0, testflow.Flows("node-2", 1, 1, 2, testflow.Base)))
		p.Tick(testflow.Base.Add(time.Hour).UnixNano(), false)
		p.Flush()
		if s.records < 4 || s.records > 4+len(data)/2 {
			t.Fatalf("%d records of %d bytes", s.records, len(data))
		}
	})
}

// BenchmarkPipeline is the path of a flow from the stream's bytes into memory.
func BenchmarkPipeline(b *testing.B) {
	const perBatch = 512
	var batches [][]byte
	for i := range 64 {
		batches = append(batches, testflow.Encode(testflow.Flows("node-1", 1, uint64(1+i*perBatch), perBatch, testflow.Base)))
	}
	flows := store.New(16 << 20)
	memory := NewMemory(flows, store.New(1<<20), func(*event.Gap) {})
	p := New(config(), memory, nil, slog.New(slog.DiscardHandler))
	var header flowv1.Batch
	seq := uint64(0)
	b.ReportAllocs()
	for b.Loop() {
		seq++
		data := batches[seq%64]
		b.StopTimer()
		if err := proto.Unmarshal(data, &header); err != nil { // a number that did not come yet
			b.Fatal(err)
		}
		header.Header.First = 1 + seq*perBatch
		data = testflow.Encode(&header)
		b.StartTimer()
		p.Message(Message{Seq: seq, Time: testflow.Base.UnixNano() + int64(seq)*int64(time.Second), Data: data})
		memory.Commit()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/perBatch, "ns/flow")
}
