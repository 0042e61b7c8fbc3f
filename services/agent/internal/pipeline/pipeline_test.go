// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/bpf/datapath"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/internal/batch/batchtest"
	"github.com/weirmesh/weir/services/agent/internal/batch"
	"github.com/weirmesh/weir/services/agent/internal/event"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/request"
	"github.com/weirmesh/weir/services/agent/internal/spool"
)

// fakeRings is one ring of records that outlives its readers. Positions are record numbers.
type fakeRings struct {
	t       *testing.T
	records []*datapath.Record // nil = undecodable
	read    uint64
	// kernel side: what SaveState and Commit did.
	state     datapath.State
	committed uint64
}

func (r *fakeRings) Count() int { return 1 }
func (r *fakeRings) Bytes() int { return 1 << 20 }

func (r *fakeRings) Read(ctx context.Context, limit int, f func(int, *datapath.Record, uint64)) (int, error) {
	n := 0
	for n < limit && r.read < uint64(len(r.records)) {
		rec := r.records[r.read]
		r.read++
		f(0, rec, r.read)
		n++
	}
	if n == 0 {
		<-ctx.Done()
		return 0, ctx.Err()
	}
	return n, nil
}

func (r *fakeRings) SaveState(s datapath.State) error {
	s.Positions = append([]uint64(nil), s.Positions...)
	r.state = s
	return nil
}

func (r *fakeRings) LoadState() (datapath.State, error) {
	// A new reader begins where the state says.
	if len(r.state.Positions) > 0 {
		r.read = r.state.Positions[0]
	}
	return r.state, nil
}

func (r *fakeRings) Commit(p []uint64) error {
	if p[0] > r.state.Positions[0] {
		r.t.Errorf("room up to %d is given back, the saved state covers %d", p[0], r.state.Positions[0])
	}
	r.committed = p[0]
	return nil
}

func record(i int) *datapath.Record {
	return &datapath.Record{Type: datapath.RecordTrace, Time: uint64(i + 1), IpVersion: 4, Proto: 17, Sport: uint16(i), Connection: 1}
}

func records(n int) []*datapath.Record {
	list := make([]*datapath.Record, n)
	for i := range list {
		list[i] = record(i)
	}
	return list
}

// disk is what outlives an agent beside the kernel: losses to tell, and batches kept.
type disk struct {
	list    []*flowv1.Loss
	pending []*batch.Sealed
	full    bool
}

func (d *disk) New(time.Time) ([]*flowv1.Loss, error) {
	list := d.list
	d.list = nil
	return list, nil
}

func (d *disk) Pending() []*batch.Sealed { return slices.Clone(d.pending) }
func (d *disk) Room() bool               { return !d.full }

func (d *disk) Keep(b *batch.Sealed, insteadOf []*batch.Sealed) error {
	d.pending = slices.DeleteFunc(d.pending, func(p *batch.Sealed) bool { return slices.Contains(insteadOf, p) })
	d.pending = append(d.pending, b)
	return nil
}

type clock struct{}

func (clock) Unix(m uint64) int64 { return int64(m) + 1e18 }

type fixture struct {
	rings  *fakeRings
	losses *disk
	spool  *spool.Spool
	events *event.Queue
	queue  *request.Queue
	lost   map[flowv1.Place]uint64
	*Pipeline
}

func agent(t *testing.T, rings *fakeRings, ended Ended, d ...*disk) *fixture {
	t.Helper()
	d = append(d, &disk{})
	f := &fixture{rings: rings, losses: d[0], spool: spool.New(1 << 26), lost: map[flowv1.Place]uint64{}, events: event.NewQueue(time.Now), queue: request.NewQueue(2000)}
	f.Pipeline = New(Config{
		Node: "n", Cluster: "default", Rings: rings, Losses: f.losses, Spool: f.spool, Events: f.events, Requests: f.queue, Ended: ended,
		Encoder: flow.NewEncoder(flow.NewDirectory("default", time.Now), clock{}, flow.Node{Cluster: "default", Name: "n"}),
		Lost:    func(p flowv1.Place, _ flowv1.Cause, n uint64) { f.lost[p] += n },
		Now:     time.Now, Log: slog.New(slog.DiscardHandler),
	})
	if err := f.Begin(); err != nil {
		t.Fatal(err)
	}
	return f
}

