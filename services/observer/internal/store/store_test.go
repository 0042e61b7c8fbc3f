// SPDX-License-Identifier: Apache-2.0

package store

import (
	"testing"

	"google.golang.org/protobuf/proto"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/services/observer/internal/event"
)

func source(t testing.TB, streamSeq uint64, records int) *event.Source {
	t.Helper()
	b := &flowv1.Batch{Header: &flowv1.BatchHeader{Node: "node-1", Epoch: 1, First: 1, Count: uint32(records)}}
	for i := range records {
		b.Records = append(b.Records, &flowv1.Record{Time: int64(i + 1), Item: &flowv1.Record_Flow{Flow: make([]byte, 100)}})
	}
	data, err := proto.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := batch.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	return event.NewSource(parsed, streamSeq, 1)
}

func events(s *event.Source) []event.Event {
	var out []event.Event
	for i := range s.Len() {
		out = append(out, event.Event{Source: s, Index: int32(i)})
	}
	return out
}

func TestReadAndBounds(t *testing.T) {
	s := New(1 << 20)
	s.SetStart(5)
	changed := s.Changed()
	s.Append(events(source(t, 5, 3)))
	select {
	case <-changed:
	default:
		t.Error("readers are not woken")
	}
	s.Append([]event.Event{{Gap: &event.Gap{Count: 1, StreamSeq: 6}}})
	s.Append(nil)
	if first, next, whole := s.Snapshot(); first != 0 || next != 4 || whole != 5 {
		t.Errorf("bounds = %d, %d, whole from %d", first, next, whole)
	}
	buf := make([]event.Event, 10)
	if n, from := s.Read(1, buf); n != 3 || from != 1 || buf[0].Index != 1 || buf[2].Gap == nil {
		t.Errorf("read = %d from %d: %v", n, from, buf[:n])
	}
	if n, from := s.Read(4, buf); n != 0 || from != 4 {
		t.Errorf("read at the end = %d from %d", n, from)
	}
	if n, from := s.ReadBack(4, buf[:2]); n != 2 || from != 2 || buf[0].Index != 2 {
		t.Errorf("read back = %d from %d", n, from)
	}
	if n, from := s.ReadBack(2, buf); n != 2 || from != 0 {
		t.Errorf("read back = %d from %d", n, from)
	}
	if n, _ := s.ReadBack(0, buf); n != 0 {
		t.Errorf("read back at the start = %d", n)
	}
	if got := s.CountByNode(); got["default/node-1"] != 3 {
		t.Errorf("count = %v", got)
	}
}

// TestEviction: the store stays within its bytes, over many chunks, and says what is gone.
func TestEviction(t *testing.T) {
	size := source(t, 1, 100).Size() + 100*eventSize
	s := New(10 * size)
	buf := make([]event.Event, 1000)
	for seq := uint64(1); seq <= 100; seq++ {
		s.Append(events(source(t, seq, 100)))
		stats := s.Stats()
		if stats.Bytes > stats.MaxBytes {
			t.Fatalf("%d bytes of %d", stats.Bytes, stats.MaxBytes)
		}
		if seq < 20 {
			continue
		}
		first, next, whole := s.Snapshot()
		if stats.Events != next-first || stats.Events < 800 || next != seq*100 || stats.Evicted != first {
			t.Fatalf("bounds %d..%d, stats %+v", first, next, stats)
		}
		n, from := s.Read(0, buf)
		if from != first || n == 0 {
			t.Fatalf("read from 0 = %d from %d, oldest is %d", n, from, first)
		}
		for i, e := range buf[:n] {
			if want := from + uint64(i); uint64(e.Index) != want%100 || e.StreamSeq() != want/100+1 {
				t.Fatalf("position %d holds %d of message %d", want, e.Index, e.StreamSeq())
			}
		}
		// Memory is whole from the message after the last evicted one.
		if last := buf[0].StreamSeq(); whole != last && whole != last+1 {
			t.Fatalf("whole from %d, the oldest event is of %d", whole, last)
		}
	}
}

// TestOneLargeBatch: a batch larger than memory leaves nothing behind, and breaks nothing.
func TestOneLargeBatch(t *testing.T) {
	s := New(1000)
	s.Append(events(source(t, 1, 100)))
	if stats := s.Stats(); stats.Events != 0 || stats.Bytes != 0 {
		t.Errorf("stats = %+v", stats)
	}
	if n, from := s.Read(0, make([]event.Event, 10)); n != 0 || from != 100 {
		t.Errorf("read = %d from %d", n, from)
	}
}

func BenchmarkAppend(b *testing.B) {
	s := New(64 << 20)
	src := source(b, 1, 512)
	list := events(src)
	b.ReportAllocs()
	for b.Loop() {
		s.Append(list)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/512, "ns/event")
}
