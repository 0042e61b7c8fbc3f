// SPDX-License-Identifier: Apache-2.0

package mirror

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/healthport"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

// serviceRow is a frontend. Two services may claim one (an external IP that both have): the first keeps it until it lets go.
type serviceRow struct {
	id      uint32
	owners  []*serviceOwner
	written *datapath.Service // nil = not in the kernel
	dirty   bool
	refused error // why it does not fit
}

type serviceOwner struct {
	key      string
	service  *desired.Service
	row      datapath.Service
	route    string
	unrouted error // there is no slot for its route
}

func (m *Mirror) applyService(c desired.Change) {
	old, _ := c.Old.(*desired.Service)
	svc, _ := c.New.(*desired.Service)
	owner := "service/" + c.Key.Name
	wanted := map[datapath.Frontend]frontend{}
	if svc != nil {
		for _, s := range m.frontendsOf(svc) {
			if _, twice := wanted[s.Frontend]; !twice {
				s.Route, s.unrouted = m.routeOf(s.route)
				wanted[s.Frontend] = s
			}
		}
	}
	if old != nil {
		m.dropService(c.Key.Name, old, wanted)
		for _, a := range serviceAddresses(old) {
			if svc == nil || !slices.Contains(serviceAddresses(svc), a) {
				m.claims.unset(owner, hostPrefix(a))
			}
		}
	}
	m.healthDirty = m.healthDirty || old != nil && old.HealthCheckNodePort != 0 || svc != nil && svc.HealthCheckNodePort != 0
	if svc == nil {
		delete(m.services, c.Key.Name)
		return
	}
	m.services[c.Key.Name] = svc
	for f, s := range wanted {
		m.wantFrontend(c.Key.Name, svc, f, s)
	}
	for _, a := range serviceAddresses(svc) {
		identity := m.cfg.WorldIPv6
		if a.Is4() {
			identity = m.cfg.WorldIPv4
		}
		m.claims.set(owner, rankService, hostPrefix(a), datapath.IPCacheEntry{Identity: identity, Flags: datapath.IPCacheServices})
	}
}

// serviceAddresses are those that belong to a service, and not to a node.
func serviceAddresses(s *desired.Service) []netip.Addr {
	return slices.Concat(s.ClusterIPs, s.ExternalIPs, s.LoadBalancerIPs)
}

// dropService takes a service's word back on the frontends that it does not want any more.
func (m *Mirror) dropService(key string, old *desired.Service, wanted map[datapath.Frontend]frontend) {
	for _, s := range m.frontendsOf(old) {
		row := m.frontends[s.Frontend]
		if _, ok := wanted[s.Frontend]; ok || row == nil {
			continue
		}
		row.owners = slices.DeleteFunc(row.owners, func(o *serviceOwner) bool { return o.key == key })
		row.dirty = true
		m.nameFrontend(s.Frontend, row)
	}
}

func (m *Mirror) wantFrontend(key string, svc *desired.Service, f datapath.Frontend, s frontend) {
	row := m.frontends[f]
	if row == nil {
		row = &serviceRow{id: m.cfg.ServiceIDs.Of(f)}
		m.frontends[f] = row
	}
	s.ID = row.id
	o := &serviceOwner{key: key, service: svc, row: s.Service, route: s.route, unrouted: s.unrouted}
	if i := slices.IndexFunc(row.owners, func(x *serviceOwner) bool { return x.key == key }); i >= 0 {
		row.owners[i] = o
	} else {
		row.owners = append(row.owners, o)
	}
	row.dirty = row.dirty || row.written == nil || row.owners[0].unrouted != nil || !reflect.DeepEqual(*row.written, row.owners[0].row)
	m.nameFrontend(f, row)
}

// nameFrontend tells flows whose a frontend is.
func (m *Mirror) nameFrontend(f datapath.Frontend, row *serviceRow) {
	if len(row.owners) == 0 {
		return // with the row itself
	}
	svc := row.owners[0].service
	m.cfg.Directory.SetService(row.id, flow.Frontend{Addr: f.Addr, Port: f.Port, Proto: f.Proto}, flow.ServiceName{Namespace: svc.Namespace, Name: svc.Name})
}

