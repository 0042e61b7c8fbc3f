// SPDX-License-Identifier: Apache-2.0

package state

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
)

// Slot is a number that a node's agent gave the listener of a filter.
type Slot struct {
	Number uint16
	Key    string
	Port   uint16
}

// MaxSlot is the highest number of a slot.
const MaxSlot = 4095

// maxFilterKey is the length of the longest key of a filter.
const maxFilterKey = 63

// ErrSlots is what SetSlots returns for a report that no agent makes.
var ErrSlots = errors.New("the report of slots is not in order")

// SetSlots takes in all slots that a node's agent has given.
func (s *State) SetSlots(node string, slots []Slot) error {
	seen := map[uint16]bool{}
	keys := map[string]bool{}
	for _, slot := range slots {
		switch {
		case slot.Number == 0 || slot.Number > MaxSlot:
			return fmt.Errorf("%w: slot %d is not in 1..%d", ErrSlots, slot.Number, MaxSlot)
		case seen[slot.Number]:
			return fmt.Errorf("%w: slot %d is there twice", ErrSlots, slot.Number)
		case slot.Key == "" || len(slot.Key) > maxFilterKey:
			return fmt.Errorf("%w: slot %d has the key %.80q", ErrSlots, slot.Number, slot.Key)
		case keys[slot.Key]:
			return fmt.Errorf("%w: the key %q has two slots", ErrSlots, slot.Key)
		}
		seen[slot.Number], keys[slot.Key] = true, true
	}
	a := s.agents[node]
	if a == nil {
		return nil // its node is gone
	}
	slots = slices.Clone(slots)
	slices.SortFunc(slots, func(x, y Slot) int { return cmp.Compare(x.Number, y.Number) })
	if a.reported && slices.Equal(a.slots, slots) {
		return nil
	}
	for _, slot := range slots {
		s.slotUses[slot.Key]++
	}
	s.dropSlots(node)
	a.reported, a.slots, s.renderSlotsStale = true, slots, true
	return nil
}

// dropSlots forgets the slots of a node.
func (s *State) dropSlots(node string) {
	a := s.agents[node]
	if a == nil {
		return
	}
	for _, slot := range a.slots {
		if s.slotUses[slot.Key]--; s.slotUses[slot.Key] == 0 {
			delete(s.slotUses, slot.Key)
		}
	}
	a.slots, s.renderSlotsStale = nil, true
}
