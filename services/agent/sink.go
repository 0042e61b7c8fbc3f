// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"maps"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/mirror"
	"github.com/weirmesh/weir/services/agent/internal/namerules"
	"github.com/weirmesh/weir/services/agent/internal/policymap"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

// sink takes the desired state into the kernel in the one order that leaves no gap: policies know a peer before an address names it, endpoints get
// policies when all addresses that these need are there, and what left goes last.
type sink struct {
	slots    *slot.Slots
	names    *namerules.Server
	policies *policymap.Engine
	mirror   *mirror.Mirror
}

// Apply implements policysync.Sink.
func (s sink) Apply(changes []desired.Change, quiet bool) error {
	// Listeners first, then what names their slots.
	if err := s.slots.Prepare(filtersOf(changes), quiet); err != nil {
		return fmt.Errorf("write slots: %w", err)
	}
	if err := s.policies.Prepare(changes, quiet); err != nil {
		// Addresses that policies do not know yet must not be named.
		return fmt.Errorf("write policies: %w", err)
	}
	if quiet && !s.policies.Frozen() {
		s.names.Complete() // nothing is pinned: the state on disk is the best there is
	}
	// weir-dns has its part before an endpoint gets the policy.
	s.names.Flush(namerules.DefaultWait)
	err := s.mirror.Apply(changes, quiet, func(unplaced []mirror.Unplaced) error {
		s.policies.Place(placing(unplaced))
		return s.policies.Switch()
	})
	if s.mirror.TakeChanged() {
		err = errors.Join(err, s.policies.AddressesChanged())
	}
	if err != nil {
		return err
	}
	if err := s.policies.Finish(); err != nil {
		return fmt.Errorf("remove policies: %w", err)
	}
	return s.rest()
}

// filtersOf lists what changed policies and services name.
func filtersOf(changes []desired.Change) []slot.Filter {
	var all []slot.Filter
	for _, c := range changes {
		switch x := c.New.(type) {
		case *desired.Policy:
			all = append(all, slot.OfPolicy(x)...)
		case *desired.Service:
			all = append(all, slot.OfService(x)...)
		}
	}
	return all
}

// rest lets slots go that nothing names any more.
func (s sink) rest() error {
	if s.policies.Frozen() {
		return nil // what is pinned may name others than the state from disk
	}
	used := s.policies.Filters()
	maps.Copy(used, s.mirror.Routes())
	if err := s.slots.Keep(used); err != nil {
		return fmt.Errorf("remove slots: %w", err)
	}
	s.names.KeepFilters(func(number uint16) bool {
		x, ok := s.slots.Get(number)
		return ok && x.Since.IsZero()
	})
	s.names.Flush(0)
	return nil
}

func placing(list []mirror.Unplaced) map[string]policymap.Unplaced {
	all := make(map[string]policymap.Unplaced, len(list))
	for _, u := range list {
		all[u.Peer] = policymap.Unplaced{Around: u.Around, Err: u.Err}
	}
	return all
}

// retry writes again what failed or found no room.
func (s sink) retry() error {
	errs := []error{s.mirror.Retry()}
	s.policies.Place(placing(s.mirror.Unplaced()))
	errs = append(errs, s.policies.Switch())
	if s.mirror.TakeChanged() {
		errs = append(errs, s.policies.AddressesChanged())
	}
	errs = append(errs, s.policies.Retry())
	s.names.Flush(0)
	return errors.Join(errs...)
}

// Prune implements policysync.Sink.
func (s sink) Prune() error {
	err := s.policies.Prune(func() {
		s.names.Complete()
		s.names.Flush(namerules.DefaultWait)
	})
	s.names.Flush(0)
	if err != nil {
		return fmt.Errorf("write policies: %w", err)
	}
	err = s.mirror.Prune()
	if s.mirror.TakeChanged() {
		err = errors.Join(err, s.policies.AddressesChanged())
	}
	return errors.Join(err, s.rest())
}

// adopt takes over what an earlier agent has left in the maps.
func (n *node) adopt() error {
	rows, err := n.datapath.IPCache().List()
	if err != nil {
		return err
	}
	n.policies.RecoverPeers(rows)
	if err := n.mirror.Adopt(); err != nil {
		return err
	}
	return n.policies.Adopt(policymap.HostKey, datapath.HostEndpoint)
}
