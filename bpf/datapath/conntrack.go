// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"net/netip"
	"time"
)

// ConnState is the state of a connection; protocols without a handshake are established at once.
type ConnState uint8

// States of a connection.
const (
	StateSynSent     = ConnState(tcCtStateCT_SYN_SENT)
	StateSynRecv     = ConnState(tcCtStateCT_SYN_RECV)
	StateEstablished = ConnState(tcCtStateCT_ESTABLISHED)
	StateFinWait     = ConnState(tcCtStateCT_FIN_WAIT)
	StateClosed      = ConnState(tcCtStateCT_CLOSED)
)

// String returns the state's name.
func (s ConnState) String() string {
	switch s {
	case StateSynSent:
		return "syn-sent"
	case StateSynRecv:
		return "syn-recv"
	case StateEstablished:
		return "established"
	case StateFinWait:
		return "fin-wait"
	case StateClosed:
		return "closed"
	}
	return "none"
}

// Conn is one entry of the connection table: a connection at one observation point.
type Conn struct {
	// ID is Record.Connection.
	ID       uint64
	Endpoint uint16
	// Direction of the connection, seen from the endpoint.
	Direction uint8
	Proto     uint8
	// Source is the originator, Destination the responder; ports are 0 where the protocol has none, an echo's id is the source's.
	Source, Destination netip.AddrPort
	State               ConnState
	PeerIdentity        uint32
	Service             uint32
	Forward, Reverse    Traffic
	// Expires is when the entry may be collected, CLOCK_MONOTONIC nanoseconds.
	Expires                               uint64
	Known                                 uint8
	HandshakeUs, SRTTUs, Retransmissions uint32
}

// Conntrack reads and sweeps the connection table.
type Conntrack struct{}

// SweepStats says what a sweep did.
type SweepStats struct {
	// Live entries after the sweep, and how many of them are half-open.
	Live, HalfOpen int
	// Expired entries whose final record was written; they are gone.
	Collected int
	// Left are expired entries that wait for the next sweep, since a ring was too full.
	Left int
	Took time.Duration
}

// Sweep collects entries that have expired: for each, a program writes the final record into a ring and deletes the entry, in one
// run. So a final record comes by Rings like any other, exactly once, also when the process dies. When ct is more than 9/10 full, half-open entries
// older than a second are collected as well. Call it every second or two.
func (c *Conntrack) Sweep() (SweepStats, error) { return SweepStats{}, errors.ErrUnsupported }

// List calls f for each entry until it returns false. The table may change meanwhile.
func (c *Conntrack) List(f func(Conn) bool) error { return errors.ErrUnsupported }
