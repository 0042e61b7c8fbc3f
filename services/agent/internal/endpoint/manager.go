// SPDX-License-Identifier: Apache-2.0

// Package endpoint plugs pods into the node and unplugs them. It owns the node's address pools, the endpoints' numbers, their wires and their rows in the
// kernel's map of endpoints, and keeps all of it on disk, so that a new agent finds what an old one made. Pods stay connected while no agent runs.
package endpoint

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/address"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/event"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/policysync"
)

// Programs attaches the pods' programs (datapath.Datapath).
type Programs interface {
	AttachPod(ifname string) error
	DetachPod(ifname string) error
	// Purge writes the final records of an endpoint's connections.
	Purge(id uint16) error
}

// Table is the kernel's map of endpoints (datapath.Endpoints).
type Table interface {
	Upsert(netip.Addr, datapath.Endpoint) error
	Delete(netip.Addr) error
	List() ([]datapath.EndpointRow, error)
}

// Identities learns who has which address (mirror.Mirror).
type Identities interface {
	SetLocal(uid string, a netip.Addr, p flow.Peer) error
	RemoveLocal(uid string, a netip.Addr) error
	// LocalPeer is the number that policies know an address by; 0 = its identity.
	LocalPeer(uid string, a netip.Addr, identity uint32) uint32
}

// Policies puts endpoints' policies in force (policymap.Engine).
type Policies interface {
	// Wait waits until an endpoint's policies are known.
	Wait(ctx context.Context, uid string) error
	Bind(uid string, id uint16) error
	Adopt(uid string, id uint16) error
	Release(uid string, id uint16) error
	// AddressesChanged says that an address has another identity or peer.
	AddressesChanged() error
}

// Registry spreads addresses to the other nodes (policysync.Client).
type Registry interface {
	Register(policysync.Endpoint) <-chan policysync.Spread
	Unregister(uid string)
}

// Config says what a manager works on.
type Config struct {
	Node      string
	StateFile string
	// MTU of the pods.
	MTU        int
	Store      *desired.Store
	Programs   Programs
	Table      Table
	Identities Identities
	Policies   Policies
	Registry   Registry
	Directory  *flow.Directory
	Events     *event.Queue
	Now        func() time.Time
	// PolicyWait bounds how long Add waits for the pod's identity and policy; SpreadWait for the other nodes.
	PolicyWait, SpreadWait time.Duration
	Log                    *slog.Logger
}

// Times of DESIGN, `Start of a pod`, and how long a freed address rests.
const (
	DefaultPolicyWait = 30 * time.Second
	// DefaultSpreadWait is longer than the policy service waits for the other nodes (1 s): its answer names the late ones, and only when it does
	// not come do we go on without.
	DefaultSpreadWait = 1500 * time.Millisecond
	addressRest       = 30 * time.Second
)

// Errors that callers tell apart.
var (
	// ErrNoPolicy says that the pod's identity or policy did not arrive in time.
	ErrNoPolicy = errors.New("no policy for the pod")
	// ErrBusy says that the same container is being added or removed already.
	ErrBusy = errors.New("the container is busy")
	// ErrUnknown says that there is no such endpoint.
	ErrUnknown = errors.New("no such endpoint")
)

// Manager is safe for concurrent use.
type Manager struct {
	cfg Config
	log *slog.Logger

	mu         sync.Mutex
	ids        *address.IDs
	pools      map[netip.Prefix]*address.Pool
	poolMemory map[string]address.Memory
	endpoints  map[key]*Endpoint
	busy       map[key]struct{}
	late       map[string]uint64 // by node: how often it was late
	health     []netip.Addr      // of the last agent's health endpoint
}

// key is what CNI names an attachment by.
type key struct{ container, ifname string }

// New makes a manager. Call Restore before anything else.
func New(cfg Config) *Manager {
	return &Manager{cfg: cfg, log: cfg.Log.With("component", "endpoint"), ids: address.NewIDs(0), pools: map[netip.Prefix]*address.Pool{},
		poolMemory: map[string]address.Memory{}, endpoints: map[key]*Endpoint{}, busy: map[key]struct{}{}, late: map[string]uint64{}}
}

// List returns the endpoints by number. They are copies.
func (m *Manager) List() []Endpoint {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]Endpoint, 0, len(m.endpoints))
	for _, e := range m.endpoints {
		list = append(list, *e)
	}
	slices.SortFunc(list, func(a, b Endpoint) int { return int(a.ID) - int(b.ID) })
	return list
}

// LateNodes counts, by node, how often it had not taken a new pod's address in time.
func (m *Manager) LateNodes() map[string]uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	late := make(map[string]uint64, len(m.late))
	for n, c := range m.late {
		late[n] = c
	}
	return late
}

