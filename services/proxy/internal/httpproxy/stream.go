// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"context"
	"sync"

	"github.com/weirmesh/weir/services/proxy/internal/h1"
)

// stream is how an exchange is ended from outside: by a deadline, or because its client has gone. Most exchanges are at work on one connection of package h1,
// which is interrupted; for whoever wants a context, one is made.
type stream struct {
	mu     sync.Mutex
	parent context.Context
	cause  error
	at     *h1.ClientConn
	ctx    context.Context
	cancel context.CancelCauseFunc
}

func (s *stream) begin(parent context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.parent, s.cause, s.at, s.ctx, s.cancel = parent, nil, nil, nil, nil
}

// end ends the stream; the first cause stands.
func (s *stream) end(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil {
		return
	}
	s.cause = cause
	if s.cancel != nil {
		s.cancel(cause)
	}
	if s.at != nil {
		s.at.Interrupt()
	}
}

// over is why the stream has ended; nil = it has not.
func (s *stream) over() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ended()
}

func (s *stream) ended() error {
	if s.cause == nil && s.parent.Err() != nil {
		return context.Cause(s.parent)
	}
	return s.cause
}

// context ends when the stream does.
func (s *stream) context() context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx == nil {
		s.ctx, s.cancel = context.WithCancelCause(s.parent)
		if s.cause != nil {
			s.cancel(s.cause)
		}
	}
	return s.ctx
}

// enter begins work on a connection, which lasts until leave.
func (s *stream) enter(c *h1.ClientConn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ended(); err != nil {
		return err
	}
	s.at = c
	return nil
}

// leave ends it: the connection is not interrupted any more.
func (s *stream) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at = nil
}

// finish ends the stream after its answer, and reports whether there was a context that somebody may still hold.
func (s *stream) finish() (shared bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cancel == nil {
		return false
	}
	s.cancel(nil)
	return true
}
