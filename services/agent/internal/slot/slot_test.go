// SPDX-License-Identifier: Apache-2.0

package slot_test

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

// node is what an agent finds on its node, with a journal of what happens to it.
type node struct {
	t         *testing.T
	path      string
	rows      map[uint16]uint16
	listening map[uint16]struct{}
	// comes are the ports that begin to listen at a look, in turn.
	comes   []uint16
	now     time.Time
	journal []string
	*slot.Slots
}

func start(t *testing.T) *node {
	n := &node{t: t, path: filepath.Join(t.TempDir(), "slots"), rows: map[uint16]uint16{}, listening: map[uint16]struct{}{}, now: time.Unix(1_000_000, 0)}
	n.restart()
	return n
}

func (n *node) restart() {
	n.t.Helper()
	s, err := slot.New(slot.Config{Path: n.path, Kernel: n, Listening: n.look, DNSPort: 10053, ProxyPort: 9901, Report: n.report, Tick: n.tick,
		Now: func() time.Time { return n.now }, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		n.t.Fatal(err)
	}
	n.Slots = s
}

func (n *node) Set(s, port uint16) error {
	n.rows[s] = port
	n.journal = append(n.journal, fmt.Sprintf("row %d=%d", s, port))
	return nil
}

func (n *node) Delete(s uint16) error {
	delete(n.rows, s)
	n.journal = append(n.journal, fmt.Sprintf("no row %d", s))
	return nil
}

func (n *node) List() (map[uint16]uint16, error) { return maps.Clone(n.rows), nil }

func (n *node) look() (map[uint16]struct{}, error) { return maps.Clone(n.listening), nil }

func (n *node) tick() <-chan time.Time {
	n.now = n.now.Add(10 * time.Millisecond)
	if len(n.comes) > 0 {
		n.listening[n.comes[0]] = struct{}{}
		n.journal = append(n.journal, fmt.Sprintf("listens %d", n.comes[0]))
		n.comes = n.comes[1:]
	}
	ch := make(chan time.Time, 1)
	ch <- n.now
	return ch
}

func (n *node) report(list []slot.Slot) {
	text := "report"
	for _, s := range list {
		text += fmt.Sprintf(" %d=%s", s.Number, s.Key)
	}
	n.journal = append(n.journal, text)
}

func (n *node) take() []string {
	j := n.journal
	n.journal = nil
	return j
}

func (n *node) expect(when string, want ...string) {
	n.t.Helper()
	if got := n.take(); !slices.Equal(got, want) {
		n.t.Errorf("%s: %q, want %q", when, got, want)
	}
}

func (n *node) prepare(quiet bool, filters ...slot.Filter) {
	n.t.Helper()
	if err := n.Prepare(filters, quiet); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) keep(keys ...string) {
	n.t.Helper()
	used := map[string]struct{}{}
	for _, k := range keys {
		used[k] = struct{}{}
	}
	if err := n.Keep(used); err != nil {
		n.t.Fatal(err)
	}
}

func http(key string) slot.Filter {
	return slot.Filter{Key: key, Kind: uint8(desired.FilterHTTP), Direction: desired.Ingress}
}

func dns(key string) slot.Filter { return slot.Filter{Key: key, Kind: uint8(desired.FilterDNS)} }

func TestListenerFirst(t *testing.T) {
	n := start(t)
	n.prepare(false, http("a"))
	n.expect("no proxy: nobody is waited for", "report 1=a", "row 1=20001")

	n.listening[9901] = struct{}{}
	n.comes = []uint16{20003, 20002}
	n.prepare(false, http("b"), http("c"), dns("d"), http("a"))
	n.expect("a proxy", "report 1=a 2=b 3=c 4=d", "listens 20003", "listens 20002", "row 2=20002", "row 3=20003", "row 4=10053")

	began := n.now
	n.prepare(false, http("e"))
	n.expect("its listener does not come", "report 1=a 2=b 3=c 4=d 5=e", "row 5=20005")
	if waited := n.now.Sub(began); waited != 2*time.Second || n.Stats().Missed != 1 {
		t.Errorf("waited %s, missed %d: want 2 s for one", waited, n.Stats().Missed)
	}
	began = n.now
	n.prepare(false, http("e"), dns("f"))
	n.expect("nothing new for the proxy", "report 1=a 2=b 3=c 4=d 5=e 6=f", "row 6=10053")
	n.prepare(true, http("g"))
	n.expect("from disk", "report 1=a 2=b 3=c 4=d 5=e 6=f 7=g", "row 7=20007")
	if n.now != began {
		t.Errorf("waited %s: want no wait", n.now.Sub(began))
	}
}

func TestStableAndResting(t *testing.T) {
	n := start(t)
	n.prepare(true, http("a"), http("b"), dns("d"))
	n.take()
	n.keep("a", "d")
	n.Settle()
	n.expect("the listener stays for a moment", "no row 2")
	n.now = n.now.Add(10 * time.Second)
	n.Settle()
	n.Settle()
	n.expect("it goes", "report 1=a 3=d")
	n.restart()
	n.report(n.Listed())
	n.expect("restart", "report 1=a 3=d")
	if !maps.Equal(n.rows, map[uint16]uint16{1: 20001, 3: 10053}) {
		t.Errorf("rows %v", n.rows)
	}
	n.prepare(true, http("c"), http("b"))
	n.expect("a number that rests is its key's", "report 1=a 2=b 3=d 4=c", "row 4=20004", "row 2=20002")
	if s, ok := n.Get(3); !ok || !s.DNS() || s.Key != "d" {
		t.Errorf("slot 3 is %+v", s)
	}
	n.keep("b", "c", "d")
	n.expect("goes", "no row 1")
	n.now = n.now.Add(10 * time.Second)
	n.Settle()
	n.expect("is gone", "report 2=b 3=d 4=c")
	n.now = n.now.Add(24 * time.Hour)
	n.keep("b", "c", "d")
	n.prepare(true, http("a"))
	n.expect("after the rest it has another number", "report 2=b 3=d 4=c 5=a", "row 5=20005")
}

func TestExhausted(t *testing.T) {
	n := start(t)
	var all []slot.Filter
	used := map[string]struct{}{}
	for i := range slot.Max {
		all = append(all, http(fmt.Sprint("k", i)))
		used[all[i].Key] = struct{}{}
	}
	n.prepare(true, all...)
	if st := n.Stats(); st.Used != slot.Max {
		t.Fatalf("%+v", st)
	}
	n.prepare(true, http("more"))
	if _, err := n.Of(http("more")); !errors.Is(err, slot.ErrFull) || !strings.Contains(err.Error(), "slots are full: 4095 of 4095") {
		t.Errorf("one more: %v", err)
	}
	for _, i := range []int{7, 9} { // 7 rests the longest
		delete(used, fmt.Sprint("k", i))
		if err := n.Keep(used); err != nil {
			t.Fatal(err)
		}
		n.now = n.now.Add(time.Second)
	}
	if got, err := n.Of(http("more")); err != nil || got != 8 {
		t.Errorf("one more: slot %d, %v; want 8, which rested the longest", got, err)
	}
	if got, err := n.Of(http("k9")); err != nil || got != 10 {
		t.Errorf("k9: slot %d, %v; want its own", got, err)
	}
}

// What the kernel names and the file does not know is given to nobody, and goes when the state is known.
func TestLostFile(t *testing.T) {
	n := start(t)
	n.prepare(true, http("a"), http("b"))
	if err := os.Remove(n.path); err != nil {
		t.Fatal(err)
	}
	n.take()
	n.restart()
	if n.Known() {
		t.Error("slots are known without their file")
	}
	n.prepare(true, http("b"))
	n.expect("lost", "report 3=b", "row 3=20003")
	n.keep("b")
	if !maps.Equal(n.rows, map[uint16]uint16{3: 20003}) || !n.Known() {
		t.Errorf("rows %v, known %t", n.rows, n.Known())
	}
	if err := os.WriteFile(n.path, []byte("weir-state slots 1 2 00\n{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	n.restart()
	if got, err := n.Of(http("b")); err != nil || got == 3 {
		t.Errorf("damaged: slot %d, %v", got, err)
	}
}
