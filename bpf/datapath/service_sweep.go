// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
)

// ServiceSweep says what a Sweep found.
type ServiceSweep struct {
	// Live and Collected count connections that are translated packet by packet.
	Live, Collected int
	Took            time.Duration
}

// Sweep collects connections that are translated packet by packet and have been silent for as long as their kind may be, with the ports that
// they had claimed. Without it they go when the map needs their room.
func (s *Services) Sweep() (ServiceSweep, error) {
	start, now := time.Now(), Now()
	var stats ServiceSweep
	expired := map[tcNatKey]tcLbEntry{}
	rows := 0
	err := walkMap(s.maps.connections, func(k tcNatKey, v tcLbEntry) {
		rows++
		if v.Expires <= now {
			expired[k] = v
		} else if k.Kind == uint8(tcNatKindLB_FORWARD) {
			stats.Live++
		}
	})
	if err != nil {
		return stats, fmt.Errorf("read connections of services: %w", err)
	}
	var errs []error
	for k, v := range expired {
		other := partner(k, v)
		if _, ok := expired[other]; !ok {
			var row tcLbEntry
			if err := s.maps.connections.Lookup(other, &row); err == nil {
				if k.Kind == uint8(tcNatKindLB_FORWARD) {
					stats.Live++
				}
				continue // the other direction is in use
			}
		}
		for _, key := range []tcNatKey{k, other} {
			err := s.maps.connections.Delete(key)
			if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				errs = append(errs, fmt.Errorf("delete connection of a service: %w", err))
			}
			if err == nil {
				rows--
			}
		}
		if k.Kind == uint8(tcNatKindLB_FORWARD) {
			stats.Collected++
			errs = append(errs, s.releaseClaim(k, v))
		}
		delete(expired, k)
	}
	s.mu.Lock()
	s.tracked = rows
	s.mu.Unlock()
	stats.Took = time.Since(start)
	return stats, errors.Join(errs...)
}

// partner is the key of a connection's row of the other kind.
func partner(k tcNatKey, v tcLbEntry) tcNatKey {
	hairpin := v.Flags&uint8(tcLbFlagsLB_HAIRPIN) != 0
	if k.Kind == uint8(tcNatKindLB_FORWARD) {
		other := tcNatKey{Src: v.Addr, Dst: k.Src, Sport: v.Port, Dport: k.Sport, Proto: k.Proto, Kind: uint8(tcNatKindLB_REVERSE)}
		if hairpin {
			other.Dst = k.Dst
		}
		return other
	}
	other := tcNatKey{Src: k.Dst, Dst: v.Addr, Sport: k.Dport, Dport: v.Port, Proto: k.Proto, Kind: uint8(tcNatKindLB_FORWARD)}
	if hairpin {
		other.Src = k.Src
	}
	return other
}

// releaseClaim gives the port back that a forwarded connection had.
func (s *Services) releaseClaim(k tcNatKey, v tcLbEntry) error {
	out := tcNatKey{Src: k.Src, Dst: v.Addr, Sport: k.Sport, Dport: v.Port, Proto: k.Proto, Kind: uint8(tcNatKindNAT_OUT)}
	var claim tcNatEntry
	err := s.maps.nat.Lookup(out, &claim)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("claimed port: %w", err)
	}
	in := tcNatKey{Src: out.Dst, Dst: claim.Addr, Sport: out.Dport, Dport: claim.Port, Proto: out.Proto, Kind: uint8(tcNatKindNAT_IN)}
	for _, key := range []tcNatKey{in, out} {
		if err := s.maps.nat.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("release claimed port: %w", err)
		}
	}
	return nil
}
