// SPDX-License-Identifier: Apache-2.0

package policymap

import (
	"context"
	"errors"
	"fmt"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// ErrNoSubject says that the policy service has not said which policies an endpoint has.
var ErrNoSubject = errors.New("the policy service has not sent its policy")

// Wait waits until the policies of a subject are known. The error is ErrNoSubject with ctx's when they do not come.
func (e *Engine) Wait(ctx context.Context, subject string) error {
	for {
		e.mu.Lock()
		known := e.complete && e.subjects[subject] != nil
		changed := e.changed
		e.mu.Unlock()
		if known {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ErrNoSubject, ctx.Err())
		case <-changed:
		}
	}
}

// Bind puts the policies of a subject in force for an endpoint that does not run yet. The error is ErrNoSubject when they are not known.
func (e *Engine) Bind(subject string, id uint16) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.subjects[subject]
	if s == nil {
		return ErrNoSubject
	}
	e.bind(subject, id)
	delete(e.adopted, id)
	// A number is used again: what its last endpoint had does not count.
	return errors.Join(e.setEndpoint(id, datapath.EndpointPolicy{Ingress: denyAll, Egress: denyAll}), e.applyTo(id, s), e.bump())
}

// Adopt takes over an endpoint that runs. What the kernel has for it stays until the policy service says otherwise.
func (e *Engine) Adopt(subject string, id uint16) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.bind(subject, id)
	if e.frozen {
		e.adopted[id] = struct{}{}
	}
	if s := e.subjects[subject]; s != nil {
		return errors.Join(e.applyTo(id, s), e.bump())
	}
	return nil
}

// Release takes an endpoint out that nothing can reach any more.
func (e *Engine) Release(subject string, id uint16) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.adopted, id)
	delete(e.bound[subject], id)
	if len(e.bound[subject]) == 0 {
		delete(e.bound, subject)
		if _, paused := e.pauses[subject]; paused {
			delete(e.pauses, subject)
			if err := writePauses(e.cfg.PausesFile, e.pauses); err != nil {
				e.log.Error("pauses were not saved", "error", err)
			}
		}
	}
	if err := e.setEndpoint(id, datapath.EndpointPolicy{}); err != nil {
		return err
	}
	if e.frozen {
		return nil
	}
	return e.collectPolicies()
}

func (e *Engine) bind(subject string, id uint16) {
	if e.bound[subject] == nil {
		e.bound[subject] = map[uint16]struct{}{}
	}
	e.bound[subject][id] = struct{}{}
}

// applySubject makes all endpoints of a subject have its policies.
func (e *Engine) applySubject(key string) error {
	s := e.subjects[key]
	if s == nil {
		return nil
	}
	var errs []error
	for id := range e.bound[key] {
		errs = append(errs, e.applyTo(id, s))
	}
	return errors.Join(errs...)
}

func (e *Engine) applyTo(id uint16, s *desired.Subject) error {
	have := e.force[id]
	want := have
	_, nodePaused := e.pauses[""]
	_, paused := e.pauses[s.Key]
	audit := s.Audit || nodePaused || paused
	want.IngressAudit, want.EgressAudit = audit, audit
	if _, adopted := e.adopted[id]; !adopted {
		want.Ingress, want.Egress = e.numberOf(s.Ingress, have.Ingress), e.numberOf(s.Egress, have.Egress)
	}
	return e.setEndpoint(id, want)
}

// numberOf is the policy that an endpoint gets for a key. A policy that is not in the kernel does not replace one that is; without one, everything is
// denied.
func (e *Engine) numberOf(key string, have uint32) uint32 {
	if key == "" {
		return 0
	}
	if p := e.policies[key]; p != nil && p.written && (p.blocked == nil || p.number == have) {
		return p.number
	}
	if have != 0 {
		return have
	}
	return denyAll
}

func (e *Engine) setEndpoint(id uint16, want datapath.EndpointPolicy) error {
	if want.Ingress == 0 {
		want.IngressAudit = false
	}
	if want.Egress == 0 {
		want.EgressAudit = false
	}
	if e.force[id] == want {
		return nil
	}
	if err := e.cfg.Maps.SetEndpoint(id, want); err != nil {
		return err
	}
	if want == (datapath.EndpointPolicy{}) {
		delete(e.force, id)
	} else {
		e.force[id] = want
	}
	e.dirty = true
	return nil
}
