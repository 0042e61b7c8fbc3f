// SPDX-License-Identifier: Apache-2.0

// Package state is the configuration in force. Each resource is taken or refused alone, and what leads somewhere is put into force when that is there.
package state

import (
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/internal/expression"
	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/xds"
)

// Clusters takes clusters and endpoints.
type Clusters interface {
	Put(in *clusterv3.Cluster) error
	Remove(name string)
	Assign(in *endpointv3.ClusterLoadAssignment) error
	Unassign(name string)
	EDSNames() []string
	// Reachable reports whether a cluster is there and its endpoints have come.
	Reachable(name string) bool
}

// Listeners takes listeners.
type Listeners interface {
	Put(in *listenerv3.Listener) error
	Remove(name string)
	// Arrived is called when routes, clusters or endpoints may have come that listeners wait for.
	Arrived()
	RouteNames() []string
}

// Table is a compiled route configuration.
type Table interface{ Clusters() []string }

// Config of the state.
type Config[R Table] struct {
	Clusters  Clusters
	Listeners Listeners
	Compile   func(*routev3.RouteConfiguration) (R, error)
	// Matchers sets the pace, and knows what expressions cost.
	Matchers *match.Compiler
	// Hold is how long routes wait for new clusters' endpoints, and how long what was removed is kept for who still leads there; 0 = 5 s.
	Hold time.Duration
	// KeepRoutes is how long routes that no listener follows any more are kept for its draining connections.
	KeepRoutes time.Duration
	// Changed is called when the wanted names may have changed by time alone.
	Changed func()
	Log     *slog.Logger
}

// State implements xds.Handler.
type State[R Table] struct {
	config Config[R]

	mu      sync.RWMutex
	routes  map[string]R
	sources map[string]*routev3.RouteConfiguration
	held    map[string]held[R]

	// gone are removals that wait, by type and name.
	gone map[removal]*time.Timer
	dump map[removal]resource
	last map[removal]refusal
}

type held[R Table] struct {
	table  R
	source *routev3.RouteConfiguration
	since  time.Time
}

type removal struct{ typeURL, name string }

type resource struct {
	version string
	body    proto.Message
}

type refusal struct {
	version, reason string
	at              time.Time
}

// New makes an empty state.
func New[R Table](config Config[R]) *State[R] {
	if config.Hold == 0 {
		config.Hold = 5 * time.Second
	}
	return &State[R]{
		config: config, routes: map[string]R{}, sources: map[string]*routev3.RouteConfiguration{}, held: map[string]held[R]{},
		gone: map[removal]*time.Timer{}, dump: map[removal]resource{}, last: map[removal]refusal{},
	}
}

// SetListeners gives the state its listeners, which need the state to be made.
func (s *State[R]) SetListeners(l Listeners) { s.config.Listeners = l }

// Routes returns the routes in force; false = none yet.
func (s *State[R]) Routes(name string) (R, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r, ok := s.routes[name]
	return r, ok
}

// Names implements xds.Handler.
func (s *State[R]) Names(typeURL string) []string {
	switch typeURL {
	case xds.Endpoint:
		return s.config.Clusters.EDSNames()
	case xds.Route:
		return s.config.Listeners.RouteNames()
	}
	return nil
}

// Apply implements xds.Handler.
func (s *State[R]) Apply(typeURL string, changed []xds.Resource, removed []string) map[string]error {
	refused := map[string]error{}
	s.config.Matchers.Begin()
	for _, name := range removed {
		s.remove(removal{typeURL, name})
	}
	for _, in := range changed {
		key := removal{typeURL, in.Name}
		body, err := s.put(typeURL, in)
		s.config.Matchers.Step()
		s.mu.Lock()
		if err != nil {
			refused[in.Name] = err
			s.last[key] = refusal{version: in.Version, reason: err.Error(), at: time.Now()}
		} else {
			s.dump[key] = resource{version: in.Version, body: body}
			delete(s.last, key)
		}
		s.mu.Unlock()
	}
	s.Release(time.Now())
	return refused
}

