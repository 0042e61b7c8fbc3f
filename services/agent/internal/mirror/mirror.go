// SPDX-License-Identifier: Apache-2.0

// Package mirror makes the kernel's maps and routes hold what is desired: identities of all addresses, services and their backends, routes to the
// other nodes' pods. It also names peers and services for the flows. Applying the same state again changes nothing; what failed is tried again
// with the next change or Retry.
package mirror

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/event"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/healthport"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

// IPCache is the map of identities (datapath.IPCache).
type IPCache interface {
	Upsert(netip.Prefix, datapath.IPCacheEntry) error
	Delete(netip.Prefix) error
	List() ([]datapath.IPCacheRow, error)
}

// Services are the maps of services (datapath.Services).
type Services interface {
	Upsert(...datapath.Service) error
	Delete(...datapath.Frontend) error
	List() ([]datapath.Service, error)
}

// Peers numbers those whom policies tell apart (policymap.Engine).
type Peers interface {
	// Number returns the number of a peer.
	Number(name string) uint32
}

// Slots numbers what connections pass through (slot.Slots).
type Slots interface {
	// Of returns the number of a filter's slot, a new one if it has none.
	Of(slot.Filter) (uint16, error)
}

// HealthPorts are the health-check node ports (healthport.Server).
type HealthPorts interface {
	// Set makes the ports exactly these.
	Set(map[uint16]healthport.Service) error
}

// Identities with fixed meanings that the mirror gives out itself.
const (
	identityHost       = 1
	identityUnmanaged  = 3
	identityHealth     = 4
	identityRemoteNode = 6
	identityAPIServer  = 7
)

// Config says what a mirror works on.
type Config struct {
	// Node is this node's name.
	Node string
	// World identities of both families, for service addresses.
	WorldIPv4, WorldIPv6 uint32
	IPCache              IPCache
	// IPCacheMax bounds its rows; 0 = the map does.
	IPCacheMax int
	Services   Services
	// Routes makes the routes to pod CIDRs exactly these.
	Routes func([]netdev.Route) error
	// Source addresses of the node, for routes to its own pods.
	NodeIPv4, NodeIPv6 netip.Addr
	Directory          *flow.Directory
	Events             *event.Queue
	// HealthPorts answers load balancers; nil = nobody does.
	HealthPorts HealthPorts
	// ServiceIDs finds and keeps numbers of frontends.
	ServiceIDs *ServiceIDs
	Peers      Peers
	// Slots numbers the routes of services; nil = services have none.
	Slots Slots
	// PeersChanged is called when policies know an address of a local endpoint by another number.
	PeersChanged func(uid string)
	// NodeChanged is called with this node's own resource when it changes.
	NodeChanged func(*desired.Node)
	// PodChanged is called when a pod of this node changes.
	PodChanged func(*desired.Pod)
	Log        *slog.Logger
}

// Mirror is safe for concurrent use.
type Mirror struct {
	cfg Config
	log *slog.Logger

	mu         sync.Mutex
	claims     claims
	nodes      map[string]*desired.Node
	identities map[uint32]struct{} // in use by endpoints that were seen
	frontends  map[datapath.Frontend]*serviceRow
	services   map[string]*desired.Service // by namespace/name
	pinned     map[datapath.Frontend]datapath.Service
	// healthDirty: the health-check node ports are not what the services say.
	healthDirty bool
	routesBad   bool
	local       map[netip.Addr]localAddr
	peers       map[string]*desired.Peer
	endpoints   map[string]*desired.Endpoint // less those on their node's network
}

// localAddr is an address of an endpoint of this node.
type localAddr struct {
	uid  string
	peer flow.Peer
}

// New makes a mirror.
func New(cfg Config) *Mirror {
	m := &Mirror{
		cfg: cfg, log: cfg.Log.With("component", "mirror"), claims: newClaims(), nodes: map[string]*desired.Node{},
		identities: map[uint32]struct{}{}, frontends: map[datapath.Frontend]*serviceRow{},
		services: map[string]*desired.Service{}, local: map[netip.Addr]localAddr{},
		peers: map[string]*desired.Peer{}, endpoints: map[string]*desired.Endpoint{},
	}
	m.claims.max = cfg.IPCacheMax
	return m
}

