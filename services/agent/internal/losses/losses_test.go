// SPDX-License-Identifier: Apache-2.0

package losses_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
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
func tell(t *testing.T, tr *losses.Tracker) ([]*flowv1.Loss, map[uint32]uint64) {
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
	return list, counts
}

func TestEachCountIsToldOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "losses")
	k := &kernel{}
	tr := tracker(t, path, k, false)
	if list, _ := tell(t, tr); len(list) != 0 {
		t.Errorf("losses of nothing: %v", list)
	}
	k.c.LostByCPU = []datapath.RecordCounts{{Trace: 5, Drop: 1}, {}, {Final: 2, Translation: 3}}
	first, counts := tell(t, tr)
	if len(counts) != 2 || counts[0] != 6 || counts[2] != 5 {
		t.Errorf("counts %v, want 6 on CPU 0 and 5 on CPU 2", counts)
	}
	if list, _ := tell(t, tr); len(list) != 0 {
		t.Errorf("told again: %v", list)
	}
	k.c.LostByCPU[1].Trace = 4
	if _, counts := tell(t, tr); len(counts) != 1 || counts[1] != 4 {
		t.Errorf("counts %v, want 4 on CPU 1", counts)
	}

	// The first batch was stored, the second died with the agent: the next agent tells what it told.
	if err := tr.Confirm(first); err != nil {
		t.Fatal(err)
	}
	tr = tracker(t, path, k, false)
	if _, counts := tell(t, tr); len(counts) != 1 || counts[1] != 4 {
		t.Errorf("after a restart: %v, want 4 on CPU 1", counts)
	}

	// The kernel's counters began anew.
	k.c.LostByCPU = []datapath.RecordCounts{{Trace: 2}}
	if _, counts := tell(t, tracker(t, path, k, true)); counts[0] != 2 {
		t.Errorf("with new maps: %v, want 2 on CPU 0", counts)
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
	if _, counts := tell(t, tr); counts[0] != 2 {
		t.Errorf("counts %v", counts)
	}
}
