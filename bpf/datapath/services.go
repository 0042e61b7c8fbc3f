// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
)

// Frontend is a service's address, as clients use it. A node port has the unspecified address of its family: one row stands for the
// addresses of all nodes, which are those that IPCache gives identity 1 or 6 or flags with IPCacheNode. Traffic from outside is taken at
// addresses of identity 1 alone.
type Frontend struct {
	Addr netip.Addr
	Port uint16
	// Proto is the IP protocol number: 6 TCP, 17 UDP, 132 SCTP.
	Proto uint8
}

// FrontendKind says what a frontend's address is.
type FrontendKind uint8

// Kinds of frontends.
const (
	ClusterIP FrontendKind = iota
	NodePort
	ExternalIP
	LoadBalancer
)

// Algorithm chooses backends.
type Algorithm uint8

const (
	// Random chooses any.
	Random Algorithm = iota
	// Maglev chooses by a table over the connection's tuple, so that all nodes choose the same backend. Sockets still choose at random: no other node
	// sees their connections under the service's address.
	Maglev
)

// Backend is an address behind a frontend, of the same family.
type Backend struct {
	netip.AddrPort
	// Local: it is on this node.
	Local bool
	// Terminating: it serves, and is going away. It keeps its connections, and gets new ones only when there is no other.
	Terminating bool
}

// Service is one frontend and its backends.
type Service struct {
	Frontend Frontend
	// ID is the agent's number of the frontend; records of its connections carry it. Not 0.
	ID   uint32
	Kind FrontendKind
	// Backends in any order, without duplicates. Without any, clients are refused with reason 158.
	Backends  []Backend
	Algorithm Algorithm
	// Affinity: for so long after its last connection a client gets the same backend; whole seconds, 0 = none.
	Affinity time.Duration
	// AffinityGroup is shared by frontends for which a client is to have one backend; 0 = the frontend's own.
	AffinityGroup uint32
	// ExternalLocal: clients outside of the cluster get backends of this node only. It counts unless the kind is ClusterIP.
	ExternalLocal bool
	// InternalLocal: all clients get backends of this node only. It counts when the kind is ClusterIP.
	InternalLocal bool
	// Route is the slot of the proxy that pods' connections to this frontend go through; 0 = none. ClusterIP of TCP only.
	Route uint16
	// SourceRanges are the clients that may use this frontend; empty = all. Those of the other family admit nobody.
	SourceRanges []netip.Prefix
}

// ServiceError says which of several services an error is about.
type ServiceError struct {
	Frontend Frontend
	Err      error
}

// Error implements error.
func (e *ServiceError) Error() string {
	return fmt.Sprintf("service %s proto %d: %v", netip.AddrPortFrom(e.Frontend.Addr, e.Frontend.Port), e.Frontend.Proto, e.Err)
}

// Unwrap returns the cause.
func (e *ServiceError) Unwrap() error { return e.Err }

// Services owns the maps of services and backends. A change of a frontend is one atomic swap: a client gets a backend of the old set or
// of the new.
type Services struct {
	maps serviceMaps

	mu       sync.Mutex
	rows     map[Frontend]*serviceRow
	sets     map[string]*backendSet // by content
	nextSet  uint32
	backends int // rows of the map, of all sets
	tables   int
	ranges   int
	onHost   uint32 // sets with a backend that is a process of this node

	tracked int // rows of connections at the last Sweep
}

// serviceMaps are the maps that Services writes.
type serviceMaps struct {
	services, backends, members, ranges, maglev, connections, nat, host *ebpf.Map

	maglevSize int
	node       []netip.Addr // of this node
}

type serviceRow struct {
	service Service // normalised
	set     *backendSet
}

