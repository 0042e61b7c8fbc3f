// SPDX-License-Identifier: Apache-2.0

// Package ads serves snapshots to xDS clients: aggregated discovery, state of the world and delta, by go-control-plane's server. What a client refuses
// is held back from it alone, one resource at a time; the rest goes on.
package ads

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/config"
	"github.com/envoyproxy/go-control-plane/pkg/server/sotw/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"

	"github.com/weirmesh/weir/services/xds/internal/render"
)

// Config bounds and connects a hub.
type Config struct {
	// NodeStreams is how many streams one node may have (its proxies, and gRPC clients); default 64.
	NodeStreams int
	// Patience is how long listeners and routes wait for the clusters that they name, and clusters for the routes that named them; default 5 s.
	Patience time.Duration
	// Report is told how things stand with a node, whenever that may have changed. It must not block.
	Report func(node string, report Report)
	Log    *slog.Logger
}

// Hub holds the nodes' snapshots and their clients' streams.
type Hub struct {
	config  Config
	metrics *Metrics

	mu      sync.Mutex
	ready   bool
	nodes   map[string]*node
	streams map[streamKey]*stream
	// requests finds the stream of a request that the library is about to hand over.
	requests map[any]*stream
}

// node is one node's snapshot and clients.
type node struct {
	name     string
	snapshot *render.Snapshot
	clients  map[string]*client
	streams  map[*stream]bool
	// taken are the revisions of filters that all of the node's proxies have taken; nil = no proxy is connected.
	taken map[string]string
}

// Report is how things stand with a node.
type Report struct {
	// Connected: a proxy of the node is.
	Connected bool
	// Errors by owner, and the revisions of filters that all its proxies have taken.
	Errors, Taken map[string]string
}

// maxClients of one node are remembered without a stream.
const maxClients = 8

// New returns a hub. Nothing is sent before the first Publish.
func New(config Config, metrics *Metrics) *Hub {
	if config.NodeStreams == 0 {
		config.NodeStreams = 64
	}
	if config.Patience == 0 {
		config.Patience = 5 * time.Second
	}
	return &Hub{
		config: config, metrics: metrics,
		nodes: map[string]*node{}, streams: map[streamKey]*stream{}, requests: map[any]*stream{},
	}
}

// Register serves aggregated discovery until ctx ends; then streams end, too.
func (h *Hub) Register(ctx context.Context, registrar grpc.ServiceRegistrar) {
	// Only listeners and clusters can be had without naming them.
	named := []string{render.Endpoint.URL(), render.Route.URL()}
	server := serverv3.NewServer(ctx, h, callbacks{h},
		sotw.WithOrderedADS(), config.DeactivateLegacyWildcardForTypes(named))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(registrar, server)
}

// Publish replaces snapshots; nodes that are not among them keep theirs, and what is gone has no more to send. The first call opens the hub: until then
// clients keep what they have.
func (h *Hub) Publish(snapshots []*render.Snapshot, gone []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	opened := !h.ready
	h.ready = true
	for _, snapshot := range snapshots {
		if n := h.node(snapshot.Node); !snapshot.Equal(n.snapshot) {
			h.replace(n, snapshot)
		}
	}
	for _, name := range gone {
		if n := h.nodes[name]; n != nil {
			n.snapshot = nil
			n.take()
			h.report(n)
			h.metrics.refused.DeleteLabelValues(name)
			h.forget(n)
		}
	}
	if opened {
		for _, n := range h.nodes {
			h.pumpNode(n)
		}
	}
}

func (h *Hub) node(name string) *node {
	n := h.nodes[name]
	if n == nil {
		n = &node{name: name, clients: map[string]*client{}, streams: map[*stream]bool{}}
		h.nodes[name] = n
	}
	return n
}

// replace puts a new snapshot in force. Clusters and endpoints that are gone stay for a moment: routes that name them may be in use.
func (h *Hub) replace(n *node, snapshot *render.Snapshot) {
	old := n.snapshot
	n.snapshot = snapshot
	for _, c := range n.clients {
		for i, held := range c.types {
			held.forget(func(name string) *render.Resource { return snapshot.Find(render.Type(i), name) })
		}
	}
	for s := range n.streams {
		if s.client == nil {
			continue // it said nothing yet
		}
		s.impatient, s.waived = false, s.stillWaived()
		for _, t := range []render.Type{render.Cluster, render.Endpoint} {
			s.retire(t, old)
		}
	}
	h.pumpNode(n)
	n.take()
	h.report(n)
}

// take computes what the node's proxies have taken; it reports whether that is new. A proxy more is no step back: what was taken was in force.
func (n *node) take() (changed bool) {
	var proxies []*stream
	for s := range n.streams {
		if s.proxies() {
			proxies = append(proxies, s)
		}
	}
	before := n.taken
	if len(proxies) == 0 {
		n.taken = nil
		return before != nil
	}
	if changed = before == nil; changed {
		n.taken = map[string]string{}
	}
	var filters map[string]render.Filter
	if n.snapshot != nil {
		filters = n.snapshot.Filters
	}
	for key := range n.taken {
		if _, wanted := filters[key]; !wanted {
			delete(n.taken, key)
			changed = true
		}
	}
	for key, f := range filters {
		if n.taken[key] != f.Revision && holdAll(proxies, f.Resources) {
			n.taken[key], changed = f.Revision, true
		}
	}
	return changed
}

