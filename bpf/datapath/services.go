// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
)

// Frontend is a service's address, as clients use it.
type Frontend struct {
	Addr netip.Addr
	Port uint16
	// Proto is the IP protocol number: 6 TCP, 17 UDP.
	Proto uint8
}

// Service is one frontend and its backends.
type Service struct {
	Frontend Frontend
	// ID is the agent's number of the service; records of its connections carry it. Not 0.
	ID uint32
	// Backends of the frontend's family; without any, connections are dropped with reason 158.
	Backends []netip.AddrPort
}

// Services owns the maps of services and backends. A change is one atomic swap: a socket is translated by the old set of backends or
// by the new.
type Services struct {
	services *ebpf.Map
	backends *ebpf.Map

	mu   sync.Mutex
	next uint32 // number of the next backend set
}

func newServices(services, backends *ebpf.Map) (*Services, error) {
	s := &Services{services: services, backends: backends, next: 1}
	return s, s.cleanBackends()
}

// cleanBackends removes the sets that no service names: a process may have died between two steps of a change.
func (s *Services) cleanBackends() error {
	used := map[uint32]bool{}
	var fk tcServiceKey
	var fv tcService
	it := s.services.Iterate()
	for it.Next(&fk, &fv) {
		used[fv.Set] = true
		s.next = max(s.next, fv.Set+1)
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("list services: %w", err)
	}
	var stale []tcBackendKey
	var bk tcBackendKey
	var bv tcBackend
	it = s.backends.Iterate()
	for it.Next(&bk, &bv) {
		if !used[bk.Set] {
			stale = append(stale, bk)
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("list backends: %w", err)
	}
	for _, k := range stale {
		if err := s.backends.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete backend: %w", err)
		}
	}
	return nil
}

func (f Frontend) key() tcServiceKey {
	return tcServiceKey{Addr: addrOf(f.Addr), Port: port16(f.Port), Proto: f.Proto}
}

// Upsert makes or replaces a frontend with all its backends. An equal one is left alone.
func (s *Services) Upsert(svc Service) error {
	f := svc.Frontend
	if !f.Addr.IsValid() || f.Port == 0 || f.Proto == 0 || svc.ID == 0 {
		return fmt.Errorf("service %v: address, port, protocol and id are needed", f)
	}
	for _, b := range svc.Backends {
		if !b.IsValid() || b.Addr().Unmap().Is4() != f.Addr.Unmap().Is4() {
			return fmt.Errorf("service %v: backend %v: not of the service's family", f, b)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old, found, err := s.get(f.key())
	if err != nil {
		return err
	}
	if found && old.Id == svc.ID {
		have, err := s.set(old)
		if err != nil {
			return err
		}
		if slices.Equal(have, svc.Backends) {
			return nil
		}
	}
	row := tcService{Id: svc.ID, Set: s.next, Count: uint32(len(svc.Backends))}
	s.next++
	for i, b := range svc.Backends {
		if err := s.backends.Put(tcBackendKey{Set: row.Set, Slot: uint32(i)}, tcBackend{Addr: addrOf(b.Addr()), Port: port16(b.Port())}); err != nil {
			return errors.Join(fmt.Errorf("backend %v: %w", b, err), s.deleteSet(row.Set, uint32(i)))
		}
	}
	if err := s.services.Put(f.key(), row); err != nil {
		return errors.Join(fmt.Errorf("service %v: %w", f, err), s.deleteSet(row.Set, row.Count))
	}
	if found {
		return s.deleteSet(old.Set, old.Count)
	}
	return nil
}

// Delete removes a frontend; no such frontend is not an error.
func (s *Services) Delete(f Frontend) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, found, err := s.get(f.key())
	if err != nil || !found {
		return err
	}
	if err := s.services.Delete(f.key()); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete service %v: %w", f, err)
	}
	return s.deleteSet(old.Set, old.Count)
}

// List returns all frontends with their backends.
func (s *Services) List() ([]Service, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Service
	var key tcServiceKey
	var row tcService
	it := s.services.Iterate()
	for it.Next(&key, &row) {
		backends, err := s.set(row)
		if err != nil {
			return nil, err
		}
		out = append(out, Service{
			Frontend: Frontend{Addr: key.Addr.netip(), Port: port16(key.Port), Proto: key.Proto}, ID: row.Id, Backends: backends,
		})
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("list services: %w", err)
	}
	return out, nil
}

func (s *Services) get(key tcServiceKey) (tcService, bool, error) {
	var row tcService
	err := s.services.Lookup(key, &row)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return row, false, nil
	}
	if err != nil {
		return row, false, fmt.Errorf("service: %w", err)
	}
	return row, true, nil
}

func (s *Services) set(row tcService) ([]netip.AddrPort, error) {
	var backends []netip.AddrPort
	for i := range row.Count {
		var b tcBackend
		if err := s.backends.Lookup(tcBackendKey{Set: row.Set, Slot: i}, &b); err != nil {
			return nil, fmt.Errorf("backend %d of service %d: %w", i, row.Id, err)
		}
		backends = append(backends, netip.AddrPortFrom(b.Addr.netip(), port16(b.Port)))
	}
	return backends, nil
}

func (s *Services) deleteSet(set, count uint32) error {
	var errs []error
	for i := range count {
		if err := s.backends.Delete(tcBackendKey{Set: set, Slot: i}); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("delete backend: %w", err))
		}
	}
	return errors.Join(errs...)
}
