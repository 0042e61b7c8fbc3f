// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/envoyconfig"
)

// State is all that is rendered, and what was rendered of it. It is not safe for concurrent use.
type State struct {
	options  Options
	nodes    map[string]*policyv1.NodeSlots
	filters  map[string]*filter
	services map[string]*service
	configs  map[string]*config
	base     []*Resource
}

// filter keeps what was rendered of it: its routes, and its listeners by slot.
type filter struct {
	*policyv1.Filter
	route     *Resource
	err       error
	listeners map[uint32]*Resource
	api       *Resource
}

// NewState returns an empty state.
func NewState(options Options) (*State, error) {
	base, err := newResource("", "", originalDst())
	if err != nil {
		return nil, err
	}
	return &State{
		options: options, base: []*Resource{base},
		nodes: map[string]*policyv1.NodeSlots{}, filters: map[string]*filter{}, services: map[string]*service{}, configs: map[string]*config{},
	}, nil
}

// Nodes returns the names of the nodes whose slots are known, sorted.
func (s *State) Nodes() []string {
	var names []string
	for name := range s.nodes {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Apply changes the state.
func (s *State) Apply(upserts []*policyv1.RenderResource, removals []*policyv1.RenderKey) {
	for _, u := range upserts {
		switch r := u.GetResource().(type) {
		case *policyv1.RenderResource_Node:
			s.setNode(r.Node)
		case *policyv1.RenderResource_Filter:
			s.setFilter(r.Filter)
		case *policyv1.RenderResource_Service:
			s.setService(r.Service)
		case *policyv1.RenderResource_Config:
			s.setConfig(r.Config)
		}
	}
	for _, r := range removals {
		switch k := r.GetKey().(type) {
		case *policyv1.RenderKey_Node:
			delete(s.nodes, k.Node)
		case *policyv1.RenderKey_Filter:
			delete(s.filters, k.Filter)
		case *policyv1.RenderKey_Service:
			delete(s.services, k.Service)
		case *policyv1.RenderKey_Config:
			delete(s.configs, k.Config)
			s.forgetRoutes(k.Config)
		}
	}
}

// setNode: of a node that said nothing since the policy service began, what was known stays.
func (s *State) setNode(n *policyv1.NodeSlots) {
	if n.GetUnknown() {
		return
	}
	s.nodes[n.GetNode()] = n
}

func (s *State) setFilter(f *policyv1.Filter) {
	if old := s.filters[f.GetKey()]; old != nil && proto.Equal(old.Filter, f) {
		return
	}
	s.filters[f.GetKey()] = &filter{Filter: f, listeners: map[uint32]*Resource{}}
}

func (s *State) setService(in *policyv1.Service) {
	if old := s.services[serviceKey(in)]; old != nil && proto.Equal(old.Service, in) {
		return
	}
	s.services[serviceKey(in)] = &service{Service: in, rendered: map[string]*Resource{}}
}

func (s *State) setConfig(in *policyv1.EnvoyConfig) {
	key := configKey(in.GetKind(), in.GetNamespace(), in.GetName())
	if old := s.configs[key]; old != nil && proto.Equal(old.source, in) {
		return
	}
	var c *config
	if err := guard(func() error { c = renderConfig(in); return nil }); err != nil {
		c = &config{Config: &envoyconfig.Config{}, err: err}
	}
	c.source = in
	s.configs[key] = c
	s.forgetRoutes(key)
}

func configKey(kind, namespace, name string) string { return kind + "/" + namespace + "/" + name }

// forgetRoutes drops what was rendered of a configuration into slots.
func (s *State) forgetRoutes(key string) {
	for _, f := range s.filters {
		if r := f.GetRoute(); r != nil && configKey(r.GetKind(), r.GetNamespace(), r.GetName()) == key {
			f.listeners, f.api, f.err = map[uint32]*Resource{}, nil, nil
		}
	}
}

// Affected returns the nodes that may need another snapshot after a change, sorted.
func (s *State) Affected(upserts []*policyv1.RenderResource, removals []*policyv1.RenderKey) []string {
	nodes, filters, configs, services := map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, u := range upserts {
		switch r := u.GetResource().(type) {
		case *policyv1.RenderResource_Node:
			nodes[r.Node.GetNode()] = true
		case *policyv1.RenderResource_Filter:
			filters[r.Filter.GetKey()] = true
		case *policyv1.RenderResource_Service:
			services[serviceKey(r.Service)] = true
		case *policyv1.RenderResource_Config:
			configs[configKey(r.Config.GetKind(), r.Config.GetNamespace(), r.Config.GetName())] = true
		}
	}
	for _, r := range removals {
		switch k := r.GetKey().(type) {
		case *policyv1.RenderKey_Filter:
			filters[k.Filter] = true
		case *policyv1.RenderKey_Service:
			services[k.Service] = true
		case *policyv1.RenderKey_Config:
			configs[k.Config] = true
		}
	}
	s.spread(filters, configs, services)
	for name, n := range s.nodes {
		if !nodes[name] && slices.ContainsFunc(n.GetSlots(), func(slot *policyv1.Slot) bool { return filters[slot.GetKey()] }) {
			nodes[name] = true
		}
	}
	return slices.DeleteFunc(slices.Sorted(maps.Keys(nodes)), func(name string) bool { return s.nodes[name] == nil })
}

// spread adds the filters that lead to these configurations, or to ones that name these services.
func (s *State) spread(filters, configs, services map[string]bool) {
	if len(services) > 0 {
		for key, c := range s.configs {
			if slices.ContainsFunc(c.ServiceNames(), func(name string) bool { return services[name] }) {
				configs[key] = true
			}
		}
	}
	if len(configs) == 0 {
		return
	}
	for key, f := range s.filters {
		if r := f.GetRoute(); r != nil && configs[configKey(r.GetKind(), r.GetNamespace(), r.GetName())] {
			filters[key] = true
		}
	}
}

// Keys names everything in the state.
func (s *State) Keys() []*policyv1.RenderKey {
	var keys []*policyv1.RenderKey
	for name := range s.nodes {
		keys = append(keys, &policyv1.RenderKey{Key: &policyv1.RenderKey_Node{Node: name}})
	}
	for name := range s.filters {
		keys = append(keys, &policyv1.RenderKey{Key: &policyv1.RenderKey_Filter{Filter: name}})
	}
	for name := range s.services {
		keys = append(keys, &policyv1.RenderKey{Key: &policyv1.RenderKey_Service{Service: name}})
	}
	for name := range s.configs {
		keys = append(keys, &policyv1.RenderKey{Key: &policyv1.RenderKey_Config{Config: name}})
	}
	return keys
}

// KeyOf returns the key of a resource.
func KeyOf(u *policyv1.RenderResource) *policyv1.RenderKey {
	switch r := u.GetResource().(type) {
	case *policyv1.RenderResource_Node:
		return &policyv1.RenderKey{Key: &policyv1.RenderKey_Node{Node: r.Node.GetNode()}}
	case *policyv1.RenderResource_Filter:
		return &policyv1.RenderKey{Key: &policyv1.RenderKey_Filter{Filter: r.Filter.GetKey()}}
	case *policyv1.RenderResource_Service:
		return &policyv1.RenderKey{Key: &policyv1.RenderKey_Service{Service: serviceKey(r.Service)}}
	case *policyv1.RenderResource_Config:
		return &policyv1.RenderKey{Key: &policyv1.RenderKey_Config{Config: configKey(r.Config.GetKind(), r.Config.GetNamespace(), r.Config.GetName())}}
	}
	return &policyv1.RenderKey{}
}

// guard turns a panic into an error: one tenant's configuration must not stop the others'.
func guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal error: %v", p)
		}
	}()
	return f()
}

