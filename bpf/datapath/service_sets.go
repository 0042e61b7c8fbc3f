// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/bpf/maglev"
)

// backendSet is an immutable list of backends in the kernel. Frontends with equal backends share one.
type backendSet struct {
	id       uint32
	key      string // content; its name in Services.sets
	refs     int
	backends []Backend // as slots lie: ready and terminating, in each part those of this node first
	counts   setCounts
	onHost   bool   // some backend is a process of this node
	tables   []bool // Maglev tables in the kernel: of all backends that may get connections (false), of the local ones (true)
}

type setCounts struct{ ready, readyLocal, terminatingLocal int }

// setKey names a set by its content: sorted backends, and the tables that it needs.
func setKey(svc *Service) string {
	b := make([]byte, 0, 1+20*len(svc.Backends))
	b = append(b, svc.tables())
	for _, x := range svc.Backends {
		a := x.Addr().As16()
		b = append(b, a[:]...)
		b = binary.BigEndian.AppendUint16(b, x.Port())
		var flags byte
		if x.Local {
			flags |= 1
		}
		if x.Terminating {
			flags |= 2
		}
		b = append(b, flags)
	}
	return string(b)
}

// tables says which Maglev tables a service needs: bit 0 of all, bit 1 of local backends.
func (svc *Service) tables() byte {
	switch {
	case svc.Algorithm != Maglev:
		return 0
	case svc.Kind == ClusterIP && svc.InternalLocal:
		return 2
	case svc.Kind != ClusterIP && svc.ExternalLocal:
		return 3
	}
	return 1
}

func newSet(id uint32, key string, svc *Service) *backendSet {
	s := &backendSet{id: id, key: key, backends: slices.Clone(svc.Backends)}
	rank := func(b Backend) int {
		r := 0
		if b.Terminating {
			r = 2
		}
		if !b.Local {
			r++
		}
		return r
	}
	slices.SortStableFunc(s.backends, func(a, b Backend) int { return rank(a) - rank(b) })
	for _, b := range s.backends {
		if !b.Terminating {
			s.counts.ready++
			if b.Local {
				s.counts.readyLocal++
			}
		} else if b.Local {
			s.counts.terminatingLocal++
		}
	}
	return s
}

// slots is service_slots of lib/service.h.
func (s *backendSet) slots(local bool) (first, count int) {
	c := s.counts
	switch {
	case !local && c.ready > 0:
		return 0, c.ready
	case !local:
		return 0, len(s.backends)
	case c.readyLocal > 0:
		return 0, c.readyLocal
	}
	return c.ready, c.terminatingLocal
}

// planTables notes which Maglev tables the set has: those of no backends it has not.
func (s *backendSet) planTables() {
	for i, local := range []bool{false, true} {
		if _, count := s.slots(local); s.key[0]&(1<<i) != 0 && count > 0 {
			s.tables = append(s.tables, local)
		}
	}
}

// table fills a Maglev table. Its content depends on the backends' addresses alone, so that it is the same on all nodes; its slots count from the
// first backend that it may choose.
func (s *backendSet) table(local bool, size int) []uint16 {
	first, count := s.slots(local)
	order := make([]int, count)
	for i := range order {
		order[i] = first + i
	}
	slices.SortFunc(order, func(a, b int) int { return s.backends[a].Compare(s.backends[b].AddrPort) })
	names := make([][]byte, count)
	for i, slot := range order {
		a := s.backends[slot].Addr().As16()
		names[i] = binary.BigEndian.AppendUint16(a[:], s.backends[slot].Port())
	}
	table := maglev.Table(names, size)
	for i, b := range table {
		table[i] = uint16(order[b] - first)
	}
	return table
}

// row is the service's value in the map.
func (s *backendSet) row(svc *Service) tcService {
	row := tcService{
		Id: svc.ID, Set: s.id, Ready: uint32(s.counts.ready), ReadyLocal: uint32(s.counts.readyLocal),
		TerminatingLocal: uint32(s.counts.terminatingLocal), Total: uint32(len(s.backends)), Group: svc.ID,
		Affinity: uint32(svc.Affinity / time.Second), Kind: uint32(svc.Kind) | uint32(svc.Route)<<16, Check: svc.Frontend.check(),
	}
	if svc.AffinityGroup != 0 {
		row.Group = svc.AffinityGroup
	}
	for _, f := range []struct {
		on   bool
		flag tcServiceFlags
	}{
		{svc.Kind == ClusterIP && svc.InternalLocal, tcServiceFlagsSERVICE_LOCAL},
		{svc.Kind != ClusterIP && svc.ExternalLocal, tcServiceFlagsSERVICE_LOCAL_OUTSIDE},
		{len(svc.SourceRanges) > 0, tcServiceFlagsSERVICE_RANGES},
		{svc.tables()&1 != 0, tcServiceFlagsSERVICE_MAGLEV},
		{svc.tables()&2 != 0, tcServiceFlagsSERVICE_MAGLEV_LOCAL},
		{svc.Algorithm == Maglev, tcServiceFlagsSERVICE_GIVEN_MAGLEV},
		{svc.InternalLocal, tcServiceFlagsSERVICE_GIVEN_INTERNAL},
		{svc.ExternalLocal, tcServiceFlagsSERVICE_GIVEN_EXTERNAL},
	} {
		if f.on {
			row.Flags |= uint32(f.flag)
		}
	}
	return row
}

