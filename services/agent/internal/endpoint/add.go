// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/policysync"
)

// identityUnmanaged is the identity of pods that the mesh leaves alone.
const identityUnmanaged = 3

// AddRequest is a CNI ADD.
type AddRequest struct {
	ContainerID, Netns, IfName string
	Namespace, Name, UID       string
}

// Added is what Add made.
type Added struct {
	Endpoint
	// LateNodes had not acknowledged the pod's addresses when Add returned.
	LateNodes []string
}

// InterfacePrefix begins the names of all host-side interfaces of pods.
const InterfacePrefix = "wr"

// hostIfName is the host side's name: wr and ten hexadecimal digits, the same for the same attachment.
func hostIfName(k key) string {
	sum := sha256.Sum256([]byte(k.container + "/" + k.ifname))
	return InterfacePrefix + hex.EncodeToString(sum[:5])
}

// Add plugs a pod in. It returns when the local maps hold the pod, and every connected node has its addresses or SpreadWait is over.
func (m *Manager) Add(ctx context.Context, r AddRequest) (*Added, error) {
	k := key{r.ContainerID, r.IfName}
	if err := m.begin(ctx, k); err != nil {
		return nil, err
	}
	defer m.end(k)

	ns, err := netdev.OpenNamespace(r.Netns)
	if err != nil {
		return nil, err
	}
	defer ns.Close()

	if again, err := m.addedBefore(k, ns); again != nil || err != nil {
		return again, err
	}
	waitCtx, cancel := context.WithTimeout(ctx, m.cfg.PolicyWait)
	defer cancel()
	pod, node, err := m.cfg.Store.WaitPod(waitCtx, m.cfg.Node, r.Namespace, r.Name, r.UID)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrNoPolicy, missing(pod, node, r), err)
	}
	if !pod.Unmanaged {
		if err := m.cfg.Policies.Wait(waitCtx, pod.UID); err != nil {
			return nil, fmt.Errorf("%w: pod %s/%s: %w", ErrNoPolicy, r.Namespace, r.Name, err)
		}
	}
	return m.plug(ctx, k, ns, r, pod, node)
}

// plug makes an endpoint of a pod that is known.
func (m *Manager) plug(ctx context.Context, k key, ns *netdev.Namespace, r AddRequest, pod *desired.Pod, node *desired.Node) (*Added, error) {
	var cookie uint64
	err := ns.Do(func() (err error) {
		cookie, err = datapath.NetnsCookie()
		return err
	})
	if err != nil {
		return nil, err
	}
	e, err := m.reserve(k, r, pod, node, cookie)
	if err != nil {
		return nil, err
	}
	if err := m.connect(ns, e); err != nil {
		return nil, errors.Join(fmt.Errorf("pod %s/%s: %w", r.Namespace, r.Name, err), m.remove(k, e))
	}
	late, err := m.spread(ctx, e)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("pod %s/%s: %w", r.Namespace, r.Name, err), m.remove(k, e))
	}
	m.mu.Lock()
	e.Phase = Ready
	err = m.saveLocked()
	added := &Added{Endpoint: *e, LateNodes: late}
	for _, n := range late {
		m.late[n]++
	}
	m.mu.Unlock()
	if err != nil {
		return nil, errors.Join(err, m.remove(k, e))
	}
	// What changed while it was being made found it not ready.
	if p := m.cfg.Store.Pod(pod.Namespace, pod.Name, pod.UID); p != nil && p != pod {
		m.PodChanged(p)
	}
	m.cfg.Events.EndpointCreated(m.eventOf(&added.Endpoint))
	m.log.Info("endpoint is ready", "id", e.ID, "uid", e.UID, "pod", e.Namespace+"/"+e.Name, "addresses", e.Addresses,
		"identity", added.Identity, "lateNodes", late)
	return added, nil
}

