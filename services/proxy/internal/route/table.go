// SPDX-License-Identifier: Apache-2.0

// Package route holds compiled route configurations: which virtual host and route a request meets, and what is done with it.
package route

import (
	"maps"
	"net"
	"slices"
	"strings"

	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/mutation"
)

// Table is a compiled route configuration. It is immutable.
type Table struct {
	name       string
	ignorePort bool
	exact      map[string]*Host
	// Longest first: the most specific wildcard wins.
	suffixes, prefixes []wildcard
	any                *Host
	clusters           map[string]struct{}
	upgrades           map[string]bool
	level              level
	// specificLast: the most specific level's header changes are made last, so that they stand.
	specificLast bool
}

type wildcard struct {
	text string
	host *Host
}

// level is what a table, a virtual host, a route and a weighted cluster all may have.
type level struct {
	request, response mutation.List
	overrides         map[string]Override
}

// Override is a filter's configuration for a part of the routes.
type Override struct {
	Disabled bool
	// Config as the filter's compiler made it.
	Config any
}

// Host is a virtual host.
type Host struct {
	name   string
	routes []*Route
	level  level
}

// Match is where a request goes.
type Match struct {
	table *Table
	Host  *Host
	Route *Route
	// Cluster that was chosen, for routes that forward.
	Cluster *Cluster
}

// Name of the route configuration.
func (t *Table) Name() string { return t.name }

// Clusters are the names of the clusters that its routes lead to.
func (t *Table) Clusters() []string { return slices.Sorted(maps.Keys(t.clusters)) }

// Upgrades reports whether some route switches a protocol on.
func (t *Table) Upgrades(protocol string) bool { return t.upgrades[protocol] }

// Match finds the route of a request. pick returns a number below its argument, for weights. ok is false when no route matches.
func (t *Table) Match(r *match.Request, pick func(uint64) uint64) (m Match, ok bool) {
	host := t.host(r.Authority)
	if host == nil {
		return Match{}, false
	}
	for _, route := range host.routes {
		if !route.matches(r) {
			continue
		}
		m = Match{table: t, Host: host, Route: route}
		if route.Forward != nil {
			m.Cluster = route.Forward.choose(pick)
		}
		return m, true
	}
	return Match{table: t, Host: host}, false
}

func (t *Table) host(authority string) *Host {
	if len(t.exact) == 0 && len(t.suffixes) == 0 && len(t.prefixes) == 0 {
		return t.any
	}
	name := strings.ToLower(authority)
	if t.ignorePort {
		if h, _, err := net.SplitHostPort(name); err == nil {
			name = h
		}
	}
	if h, ok := t.exact[name]; ok {
		return h
	}
	for _, w := range t.suffixes {
		if len(name) > len(w.text) && strings.HasSuffix(name, w.text) {
			return w.host
		}
	}
	for _, w := range t.prefixes {
		if len(name) > len(w.text) && strings.HasPrefix(name, w.text) {
			return w.host
		}
	}
	return t.any
}

// Override is the most specific configuration of a filter; false = the filter's own counts.
func (m *Match) Override(filter string) (Override, bool) {
	for _, l := range m.levels() {
		if l == nil {
			continue
		}
		if o, ok := l.overrides[filter]; ok {
			return o, true
		}
	}
	return Override{}, false
}

// levels from the most specific to the least; those that do not apply are nil.
func (m *Match) levels() (l [4]*level) {
	if m.Cluster != nil {
		l[0] = &m.Cluster.level
	}
	if m.Route != nil {
		l[1] = &m.Route.level
	}
	if m.Host != nil {
		l[2] = &m.Host.level
	}
	if m.table != nil {
		l[3] = &m.table.level
	}
	return l
}

// MutateRequest makes the request header changes of all levels.
func (m *Match) MutateRequest(r *match.Request) {
	m.mutate(func(l *level) { l.request.Apply(r.Header, r) })
}

// MutateResponse makes the response header changes of all levels.
func (m *Match) MutateResponse(h map[string][]string, r *match.Request) {
	m.mutate(func(l *level) { l.response.Apply(h, r) })
}

func (m *Match) mutate(apply func(*level)) {
	l := m.levels()
	if m.table != nil && m.table.specificLast {
		slices.Reverse(l[:])
	}
	for _, x := range l {
		if x != nil {
			apply(x)
		}
	}
}