// holdAll reports whether all of some streams' clients have all of some resources.
func holdAll(streams []*stream, resources []*render.Resource) bool {
	for _, r := range resources {
		for _, s := range streams {
			if s.types[r.Type].acked[r.Name] != r.Version {
				return false
			}
		}
	}
	return true
}

// stillWaived returns the waivers of what is still wanted.
func (s *stream) stillWaived() map[string]bool {
	kept := map[string]bool{}
	for _, t := range []render.Type{render.Cluster, render.Endpoint} {
		for name := range s.node.snapshot.Sets[t] {
			if w := waiver(t, name); s.waived[w] {
				kept[w] = true
			}
		}
	}
	return kept
}

// retire keeps what the client has and the new snapshot has not.
func (s *stream) retire(t render.Type, old *render.Snapshot) {
	kept := render.Set{}
	keep := func(name string, r *render.Resource) {
		if _, known := s.types[t].known[name]; known && s.node.snapshot.Find(t, name) == nil {
			kept[name] = r
		}
	}
	for name, r := range s.retired[t] {
		keep(name, r)
	}
	if old != nil {
		for name, r := range old.Sets[t] {
			if e := s.client.types[t].effective(r); e != nil {
				keep(name, e)
			}
		}
	}
	s.retired[t] = kept
}

func (h *Hub) pumpNode(n *node) {
	for s := range n.streams {
		h.pump(s)
	}
}

// pump sends a stream what its open watches are owed: what is named before what names it.
func (h *Hub) pump(s *stream) {
	if !h.ready || s.node == nil || s.node.snapshot == nil {
		return
	}
	for _, t := range render.Types() {
		h.serve(s, t)
	}
	if len(s.retired[render.Cluster])+len(s.retired[render.Endpoint]) > 0 && s.settled() {
		s.retired = [4]render.Set{}
		h.serve(s, render.Cluster)
		h.serve(s, render.Endpoint)
	}
	waiting := len(s.retired[render.Cluster])+len(s.retired[render.Endpoint]) > 0 || s.held(render.Listener) || s.held(render.Route)
	switch {
	case !waiting && s.patience != nil:
		s.patience.Stop()
		s.patience = nil
	case waiting && s.patience == nil && !s.impatient:
		s.patience = time.AfterFunc(h.config.Patience, func() { h.hurry(s) })
	}
}

// serve answers one watch, if it is open and owed something.
func (h *Hub) serve(s *stream, t render.Type) {
	x := &s.types[t]
	if x.watch == nil || s.held(t) {
		return
	}
	m := s.due(t)
	if m == nil {
		return
	}
	if !x.send(m) {
		h.config.Log.Error("no room for a response", "node", s.node.name, "type", t.String())
		return
	}
	h.metrics.responses.WithLabelValues(t.String()).Inc()
	h.metrics.bytes.WithLabelValues(t.String()).Add(float64(m.bytes()))
}

// held reports whether listeners and routes wait for clusters that the client does not have yet.
func (s *stream) held(t render.Type) bool {
	if t != render.Listener && t != render.Route || s.impatient {
		return false
	}
	clusters := &s.types[render.Cluster]
	if !clusters.started || clusters.known == nil || !clusters.wildcard {
		return clusters.watch != nil && clusters.wildcard // it asked for clusters and has none yet
	}
	for _, needed := range []render.Type{render.Cluster, render.Endpoint} {
		for name := range s.node.snapshot.Sets[needed] {
			if !s.types[needed].confirmed[name] && !s.waived[waiver(needed, name)] && s.find(needed, name) != nil {
				return true
			}
		}
	}
	return false
}

func waiver(t render.Type, name string) string { return t.String() + " " + name }

// settled reports whether the client has the listeners and routes that are wanted.
func (s *stream) settled() bool {
	for _, t := range []render.Type{render.Listener, render.Route} {
		x := &s.types[t]
		if s.client.types[t].lags() {
			return false // what it has in force may need what is retired
		}
		if s.impatient {
			continue
		}
		if x.queued != nil || len(x.unanswered) > 0 {
			return false
		}
		if x.watch == nil {
			continue // it does not ask for any
		}
		if changed, removed := x.changes(s.visible(t)); len(changed)+len(removed) > 0 {
			return false
		}
	}
	return true
}

// hurry ends a stream's waiting; what it waited for is not waited for again.
func (h *Hub) hurry(s *stream) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.patience = nil
	if h.streams[s.key] != s || s.node == nil || s.node.snapshot == nil {
		return
	}
	s.impatient = true
	for _, t := range []render.Type{render.Cluster, render.Endpoint} {
		for name := range s.node.snapshot.Sets[t] {
			if !s.types[t].confirmed[name] {
				s.waived[waiver(t, name)] = true
			}
		}
	}
	h.metrics.impatience.Inc()
	h.pump(s)
}