// runUntil runs the pipeline until the condition holds.
func (f *fixture) runUntil(t *testing.T, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for !done() {
		if _, err := f.step(ctx); err != nil {
			t.Fatal(err)
		}
		if ctx.Err() != nil {
			t.Fatal("the pipeline did not come to it")
		}
	}
}

// batches takes all batches out of the spool, decoded.
func (f *fixture) batches(t *testing.T) []*flowv1.Batch {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var list []*flowv1.Batch
	for {
		s, err := f.spool.Next(ctx, 1<<30)
		if err != nil {
			return list
		}
		b, err := batchtest.Decode(s.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, b)
	}
}

func count(list []*flowv1.Batch) (flows, events int, losses []*flowv1.Loss) {
	for _, b := range list {
		for _, r := range b.Records {
			switch x := r.Item.(type) {
			case *flowv1.Record_Flow:
				flows++
			case *flowv1.Record_AgentEvent:
				events++
			case *flowv1.Record_Loss:
				losses = append(losses, x.Loss)
			}
		}
	}
	return flows, events, losses
}

// What proxies saw goes into the same batches; what found no room on the way is told, each with its cause.
func TestRequests(t *testing.T) {
	f := agent(t, &fakeRings{t: t, records: records(10)}, Ended{})
	at := netip.MustParseAddrPort("10.0.0.1:80")
	for range 2003 {
		f.queue.Put(&flow.Request{Time: 5, Client: at, Server: at, Proto: 6, TLS: &flow.TLS{}})
	}
	f.queue.Lose(4)
	f.queue.Malformed()
	f.queue.Malformed()
	var losses []*flowv1.Loss
	flows := 0
	f.runUntil(t, func() bool {
		n, _, l := count(f.batches(t))
		flows, losses = flows+n, append(losses, l...)
		return flows == 2010 && len(losses) == 3
	})
	told := map[string]uint64{}
	for _, l := range losses {
		told[l.Place.String()+" "+l.Cause.String()] += l.Count
	}
	want := map[string]uint64{"PLACE_AGENT CAUSE_REQUESTS": 3, "PLACE_PROXY CAUSE_FULL": 4, "PLACE_AGENT CAUSE_INVALID": 2}
	if !maps.Equal(told, want) || f.Stats().Flows != 2010 {
		t.Errorf("losses %v, want %v; %d flows", told, want, f.Stats().Flows)
	}
}

func TestNumbersAreConsecutive(t *testing.T) {
	f := agent(t, &fakeRings{t: t, records: records(1300)}, Ended{})
	f.events.Started(time.Now())
	f.runUntil(t, func() bool { return f.Stats().Next == 1302 })
	list := f.batches(t)
	next := uint64(1)
	for _, b := range list {
		if b.Header.First != next || int(b.Header.Count) != len(b.Records) || b.Header.Epoch != f.Stats().Epoch {
			t.Errorf("batch %v with %d records, want first %d", b.Header, len(b.Records), next)
		}
		next += uint64(b.Header.Count)
	}
	flows, events, losses := count(list)
	if flows != 1300 || events != 1 || len(losses) != 0 {
		t.Errorf("%d flows, %d events, losses %v", flows, events, losses)
	}
	if f.rings.committed != 1300 || f.rings.state.NextSequence != next {
		t.Errorf("committed %d, state %+v", f.rings.committed, f.rings.state)
	}
}