// Snapshot renders what one node needs. A node that is not known needs what all have.
func (s *State) Snapshot(node string) *Snapshot {
	b := &builder{state: s, snapshot: &Snapshot{Node: node, Filters: map[string]Filter{}}, weights: map[string]weight{}, problems: map[string]string{}}
	for i := range b.snapshot.Sets {
		b.snapshot.Sets[i], b.snapshot.ByName[i] = Set{}, Set{}
	}
	for _, r := range s.base {
		b.put(r)
	}
	slots := slices.Clone(s.nodes[node].GetSlots())
	slices.SortFunc(slots, func(a, b *policyv1.Slot) int {
		if c := strings.Compare(a.GetKey(), b.GetKey()); c != 0 {
			return c
		}
		return int(a.GetNumber()) - int(b.GetNumber())
	})
	for _, slot := range slots {
		if err := guard(func() error { return b.slot(slot) }); err != nil {
			b.problem(slot.GetKey(), err)
		}
	}
	return b.done()
}

// builder collects one node's resources.
type builder struct {
	state    *State
	snapshot *Snapshot
	weights  map[string]weight // of namespaces' configurations and rules
	problems map[string]string
}

// weight is what configurations cost a proxy.
type weight struct{ bytes, instructions int }

func (b *builder) put(r *Resource) { b.snapshot.Sets[r.Type][r.Name] = r }

