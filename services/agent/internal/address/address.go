// SPDX-License-Identifier: Apache-2.0

// Package address gives out the addresses of a node's pod CIDRs and the numbers of its endpoints. What was never used comes first, then
// what has been free the longest; what was freed rests, so that a late packet or a stale cache entry does not meet the next owner.
package address

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

var (
	// ErrExhausted says that nothing is free, or that all that is free still rests.
	ErrExhausted = errors.New("no address is free")
	// ErrTaken says that a fixed address has an owner.
	ErrTaken = errors.New("address is taken")
	// ErrOutside says that a fixed address is not of this pool, or reserved in it.
	ErrOutside = errors.New("address is outside of the pool")
)

// maxFresh bounds how far into a prefix never-used addresses are taken: an IPv6 /64 has no end that matters.
const maxFresh = 1 << 12

// Freed is an address without an owner, and since when.
type Freed struct {
	Addr  netip.Addr `json:"addr"`
	Since time.Time  `json:"since"`
}

// Memory is what a pool has to remember across restarts beside the addresses that endpoints hold.
type Memory struct {
	// Next is the offset of the first address that was never given out.
	Next uint64 `json:"next"`
	// Freed addresses, longest free first.
	Freed []Freed `json:"freed"`
}

// Pool is one prefix. Not safe for concurrent use.
type Pool struct {
	prefix netip.Prefix
	rest   time.Duration
	size   uint64
	taken  map[netip.Addr]struct{}
	mem    Memory
}

// NewPool makes a pool of the prefix less its first two addresses and, for IPv4, its last. A freed address rests for the given time.
func NewPool(prefix netip.Prefix, rest time.Duration, mem Memory) *Pool {
	prefix = prefix.Masked()
	p := &Pool{prefix: prefix, rest: rest, taken: map[netip.Addr]struct{}{}, mem: mem}
	host := prefix.Addr().BitLen() - prefix.Bits()
	p.size = maxFresh
	if host < 12 {
		p.size = 1 << host
	}
	p.mem.Next = max(p.mem.Next, 2) // network and gateway by custom
	p.mem.Freed = slices.DeleteFunc(slices.Clone(mem.Freed), func(f Freed) bool { return !prefix.Contains(f.Addr) })
	return p
}

// Prefix is the pool's prefix.
func (p *Pool) Prefix() netip.Prefix { return p.prefix }

// Memory is what NewPool wants back after a restart.
func (p *Pool) Memory() Memory {
	return Memory{Next: p.mem.Next, Freed: slices.Clone(p.mem.Freed)}
}

// Taken counts the addresses that have an owner.
func (p *Pool) Taken() int { return len(p.taken) }

// Take gives out an address.
func (p *Pool) Take(now time.Time) (netip.Addr, error) {
	for ; p.mem.Next < p.size; p.mem.Next++ {
		a := p.at(p.mem.Next)
		if _, ok := p.taken[a]; ok || !p.usable(a) || p.wasFreed(a) {
			continue
		}
		p.mem.Next++
		p.taken[a] = struct{}{}
		return a, nil
	}
	for i, f := range p.mem.Freed {
		if now.Sub(f.Since) < p.rest {
			return netip.Addr{}, fmt.Errorf("pool %s: %d freed addresses rest for %s: %w", p.prefix, len(p.mem.Freed)-i, p.rest, ErrExhausted)
		}
		if _, ok := p.taken[f.Addr]; ok {
			continue
		}
		p.mem.Freed = slices.Delete(p.mem.Freed, i, i+1)
		p.taken[f.Addr] = struct{}{}
		return f.Addr, nil
	}
	return netip.Addr{}, fmt.Errorf("pool %s: %w", p.prefix, ErrExhausted)
}

// Claim gives out one given address, rested or not: whoever asks for a fixed address wants that one.
func (p *Pool) Claim(a netip.Addr) error {
	if !p.usable(a) {
		return fmt.Errorf("%s in pool %s: %w", a, p.prefix, ErrOutside)
	}
	if _, ok := p.taken[a]; ok {
		return fmt.Errorf("%s: %w", a, ErrTaken)
	}
	p.taken[a] = struct{}{}
	p.mem.Freed = slices.DeleteFunc(p.mem.Freed, func(f Freed) bool { return f.Addr == a })
	return nil
}

// Release takes an address back. Releasing what has no owner does nothing.
func (p *Pool) Release(a netip.Addr, now time.Time) {
	if _, ok := p.taken[a]; !ok {
		return
	}
	delete(p.taken, a)
	p.mem.Freed = append(p.mem.Freed, Freed{Addr: a, Since: now})
}

func (p *Pool) wasFreed(a netip.Addr) bool {
	return slices.ContainsFunc(p.mem.Freed, func(f Freed) bool { return f.Addr == a })
}

// usable excludes the prefix's own address, the one after it and the IPv4 broadcast address.
func (p *Pool) usable(a netip.Addr) bool {
	if !p.prefix.Contains(a) {
		return false
	}
	first := p.prefix.Addr()
	return a != first && a != first.Next() && (a.Is6() || p.prefix.Contains(a.Next()))
}

// at adds an offset to the prefix's address.
func (p *Pool) at(offset uint64) netip.Addr {
	b := p.prefix.Addr().AsSlice()
	for i := len(b) - 1; i >= 0 && offset > 0; i-- {
		sum := uint64(b[i]) + offset&0xff
		b[i] = byte(sum)
		offset = offset>>8 + sum>>8
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// IDs gives out endpoint numbers 1..65534 (65535 is the node itself), round robin, so that a number is used again as late as possible. Not safe for concurrent use.
type IDs struct {
	next  uint16
	taken map[uint16]struct{}
}

// NewIDs resumes after the number `last`; 0 begins anew.
func NewIDs(last uint16) *IDs { return &IDs{next: last, taken: map[uint16]struct{}{}} }

// Last is what NewIDs wants back after a restart.
func (s *IDs) Last() uint16 { return s.next }

// Take gives out a number.
func (s *IDs) Take() (uint16, error) {
	for range 1 << 16 {
		s.next++
		if s.next == 0 || s.next == 65535 {
			continue
		}
		if _, ok := s.taken[s.next]; !ok {
			s.taken[s.next] = struct{}{}
			return s.next, nil
		}
	}
	return 0, errors.New("no endpoint number is free")
}

// Claim marks a number as owned; false if it already is.
func (s *IDs) Claim(id uint16) bool {
	if _, ok := s.taken[id]; ok || id == 0 {
		return false
	}
	s.taken[id] = struct{}{}
	return true
}

// Release takes a number back.
func (s *IDs) Release(id uint16) { delete(s.taken, id) }