func (x *exchange) confirm(name string) {
	if x.confirmed == nil {
		x.confirmed = map[string]bool{}
	}
	x.confirmed[name] = true
}

// CreateWatch implements cache.Cache.
func (h *Hub) CreateWatch(req *cache.Request, sub cache.Subscription, responses chan cache.Response) (func(), error) {
	return h.watch(req, req.GetTypeUrl(), &watch{subscription: sub, version: req.GetVersionInfo(), sotw: req, responses: responses}, nil)
}

// CreateDeltaWatch implements cache.Cache.
func (h *Hub) CreateDeltaWatch(req *cache.DeltaRequest, sub cache.Subscription, responses chan cache.DeltaResponse) (func(), error) {
	return h.watch(req, req.GetTypeUrl(), &watch{subscription: sub, delta: req, deltas: responses}, func(x *exchange) {
		if !x.started && x.known == nil {
			x.known = map[string]string{}
			maps.Copy(x.known, req.GetInitialResourceVersions())
			h.resume(req, x)
			return
		}
		for _, name := range req.GetResourceNamesUnsubscribe() {
			if sub.IsWildcard() {
				if _, ok := x.known[name]; ok {
					x.known[name] = "" // the protocol wants to hear whether it is still there
				}
			}
		}
	})
}

// resume notes what a client of delta says that it has from before.
func (h *Hub) resume(req *cache.DeltaRequest, x *exchange) {
	s := h.requests[req]
	t, _ := typeOf(req.GetTypeUrl())
	has := render.Set{}
	for name, version := range x.known {
		x.confirm(name)
		if r := s.node.snapshot.Find(t, name); r != nil && r.Version == version {
			has[name] = r
		}
	}
	x.ack(has)
	s.client.types[t].took(has)
	if s.node.take() {
		h.report(s.node)
	}
}

// watch opens a subscription's next watch and sends what it is owed.
func (h *Hub) watch(req any, url string, w *watch, begin func(*exchange)) (func(), error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.requests[req]
	if s == nil {
		return nil, errors.New("the request came on no stream")
	}
	defer delete(h.requests, req)
	t, ok := typeOf(url)
	if !ok {
		return nil, nil // a type that is never sent
	}
	x := &s.types[t]
	x.watch, x.queued = w, nil
	x.wildcard = w.subscription.IsWildcard()
	if begin != nil {
		begin(x)
	}
	if t == render.Listener && s.node.take() {
		defer h.report(s.node)
	}
	if x.known == nil {
		x.known = map[string]string{}
	}
	if x.confirmed == nil {
		x.confirmed = map[string]bool{}
	}
	x.forgetUnsubscribed()
	h.pump(s)
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if x.watch == w {
			x.watch = nil
		}
	}, nil
}

// Fetch implements cache.Cache.
func (h *Hub) Fetch(context.Context, *cache.Request) (cache.Response, error) {
	return nil, errors.New("only streams are served")
}

func typeOf(url string) (render.Type, bool) {
	for _, t := range render.Types() {
		if t.URL() == url {
			return t, true
		}
	}
	return 0, false
}

// unserved are types that an Envoy may ask for and never gets; any other name is no type at all.
func unserved(url string) bool {
	switch strings.TrimPrefix(url, "type.googleapis.com/") {
	case "envoy.extensions.transport_sockets.tls.v3.Secret", "envoy.service.runtime.v3.Runtime", "envoy.config.route.v3.ScopedRouteConfiguration",
		"envoy.config.route.v3.VirtualHost", "envoy.config.core.v3.TypedExtensionConfig":
		return true
	}
	return false
}

// report tells how things stand with a node.
func (h *Hub) report(n *node) {
	all := map[string]string{}
	if n.snapshot != nil {
		for _, p := range n.snapshot.Problems {
			all[p.Owner] = p.Error
		}
	}
	for _, name := range slices.Sorted(maps.Keys(n.clients)) {
		n.clients[name].problems(all)
	}
	h.metrics.refused.WithLabelValues(n.name).Set(float64(len(all)))
	if h.config.Report != nil {
		h.config.Report(n.name, Report{Connected: n.taken != nil, Errors: all, Taken: maps.Clone(n.taken)})
	}
}

// Details says who is connected and what is refused.
func (h *Hub) Details() (nodes, streams int, refused []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(h.nodes)) {
		n := h.nodes[name]
		if len(n.streams) > 0 {
			nodes++
		}
		all := map[string]string{}
		for _, c := range slices.Sorted(maps.Keys(n.clients)) {
			n.clients[c].problems(all)
		}
		if n.snapshot != nil {
			for _, p := range n.snapshot.Problems {
				all[p.Owner] = p.Error
			}
		}
		for _, owner := range slices.Sorted(maps.Keys(all)) {
			refused = append(refused, fmt.Sprintf("%s: %s: %s", name, owner, all[owner]))
		}
	}
	return nodes, len(h.streams), refused
}
