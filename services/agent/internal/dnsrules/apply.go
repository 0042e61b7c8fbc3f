// SPDX-License-Identifier: Apache-2.0

package dnsrules

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/agent/internal/dnsnames"
	"github.com/weirmesh/weir/services/agent/internal/statefile"
)

const (
	fileKind    = "dns-rules"
	fileVersion = 1

	// Writing rules to disk takes at most this part of the time.
	saveShare    = 20
	saveInterval = 50 * time.Millisecond
)

// session is what one stream of the agent has said so far: by its end of the first state, what was not among it is gone.
type session struct {
	slots    map[uint16]struct{}
	policies map[uint32]struct{}
	synced   bool
	disk     bool // it is what an earlier process kept
}

func newSession() *session {
	return &session{slots: map[uint16]struct{}{}, policies: map[uint32]struct{}{}}
}

// apply takes a message of a stream. done is called when the maps hold it; it must not block. What cannot be read is left out, and told in the error.
func (r *Rules) apply(s *session, m *agentv1.SyncDNSResponse, done func()) error {
	var errs []error
	upserts := make([]dnsnames.Policy, 0, len(m.GetPolicies()))
	removed := m.GetRemovedPolicies()
	complete := m.GetSynced() && !s.synced
	r.mu.Lock()
	r.revision = m.GetRevision()
	for _, f := range m.GetFilters() {
		if f.GetSlot() == 0 || f.GetSlot() > datapath.MaxSlot {
			errs = append(errs, fmt.Errorf("filter of slot %d: no such slot", f.GetSlot()))
			continue
		}
		slot := uint16(f.GetSlot())
		r.filters[slot] = newFilter(f)
		s.slots[slot] = struct{}{}
	}
	for _, slot := range m.GetRemovedFilters() {
		delete(r.filters, uint16(min(slot, math.MaxUint16)))
	}
	for _, p := range m.GetPolicies() {
		converted, err := policyOf(p)
		if err != nil {
			errs = append(errs, err)
		}
		r.policies[p.GetPolicy()] = p
		s.policies[p.GetPolicy()] = struct{}{}
		upserts = append(upserts, converted)
	}
	for _, number := range removed {
		delete(r.policies, number)
	}
	if complete {
		s.synced = true
		removed = append(removed, r.pruneLocked(s)...)
		r.known = true
	}
	r.mu.Unlock()
	// What is on disk may be older than what an earlier process wrote: only an agent's word is complete.
	r.names.Update(upserts, removed, complete && !s.disk, done)
	if m.GetSynced() {
		r.names.Settle()
	}
	select {
	case r.save <- struct{}{}:
	default:
	}
	return errors.Join(errs...)
}

// pruneLocked removes what a stream's first state does not have.
func (r *Rules) pruneLocked(s *session) (removed []uint32) {
	for slot := range r.filters {
		if _, ok := s.slots[slot]; !ok {
			delete(r.filters, slot)
		}
	}
	for number := range r.policies {
		if _, ok := s.policies[number]; !ok {
			delete(r.policies, number)
			removed = append(removed, number)
		}
	}
	return removed
}

// policyOf converts a policy. A range that cannot be read allows nothing.
func policyOf(m *agentv1.DNSPolicy) (dnsnames.Policy, error) {
	var errs []error
	p := dnsnames.Policy{Number: m.GetPolicy()}
	if p.Number == 0 || p.Number > datapath.MaxPolicy {
		return p, fmt.Errorf("policy %d: no such number", p.Number)
	}
	for _, n := range m.GetNames() {
		s := dnsnames.Selector{NameSelector: policy.NameSelector{MatchName: n.GetMatchName(), MatchPattern: n.GetMatchPattern()}}
		if s.NameSelector == (policy.NameSelector{}) {
			errs = append(errs, fmt.Errorf("policy %d: a selector without name or pattern", p.Number))
			continue
		}
		for _, x := range n.GetRanges() {
			if x.GetProtocol() > math.MaxUint8 || x.GetFirst() > x.GetLast() || x.GetLast() > math.MaxUint16 || x.GetSlot() > datapath.MaxSlot ||
				x.GetRule() > datapath.MaxRule {
				errs = append(errs, fmt.Errorf("policy %d: range %v", p.Number, x))
				continue
			}
			s.Ranges = append(s.Ranges, dnsnames.Range{
				Proto: uint8(x.GetProtocol()), First: uint16(x.GetFirst()), Last: uint16(x.GetLast()), Rule: x.GetRule(), Slot: uint16(x.GetSlot()),
				Visibility: x.GetVisibility(),
			})
		}
		p.Names = append(p.Names, s)
	}
	return p, errors.Join(errs...)
}

// Load reads the rules that an earlier process kept. fs.ErrNotExist: there are none.
func (r *Rules) Load() error {
	if r.file == "" {
		return fs.ErrNotExist
	}
	payload, err := statefile.Read(r.file, fileKind, fileVersion)
	if err != nil {
		return err
	}
	m := &agentv1.SyncDNSResponse{}
	if err := proto.Unmarshal(payload, m); err != nil {
		return fmt.Errorf("read %s: %w", r.file, err)
	}
	m.Synced = true
	s := newSession()
	s.disk = true
	return r.apply(s, m, nil)
}

// Run saves the rules when they have changed, until ctx ends.
func (r *Rules) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			select {
			case <-r.save:
				return r.Save()
			default:
				return nil
			}
		case <-r.save:
		}
		began := time.Now()
		if err := r.Save(); err != nil {
			r.log.Error("rules are not on disk", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(max(saveInterval, saveShare*time.Since(began))):
		}
	}
}

// Save writes the rules, if they are known.
func (r *Rules) Save() error {
	r.mu.RLock()
	if r.file == "" || !r.known {
		r.mu.RUnlock()
		return nil
	}
	m := &agentv1.SyncDNSResponse{Revision: r.revision}
	for _, f := range r.filters {
		m.Filters = append(m.Filters, f.message)
	}
	for _, p := range r.policies {
		m.Policies = append(m.Policies, p)
	}
	r.mu.RUnlock()
	payload, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("rules: %w", err)
	}
	return statefile.Write(r.file, fileKind, fileVersion, payload)
}
