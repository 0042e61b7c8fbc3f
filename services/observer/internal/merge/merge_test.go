// SPDX-License-Identifier: Apache-2.0

package merge

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/sequence"
)

const ms = int64(time.Millisecond)

// source makes a batch whose records have times (in ms) and are named <node><time>; it arrives at a time.
func source(t testing.TB, node string, arrival int64, times ...int64) *event.Source {
	t.Helper()
	b := &flowv1.Batch{Header: &flowv1.BatchHeader{Node: node, Epoch: 1, First: 1, Count: uint32(len(times))}}
	for _, at := range times {
		b.Records = append(b.Records, &flowv1.Record{Time: at * ms, Item: &flowv1.Record_Flow{Flow: []byte(node)}})
	}
	data, err := proto.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := batch.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	return event.NewSource(parsed, uint64(arrival), arrival*ms)
}

func whole(s *event.Source) []sequence.Span { return []sequence.Span{{From: 0, To: s.Len()}} }

type log struct{ out []string }

func (l *log) take(s *event.Source, i int) {
	l.out = append(l.out, string(s.Item(i))+itoa(s.Time(i)/ms))
}

func (l *log) next() string {
	s := strings.Join(l.out, " ")
	l.out = nil
	return s
}

func itoa(n int64) string {
	if n < 0 {
		return "-" + itoa(-n)
	}
	if n < 10 {
		return string(rune('0' + n))
	}
	return itoa(n/10) + itoa(n%10)
}

// TestMerge runs scripts: batches that arrive, and what is handed on by then. Window 1000, settle 100.
func TestMerge(t *testing.T) {
	type step struct {
		now   int64 // ms
		node  string
		times []int64
		want  string // handed on by Emit at now
	}
	tests := []struct {
		name  string
		steps []step
	}{
		{"one node waits for the settle time", []step{
			{1000, "a", []int64{990, 995}, ""},
			{1099, "", nil, ""},
			{1100, "", nil, "a990 a995"},
		}},
		{"two nodes", []step{
			{1000, "a", []int64{900, 950}, ""},
			{1010, "b", []int64{890, 920, 960}, ""},
			{1200, "", nil, "b890 a900 b920 a950"}, // b960: a has not passed it yet
			{1300, "a", []int64{1290}, "b960"},
			{2290, "", nil, "a1290"},
		}},
		{"a silent node is not waited for", []step{
			{1000, "a", []int64{990}, ""},
			{1100, "", nil, "a990"},
			{3000, "b", []int64{2990}, ""},
			{3100, "", nil, "b2990"},
		}},
		{"nothing waits for longer than the window", []step{
			{1000, "a", []int64{990}, ""},
			{1001, "b", []int64{100}, ""}, // b lags far behind
			{1500, "b", []int64{101}, "b100"},
			{1990, "", nil, "b101 a990"},
		}},
		{"a clock ahead counts as its arrival", []step{
			{1000, "a", []int64{5000}, ""},
			{1050, "b", []int64{1040}, ""},
			{1100, "", nil, "a5000"},
			{1150, "", nil, "b1040"},
		}},
		{"a clock behind", []step{
			{1000, "a", []int64{900}, ""},
			{1000, "b", []int64{-4000, -3900}, ""},
			{1100, "", nil, "b-4000 b-3900"}, // a900 waits: b has not passed it
			{1900, "", nil, "a900"},
		}},
		{"records of a batch out of order", []step{
			{1000, "a", []int64{950, 910, 930}, ""},
			{1000, "b", []int64{920, 940, 960}, ""},
			{1100, "", nil, "a910 b920 a930 b940 a950"},
			{1960, "", nil, "b960"},
		}},
		{"a backlog is merged too", []step{
			{9000, "a", []int64{1000, 3000}, ""},
			{9010, "b", []int64{2000, 4000}, ""},
			{9120, "", nil, "a1000 b2000 a3000 b4000"},
		}},
		{"equal times stay in the order of arrival", []step{
			{1000, "b", []int64{900, 900}, ""},
			{1000, "a", []int64{900}, ""},
			{1100, "", nil, "b900 b900 a900"},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := New(Config{Window: 1000 * time.Millisecond, Settle: 100 * time.Millisecond})
			var l log
			for i, s := range tt.steps {
				if s.node != "" {
					b := source(t, s.node, s.now, s.times...)
					m.Add(b, whole(b), uint64(i))
				}
				m.Emit(s.now*ms, l.take)
				if got := l.next(); got != s.want {
					t.Errorf("step %d: handed on %q, want %q", i, got, s.want)
				}
			}
			if m.Waiting() {
				t.Error("records still wait")
			}
			if m.bytes != 0 {
				t.Errorf("%d bytes counted as waiting", m.bytes)
			}
		})
	}
}

func TestSpansAndFlush(t *testing.T) {
	m := New(Config{Window: time.Second})
	var l log
	a := source(t, "a", 1000, 1, 2, 3, 4, 5)
	m.Add(a, []sequence.Span{{From: 1, To: 2}, {From: 3, To: 5}}, 1)
	b := source(t, "b", 1000, 5, 4, 3)
	m.Add(b, []sequence.Span{{From: 1, To: 3}}, 2)
	m.Add(b, nil, 3)
	m.Flush(l.take)
	if got, want := l.next(), "a2 b3 a4 b4 a5"; got != want {
		t.Errorf("handed on %q, want %q", got, want)
	}
}

// TestBound: when too many bytes wait, the window is cut short.
func TestBound(t *testing.T) {
	one := source(t, "a", 1000, 999)
	m := New(Config{Window: time.Hour, Settle: time.Hour, MaxBytes: 3 * one.Size()})
	var l log
	for i := range 10 {
		b := source(t, "a", 1000, int64(990+i))
		m.Add(b, whole(b), uint64(i))
		m.Emit(1000*ms, l.take)
	}
	if got, want := l.next(), "a990 a991 a992 a993 a994 a995 a996"; got != want || m.Cut() != 7 {
		t.Errorf("handed on %q, cut %d", got, m.Cut())
	}
}

// TestRandom: everything comes out once, and with clocks that agree and a window above the delay, in
// order of time.
func TestRandom(t *testing.T) {
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 7))
		m := New(Config{Window: 500 * time.Millisecond, Settle: 50 * time.Millisecond})
		var times []int64
		take := func(s *event.Source, i int) { times = append(times, s.Time(i)) }
		count := 0
		for now := int64(1000); now < 3000; now += 10 {
			node := string(rune('a' + r.IntN(4)))
			var list []int64
			for range r.IntN(5) + 1 {
				list = append(list, now-r.Int64N(40)) // under way for at most 40 ms: within the settle time
			}
			slices.Sort(list)
			count += len(list)
			b := source(t, node, now, list...)
			m.Add(b, whole(b), uint64(now))
			m.Emit(now*ms, take)
		}
		m.Emit(10_000*ms, take)
		if len(times) != count {
			t.Fatalf("seed %d: %d came out of %d", seed, len(times), count)
		}
		if !slices.IsSorted(times) {
			t.Fatalf("seed %d: out of order", seed)
		}
	}
}

func BenchmarkMerge(b *testing.B) {
	var sources [4]*event.Source
	for n := range sources {
		var times []int64
		for i := range 512 {
			times = append(times, int64(i*4+n))
		}
		sources[n] = source(b, string(rune('a'+n)), 3000, times...)
	}
	take := func(*event.Source, int) {}
	for b.Loop() {
		m := New(Config{Window: time.Second})
		for i, s := range sources {
			m.Add(s, whole(s), uint64(i))
		}
		m.Flush(take)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/2048, "ns/record")
}
