// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"

	"github.com/weirmesh/weir/services/agent/internal/address"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
)

// Delete unplugs a container; no such container is success.
func (m *Manager) Delete(ctx context.Context, containerID, ifname string) error {
	k := key{containerID, ifname}
	if err := m.begin(ctx, k); err != nil {
		return err
	}
	defer m.end(k)
	m.mu.Lock()
	e := m.endpoints[k]
	m.mu.Unlock()
	if e == nil {
		return nil
	}
	return m.remove(k, e)
}

// remove takes away what Add made, the wire first: from then on nothing can come from the pod. What fails is tried again by the next
// Delete or restart; the address is free only when everything is gone.
func (m *Manager) remove(k key, e *Endpoint) error {
	m.mu.Lock()
	wasReady := e.Phase == Ready
	e.Phase = Deleting
	err := m.saveLocked()
	m.mu.Unlock()
	if err != nil {
		return err
	}
	errs := []error{m.cfg.Programs.DetachPod(e.HostIfName), netdev.DeleteLink(e.HostIfName)}
	for _, a := range e.Addresses {
		if !e.Unmanaged {
			errs = append(errs, m.cfg.Table.Delete(a))
		}
	}
	if !e.Unmanaged {
		// Nothing makes new ones any more. Their final records still find the endpoint's names.
		errs = append(errs, m.cfg.Programs.Purge(e.ID))
		errs = append(errs, m.cfg.Policies.Release(e.UID, e.ID))
	}
	for _, a := range e.Addresses {
		errs = append(errs, m.cfg.Identities.RemoveLocal(e.UID, a))
	}
	if !m.hasOther(e) {
		m.cfg.Registry.Unregister(e.UID)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove endpoint %d of %s/%s: %w", e.ID, e.Namespace, e.Name, err)
	}
	m.mu.Lock()
	delete(m.endpoints, k)
	m.ids.Release(e.ID)
	m.releaseLocked(e.Addresses)
	err = m.saveLocked()
	m.mu.Unlock()
	if wasReady {
		m.cfg.Events.EndpointDeleted(m.eventOf(e))
		m.log.Info("endpoint is gone", "id", e.ID, "pod", e.Namespace+"/"+e.Name)
	}
	return err
}

// hasOther says whether the pod is plugged in a second time: a new sandbox of the same pod may come before the old one goes.
func (m *Manager) hasOther(e *Endpoint) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.endpoints {
		if o != e && o.UID == e.UID && o.Phase != Deleting {
			return true
		}
	}
	return false
}

// Attachment names a container's interface.
type Attachment struct{ ContainerID, IfName string }

// CollectGarbage removes every endpoint that is not listed.
func (m *Manager) CollectGarbage(ctx context.Context, valid []Attachment) error {
	m.mu.Lock()
	var gone []key
	for k, e := range m.endpoints {
		if e.UID != HealthUID && !slices.Contains(valid, Attachment{k.container, k.ifname}) {
			gone = append(gone, k)
		}
	}
	m.mu.Unlock()
	var errs []error
	for _, k := range gone {
		errs = append(errs, m.Delete(ctx, k.container, k.ifname))
	}
	return errors.Join(errs...)
}

