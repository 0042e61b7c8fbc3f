// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"fmt"
	"slices"
	"testing"
	"time"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/testflow"
)

// clock is a time that the test sets.
type clock struct{ at time.Time }

func (c *clock) now() time.Time { return c.at }

func source(t *testing.T, b *flowv1.Batch, arrival time.Time) *event.Source {
	t.Helper()
	parsed, err := batch.Parse(testflow.Encode(b))
	if err != nil {
		t.Fatal(err)
	}
	return event.NewSource(parsed, 1, arrival.UnixNano())
}

func TestConnected(t *testing.T) {
	c := &clock{testflow.Base}
	r := New(20*time.Second, c.now)
	state := func() string {
		s := ""
		for _, n := range r.Nodes() {
			s += fmt.Sprintf("%s %t ", n.Name, n.Connected)
		}
		return s
	}
	word := func(relay string, connected bool) {
		r.Presence(bus.Presence{Cluster: "default", Node: "node-1", Relay: relay, Address: "10.0.0.1:5", ServerName: "s", Connected: connected})
	}
	check := func(what, want string) {
		t.Helper()
		if got := state(); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	check("nothing known", "")
	word("a", true)
	check("a relay says so", "default/node-1 true ")
	word("b", true)
	word("a", false)
	check("the agent moved", "default/node-1 true ")
	word("b", false)
	check("it left", "default/node-1 false ")
	word("b", true)
	c.at = c.at.Add(presenceAge + time.Second)
	check("the relay fell silent", "default/node-1 false ")
	r.Batch(source(t, testflow.Flows("node-1", 1, 1, 2, c.at), c.at), 2)
	check("a batch", "default/node-1 true ")
	c.at = c.at.Add(21 * time.Second)
	check("silence", "default/node-1 false ")
	n := r.Nodes()[0]
	if n.Address != "10.0.0.1:5" || n.ServerName != "s" || n.Version != "Weir 0.1.0" || n.Flows != 2 || n.Records != 2 || n.Epoch != 1 || n.LastSeq != 2 {
		t.Errorf("node = %+v", n)
	}
}

func TestRates(t *testing.T) {
	c := &clock{testflow.Base}
	r := New(time.Second, c.now)
	if _, rate := r.Flows(); rate != 0 {
		t.Errorf("rate of nothing = %f", rate)
	}
	for i := range 120 {
		at := testflow.Base.Add(time.Duration(i) * time.Second)
		r.Batch(source(t, testflow.Flows("node-1", 1, uint64(1+10*i), 10, at), at), 10)
	}
	c.at = testflow.Base.Add(120 * time.Second)
	seen, rate := r.Flows()
	if seen != 1200 || rate != 10 {
		t.Errorf("seen %d, rate %f; want 1200, 10", seen, rate)
	}
	c.at = c.at.Add(30 * time.Second)
	if _, rate := r.Flows(); rate != 5 {
		t.Errorf("after 30 s of silence: rate %f, want 5", rate)
	}
	if got := r.Nodes()[0].FlowsPerSecond; got != 5 {
		t.Errorf("the node's rate = %f", got)
	}
	c.at = c.at.Add(time.Hour)
	if _, rate := r.Flows(); rate != 0 {
		t.Errorf("after an hour: rate %f", rate)
	}
}

func TestRateOfAShortSpan(t *testing.T) {
	c := &clock{testflow.Base.Add(2 * time.Second)}
	r := New(time.Second, c.now)
	r.Batch(source(t, testflow.Flows("node-1", 1, 1, 10, testflow.Base), testflow.Base), 10)
	if _, rate := r.Flows(); rate != 5 {
		t.Errorf("rate = %f, want 10 flows over 2 s", rate)
	}
}

func TestNamespaces(t *testing.T) {
	c := &clock{testflow.Base}
	r := New(time.Second, c.now)
	b := testflow.Flows("node-1", 1, 1, 2, c.at)
	b.Header.Namespaces = []string{"", "b", "a"}
	r.Batch(source(t, b, c.at), 2)
	c.at = c.at.Add(50 * time.Minute)
	b = testflow.Flows("node-1", 1, 3, 2, c.at)
	b.Header.Namespaces, b.Header.Cluster = []string{"b"}, "a-cluster"
	r.Batch(source(t, b, c.at), 2)
	if got, want := r.Namespaces(), []Namespace{{"a-cluster", "b"}, {"default", "a"}, {"default", "b"}}; !slices.Equal(got, want) {
		t.Errorf("namespaces = %v, want %v", got, want)
	}
	c.at = c.at.Add(20 * time.Minute)
	if got, want := r.Namespaces(), []Namespace{{"a-cluster", "b"}}; !slices.Equal(got, want) {
		t.Errorf("an hour later = %v, want %v", got, want)
	}
}

func TestLosses(t *testing.T) {
	r := New(time.Second, time.Now)
	gap := func(node string, place flowv1.Place, count uint64, withdrawn bool) {
		r.Gap(&event.Gap{NodeName: node, Place: place, Cause: flowv1.Cause_CAUSE_FULL, Count: count, Withdrawn: withdrawn})
	}
	gap("b", flowv1.Place_PLACE_KERNEL, 3, false)
	gap("a", flowv1.Place_PLACE_SPOOL, 2, false)
	gap("a", flowv1.Place_PLACE_KERNEL, 1, false)
	gap("a", flowv1.Place_PLACE_SPOOL, 5, false)
	gap("b", flowv1.Place_PLACE_KERNEL, 3, true)
	want := []Loss{
		{LossKey{"a", flowv1.Place_PLACE_KERNEL, flowv1.Cause_CAUSE_FULL}, 1},
		{LossKey{"a", flowv1.Place_PLACE_SPOOL, flowv1.Cause_CAUSE_FULL}, 7},
	}
	if got := r.Losses(); !slices.Equal(got, want) {
		t.Errorf("losses = %v, want %v", got, want)
	}
}
