// SPDX-License-Identifier: Apache-2.0

package progress

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/services/policy/internal/object"
)

// Conditions that are written.
const (
	// ConditionValid says whether the object means something that can be enforced.
	ConditionValid = "Valid"
	// ConditionEnforced says on which nodes it is in force.
	ConditionEnforced = "Enforced"
)

// Sink is where statuses are kept.
type Sink interface {
	// UpdateStatus merges into an object's status (JSON merge patch).
	UpdateStatus(ctx context.Context, key object.Key, uid string, status []byte) error
	// AcquireLease takes or renews a lease, and reports whether the holder has it.
	AcquireLease(ctx context.Context, name, holder string, seconds uint32) (bool, error)
}

// lease is held by the replica that writes.
const (
	lease        = "weir-policy-status"
	leaseSeconds = 15
	leaseRenew   = 5 * time.Second
	writeEvery   = time.Second
	writeTimeout = 5 * time.Second
	writers      = 8
)

// Writer keeps the statuses of objects current, on one replica of all.
type Writer struct {
	sink    Sink
	holder  string
	compute func(context.Context) ([]Object, error)
	now     func() time.Time
	log     *slog.Logger

	leads   bool
	renewed time.Time
	written map[object.Key]written
	fault   string // of the last call, so that it is logged once
}

type written struct {
	uid    string
	status string
	// since is the time of each condition's last change.
	since map[string]metav1.Time
}

// NewWriter makes a writer; holder names this replica, compute says how things stand.
func NewWriter(sink Sink, holder string, compute func(context.Context) ([]Object, error), now func() time.Time, log *slog.Logger) *Writer {
	return &Writer{sink: sink, holder: holder, compute: compute, now: now, log: log.With("component", "status"), written: map[object.Key]written{}}
}

// Run writes until ctx ends: each object at most once a second, and only what changed.
func (w *Writer) Run(ctx context.Context) error {
	ticker := time.NewTicker(writeEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			w.Step(ctx)
		}
	}
}

// Step renews the lease when it is time and, with it, writes what changed.
func (w *Writer) Step(ctx context.Context) {
	if !w.lead(ctx) {
		return
	}
	objects, err := w.compute(ctx)
	if err != nil {
		return // the service stops
	}
	var group errgroup.Group
	group.SetLimit(writers)
	results := make([]error, len(objects))
	known := map[object.Key]bool{}
	for i := range objects {
		o := &objects[i]
		key := o.Object.Key()
		known[key] = true
		before := w.written[key]
		next := w.status(o, before)
		if next.uid == before.uid && next.status == before.status {
			continue
		}
		w.written[key] = next
		if unchanged(o.Object.Conditions, next) {
			continue // as another replica left it
		}
		group.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, writeTimeout)
			defer cancel()
			results[i] = w.sink.UpdateStatus(ctx, key, o.Object.UID, []byte(next.status))
			return nil
		})
	}
	_ = group.Wait() // results has the errors
	for i, err := range results {
		if err != nil {
			delete(w.written, objects[i].Object.Key()) // again
			w.note(fmt.Errorf("write status of %s: %w", objects[i].Object.Key(), err))
		}
	}
	for key := range w.written {
		if !known[key] {
			delete(w.written, key)
		}
	}
}

// lead reports whether this replica writes.
func (w *Writer) lead(ctx context.Context) bool {
	now := w.now()
	if now.Sub(w.renewed) < leaseRenew {
		return w.leads
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	leads, err := w.sink.AcquireLease(ctx, lease, w.holder, leaseSeconds)
	if err != nil {
		w.note(fmt.Errorf("acquire lease: %w", err))
		// Without an answer the lease holds until it ends.
		if now.Sub(w.renewed) >= leaseSeconds*time.Second {
			w.leads = false
		}
		return w.leads
	}
	if leads != w.leads {
		w.log.Info("status of policies", "written here", leads)
		clear(w.written)
	}
	w.leads, w.renewed = leads, now
	return leads
}

// note logs an error once.
func (w *Writer) note(err error) {
	if err.Error() != w.fault {
		w.fault = err.Error()
		w.log.Warn("status of policies is not current", "error", err)
	}
}

// status makes the status of an object. Times are those of the last change, as far as they are known.
func (w *Writer) status(o *Object, before written) written {
	next := written{uid: o.Object.UID, since: map[string]metav1.Time{}}
	conditions := Conditions(o)
	last := map[string]metav1.Condition{}
	for _, c := range o.Object.Conditions {
		last[c.Type] = c
	}
	for i := range conditions {
		c := &conditions[i]
		at, ok := before.since[c.Type+string(c.Status)]
		if !ok || before.uid != o.Object.UID {
			at = metav1.NewTime(w.now().UTC().Truncate(time.Second))
			if l := last[c.Type]; l.Status == c.Status && !l.LastTransitionTime.IsZero() {
				at = l.LastTransitionTime
			}
		}
		c.LastTransitionTime = at
		next.since[c.Type+string(c.Status)] = at
	}
	text, err := json.Marshal(map[string]any{"conditions": conditions})
	if err != nil {
		panic(fmt.Sprintf("conditions cannot be written: %v", err))
	}
	next.status = string(text)
	return next
}

// unchanged reports whether an object has these conditions already.
func unchanged(have []metav1.Condition, want written) bool {
	var status struct {
		Conditions []metav1.Condition `json:"conditions"`
	}
	if err := json.Unmarshal([]byte(want.status), &status); err != nil || len(have) != len(status.Conditions) {
		return false
	}
	for i, c := range status.Conditions {
		h := have[i]
		if h.Type != c.Type || h.Status != c.Status || h.Reason != c.Reason || h.Message != c.Message || h.ObservedGeneration != c.ObservedGeneration {
			return false
		}
	}
	return true
}

// Conditions says how things stand with an object, without times.
func Conditions(o *Object) []metav1.Condition {
	valid := metav1.Condition{
		Type: ConditionValid, Status: metav1.ConditionTrue, Reason: "Accepted", Message: "Policy validation succeeded", ObservedGeneration: o.Object.Generation,
	}
	if o.Fault != nil {
		valid.Status, valid.Reason, valid.Message = metav1.ConditionFalse, "Invalid", o.Fault.Error()
		if o.NotYet != "" {
			valid.Reason = "NotEnforceable"
		}
	}
	enforced := metav1.Condition{
		Type: ConditionEnforced, Status: metav1.ConditionFalse, Reason: "Behind", Message: o.Message(), ObservedGeneration: cmp.Or(o.Enforced, o.Object.Generation),
	}
	switch {
	case !o.InForce && o.Fault != nil:
		enforced.Reason = "Invalid"
	case len(o.Conflicts) > 0:
		enforced.Reason = "Conflict"
	case len(o.Lagging) == 0 && o.Since != 0:
		enforced.Status, enforced.Reason = metav1.ConditionTrue, "InForce"
	}
	return []metav1.Condition{valid, enforced}
}
