// SPDX-License-Identifier: Apache-2.0

package mirror

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/statefile"
)

// ServiceIDs gives frontends their numbers and keeps them on disk: connections in the kernel carry them, so a number must mean the same frontend
// after a restart, and is not given to another one.
type ServiceIDs struct {
	path string
	next uint32
	ids  map[datapath.Frontend]uint32
}

type serviceIDFile struct {
	Next uint32          `json:"next"`
	IDs  []serviceIDLine `json:"ids"`
}

type serviceIDLine struct {
	Frontend netip.AddrPort `json:"frontend"`
	Proto    uint8          `json:"proto"`
	ID       uint32         `json:"id"`
}

const (
	serviceIDKind    = "service-ids"
	serviceIDVersion = 1
)

// LoadServiceIDs reads the numbers; those that the kernel's maps hold (present) count where the file is missing or damaged.
func LoadServiceIDs(path string, present []datapath.Service) (*ServiceIDs, error) {
	s := &ServiceIDs{path: path, ids: map[datapath.Frontend]uint32{}}
	for _, p := range present {
		s.ids[p.Frontend] = p.ID
		s.next = max(s.next, p.ID)
	}
	b, err := statefile.Read(path, serviceIDKind, serviceIDVersion)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	var f serviceIDFile
	if err == nil {
		err = json.Unmarshal(b, &f)
	}
	s.next = max(s.next, f.Next)
	for _, l := range f.IDs {
		k := datapath.Frontend{Addr: l.Frontend.Addr(), Port: l.Frontend.Port(), Proto: l.Proto}
		if _, ok := s.ids[k]; !ok {
			s.ids[k] = l.ID
		}
	}
	return s, err
}

// Of returns the frontend's number, a new one if it has none. It is on disk when Of returns without an error.
func (s *ServiceIDs) Of(f datapath.Frontend) (uint32, error) {
	if id, ok := s.ids[f]; ok {
		return id, nil
	}
	s.next++
	if s.next == 0 {
		s.next = 1
	}
	s.ids[f] = s.next
	return s.next, s.save()
}

// Forget ends a frontend's number. It is not given out again before the counter comes round.
func (s *ServiceIDs) Forget(f datapath.Frontend) error {
	delete(s.ids, f)
	return s.save()
}

func (s *ServiceIDs) save() error {
	file := serviceIDFile{Next: s.next}
	for f, id := range s.ids {
		file.IDs = append(file.IDs, serviceIDLine{netip.AddrPortFrom(f.Addr, f.Port), f.Proto, id})
	}
	b, err := json.Marshal(file)
	if err != nil {
		return err
	}
	return statefile.Write(s.path, serviceIDKind, serviceIDVersion, b)
}

func (m *Mirror) applyService(c desired.Change) {
	old, _ := c.Old.(*desired.Service)
	svc, _ := c.New.(*desired.Service)
	owner := "service/" + c.Key.Name
	wanted := map[datapath.Frontend]datapath.Service{}
	if svc != nil {
		for _, s := range frontendsOf(svc) {
			wanted[s.Frontend] = s
		}
	}
	if old != nil {
		for _, s := range frontendsOf(old) {
			if _, ok := wanted[s.Frontend]; ok {
				continue
			}
			if row := m.frontends[s.Frontend]; row != nil && row.service.Namespace == old.Namespace && row.service.Name == old.Name {
				row.gone, row.dirty = true, true
			}
		}
		for _, a := range old.ClusterIPs {
			if svc == nil || !slices.Contains(svc.ClusterIPs, a) {
				m.claims.unset(owner, hostPrefix(a))
			}
		}
	}
	if svc == nil {
		return
	}
	for f, s := range wanted {
		row := m.frontends[f]
		if row == nil {
			id, err := m.cfg.ServiceIDs.Of(f)
			if err != nil {
				// The number is good until the next restart; the next new frontend writes the file again.
				m.log.Warn("service numbers were not saved", "error", err)
			}
			row = &serviceRow{desired: datapath.Service{ID: id}}
			m.frontends[f] = row
		}
		s.ID = row.desired.ID
		row.dirty = row.dirty || row.gone || row.written.ID == 0 || !slices.Equal(row.written.Backends, s.Backends)
		row.desired, row.service, row.gone = s, svc, false
		m.cfg.Directory.SetService(s.ID, flow.Frontend{Addr: f.Addr, Port: f.Port, Proto: f.Proto}, flow.ServiceName{Namespace: svc.Namespace, Name: svc.Name})
	}
	for _, a := range svc.ClusterIPs {
		identity := m.cfg.WorldIPv6
		if a.Is4() {
			identity = m.cfg.WorldIPv4
		}
		m.claims.set(owner, rankService, hostPrefix(a), datapath.IPCacheEntry{Identity: identity, Flags: datapath.IPCacheServices})
	}
}

