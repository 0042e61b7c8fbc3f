// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"
)

// newServices takes over what the maps hold, and removes what no frontend names: a process may have died between two steps of a change.
func newServices(m serviceMaps) (*Services, error) {
	s := &Services{maps: m, rows: map[Frontend]*serviceRow{}, sets: map[string]*backendSet{}, nextSet: 1}
	slots := map[uint32]map[uint32]tcBackend{}
	err := walkMap(m.backends, func(k tcBackendKey, v tcBackend) {
		if slots[k.Set] == nil {
			slots[k.Set] = map[uint32]tcBackend{}
		}
		slots[k.Set][k.Slot] = v
		s.nextSet = max(s.nextSet, k.Set+1)
	})
	if err != nil {
		return nil, fmt.Errorf("read backends: %w", err)
	}
	ranges := map[uint32][]netip.Prefix{}
	if err := s.readRanges(ranges); err != nil {
		return nil, err
	}
	sets := map[uint32]*backendSet{}
	err = walkMap(m.services, func(k tcServiceKey, v tcService) {
		s.nextSet = max(s.nextSet, v.Set+1)
		svc := serviceOf(k, v, slots[v.Set], ranges[v.Id])
		set := sets[v.Set]
		if set == nil {
			set = newSet(v.Set, setKey(&svc), &svc)
			set.planTables()
			sets[v.Set] = set
			if s.sets[set.key] == nil {
				s.sets[set.key] = set
			}
		}
		set.refs++
		s.rows[svc.Frontend] = &serviceRow{service: svc, set: set}
	})
	if err != nil {
		return nil, fmt.Errorf("read services: %w", err)
	}
	return s, s.reconcile(sets, ranges)
}

// serviceOf turns rows back into what was given.
func serviceOf(k tcServiceKey, v tcService, slots map[uint32]tcBackend, ranges []netip.Prefix) Service {
	given := func(f tcServiceFlags) bool { return v.Flags&uint32(f) != 0 }
	svc := Service{
		Frontend: Frontend{Addr: k.Addr.netip(), Port: port16(k.Port), Proto: k.Proto}, ID: v.Id, Kind: FrontendKind(v.Kind & 0xffff), Route: uint16(v.Kind >> 16),
		Affinity: time.Duration(v.Affinity) * time.Second, InternalLocal: given(tcServiceFlagsSERVICE_GIVEN_INTERNAL),
		ExternalLocal: given(tcServiceFlagsSERVICE_GIVEN_EXTERNAL), SourceRanges: ranges,
	}
	if given(tcServiceFlagsSERVICE_GIVEN_MAGLEV) {
		svc.Algorithm = Maglev
	}
	if v.Group != v.Id {
		svc.AffinityGroup = v.Group
	}
	for slot := range v.Total {
		b, ok := slots[slot]
		if !ok {
			continue // the next Upsert finds a difference and writes a new set
		}
		svc.Backends = append(svc.Backends, Backend{
			AddrPort: netip.AddrPortFrom(b.Addr.netip(), port16(b.Port)), Terminating: slot >= v.Ready,
			Local: slot < v.ReadyLocal || slot >= v.Ready && slot < v.Ready+v.TerminatingLocal,
		})
	}
	slices.SortFunc(svc.Backends, func(a, b Backend) int { return a.Compare(b.AddrPort) })
	return svc
}

func (s *Services) readRanges(out map[uint32][]netip.Prefix) error {
	var key tcRangeKey
	var value uint32
	it := s.maps.ranges.Iterate()
	for it.Next(&key, &value) {
		a, bits := netip.AddrFrom16(key.Addr), int(key.Prefixlen)-32
		if a.Is4In6() && bits >= 96 {
			a, bits = a.Unmap(), bits-96
		}
		id := bigEndian32(key.Service)
		out[id] = append(out[id], netip.PrefixFrom(a, bits))
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read source ranges: %w", err)
	}
	for _, r := range out {
		slices.SortFunc(r, comparePrefixes)
	}
	return nil
}

// reconcile deletes rows of sets and ranges that no frontend has, and writes tables that are missing.
func (s *Services) reconcile(sets map[uint32]*backendSet, ranges map[uint32][]netip.Prefix) error {
	var errs []error
	var staleSlots []tcBackendKey
	errs = append(errs, walkMap(s.maps.backends, func(k tcBackendKey, _ tcBackend) {
		if sets[k.Set] == nil {
			staleSlots = append(staleSlots, k)
		}
	}))
	var staleMembers []tcMemberKey
	errs = append(errs, walkMap(s.maps.members, func(k tcMemberKey, _ uint32) {
		if sets[k.Set] == nil {
			staleMembers = append(staleMembers, k)
		}
	}))
	errs = append(errs, deleteAll(s.maps.backends, staleSlots), deleteAll(s.maps.members, staleMembers))

	have := map[[2]uint32]bool{}
	var key [2]uint32
	value := make([]byte, s.maps.maglev.ValueSize())
	it := s.maps.maglev.Iterate()
	for it.Next(&key, &value) {
		have[key] = true
	}
	errs = append(errs, it.Err())
	errs = append(errs, s.countHost(slices.Collect(maps.Values(sets)), 1))
	for _, set := range sets {
		s.backends += len(set.backends)
		s.tables += len(set.tables)
		missing := false
		for _, local := range set.tables {
			missing = missing || !have[maglevKey(set, local)]
			delete(have, maglevKey(set, local))
		}
		if missing {
			errs = append(errs, s.writeTables(set))
		}
	}
	for k := range have {
		if err := s.maps.maglev.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("delete table: %w", err))
		}
	}

	used := map[uint32]bool{}
	for _, row := range s.rows {
		used[row.service.ID] = true
	}
	for id, r := range ranges {
		s.ranges += len(r)
		if !used[id] {
			errs = append(errs, s.deleteRanges(id, r, nil))
		}
	}
	return errors.Join(errs...)
}

// walkMap calls f for every row of a hash map.
func walkMap[K, V any](m *ebpf.Map, f func(K, V)) error {
	var cursor ebpf.MapBatchCursor
	keys, values := make([]K, 1024), make([]V, 1024)
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			f(keys[i], values[i])
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
