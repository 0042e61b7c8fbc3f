// SPDX-License-Identifier: Apache-2.0

package policymap

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"time"

	"github.com/weirmesh/weir/services/agent/internal/statefile"
)

// Pause lets through what policy would drop, until a time.
type Pause struct {
	// Pod is "namespace/pod", for people; empty = the whole node.
	Pod    string    `json:"pod,omitempty"`
	Since  time.Time `json:"since"`
	Until  time.Time `json:"until"`
	Reason string    `json:"reason,omitempty"`
}

const (
	pausesKind    = "policy-pauses"
	pausesVersion = 1
	// pauseCheck is how often ends are looked for.
	pauseCheck = time.Second
)

func readPauses(path string) (map[string]Pause, error) {
	pauses := map[string]Pause{}
	b, err := statefile.Read(path, pausesKind, pausesVersion)
	if errors.Is(err, fs.ErrNotExist) {
		return pauses, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &pauses)
	}
	if err != nil {
		return map[string]Pause{}, err
	}
	return pauses, nil
}

func writePauses(path string, pauses map[string]Pause) error {
	b, err := json.Marshal(pauses)
	if err != nil {
		return err
	}
	return statefile.Write(path, pausesKind, pausesVersion, b)
}

// Pause begins a pause of a subject, or of the whole node (""), or changes the one that it has. It is on disk before it holds.
func (e *Engine) Pause(subject string, p Pause) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	pauses := maps.Clone(e.pauses)
	pauses[subject] = p
	return e.setPauses(pauses, "policy-paused", subject, p)
}

// Resume ends a pause. It says whether there was one.
func (e *Engine) Resume(subject string) (bool, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	p, ok := e.pauses[subject]
	if !ok {
		return false, nil
	}
	pauses := maps.Clone(e.pauses)
	delete(pauses, subject)
	return true, e.setPauses(pauses, "policy-resumed", subject, p)
}

// Pauses returns what is paused, by subject; "" is the node.
func (e *Engine) Pauses() map[string]Pause {
	e.mu.Lock()
	defer e.mu.Unlock()
	return maps.Clone(e.pauses)
}

// PausedUntil says until when policy is paused for a subject; zero = it is not.
func (e *Engine) PausedUntil(subject string) time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	until := e.pauses[""].Until
	if p, ok := e.pauses[subject]; ok && p.Until.After(until) {
		until = p.Until
	}
	return until
}

// setPauses makes pauses hold and tells of the change.
func (e *Engine) setPauses(pauses map[string]Pause, kind, subject string, p Pause) error {
	if err := writePauses(e.cfg.PausesFile, pauses); err != nil {
		return err
	}
	e.pauses = pauses
	target := p.Pod
	if subject == "" {
		target = "node"
	}
	e.log.Warn(kind, "target", target, "until", p.Until, "reason", p.Reason)
	e.cfg.Events.Notice(kind, map[string]any{"target": target, "until": p.Until, "since": p.Since, "reason": p.Reason})
	var errs []error
	for key := range e.bound {
		if subject == "" || key == subject {
			errs = append(errs, e.applySubject(key))
		}
	}
	return errors.Join(append(errs, e.bump())...)
}

// Run ends pauses at their time, until ctx ends.
func (e *Engine) Run(ctx context.Context) error {
	tick := time.NewTicker(pauseCheck)
	defer tick.Stop()
	for {
		e.ExpirePauses()
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// ExpirePauses ends pauses whose time is over.
func (e *Engine) ExpirePauses() {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.cfg.Now()
	for subject, p := range e.pauses {
		if now.Before(p.Until) {
			continue
		}
		pauses := maps.Clone(e.pauses)
		delete(pauses, subject)
		if err := e.setPauses(pauses, "policy-resumed", subject, p); err != nil {
			e.log.Error("a pause did not end; it is tried again", "error", err)
		}
	}
}