func TestKilledAgentLosesNothingThatIsNotNumbered(t *testing.T) {
	rings := &fakeRings{t: t, records: records(1000)}
	old := agent(t, rings, Ended{})
	old.runUntil(t, func() bool { return old.Stats().Next > 1 })
	// It had read more than it sealed when it was killed.
	old.record(0, rings.records[rings.read], rings.read+1)
	given := old.Stats().Next - 1

	f := agent(t, rings, Ended{})
	f.runUntil(t, func() bool { return f.Stats().Flows == 1000-given })
	f.runUntil(t, func() bool { return f.sealer.Len() == 0 })
	flows, _, losses := count(f.batches(t))
	if uint64(flows)+given != 1000 {
		t.Errorf("%d flows, %d were numbered before; want 1000 in all", flows, given)
	}
	if len(losses) != 1 || losses[0].Cause != flowv1.Cause_CAUSE_RESTART || losses[0].Place != flowv1.Place_PLACE_SPOOL ||
		losses[0].Epoch != old.Stats().Epoch || losses[0].First != 1 || losses[0].Last != given {
		t.Errorf("losses %v, want the numbers 1 to %d of epoch %d", losses, given, old.Stats().Epoch)
	}
	if f.Stats().Epoch <= old.Stats().Epoch {
		t.Errorf("epoch %d after %d", f.Stats().Epoch, old.Stats().Epoch)
	}
}

func TestCleanEndLeavesNoRestartLoss(t *testing.T) {
	rings := &fakeRings{t: t, records: records(10)}
	old := agent(t, rings, Ended{})
	old.runUntil(t, func() bool { return old.Stats().Next == 11 })
	tests := []struct {
		name  string
		ended Ended
		first uint64 // of the loss; 0 = none
	}{
		{"all acknowledged", Ended{old.Stats().Epoch, 10}, 0},
		{"a part", Ended{old.Stats().Epoch, 6}, 7},
		{"mark of another epoch", Ended{old.Stats().Epoch - 1, 10}, 1},
	}
	saved := rings.state
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rings.state = saved
			f := agent(t, rings, tt.ended)
			f.events.Started(time.Now())
			f.runUntil(t, func() bool { return f.Stats().Next > 1 })
			_, _, losses := count(f.batches(t))
			switch {
			case tt.first == 0 && len(losses) != 0:
				t.Errorf("losses %v", losses)
			case tt.first != 0 && (len(losses) != 1 || losses[0].First != tt.first || losses[0].Last != 10):
				t.Errorf("losses %v, want %d to 10", losses, tt.first)
			}
		})
	}
}

func TestWhatIsLostIsTold(t *testing.T) {
	list := records(5)
	list[2] = nil
	list[3] = &datapath.Record{Type: datapath.RecordTrace} // no IP version
	f := agent(t, &fakeRings{t: t, records: list}, Ended{})
	f.losses.list = []*flowv1.Loss{{Place: flowv1.Place_PLACE_KERNEL, Cause: flowv1.Cause_CAUSE_FULL, Count: 44, Cpu: proto.Uint32(1)}}
	f.runUntil(t, func() bool { return f.Stats().Next == 6 })
	flows, _, losses := count(f.batches(t))
	if flows != 3 {
		t.Errorf("%d flows, want 3", flows)
	}
	got := map[flowv1.Place]uint64{}
	for _, l := range losses {
		got[l.Place] += l.Count
	}
	for place, want := range map[flowv1.Place]uint64{flowv1.Place_PLACE_KERNEL: 44, flowv1.Place_PLACE_AGENT: 2} {
		if got[place] != want || f.lost[place] != want {
			t.Errorf("%s: %d told, %d counted, want %d", place, got[place], f.lost[place], want)
		}
	}
}

