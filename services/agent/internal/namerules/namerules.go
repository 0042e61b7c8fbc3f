// SPDX-License-Identifier: Apache-2.0

// Package namerules is the agent's end of weir-dns: it tells it which names queries of each slot may ask for, and what policies allow by names, waits for
// it where order matters, and takes in what it saw. While no weir-dns is connected nothing waits: what it has written stays, and new names are
// denied.
package namerules

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// DefaultWait bounds how long a change waits for weir-dns.
const DefaultWait = 2 * time.Second

// Name is what a policy allows to addresses that have a name which matches; exactly one of the first two is set.
type Name struct {
	MatchName, MatchPattern string
	Ranges                  []datapath.PolicyRange
}

// Config says what a server works on.
type Config struct {
	// Record takes what weir-dns saw; it must not block. Lost is told how many records weir-dns had no room for.
	Record func(*agentv1.DNSRecord)
	Lost   func(uint64)
	// Draining, when closed, ends the streams.
	Draining <-chan struct{}
	Now      func() time.Time
	Log      *slog.Logger
}

// Server serves DNSService and is safe for concurrent use.
type Server struct {
	agentv1.UnimplementedDNSServiceServer
	cfg Config
	log *slog.Logger

	mu       sync.Mutex
	known    bool // all rules are
	complete bool // and are told
	revision uint64
	filters  map[uint16]*agentv1.DNSFilter
	policies map[uint32]*agentv1.DNSPolicy
	// Changed since the last Flush.
	touchedFilters  map[uint16]struct{}
	touchedPolicies map[uint32]struct{}
	// gone are policies that had names, with the revision that takes them back.
	gone    map[uint32]uint64
	streams map[*stream]struct{}
	status  Status
	last    uint64 // record
}

// Status says how things stand with weir-dns.
type Status struct {
	Connected bool
	Version   string
	// Revision that was told, Acked what every stream holds.
	Revision, Acked uint64
	// What weir-dns says of itself.
	Names, Addresses, Evicted uint64
	// Since the start.
	Records, Lost, Late uint64
}

// New makes a server that holds everything back until Complete.
func New(cfg Config) *Server {
	return &Server{cfg: cfg, log: cfg.Log.With("component", "namerules"), filters: map[uint16]*agentv1.DNSFilter{}, policies: map[uint32]*agentv1.DNSPolicy{},
		touchedFilters: map[uint16]struct{}{}, touchedPolicies: map[uint32]struct{}{}, gone: map[uint32]uint64{},
		streams: map[*stream]struct{}{}}
}

// SetFilter says what queries that come by a slot may ask for.
func (s *Server) SetFilter(slot uint16, f desired.Filter) {
	m := &agentv1.DNSFilter{Slot: uint32(slot), Visibility: f.Visibility}
	for _, r := range f.DNS {
		m.Rules = append(m.Rules, &policyv1.DNSRule{Rule: ruleOf(r.Rule), MatchName: r.MatchName, MatchPattern: r.MatchPattern})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !proto.Equal(s.filters[slot], m) {
		s.filters[slot] = m
		s.touchedFilters[slot] = struct{}{}
	}
}

// KeepFilters takes all filters back but those of these slots.
func (s *Server) KeepFilters(used func(slot uint16) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for slot := range s.filters {
		if !used(slot) {
			delete(s.filters, slot)
			s.touchedFilters[slot] = struct{}{}
		}
	}
}

// SetPolicy says what a policy allows by names. Its rows are written; it is told again when they change.
func (s *Server) SetPolicy(number uint32, names []Name) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(names) == 0 {
		if _, ok := s.policies[number]; ok {
			delete(s.policies, number)
			s.touchedPolicies[number] = struct{}{}
			s.gone[number] = s.revision + 1 // the next one has it
		}
		return
	}
	m := &agentv1.DNSPolicy{Policy: number}
	for _, n := range names {
		m.Names = append(m.Names, &agentv1.DNSName{MatchName: n.MatchName, MatchPattern: n.MatchPattern, Ranges: rangesOf(n.Ranges)})
	}
	s.policies[number] = m
	s.touchedPolicies[number] = struct{}{}
	delete(s.gone, number)
}

// Gone says that a policy has no names, and that every weir-dns that is connected, and at least one, has said that its maps hold nothing of it. It is to
// be asked of policies that are taken back, until it is true.
func (s *Server) Gone(number uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, has := s.policies[number]; has || len(s.streams) == 0 {
		return false
	}
	// The first revision is the whole: what an agent of before has told goes with it.
	revision := max(s.gone[number], 1)
	for st := range s.streams {
		if st.acked < revision {
			return false
		}
	}
	delete(s.gone, number)
	return true
}

func rangesOf(list []datapath.PolicyRange) []*agentv1.DNSRange {
	var out []*agentv1.DNSRange
	for _, r := range list {
		out = append(out, &agentv1.DNSRange{Protocol: uint32(r.Proto), First: uint32(r.First), Last: uint32(r.Last), Rule: r.Rule, Slot: uint32(r.Slot),
			Visibility: r.Verdict == datapath.PolicyVisible})
	}
	return out
}

func ruleOf(r desired.PolicyRule) *policyv1.PolicyRule {
	return &policyv1.PolicyRule{Kind: r.Kind, Namespace: r.Namespace, Name: r.Name, Uid: r.UID, Spec: r.Spec, List: r.List, Index: r.Index, Log: r.Log, Labels: r.Labels,
		Implicit: r.Implicit}
}

// Complete says that all rules are known: with the next Flush weir-dns is told.
func (s *Server) Complete() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known = true
}

// Flush tells weir-dns what changed, and returns when it holds that, or after a while. A weir-dns that did not answer in time is not waited for again
// before it has caught up. wait 0 = it is told, and not waited for.
func (s *Server) Flush(wait time.Duration) {
	revision, ok := s.commit()
	if !ok || wait == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	for _, st := range s.prompt() {
		if !st.await(ctx, revision) {
			s.mu.Lock()
			s.status.Late++
			st.late = true
			s.mu.Unlock()
			s.log.Warn("weir-dns has not taken a change in time; new names may be denied until it has", "revision", revision)
		}
	}
}

// commit makes a revision of what changed. The first one has all.
func (s *Server) commit() (uint64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := s.known && !s.complete
	if !s.known || !first && len(s.touchedFilters)+len(s.touchedPolicies) == 0 {
		return 0, false
	}
	s.complete = true
	s.revision++
	for st := range s.streams {
		st.whole = st.whole || first
		maps.Copy(st.filters, s.touchedFilters)
		maps.Copy(st.policies, s.touchedPolicies)
		st.signal()
	}
	clear(s.touchedFilters)
	clear(s.touchedPolicies)
	return s.revision, true
}

// prompt lists the streams that answer in time.
func (s *Server) prompt() []*stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Collect(maps.Keys(s.streams)), func(st *stream) bool { return st.late })
}

// Status returns how things stand.
func (s *Server) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	st.Connected, st.Revision, st.Acked = len(s.streams) > 0, s.revision, s.revision
	for x := range s.streams {
		st.Acked = min(st.Acked, x.acked)
	}
	return st
}
