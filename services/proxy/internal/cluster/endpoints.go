// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sort"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/resource"
)

// place is what tells endpoints apart.
type place struct {
	address netip.AddrPort
	path    string
}

// host is one endpoint; what is counted of it stays when its cluster or assignment is renewed.
type host struct {
	place
	*counts
	weight  uint32
	healthy bool
}

type counts struct {
	active                  atomic.Int64
	failures, localFailures atomic.Uint32
	ejections, ejectedUntil atomic.Int64
}

func (h *host) ejected(now time.Time) bool {
	until := h.ejectedUntil.Load()
	return until != 0 && now.UnixNano() < until
}

func (h *host) endpoint() model.Endpoint {
	return model.Endpoint{Address: h.address, Path: h.path, Weight: h.weight, Healthy: h.healthy}
}

// set is an immutable assignment.
type set struct{ tiers []tier }

// tier are the endpoints of one priority.
type tier struct {
	hosts []*host
	up    [families]group // the healthy ones
	all   [families]group // in panic
}

// family is what kind of addresses will do: a socket in the client's name reaches only servers of the client's family.
type family uint8

const (
	anyFamily family = iota
	v4
	v6
	families
)

func familyOf(a netip.Addr) family {
	switch {
	case !a.IsValid():
		return anyFamily
	case a.Unmap().Is4():
		return v4
	}
	return v6
}

// groups makes the group of each family.
func groups(hosts []*host) (all [families]group) {
	var of [families][]*host
	for _, h := range hosts {
		of[anyFamily] = append(of[anyFamily], h)
		if f := familyOf(h.address.Addr()); f != anyFamily {
			of[f] = append(of[f], h)
		}
	}
	for f := range of {
		all[f] = newGroup(of[f])
	}
	return all
}

// group is what a policy chooses among.
type group struct {
	hosts []*host
	// sums are the running totals of the weights; nil = all are equal.
	sums []uint64
	// strides are the weights scaled to 65535, for round-robin.
	strides []uint32
	next    *atomic.Uint64
}

func newGroup(hosts []*host) group {
	g := group{hosts: hosts, next: &atomic.Uint64{}}
	if len(hosts) == 0 {
		return g
	}
	g.next.Store(uint64(rand.Uint32N(uint32(len(hosts))))) //nolint:gosec // where a round begins is no secret
	heaviest, equal := uint32(0), true
	for _, h := range hosts {
		heaviest = max(heaviest, h.weight)
		equal = equal && h.weight == hosts[0].weight
	}
	if equal {
		return g
	}
	total := uint64(0)
	for _, h := range hosts {
		total += uint64(h.weight)
		g.sums = append(g.sums, total)
		g.strides = append(g.strides, max(1, uint32(uint64(h.weight)*maxStride/uint64(heaviest))))
	}
	return g
}

const maxStride = 65535

// maxEndpoints bounds one assignment.
const maxEndpoints = 100_000

// compileAssignment reads endpoints; before are the hosts known so far.
func compileAssignment(in *endpointv3.ClusterLoadAssignment, before map[place]*counts) (*set, error) {
	path := "endpoints"
	if in == nil {
		return &set{}, nil
	}
	if err := fields.Only(in, path, "cluster_name", "endpoints", "policy"); err != nil {
		return nil, err
	}
	if p := in.GetPolicy(); p != nil {
		// Envoy spreads over priorities by an overprovisioning factor; here the first priority with a healthy endpoint takes all.
		if err := fields.Only(p, path+".policy", "overprovisioning_factor", "weighted_priority_health"); err != nil {
			return nil, err
		}
	}
	byPriority := map[uint32][]*host{}
	seen := map[place]bool{}
	for i, l := range in.GetEndpoints() {
		at := fields.Index(path, "endpoints", i)
		if err := fields.Only(l, at, "locality", "lb_endpoints", "load_balancing_weight", "priority", "proximity", "metadata"); err != nil {
			return nil, err
		}
		for j, e := range l.GetLbEndpoints() {
			h, err := compileHost(fields.Index(at, "lb_endpoints", j), e, before)
			if err != nil {
				return nil, err
			}
			if seen[h.place] {
				continue
			}
			seen[h.place] = true
			byPriority[l.GetPriority()] = append(byPriority[l.GetPriority()], h)
		}
	}
	if len(seen) > maxEndpoints {
		return nil, fmt.Errorf("%s: %d endpoints, above %d", path, len(seen), maxEndpoints)
	}
	return newSet(byPriority), nil
}

func newSet(byPriority map[uint32][]*host) *set {
	priorities := make([]uint32, 0, len(byPriority))
	for p := range byPriority {
		priorities = append(priorities, p)
	}
	slices.Sort(priorities)
	s := &set{}
	for _, p := range priorities {
		hosts := byPriority[p]
		var up []*host
		for _, h := range hosts {
			if h.healthy {
				up = append(up, h)
			}
		}
		s.tiers = append(s.tiers, tier{hosts: hosts, up: groups(up), all: groups(hosts)})
	}
	return s
}