// filter notes what a slot's filter is made of.
func (b *builder) filter(f *filter, resources ...*Resource) {
	if f.GetRevision() == "" {
		return // of a policy service of before
	}
	resources = append(slices.Clone(b.snapshot.Filters[f.GetKey()].Resources), resources...)
	b.snapshot.Filters[f.GetKey()] = Filter{Revision: f.GetRevision(), Resources: resources}
}

// problem keeps the first error of an owner.
func (b *builder) problem(owner string, err error) {
	if _, ok := b.problems[owner]; !ok {
		b.problems[owner] = err.Error()
	}
}

func (b *builder) done() *Snapshot {
	for owner, text := range b.problems {
		b.snapshot.Problems = append(b.snapshot.Problems, Problem{Owner: owner, Error: text})
	}
	slices.SortFunc(b.snapshot.Problems, func(a, b Problem) int { return strings.Compare(a.Owner, b.Owner) })
	return b.snapshot
}

// slot renders one slot. A slot whose filter is not known (yet), or is for weir-dns, has no listener.
func (b *builder) slot(in *policyv1.Slot) error {
	f := b.state.filters[in.GetKey()]
	if f == nil {
		return nil
	}
	switch f.GetKind() {
	case policyv1.FilterKind_FILTER_KIND_HTTP, policyv1.FilterKind_FILTER_KIND_TLS:
		return b.policySlot(in, f)
	case policyv1.FilterKind_FILTER_KIND_ROUTE:
		return b.routeSlot(in, f)
	default:
		return nil
	}
}

func (b *builder) policySlot(in *policyv1.Slot, f *filter) error {
	at, err := slotOf(in)
	if err != nil {
		return err
	}
	l := f.listeners[at.number]
	if l == nil {
		message := tlsListener
		if f.GetKind() == policyv1.FilterKind_FILTER_KIND_HTTP {
			message = func(s slot, in *policyv1.Filter) *listenerv3.Listener { return httpListener(s, in, b.state.options) }
		}
		if l, err = newResource(f.GetKey(), f.GetNamespace(), message(at, f.Filter)); err != nil {
			return err
		}
		f.listeners[at.number] = l
	}
	if f.GetKind() == policyv1.FilterKind_FILTER_KIND_HTTP {
		if err := b.filterRoute(f); err != nil {
			return err
		}
	}
	b.put(l)
	b.filter(f, l)
	return nil
}

// filterRoute adds the rules of an HTTP filter. Rules that can not be rendered, or cost too much, refuse every request: leaving them out would leave older ones in
// force.
func (b *builder) filterRoute(f *filter) error {
	if f.route == nil {
		m, err := httpRoutes(f.Filter)
		if err == nil {
			f.route, err = newResource(f.GetKey(), f.GetNamespace(), m)
		}
		if err != nil {
			f.err = err
			if f.route, err = f.denied(); err != nil {
				return err
			}
		}
	}
	route, reason := f.route, f.err
	if reason == nil {
		// Only what expressions cost: bytes are bounded for each filter alone.
		if reason = b.weigh(f.GetNamespace(), weight{instructions: b.added(f.route).instructions}); reason != nil {
			reason = fmt.Errorf("%w; of this filter %s", reason, dearest(f.GetHttp()))
			var err error
			if route, err = f.denied(); err != nil {
				return err
			}
		}
	}
	if reason != nil {
		b.problem(f.GetKey(), fmt.Errorf("every request is refused: %w", reason))
	}
	b.put(route)
	b.filter(f, route)
	return nil
}

// denied are routes that refuse everything.
func (f *filter) denied() (*Resource, error) {
	return newResource(f.GetKey(), f.GetNamespace(), deniedRoutes(f.Filter))
}

