// SPDX-License-Identifier: Apache-2.0

// Package slot gives filters of policies and routes of services their numbers on this node, each of which stands for one listener of the node's proxy,
// and brings them into force in the one order that leaves no gap: on disk, told to the policy service, so that the proxy learns of them; a socket
// listens; the kernel knows the port; and only then may an entry name the slot. What goes, goes the other way round.
package slot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"time"

	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/statefile"
)

// Max is the highest number. 0 is none.
const Max = 4095

// rest is how long a number that nothing uses is kept from other keys: connections that began on it may live on. When no other number is free, the one
// that has rested the longest is given away before.
const rest = 24 * time.Hour

// ErrFull says that every number is in use.
var ErrFull = errors.New("no slot is free")

// Filter is what a slot is for.
type Filter struct {
	Key        string            `json:"key"`
	Kind       uint8             `json:"kind,omitempty"` // desired.FilterKind
	Direction  desired.Direction `json:"direction,omitempty"`
	Visibility bool              `json:"visibility,omitempty"`
}

// DNS says that weir-dns reads it, not the proxy.
func (f *Filter) DNS() bool { return desired.FilterKind(f.Kind) == desired.FilterDNS }

// Slot is a number that was given.
type Slot struct {
	Number uint16 `json:"number"`
	Filter
	// Since when nothing uses it; zero = something does.
	Since time.Time `json:"since,omitzero"`
}

// table gives out numbers and keeps them on disk. Not safe for concurrent use.
type table struct {
	path    string
	now     func() time.Time
	keys    map[string]*Slot
	numbers map[uint16]*Slot
	next    uint16 // numbers from here on were never given out
	dirty   bool
}

type file struct {
	Next  uint16 `json:"next"`
	Slots []Slot `json:"slots"`
}

const (
	fileKind    = "slots"
	fileVersion = 1
)

// load always returns something to go on with. pinned are numbers that the kernel knows of: those that the file does not have rest, as nobody knows
// whose they were.
func load(path string, pinned map[uint16]uint16, now func() time.Time) (*table, error) {
	t := &table{path: path, now: now, keys: map[string]*Slot{}, numbers: map[uint16]*Slot{}, next: 1}
	b, err := statefile.Read(path, fileKind, fileVersion)
	var f file
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	case err == nil:
		err = json.Unmarshal(b, &f)
	}
	for i := range f.Slots {
		s := &f.Slots[i]
		_, taken := t.numbers[s.Number]
		_, known := t.keys[s.Key]
		if s.Number == 0 || s.Number > Max || taken || known && s.Key != "" {
			err = errors.Join(err, fmt.Errorf("read %s: slot %d of %q: %w", path, s.Number, s.Key, statefile.ErrDamaged))
			continue
		}
		t.put(s)
	}
	t.next = max(t.next, min(f.Next, Max+1))
	for number := range pinned {
		if _, ok := t.numbers[number]; !ok && number > 0 && number <= Max {
			t.put(&Slot{Number: number, Since: now()})
			t.dirty = true
		}
	}
	return t, err
}

func (t *table) put(s *Slot) {
	t.numbers[s.Number] = s
	if s.Key != "" {
		t.keys[s.Key] = s
	}
	t.next = max(t.next, s.Number+1)
}

// take returns the slot of a filter; fresh = it had none, or it rested. What else is said of the filter replaces what was.
func (t *table) take(f Filter) (s *Slot, fresh bool, err error) {
	s = t.keys[f.Key]
	if s == nil {
		if s, err = t.free(); err != nil {
			return nil, false, err
		}
		s = &Slot{Number: s.Number, Filter: f}
		t.put(s)
		t.dirty = true
		return s, true, nil
	}
	if s.Filter != f {
		s.Filter, t.dirty = f, true
	}
	if fresh = !s.Since.IsZero(); fresh {
		s.Since, t.dirty = time.Time{}, true
	}
	return s, fresh, nil
}

// free finds a number: one that was never given out, else one that has rested.
func (t *table) free() (*Slot, error) {
	if t.next <= Max {
		return &Slot{Number: t.next}, nil
	}
	t.expire()
	for n := uint16(1); n <= Max; n++ {
		if _, ok := t.numbers[n]; !ok {
			return &Slot{Number: n}, nil
		}
	}
	var oldest *Slot
	for _, s := range t.numbers {
		if s.Since.IsZero() {
			continue
		}
		if oldest == nil || s.Since.Before(oldest.Since) || s.Since.Equal(oldest.Since) && s.Number < oldest.Number {
			oldest = s
		}
	}
	if oldest == nil {
		return nil, fmt.Errorf("slots are full: %d of %d: %w", t.used(), Max, ErrFull)
	}
	t.remove(oldest)
	return oldest, nil
}

func (t *table) remove(s *Slot) {
	delete(t.numbers, s.Number)
	if t.keys[s.Key] == s {
		delete(t.keys, s.Key)
	}
	t.dirty = true
}

// expire forgets what has rested long enough.
func (t *table) expire() {
	for _, s := range t.numbers {
		if !s.Since.IsZero() && t.now().Sub(s.Since) >= rest {
			t.remove(s)
		}
	}
}

// keep begins the rest of all slots but those of these keys.
func (t *table) keep(used map[string]struct{}) {
	for key, s := range t.keys {
		if _, ok := used[key]; ok || !s.Since.IsZero() {
			continue
		}
		s.Since, t.dirty = t.now(), true
	}
}

func (t *table) used() int {
	n := 0
	for _, s := range t.numbers {
		if s.Since.IsZero() {
			n++
		}
	}
	return n
}

// list returns copies, by number.
func (t *table) list() []Slot {
	all := make([]Slot, 0, len(t.numbers))
	for _, n := range slices.Sorted(maps.Keys(t.numbers)) {
		all = append(all, *t.numbers[n])
	}
	return all
}

func (t *table) save() error {
	if !t.dirty {
		return nil
	}
	b, err := json.Marshal(file{t.next, t.list()})
	if err == nil {
		err = statefile.Write(t.path, fileKind, fileVersion, b)
	}
	if err == nil {
		t.dirty = false
	}
	return err
}
