// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/internal/policy"
)

// world is what rules refer to beside labels: services, CIDR groups, and the ports that pods name. It implements policy.World.
type world struct {
	engine   *Engine
	services map[name]policy.Service
	groups   map[string]*policy.CIDRGroup
	ports    map[string]map[policy.NamedPort]int
	users    map[question]map[*class]struct{}
}

type name struct{ namespace, name string }

// question is what a class asked when it was resolved.
type question struct {
	kind byte // one of the constants below
	name name // empty parts = any
}

const (
	askServices = 's'
	askGroups   = 'g'
	askPorts    = 'p'
)

func newWorld(e *Engine) *world {
	return &world{
		engine: e, services: map[name]policy.Service{}, groups: map[string]*policy.CIDRGroup{}, ports: map[string]map[policy.NamedPort]int{},
		users: map[question]map[*class]struct{}{},
	}
}

// touch has the classes compiled that asked.
func (w *world) touch(kind byte, n name) {
	for _, q := range []name{n, {namespace: n.namespace}, {name: n.name}, {}} {
		for c := range w.users[question{kind, q}] {
			w.engine.dirty[c] = struct{}{}
		}
	}
}

func (w *world) forget(c *class) {
	for q := range c.asked {
		delete(w.users[q], c)
		if len(w.users[q]) == 0 {
			delete(w.users, q)
		}
	}
	clear(c.asked)
}

// asker answers for one class, and notes what it asks.
type asker struct {
	*world
	class *class
}

func (a asker) note(q question) {
	if a.class == nil {
		return
	}
	a.class.asked[q] = struct{}{}
	if a.users[q] == nil {
		a.users[q] = map[*class]struct{}{}
	}
	a.users[q][a.class] = struct{}{}
}

// Services implements policy.World.
func (a asker) Services(namespace, service string, selector *policy.Selector) []policy.Service {
	a.note(question{askServices, name{namespace, service}})
	return selectServices(a.services, namespace, service, selector)
}

// CIDRGroups implements policy.World.
func (a asker) CIDRGroups(group string, selector *policy.Selector) []netip.Prefix {
	a.note(question{askGroups, name{"", group}})
	return selectGroups(a.groups, group, selector)
}

// NamedPorts implements policy.World.
func (a asker) NamedPorts(port string) []policy.NamedPort {
	a.note(question{askPorts, name{"", port}})
	return sortedKeys(a.ports[port], comparePorts)
}

func selectServices(all map[name]policy.Service, namespace, service string, selector *policy.Selector) []policy.Service {
	var found []policy.Service
	if namespace != "" && service != "" {
		if s, ok := all[name{namespace, service}]; ok && (selector == nil || selector.Matches(s.Labels)) {
			found = append(found, s)
		}
		return found
	}
	for n, s := range all {
		if (namespace == "" || namespace == n.namespace) && (service == "" || service == n.name) && (selector == nil || selector.Matches(s.Labels)) {
			found = append(found, s)
		}
	}
	slices.SortFunc(found, compareServices)
	return found
}

func selectGroups(all map[string]*policy.CIDRGroup, group string, selector *policy.Selector) []netip.Prefix {
	var found []netip.Prefix
	for n, g := range all {
		if (group == "" || group == n) && (selector == nil || selector.Matches(g.Labels)) {
			found = append(found, g.Prefixes...)
		}
	}
	slices.SortFunc(found, comparePrefixes)
	return slices.Compact(found)
}

// SetService takes a service in, as toServices sees it.
func (e *Engine) SetService(s policy.Service) {
	n := name{s.Namespace, s.Name}
	if old, ok := e.world.services[n]; ok && equalServices(old, s) {
		return
	}
	e.world.services[n] = s
	e.world.touch(askServices, n)
}

// DeleteService forgets a service.
func (e *Engine) DeleteService(namespace, service string) {
	n := name{namespace, service}
	if _, ok := e.world.services[n]; ok {
		delete(e.world.services, n)
		e.world.touch(askServices, n)
	}
}

// SetGroup takes a CIDR group in; nil = it is gone.
func (e *Engine) SetGroup(group string, g *policy.CIDRGroup) {
	if g == nil {
		delete(e.world.groups, group)
	} else {
		e.world.groups[group] = g
	}
	e.world.touch(askGroups, name{"", group})
}

// AddPort says that a pod names a port; RemovePort takes it back.
func (e *Engine) AddPort(p policy.NamedPort) { e.countPort(p, 1) }

// RemovePort takes AddPort back.
func (e *Engine) RemovePort(p policy.NamedPort) { e.countPort(p, -1) }

func (e *Engine) countPort(p policy.NamedPort, n int) {
	all := e.world.ports[p.Name]
	if all == nil {
		all = map[policy.NamedPort]int{}
		e.world.ports[p.Name] = all
	}
	before := all[p]
	all[p] += n
	if before != 0 && all[p] != 0 {
		return
	}
	if all[p] <= 0 {
		delete(all, p)
		if len(all) == 0 {
			delete(e.world.ports, p.Name)
		}
	}
	e.world.touch(askPorts, name{"", p.Name})
}
