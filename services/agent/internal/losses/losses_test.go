// SPDX-License-Identifier: Apache-2.0

package losses_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/services/agent/internal/batch"
	"github.com/weirmesh/weir/services/agent/internal/losses"
)

// kernel counts as the datapath does.
type kernel struct{ c datapath.Counters }

func (k *kernel) read() (datapath.Counters, error) { return k.c, nil }

func tracker(t *testing.T, path string, k *kernel, fresh bool) *losses.Tracker {
	t.Helper()
	tr, err := losses.New(path, k.read, fresh)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// tell returns the counts by CPU.
func tell(t *testing.T, tr *losses.Tracker) map[uint32]uint64 {
	t.Helper()
	list, err := tr.New(time.Unix(100, 0))
	if err != nil {
		t.Fatal(err)
	}
	counts := map[uint32]uint64{}
	for _, l := range list {
		if l.Place != flowv1.Place_PLACE_KERNEL || l.Cause != flowv1.Cause_CAUSE_FULL || l.Cpu == nil {
			t.Errorf("loss %v", l)
		}
		counts[l.GetCpu()] += l.Count
	}
	return counts
}

func sealed(first uint64) *batch.Sealed {
	return &batch.Sealed{Epoch: 5, First: first, Count: 1, MinTime: 1, MaxTime: 2, Bytes: []byte{byte(first), 0, 255}}
}

func keep(t *testing.T, tr *losses.Tracker, b *batch.Sealed, insteadOf ...*batch.Sealed) {
	t.Helper()
	if err := tr.Keep(b, insteadOf); err != nil {
		t.Fatal(err)
	}
}

func TestEachCountIsToldOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "losses")
	k := &kernel{}
	tr := tracker(t, path, k, false)
	if counts := tell(t, tr); len(counts) != 0 {
		t.Errorf("losses of nothing: %v", counts)
	}
	k.c.LostByCPU = []datapath.RecordCounts{{Trace: 5, Drop: 1}, {}, {Final: 2, Translation: 3}}
	if counts := tell(t, tr); len(counts) != 2 || counts[0] != 6 || counts[2] != 5 {
		t.Errorf("counts %v, want 6 on CPU 0 and 5 on CPU 2", counts)
	}
	keep(t, tr, sealed(1))
	if counts := tell(t, tr); len(counts) != 0 {
		t.Errorf("told again: %v", counts)
	}
	// What is told and not kept when the agent dies is told by the next one; what is kept is sent by it, as it is.
	k.c.LostByCPU[1].Trace = 4
	if counts := tell(t, tr); counts[1] != 4 {
		t.Errorf("counts %v, want 4 on CPU 1", counts)
	}
	tr = tracker(t, path, k, false)
	if counts := tell(t, tr); len(counts) != 1 || counts[1] != 4 {
		t.Errorf("after a restart: %v, want 4 on CPU 1", counts)
	}
	if p := tr.Pending(); len(p) != 1 || p[0].First != 1 || p[0].Epoch != 5 || p[0].Count != 1 || p[0].MaxTime != 2 || !bytes.Equal(p[0].Bytes, []byte{1, 0, 255}) {
		t.Errorf("pending %+v, want batch 1", p)
	}
	// The kernel's counters began anew; what is pending is still to be sent.
	k.c.LostByCPU = []datapath.RecordCounts{{Trace: 2}}
	tr = tracker(t, path, k, true)
	if counts := tell(t, tr); counts[0] != 2 || len(tr.Pending()) != 1 {
		t.Errorf("with new maps: %v, %d pending; want 2 on CPU 0, 1 pending", counts, len(tr.Pending()))
	}
}

func TestPending(t *testing.T) {
	path := filepath.Join(t.TempDir(), "losses")
	tr := tracker(t, path, &kernel{}, false)
	for first := uint64(1); first <= 3; first++ {
		keep(t, tr, sealed(first))
	}
	if err := tr.Stored(sealed(2)); err != nil {
		t.Fatal(err)
	}
	if err := tr.Stored(sealed(99)); err != nil { // a batch that tells of nothing
		t.Fatal(err)
	}
	keep(t, tr, sealed(4), sealed(1)) // 1 was dropped; 4 tells what it would have told
	for _, tr := range []*losses.Tracker{tr, tracker(t, path, &kernel{}, false)} {
		var got []uint64
		for _, b := range tr.Pending() {
			got = append(got, b.First)
		}
		if len(got) != 2 || got[0] != 3 || got[1] != 4 {
			t.Errorf("pending %v, want 3 and 4", got)
		}
	}
	for first := uint64(10); tr.Room(); first++ {
		if first > 1000 {
			t.Fatal("there is no bound")
		}
		keep(t, tr, sealed(first))
	}
}

func TestDamagedFileTellsAllAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "losses")
	if err := os.WriteFile(path, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	k := &kernel{}
	k.c.LostByCPU = []datapath.RecordCounts{{Trace: 2}}
	tr, err := losses.New(path, k.read, false)
	if err == nil || tr == nil {
		t.Fatalf("tracker %v, error %v; want both", tr, err)
	}
	if counts := tell(t, tr); counts[0] != 2 {
		t.Errorf("counts %v", counts)
	}
}
