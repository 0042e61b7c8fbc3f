// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
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
	// Source is the originator, Destination the responder. ICMP: an echo's id is the source's port, all else is 0.
	Source, Destination netip.AddrPort
	State               ConnState
	PeerIdentity        uint32
	Service             uint32
	// Verdict and Rule are what policy decided last; Audited says that it would have dropped the connection. PolicyNone: nothing was enforced.
	Verdict PolicyVerdict
	Rule    uint32
	// Slot of the proxy that it goes through; 0 = none.
	Slot             uint16
	Audited          bool
	Forward, Reverse Traffic
	// Expires is when the entry may be collected, CLOCK_MONOTONIC nanoseconds.
	Expires uint64
	// Known says which of the values below are set.
	Known                                uint8
	HandshakeUs, SRTTUs, Retransmissions uint32
}

// Conntrack reads and sweeps the connection table.
type Conntrack struct {
	m     *ebpf.Map
	sweep *ebpf.Program

	mu     sync.Mutex // guards the buffers
	keys   []tcCtKey
	values []tcCtEntry
}

// SweepStats says what a sweep did.
type SweepStats struct {
	// Live entries that the sweep met and left, and how many of them are half-open.
	Live, HalfOpen int
	// Collected entries are gone, their final records written.
	Collected int
	// Left are entries that were due and wait for the next sweep, since a ring was full.
	Left int
	Took time.Duration
}

const (
	conntrackBatch = 2048
	sweepKeys      = 64 // SWEEP_KEYS of lib/sweep.h
	// sweepHeader is sizeof(struct sweep_request): ethernet[14], count, half_open_before, force, pad.
	sweepHeader = 32
	// halfOpenGrace is how old a half-open entry may become when the table is nearly full.
	halfOpenGrace = time.Second
)

func newConntrack(m *ebpf.Map, sweep *ebpf.Program) *Conntrack {
	return &Conntrack{m: m, sweep: sweep, keys: make([]tcCtKey, conntrackBatch), values: make([]tcCtEntry, conntrackBatch)}
}

// Max returns how many entries the table can hold.
func (c *Conntrack) Max() int { return int(c.m.MaxEntries()) }

// Sweep collects entries that have expired: for each, a program writes the final record into a ring and deletes the entry, in one run. So a
// final record comes by Rings like any other, exactly once, also when the process dies. When ct is more than 9/10 full, half-open
// entries that were silent for a second are collected as well. Call it every second or two.
func (c *Conntrack) Sweep() (SweepStats, error) {
	stats, due, err := c.pick(func(now uint64, _ *tcCtKey, e *tcCtConn) bool { return now > e.Expires })
	if err != nil {
		return stats, err
	}
	var halfOpenBefore uint64
	if stats.Live > c.Max()/10*9 {
		halfOpenBefore = Now() - uint64(halfOpenGrace)
		more, open, err := c.pick(func(_ uint64, _ *tcCtKey, e *tcCtConn) bool {
			return halfOpen(e) && max(e.Dir[0].Last, e.Dir[1].Last) < halfOpenBefore
		})
		if err != nil {
			return stats, err
		}
		due = append(open, due...)
		stats.Live, stats.HalfOpen = more.Live, more.HalfOpen
	}
	return c.collect(stats, due, halfOpenBefore, false)
}

// Purge collects all entries of an endpoint, expired or not: call it when the endpoint is gone, before its number is given again.
func (c *Conntrack) Purge(endpoint uint16) (SweepStats, error) {
	stats, due, err := c.pick(func(_ uint64, k *tcCtKey, _ *tcCtConn) bool { return k.Endpoint == endpoint })
	if err != nil {
		return stats, err
	}
	return c.collect(stats, due, 0, true)
}

func halfOpen(e *tcCtConn) bool {
	return ConnState(e.State) == StateSynSent || ConnState(e.State) == StateSynRecv
}

