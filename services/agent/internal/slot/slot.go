// SPDX-License-Identifier: Apache-2.0

package slot

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// PortBase plus a slot's number is the port of its listener.
const PortBase = 20000

const (
	// defaultWait bounds how long one change of the state waits for listeners.
	defaultWait = 2 * time.Second
	// pollInterval is how often it is looked for them. A look is one netlink call.
	pollInterval = 10 * time.Millisecond
	// linger is how long a listener stays when nothing leads to it any more: connections that have just begun there come to their first request.
	linger = 10 * time.Second
	// recently is how long a proxy that was seen is taken to be there: it may be restarting.
	recently = 15 * time.Second
)

// Kernel is the map of listeners' ports (datapath.Slots).
type Kernel interface {
	Set(slot, port uint16) error
	Delete(slot uint16) error
	List() (map[uint16]uint16, error)
}

// Config says what slots work on.
type Config struct {
	// Path of the file that keeps the numbers.
	Path   string
	Kernel Kernel
	// Listening returns the TCP ports of 127.0.0.1 at which a socket listens.
	Listening func() (map[uint16]struct{}, error)
	// DNSPort is weir-dns's. ProxyPort is one at which a proxy listens whatever its configuration; 0 = none is known.
	DNSPort, ProxyPort uint16
	// Report is told all slots that have a listener, after each change.
	Report func([]Slot)
	// Wait bounds how long one change waits for listeners; 0 = 2 s. Tick, for tests, replaces the time between two looks.
	Wait time.Duration
	Tick func() <-chan time.Time
	Now  func() time.Time
	Log  *slog.Logger
}

// Slots is safe for concurrent use, but Prepare and Keep must not run at the same time.
type Slots struct {
	cfg Config
	log *slog.Logger

	mu     sync.Mutex
	table  *table
	rows   map[uint16]uint16 // as the kernel has them
	told   []Slot            // last reported
	seen   time.Time         // a proxy
	missed uint64            // listeners that did not come in time
}

// New takes over what an earlier agent left. The error says that the kernel's map cannot be read.
func New(cfg Config) (*Slots, error) {
	if cfg.Wait == 0 {
		cfg.Wait = defaultWait
	}
	if cfg.Tick == nil {
		cfg.Tick = func() <-chan time.Time { return time.After(pollInterval) }
	}
	s := &Slots{cfg: cfg, log: cfg.Log.With("component", "slot")}
	var err error
	if s.rows, err = cfg.Kernel.List(); err != nil {
		return nil, fmt.Errorf("list slots: %w", err)
	}
	if s.table, err = load(cfg.Path, s.rows, cfg.Now); err != nil {
		// Numbers that are pinned are given to nobody else; those of live policies come anew.
		s.log.Error("numbers of slots were not read", "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.table.list() {
		if !x.Since.IsZero() {
			continue
		}
		if err := s.setRow(&x); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// PortOf is where a slot's listener is.
func (s *Slots) PortOf(x *Slot) uint16 {
	if x.DNS() {
		return s.cfg.DNSPort
	}
	return PortBase + x.Number
}

func (s *Slots) setRow(x *Slot) error {
	port := s.PortOf(x)
	if s.rows[x.Number] == port {
		return nil
	}
	if err := s.cfg.Kernel.Set(x.Number, port); err != nil {
		return fmt.Errorf("slot %d: %w", x.Number, err)
	}
	s.rows[x.Number] = port
	return nil
}

// Prepare gives slots to filters that policies or services are about to name. It returns when sockets listen for those that are new, or after a while;
// quiet = they come from disk: then it does not wait. That there is no slot for one is said by Of.
func (s *Slots) Prepare(filters []Filter, quiet bool) error {
	s.mu.Lock()
	var fresh []*Slot
	for _, f := range filters {
		x, isFresh, err := s.table.take(f)
		if err != nil {
			continue
		}
		if isFresh {
			fresh = append(fresh, x)
		}
	}
	if len(fresh) == 0 {
		s.save()
		s.mu.Unlock()
		return nil
	}
	s.save()
	s.report()
	wait := map[uint16]string{}
	for _, x := range fresh {
		if !x.DNS() {
			wait[s.PortOf(x)] = x.Key
		}
	}
	s.mu.Unlock()
	if !quiet && len(wait) > 0 {
		s.wait(wait)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, x := range fresh {
		errs = append(errs, s.setRow(x))
	}
	return errors.Join(errs...)
}

// wait waits until sockets listen at all of the ports, as far as there is a proxy.
func (s *Slots) wait(ports map[uint16]string) {
	began := s.cfg.Now()
	if !s.Proxy() {
		return
	}
	for {
		have, err := s.cfg.Listening()
		if err != nil {
			s.log.Error("listeners were not looked for", "error", err)
			return
		}
		for p := range ports {
			if _, ok := have[p]; ok {
				delete(ports, p)
			}
		}
		if len(ports) == 0 {
			return
		}
		if s.cfg.Now().Sub(began) >= s.cfg.Wait {
			s.mu.Lock()
			s.missed += uint64(len(ports))
			s.mu.Unlock()
			s.log.Warn("the proxy does not listen yet; connections that need it are dropped until it does",
				"slots", len(ports), "filter", ports[slices.Min(slices.Collect(maps.Keys(ports)))])
			return
		}
		<-s.cfg.Tick()
	}
}

// Proxy looks for the node's proxy, and says whether it listens, or did a moment ago.
func (s *Slots) Proxy() bool {
	have, err := s.cfg.Listening()
	if err != nil {
		s.log.Error("listeners were not looked for", "error", err)
	}
	now := s.cfg.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cfg.isProxy(have) {
		s.seen = now
	}
	return !s.seen.IsZero() && now.Sub(s.seen) < recently
}

func (c *Config) isProxy(ports map[uint16]struct{}) bool {
	for p := range ports {
		if p > PortBase && p <= PortBase+Max || p != 0 && p == c.ProxyPort {
			return true
		}
	}
	return false
}

// Of returns the number of a filter's slot, a new one if it has none. The error wraps ErrFull.
func (s *Slots) Of(f Filter) (uint16, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x, fresh, err := s.table.take(f)
	if err != nil {
		return 0, err
	}
	if fresh {
		s.save()
		s.report()
	}
	return x.Number, s.setRow(x)
}

// Keep lets all slots rest but those of these keys. Nothing in the kernel names one any more.
func (s *Slots) Keep(used map[string]struct{}) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.table.keep(used)
	s.table.expire()
	var errs []error
	for number := range s.rows {
		if x := s.table.numbers[number]; x != nil && x.Since.IsZero() {
			continue
		}
		if err := s.cfg.Kernel.Delete(number); err != nil {
			errs = append(errs, fmt.Errorf("slot %d: %w", number, err))
			continue
		}
		delete(s.rows, number)
	}
	s.save()
	s.report()
	return errors.Join(errs...)
}

// Settle reports slots as gone whose listeners are not needed any more. Call it now and then.
func (s *Slots) Settle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.told) > 0 {
		s.report()
	}
}

func (s *Slots) save() {
	if err := s.table.save(); err != nil {
		// They are good until the next restart; then what is pinned is given to nobody else.
		s.log.Error("numbers of slots were not saved", "error", err)
	}
}

// report tells which slots have a listener, if others have than before.
func (s *Slots) report() {
	list := s.listedLocked()
	same := slices.EqualFunc(list, s.told, func(a, b Slot) bool { return a.Number == b.Number && a.Key == b.Key })
	if s.cfg.Report == nil || same {
		return
	}
	s.told = list
	s.cfg.Report(list)
}

func (s *Slots) listedLocked() []Slot {
	now := s.cfg.Now()
	return slices.DeleteFunc(s.table.list(), func(x Slot) bool { return x.Key == "" || !x.Since.IsZero() && now.Sub(x.Since) >= linger })
}

// Listed lists the slots that have a listener, by number, as if they were reported.
func (s *Slots) Listed() []Slot {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told = s.listedLocked()
	return s.told
}

// Known says that no slot of an earlier agent is forgotten: what is in use now is all that the kernel names.
func (s *Slots) Known() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for number := range s.rows {
		if x := s.table.numbers[number]; x == nil || x.Key == "" {
			return false
		}
	}
	return true
}