// flushServices writes what changed, all in one go, then removes what is gone. A frontend that does not fit is refused and told; it does not keep the
// others away.
func (m *Mirror) flushServices(quiet bool) error {
	var upserts []datapath.Service
	var removals []datapath.Frontend
	for f, row := range m.frontends {
		switch {
		case !row.dirty:
		case len(row.owners) == 0:
			removals = append(removals, f)
		case !m.routed(row):
			// What it had stays; without a proxy nobody passes who should pass one.
			m.refuseService(row, row.owners[0].unrouted)
		default:
			upserts = append(upserts, row.owners[0].row)
		}
	}
	m.saveServiceIDs()
	var errs []error
	if len(upserts) > 0 {
		failed, err := failedFrontends(m.cfg.Services.Upsert(upserts...))
		errs = append(errs, err)
		for i := range upserts {
			m.wroteService(&upserts[i], failed[upserts[i].Frontend], quiet)
		}
	}
	if len(removals) > 0 {
		errs = append(errs, m.cfg.Services.Delete(removals...))
	}
	if errors.Join(errs...) != nil {
		removals = nil // which of them are still there is not known
	}
	for _, f := range removals {
		row := m.frontends[f]
		m.cfg.Directory.RemoveService(flow.Frontend{Addr: f.Addr, Port: f.Port, Proto: f.Proto})
		m.cfg.ServiceIDs.Forget(f)
		delete(m.frontends, f)
		if !quiet {
			m.cfg.Events.ServiceDeleted(row.id)
		}
	}
	m.saveServiceIDs()
	m.setHealthPorts()
	return errors.Join(errs...)
}

func (m *Mirror) saveServiceIDs() {
	if err := m.cfg.ServiceIDs.Save(); err != nil {
		// The numbers are good until the next restart; the next change writes them again.
		m.log.Warn("service numbers were not saved", "error", err)
	}
}

// keepServices leaves frontends as an earlier agent wrote them, which may be younger than the state on disk.
func (m *Mirror) keepServices() {
	for f, row := range m.frontends {
		if pinned, ok := m.pinned[f]; ok && row.dirty && len(row.owners) > 0 {
			row.written, row.dirty = &pinned, false
		}
	}
}

// settleServices makes every frontend what it should be.
func (m *Mirror) settleServices() {
	m.pinned = nil
	for _, row := range m.frontends {
		if len(row.owners) > 0 && row.written != nil && !reflect.DeepEqual(*row.written, row.owners[0].row) {
			row.dirty = true
		}
	}
}

// failedFrontends takes errors apart: those of frontends that do not fit, and the rest.
func failedFrontends(err error) (map[datapath.Frontend]error, error) {
	failed := map[datapath.Frontend]error{}
	if err == nil {
		return failed, nil
	}
	list := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok { //nolint:errorlint // the outermost error is the joined one
		list = joined.Unwrap()
	}
	var others []error
	for _, e := range list {
		var one *datapath.ServiceError
		if errors.As(e, &one) {
			failed[one.Frontend] = one.Err
			if errors.Is(one.Err, datapath.ErrFull) {
				continue
			}
		}
		others = append(others, e)
	}
	return failed, errors.Join(others...)
}

func (m *Mirror) wroteService(s *datapath.Service, err error, quiet bool) {
	row := m.frontends[s.Frontend]
	svc := row.owners[0].service
	at := netip.AddrPortFrom(s.Frontend.Addr, s.Frontend.Port)
	if err != nil {
		m.refuseService(row, err)
		return // still dirty: Retry
	}
	written := *s
	row.written, row.dirty, row.refused = &written, false, nil
	if !quiet {
		var backends []netip.AddrPort
		for _, b := range s.Backends {
			backends = append(backends, b.AddrPort)
		}
		m.cfg.Events.ServiceUpserted(row.id, svc.Namespace, svc.Name, svc.Type, at, backends)
	}
}

