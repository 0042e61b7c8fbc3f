// SPDX-License-Identifier: Apache-2.0

package feed

import (
	"context"
	"maps"
	"sync"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// Reports are the errors of nodes, by the filter or configuration that they are about, on their way to the policy service. Of several changes of one
// only the last is sent, so that there are never more than there are errors.
type Reports struct {
	changed chan struct{}

	mu      sync.Mutex
	current map[subject]string
	pending map[subject]string
}

type subject struct{ node, resource string }

// NewReports returns an empty set.
func NewReports() *Reports {
	return &Reports{changed: make(chan struct{}, 1), current: map[subject]string{}, pending: map[subject]string{}}
}

// maxError is what of an error is told.
const maxError = 1024

// Set replaces the errors of a node.
func (r *Reports) Set(node string, errors map[string]string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s := range r.current {
		if _, still := errors[s.resource]; s.node == node && !still {
			delete(r.current, s)
			r.pending[s] = ""
		}
	}
	for resource, text := range errors {
		s := subject{node: node, resource: resource}
		if len(text) > maxError {
			text = text[:maxError] + "..."
		}
		if r.current[s] != text {
			r.current[s], r.pending[s] = text, text
		}
	}
	if len(r.pending) > 0 {
		r.wake()
	}
}

func (r *Reports) wake() {
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// send sends all errors, then changes, until ctx ends or a send fails.
func (r *Reports) send(ctx context.Context, send func(*policyv1.ProxyReport) error) error {
	r.mu.Lock()
	r.pending = maps.Clone(r.current)
	r.mu.Unlock()
	r.wake()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-r.changed:
		}
		for {
			report, ok := r.next()
			if !ok {
				break
			}
			if err := send(report); err != nil {
				return err
			}
		}
	}
}

func (r *Reports) next() (*policyv1.ProxyReport, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s, text := range r.pending {
		delete(r.pending, s)
		return &policyv1.ProxyReport{Node: s.node, Resource: s.resource, Error: text}, true
	}
	return nil, false
}