// Adopt takes over what an earlier agent wrote. Call it once, before anything else.
func (m *Mirror) Adopt() error {
	rows, err := m.cfg.IPCache.List()
	if err != nil {
		return err
	}
	services, err := m.cfg.Services.List()
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.claims.adopt(rows)
	m.pinned = make(map[datapath.Frontend]datapath.Service, len(services))
	for _, s := range services {
		m.pinned[s.Frontend] = s
	}
	return nil
}

// Apply makes the maps follow the changes. quiet is for state that is not news (read from disk): it
// makes no events, and what is pinned, which may be younger, stays until Prune or until something else is said of it.
//
// between is called when all new addresses are written and none is gone, unless writing failed, with the prefixes of policies for which there is no room;
// it must not call the mirror.
func (m *Mirror) Apply(changes []desired.Change, quiet bool, between func([]Unplaced) error) error {
	m.mu.Lock()
	var pods []*desired.Pod
	var self *desired.Node
	var renamed []string
	routes := false
	for _, c := range changes {
		switch c.Key.Kind {
		case desired.KindNode:
			if n := m.applyNode(c); n != nil && n.Name == m.cfg.Node {
				self = n
			}
			routes = true
		case desired.KindPeer:
			m.applyPeer(c)
		case desired.KindEndpoint:
			if m.applyEndpoint(c, quiet) {
				renamed = append(renamed, c.Key.Name)
			}
		case desired.KindIdentity:
			if n, ok := c.New.(*desired.Identity); ok {
				m.cfg.Directory.SetIdentity(n.Number, n.Labels)
			} else if o, ok := c.Old.(*desired.Identity); ok {
				m.cfg.Directory.RemoveIdentity(o.Number)
				delete(m.identities, o.Number)
			}
		case desired.KindService:
			m.applyService(c)
		case desired.KindPod:
			if p, ok := c.New.(*desired.Pod); ok {
				pods = append(pods, p)
			}
		}
	}
	if routes {
		// Which prefixes are in the cluster has changed.
		m.claimPrefixes()
	}
	m.routesBad = m.routesBad || routes
	if quiet {
		m.claims.keep()
		m.keepServices()
	}
	err := m.flushLocked(quiet, func() error {
		if between == nil {
			return nil
		}
		return between(m.unplaced())
	})
	m.mu.Unlock()

	if self != nil && m.cfg.NodeChanged != nil {
		m.cfg.NodeChanged(self)
	}
	for _, uid := range renamed {
		m.cfg.PeersChanged(uid)
	}
	if m.cfg.PodChanged != nil {
		for _, p := range pods {
			m.cfg.PodChanged(p)
		}
	}
	return err
}

// Retry writes again what failed.
func (m *Mirror) Retry() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.flushLocked(false, nil)
}

// Prune removes from the maps what is not desired. Call it when the state is complete.
func (m *Mirror) Prune() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.claims.settle()
	m.settleServices()
	errs := []error{m.claims.flush(m.cfg.IPCache, nil)}
	rows, err := m.cfg.Services.List()
	errs = append(errs, err)
	var strays []datapath.Frontend
	for _, r := range rows {
		if _, ok := m.frontends[r.Frontend]; !ok {
			strays = append(strays, r.Frontend)
		}
	}
	if len(strays) > 0 {
		errs = append(errs, m.cfg.Services.Delete(strays...))
	}
	if err := m.flushServices(false); err != nil {
		errs = append(errs, fmt.Errorf("write services: %w", err))
	}
	return errors.Join(errs...)
}

func (m *Mirror) flushLocked(quiet bool, between func() error) error {
	var errs []error
	if err := m.claims.flush(m.cfg.IPCache, between); err != nil {
		errs = append(errs, fmt.Errorf("write ipcache: %w", err))
	}
	if err := m.flushServices(quiet); err != nil {
		errs = append(errs, fmt.Errorf("write services: %w", err))
	}
	return errors.Join(append(errs, m.flushRoutes())...)
}

