// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/weirmesh/weir/lab/internal/object"
)

// ErrBehind ends a watch whose reader was too slow: watch again, from the start.
var ErrBehind = errors.New("the watch fell behind")

// EventType says what happened.
type EventType int

// Event types.
const (
	Added EventType = iota + 1
	Modified
	Deleted
	// Synced ends the objects that existed when the watch began.
	Synced
)

// Event is one change. The object is shared and must not be changed.
type Event struct {
	Type   EventType
	Object object.Object
}

// Watch is a reader's queue of events. One reader at a time.
type Watch struct {
	cluster *Cluster
	kinds   []string

	mu     sync.Mutex
	queue  []Event
	behind bool
	wake   chan struct{}
}

// Watch begins with every object of the kinds (none = all) as Added, then Synced, then each change. Close it.
func (c *Cluster) Watch(kinds ...string) *Watch {
	w := &Watch{cluster: c, kinds: kinds, wake: make(chan struct{}, 1)}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, key := range c.keys() {
		if w.wants(key.Kind) {
			w.queue = append(w.queue, Event{Type: Added, Object: c.objects[key]})
		}
	}
	w.queue = append(w.queue, Event{Type: Synced})
	c.watches[w] = struct{}{}
	return w
}

func (w *Watch) wants(kind string) bool { return len(w.kinds) == 0 || slices.Contains(w.kinds, kind) }

// tell queues an event for every watch of its kind. The caller holds c.mu, which gives all watches the same order.
func (c *Cluster) tell(event Event) {
	kind := object.KindOf(event.Object)
	for w := range c.watches {
		if w.wants(kind) {
			w.push(event)
		}
	}
}

func (w *Watch) push(event Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.queue) >= w.cluster.config.WatchLimit+len(w.cluster.objects) {
		w.behind = true
		w.queue = nil
	}
	if !w.behind {
		w.queue = append(w.queue, event)
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Next returns all events that wait, in order, and blocks while there are none. It returns ErrBehind after the reader was too slow.
func (w *Watch) Next(ctx context.Context) ([]Event, error) {
	for {
		w.mu.Lock()
		events, behind := w.queue, w.behind
		w.queue = nil
		w.mu.Unlock()
		switch {
		case behind:
			return nil, ErrBehind
		case len(events) > 0:
			return events, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-w.wake:
		}
	}
}

// Close ends the watch.
func (w *Watch) Close() {
	w.cluster.mu.Lock()
	defer w.cluster.mu.Unlock()
	delete(w.cluster.watches, w)
}