func missing(pod *desired.Pod, node *desired.Node, r AddRequest) string {
	switch {
	case node == nil:
		return "the policy service has not named this node"
	case len(node.PodCIDRs) == 0:
		return "the node has no pod CIDR"
	case pod == nil:
		return fmt.Sprintf("the policy service has not named pod %s/%s", r.Namespace, r.Name)
	}
	return fmt.Sprintf("pod %s/%s has no identity yet", r.Namespace, r.Name)
}

// addedBefore finds what an earlier Add of the same attachment made, if it is still whole; what is left of one that is not is removed.
func (m *Manager) addedBefore(k key, ns *netdev.Namespace) (*Added, error) {
	m.mu.Lock()
	e := m.endpoints[k]
	var copied Endpoint
	if e != nil {
		copied = *e
	}
	m.mu.Unlock()
	if e == nil {
		return nil, nil
	}
	if copied.Phase == Ready {
		wire, err := copied.wire()
		if err == nil && netdev.CheckPod(ns, wire) == nil {
			return &Added{Endpoint: copied}, nil
		}
	}
	return nil, m.remove(k, e)
}

// reserve gives the pod a number and addresses and writes them down before anything is made in the kernel.
func (m *Manager) reserve(k key, r AddRequest, pod *desired.Pod, node *desired.Node, netnsCookie uint64) (*Endpoint, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	addresses, err := m.allocateLocked(node, pod)
	if err != nil {
		return nil, err
	}
	id, err := m.ids.Take()
	if err != nil {
		m.releaseLocked(addresses)
		return nil, err
	}
	e := &Endpoint{
		ID: id, ContainerID: r.ContainerID, IfName: r.IfName, Netns: r.Netns, UID: pod.UID, Namespace: pod.Namespace, Name: pod.Name,
		Identity: pod.Identity, Workload: pod.Workload, Addresses: addresses, HostIfName: hostIfName(k),
		HostMAC: netdev.RandomMAC().String(), MAC: netdev.RandomMAC().String(), MTU: m.cfg.MTU, Unmanaged: pod.Unmanaged,
		NetnsCookie: netnsCookie, Created: m.cfg.Now(), Phase: Creating, namedPorts: pod.NamedPorts,
	}
	if e.Unmanaged {
		e.Identity = identityUnmanaged
	}
	m.endpoints[k] = e
	if err := m.saveLocked(); err != nil {
		delete(m.endpoints, k)
		m.ids.Release(id)
		m.releaseLocked(addresses)
		return nil, err
	}
	return e, nil
}

// connect makes wire, rows and programs; the pod can talk only when all of it is in place.
func (m *Manager) connect(ns *netdev.Namespace, e *Endpoint) error {
	wire, err := e.wire()
	if err != nil {
		return err
	}
	index, err := netdev.CreatePod(ns, wire)
	if err != nil {
		return err
	}
	m.cfg.Directory.SetInterface(uint32(index), e.HostIfName)
	if !e.Unmanaged {
		// Its policy first, before anybody can reach it or it anybody.
		if err := m.cfg.Policies.Bind(e.UID, e.ID); err != nil {
			return fmt.Errorf("policy: %w", err)
		}
	}
	for _, a := range e.Addresses {
		if err := m.cfg.Identities.SetLocal(e.UID, a, m.peerOf(e)); err != nil {
			return err
		}
	}
	if e.Unmanaged {
		// The mesh leaves it alone: no row, no program. The kernel routes to it by a host route, which is narrower than the route to the pod
		// CIDR, and from it like from any interface.
		if err := netdev.ConnectPod(ns, wire); err != nil {
			return err
		}
		return netdev.AddPlainPod(wire)
	}
	if err := m.writeRows(e, uint32(index)); err != nil {
		return err
	}
	if err := m.cfg.Programs.AttachPod(e.HostIfName); err != nil {
		return err
	}
	return netdev.ConnectPod(ns, wire)
}