// frontendsOf lists what clients of a service can address, with backends of the same family.
func frontendsOf(s *desired.Service) []datapath.Service {
	var all []datapath.Service
	for _, ip := range s.ClusterIPs {
		for _, p := range s.Ports {
			row := datapath.Service{Frontend: datapath.Frontend{Addr: ip, Port: p.Port, Proto: p.Proto}}
			for _, b := range p.Backends {
				if b.Addr.Addr().Is4() == ip.Is4() && !b.Terminating {
					row.Backends = append(row.Backends, datapath.Backend{AddrPort: b.Addr})
				}
			}
			slices.SortFunc(row.Backends, func(a, b datapath.Backend) int { return a.Compare(b.AddrPort) })
			all = append(all, row)
		}
	}
	return all
}

func addressesOf(backends []datapath.Backend) []netip.AddrPort {
	var list []netip.AddrPort
	for _, b := range backends {
		list = append(list, b.AddrPort)
	}
	return list
}

func (m *Mirror) flushServices(quiet bool) error {
	var errs []error
	for f, row := range m.frontends {
		if !row.dirty {
			continue
		}
		at := netip.AddrPortFrom(f.Addr, f.Port)
		if row.gone {
			if err := m.cfg.Services.Delete(f); err != nil {
				errs = append(errs, fmt.Errorf("remove %s: %w", at, err))
				continue
			}
			m.cfg.Directory.RemoveService(flow.Frontend{Addr: f.Addr, Port: f.Port, Proto: f.Proto})
			if err := m.cfg.ServiceIDs.Forget(f); err != nil {
				m.log.Warn("service numbers were not saved", "error", err)
			}
			delete(m.frontends, f)
			if !quiet {
				m.cfg.Events.ServiceDeleted(row.desired.ID)
			}
			continue
		}
		if err := m.cfg.Services.Upsert(row.desired); err != nil {
			errs = append(errs, fmt.Errorf("write %s: %w", at, err))
			continue
		}
		row.written, row.dirty = row.desired, false
		if !quiet {
			m.cfg.Events.ServiceUpserted(row.desired.ID, row.service.Namespace, row.service.Name, row.service.Type, at, addressesOf(row.desired.Backends))
		}
	}
	return errors.Join(errs...)
}

// ServiceRow is a frontend as this node has it.
type ServiceRow struct {
	datapath.Service
	Namespace, Name, Type string
}

// ServiceRows lists the frontends by number.
func (m *Mirror) ServiceRows() []ServiceRow {
	m.mu.Lock()
	defer m.mu.Unlock()
	var rows []ServiceRow
	for _, r := range m.frontends {
		if !r.gone {
			rows = append(rows, ServiceRow{r.desired, r.service.Namespace, r.service.Name, r.service.Type})
		}
	}
	slices.SortFunc(rows, func(a, b ServiceRow) int { return int(a.ID) - int(b.ID) })
	return rows
}
