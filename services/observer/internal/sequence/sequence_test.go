// SPDX-License-Identifier: Apache-2.0

package sequence

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/services/observer/internal/event"
)

const patience = 10 * time.Second

func seconds(n int) int64 { return int64(n) * int64(time.Second) }

// header is a batch of node-1 with the numbers first..last.
func header(epoch, first, last uint64) *batch.Header {
	return &batch.Header{Node: "node-1", Cluster: "default", Epoch: epoch, First: first, Count: uint32(last - first + 1),
		MinTime: int64(first), MaxTime: int64(last)}
}

func show(gaps []event.Gap) string {
	var out []string
	for _, g := range gaps {
		s := fmt.Sprintf("%d:%d-%d %s %s", g.Epoch, g.First, g.Last,
			strings.TrimPrefix(g.Place.String(), "PLACE_"), strings.TrimPrefix(g.Cause.String(), "CAUSE_"))
		if g.First == 0 || g.Count != g.Last-g.First+1 {
			s += fmt.Sprintf(" count=%d", g.Count)
		}
		if g.Withdrawn {
			s += " withdrawn"
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

func showSpans(spans []Span) string { return fmt.Sprint(spans) }

// TestTracker runs scripts: each step is a batch, a loss, or time that passes.
func TestTracker(t *testing.T) {
	restart := func(epoch, first, last, count uint64) *flowv1.Loss {
		return &flowv1.Loss{Place: flowv1.Place_PLACE_SPOOL, Cause: flowv1.Cause_CAUSE_RESTART, Epoch: epoch, First: first, Last: last, Count: count}
	}
	full := func(epoch, first, last uint64) *flowv1.Loss {
		return &flowv1.Loss{Place: flowv1.Place_PLACE_SPOOL, Cause: flowv1.Cause_CAUSE_FULL, Epoch: epoch, First: first, Last: last}
	}
	type step struct {
		at          int
		batch       *batch.Header
		damaged     *batch.Header
		loss        *flowv1.Loss
		skipped     bool
		spans, gaps string
	}
	tests := []struct {
		name      string
		fromStart bool
		steps     []step
	}{
		{"in order", true, []step{
			{batch: header(1, 1, 3), spans: "[{0 3}]"},
			{batch: header(1, 4, 4), spans: "[{0 1}]"},
			{at: 100},
		}},
		{"a second copy", true, []step{
			{batch: header(1, 1, 3), spans: "[{0 3}]"},
			{batch: header(1, 1, 3), spans: "[]"},
		}},
		{"partly new", true, []step{
			{batch: header(1, 1, 3), spans: "[{0 3}]"},
			{batch: header(1, 2, 5), spans: "[{2 4}]"},
			{batch: header(1, 8, 9), spans: "[{0 2}]"},
			{batch: header(1, 1, 10), spans: "[{5 7} {9 10}]"},
			{at: 100},
		}},
		{"a hole stays", true, []step{
			{batch: header(1, 1, 2), spans: "[{0 2}]"},
			{at: 1, batch: header(1, 5, 6), spans: "[{0 2}]"},
			{at: 10},
			{at: 11, gaps: "1:3-4 RELAY MISSING"},
			{at: 100},
		}},
		{"a hole is filled in time", true, []step{
			{batch: header(1, 1, 2), spans: "[{0 2}]"},
			{batch: header(1, 5, 6), spans: "[{0 2}]"},
			{at: 9, batch: header(1, 3, 4), spans: "[{0 2}]"},
			{at: 100},
		}},
		{"a hole is filled in part", true, []step{
			{batch: header(1, 1, 2), spans: "[{0 2}]"},
			{batch: header(1, 9, 9), spans: "[{0 1}]"},
			{at: 5, batch: header(1, 5, 6), spans: "[{0 2}]"},
			{at: 20, gaps: "1:3-4 RELAY MISSING, 1:7-8 RELAY MISSING"},
		}},
		{"a gap is withdrawn", true, []step{
			{batch: header(1, 1, 2), spans: "[{0 2}]"},
			{batch: header(1, 5, 6), spans: "[{0 2}]"},
			{at: 20, gaps: "1:3-4 RELAY MISSING"},
			{at: 21, batch: header(1, 3, 4), spans: "[{0 2}]", gaps: "1:3-4 RELAY MISSING withdrawn"},
			{at: 100},
		}},
		{"a gap is withdrawn in part", true, []step{
			{batch: header(1, 1, 2), spans: "[{0 2}]"},
			{batch: header(1, 9, 9), spans: "[{0 1}]"},
			{at: 20, gaps: "1:3-8 RELAY MISSING"},
			{at: 21, batch: header(1, 5, 6), spans: "[{0 2}]", gaps: "1:3-8 RELAY MISSING withdrawn, 1:3-4 RELAY MISSING, 1:7-8 RELAY MISSING"},
			{at: 100},
		}},
		{"a loss explains a hole", true, []step{
			{batch: header(1, 1, 2), spans: "[{0 2}]"},
			{batch: header(1, 6, 6), spans: "[{0 1}]"},
			{loss: full(1, 3, 5), gaps: "1:3-5 SPOOL FULL"},
			{at: 100},
		}},
		{"a loss counts only what did not come", true, []step{
			{batch: header(1, 1, 2), spans: "[{0 2}]"},
			{batch: header(1, 4, 6), spans: "[{0 3}]"},
			{loss: full(1, 2, 5), gaps: "1:3-3 SPOOL FULL"},
			{loss: full(1, 2, 5)},
			{at: 100},
		}},
		{"a loss of its own epoch", true, []step{
			{batch: header(3, 1, 2), spans: "[{0 2}]"},
			{batch: header(3, 6, 6), spans: "[{0 1}]"},
			{loss: full(0, 3, 5), gaps: "3:3-5 SPOOL FULL"},
		}},
		{"an explained range comes after all", true, []step{
			{batch: header(1, 1, 2), spans: "[{0 2}]"},
			{batch: header(1, 6, 6), spans: "[{0 1}]"},
			{loss: full(1, 3, 5), gaps: "1:3-5 SPOOL FULL"},
			{batch: header(1, 3, 5), spans: "[{0 3}]", gaps: "1:3-5 SPOOL FULL withdrawn"},
		}},
		{"the end of an epoch", true, []step{
			{batch: header(1, 1, 5), spans: "[{0 5}]"},
			{batch: header(2, 1, 1), spans: "[{0 1}]"},
			{loss: restart(1, 1, 8, 8), gaps: "1:6-8 SPOOL RESTART"},
			{at: 1, batch: header(1, 6, 6), spans: "[{0 1}]", gaps: "1:6-8 SPOOL RESTART withdrawn, 1:7-8 SPOOL RESTART"},
			{at: 100},
		}},
		{"the end of an epoch of which all came", true, []step{
			{batch: header(1, 1, 5), spans: "[{0 5}]"},
			{batch: header(2, 1, 1), spans: "[{0 1}]"},
			{loss: restart(1, 4, 5, 2)},
		}},
		{"the end of an epoch of which nothing came", true, []step{
			{batch: header(2, 1, 1), spans: "[{0 1}]"},
			{loss: restart(1, 1, 8, 8), gaps: "1:1-8 SPOOL RESTART"},
		}},
		{"the end of an epoch before our view", false, []step{
			{batch: header(2, 1, 1), spans: "[{0 1}]"},
			{loss: restart(1, 1, 1000, 4), gaps: "1:997-1000 SPOOL RESTART"},
		}},
		{"a view from the middle", false, []step{
			{batch: header(1, 50, 51), spans: "[{0 2}]"},
			{batch: header(1, 40, 41), spans: "[{0 2}]"},
			{batch: header(1, 40, 42), spans: "[{2 3}]"},
			{batch: header(1, 45, 52), spans: "[{0 5} {7 8}]"},
			{at: 100},
		}},
		{"a view from the start", true, []step{
			{batch: header(1, 3, 4), spans: "[{0 2}]"},
			{at: 20, gaps: "1:1-2 RELAY MISSING"},
		}},
		{"a new epoch begins at 1", false, []step{
			{batch: header(1, 50, 51), spans: "[{0 2}]"},
			{batch: header(2, 3, 4), spans: "[{0 2}]"},
			{at: 20, gaps: "2:1-2 RELAY MISSING"},
		}},
		{"storage dropped messages", true, []step{
			{batch: header(1, 1, 2), spans: "[{0 2}]"},
			{skipped: true},
			{batch: header(1, 5, 6), spans: "[{0 2}]", gaps: "1:3-4 NATS EXPIRED"},
			{batch: header(1, 9, 9), spans: "[{0 1}]"},
			{at: 20, gaps: "1:7-8 RELAY MISSING"},
		}},
		{"a damaged batch", true, []step{
			{batch: header(1, 1, 2), spans: "[{0 2}]"},
			{damaged: header(1, 3, 4), gaps: "1:3-4 NATS INVALID"},
			{batch: header(1, 5, 5), spans: "[{0 1}]"},
			{damaged: header(1, 3, 4)},
			{damaged: header(1, 5, 5)},
			{at: 100},
		}},
		{"without numbers", true, []step{
			{batch: header(1, 1, 2), spans: "[{0 2}]"},
			{loss: &flowv1.Loss{Place: flowv1.Place_PLACE_KERNEL, Cause: flowv1.Cause_CAUSE_FULL, Count: 7}, gaps: "0:0-0 KERNEL FULL count=7"},
			{loss: &flowv1.Loss{Count: 0}},
			{loss: &flowv1.Loss{Count: 5, First: 9, Last: 3}, gaps: "0:0-0 AGENT UNSPECIFIED count=5"},
			{loss: &flowv1.Loss{Count: 5, First: 1, Last: 1 << 60}, gaps: "0:0-0 AGENT UNSPECIFIED count=5"},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tracker := New(patience, tt.fromStart)
			now := 0
			for i, s := range tt.steps {
				now = max(now, s.at)
				spans, gaps := "", ""
				switch {
				case s.skipped:
					tracker.Skipped()
				case s.batch != nil:
					got, g := tracker.Add(s.batch, seconds(now))
					spans, gaps = showSpans(got), show(g)
				case s.damaged != nil:
					gaps = show(tracker.Damaged(s.damaged, seconds(now)))
				case s.loss != nil:
					gaps = show(tracker.Loss(header(3, 1, 1), s.loss, 1, seconds(now)))
				default:
					gaps = show(tracker.Due(seconds(now)))
				}
				if spans != s.spans || gaps != s.gaps {
					t.Errorf("step %d: spans %q, gaps %q; want %q, %q", i, spans, gaps, s.spans, s.gaps)
				}
			}
		})
	}
}

// TestSeenAndPosition: what is known of single numbers.
func TestSeenAndPosition(t *testing.T) {
	tracker := New(patience, false)
	tracker.Add(header(1, 10, 12), 0)
	tracker.Add(header(1, 15, 15), 0)
	tracker.Add(header(1, 5, 6), 0)
	for number, want := range map[uint64]bool{4: false, 5: true, 6: true, 7: false, 10: true, 12: true, 13: false, 15: true, 16: false} {
		if got := tracker.Seen("default/node-1", 1, number); got != want {
			t.Errorf("seen %d = %t", number, got)
		}
	}
	if tracker.Seen("default/node-2", 1, 10) || tracker.Seen("default/node-1", 2, 10) {
		t.Error("seen where nothing came")
	}
	if epoch, last := tracker.Position("default/node-1"); epoch != 1 || last != 15 {
		t.Errorf("position = %d, %d", epoch, last)
	}
}

// TestBounded: epochs and ranges are forgotten at their bounds, and what is forgotten is not counted twice.
func TestBounded(t *testing.T) {
	tracker := New(patience, true)
	for e := uint64(1); e <= maxEpochs+4; e++ {
		tracker.Add(header(e, 1, 1), 0)
	}
	if n := len(tracker.nodes["default/node-1"].epochs); n != maxEpochs {
		t.Errorf("%d epochs are remembered", n)
	}
	if spans, gaps := tracker.Add(header(1, 2, 2), 0); len(spans)+len(gaps) != 0 {
		t.Errorf("a batch of a forgotten epoch: %v, %v", spans, gaps)
	}
	newest := uint64(maxEpochs + 4)
	var told uint64
	for i := range uint64(maxMissing + 100) {
		_, gaps := tracker.Add(header(newest, 3+2*i, 3+2*i), seconds(int(i)))
		for _, g := range append(gaps, tracker.Due(seconds(int(i)+20))...) {
			told += g.Count
		}
	}
	if n := len(tracker.nodes["default/node-1"].epochs[maxEpochs-1].missing); n > maxMissing {
		t.Errorf("%d ranges are remembered", n)
	}
	if told != maxMissing+100 {
		t.Errorf("%d records told as lost, want %d", told, maxMissing+100)
	}
}

// TestRandom: whatever the order in which batches come, resent or lost, at the end every number is
// either received once or counted as lost.
func TestRandom(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		tracker := New(patience, true)
		const total = 200
		var batches []*batch.Header
		for first := uint64(1); first <= total; {
			last := min(first+r.Uint64N(9), total)
			batches = append(batches, header(1, first, last))
			first = last + 1
		}
		var sent []*batch.Header
		for i, b := range batches {
			if r.IntN(5) > 0 || i == len(batches)-1 {
				sent = append(sent, b)
			}
			if r.IntN(4) == 0 {
				sent = append(sent, b)
			}
		}
		for i := range sent { // mild disorder
			j := min(i+r.IntN(4), len(sent)-1)
			sent[i], sent[j] = sent[j], sent[i]
		}
		received := map[uint64]int{}
		var lost int64
		count := func(gaps []event.Gap) {
			for _, g := range gaps {
				if g.Withdrawn {
					lost -= int64(g.Count)
				} else {
					lost += int64(g.Count)
				}
			}
		}
		now := 0
		for _, b := range sent {
			now += r.IntN(8)
			spans, gaps := tracker.Add(b, seconds(now))
			count(gaps)
			for _, s := range spans {
				for i := s.From; i < s.To; i++ {
					received[b.First+uint64(i)]++
				}
			}
			if r.IntN(3) == 0 {
				l := &flowv1.Loss{Place: flowv1.Place_PLACE_SPOOL, Epoch: 1, First: 1 + r.Uint64N(total), Last: total}
				l.Last = min(l.First+r.Uint64N(20), total)
				count(tracker.Loss(header(1, 1, 1), l, 0, seconds(now)))
			}
			count(tracker.Due(seconds(now)))
		}
		count(tracker.Due(seconds(now + 100)))
		for number, n := range received {
			if n != 1 {
				t.Fatalf("seed %d: number %d came %d times", seed, number, n)
			}
		}
		if int64(len(received))+lost != total {
			t.Fatalf("seed %d: %d received + %d lost, want %d", seed, len(received), lost, total)
		}
	}
}

func TestInsert(t *testing.T) {
	var spans []Span64
	for _, s := range []Span64{{5, 6}, {1, 2}, {9, 9}, {3, 4}, {7, 8}} {
		spans = insert(spans, s)
	}
	if !slices.Equal(spans, []Span64{{1, 9}}) {
		t.Errorf("spans = %v", spans)
	}
}
