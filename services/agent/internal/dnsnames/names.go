// SPDX-License-Identifier: Apache-2.0

// Package dnsnames keeps what DNS answers said: names, their addresses, for how long. From that and from the policies' selectors of names it makes
// the kernel's maps of names: each address has the number of a *set* (the selectors that match any of its names), and each policy with one of them
// has a row for the set. Learn says when an answer may go to the client: when the maps hold its addresses.
//
// One goroutine writes the maps, in an order that leaves no window: rows before addresses on the way in, addresses before rows on the way out.
package dnsnames

import (
	"container/heap"
	"container/list"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/weirmesh/weir/internal/policy"
)

// Maps are the kernel's maps of names.
type Maps interface {
	SetAddress(addr netip.Addr, set uint32) error
	DeleteAddress(addr netip.Addr) error
	SetPolicy(policy, set uint32, ranges []Range) error
	DeletePolicy(policy, set uint32) error
	Addresses() (map[netip.Addr]uint32, error)
	Policies() ([]Row, error)
}

// Row names a row of a policy.
type Row struct{ Policy, Set uint32 }

// Config says how names are kept.
type Config struct {
	Maps Maps
	// Live returns the addresses at the far end of live connections.
	Live func() (map[netip.Addr]struct{}, error)
	// Match says whether a selector matches a name (lower case, trailing dot).
	Match func(sel policy.NameSelector, name string) bool
	// Dir keeps the names for the next process; empty = nothing does.
	Dir string
	// MinTTL is the least time that an address is kept.
	MinTTL time.Duration
	// Grace is how long an address is kept after its last connection.
	Grace time.Duration
	// PerName is how many addresses one endpoint may learn of one name, PerEndpoint of all names, Max what the node keeps in all: the oldest go.
	PerName, PerEndpoint, Max int
	// MaxKept bounds addresses that are kept only for live connections.
	MaxKept int
	Now     func() time.Time
	Log     *slog.Logger
}

// Stats is what is kept and what became of it.
type Stats struct {
	Names, Addresses, Mappings, Kept, Selectors, Policies, Sets, Rows int
	// Evicted mappings found no room, Expired ones were over, Conflicts are ports that two filters of a policy claim, Failures writes to maps
	// that failed.
	Evicted, Expired, Conflicts, Failures uint64
	// Unsaved: the names on disk are not what they should be.
	Unsaved bool
}

// settle is how long an address stays at least: the client is to have the time to connect.
const settle = time.Second

// Engine is safe for concurrent use. Run must run for anything to be written.
type Engine struct {
	cfg  Config
	log  *slog.Logger
	wake chan struct{}
	disk journal

	mu        sync.Mutex
	names     map[string]*name
	addresses map[netip.Addr]*address
	endpoints map[uint16]*endpoint
	expiring  expiries
	kept      map[*mapping]struct{}
	mappings  int
	dirtyDisk bool

	selectors map[policy.NameSelector]*selector
	lastID    uint32
	policies  map[uint32]*namePolicy
	sets      map[string]*set
	byNumber  map[uint32]*set
	lastSet   uint32
	dead      []uint32                      // sets that nothing has any more, whose rows are to go
	rows      map[uint32]map[uint32][]Range // what the kernel has, by set and policy

	// Work for the writer.
	dirty         map[*address]struct{}
	dirtyPolicies map[uint32]struct{}
	fresh         []*mapping // not in the journal yet
	waiters       []waiter
	updates       []func()       // called when dirtyPolicies are written
	foreign       map[uint32]int // addresses in sets of an earlier process
	settled       bool           // the policies are known: what no selector matches may go

	nextScan    time.Time
	lastFailure time.Time
	retrying    bool // addresses wait for the next try
	stats       Stats
}

// name is a name that was asked for.
type name struct {
	text     string
	matches  []uint32 // numbers of selectors, rising
	mappings map[netip.Addr]*mapping
}

// address is an address that names have.
type address struct {
	addr     netip.Addr
	mappings map[*name]*mapping
	want     *set   // nil = no selector matches
	have     *set   // what the kernel has; changed by the writer alone
	foreign  uint32 // the kernel has this set of an earlier process; 0 = it has not
}

