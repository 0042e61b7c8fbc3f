// SPDX-License-Identifier: Apache-2.0

package hub

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/weirmesh/weir/internal/envoyconfig"
	"github.com/weirmesh/weir/services/policy/internal/object"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

func (f *fixture) watcher() *Watcher {
	f.t.Helper()
	w, err := f.WatchRender("v", "test")
	if err != nil {
		f.t.Fatal(err)
	}
	return w
}

func (f *fixture) update(w *Watcher) RenderUpdate {
	f.t.Helper()
	u, err := w.Next(f.ctx)
	if err != nil {
		f.t.Fatal(err)
	}
	return u
}

func (f *fixture) nodes(from, to int) {
	f.t.Helper()
	f.do(func(st *state.State) {
		for i := from; i < to; i++ {
			st.Upsert(&object.Node{Name: fmt.Sprintf("n-%03d", i)})
		}
	})
}

func TestWatcher(t *testing.T) {
	c := DefaultConfig()
	c.Chunk = 10
	f := start(t, c)
	f.nodes(0, 25)
	w := f.watcher()
	// Before the state is whole there is nothing.
	ctx, cancel := context.WithCancel(f.ctx)
	cancel()
	if u, err := w.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("before the source is synced: %+v, %v", u, err)
	}
	f.do(func(st *state.State) { st.MarkSynced() })
	for i, want := range []int{10, 10, 5} {
		u := f.update(w)
		if u.Revision != uint64(i+1) || len(u.Change.Upserts) != want || u.Synced != (i == 2) {
			t.Fatalf("update %d is %+v", i, u)
		}
	}
	// What changes while nobody reads is told as one: the last state of each.
	report := func(node string, slots ...state.Slot) {
		f.do(func(st *state.State) {
			st.BeginSession(node)
			if err := st.SetSlots(node, slots); err != nil {
				t.Error(err)
			}
		})
	}
	for i := range uint16(5) {
		report("n-000", state.Slot{Number: i + 1, Key: "k"})
	}
	f.do(func(st *state.State) { st.Delete(object.Key{Kind: object.KindNode, Name: "n-001"}) })
	u := f.update(w)
	if len(u.Change.Upserts) != 1 || len(u.Change.Removals) != 1 || u.Synced {
		t.Fatalf("the update is %+v", u)
	}
	if n, ok := u.Change.Upserts[0].(state.NodeSlots); !ok || n.Unknown || len(n.Slots) != 1 || n.Slots[0].Number != 5 {
		t.Errorf("the slots are %+v", u.Change.Upserts[0])
	}
	if k := u.Change.Removals[0]; k != (state.RenderKey{Kind: state.RenderNode, Name: "n-001"}) {
		t.Errorf("gone is %v", k)
	}
	// Nothing of it concerns proxies.
	f.namespaces(0, 3)
	report("n-002", state.Slot{Number: 1, Key: "k"})
	if u := f.update(w); len(u.Change.Upserts) != 1 || len(u.Change.Removals) != 0 {
		t.Errorf("the update is %+v", u)
	}
}

func TestEmptyStateIsSynced(t *testing.T) {
	f := start(t, DefaultConfig())
	f.do(func(st *state.State) { st.MarkSynced() })
	if u := f.update(f.watcher()); !u.Synced || len(u.Change.Upserts) > 0 {
		t.Errorf("the first update is %+v", u)
	}
}

// Large resources come alone.
func TestRenderCost(t *testing.T) {
	large := state.Config{Config: &envoyconfig.Config{Spec: make([]byte, 1<<20)}}
	small := state.NodeSlots{Node: "n"}
	c := state.RenderChange{
		Upserts:  []state.RenderResource{large, large, small, small, small},
		Removals: []state.RenderKey{{Kind: state.RenderNode, Name: "x"}, {Kind: state.RenderNode, Name: "y"}},
	}
	var got []int
	for _, part := range chunkRender(c, 4) {
		got = append(got, len(part.Upserts), len(part.Removals))
	}
	if want := []int{1, 0, 1, 0, 3, 1, 0, 1}; !slices.Equal(got, want) {
		t.Errorf("parts have %v, want %v", got, want)
	}
}

// What proxies have taken counts while the xDS server that says so is there; with several, what all have taken.
func TestTaken(t *testing.T) {
	f := start(t, DefaultConfig())
	a, b := f.watcher(), f.watcher()
	check := func(when, want string) {
		t.Helper()
		if got := fmt.Sprint(f.Proxies()); got != want {
			t.Errorf("%s: %s, want %s", when, got, want)
		}
	}
	a.Connected("n1", true)
	a.Connected("n2", true)
	a.Taken("n1", "f", "1")
	a.Taken("n1", "f", "2")
	a.Taken("n1", "g", "1")
	check("one server", "map[n1:map[f:2 g:1] n2:map[]]")
	b.Connected("n1", true)
	check("a second proxy, elsewhere", "map[n1:map[] n2:map[]]")
	b.Taken("n1", "f", "2")
	b.Taken("n1", "g", "0")
	check("it is behind", "map[n1:map[f:2] n2:map[]]")
	b.Taken("n1", "g", "")
	b.Connected("n1", false)
	a.Connected("n2", false)
	check("it is gone", "map[n1:map[f:2 g:1]]")
	a.Taken("n1", "g", "")
	if a.taken != 1 || b.taken != 0 {
		t.Errorf("%d and %d are counted, want 1 and 0", a.taken, b.taken)
	}
	a.taken = maxTaken
	if a.Taken("n1", "h", "1") || !a.Taken("n1", "f", "3") || a.lost != 1 {
		t.Errorf("what is beyond the bound was kept, or what is known was not; lost %d", a.lost)
	}
	a.Close()
	check("no server", "map[]")
}

func TestReports(t *testing.T) {
	f := start(t, DefaultConfig())
	a, b := f.watcher(), f.watcher()
	a.Report("n1", "r", "reason b")
	b.Report("n1", "r", "reason a")
	a.Report("n1", "other", "reason")
	a.Report("n1", "other", "")
	if got := f.Status().Faults; len(got) != 1 || got[0] != (ProxyFault{"n1", "r", "reason a"}) {
		t.Errorf("faults are %v", got)
	}
	b.Close()
	b.Report("n2", "r", "too late")
	if got := f.Status().Faults; len(got) != 1 || got[0].Reason != "reason b" {
		t.Errorf("faults are %v", got)
	}
	for i := range maxReports + 1 {
		a.Report("n1", fmt.Sprint(i), "reason")
	}
	kept := func(kept, _ bool) bool { return kept }
	if kept(a.Report("n1", "more", "reason")) || !kept(a.Report("n1", "r", "another")) || !kept(a.Report("n1", "more", "")) {
		t.Error("what is beyond the bound was kept, or what is known was not")
	}
	if x := f.Status().XDS; len(x) != 1 || x[0].Faults != maxReports || x[0].Lost == 0 {
		t.Errorf("xDS servers are %+v", x)
	}
	for range maxWatchers - 1 {
		f.watcher()
	}
	if _, err := f.WatchRender("", ""); !errors.Is(err, ErrTooMany) {
		t.Errorf("one watcher more: %v", err)
	}
}