func (m *Mirror) refuseService(row *serviceRow, err error) {
	if row.refused == nil {
		o := row.owners[0]
		at := netip.AddrPortFrom(o.row.Frontend.Addr, o.row.Frontend.Port)
		m.log.Error("a service does not fit", "service", o.key, "frontend", at, "error", err)
		m.cfg.Events.Notice("service-refused", map[string]any{"service": o.key, "frontend": at.String(), "error": err.Error()})
	}
	row.refused = err
}

// routed looks again for the slot of a frontend's route.
func (m *Mirror) routed(row *serviceRow) bool {
	o := row.owners[0]
	if o.unrouted == nil {
		return true
	}
	o.row.Route, o.unrouted = m.routeOf(o.route)
	return o.unrouted == nil
}

// routeOf returns the slot of a route; 0 = none.
func (m *Mirror) routeOf(key string) (uint16, error) {
	if key == "" || m.cfg.Slots == nil {
		return 0, nil
	}
	return m.cfg.Slots.Of(slot.Filter{Key: key, Kind: uint8(desired.FilterRoute), Direction: desired.Egress})
}

// Routes returns the keys of all routes of services.
func (m *Mirror) Routes() map[string]struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	keys := map[string]struct{}{}
	for _, s := range m.services {
		for _, p := range s.Ports {
			if p.Route != "" {
				keys[p.Route] = struct{}{}
			}
		}
	}
	return keys
}

// RouteUsers lists the services with a route, by namespace/name.
func (m *Mirror) RouteUsers(route string) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []string
	for key, s := range m.services {
		if slices.ContainsFunc(s.Ports, func(p desired.ServicePort) bool { return p.Route == route }) {
			all = append(all, key)
		}
	}
	slices.Sort(all)
	return all
}

// setHealthPorts opens the ports of services that keep outside traffic on its node.
func (m *Mirror) setHealthPorts() {
	if !m.healthDirty || m.cfg.HealthPorts == nil {
		return
	}
	want := map[uint16]healthport.Service{}
	for _, s := range m.services {
		if s.HealthCheckNodePort == 0 || !s.ExternalLocal {
			continue
		}
		want[s.HealthCheckNodePort] = healthport.Service{Namespace: s.Namespace, Name: s.Name, LocalEndpoints: m.localBackends(s)}
	}
	if err := m.cfg.HealthPorts.Set(want); err != nil {
		m.log.Error("a health-check node port is not open", "error", err)
		return // dirty: Retry
	}
	m.healthDirty = false
}

// localBackends counts the ready backends of a service on this node. One of both families counts once.
func (m *Mirror) localBackends(s *desired.Service) int {
	local := map[netip.Addr]struct{}{}
	var count [2]int
	for _, p := range s.Ports {
		for _, b := range p.Backends {
			a := b.Addr.Addr()
			if _, counted := local[a]; counted || b.Node != m.cfg.Node || b.Terminating {
				continue
			}
			local[a] = struct{}{}
			count[b2i(a.Is4())]++
		}
	}
	return max(count[0], count[1])
}

// Refused returns the services that are not in the kernel as they should be, and why.
func (m *Mirror) Refused() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := map[string]string{}
	for f, row := range m.frontends {
		if row.refused == nil || len(row.owners) == 0 {
			continue
		}
		key, text := row.owners[0].key, fmt.Sprintf("%s: %v", netip.AddrPortFrom(f.Addr, f.Port), row.refused)
		if old := all[key]; old == "" || text < old {
			all[key] = text // one of several, always the same
		}
	}
	return all
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
		if len(r.owners) > 0 {
			o := r.owners[0]
			rows = append(rows, ServiceRow{o.row, o.service.Namespace, o.service.Name, o.service.Type})
		}
	}
	slices.SortFunc(rows, func(a, b ServiceRow) int { return int(a.ID) - int(b.ID) })
	return rows
}
