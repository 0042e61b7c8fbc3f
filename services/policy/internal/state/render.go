// SPDX-License-Identifier: Apache-2.0

package state

import (
	"cmp"
	"maps"
	"reflect"
	"slices"

	"github.com/weirmesh/weir/internal/envoyconfig"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/engine"
)

// RenderKind says what a resource of proxies is. Resources of one change are applied in the order of these numbers and removed in the reverse one, so that
// a slot never comes before what its listener is made of.
type RenderKind int

// Kinds of what proxies are rendered from.
const (
	RenderConfig RenderKind = iota
	RenderService
	RenderFilter
	RenderNode
	renderKinds
)

// RenderKey names one: configs by kind/namespace/name, services by namespace/name, filters by their key, nodes by name.
type RenderKey struct {
	Kind RenderKind
	Name string
}

// RenderResource is one of the types below. It is never changed after it was made.
type RenderResource interface {
	RenderKey() RenderKey
	same(RenderResource) bool
}

// Config is a valid Envoy configuration.
type Config struct{ *envoyconfig.Config }

// RoutedService is a service that a configuration names, with the backends of all nodes.
type RoutedService struct{ Service }

// ProxyFilter is a filter of a policy or of a route: one of the two is set.
type ProxyFilter struct {
	Key   string
	Of    *engine.Filter
	Route *Route
	// Revision stands for all that it says, see filterRevision and routeRevision.
	Revision string
}

// NodeSlots are the slots of a node. Unknown: its agent has not said which they are.
type NodeSlots struct {
	Node    string
	Slots   []Slot
	Unknown bool
}

// RenderKey implements RenderResource.
func (r Config) RenderKey() RenderKey { return RenderKey{RenderConfig, r.Config.Key()} }

// RenderKey implements RenderResource.
func (r RoutedService) RenderKey() RenderKey { return RenderKey{RenderService, r.Key().Name} }

// RenderKey implements RenderResource.
func (r ProxyFilter) RenderKey() RenderKey { return RenderKey{RenderFilter, r.Key} }

// RenderKey implements RenderResource.
func (r NodeSlots) RenderKey() RenderKey { return RenderKey{RenderNode, r.Node} }

func (r Config) same(other RenderResource) bool { return r == other }

func (r RoutedService) same(other RenderResource) bool {
	o, ok := other.(RoutedService)
	return ok && r.equal(o.Service)
}

// What filters say is compared: policies with the same filter come and go.
func (r ProxyFilter) same(other RenderResource) bool {
	o, ok := other.(ProxyFilter)
	switch {
	case !ok || (r.Of == nil) != (o.Of == nil):
		return false
	case r.Of == nil:
		return *r.Route == *o.Route && r.Revision == o.Revision
	}
	return r.Of == o.Of || r.Of.Namespace == o.Of.Namespace && reflect.DeepEqual(r.Of.Filter, o.Of.Filter) && reflect.DeepEqual(r.Of.Rules, o.Of.Rules)
}

func (r NodeSlots) same(other RenderResource) bool {
	o, ok := other.(NodeSlots)
	return ok && r.Node == o.Node && r.Unknown == o.Unknown && slices.Equal(r.Slots, o.Slots)
}

// Render is what all proxies are rendered from. It is never changed. A part that nothing touched is carried over from snapshot to snapshot.
type Render struct{ parts [renderKinds]*renderPart }

type renderPart struct{ resources map[string]RenderResource }

func (p *renderPart) get() map[string]RenderResource {
	if p == nil {
		return nil
	}
	return p.resources
}

// Get returns one resource.
func (r *Render) Get(key RenderKey) (RenderResource, bool) {
	found, ok := r.parts[key.Kind].get()[key.Name]
	return found, ok
}

// Count returns how many resources of a kind there are.
func (r *Render) Count(kind RenderKind) int { return len(r.parts[kind].get()) }

// Route returns the route that a filter's key stands for.
func (r *Render) Route(key string) (Route, bool) {
	if f, ok := r.parts[RenderFilter].get()[key].(ProxyFilter); ok && f.Route != nil {
		return *f.Route, true
	}
	return Route{}, false
}

// Revision returns that of a filter; "" = no node has a slot of it.
func (r *Render) Revision(key string) string {
	f, _ := r.parts[RenderFilter].get()[key].(ProxyFilter)
	return f.Revision
}

// RenderChange is what turns one Render into another, in the order in which it must be applied.
type RenderChange struct {
	Upserts  []RenderResource
	Removals []RenderKey
}