func compileHost(path string, in *endpointv3.LbEndpoint, before map[place]*counts) (*host, error) {
	if err := fields.Only(in, path, "endpoint", "health_status", "metadata", "load_balancing_weight"); err != nil {
		return nil, err
	}
	e := in.GetEndpoint()
	if e == nil {
		return nil, fmt.Errorf("%s.endpoint is empty", path)
	}
	if err := fields.Only(e, path+".endpoint", "address", "hostname"); err != nil {
		return nil, err
	}
	h := &host{weight: 1}
	if pipe := e.GetAddress().GetPipe(); pipe != nil {
		if pipe.GetPath() == "" {
			return nil, fmt.Errorf("%s.endpoint.address.pipe.path is empty", path)
		}
		h.path = pipe.GetPath()
	} else {
		address, err := resource.Address(path+".endpoint.address", e.GetAddress())
		if err != nil {
			return nil, err
		}
		h.address = address
	}
	if w := in.GetLoadBalancingWeight(); w != nil {
		if w.GetValue() == 0 {
			return nil, fmt.Errorf("%s.load_balancing_weight is 0", path)
		}
		h.weight = w.GetValue()
	}
	switch in.GetHealthStatus() {
	case corev3.HealthStatus_UNKNOWN, corev3.HealthStatus_HEALTHY, corev3.HealthStatus_DEGRADED:
		h.healthy = true
	case corev3.HealthStatus_UNHEALTHY, corev3.HealthStatus_DRAINING, corev3.HealthStatus_TIMEOUT:
	}
	if h.counts = before[h.place]; h.counts == nil {
		h.counts = &counts{}
	}
	return h, nil
}

// counts returns what is counted of the hosts of a set.
func (s *set) counts() map[place]*counts {
	known := map[place]*counts{}
	for _, t := range s.tiers {
		for _, h := range t.hosts {
			known[h.place] = h.counts
		}
	}
	return known
}

// chooser is one choice.
type chooser struct {
	policy  policy
	choices uint32
	now     time.Time
	avoid   []netip.AddrPort
	outlier bool
	family  family
}

// allowed reports whether a host may be chosen at all.
func (c *chooser) allowed(h *host) bool {
	if c.outlier && h.ejected(c.now) {
		return false
	}
	return !slices.Contains(c.avoid, h.address)
}

// choose picks a host; nil = none is healthy. Ejected ones and those to avoid are taken when there is no other.
func (c *chooser) choose(s *set, panicPercent float64) *host {
	for _, last := range []bool{false, true} {
		for i := range s.tiers {
			t := &s.tiers[i]
			g, everyone := &t.up[c.family], &t.all[c.family]
			if panicPercent > 0 && float64(len(g.hosts))*100 < panicPercent*float64(len(everyone.hosts)) {
				g = everyone
			}
			if h := c.among(g, last); h != nil {
				return h
			}
		}
	}
	return nil
}

// among picks of one group; last = of all of them.
func (c *chooser) among(g *group, last bool) *host {
	if len(g.hosts) == 0 {
		return nil
	}
	// A few tries by the policy's own choice, so that nothing is filtered in the common case where all are allowed.
	for range 3 {
		if h := c.pick(g); last || c.allowed(h) {
			return h
		}
	}
	var rest []*host
	for _, h := range g.hosts {
		if c.allowed(h) {
			rest = append(rest, h)
		}
	}
	if len(rest) == 0 {
		return nil
	}
	narrowed := newGroup(rest)
	return c.pick(&narrowed)
}

func (c *chooser) pick(g *group) *host {
	if len(g.hosts) == 1 {
		return g.hosts[0]
	}
	switch c.policy {
	case leastRequest:
		best := g.random()
		for range c.choices - 1 {
			if h := g.random(); h.load() < best.load() {
				best = h
			}
		}
		return best
	case random:
		return g.random()
	case roundRobin:
	}
	return g.round()
}

// load: weights are already in how often a host is drawn.
func (h *host) load() int64 { return h.active.Load() }

func (g *group) random() *host {
	if g.sums == nil {
		return g.hosts[rand.IntN(len(g.hosts))] //nolint:gosec // which endpoint is no secret
	}
	at := rand.Uint64N(g.sums[len(g.sums)-1]) //nolint:gosec // as above
	return g.hosts[sort.Search(len(g.sums), func(i int) bool { return g.sums[i] > at })]
}

// round is round-robin; with weights, a static stride: in each round a host is passed over as often as its weight lacks to the heaviest.
func (g *group) round() *host {
	n := uint64(len(g.hosts))
	for {
		at := g.next.Add(1) - 1
		i, round := at%n, at/n
		if g.strides == nil {
			return g.hosts[i]
		}
		weight := uint64(g.strides[i])
		if (weight*round+i*maxStride/2)%maxStride >= maxStride-weight {
			return g.hosts[i]
		}
	}
}
