// SPDX-License-Identifier: Apache-2.0

// Package accesslog takes the access log of the node's proxy, whichever speaks Envoy's AccessLogService, and makes requests for flows of it.
//
// A request is told when it was let through, and its response when it ended; a denied one is told once. A proxy may say that a request has begun before it
// decides: then the request waits for a moment, as a denial ends it at once.
package accesslog

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

const (
	// hold is how long a request waits that has begun and may still be denied.
	hold = time.Second
	// maxBegun bounds the requests of one stream that have begun and not ended; of more, request and response are told at the end.
	maxBegun = 16384
	// rulesFor is how long the rules of a filter are remembered.
	rulesFor = 2 * time.Second
)

// Config says what a server works on.
type Config struct {
	// Slot finds the slot of a listener.
	Slot func(number uint16) (slot.Slot, bool)
	// Rules lists the rules that items of a filter may be of.
	Rules func(filter string) []desired.PolicyRule
	// Identity is who has an address, as the kernel knows it.
	Identity func(netip.Addr) uint32
	// Put takes a request; it must not block. Lost and Malformed count entries that did not come, or made no sense.
	Put       func(*flow.Request)
	Lost      func(uint64)
	Malformed func()
	Headers   Headers
	// Query shows the query of URLs.
	Query bool
	// Shift is added to all times.
	Shift time.Duration
	// Draining, when closed, ends the streams.
	Draining <-chan struct{}
	Now      func() time.Time
	Log      *slog.Logger
}

// Server serves AccessLogService and is safe for concurrent use.
type Server struct {
	cfg Config
	log *slog.Logger

	mu    sync.Mutex
	known map[string]ruleSet // by key of a filter
	books map[string]book    // by log name
	stats Stats
}

// ruleSet is rules by the names that RBAC policies have.
type ruleSet struct {
	names map[string][]desired.PolicyRule // one each
	until time.Time
}

// Stats counts.
type Stats struct {
	Streams int
	Entries uint64
}

// New makes a server.
func New(cfg Config) *Server {
	return &Server{cfg: cfg, log: cfg.Log.With("component", "accesslog"), known: map[string]ruleSet{}, books: map[string]book{}}
}

// Stats returns the counts of now.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}

// stream is one stream of a proxy.
type stream struct {
	*Server
	logName string
	slot    slot.Slot // Number 0 = not known
	begun   map[key]begun
	// held are keys of begun requests that are not told yet, oldest first; a key may be of one that has ended.
	held []held

	// Of the message at hand: when it was taken, and room.
	now      time.Time
	envelope envelope
	entry    entry
	url      []byte
	made     exchange
	room     []exchange // for those that are told
	// What was met, and is likely met again.
	picker  picker
	peers   map[string]peer
	decided map[string]verdicts
}

func (s *Server) newStream() *stream {
	return &stream{
		Server: s, begun: map[key]begun{},
		picker: picker{Headers: &s.cfg.Headers, names: map[string]headerName{}}, peers: map[string]peer{}, decided: map[string]verdicts{},
	}
}

type begun struct {
	request *flow.Request // nil = told
}

type held struct {
	key   key
	until time.Time
}

// streamAccessLogs implements AccessLogService. Caller: the node's proxy, as root.
func (s *Server) streamAccessLogs(g grpc.ServerStream) error {
	s.mu.Lock()
	s.stats.Streams++
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.stats.Streams--
		s.mu.Unlock()
	}()
	st := s.newStream()
	defer st.release(true)
	messages := make(chan message)
	failed := make(chan error, 1)
	go receive(g, messages, failed)
	timer := time.NewTimer(hold)
	defer timer.Stop()
	for {
		select {
		case m := <-messages:
			err := st.take(m.ReadOnlyData())
			m.Free()
			if err != nil {
				return err
			}
		case err := <-failed:
			if errors.Is(err, io.EOF) {
				return g.SendMsg(&accesslogv3.StreamAccessLogsResponse{})
			}
			return err
		case <-timer.C:
		case <-s.cfg.Draining:
			return status.Error(codes.Unavailable, "the agent is stopping")
		}
		st.release(false)
		if len(st.held) > 0 {
			timer.Reset(max(st.held[0].until.Sub(s.cfg.Now()), time.Millisecond))
		}
	}
}

// receive reads a stream until it or its handler ends.
func receive(g grpc.ServerStream, messages chan<- message, failed chan<- error) {
	for {
		var m message
		if err := g.RecvMsg(&m); err != nil {
			failed <- err
			return
		}
		select {
		case messages <- m:
		case <-g.Context().Done():
			m.Free()
			return
		}
	}
}