// pick walks the table and returns the keys for which want says so. An entry may be torn by a concurrent change; the program decides.
func (c *Conntrack) pick(want func(now uint64, k *tcCtKey, e *tcCtConn) bool) (SweepStats, []tcCtKey, error) {
	var stats SweepStats
	var due []tcCtKey
	now := Now()
	err := c.walk(func(k *tcCtKey, e *tcCtConn) bool {
		if want(now, k, e) {
			due = append(due, *k)
			return true
		}
		stats.Live++
		if halfOpen(e) {
			stats.HalfOpen++
		}
		return true
	})
	stats.Took = time.Duration(Now() - now)
	return stats, due, err
}

// collect runs the sweep program on keys, as many a run as it takes.
func (c *Conntrack) collect(stats SweepStats, due []tcCtKey, halfOpenBefore uint64, force bool) (SweepStats, error) {
	start := Now()
	const keySize = int(unsafe.Sizeof(tcCtKey{}))
	buf := make([]byte, 0, sweepHeader+sweepKeys*keySize)
	for len(due) > 0 {
		n := min(len(due), sweepKeys)
		buf = buf[:sweepHeader]
		clear(buf)
		binary.NativeEndian.PutUint16(buf[14:], uint16(n))
		binary.NativeEndian.PutUint64(buf[16:], halfOpenBefore)
		if force {
			buf[24] = 1
		}
		buf = append(buf, unsafe.Slice((*byte)(unsafe.Pointer(&due[0])), n*keySize)...)
		ret, err := c.sweep.Run(&ebpf.RunOptions{Data: buf})
		if err != nil {
			return stats, fmt.Errorf("sweep: %w", err)
		}
		done, left := int(ret&0xffff), int(ret>>16)
		stats.Collected += done
		stats.Live += n - done - left
		due = due[n:]
		if left > 0 {
			stats.Left = left + len(due)
			break
		}
	}
	stats.Took += time.Duration(Now() - start)
	return stats, nil
}

// List calls f for each entry until it returns false. The table may change meanwhile. f must not call Sweep, Purge or List.
func (c *Conntrack) List(f func(Conn) bool) error {
	return c.walk(func(k *tcCtKey, e *tcCtConn) bool { return f(connOf(k, e)) })
}

func (c *Conntrack) walk(f func(k *tcCtKey, e *tcCtConn) bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var cursor ebpf.MapBatchCursor
	for {
		n, err := c.m.BatchLookup(&cursor, c.keys, c.values, nil)
		for i := range n {
			if !f(&c.keys[i], &c.values[i].Conn) {
				return nil
			}
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read ct: %w", err)
		}
	}
}

// kindICMP is KIND_ICMP of lib/packet.h.
const kindICMP = 1

// ctAudited is CT_AUDITED of lib/ct_types.h.
const ctAudited = 0x80

func connOf(k *tcCtKey, e *tcCtConn) Conn {
	lo := netip.AddrPortFrom(k.Lo.netip(), port16(k.LoPort))
	hi := netip.AddrPortFrom(k.Hi.netip(), port16(k.HiPort))
	if k.Kind == kindICMP {
		lo, hi = netip.AddrPortFrom(lo.Addr(), 0), netip.AddrPortFrom(hi.Addr(), 0)
	}
	c := Conn{
		ID: e.Connection, Endpoint: k.Endpoint, Direction: e.Direction, Proto: k.Proto, State: ConnState(e.State),
		PeerIdentity: e.PeerIdentity, Service: e.Service,
		Verdict: PolicyVerdict(e.Verdict &^ ctAudited), Audited: e.Verdict&ctAudited != 0, Rule: ruleOf(e.Rule), Slot: slotOf(e.Rule),
		Forward: e.Dir[0], Reverse: e.Dir[1], Expires: e.Expires,
		Known: e.Known, HandshakeUs: e.HandshakeUs, SRTTUs: e.SrttUs, Retransmissions: e.Retransmissions,
		Source: hi, Destination: lo,
	}
	localIsLo := tcCtFlags(e.Flags)&tcCtFlagsCT_LO_IS_LOCAL != 0
	if localIsLo == (e.Direction == DirectionEgress) {
		c.Source, c.Destination = lo, hi
	}
	return c
}