// upsert writes some services: what is new of their sets and ranges first, then their rows, then it takes away what nobody names any more.
func (s *Services) upsert(list []Service) []error {
	var errs []error
	var fresh, gone []*backendSet
	wanted := map[Frontend]*serviceRow{}
	fail := func(f Frontend, err error) {
		errs = append(errs, &ServiceError{f, err})
		if row := wanted[f]; row != nil {
			delete(wanted, f)
			gone = s.release(row.set, gone)
		}
	}
	added := 0
	for _, svc := range list {
		given := svc.Frontend
		svc, err := svc.normalise()
		if err != nil {
			fail(given, err)
			continue
		}
		old := s.rows[svc.Frontend]
		if before := wanted[svc.Frontend]; before != nil { // named twice in one call: the last counts
			gone = s.release(before.set, gone)
			delete(wanted, svc.Frontend)
		} else if old != nil && old.service.equal(&svc) {
			continue
		} else if old == nil {
			if len(s.rows)+added >= int(s.maps.services.MaxEntries()) {
				fail(svc.Frontend, full(s.maps.services, tcMapServices))
				continue
			}
			added++
		}
		set, made, err := s.acquire(&svc)
		if err != nil {
			fail(svc.Frontend, err)
			continue
		}
		if made {
			fresh = append(fresh, set)
		}
		wanted[svc.Frontend] = &serviceRow{service: svc, set: set}
	}
	if err := s.writeSets(fresh); err != nil {
		for f := range wanted {
			fail(f, err)
		}
	}
	var keys []tcServiceKey
	var values []tcService
	for f, row := range wanted {
		if err := s.writeRanges(f, &row.service); err != nil {
			fail(f, err)
			continue
		}
		keys, values = append(keys, f.key()), append(values, row.set.row(&row.service))
	}
	if err := updateAll(s.maps.services, keys, values); err != nil {
		// Which rows were written is not known: none is believed to be, and all sets stay.
		for f := range wanted {
			errs = append(errs, &ServiceError{f, fullError(s.maps.services, tcMapServices, err)})
			delete(s.rows, f)
		}
		return errs
	}
	for f, row := range wanted {
		if old := s.rows[f]; old != nil {
			gone = s.release(old.set, gone)
			keep := row.service.SourceRanges
			if old.service.ID != row.service.ID {
				keep = nil
			}
			if err := s.deleteRanges(old.service.ID, old.service.SourceRanges, keep); err != nil {
				errs = append(errs, &ServiceError{f, err})
			}
		}
		s.rows[f] = row
	}
	if err := s.deleteSets(gone); err != nil {
		errs = append(errs, err)
	}
	return errs
}

// acquire finds a set with the service's backends, or makes one that is to be written.
func (s *Services) acquire(svc *Service) (set *backendSet, made bool, err error) {
	key := setKey(svc)
	if set := s.sets[key]; set != nil {
		set.refs++
		return set, false, nil
	}
	set = newSet(s.nextSet, key, svc)
	set.planTables()
	if s.backends+len(set.backends) > int(s.maps.backends.MaxEntries()) {
		return nil, false, full(s.maps.backends, tcMapBackends)
	}
	if s.tables+len(set.tables) > int(s.maps.maglev.MaxEntries()) {
		return nil, false, full(s.maps.maglev, tcMapMaglev)
	}
	s.nextSet++
	set.refs = 1
	s.sets[key] = set
	s.backends += len(set.backends)
	s.tables += len(set.tables)
	return set, true, nil
}

// release gives a set back, and adds it to those that are gone when nobody has it.
func (s *Services) release(set *backendSet, gone []*backendSet) []*backendSet {
	set.refs--
	if set.refs > 0 {
		return gone
	}
	if s.sets[set.key] == set {
		delete(s.sets, set.key)
	}
	return append(gone, set)
}

// rows are the set's rows of the maps of backends and members.
func (s *backendSet) rowsOf() (slots []tcBackendKey, backends []tcBackend, members []tcMemberKey, places []uint32) {
	for i, b := range s.backends {
		a := addrOf(b.Addr())
		slots = append(slots, tcBackendKey{Set: s.id, Slot: uint32(i)})
		backends = append(backends, tcBackend{Addr: a, Port: port16(b.Port()), Set: s.id})
		members = append(members, tcMemberKey{Addr: a, Set: s.id, Port: port16(b.Port())})
		places = append(places, uint32(i))
	}
	return slots, backends, members, places
}