func (m *Manager) writeRows(e *Endpoint, index uint32) error {
	wire, err := e.wire()
	if err != nil {
		return err
	}
	for _, a := range e.Addresses {
		err := m.cfg.Table.Upsert(a, datapath.Endpoint{ID: e.ID, Identity: e.Identity, IfIndex: index, MAC: wire.PodMAC, NetnsCookie: e.NetnsCookie,
			Peer: m.cfg.Identities.LocalPeer(e.UID, a, e.Identity)})
		if err != nil {
			return fmt.Errorf("write endpoint %s: %w", a, err)
		}
	}
	return nil
}

// spread registers the endpoint and waits for the other nodes, within limits. No answer at all is not held against the pod: it talks by the
// wider routes, and its peers learn who it is as soon as they can.
func (m *Manager) spread(ctx context.Context, e *Endpoint) ([]string, error) {
	answer := m.cfg.Registry.Register(m.registration(e))
	timer := time.NewTimer(m.cfg.SpreadWait)
	defer timer.Stop()
	select {
	case s := <-answer:
		if s.Refused != "" {
			return nil, fmt.Errorf("policy service refused the endpoint: %s", s.Refused)
		}
		return s.LateNodes, nil
	case <-timer.C:
		m.log.Warn("policy service has not said how far an address has spread", "pod", e.Namespace+"/"+e.Name)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return nil, nil
}

func (m *Manager) registration(e *Endpoint) policysync.Endpoint {
	return policysync.Endpoint{NamedPorts: e.namedPorts, Endpoint: desired.Endpoint{UID: e.UID, Node: m.cfg.Node, Namespace: e.Namespace, Name: e.Name,
		Addresses: slices.Clone(e.Addresses), Identity: e.Identity, Workload: e.Workload}}
}

// PeersChanged follows new names that policies have for the addresses of a running pod.
func (m *Manager) PeersChanged(uid string) {
	for _, e := range m.List() {
		if e.UID != uid || e.Phase == Deleting || e.Unmanaged {
			continue
		}
		index, ok := netdev.LinkIndex(e.HostIfName)
		if !ok {
			continue // it is being made or removed; its rows get the new names when they are written
		}
		if err := m.writeRows(&e, uint32(index)); err != nil {
			m.log.Error("an endpoint's row was not changed", "id", e.ID, "error", err)
		}
	}
}

// PodChanged follows a new identity of a running pod: the local maps first, then everyone else's.
func (m *Manager) PodChanged(p *desired.Pod) {
	m.mu.Lock()
	var changed []*Endpoint
	for _, e := range m.endpoints {
		if e.UID == p.UID && e.Phase == Ready && !e.Unmanaged && p.Identity != 0 && e.Identity != p.Identity {
			e.Identity, e.Workload = p.Identity, p.Workload
			copied := *e
			changed = append(changed, &copied)
		}
	}
	if len(changed) > 0 {
		if err := m.saveLocked(); err != nil {
			m.log.Error("endpoints were not saved", "error", err)
		}
	}
	m.mu.Unlock()
	for _, e := range changed {
		if err := m.reapply(e); err != nil {
			m.log.Error("identity of an endpoint was not changed", "id", e.ID, "identity", e.Identity, "error", err)
			continue
		}
		if err := m.cfg.Policies.AddressesChanged(); err != nil {
			m.log.Error("live connections are not judged anew", "id", e.ID, "error", err)
		}
		m.log.Info("endpoint has another identity", "id", e.ID, "pod", e.Namespace+"/"+e.Name, "identity", e.Identity)
		m.cfg.Registry.Register(m.registration(e))
	}
}

func (m *Manager) reapply(e *Endpoint) error {
	index, ok := netdev.LinkIndex(e.HostIfName)
	if !ok {
		return fmt.Errorf("interface %s is gone", e.HostIfName)
	}
	m.cfg.Directory.SetInterface(uint32(index), e.HostIfName)
	for _, a := range e.Addresses {
		if err := m.cfg.Identities.SetLocal(e.UID, a, m.peerOf(e)); err != nil {
			return err
		}
	}
	if e.Unmanaged {
		wire, err := e.wire()
		if err != nil {
			return err
		}
		return netdev.AddPlainPod(wire)
	}
	return m.writeRows(e, uint32(index))
}