// Check compares a container with what Add made.
func (m *Manager) Check(containerID, ifname, netns string) error {
	m.mu.Lock()
	e := m.endpoints[key{containerID, ifname}]
	var copied Endpoint
	if e != nil {
		copied = *e
	}
	m.mu.Unlock()
	if e == nil {
		return fmt.Errorf("container %s, interface %s: %w", containerID, ifname, ErrUnknown)
	}
	if copied.Phase != Ready {
		return fmt.Errorf("endpoint %d is %s", copied.ID, copied.Phase)
	}
	ns, err := netdev.OpenNamespace(netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	wire, err := copied.wire()
	if err != nil {
		return err
	}
	errs := []error{netdev.CheckPod(ns, wire)}
	if !copied.Unmanaged {
		rows, err := m.cfg.Table.List()
		errs = append(errs, err)
		for _, a := range copied.Addresses {
			found := false
			for _, r := range rows {
				found = found || r.Addr == a && r.ID == copied.ID && r.Identity == copied.Identity
			}
			if !found {
				errs = append(errs, fmt.Errorf("address %s is missing in the endpoints map", a))
			}
		}
	}
	return errors.Join(errs...)
}

var hostIfPattern = regexp.MustCompile("^" + InterfacePrefix + "[0-9a-f]{10}$")

// Restore reads the endpoints of an earlier agent and takes them over: those whose interface is still there stay connected, the others are removed, and so
// is whatever in the kernel belongs to no endpoint. Call it once, after the programs are loaded and before the policy stream.
func (m *Manager) Restore() error {
	f, err := readState(m.cfg.StateFile)
	if err != nil {
		// Going on would give addresses of running pods to new ones.
		return fmt.Errorf("endpoints of the last agent: %w", err)
	}
	m.mu.Lock()
	m.ids = address.NewIDs(f.LastID)
	if f.Pools != nil {
		m.poolMemory = f.Pools
	}
	for _, e := range f.Endpoints {
		m.ids.Claim(e.ID)
		m.endpoints[key{e.ContainerID, e.IfName}] = e
	}
	m.mu.Unlock()
	var errs []error
	known := map[string]bool{}
	for _, e := range f.Endpoints {
		k := key{e.ContainerID, e.IfName}
		_, present := netdev.LinkIndex(e.HostIfName)
		if e.UID == HealthUID {
			m.health = e.Addresses
		}
		if e.Phase != Ready || !present || e.UID == HealthUID {
			if err := m.remove(k, e); err != nil {
				errs = append(errs, err)
			}
			continue
		}
		known[e.HostIfName] = true
		if err := m.takeOver(e); err != nil {
			errs = append(errs, fmt.Errorf("take over endpoint %d of %s/%s: %w", e.ID, e.Namespace, e.Name, err))
		}
	}
	errs = append(errs, m.removeStrays(known))
	m.log.Info("endpoints were restored", "count", len(known))
	return errors.Join(errs...)
}

func (m *Manager) takeOver(e *Endpoint) error {
	if !e.Unmanaged {
		if err := m.cfg.Policies.Adopt(e.UID, e.ID); err != nil {
			return fmt.Errorf("policy: %w", err)
		}
	}
	if err := m.reapply(e); err != nil {
		return err
	}
	if !e.Unmanaged {
		if err := m.cfg.Programs.AttachPod(e.HostIfName); err != nil {
			return err
		}
		// A cleanup has left it with routes of its own.
		wire, err := e.wire()
		if err != nil {
			return err
		}
		if err := netdev.RemovePlainPod(wire); err != nil {
			return err
		}
	}
	m.reservePorts(e)
	m.cfg.Registry.Register(m.registration(e))
	return nil
}

// reservePorts does for a pod of an earlier agent what is done when one starts.
func (m *Manager) reservePorts(e *Endpoint) {
	ns, err := netdev.OpenNamespace(e.Netns)
	if err == nil {
		err = errors.Join(netdev.ReservePorts(ns), ns.Close())
	}
	if err != nil {
		m.log.Warn("the proxy's source ports are not reserved in a pod", "pod", e.Namespace+"/"+e.Name, "error", err)
	}
}

// removeStrays removes interfaces and rows that no endpoint has: an agent died between making and writing down, or its state was lost.
func (m *Manager) removeStrays(known map[string]bool) error {
	var errs []error
	links, err := netdev.LinksWithPrefix(InterfacePrefix)
	errs = append(errs, err)
	for _, l := range links {
		if hostIfPattern.MatchString(l) && !known[l] {
			m.log.Warn("removing an interface that belongs to no endpoint", "interface", l)
			errs = append(errs, m.cfg.Programs.DetachPod(l), netdev.DeleteLink(l))
		}
	}
	rows, err := m.cfg.Table.List()
	errs = append(errs, err)
	for _, r := range rows {
		if !m.has(r.ID) {
			errs = append(errs, m.cfg.Table.Delete(r.Addr))
		}
	}
	return errors.Join(errs...)
}

func (m *Manager) has(id uint16) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range m.endpoints {
		if e.ID == id {
			return true
		}
	}
	return false
}
