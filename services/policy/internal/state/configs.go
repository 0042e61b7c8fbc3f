// SPDX-License-Identifier: Apache-2.0

package state

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"

	"github.com/weirmesh/weir/internal/envoyconfig"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// configObject is an Envoy configuration in all its versions that matter.
type configObject struct {
	object *object.Policy // the newest
	fault  error          // why it is not valid
	valid  *envoyconfig.Config
	// revision stands for what valid says.
	revision string
	// changed: valid changed since the last Commit. since is the first revision with it.
	changed bool
	since   uint64
}

// Route leads a service's port to a listener of an Envoy configuration.
type Route struct {
	Kind, Namespace, Name string
	Listener              string
	Service               string // namespace/name
	Port                  uint16
}

// Key is that of the route's filter.
func (r Route) Key() string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q", []string{r.Kind, r.Namespace, r.Name, r.Listener, r.Service, fmt.Sprint(r.Port)}))
	return "route-" + hex.EncodeToString(sum[:16])
}

// routing is what all Envoy configurations route. Its maps are never changed once it is made.
type routing struct {
	ports  map[string]map[uint16]Route // by service
	byKey  map[string]Route
	named  map[string]bool // services that a config names, to route them or as backends
	routed map[object.Key][]string
	keys   map[object.Key][]string // the same, as keys of filters
	// problems keep a part of a config from having effect, notes are what its author may not expect.
	problems, notes map[object.Key][]string
}

// upsertConfig takes an Envoy configuration in. One that is not valid has no effect: the valid one before it stays in force.
func (s *State) upsertConfig(o *object.Policy) {
	c := s.configs[o.Key()]
	if c != nil && c.object.UID != o.UID {
		s.deleteConfig(o.Key()) // another object of the same name
		c = nil
	}
	if c == nil {
		c = &configObject{}
		s.configs[o.Key()] = c
	} else if c.object.Spec == o.Spec && c.object.Generation == o.Generation {
		c.object = o // its status, most likely
		return
	}
	c.object = o
	config, err := envoyconfig.Parse(o.Raw)
	if c.fault = err; err != nil {
		return
	}
	c.valid, c.changed, c.revision = config, true, digest(string(config.Spec))
	s.staleConfigs = true
}

func (s *State) deleteConfig(key object.Key) {
	if s.configs[key] != nil {
		delete(s.configs, key)
		s.staleConfigs = true
	}
}

// placeRoutes finds out what Envoy configurations route, and which services that changes.
func (s *State) placeRoutes() {
	for name := range s.staleServices {
		s.staleConfigs = s.staleConfigs || s.routing.named[name]
	}
	if !s.staleConfigs {
		return
	}
	s.staleConfigs, s.renderConfigsStale = false, true
	before := s.routing
	s.routing = s.route()
	for name, ports := range s.routing.ports {
		if !maps.Equal(ports, before.ports[name]) {
			s.staleServices[name] = true
		}
	}
	for name := range before.ports {
		if _, ok := s.routing.ports[name]; !ok {
			s.staleServices[name] = true
		}
	}
}

// route gives each port of a service to the first configuration that claims it: the oldest, so that a new one takes nothing away.
func (s *State) route() routing {
	r := routing{
		ports: map[string]map[uint16]Route{}, byKey: map[string]Route{}, named: map[string]bool{}, routed: map[object.Key][]string{},
		keys: map[object.Key][]string{}, problems: map[object.Key][]string{}, notes: map[object.Key][]string{},
	}
	keys := slices.SortedFunc(maps.Keys(s.configs), func(a, b object.Key) int {
		x, y := s.configs[a].object, s.configs[b].object
		return cmp.Or(x.Created.Compare(y.Created), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	for _, key := range keys {
		c := s.configs[key].valid
		if c == nil {
			continue
		}
		for _, name := range c.ServiceNames() {
			r.named[name] = true
		}
		for i := range c.Services {
			s.claim(&r, key, i, &c.Services[i])
		}
	}
	return r
}

// claim routes the ports of one service of a configuration.
func (s *State) claim(r *routing, config object.Key, at int, l *envoyconfig.ServiceListener) {
	field := fmt.Sprintf("spec.services[%d]", at)
	note := func(format string, args ...any) {
		r.notes[config] = append(r.notes[config], field+": "+fmt.Sprintf(format, args...))
	}
	name := l.Namespace + "/" + l.Name
	service := s.services[object.Key{Kind: object.KindService, Namespace: l.Namespace, Name: l.Name}]
	switch {
	case service == nil:
		note("there is no service %s", name)
		return
	case len(service.ClusterIPs) == 0:
		note("service %s has no cluster IP, and only connections to one are routed", name)
		return
	}
	for _, port := range l.Ports {
		if !slices.ContainsFunc(service.Ports, func(p object.ServicePort) bool { return p.Protocol == object.TCP && uint32(p.Port) == port }) {
			note("service %s has no port %d/TCP", name, port)
		}
	}
	for _, p := range service.Ports {
		if p.Protocol != object.TCP || len(l.Ports) > 0 && !slices.Contains(l.Ports, uint32(p.Port)) {
			continue
		}
		if r.ports[name] == nil {
			r.ports[name] = map[uint16]Route{}
		}
		route := Route{Kind: config.Kind, Namespace: config.Namespace, Name: config.Name, Listener: l.Listener, Service: name, Port: p.Port}
		if other, taken := r.ports[name][p.Port]; taken {
			if other != route {
				r.problems[config] = append(r.problems[config], fmt.Sprintf("%s: port %d of service %s is routed by %s already, to listener %s",
					field, p.Port, name, object.Key{Kind: other.Kind, Namespace: other.Namespace, Name: other.Name}, other.Listener))
			}
			continue
		}
		r.ports[name][p.Port] = route
		r.byKey[route.Key()] = route
		r.routed[config] = append(r.routed[config], fmt.Sprintf("%s:%d", name, p.Port))
		r.keys[config] = append(r.keys[config], route.Key())
	}
}

// noteConfigs remembers at which revision versions of configurations came in force.
func (s *State) noteConfigs(revision uint64) {
	for _, c := range s.configs {
		if c.changed || c.since == 0 && c.valid != nil {
			c.changed, c.since = false, revision
		}
	}
}

// Routes returns what Envoy configurations route, by the key of the filter. It must not be changed.
func (s *State) Routes() map[string]Route { return s.routing.byKey }

// configStatuses returns what is known of all Envoy configurations.
func (s *State) configStatuses() []PolicyStatus {
	all := make([]PolicyStatus, 0, len(s.configs))
	for key, c := range s.configs {
		st := PolicyStatus{
			Object: c.object, Fault: c.fault, Since: c.since, InForce: c.valid != nil, Routes: s.routing.routed[key], RouteKeys: s.routing.keys[key], Problems: s.routing.problems[key],
			Warnings: s.routing.notes[key],
		}
		if c.valid != nil {
			st.Generation = c.valid.Generation
		}
		all = append(all, st)
	}
	return all
}
