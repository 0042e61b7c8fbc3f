// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"

	"github.com/cilium/ebpf"
)

// The node's proxy.
const (
	// MaxSlot is the greatest number of a slot.
	MaxSlot = 4095
	// ProxyPortBase: slot n listens on port ProxyPortBase + n of 127.0.0.1 and ::1. (The programs know the port from Slots alone.)
	ProxyPortBase = 20000
	// UpstreamPortMin and UpstreamPortMax bound the source ports of the proxy's upstream sockets, which have pods' addresses.
	UpstreamPortMin = 52000
	UpstreamPortMax = 60999
	// MarkMask are the bits of a packet's or socket's mark that are the mesh's.
	MarkMask = 0x0f00
	// MarkProxy is what the programs mark packets with that go to a socket of the proxy.
	MarkProxy = 0x200
	// MarkRoutePassed, MarkEgressPassed and MarkIngressPassed are marks (SO_MARK) of upstream sockets: which stage they come from.
	MarkRoutePassed   = 0x100
	MarkEgressPassed  = 0x300
	MarkIngressPassed = 0x500
)

// Slots owns the map of the proxy's listeners.
type Slots struct {
	m *ebpf.Map
}

// Set says on which port of 127.0.0.1 and ::1 the listener of a slot is. Call it when the socket listens. Several slots may share a port.
func (s *Slots) Set(slot, port uint16) error {
	if slot == 0 || slot > MaxSlot || port == 0 {
		return fmt.Errorf("slot %d, port %d: want 1 to %d, and a port", slot, port, MaxSlot)
	}
	if err := s.m.Put(uint32(slot), uint32(port)); err != nil {
		return fmt.Errorf("slot %d: %w", slot, err)
	}
	return nil
}

// Delete says that a slot has no listener: what policy sends there is dropped, what was only to be seen goes straight on. Connections that the
// proxy has keep their sockets.
func (s *Slots) Delete(slot uint16) error {
	if slot == 0 || slot > MaxSlot {
		return fmt.Errorf("slot %d: want 1 to %d", slot, MaxSlot)
	}
	if err := s.m.Put(uint32(slot), uint32(0)); err != nil {
		return fmt.Errorf("delete slot %d: %w", slot, err)
	}
	return nil
}

// List returns the port of each slot that has a listener.
func (s *Slots) List() (map[uint16]uint16, error) {
	out := map[uint16]uint16{}
	var slot, port uint32
	it := s.m.Iterate()
	for it.Next(&slot, &port) {
		if port != 0 {
			out[uint16(slot)] = uint16(port)
		}
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("list slots: %w", err)
	}
	return out, nil
}