func (m *Mirror) flushRoutes() error {
	if !m.routesBad || len(m.nodes) == 0 {
		return nil
	}
	if err := m.cfg.Routes(m.routes()); err != nil {
		return err
	}
	m.routesBad = false
	return nil
}

func (m *Mirror) applyNode(c desired.Change) *desired.Node {
	owner := "node/" + c.Key.Name
	if old := m.nodes[c.Key.Name]; old != nil {
		for _, p := range nodePrefixes(old) {
			m.claims.unset(owner, p)
		}
		delete(m.nodes, c.Key.Name)
	}
	n, ok := c.New.(*desired.Node)
	if !ok {
		return nil
	}
	m.nodes[n.Name] = n
	own := n.Name == m.cfg.Node
	for _, a := range n.Addresses {
		e := datapath.IPCacheEntry{Identity: identityRemoteNode, NodeAddr: a}
		if own {
			e = datapath.IPCacheEntry{Identity: identityHost}
		}
		m.claims.set(owner, rankNode, hostPrefix(a), e)
	}
	for _, a := range n.Health {
		e := datapath.IPCacheEntry{Identity: identityHealth, NodeAddr: nodeAddr(n, a, own)}
		m.claims.set(owner, rankNode, hostPrefix(a), e)
	}
	// What is in a pod CIDR and not registered is a pod that the mesh does not manage, as far as anyone knows. It must not be taken for the
	// world, or its traffic would be masqueraded.
	for _, p := range n.PodCIDRs {
		e := datapath.IPCacheEntry{Identity: identityUnmanaged, NodeAddr: nodeAddr(n, p.Addr(), own)}
		if own {
			e.Flags = datapath.IPCacheLocalPods
		}
		m.claims.set(owner, rankNode, p.Masked(), e)
	}
	return n
}

func nodePrefixes(n *desired.Node) []netip.Prefix {
	var all []netip.Prefix
	for _, a := range slices.Concat(n.Addresses, n.Health) {
		all = append(all, hostPrefix(a))
	}
	for _, p := range n.PodCIDRs {
		all = append(all, p.Masked())
	}
	return all
}

// nodeAddr is the node's address of the same family as a; invalid for the own node, as the datapath wants it.
func nodeAddr(n *desired.Node, a netip.Addr, own bool) netip.Addr {
	if own {
		return netip.Addr{}
	}
	for _, x := range n.Addresses {
		if x.Is4() == a.Is4() {
			return x
		}
	}
	return netip.Addr{}
}

// applyEndpoint says whether policies know a local address by another number now.
func (m *Mirror) applyEndpoint(c desired.Change, quiet bool) (renamed bool) {
	owner := "endpoint/" + c.Key.Name
	old, _ := c.Old.(*desired.Endpoint)
	e, _ := c.New.(*desired.Endpoint)
	if old != nil && !old.HostNetwork {
		for _, a := range old.Addresses {
			if e == nil || !slices.Contains(e.Addresses, a) {
				m.claims.unset(owner, hostPrefix(a))
				if _, local := m.local[a]; !local {
					m.cfg.Directory.RemovePeer(a)
				}
			}
		}
	}
	if known := m.endpoints[c.Key.Name]; known != nil || e != nil && !e.HostNetwork {
		m.routesBad = m.routesBad || m.strays(known) || m.strays(e)
	}
	delete(m.endpoints, c.Key.Name)
	// A pod on the host's network has the node's addresses, which belong to the node's identity.
	if e == nil || e.HostNetwork {
		return false
	}
	m.endpoints[e.UID] = e
	node := m.nodes[e.Node]
	own := e.Node == m.cfg.Node
	for i, a := range e.Addresses {
		entry := datapath.IPCacheEntry{Identity: e.Identity, Peer: m.peerNumber(e.Peer(i))}
		// Local endpoints are claimed by SetLocal, by what is really on the node.
		if l, local := m.local[a]; local {
			if l.uid == e.UID && m.setLocal(a, l) {
				renamed = true
			}
			continue
		}
		if node != nil {
			entry.NodeAddr = nodeAddr(node, a, own)
		}
		m.claims.set(owner, rankEndpoint, hostPrefix(a), entry)
		m.cfg.Directory.SetPeer(a, flow.Peer{Identity: e.Identity, Namespace: e.Namespace, Pod: e.Name,
			WorkloadName: e.Workload.Name, WorkloadKind: e.Workload.Kind})
		m.firstUse(e.Identity, a, entry.NodeAddr, e.Namespace, e.Name, quiet)
	}
	return renamed
}