// What has no numbers is on disk before it is sent, and is sent by the next agent under the same numbers.
func TestUnnumberedLossesOutliveTheAgent(t *testing.T) {
	rings, d := &fakeRings{t: t, records: records(10)}, &disk{}
	old := agent(t, rings, Ended{}, d)
	d.list = []*flowv1.Loss{{Place: flowv1.Place_PLACE_KERNEL, Cause: flowv1.Cause_CAUSE_FULL, Count: 44, Cpu: proto.Uint32(1)}}
	old.runUntil(t, func() bool { return len(d.pending) == 1 && old.Stats().Next == 12 })
	// It dies before it has sent anything, and so does the next one, which told of the first one's end.
	second := agent(t, rings, Ended{}, d)
	third := agent(t, rings, Ended{}, d)
	third.runUntil(t, func() bool { return third.Stats().Next > 1 && third.sealer.Len() == 0 })
	_, _, losses := count(third.batches(t))
	ends := map[uint64]uint64{}
	var kernel uint64
	for _, l := range losses {
		if l.Cause == flowv1.Cause_CAUSE_RESTART {
			ends[l.Epoch] = l.Last
		} else {
			kernel += l.Count
		}
	}
	if kernel != 44 || ends[old.Stats().Epoch] != 11 || ends[second.Stats().Epoch] != 1 || len(losses) != 3 {
		t.Errorf("losses %v: want 44 of the kernel, epoch %d to end at 11 and epoch %d at 1, each once", losses, old.Stats().Epoch, second.Stats().Epoch)
	}
}

// An agent that died after it kept a batch and before it saved the state has given that batch's numbers.
func TestKeptBatchCountsAsNumbered(t *testing.T) {
	rings, d := &fakeRings{t: t, records: records(10)}, &disk{}
	old := agent(t, rings, Ended{}, d)
	old.runUntil(t, func() bool { return old.Stats().Next == 11 })
	d.pending = []*batch.Sealed{{Epoch: old.Stats().Epoch, First: 11, Count: 2}}
	agent(t, rings, Ended{}, d)
	if b, err := batchtest.Decode(d.pending[1].Bytes); err != nil || b.Records[0].GetLoss().GetLast() != 12 {
		t.Errorf("%v, %v; want the old epoch to end at 12", b, err)
	}
}

// A batch of losses that the spool dropped is replaced, not forgotten; while the disk takes no more, nothing is told.
func TestDroppedLossesAreToldAgain(t *testing.T) {
	f := agent(t, &fakeRings{t: t, records: records(3)}, Ended{})
	dropped := &batch.Sealed{Epoch: 1, First: 1, Count: 1, Bytes: make([]byte, 1<<27),
		Losses: []*flowv1.Loss{{Place: flowv1.Place_PLACE_KERNEL, Cause: flowv1.Cause_CAUSE_FULL, Count: 7}}}
	f.losses.pending = []*batch.Sealed{dropped}
	f.spool.Push(dropped) // larger than the spool
	f.losses.full = true
	f.losses.list = []*flowv1.Loss{{Place: flowv1.Place_PLACE_KERNEL, Cause: flowv1.Cause_CAUSE_FULL, Count: 1}}
	f.runUntil(t, func() bool { return f.Stats().Next > 1 })
	if len(f.losses.pending) != 1 || len(f.losses.list) != 1 {
		t.Errorf("%d pending, %d to tell: want it to wait", len(f.losses.pending), len(f.losses.list))
	}
	f.losses.full, f.lossesDue = false, time.Time{}
	f.runUntil(t, func() bool { return f.losses.pending[0] != dropped })
	var kernel uint64
	_, _, losses := count(f.batches(t))
	for _, l := range losses {
		if l.Place == flowv1.Place_PLACE_KERNEL {
			kernel += l.Count
		}
	}
	if kernel != 8 || f.lost[flowv1.Place_PLACE_KERNEL] != 1 || f.lost[flowv1.Place_PLACE_SPOOL] != 1 {
		t.Errorf("%d told, counted %v; want 8 told, 1 of them news, and the dropped record", kernel, f.lost)
	}
}

func TestRunSealsTheRestAtTheEnd(t *testing.T) {
	f := agent(t, &fakeRings{t: t, records: records(3)}, Ended{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f.record(0, f.rings.records[0], 1)
	if err := f.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if flows, _, _ := count(f.batches(t)); flows != 1 || f.rings.state.Positions[0] != 1 {
		t.Errorf("%d flows, state %+v", flows, f.rings.state)
	}
}