// DiffRender returns what turns old into new. A nil old is an empty one.
func DiffRender(old, new *Render) RenderChange {
	if old == nil {
		old = emptyRender
	}
	var c RenderChange
	for kind := range renderKinds {
		if old.parts[kind] == new.parts[kind] {
			continue
		}
		before, after := old.parts[kind].get(), new.parts[kind].get()
		for name, r := range after {
			if b, ok := before[name]; !ok || !r.same(b) {
				c.Upserts = append(c.Upserts, r)
			}
		}
		for name := range before {
			if _, ok := after[name]; !ok {
				c.Removals = append(c.Removals, RenderKey{kind, name})
			}
		}
	}
	slices.SortFunc(c.Upserts, func(a, b RenderResource) int { return compareRenderKeys(a.RenderKey(), b.RenderKey()) })
	slices.SortFunc(c.Removals, func(a, b RenderKey) int { return compareRenderKeys(b, a) })
	return c
}

func compareRenderKeys(a, b RenderKey) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name))
}

// buildRender computes what changed of what proxies are rendered from; nothing: it is the same pointer.
func (s *State) buildRender(old, new *Snapshot) *Render {
	before := old.Render()
	first := old.render == nil
	next := *before
	changed := first
	put := func(kind RenderKind, built map[string]RenderResource) {
		if !maps.EqualFunc(before.parts[kind].get(), built, RenderResource.same) {
			next.parts[kind], changed = &renderPart{built}, true
		}
	}
	configs, slots := first || s.renderConfigsStale, first || s.renderSlotsStale || old.parts[KindNode] != new.parts[KindNode]
	s.renderConfigsStale, s.renderSlotsStale = false, false
	if configs {
		put(RenderConfig, s.renderConfigs())
	}
	if configs || old.parts[KindService] != new.parts[KindService] {
		put(RenderService, s.renderServices(new))
	}
	if slots {
		put(RenderNode, s.renderNodes())
	}
	if configs || slots || old.Policy() != new.Policy() {
		put(RenderFilter, s.renderFilters(before, new, next.parts[RenderNode].get()))
	}
	if !changed {
		return old.render
	}
	return &next
}

func (s *State) renderConfigs() map[string]RenderResource {
	all := map[string]RenderResource{}
	for _, c := range s.configs {
		if c.valid != nil {
			all[c.valid.Key()] = Config{c.valid}
		}
	}
	return all
}

func (s *State) renderServices(snapshot *Snapshot) map[string]RenderResource {
	all := map[string]RenderResource{}
	for name := range s.routing.named {
		if r, ok := snapshot.Get(Key{KindService, name}); ok {
			if service, ok := r.(Service); ok {
				all[name] = RoutedService{service}
			}
		}
	}
	return all
}

func (s *State) renderNodes() map[string]RenderResource {
	all := map[string]RenderResource{}
	for name := range s.nodes {
		all[name] = NodeSlots{Node: name, Unknown: true}
	}
	for name, a := range s.agents {
		if a.reported {
			all[name] = NodeSlots{Node: name, Slots: a.slots}
		}
	}
	return all
}

// renderFilters returns the filters that any node has a slot of. One that no policy has any more stays while a node has a slot of it: its agent may be
// away, and what it has in force must go on.
func (s *State) renderFilters(before *Render, snapshot *Snapshot, nodes map[string]RenderResource) map[string]RenderResource {
	view := snapshot.Policy()
	all := map[string]RenderResource{}
	add := func(key string) {
		if _, there := all[key]; there {
			return
		}
		if f := view.Filters[key]; f != nil {
			if f.Kind != policy.FilterDNS {
				all[key] = proxyFilter(before, f)
			}
		} else if route, ok := s.routing.byKey[key]; ok {
			all[key] = ProxyFilter{Key: key, Route: &route, Revision: s.routeRevision(route)}
		} else if kept, ok := before.Get(RenderKey{RenderFilter, key}); ok {
			all[key] = kept
		}
	}
	for key := range s.slotUses {
		add(key)
	}
	unknown := false
	for name, r := range nodes {
		if n, ok := r.(NodeSlots); !ok || !n.Unknown {
			continue
		}
		unknown = true
		if n := view.Nodes[name]; n != nil {
			for key := range n.Policies {
				for _, f := range view.Policies[key].Filters {
					add(f.Key)
				}
			}
		}
	}
	if unknown {
		for key := range s.routing.byKey {
			add(key)
		}
	}
	return all
}
