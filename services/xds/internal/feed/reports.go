// SPDX-License-Identifier: Apache-2.0

package feed

import (
	"context"
	"maps"
	"sync"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// Reports are the errors of nodes, by the filter or configuration that they are about, on their way to every replica of the policy service. Of several
// changes of one only the last is sent, so that no more wait than were ever wrong at once.
type Reports struct {
	mu      sync.Mutex
	current map[subject]string
	readers map[*reader]bool
}

type subject struct{ node, resource string }

// reader is one stream.
type reader struct {
	pending map[subject]string
	changed chan struct{}
}

// NewReports returns an empty set.
func NewReports() *Reports {
	return &Reports{current: map[subject]string{}, readers: map[*reader]bool{}}
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
			r.tell(s, "")
		}
	}
	for resource, text := range errors {
		s := subject{node: node, resource: resource}
		if len(text) > maxError {
			text = text[:maxError] + "..."
		}
		if resource != "" && r.current[s] != text {
			r.current[s] = text
			r.tell(s, text)
		}
	}
}

func (r *Reports) tell(s subject, text string) {
	for reader := range r.readers {
		reader.pending[s] = text
		reader.wake()
	}
}

func (r *reader) wake() {
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// send sends all errors, then changes, until ctx ends or a send fails.
func (r *Reports) send(ctx context.Context, send func(*policyv1.ProxyReport) error) error {
	in := &reader{changed: make(chan struct{}, 1)}
	r.mu.Lock()
	in.pending = maps.Clone(r.current)
	r.readers[in] = true
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.readers, in)
	}()
	in.wake()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-in.changed:
		}
		for {
			report, ok := r.next(in)
			if !ok {
				break
			}
			if err := send(report); err != nil {
				return err
			}
		}
	}
}

func (r *Reports) next(in *reader) (*policyv1.ProxyReport, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s, text := range in.pending {
		delete(in.pending, s)
		return &policyv1.ProxyReport{Node: s.node, Resource: s.resource, Error: text}, true
	}
	return nil, false
}