func (s *Services) writeSets(sets []*backendSet) error {
	var slots []tcBackendKey
	var backends []tcBackend
	var members []tcMemberKey
	var places []uint32
	for _, set := range sets {
		a, b, c, d := set.rowsOf()
		slots, backends, members, places = append(slots, a...), append(backends, b...), append(members, c...), append(places, d...)
	}
	if err := s.countHost(sets, 1); err != nil {
		return err
	}
	if err := updateAll(s.maps.backends, slots, backends); err != nil {
		return fmt.Errorf("write backends: %w", fullError(s.maps.backends, tcMapBackends, err))
	}
	if err := updateAll(s.maps.members, members, places); err != nil {
		return fmt.Errorf("write backends: %w", fullError(s.maps.members, tcMapMembers, err))
	}
	for _, set := range sets {
		if err := s.writeTables(set); err != nil {
			return err
		}
	}
	return nil
}

// countHost notes whether sets that come or go have backends among this node's processes: only then to_network looks at what these send.
func (s *Services) countHost(sets []*backendSet, by int) error {
	was := s.onHost
	for _, set := range sets {
		if by > 0 {
			set.onHost = slices.ContainsFunc(set.backends, func(b Backend) bool { return slices.Contains(s.maps.node, b.Addr()) })
		}
		if set.onHost {
			s.onHost += uint32(by)
		}
	}
	if s.onHost == was {
		return nil
	}
	if err := s.maps.host.Put(uint32(0), s.onHost); err != nil {
		return fmt.Errorf("count backends on this node: %w", err)
	}
	return nil
}

func (s *Services) writeTables(set *backendSet) error {
	for _, local := range set.tables {
		slots := set.table(local, s.maps.maglevSize)
		bytes := unsafe.Slice((*byte)(unsafe.Pointer(&slots[0])), 2*len(slots))
		if err := s.maps.maglev.Put(maglevKey(set, local), bytes); err != nil {
			return fmt.Errorf("write table: %w", fullError(s.maps.maglev, tcMapMaglev, err))
		}
	}
	return nil
}

func maglevKey(set *backendSet, local bool) [2]uint32 {
	key := [2]uint32{set.id}
	if local {
		key[1] = 1
	}
	return key
}

// deleteSets takes sets that nobody has out of the kernel.
func (s *Services) deleteSets(gone []*backendSet) error {
	var slots []tcBackendKey
	var members []tcMemberKey
	var errs []error
	for _, set := range gone {
		a, _, b, _ := set.rowsOf()
		slots, members = append(slots, a...), append(members, b...)
		for _, local := range set.tables {
			if err := s.maps.maglev.Delete(maglevKey(set, local)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				errs = append(errs, fmt.Errorf("delete table: %w", err))
			}
		}
		s.backends -= len(set.backends)
		s.tables -= len(set.tables)
	}
	errs = append(errs, deleteAll(s.maps.backends, slots), deleteAll(s.maps.members, members), s.countHost(gone, -1))
	return errors.Join(errs...)
}

// rangeKey is the key of a prefix that may use a service.
func rangeKey(id uint32, p netip.Prefix) tcRangeKey {
	bits := p.Bits() + 32
	if p.Addr().Is4() {
		bits += 96
	}
	return tcRangeKey{Prefixlen: uint32(bits), Service: bigEndian32(id), Addr: p.Addr().As16()}
}

func bigEndian32(v uint32) uint32 {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], v)
	return binary.NativeEndian.Uint32(b[:])
}

// writeRanges adds those ranges of a service that it does not have yet.
func (s *Services) writeRanges(f Frontend, svc *Service) error {
	old := s.rows[f]
	for _, r := range svc.SourceRanges {
		if old != nil && old.service.ID == svc.ID && slices.Contains(old.service.SourceRanges, r) {
			continue
		}
		if err := s.maps.ranges.Put(rangeKey(svc.ID, r), uint32(1)); err != nil {
			return fmt.Errorf("source range %v: %w", r, fullError(s.maps.ranges, tcMapSourceRanges, err))
		}
		s.ranges++
	}
	return nil
}

// deleteRanges takes ranges of a service away, but for those to keep.
func (s *Services) deleteRanges(id uint32, ranges, keep []netip.Prefix) error {
	var errs []error
	for _, r := range ranges {
		if slices.Contains(keep, r) {
			continue
		}
		err := s.maps.ranges.Delete(rangeKey(id, r))
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("delete source range %v: %w", r, err))
			continue
		}
		s.ranges--
	}
	return errors.Join(errs...)
}

func full(m *ebpf.Map, name string) error {
	return fmt.Errorf("%s (%d entries): %w", name, m.MaxEntries(), ErrFull)
}

// updateAll writes many rows in as few calls as the kernel takes.
func updateAll[K, V any](m *ebpf.Map, keys []K, values []V) error {
	for len(keys) > 0 {
		n, err := m.BatchUpdate(keys, values, nil)
		if err != nil {
			return err
		}
		if n == 0 {
			return errors.New("the kernel wrote nothing")
		}
		keys, values = keys[n:], values[n:]
	}
	return nil
}

// deleteAll deletes many rows; one that is gone already is not an error.
func deleteAll[K any](m *ebpf.Map, keys []K) error {
	for len(keys) > 0 {
		n, err := m.BatchDelete(keys, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("delete rows: %w", err)
		}
		if err != nil {
			n++ // the one that is gone
		}
		keys = keys[min(n, len(keys)):]
	}
	return nil
}