// Get returns the slot of a number, in use or resting.
func (s *Slots) Get(number uint16) (Slot, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x := s.table.numbers[number]; x != nil && x.Key != "" {
		return *x, true
	}
	return Slot{}, false
}

// Row is a slot and where its listener is.
type Row struct {
	Slot
	// Port of the listener, Kernel what the kernel knows of it; 0 = nothing.
	Port, Kernel uint16
	Listening    bool
}

// Rows lists all slots by number.
func (s *Slots) Rows() ([]Row, error) {
	have, err := s.cfg.Listening()
	s.mu.Lock()
	defer s.mu.Unlock()
	var rows []Row
	for _, x := range s.table.list() {
		r := Row{Slot: x, Port: s.PortOf(&x), Kernel: s.rows[x.Number]}
		_, r.Listening = have[r.Port]
		rows = append(rows, r)
	}
	return rows, err
}

// Port returns the port of a slot's listener as the kernel knows it; 0 = it does not.
func (s *Slots) Port(number uint16) uint16 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rows[number]
}

// Stats counts.
type Stats struct {
	Used, Resting, Max int
	// Missed counts listeners that did not come in time.
	Missed uint64
}

// Stats returns the counts of now.
func (s *Slots) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	used := s.table.used()
	return Stats{Used: used, Resting: len(s.table.numbers) - used, Max: Max, Missed: s.missed}
}

// OfPolicy lists the filters of a policy.
func OfPolicy(p *desired.Policy) []Filter {
	var all []Filter
	for i := range p.Filters {
		f := &p.Filters[i]
		all = append(all, Filter{Key: f.Key, Kind: uint8(f.Kind), Direction: p.Direction, Visibility: f.Visibility})
	}
	return all
}

// OfService lists the routes of a service.
func OfService(s *desired.Service) []Filter {
	var all []Filter
	for _, p := range s.Ports {
		if p.Route != "" {
			all = append(all, Filter{Key: p.Route, Kind: uint8(desired.FilterRoute), Direction: desired.Egress})
		}
	}
	return all
}
