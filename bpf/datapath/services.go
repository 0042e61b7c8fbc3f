// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"net/netip"
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

// Services owns the maps of services and backends. A change is one atomic swap: a socket is translated by the old set or by the new.
type Services struct{}

// Upsert makes or replaces a frontend with all its backends. An equal one is left alone.
func (s *Services) Upsert(svc Service) error { return errors.ErrUnsupported }

// Delete removes a frontend; no such frontend is not an error.
func (s *Services) Delete(f Frontend) error { return errors.ErrUnsupported }

// List returns all frontends with their backends.
func (s *Services) List() ([]Service, error) { return nil, errors.ErrUnsupported }