// routeSlot renders a slot that leads to a listener of an Envoy configuration, and all that the listener needs.
func (b *builder) routeSlot(in *policyv1.Slot, f *filter) error {
	r := f.GetRoute()
	key := configKey(r.GetKind(), r.GetNamespace(), r.GetName())
	c := b.state.configs[key]
	if c == nil {
		return nil // it is on its way, or gone as the slot will be
	}
	if c.err != nil {
		b.problem(key, c.err)
		return nil
	}
	for _, p := range c.problems {
		b.problem(p.Owner, fmt.Errorf("%s", p.Error))
	}
	at, err := slotOf(in)
	if err != nil {
		return err
	}
	target := c.listeners[r.GetListener()]
	if target == nil {
		return fmt.Errorf("%s has no listener %q", key, r.GetListener())
	}
	l, err := f.routeListener(at, target, b.state.options)
	if err != nil {
		b.problem(key, err)
		return nil
	}
	needed := append([]*Resource{l}, c.needs(target)...)
	if err := b.weigh(r.GetNamespace(), b.added(needed...)); err != nil {
		b.problem(key, fmt.Errorf("%w: this configuration is left out", err))
		return nil
	}
	for _, r := range needed {
		b.put(r)
	}
	b.filter(f, needed...)
	b.endpoints(target, c)
	if f.api != nil {
		b.snapshot.ByName[Listener][f.api.Name] = f.api
	}
	return nil
}

// routeListener renders a listener in a slot once.
func (f *filter) routeListener(at slot, target *configListener, o Options) (*Resource, error) {
	if l := f.listeners[at.number]; l != nil {
		return l, nil
	}
	r := f.GetRoute()
	owner := configKey(r.GetKind(), r.GetNamespace(), r.GetName())
	m, err := routeListener(at, f.Filter, target, o)
	if err != nil {
		return nil, err
	}
	l, err := newResource(owner, f.GetNamespace(), m)
	if err != nil {
		return nil, err
	}
	f.listeners[at.number] = l
	if api, err := apiListener(f.Filter, target); err == nil { // TCP listeners have none
		if f.api, err = newResource(owner, f.GetNamespace(), api); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// needs returns the routes and clusters of a listener.
func (c *config) needs(l *configListener) []*Resource {
	var all []*Resource
	for _, name := range l.routes {
		if r := c.resources[Route][name]; r != nil {
			all = append(all, r)
		}
	}
	for _, name := range l.clusters {
		if r := c.resources[Cluster][name]; r != nil {
			all = append(all, r)
		}
	}
	return all
}

// added is what resources weigh that the node does not have already.
func (b *builder) added(resources ...*Resource) (w weight) {
	for _, r := range resources {
		if b.snapshot.Sets[r.Type][r.Name] != r {
			w.bytes += len(r.Body.GetValue())
			w.instructions += r.Instructions
		}
	}
	return w
}

// weigh counts a weight against its namespace, unless that is too much.
func (b *builder) weigh(namespace string, w weight) error {
	total := b.weights[namespace]
	total.bytes += w.bytes
	total.instructions += w.instructions
	for _, bound := range []struct {
		what      string
		have, max int
	}{
		{"bytes", total.bytes, b.state.options.NamespaceBytes},
		{"instructions in regular expressions", total.instructions, b.state.options.NamespaceInstructions},
	} {
		if bound.have > bound.max {
			return fmt.Errorf("namespace %q would have %d %s on this node, more than %d", namespace, bound.have, bound.what, bound.max)
		}
	}
	b.weights[namespace] = total
	return nil
}

// endpoints adds the endpoints of a listener's clusters; a service that is not known has none.
func (b *builder) endpoints(l *configListener, c *config) {
	for _, name := range l.clusters {
		key := c.endpointsOf(name)
		if key == "" || b.snapshot.Sets[Endpoint][key] != nil {
			continue
		}
		namespace, serviceName, _, _ := envoyconfig.ParseCluster(key)
		var r *Resource
		var err error
		if svc := b.state.services[namespace+"/"+serviceName]; svc != nil {
			r, err = svc.endpoints(key, b.snapshot.Node)
		} else {
			r, err = assignment(key, nil)
		}
		if err != nil {
			b.problem(c.Key(), err)
			continue
		}
		b.put(r)
	}
}

// endpointsOf returns the name of a cluster's endpoints.
func (c *config) endpointsOf(cluster string) string {
	for _, r := range c.Resources.Clusters {
		if prefix(c.Meta)+r.GetName() == cluster {
			return r.GetEdsClusterConfig().GetServiceName()
		}
	}
	if c.resources[Cluster][cluster] == nil {
		return ""
	}
	return cluster
}
