// SPDX-License-Identifier: Apache-2.0

package progress

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/services/policy/internal/object"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// fakeSink keeps statuses as the source does.
type fakeSink struct {
	mu     sync.Mutex
	holder string
	until  time.Time
	now    func() time.Time
	down   error
	writes []string
	last   map[object.Key][]metav1.Condition
}

func (s *fakeSink) UpdateStatus(_ context.Context, key object.Key, _ string, status []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down != nil {
		return s.down
	}
	var x struct {
		Conditions []metav1.Condition `json:"conditions"`
	}
	if err := json.Unmarshal(status, &x); err != nil {
		return err
	}
	s.writes = append(s.writes, key.Name+": "+x.Conditions[1].Message)
	s.last[key] = x.Conditions
	return nil
}

func (s *fakeSink) AcquireLease(_ context.Context, _, holder string, seconds uint32) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down != nil {
		return false, s.down
	}
	if s.holder == holder || s.holder == "" || !s.now().Before(s.until) {
		s.holder, s.until = holder, s.now().Add(time.Duration(seconds)*time.Second)
	}
	return s.holder == holder, nil
}

func TestWriters(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	clock := func() time.Time { return now }
	sink := &fakeSink{now: clock, last: map[object.Key][]metav1.Condition{}}
	key := object.Key{Kind: "NetworkPolicy", Namespace: "shop", Name: "p"}
	enforcing := 0
	compute := func(context.Context) ([]Object, error) {
		o := Object{
			PolicyStatus: state.PolicyStatus{
				Object: &object.Policy{Kind: key.Kind, Namespace: key.Namespace, Name: key.Name, UID: "u", Generation: 3, Conditions: sink.last[key]},
				Fault:  errors.New("not valid"),
			},
			Enforcing: enforcing, Nodes: 2,
		}
		return []Object{o}, nil
	}
	one := NewWriter(sink, "one", compute, clock, slog.New(slog.DiscardHandler))
	other := NewWriter(sink, "other", compute, clock, slog.New(slog.DiscardHandler))
	ctx := context.Background()
	step := func(what string, want int) {
		t.Helper()
		before := len(sink.writes)
		one.Step(ctx)
		other.Step(ctx)
		if got := len(sink.writes) - before; got != want {
			t.Errorf("%s: %d writes, want %d: %v", what, got, want, sink.writes[before:])
		}
		now = now.Add(time.Second)
	}
	step("the first one writes", 1)
	first := sink.last[key][0]
	if first.Type != ConditionValid || first.Status != metav1.ConditionFalse || !strings.Contains(first.Message, "not valid") || first.LastTransitionTime.IsZero() {
		t.Errorf("condition is %+v", first)
	}
	step("nothing changed", 0)

	// The other one takes over, and finds what the first one left.
	one.sink = &fakeSink{now: clock, down: errors.New("cut off")}
	now = now.Add(time.Minute)
	step("another replica without a change", 0)
	if !other.leads || one.leads {
		t.Errorf("leads: one %v, other %v", one.leads, other.leads)
	}

	// A write that fails is made again.
	sink.down = errors.New("away")
	compute2 := other.compute
	other.compute = func(ctx context.Context) ([]Object, error) {
		all, err := compute2(ctx)
		all[0].Fault = nil
		return all, err
	}
	step("the source is away", 0)
	sink.down = nil
	step("it is back", 1)
	if c := sink.last[key][0]; c.Status != metav1.ConditionTrue || !c.LastTransitionTime.After(first.LastTransitionTime.Time) {
		t.Errorf("condition is %+v, was %+v", c, first)
	}
	step("nothing changed again", 0)
}

func TestMessage(t *testing.T) {
	o := Object{PolicyStatus: state.PolicyStatus{Generation: 12, Since: 4}, Enforcing: 46, Nodes: 47}
	if got := o.Message(); got != "in force on no node" {
		t.Errorf("without a version: %q", got)
	}
	for i := range 7 {
		o.Lagging = append(o.Lagging, Lag{string(rune('a' + i)), "late"})
	}
	o.Conflicts = []string{"shop/a: two"}
	if got, want := o.Message(), "in force on no node; a: late; b: late; c: late; d: late; e: late; and 2 more; conflict at shop/a: two"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