// mapping: an answer gave a name an address.
type mapping struct {
	name    *name
	address *address
	expires time.Time
	index   int // in expiring; -1 = it is in kept
	used    time.Time
	leases  []*lease
}

// lease: this endpoint was given that answer.
type lease struct {
	endpoint *endpoint
	mapping  *mapping
	element  *list.Element // of endpoint.leases
}

// endpoint is a client that learns.
type endpoint struct {
	id      uint16
	leases  *list.List // the oldest first
	perName map[*name]int
}

type waiter struct {
	addresses []*address
	done      func(error)
}

// New makes an engine without names.
func New(cfg Config) *Engine {
	return &Engine{
		cfg: cfg, log: cfg.Log.With("component", "names"), wake: make(chan struct{}, 1), disk: journal{dir: cfg.Dir},
		names: map[string]*name{}, addresses: map[netip.Addr]*address{}, endpoints: map[uint16]*endpoint{}, kept: map[*mapping]struct{}{},
		selectors: map[policy.NameSelector]*selector{}, policies: map[uint32]*namePolicy{}, sets: map[string]*set{}, rows: map[uint32]map[uint32][]Range{}, byNumber: map[uint32]*set{}, foreign: map[uint32]int{},
		dirty: map[*address]struct{}{}, dirtyPolicies: map[uint32]struct{}{},
	}
}

// Learn takes an answer that an endpoint is to be given. It returns true when the maps hold all of it; else it calls done, once, when they do or
// cannot. done must not block.
func (e *Engine) Learn(endpointID uint16, text string, addrs []netip.Addr, ttl time.Duration, done func(error)) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.cfg.Now()
	expires := now.Add(max(ttl, e.cfg.MinTTL, settle))
	n := e.names[text]
	if n == nil {
		n = &name{text: text, matches: e.matchesLocked(text), mappings: map[netip.Addr]*mapping{}}
		e.names[text] = n
	}
	ep := e.endpoints[endpointID]
	if ep == nil {
		ep = &endpoint{id: endpointID, leases: list.New(), perName: map[*name]int{}}
		e.endpoints[endpointID] = ep
	}
	var wait []*address
	for _, addr := range addrs {
		m := e.mapLocked(n, addr, expires)
		e.leaseLocked(ep, m)
		if m.address.have != m.address.want {
			wait = append(wait, m.address)
		}
	}
	e.boundLocked(ep, n, now)
	if len(n.mappings) == 0 {
		delete(e.names, text)
	}
	e.dirtyDisk = true
	if len(e.fresh) > 0 || len(wait) > 0 {
		e.kick()
	}
	if len(wait) == 0 {
		return true
	}
	e.waiters = append(e.waiters, waiter{wait, done})
	return false
}

func (e *Engine) kick() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// mapLocked gives a name an address, or prolongs it.
func (e *Engine) mapLocked(n *name, addr netip.Addr, expires time.Time) *mapping {
	m := n.mappings[addr]
	if m != nil {
		if expires.After(m.expires) {
			m.expires = expires
			if m.index >= 0 {
				heap.Fix(&e.expiring, m.index)
			}
		}
		if m.index < 0 && m.expires.After(e.cfg.Now()) {
			delete(e.kept, m)
			heap.Push(&e.expiring, m)
		}
		return m
	}
	a := e.addresses[addr]
	if a == nil {
		a = &address{addr: addr, mappings: map[*name]*mapping{}}
		e.addresses[addr] = a
	}
	m = &mapping{name: n, address: a, expires: expires}
	n.mappings[addr], a.mappings[n] = m, m
	heap.Push(&e.expiring, m)
	e.mappings++
	e.fresh = append(e.fresh, m)
	e.chooseLocked(a)
	return m
}

// leaseLocked notes that an endpoint has a mapping, as its newest.
func (e *Engine) leaseLocked(ep *endpoint, m *mapping) {
	for _, l := range m.leases {
		if l.endpoint == ep {
			ep.leases.MoveToBack(l.element)
			return
		}
	}
	l := &lease{endpoint: ep, mapping: m}
	l.element = ep.leases.PushBack(l)
	ep.perName[m.name]++
	m.leases = append(m.leases, l)
}

