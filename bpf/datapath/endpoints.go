// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"net"
	"net/netip"
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
}

// EndpointRow is one address of an endpoint.
type EndpointRow struct {
	Addr netip.Addr
	Endpoint
}

// Endpoints owns the map address -> endpoint. A packet with another source than the addresses of its interface is dropped.
type Endpoints struct{}

// Upsert makes or replaces the row of an address.
func (e *Endpoints) Upsert(addr netip.Addr, ep Endpoint) error { return errors.ErrUnsupported }

// Delete removes the row of an address; no such row is not an error.
func (e *Endpoints) Delete(addr netip.Addr) error { return errors.ErrUnsupported }

// List returns all rows.
func (e *Endpoints) List() ([]EndpointRow, error) { return nil, errors.ErrUnsupported }
