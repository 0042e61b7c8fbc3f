// SPDX-License-Identifier: Apache-2.0

package hub

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/services/policy/internal/state"
)

// ErrTooMany is returned when more xDS servers watch than there may be.
var ErrTooMany = errors.New("too many xDS servers watch")

// Bounds of watchers.
const (
	maxWatchers = 64
	maxReports  = 16384
	// maxTaken bounds the filters of nodes that one xDS server says are taken.
	maxTaken = 1 << 20
)

// Watcher is the stream of one xDS server. As a Session, it keeps no queue: it remembers what it sent last and compares. Next is called by one goroutine;
// all else is safe for concurrent use. Fields are guarded by the hub's mu, except those that only Next uses.
type Watcher struct {
	hub      *Hub
	version  string
	instance string
	since    time.Time

	// Only Next uses these.
	sent     *state.Render
	chunks   []state.RenderChange
	revision uint64
	complete bool // the first state is sent

	synced  bool
	closed  bool
	reports map[reported]string
	// proxies are the nodes with a proxy at this server, and the revision of each filter that it has taken; taken counts those.
	proxies map[string]map[string]string
	taken   int
	lost    uint64
}

// reported names what a node's proxy refused.
type reported struct{ node, resource string }

// RenderUpdate is what to send to an xDS server.
type RenderUpdate struct {
	Revision uint64
	Change   state.RenderChange
	// Synced: with it the first state is complete.
	Synced bool
}

// WatchRender begins the stream of an xDS server. Call Close when done.
func (h *Hub) WatchRender(version, instance string) (*Watcher, error) {
	w := &Watcher{hub: h, version: version, instance: instance, since: time.Now(), reports: map[reported]string{}, proxies: map[string]map[string]string{}}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.watchers) >= maxWatchers {
		return nil, ErrTooMany
	}
	h.watchers[w] = struct{}{}
	return w, nil
}

// Close ends the stream; what it reported is forgotten.
func (w *Watcher) Close() {
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	w.closed = true
	delete(w.hub.watchers, w)
	w.hub.broadcastLocked()
}

// Next returns what to send next, waiting for it. Before the state is whole there is nothing.
func (w *Watcher) Next(ctx context.Context) (RenderUpdate, error) {
	for {
		if len(w.chunks) > 0 {
			return w.take(), nil
		}
		w.hub.mu.Lock()
		complete, current, changed := w.hub.complete, w.hub.current.Render(), w.hub.changed
		w.hub.mu.Unlock()
		if (complete || w.complete) && current != w.sent {
			w.chunks = chunkRender(state.DiffRender(w.sent, current), w.hub.config.Chunk)
			w.sent = current
			if len(w.chunks) == 0 && !w.complete {
				w.chunks = []state.RenderChange{{}} // nothing is the whole state
			}
			continue
		}
		select {
		case <-ctx.Done():
			return RenderUpdate{}, context.Cause(ctx)
		case <-changed:
		}
	}
}

// take returns the next chunk; the last one of the first state completes it.
func (w *Watcher) take() RenderUpdate {
	w.revision++
	update := RenderUpdate{Revision: w.revision, Change: w.chunks[0]}
	if w.chunks = w.chunks[1:]; len(w.chunks) == 0 && !w.complete {
		w.complete, update.Synced = true, true
		w.hub.mu.Lock()
		w.synced = true
		w.hub.mu.Unlock()
	}
	return update
}

// chunkRender cuts a change into parts of about at most size resources, to be applied one by one.
func chunkRender(c state.RenderChange, size int) []state.RenderChange {
	var all []state.RenderChange
	var now state.RenderChange
	used := 0
	room := func(n int) {
		if used > 0 && used+n > size {
			all, now, used = append(all, now), state.RenderChange{}, 0
		}
		used += n
	}
	for _, r := range c.Upserts {
		room(renderCost(r))
		now.Upserts = append(now.Upserts, r)
	}
	for _, k := range c.Removals {
		room(1)
		now.Removals = append(now.Removals, k)
	}
	if used > 0 {
		all = append(all, now)
	}
	return all
}

// bytesPerUnit is how many bytes of text weigh as much as a small resource: with 500 of them to an update, one stays well below what gRPC carries.
const bytesPerUnit = 4096

