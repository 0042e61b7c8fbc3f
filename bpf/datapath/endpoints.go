// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Endpoint is a local endpoint as the programs know it.
type Endpoint struct {
	// ID is the endpoint's number on this node; not 0.
	ID uint16
	// Identity is its security identity.
	Identity uint32
	// IfIndex is the host-side interface of the pod's veth pair.
	IfIndex uint32
	// MAC of the pod's interface; 6 bytes or nil.
	MAC net.HardwareAddr
	// NetnsCookie of the pod's network namespace (see NetnsCookie); 0 = not known. It tells whose a UDP socket is: without it, UDP
	// translation records have no source.
	NetnsCookie uint64
	// Peer is the number that policies know this address by; 0 = the identity.
	Peer uint32
}

// EndpointRow is one address of an endpoint.
type EndpointRow struct {
	Addr netip.Addr
	Endpoint
}

// Endpoints owns the maps address -> endpoint and interface -> endpoint. A packet with another source than the addresses of its
// interface is dropped.
type Endpoints struct {
	mu         sync.Mutex // makes a change of both maps one
	endpoints  *ebpf.Map
	interfaces *ebpf.Map
	netns      *ebpf.Map
}

// Upsert makes or replaces the row of an address.
func (e *Endpoints) Upsert(addr netip.Addr, ep Endpoint) error {
	if !addr.IsValid() || ep.ID == 0 || ep.IfIndex == 0 {
		return fmt.Errorf("endpoint %v: address, id and interface are needed", addr)
	}
	row := tcEndpoint{Ifindex: ep.IfIndex, Identity: ep.Identity, Id: ep.ID, Peer: ep.Peer}
	if ep.MAC != nil && copy(row.Mac[:], ep.MAC) != len(row.Mac) {
		return fmt.Errorf("endpoint %v: MAC %v: want 6 bytes", addr, ep.MAC)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if ep.NetnsCookie != 0 {
		if err := e.putNetns(addr.Unmap(), ep); err != nil {
			return fmt.Errorf("network namespace of endpoint %v: %w", addr, err)
		}
	}
	if err := e.interfaces.Put(row.Ifindex, row); err != nil {
		return fmt.Errorf("interface of endpoint %v: %w", addr, err)
	}
	if err := e.endpoints.Put(addrOf(addr), row); err != nil {
		return fmt.Errorf("endpoint %v: %w", addr, err)
	}
	return nil
}

// putNetns adds an address to the row of the endpoint's network namespace.
func (e *Endpoints) putNetns(addr netip.Addr, ep Endpoint) error {
	var row tcNetnsEndpoint
	if err := e.netns.Lookup(ep.NetnsCookie, &row); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	if row.Id != ep.ID {
		row = tcNetnsEndpoint{}
	}
	row.Id, row.Identity, row.Ifindex = ep.ID, ep.Identity, ep.IfIndex
	if addr.Is4() {
		row.V4 = addrOf(addr)
	} else {
		row.V6 = addrOf(addr)
	}
	return e.netns.Put(ep.NetnsCookie, row)
}

// Delete removes the row of an address; no such row is not an error.
func (e *Endpoints) Delete(addr netip.Addr) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	var row tcEndpoint
	err := e.endpoints.Lookup(addrOf(addr), &row)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("endpoint %v: %w", addr, err)
	}
	if err := e.endpoints.Delete(addrOf(addr)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete endpoint %v: %w", addr, err)
	}
	rows, err := e.list()
	if err != nil {
		return err
	}
	for _, r := range rows {
		if r.IfIndex == row.Ifindex {
			return nil
		}
	}
	if err := e.deleteNetns(row.Id); err != nil {
		return fmt.Errorf("delete network namespace of endpoint %v: %w", addr, err)
	}
	if err := e.interfaces.Delete(row.Ifindex); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete interface of endpoint %v: %w", addr, err)
	}
	return nil
}

// deleteNetns removes the namespace rows of an endpoint that has no address left.
func (e *Endpoints) deleteNetns(id uint16) error {
	var stale []uint64
	var cookie uint64
	var row tcNetnsEndpoint
	it := e.netns.Iterate()
	for it.Next(&cookie, &row) {
		if row.Id == id {
			stale = append(stale, cookie)
		}
	}
	errs := []error{it.Err()}
	for _, c := range stale {
		if err := e.netns.Delete(c); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// List returns all rows. NetnsCookie is left out.
func (e *Endpoints) List() ([]EndpointRow, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.list()
}

func (e *Endpoints) list() ([]EndpointRow, error) {
	var rows []EndpointRow
	var key tcAddr
	var value tcEndpoint
	it := e.endpoints.Iterate()
	for it.Next(&key, &value) {
		rows = append(rows, EndpointRow{key.netip(), Endpoint{
			ID: value.Id, Identity: value.Identity, IfIndex: value.Ifindex, MAC: append(net.HardwareAddr{}, value.Mac[:]...),
			Peer: value.Peer,
		}})
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("list endpoints: %w", err)
	}
	return rows, nil
}

// NetnsCookie returns the cookie of the calling thread's network namespace, by which the kernel knows it.
func NetnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("netns cookie: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("netns cookie: %w", err)
	}
	return cookie, nil
}
