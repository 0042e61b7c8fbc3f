// SPDX-License-Identifier: Apache-2.0

package hub

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/weirmesh/weir/services/policy/internal/state"
)

// Why a session ends; see Session.Closed.
var (
	ErrDisplaced = errors.New("another stream of this node began")
	ErrSlow      = errors.New("the agent did not keep up: connect again and take the whole state")
	ErrBadAck    = errors.New("a revision was acknowledged that was not sent")
)

// Message is what to send to an agent: exactly one of the fields is set.
type Message struct {
	Update *Update
	// Synced is the revision that completes the first state.
	Synced *uint64
	Spread *Spread
}

// Update is one atomic change, with a revision that rises within the session.
type Update struct {
	Revision uint64
	Change   state.Change
}

// Spread answers a registration.
type Spread struct {
	UID   string
	Late  []string
	Error string
}

// Session is one agent's stream. Next is called by one goroutine; all else is safe for concurrent
// use. Fields are guarded by the hub's mu, except those that only Next uses.
type Session struct {
	hub      *Hub
	node     string
	version  string
	instance string
	since    time.Time

	// Only Next uses these.
	target *state.Snapshot // what chunks lead to
	chunks []state.Change  // of the update under way

	closed      error
	sent        *state.Snapshot // the newest one that was sent whole; nil = none yet
	revision    uint64          // of the last update
	outstanding []outstanding
	syncedSent  bool
	acked       bool // the first acknowledgement has come
	spreads     []Spread
	refusals    map[Refused]string // what the agent could not put in force, and why
	lost        bool               // more than it may tell
}

// Refused names what an agent could not put in force.
type Refused struct {
	Kind state.Kind
	Key  string
}

// maxRefusals bounds what one agent can tell.
const maxRefusals = 1024

// outstanding is an update that was not acknowledged. before is the hub's revision that the agent
// holds as long as it was not.
type outstanding struct {
	revision uint64
	before   uint64
	since    time.Time
}

// Connect begins the session of a node's agent and ends the one before. Call Close when done.
func (h *Hub) Connect(ctx context.Context, node, version, instance string) (*Session, error) {
	if _, err := h.Do(ctx, func(st *state.State) { st.BeginSession(node) }); err != nil {
		return nil, err
	}
	s := &Session{hub: h, node: node, version: version, instance: instance, since: time.Now()}
	h.mu.Lock()
	defer h.mu.Unlock()
	if old := h.sessions[node]; old != nil {
		old.closeLocked(ErrDisplaced)
	}
	h.sessions[node] = s
	h.broadcastLocked()
	return s, nil
}

// Close ends the session. What the agent registered stays.
func (s *Session) Close() { s.fail(context.Canceled) }

func (s *Session) fail(err error) {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.closeLocked(err)
}

func (s *Session) closeLocked(err error) {
	if s.closed != nil {
		return
	}
	s.closed = err
	if s.hub.sessions[s.node] == s {
		delete(s.hub.sessions, s.node)
	}
	s.hub.broadcastLocked()
}

// Watch returns when the session must end, with the reason: ctx ended, it was displaced, or the
// agent does not keep up.
func (s *Session) Watch(ctx context.Context) error {
	timer := time.NewTimer(s.hub.config.AckTimeout)
	defer timer.Stop()
	for {
		s.hub.mu.Lock()
		err, changed := s.closed, s.hub.changed
		wait := s.hub.config.AckTimeout
		if len(s.outstanding) > 0 {
			wait = time.Until(s.outstanding[0].since.Add(s.hub.config.AckTimeout))
		}
		if err == nil && wait <= 0 {
			s.hub.slow.Add(1)
			err = ErrSlow
			s.closeLocked(err)
		}
		s.hub.mu.Unlock()
		if err != nil {
			return err
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-changed:
		case <-timer.C:
		}
	}
}

