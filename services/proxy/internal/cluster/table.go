// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"slices"
	"sync"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/sockets"
)

// Table holds the clusters by name and implements model.Clusters. Configurations come from one goroutine; the rest is safe for concurrent use.
type Table struct {
	dialer   *sockets.Dialer
	now      func() time.Time
	matchers *match.Compiler

	mu       sync.RWMutex
	clusters map[string]*Cluster
	counters map[string]*Counters
	// assignments are kept by EDS name, also of clusters that are not there yet.
	assignments map[string]*endpointv3.ClusterLoadAssignment
}

// NewTable makes an empty table.
func NewTable(dialer *sockets.Dialer) *Table {
	return &Table{
		dialer: dialer, now: time.Now,
		clusters: map[string]*Cluster{}, counters: map[string]*Counters{}, assignments: map[string]*endpointv3.ClusterLoadAssignment{},
	}
}

// CompileWith is told before the first cluster is put.
func (t *Table) CompileWith(m *match.Compiler) { t.matchers = m }

// Cluster implements model.Clusters.
func (t *Table) Cluster(name string) model.Cluster {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if c, ok := t.clusters[name]; ok {
		return c
	}
	return nil
}

// Put takes a new configuration of a cluster, or refuses it and keeps the one before.
func (t *Table) Put(in *clusterv3.Cluster) error {
	compiled, err := compile(in, t.matchers)
	if err != nil {
		return err
	}
	c := &Cluster{config: compiled, source: in, dialer: t.dialer, now: t.now}
	t.mu.Lock()
	defer t.mu.Unlock()
	var before map[place]*counts
	if old := t.clusters[compiled.name]; old != nil {
		before = old.endpoints.Load().counts()
		c.generation = old.generation
		if !proto.Equal(old.source.GetTransportSocket(), in.GetTransportSocket()) ||
			!proto.Equal(old.source.GetUpstreamBindConfig(), in.GetUpstreamBindConfig()) {
			c.generation++
		}
	}
	assignment := in.GetLoadAssignment()
	if compiled.kind == eds {
		assignment = t.assignments[compiled.edsName]
	}
	endpoints, err := compileAssignment(assignment, before)
	if err != nil {
		return err
	}
	c.endpoints.Store(endpoints)
	if t.counters[compiled.name] == nil {
		t.counters[compiled.name] = &Counters{}
	}
	c.counters = t.counters[compiled.name]
	t.clusters[compiled.name] = c
	return nil
}

// Remove forgets a cluster. Who has it still may use it to the end.
func (t *Table) Remove(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.clusters, name)
	delete(t.counters, name)
}

// Assign takes the endpoints of an EDS name, or refuses them and keeps those before.
func (t *Table) Assign(in *endpointv3.ClusterLoadAssignment) error {
	if _, err := compileAssignment(in, nil); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	name := in.GetClusterName()
	if proto.Equal(t.assignments[name], in) {
		return nil
	}
	t.assignments[name] = in
	return t.spread(name, in)
}

// Unassign takes the endpoints of an EDS name away.
func (t *Table) Unassign(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.assignments, name)
	_ = t.spread(name, nil) // no endpoints always compile
}

func (t *Table) spread(name string, in *endpointv3.ClusterLoadAssignment) error {
	for _, c := range t.clusters {
		if c.config.kind != eds || c.config.edsName != name {
			continue
		}
		endpoints, err := compileAssignment(in, c.endpoints.Load().counts())
		if err != nil {
			return err
		}
		c.endpoints.Store(endpoints)
	}
	return nil
}

// Reachable reports whether a cluster is there and its endpoints have come.
func (t *Table) Reachable(name string) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	c, ok := t.clusters[name]
	if !ok || c.config.kind != eds {
		return ok
	}
	_, ok = t.assignments[c.config.edsName]
	return ok
}

// EDSNames are the names that the clusters' endpoints have, sorted.
func (t *Table) EDSNames() []string {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var names []string
	for _, c := range t.clusters {
		if c.config.kind == eds {
			names = append(names, c.config.edsName)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// HostStatus is one endpoint as the admin port shows it.
type HostStatus struct {
	model.Endpoint

	Active  int64
	Ejected bool
}

// Status is a cluster as the admin port shows it.
type Status struct {
	Name     string
	Counters *Counters
	Hosts    []HostStatus
}

// Status returns all clusters, sorted by name.
func (t *Table) Status() []Status {
	t.mu.RLock()
	defer t.mu.RUnlock()
	now := t.now()
	all := make([]Status, 0, len(t.clusters))
	for name, c := range t.clusters {
		s := Status{Name: name, Counters: c.counters}
		for _, tier := range c.endpoints.Load().tiers {
			for _, h := range tier.hosts {
				s.Hosts = append(s.Hosts, HostStatus{Endpoint: h.endpoint(), Active: h.active.Load(), Ejected: h.ejected(now)})
			}
		}
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b Status) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return all
}