// put takes one resource. A panic is a refusal: it is one resource's fault.
func (s *State[R]) put(typeURL string, in xds.Resource) (body proto.Message, err error) {
	defer func() {
		if r := recover(); r != nil {
			s.config.Log.Error("configuration panicked", "type", typeURL, "name", in.Name, "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
			err = fmt.Errorf("it can not be compiled: panic: %v", r)
		}
	}()
	message, err := in.Body.UnmarshalNew()
	if err != nil {
		return nil, err
	}
	if err := s.affordable(message); err != nil {
		return nil, err
	}
	s.keep(removal{typeURL, in.Name})
	switch m := message.(type) {
	case *clusterv3.Cluster:
		if m.GetName() != in.Name {
			return nil, fmt.Errorf("its name is %q", m.GetName())
		}
		return m, s.config.Clusters.Put(m)
	case *endpointv3.ClusterLoadAssignment:
		if m.GetClusterName() != in.Name {
			return nil, fmt.Errorf("its name is %q", m.GetClusterName())
		}
		return m, s.config.Clusters.Assign(m)
	case *listenerv3.Listener:
		if m.GetName() != in.Name {
			return nil, fmt.Errorf("its name is %q", m.GetName())
		}
		return m, s.config.Listeners.Put(m)
	case *routev3.RouteConfiguration:
		if m.GetName() != in.Name {
			return nil, fmt.Errorf("its name is %q", m.GetName())
		}
		table, err := s.config.Compile(m)
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.held[in.Name] = held[R]{table: table, source: m, since: time.Now()}
		return m, nil
	}
	return nil, fmt.Errorf("type %q is not known", typeURL)
}

// affordable refuses what would take so much memory and compiling that neighbours feel it.
func (s *State[R]) affordable(m proto.Message) error {
	instructions, err := expression.CostBy(m, s.config.Matchers.Instructions)
	if err != nil {
		return err
	}
	if instructions > expression.MaxInstructions {
		return fmt.Errorf("its regular expressions have more than %d instructions together", expression.MaxInstructions)
	}
	return nil
}

// Release puts routes into force whose clusters are there, or that have waited long enough.
func (s *State[R]) Release(now time.Time) {
	s.mu.Lock()
	for name, h := range s.held {
		ready := !slices.ContainsFunc(h.table.Clusters(), func(c string) bool { return !s.config.Clusters.Reachable(c) })
		if !ready && now.Sub(h.since) < s.config.Hold {
			continue
		}
		s.routes[name], s.sources[name] = h.table, h.source
		delete(s.held, name)
	}
	s.mu.Unlock()
	s.config.Listeners.Arrived()
}

// keep undoes a removal that waits.
func (s *State[R]) keep(key removal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.gone[key]; t != nil {
		t.Stop()
		delete(s.gone, key)
	}
}

// remove takes a resource away: listeners at once, what others may still lead to after a while.
func (s *State[R]) remove(key removal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.dump, key)
	delete(s.last, key)
	wait := s.config.Hold
	switch key.typeURL {
	case xds.Listener:
		s.mu.Unlock()
		s.config.Listeners.Remove(key.name)
		s.mu.Lock()
		return
	case xds.Route:
		wait = max(wait, s.config.KeepRoutes)
	}
	if s.gone[key] != nil {
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(wait, func() {
		s.mu.Lock()
		if s.gone[key] != timer {
			s.mu.Unlock()
			return
		}
		delete(s.gone, key)
		if key.typeURL == xds.Route {
			delete(s.routes, key.name)
			delete(s.sources, key.name)
			delete(s.held, key.name)
		}
		s.mu.Unlock()
		switch key.typeURL {
		case xds.Cluster:
			s.config.Clusters.Remove(key.name)
		case xds.Endpoint:
			s.config.Clusters.Unassign(key.name)
		}
		if s.config.Changed != nil {
			s.config.Changed()
		}
	})
	s.gone[key] = timer
}

// Dumped is a resource as the admin port shows it.
type Dumped struct {
	TypeURL, Name, Version string
	// Body is what is in force; nil = nothing was ever taken.
	Body proto.Message
	// Refused is why the newest version is not in force; "" = it is.
	Refused        string
	RefusedVersion string
}

// Dump returns all resources, sorted by type and name.
func (s *State[R]) Dump() []Dumped {
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := map[removal]Dumped{}
	for key, r := range s.dump {
		all[key] = Dumped{TypeURL: key.typeURL, Name: key.name, Version: r.version, Body: r.body}
	}
	for key, r := range s.last {
		d := all[key]
		d.TypeURL, d.Name, d.Refused, d.RefusedVersion = key.typeURL, key.name, r.reason, r.version
		all[key] = d
	}
	out := make([]Dumped, 0, len(all))
	for _, d := range all {
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b Dumped) int {
		switch {
		case a.TypeURL != b.TypeURL && a.TypeURL < b.TypeURL, a.TypeURL == b.TypeURL && a.Name < b.Name:
			return -1
		}
		return 1
	})
	return out
}

// Refused is how many resources are not in force in their newest version.
func (s *State[R]) Refused() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.last)
}

// Counts is how many resources of each type are in force.
func (s *State[R]) Counts() map[string]int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	n := map[string]int{}
	for key := range s.dump {
		n[key.typeURL]++
	}
	return n
}