// normalise checks a service and gives its fields the one form in which they are kept and compared.
func (svc Service) normalise() (Service, error) {
	f := &svc.Frontend
	f.Addr = f.Addr.Unmap()
	if !f.Addr.IsValid() || f.Port == 0 || f.Proto == 0 || svc.ID == 0 {
		return svc, errors.New("address, port, protocol and id are needed")
	}
	if svc.Kind > LoadBalancer || svc.Algorithm > Maglev {
		return svc, fmt.Errorf("kind %d, algorithm %d: unknown", svc.Kind, svc.Algorithm)
	}
	if f.Addr.IsUnspecified() != (svc.Kind == NodePort) {
		return svc, errors.New("the unspecified address is for node ports, and they have no other")
	}
	if svc.Affinity < 0 || svc.Affinity > 24*time.Hour || svc.Affinity%time.Second != 0 {
		return svc, fmt.Errorf("affinity %v: want whole seconds, a day at most", svc.Affinity)
	}
	if svc.Route > MaxSlot || svc.Route != 0 && svc.Kind != ClusterIP {
		return svc, fmt.Errorf("route %d: want a slot up to %d, and a cluster IP", svc.Route, MaxSlot)
	}
	if svc.AffinityGroup == svc.ID || svc.Affinity == 0 {
		svc.AffinityGroup = 0
	}
	svc.Backends = slices.Clone(svc.Backends)
	for i, b := range svc.Backends {
		if !b.IsValid() || b.Port() == 0 || b.Addr().Unmap().Is4() != f.Addr.Is4() {
			return svc, fmt.Errorf("backend %v: not an address of the service's family and a port", b)
		}
		svc.Backends[i].AddrPort = netip.AddrPortFrom(b.Addr().Unmap(), b.Port())
	}
	slices.SortFunc(svc.Backends, func(a, b Backend) int { return a.Compare(b.AddrPort) })
	for i, b := range svc.Backends {
		if i > 0 && b.AddrPort == svc.Backends[i-1].AddrPort {
			return svc, fmt.Errorf("backend %v: named twice", b)
		}
	}
	if len(svc.Backends) > 1<<16 {
		return svc, fmt.Errorf("%d backends: %d are supported", len(svc.Backends), 1<<16)
	}
	svc.SourceRanges = slices.Clone(svc.SourceRanges)
	for i, r := range svc.SourceRanges {
		if !r.IsValid() {
			return svc, errors.New("source range: invalid prefix")
		}
		svc.SourceRanges[i] = r.Masked()
	}
	slices.SortFunc(svc.SourceRanges, comparePrefixes)
	svc.SourceRanges = slices.Compact(svc.SourceRanges)
	return svc, nil
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

func (svc *Service) equal(o *Service) bool {
	return svc.Frontend == o.Frontend && svc.ID == o.ID && svc.Kind == o.Kind && svc.Algorithm == o.Algorithm && svc.Affinity == o.Affinity &&
		svc.AffinityGroup == o.AffinityGroup && svc.ExternalLocal == o.ExternalLocal && svc.Route == o.Route && svc.InternalLocal == o.InternalLocal &&
		slices.Equal(svc.Backends, o.Backends) && slices.Equal(svc.SourceRanges, o.SourceRanges)
}

// upsertChunk is how many services are written at once: it bounds the memory of a call, and how long old and new sets are both there.
const upsertChunk = 1024

// Upsert makes or replaces frontends with all that is theirs. An equal one is left alone. Many in one call are written in batches. The
// error joins a *ServiceError for each service that could not be written, ErrFull when a map has no room; such a frontend keeps its old row, and the
// others are written.
func (s *Services) Upsert(list ...Service) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for chunk := range slices.Chunk(list, upsertChunk) {
		errs = append(errs, s.upsert(chunk)...)
	}
	return errors.Join(errs...)
}

// Delete removes frontends; no such frontend is not an error.
func (s *Services) Delete(list ...Frontend) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	var gone []*backendSet
	for _, f := range list {
		f.Addr = f.Addr.Unmap()
		row := s.rows[f]
		if row == nil {
			continue
		}
		if err := s.maps.services.Delete(f.key()); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, &ServiceError{f, fmt.Errorf("delete: %w", err)})
			continue
		}
		delete(s.rows, f)
		gone = s.release(row.set, gone)
		errs = append(errs, s.deleteRanges(row.service.ID, row.service.SourceRanges, nil))
	}
	return errors.Join(append(errs, s.deleteSets(gone))...)
}

// List returns all frontends, backends sorted by address.
func (s *Services) List() ([]Service, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Service, 0, len(s.rows))
	for _, row := range s.rows {
		svc := row.service
		svc.Backends, svc.SourceRanges = slices.Clone(svc.Backends), slices.Clone(svc.SourceRanges)
		out = append(out, svc)
	}
	slices.SortFunc(out, func(a, b Service) int { return cmp.Compare(a.ID, b.ID) })
	return out, nil
}

// Usage returns how full the maps are. All refuse what does not fit, but for that of connections, which forgets the longest unused; its fill
// is that of the last Sweep.
func (s *Services) Usage() []MapUsage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return []MapUsage{
		{Map: tcMapServices, Entries: len(s.rows), Max: int(s.maps.services.MaxEntries())},
		{Map: tcMapBackends, Entries: s.backends, Max: int(s.maps.backends.MaxEntries())},
		{Map: tcMapMaglev, Entries: s.tables, Max: int(s.maps.maglev.MaxEntries())},
		{Map: tcMapSourceRanges, Entries: s.ranges, Max: int(s.maps.ranges.MaxEntries())},
		{Map: tcMapLb, Entries: s.tracked, Max: int(s.maps.connections.MaxEntries())},
	}
}

func (f Frontend) key() tcServiceKey {
	return tcServiceKey{Addr: addrOf(f.Addr), Port: port16(f.Port), Proto: f.Proto}
}

// check is service_check of lib/service_types.h.
func (f Frontend) check() uint64 {
	k := f.key()
	return k.Addr.Hi*31 ^ k.Addr.Lo ^ (uint64(k.Port)<<16 | uint64(k.Proto))
}