func (m *Mirror) peerNumber(name string) uint32 {
	if name == "" || m.cfg.Peers == nil {
		return 0
	}
	return m.cfg.Peers.Number(name)
}

func (m *Mirror) firstUse(identity uint32, a, node netip.Addr, namespace, pod string, quiet bool) {
	if _, seen := m.identities[identity]; seen || identity < 256 {
		return
	}
	m.identities[identity] = struct{}{}
	if !quiet {
		m.cfg.Events.IdentityAllocated(a, identity, node, namespace, pod)
	}
}

// SetLocal says that a local endpoint has an address. Nothing that the policy service sends overrides it.
func (m *Mirror) SetLocal(uid string, a netip.Addr, p flow.Peer) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.routesBad = m.routesBad || m.outside(a)
	l := localAddr{uid, p}
	m.local[a] = l
	m.cfg.Directory.SetPeer(a, p)
	// Another owner of the same word may have claimed before and must not count: take it away and claim anew, as the last one.
	m.claims.unset("local/"+uid, hostPrefix(a))
	m.setLocal(a, l)
	m.firstUse(p.Identity, a, netip.Addr{}, p.Namespace, p.Pod, false)
	return m.flushLocal(hostPrefix(a))
}

// setLocal claims a local address and says whether that changes anything.
func (m *Mirror) setLocal(a netip.Addr, l localAddr) bool {
	before, _ := m.claims.effective(hostPrefix(a))
	e := datapath.IPCacheEntry{Identity: l.peer.Identity, Peer: m.localPeer(l.uid, a, l.peer.Identity)}
	m.claims.set("local/"+l.uid, rankLocal, hostPrefix(a), e)
	return before != e
}

// LocalPeer returns the number that policies know an address of a local endpoint by; 0 = its identity.
func (m *Mirror) LocalPeer(uid string, a netip.Addr, identity uint32) uint32 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.localPeer(uid, a, identity)
}

func (m *Mirror) localPeer(uid string, a netip.Addr, identity uint32) uint32 {
	e := m.endpoints[uid]
	if e == nil || e.Identity != identity {
		return 0
	}
	i := slices.Index(e.Addresses, a)
	if i < 0 {
		return 0
	}
	return m.peerNumber(e.Peer(i))
}

// RemoveLocal takes the claim of a local endpoint away.
func (m *Mirror) RemoveLocal(uid string, a netip.Addr) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.local[a].uid == uid {
		delete(m.local, a)
		m.cfg.Directory.RemovePeer(a)
		m.routesBad = m.routesBad || m.outside(a)
	}
	m.claims.unset("local/"+uid, hostPrefix(a))
	m.claims.unset("endpoint/"+uid, hostPrefix(a))
	return m.flushLocal(hostPrefix(a))
}

// flushLocal writes claims. That the endpoint's own address finds no room is an error.
func (m *Mirror) flushLocal(own netip.Prefix) error {
	var errs []error
	if err := m.claims.flush(m.cfg.IPCache, nil); err != nil {
		errs = append(errs, fmt.Errorf("write ipcache: %w", err))
	}
	if err := m.claims.unplaced[own]; err != nil {
		errs = append(errs, err)
	}
	return errors.Join(append(errs, m.flushRoutes())...)
}

// Prefixes counts the rows of ipcache.
func (m *Mirror) Prefixes() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.claims.written)
}

// TakeChanged says whether an address has had another identity or peer since the last call.
func (m *Mirror) TakeChanged() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	changed := m.claims.changed
	m.claims.changed = false
	return changed
}

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