// take takes an encoded message's entries. It keeps none of the bytes.
func (st *stream) take(raw []byte) error {
	e := &st.envelope
	if err := e.decode(raw); err != nil {
		return status.Errorf(codes.InvalidArgument, "unreadable message: %v", err)
	}
	if e.identified {
		st.logName = text(e.logName, maxName)
		st.slot = slot.Slot{}
	}
	if st.logName == "" {
		return status.Error(codes.InvalidArgument, "identifier.log_name: the first message must have one")
	}
	if st.slot.Number == 0 {
		st.slot, _ = st.cfg.Slot(numberOf(st.logName))
	}
	st.now = st.cfg.Now()
	tell := st.http
	if e.tcp {
		tell = st.tcp
	}
	for i, raw := range e.entries {
		err := st.entry.decode(raw, e.tcp)
		if i == 0 {
			st.account(st.entry.common.tags, len(e.entries))
		}
		if err != nil || !tell(&st.entry) {
			st.cfg.Malformed()
		}
	}
	st.mu.Lock()
	st.stats.Entries += uint64(len(e.entries))
	st.mu.Unlock()
	return nil
}

// numberOf reads a slot's number of a listener's name; 0 = it is none.
func numberOf(name string) uint16 {
	n, err := strconv.ParseUint(strings.TrimPrefix(name, "slot-"), 10, 16)
	if err != nil || n > slot.Max || !strings.HasPrefix(name, "slot-") {
		return 0
	}
	return uint16(n)
}

// book is what is known of the numbers of a log: the one that follows the last message, and how many lost ones were told that no hole has shown yet. What
// found no room lies behind all that waited then, which may be several messages.
type book struct{ next, told uint64 }

// account counts what a proxy of ours says that it has lost, and what a hole in its numbers says beyond that: what a broken stream swallowed.
func (st *stream) account(tags []pair, count int) {
	lost := number(tags, "weir.lost", 32)
	if sequence := number(tags, "weir.sequence", 62); sequence > 0 {
		st.mu.Lock()
		b, known := st.books[st.logName]
		if sequence < b.next {
			b = book{} // the proxy began anew
		}
		covered, hole := b.told+lost, uint64(0)
		if b.next > 0 && sequence-b.next < 1<<32 {
			hole = sequence - b.next
		}
		if known || len(st.books) <= slot.Max {
			st.books[st.logName] = book{sequence + uint64(count), covered - min(covered, hole)}
		}
		st.mu.Unlock()
		lost += hole - min(hole, covered)
	}
	if lost > 0 {
		st.cfg.Lost(lost)
	}
}

// number reads a tag; 0 = it is not there or no number.
func number(tags []pair, name string, bits int) uint64 {
	value, _ := find(tags, name)
	if len(value) == 0 {
		return 0
	}
	n, err := strconv.ParseUint(string(value), 10, bits)
	if err != nil {
		return 0
	}
	return n
}

// release tells requests that have waited long enough; all = the stream ends.
func (st *stream) release(all bool) {
	now := st.cfg.Now()
	for len(st.held) > 0 && (all || !now.Before(st.held[0].until)) {
		key := st.held[0].key
		st.held = st.held[1:]
		if b, ok := st.begun[key]; ok && b.request != nil {
			st.cfg.Put(b.request)
			st.begun[key] = begun{}
		}
	}
}

// rule finds the rule that an RBAC policy is made of: `namespace/name/list[index]#item`. Nil = it is not known. Requests share the list.
func (st *stream) rule(filter, name string) []desired.PolicyRule {
	if i := strings.LastIndexByte(name, '#'); i >= 0 {
		name = strings.TrimSuffix(name[:i], "/")
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	set, ok := st.known[filter]
	if !ok || st.now.After(set.until) {
		set = ruleSet{names: map[string][]desired.PolicyRule{}, until: st.now.Add(rulesFor)}
		for _, r := range st.cfg.Rules(filter) {
			for _, n := range namesOf(&r) {
				if _, taken := set.names[n]; !taken {
					set.names[n] = []desired.PolicyRule{r}
				}
			}
		}
		if len(st.known) > slot.Max {
			clear(st.known)
		}
		st.known[filter] = set
	}
	return set.names[name]
}

// namesOf lists the names that a rule may have as an RBAC policy.
func namesOf(r *desired.PolicyRule) []string {
	if r.Name == "" {
		return []string{"/" + r.Implicit + "/[0]"}
	}
	object := r.Namespace + "/" + r.Name + "/"
	list := fmt.Sprintf("%s[%d]", r.List, r.Index)
	if r.Spec > 0 {
		return []string{fmt.Sprintf("%sspecs[%d]/%s", object, r.Spec, list)}
	}
	return []string{object + list, object + "specs[0]/" + list}
}