// boundLocked takes away what is too much: the oldest that this endpoint has of the name, then of all names; when the node has too much, the oldest of
// the endpoint that has most, so that who fills the cache pays for it.
func (e *Engine) boundLocked(ep *endpoint, n *name, now time.Time) {
	for ep.perName[n] > e.cfg.PerName {
		e.evictLocked(e.oldestOf(ep, n), now)
	}
	for ep.leases.Len() > e.cfg.PerEndpoint {
		e.evictOldestLocked(ep, now)
	}
	for e.mappings-len(e.kept) > e.cfg.Max && len(e.endpoints) > 0 {
		most := ep
		for _, x := range e.endpoints {
			if x.leases.Len() > most.leases.Len() {
				most = x
			}
		}
		e.evictOldestLocked(most, now)
	}
}

func (e *Engine) evictOldestLocked(ep *endpoint, now time.Time) {
	if l, ok := ep.leases.Front().Value.(*lease); ok {
		e.evictLocked(l, now)
	}
}

func (e *Engine) oldestOf(ep *endpoint, n *name) *lease {
	for x := ep.leases.Front(); x != nil; x = x.Next() {
		if l, _ := x.Value.(*lease); l.mapping.name == n {
			return l
		}
	}
	return nil
}

// evictLocked takes a mapping from an endpoint. One that nobody has left is over, but for its live connections.
func (e *Engine) evictLocked(l *lease, now time.Time) {
	e.stats.Evicted++
	m := l.mapping
	e.unleaseLocked(l)
	if len(m.leases) == 0 && m.index >= 0 {
		heap.Remove(&e.expiring, m.index)
		m.expires = now
		e.keepLocked(m)
	}
}

func (e *Engine) unleaseLocked(l *lease) {
	m, ep := l.mapping, l.endpoint
	for i, x := range m.leases {
		if x == l {
			m.leases = append(m.leases[:i:i], m.leases[i+1:]...)
			break
		}
	}
	ep.leases.Remove(l.element)
	if ep.perName[m.name]--; ep.perName[m.name] == 0 {
		delete(ep.perName, m.name)
	}
	if ep.leases.Len() == 0 {
		delete(e.endpoints, ep.id)
	}
}

// keepLocked puts a mapping whose time is over among those that only live connections keep.
func (e *Engine) keepLocked(m *mapping) {
	m.index = -1
	e.kept[m] = struct{}{}
}

// removeLocked forgets a mapping.
func (e *Engine) removeLocked(m *mapping) {
	if m.index >= 0 {
		heap.Remove(&e.expiring, m.index)
	}
	delete(e.kept, m)
	for len(m.leases) > 0 {
		e.unleaseLocked(m.leases[0])
	}
	delete(m.name.mappings, m.address.addr)
	delete(m.address.mappings, m.name)
	if len(m.name.mappings) == 0 && e.names[m.name.text] == m.name {
		delete(e.names, m.name.text)
	}
	e.mappings--
	e.dirtyDisk = true
	e.chooseLocked(m.address)
	e.forgetLocked(m.address)
}

// forgetLocked drops an address that nothing speaks of.
func (e *Engine) forgetLocked(a *address) {
	if len(a.mappings) == 0 && a.have == nil && a.foreign == 0 && e.addresses[a.addr] == a {
		delete(e.addresses, a.addr)
	}
}

// Stats returns what is kept.
func (e *Engine) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.stats
	s.Names, s.Addresses, s.Mappings, s.Kept = len(e.names), len(e.addresses), e.mappings, len(e.kept)
	s.Selectors, s.Policies, s.Sets = len(e.selectors), len(e.policies), len(e.sets)
	for _, rows := range e.rows {
		s.Rows += len(rows)
	}
	return s
}

// expiries is a heap of mappings, the first to expire on top.
type expiries []*mapping

func (h expiries) Len() int           { return len(h) }
func (h expiries) Less(i, j int) bool { return h[i].expires.Before(h[j].expires) }
func (h expiries) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push implements heap.Interface.
func (h *expiries) Push(x any) {
	m, _ := x.(*mapping)
	m.index = len(*h)
	*h = append(*h, m)
}

// Pop implements heap.Interface.
func (h *expiries) Pop() any {
	old := *h
	m := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	m.index = -1
	return m
}
