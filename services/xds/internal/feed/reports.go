// SPDX-License-Identifier: Apache-2.0

package feed

import (
	"context"
	"sync"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// Reports say how things stand with nodes' proxies, by the filter or configuration that it is about, on their way to every replica of the policy service.
// Of several changes of one only the last is sent, so that no more wait than there are.
type Reports struct {
	mu      sync.Mutex
	current map[string]map[string]report // by node and resource; "" = the proxies themselves
	readers map[*reader]bool
}

// report is what is said of a resource; nothing = it is not worth a word.
type report struct {
	err, revision string
	connected     bool
}

type subject struct{ node, resource string }

// reader is one stream.
type reader struct {
	pending map[subject]report
	changed chan struct{}
}

// NewReports returns an empty set.
func NewReports() *Reports {
	return &Reports{current: map[string]map[string]report{}, readers: map[*reader]bool{}}
}

// maxError is what of an error is told.
const maxError = 1024

// Set replaces what is said of a node: whether a proxy of it is connected, what is wrong, by resource, and the revisions of filters that it has taken.
func (r *Reports) Set(node string, connected bool, errors, taken map[string]string) {
	now := make(map[string]report, len(taken)+1)
	if connected {
		now[""] = report{connected: true}
	}
	for filter, revision := range taken {
		now[filter] = report{revision: revision}
	}
	for resource, text := range errors {
		if resource == "" {
			continue
		}
		if len(text) > maxError {
			text = text[:maxError] + "..."
		}
		now[resource] = report{err: text, revision: now[resource].revision}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.current[node]
	for resource := range before {
		if _, still := now[resource]; !still {
			r.tell(subject{node, resource}, report{})
		}
	}
	for resource, said := range now {
		if before[resource] != said {
			r.tell(subject{node, resource}, said)
		}
	}
	if r.current[node] = now; len(now) == 0 {
		delete(r.current, node)
	}
}

func (r *Reports) tell(s subject, said report) {
	for reader := range r.readers {
		reader.pending[s] = said
		reader.wake()
	}
}

func (r *reader) wake() {
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// send sends all reports, then changes, until ctx ends or a send fails.
func (r *Reports) send(ctx context.Context, send func(*policyv1.ProxyReport) error) error {
	in := &reader{changed: make(chan struct{}, 1), pending: map[subject]report{}}
	r.mu.Lock()
	for node, all := range r.current {
		for resource, said := range all {
			in.pending[subject{node, resource}] = said
		}
	}
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
			message, ok := r.next(in)
			if !ok {
				break
			}
			if err := send(message); err != nil {
				return err
			}
		}
	}
}

func (r *Reports) next(in *reader) (*policyv1.ProxyReport, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s, said := range in.pending {
		delete(in.pending, s)
		return &policyv1.ProxyReport{Node: s.node, Resource: s.resource, Error: said.err, Revision: said.revision, Connected: said.connected}, true
	}
	return nil, false
}
