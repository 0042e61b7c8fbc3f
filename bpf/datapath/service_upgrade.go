// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
)

// Layout 1 of services: a set of backends that are all alike.
const servicesLayoutBefore = 1

type serviceBefore struct{ ID, Set, Count, Flags uint32 }

type backendBefore struct {
	Addr tcAddr
	Port uint16
	_    [6]byte
}

// adoptServices fills the maps of services from those of the earlier layout, before any hook has the new programs: sockets find their services
// without a gap. The agent then says the rest.
func (d *Datapath) adoptServices() (err error) {
	rows, err := d.openOld(tcMapServices, servicesLayoutBefore, 16)
	if err != nil || rows == nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	slots, err := d.openOld(tcMapBackends, servicesLayoutBefore, 24)
	if err != nil {
		return err
	}
	backends := map[tcBackendKey]Backend{}
	if slots != nil {
		defer func() { err = errors.Join(err, slots.Close()) }()
		err := walkMap(slots, func(k tcBackendKey, v backendBefore) {
			backends[k] = Backend{AddrPort: netip.AddrPortFrom(v.Addr.netip(), port16(v.Port))}
		})
		if err != nil {
			return fmt.Errorf("read %s of layout %d: %w", tcMapBackends, servicesLayoutBefore, err)
		}
	}
	var list []Service
	err = walkMap(rows, func(k tcServiceKey, v serviceBefore) {
		svc := Service{Frontend: Frontend{Addr: k.Addr.netip(), Port: port16(k.Port), Proto: k.Proto}, ID: v.ID}
		for slot := range v.Count {
			if b, ok := backends[tcBackendKey{Set: v.Set, Slot: slot}]; ok {
				svc.Backends = append(svc.Backends, b)
			}
		}
		if d.services.rows[svc.Frontend] == nil {
			list = append(list, svc)
		}
	})
	if err != nil {
		return fmt.Errorf("read %s of layout %d: %w", tcMapServices, servicesLayoutBefore, err)
	}
	if err := d.services.Upsert(list...); err != nil {
		return fmt.Errorf("services of layout %d: %w", servicesLayoutBefore, err)
	}
	d.log.Info("services of an earlier layout are taken over", "rows", len(list))
	return nil
}

// dropOldServices removes what adoptServices has read, after every hook has the new programs.
func (d *Datapath) dropOldServices() error {
	return errors.Join(removeIfThere(d.oldPin(tcMapServices, servicesLayoutBefore)), removeIfThere(d.oldPin(tcMapBackends, servicesLayoutBefore)))
}