// Next returns the next message, waiting for one. Before the source is synced there is none.
func (s *Session) Next(ctx context.Context) (Message, error) {
	for {
		s.hub.mu.Lock()
		if s.closed != nil {
			defer s.hub.mu.Unlock()
			return Message{}, s.closed
		}
		if len(s.spreads) > 0 {
			defer s.hub.mu.Unlock()
			spread := s.spreads[0]
			s.spreads = s.spreads[1:]
			return Message{Spread: &spread}, nil
		}
		room := len(s.outstanding) < s.hub.config.Window
		if len(s.chunks) > 0 && room {
			defer s.hub.mu.Unlock()
			return s.sendChunkLocked(), nil
		}
		if len(s.chunks) == 0 && s.sent != nil && s.hub.complete && !s.syncedSent && s.sent == s.hub.current {
			defer s.hub.mu.Unlock()
			s.syncedSent = true
			revision := s.revision
			return Message{Synced: &revision}, nil
		}
		behind := s.hub.synced && s.sent != s.hub.current && len(s.chunks) == 0
		sent, current, last, changed := s.sent, s.hub.current, s.hub.last, s.hub.changed
		s.hub.mu.Unlock()

		if behind && room {
			s.prepare(sent, current, last)
			continue
		}
		select {
		case <-ctx.Done():
			return Message{}, context.Cause(ctx)
		case <-changed:
		}
	}
}

// prepare computes what to send next. The comparison may take a while and holds no lock.
func (s *Session) prepare(sent, current *state.Snapshot, last state.Change) {
	change := last
	if sent == nil || sent.Revision+1 != current.Revision {
		change = s.hub.diffs.get(sent, current)
	}
	s.target, s.chunks = current, chunk(change.For(s.node), s.hub.config.Chunk)
	if len(s.chunks) > 0 {
		return
	}
	// Nothing of it concerns this node, which holds it by that.
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.sent = current
	s.hub.broadcastLocked()
}

func (s *Session) sendChunkLocked() Message {
	update := &Update{Revision: s.revision + 1, Change: s.chunks[0]}
	s.outstanding = append(s.outstanding, outstanding{revision: update.Revision, before: s.heldBySentLocked(), since: time.Now()})
	s.revision = update.Revision
	if s.chunks = s.chunks[1:]; len(s.chunks) == 0 {
		s.sent = s.target
	}
	s.hub.broadcastLocked() // Watch must see the new deadline
	return Message{Update: update}
}

func (s *Session) heldBySentLocked() uint64 {
	if s.sent == nil {
		return 0
	}
	return s.sent.Revision
}

// heldLocked returns the newest of the hub's revisions that the agent's maps hold.
func (s *Session) heldLocked() uint64 {
	if len(s.outstanding) > 0 {
		return s.outstanding[0].before
	}
	return s.heldBySentLocked()
}

// Ack takes in an acknowledgement. The first one also says that the agent has registered all it has.
func (s *Session) Ack(ctx context.Context, revision uint64) error {
	s.hub.mu.Lock()
	if revision > s.revision {
		defer s.hub.mu.Unlock()
		return fmt.Errorf("%w: %d, the last one is %d", ErrBadAck, revision, s.revision)
	}
	for len(s.outstanding) > 0 && s.outstanding[0].revision <= revision {
		s.outstanding = s.outstanding[1:]
	}
	first := !s.acked
	s.acked = true
	current := s.hub.sessions[s.node] == s
	s.hub.broadcastLocked()
	s.hub.mu.Unlock()
	if first && current {
		return s.hub.Post(ctx, func(st *state.State) { st.EndSessionStart(s.node) })
	}
	return nil
}

// Refuse notes what the agent could not put in force; an empty reason = the trouble is over.
func (s *Session) Refuse(what Refused, reason string) {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	if s.closed != nil || s.refusals[what] == reason {
		return
	}
	if reason == "" {
		delete(s.refusals, what)
	} else {
		if len(s.refusals) >= maxRefusals {
			s.lost = true
			return
		}
		if s.refusals == nil {
			s.refusals = map[Refused]string{}
		}
		s.refusals[what] = reason
	}
	s.hub.broadcastLocked()
}

// Answer queues the answer to a registration.
func (s *Session) Answer(spread Spread) {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	if s.closed != nil {
		return
	}
	if len(s.spreads) >= s.hub.config.Spreads {
		s.hub.slow.Add(1)
		s.closeLocked(ErrSlow)
		return
	}
	s.spreads = append(s.spreads, spread)
	s.hub.broadcastLocked()
}
