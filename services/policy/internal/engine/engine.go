// SPDX-License-Identifier: Apache-2.0

// Package engine is the incremental half of the policy compiler: it knows subjects, peers and policy objects, and keeps for each subject its resolved
// policies, with the classes of peers that occur. What policies mean is decided in internal/policy alone.
//
// Subjects that are alike (identity, named ports) share one class, which is resolved once; classes with the same outcome share one policy. A new pod of a known
// class costs nothing, a new peer only looks at the selectors that its labels can match, and a changed object compiles the classes that it selects or selected.
//
// An Engine is changed by one goroutine; Commit returns an immutable View.
package engine

import (
	"maps"
	"net/netip"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// Counters count work, for tests and metrics.
type Counters struct {
	// Resolved counts calls of policy.Resolve, Matched selectors tried on peers, Decided classes computed.
	Resolved, Matched, Decided uint64
}

// SubjectID names a subject: a pod by node and uid, or "host" or "health" of a node.
type SubjectID struct{ Node, Key string }

// Subject says which policies a subject has; empty = not enforced.
type Subject struct {
	Ingress, Egress string
	Audit           bool
}

// View is what there is at one time. It is never changed.
type View struct {
	Policies  map[string]*Policy
	Selectors map[string]*Selector
	// CIDRs are the peers outside of the cluster, by key.
	CIDRs map[string]*policy.Peer
	// Nodes by name.
	Nodes map[string]*Node
	// Filters of all policies, by key, as the newest policy with each has it.
	Filters map[string]*Filter
}

// Node has the subjects of a node, and says what else concerns it. It is never changed.
type Node struct {
	Subjects map[string]Subject
	// Keys of what the node must have.
	Policies, Selectors, CIDRs map[string]struct{}
}

// Engine is made by New.
type Engine struct {
	options policy.Options
	world   *world
	objects map[string]map[object.Key]*policy.Object // by namespace; "" = of the whole cluster

	classes     map[string]*class
	byNamespace map[string]map[*class]struct{}
	dirty       map[*class]struct{}
	selected    map[object.Key]int // subjects by object
	nodes       map[string]*node

	resolutions map[string]*resolution
	idle        map[*resolution]int                // used by no class, and how many more calls of Rest they stay
	filters     map[string]map[*resolution]*Filter // by key
	age         uint64                             // of the youngest resolution
	terms       map[string]*term
	anchored    map[string]map[*term]struct{}       // by label
	byPrefix    map[netip.Prefix]map[*term]struct{} // those of what is outside
	unanchored  map[*term]struct{}
	search      uint64

	peers   map[string]*peer
	byID    []*peer
	free    []int
	byLabel map[string]map[*peer]struct{}
	// prefixed are those outside of the cluster.
	prefixed map[*peer]struct{}

	prefixes   map[netip.Prefix]int // what policies name, how often
	networks   map[netip.Prefix]int
	names      map[string]int
	apiServers map[netip.Addr]struct{} // outside of the cluster
	told       uint64                  // raised when networks or names change

	scratch []*branch // of partition, all nil between calls

	changed changed
	view    *View
	counts  Counters
}

// changed is what the next Commit must look at.
type changed struct {
	resolutions map[*resolution]struct{}
	terms       map[*term]struct{}
	gonePolicy  map[string]struct{}
	goneTerm    map[string]struct{}
	cidrs       map[string]struct{}
	named       map[string]struct{} // selectors with other members that have a prefix
	nodes       map[string]struct{}
	filters     map[string]struct{}
}

func newChanged() changed {
	return changed{
		resolutions: map[*resolution]struct{}{}, terms: map[*term]struct{}{}, gonePolicy: map[string]struct{}{}, goneTerm: map[string]struct{}{},
		cidrs: map[string]struct{}{}, named: map[string]struct{}{}, nodes: map[string]struct{}{}, filters: map[string]struct{}{},
	}
}

// New returns an empty engine.
func New(o policy.Options) *Engine {
	e := &Engine{
		options: o, objects: map[string]map[object.Key]*policy.Object{}, classes: map[string]*class{},
		byNamespace: map[string]map[*class]struct{}{}, dirty: map[*class]struct{}{}, selected: map[object.Key]int{}, nodes: map[string]*node{},
		resolutions: map[string]*resolution{}, idle: map[*resolution]int{}, filters: map[string]map[*resolution]*Filter{},
		terms: map[string]*term{}, anchored: map[string]map[*term]struct{}{}, unanchored: map[*term]struct{}{},
		byPrefix: map[netip.Prefix]map[*term]struct{}{}, prefixed: map[*peer]struct{}{},
		peers: map[string]*peer{}, byLabel: map[string]map[*peer]struct{}{}, prefixes: map[netip.Prefix]int{}, networks: map[netip.Prefix]int{},
		names: map[string]int{}, apiServers: map[netip.Addr]struct{}{}, changed: newChanged(),
		view: &View{
			Policies: map[string]*Policy{}, Selectors: map[string]*Selector{}, CIDRs: map[string]*policy.Peer{}, Nodes: map[string]*Node{},
			Filters: map[string]*Filter{},
		},
	}
	e.world = newWorld(e)
	return e
}

// Counters returns what was done so far.
func (e *Engine) Counters() Counters { return e.counts }

// Options returns the options in force.
func (e *Engine) Options() policy.Options { return e.options }

// SetDualStack says whether nodes have addresses of both families: then the world has two identities.
func (e *Engine) SetDualStack(dual bool) {
	if e.options.DualStack == dual {
		return
	}
	e.options.DualStack = dual
	for _, c := range e.classes {
		e.dirty[c] = struct{}{}
	}
	for p := range e.prefixes {
		e.refreshCIDR(p)
	}
}

// SetAPIServers says which addresses outside of the cluster serve the Kubernetes API.
func (e *Engine) SetAPIServers(addrs []netip.Addr) {
	next := map[netip.Addr]struct{}{}
	for _, a := range addrs {
		next[a] = struct{}{}
	}
	before := e.apiServers
	e.apiServers = next
	for a := range next {
		if _, ok := before[a]; !ok {
			p := netip.PrefixFrom(a, a.BitLen())
			e.prefixes[p]++
			e.refreshCIDR(p)
		}
	}
	for a := range before {
		if _, ok := next[a]; !ok {
			e.dropPrefix(netip.PrefixFrom(a, a.BitLen()))
			e.refreshCIDR(netip.PrefixFrom(a, a.BitLen()))
		}
	}
	if !maps.Equal(before, next) {
		for n := range e.nodes {
			e.changed.nodes[n] = struct{}{} // they are sent to every node
		}
	}
}

// Told is a number that changes when Networks or Names do.
func (e *Engine) Told() uint64 { return e.told }

// Networks returns the prefixes that tell addresses in the cluster apart.
func (e *Engine) Networks() []netip.Prefix { return sortedKeys(e.networks, comparePrefixes) }

// Names returns the names of ports that tell pods apart.
func (e *Engine) Names() map[string]int { return e.names }

// Commit computes what changed since the last one, and returns it whole. Nothing changed: it is the same pointer. Call Compile before.
func (e *Engine) Commit() *View {
	e.Compile()
	c := &e.changed
	v := *e.view
	any := false
	if len(c.terms)+len(c.goneTerm) > 0 {
		v.Selectors = maps.Clone(v.Selectors)
		for key := range c.goneTerm {
			delete(v.Selectors, key)
		}
		for t := range c.terms {
			e.publishTerm(t, v.Selectors)
		}
		any = true
	}
	if len(c.resolutions)+len(c.gonePolicy) > 0 {
		v.Policies = maps.Clone(v.Policies)
		for key := range c.gonePolicy {
			delete(v.Policies, key)
		}
		for r := range c.resolutions {
			v.Policies[r.resolved.Key] = r.publish()
			e.useFilters(r, r.out.Filters)
		}
		any = true
	}
	if e.publishFilters(&v) {
		any = true
	}
	if len(c.cidrs) > 0 {
		v.CIDRs = maps.Clone(v.CIDRs)
		for key := range c.cidrs {
			if p := e.peers[key]; p != nil {
				v.CIDRs[key] = p.peer
			} else {
				delete(v.CIDRs, key)
			}
		}
		any = true
	}
	e.noteNamed()
	if len(c.nodes) > 0 {
		v.Nodes = maps.Clone(v.Nodes)
		for name := range c.nodes {
			e.publishNode(name, &v)
		}
		any = true
	}
	e.changed = newChanged()
	if any {
		e.view = &v
	}
	return e.view
}