func renderCost(r state.RenderResource) int {
	switch r := r.(type) {
	case state.Config:
		return 1 + len(r.Spec)/bytesPerUnit
	case state.RoutedService:
		return cost(r.Service)
	case state.NodeSlots:
		return 1 + len(r.Slots)/perUnit
	case state.ProxyFilter:
		if r.Of == nil {
			return 1
		}
		// Each item comes with the name of its rule.
		bytes := 0
		for i := range r.Of.HTTP {
			item := &r.Of.HTTP[i]
			bytes += itemBytes + len(item.Method) + len(item.Path) + len(item.Host)
			for _, c := range item.Conditions() {
				bytes += len(c.Name) + len(c.Value)
			}
		}
		for i := range r.Of.TLS {
			bytes += itemBytes + len(strings.Join(r.Of.TLS[i].ServerNames, ""))
		}
		return 1 + bytes/bytesPerUnit
	}
	return 1
}

// itemBytes is about what the name of an item's rule takes.
const itemBytes = 400

// Report notes what a node's proxy made of a resource; an empty reason = nothing is wrong. It returns whether that could be kept, and was not known.
func (w *Watcher) Report(node, resource, reason string) (kept, fresh bool) {
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	key := reported{node, resource}
	if w.closed || w.reports[key] == reason {
		return true, false
	}
	switch {
	case reason == "":
		delete(w.reports, key)
	case len(w.reports) >= maxReports && w.reports[key] == "":
		w.lost++
		return false, true
	default:
		w.reports[key] = reason
	}
	return true, true
}

// Connected notes whether a node has a proxy at this server. It returns false for what cannot be kept.
func (w *Watcher) Connected(node string, connected bool) bool {
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	if !connected {
		w.taken -= len(w.proxies[node])
		delete(w.proxies, node)
		return true
	}
	return w.closed || w.proxyLocked(node) != nil
}

// proxyLocked returns what a node's proxy has taken; nil = there is no room.
func (w *Watcher) proxyLocked(node string) map[string]string {
	p := w.proxies[node]
	if p == nil && len(w.proxies) < maxTaken {
		p = map[string]string{}
		w.proxies[node] = p
	} else if p == nil {
		w.lost++
	}
	return p
}

// Taken notes which revision of a filter a node's proxy has taken; empty = none. It returns false for what cannot be kept.
func (w *Watcher) Taken(node, filter, revision string) bool {
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	if w.closed || w.proxies[node][filter] == revision {
		return true
	}
	if revision == "" {
		w.taken--
		delete(w.proxies[node], filter)
		return true
	}
	p := w.proxyLocked(node)
	if p == nil {
		return false
	}
	if _, known := p[filter]; !known {
		if w.taken >= maxTaken {
			w.lost++
			return false
		}
		w.taken++
	}
	p[filter] = revision
	return true
}

// Proxies returns the revisions of filters that nodes' proxies have taken, by node and filter. A node that is not there has no proxy that is connected to an
// xDS server; where it has several, at different servers, what counts is what all have taken.
func (h *Hub) Proxies() map[string]map[string]string {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := map[string]map[string]string{}
	for w := range h.watchers {
		for node, taken := range w.proxies {
			if all[node] == nil {
				all[node] = maps.Clone(taken)
				continue
			}
			maps.DeleteFunc(all[node], func(filter, revision string) bool { return taken[filter] != revision })
		}
	}
	return all
}

// ProxyFault is what a node's proxy refused, and why. Resource is a filter's key or kind/namespace/name of an Envoy configuration.
type ProxyFault struct{ Node, Resource, Reason string }

// XDSServer is what the hub knows of a connected xDS server.
type XDSServer struct {
	Version, Instance string
	Since             time.Time
	Synced            bool
	// Faults is how many resources it said are refused; Lost, how many more it said than are kept.
	Faults int
	Lost   uint64
}

// xdsLocked returns the connected xDS servers, the oldest first, and what proxies refused, each once.
func (h *Hub) xdsLocked() ([]XDSServer, []ProxyFault) {
	var servers []XDSServer
	faults := map[reported]string{}
	for w := range h.watchers {
		servers = append(servers, XDSServer{
			Version: w.version, Instance: w.instance, Since: w.since, Synced: w.synced, Faults: len(w.reports), Lost: w.lost,
		})
		for key, reason := range w.reports {
			if before, ok := faults[key]; !ok || reason < before { // one of them, always the same
				faults[key] = reason
			}
		}
	}
	slices.SortFunc(servers, func(a, b XDSServer) int {
		return cmp.Or(a.Since.Compare(b.Since), strings.Compare(a.Instance, b.Instance))
	})
	all := make([]ProxyFault, 0, len(faults))
	for key, reason := range faults {
		all = append(all, ProxyFault{key.node, key.resource, reason})
	}
	slices.SortFunc(all, func(a, b ProxyFault) int {
		return cmp.Or(strings.Compare(a.Node, b.Node), strings.Compare(a.Resource, b.Resource))
	})
	return servers, all
}