// begin claims a container for one operation, waiting for the one under way.
func (m *Manager) begin(ctx context.Context, k key) error {
	for {
		m.mu.Lock()
		if _, taken := m.busy[k]; !taken {
			m.busy[k] = struct{}{}
			m.mu.Unlock()
			return nil
		}
		m.mu.Unlock()
		select {
		case <-ctx.Done():
			return fmt.Errorf("container %s: %w: %w", k.container, ErrBusy, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (m *Manager) end(k key) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.busy, k)
}

// poolsLocked makes the pools of the node's pod CIDRs, v4 first. A pool whose CIDR is gone stays for what it has given out.
func (m *Manager) poolsLocked(n *desired.Node) []*address.Pool {
	cidrs := slices.Clone(n.PodCIDRs)
	slices.SortFunc(cidrs, func(a, b netip.Prefix) int { return a.Addr().BitLen() - b.Addr().BitLen() })
	var list []*address.Pool
	for _, c := range cidrs {
		c = c.Masked()
		p, ok := m.pools[c]
		if !ok {
			p = address.NewPool(c, addressRest, m.poolMemory[c.String()])
			m.pools[c] = p
			for _, e := range m.endpoints {
				for _, a := range e.Addresses {
					if c.Contains(a) {
						_ = p.Claim(a) // its own address: taken only if it is listed twice
					}
				}
			}
		}
		list = append(list, p)
	}
	return list
}

// allocateLocked finds an address of each family: the fixed ones that the pod asks for, else from the pools.
func (m *Manager) allocateLocked(n *desired.Node, p *desired.Pod) (_ []netip.Addr, err error) {
	var taken []netip.Addr
	defer func() {
		if err != nil {
			m.releaseLocked(taken)
		}
	}()
	pools := m.poolsLocked(n)
	if len(p.Addresses) > 0 {
		seen := map[bool]bool{}
		for _, a := range p.Addresses {
			if seen[a.Is4()] {
				return nil, fmt.Errorf("pod asks for two addresses of one family, %s is the second", a)
			}
			seen[a.Is4()] = true
			i := slices.IndexFunc(pools, func(pool *address.Pool) bool { return pool.Prefix().Contains(a) })
			var err error
			if i < 0 {
				err = m.claimOutsideLocked(n, a)
			} else {
				err = pools[i].Claim(a)
			}
			if err != nil {
				return nil, fmt.Errorf("pod asks for %s: %w", a, err)
			}
			taken = append(taken, a)
		}
		slices.SortFunc(taken, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
		return taken, nil
	}
	var have [2]bool
	for _, pool := range pools {
		family := 0
		if pool.Prefix().Addr().Is6() {
			family = 1
		}
		if have[family] {
			continue
		}
		a, err := pool.Take(m.cfg.Now())
		if err != nil {
			// The next pool of the family may have one.
			if slices.ContainsFunc(pools, func(o *address.Pool) bool {
				return o != pool && o.Prefix().Addr().Is6() == pool.Prefix().Addr().Is6()
			}) {
				continue
			}
			return nil, err
		}
		have[family] = true
		taken = append(taken, a)
	}
	if len(taken) == 0 {
		return nil, fmt.Errorf("all pools: %w", address.ErrExhausted)
	}
	return taken, nil
}

// claimOutsideLocked checks a fixed address that is of no pool: routes of its own lead to it.
func (m *Manager) claimOutsideLocked(n *desired.Node, a netip.Addr) error {
	if !a.IsGlobalUnicast() || a == netdev.GatewayIPv4 {
		return fmt.Errorf("%w: no pod can have it", address.ErrOutside)
	}
	if slices.Contains(n.Addresses, a) {
		return fmt.Errorf("it is the node's: %w", address.ErrTaken)
	}
	for _, e := range m.endpoints {
		if slices.Contains(e.Addresses, a) {
			return fmt.Errorf("%s/%s has it: %w", e.Namespace, e.Name, address.ErrTaken)
		}
	}
	return nil
}

func (m *Manager) releaseLocked(list []netip.Addr) {
	for _, a := range list {
		pooled := false
		for c, p := range m.pools {
			if c.Contains(a) {
				p.Release(a, m.cfg.Now())
				pooled = true
			}
		}
		if pooled {
			continue
		}
		// At a restart the pools are made only when the node's CIDRs are known; until then the memory takes the address back.
		for text, mem := range m.poolMemory {
			if c, err := netip.ParsePrefix(text); err == nil && c.Contains(a) {
				mem.Freed = append(mem.Freed, address.Freed{Addr: a, Since: m.cfg.Now()})
				m.poolMemory[text] = mem
			}
		}
	}
}

func (m *Manager) saveLocked() error {
	f := stateFile{LastID: m.ids.Last(), Pools: map[string]address.Memory{}}
	for c, mem := range m.poolMemory {
		f.Pools[c] = mem
	}
	for c, p := range m.pools {
		f.Pools[c.String()] = p.Memory()
	}
	for _, e := range m.endpoints {
		f.Endpoints = append(f.Endpoints, e)
	}
	slices.SortFunc(f.Endpoints, func(a, b *Endpoint) int { return int(a.ID) - int(b.ID) })
	return writeState(m.cfg.StateFile, f)
}

// labels of an endpoint's identity.
func (m *Manager) labels(e *Endpoint) []string { return m.cfg.Directory.Labels(e.Identity) }

func (m *Manager) eventOf(e *Endpoint) event.Endpoint {
	return event.Endpoint{ID: e.ID, Namespace: e.Namespace, Pod: e.Name, Labels: m.labels(e)}
}

func (m *Manager) peerOf(e *Endpoint) flow.Peer {
	return flow.Peer{EndpointID: uint32(e.ID), Identity: e.Identity, Namespace: e.Namespace, Pod: e.Name,
		WorkloadKind: e.Workload.Kind, WorkloadName: e.Workload.Name}
}
