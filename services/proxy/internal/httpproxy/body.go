// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"errors"
	"io"
	"net/http"
	"sync"
)

// source is a request's body. Several attempts may read it, each from its begin, as long as all that was read fits into a bound. An attempt that was given up may
// still be waiting in a read; what it gets is kept for the next.
type source struct {
	body    io.ReadCloser
	limit   int // of what is kept; 0 keeps nothing, and lost must be set
	touch   func()
	trailer func() http.Header
	// whole is called once, when the client's body has come to its end.
	whole func()
	// release gives the reserved bytes back.
	release func()

	read sync.Mutex // held while reading the client

	mu      sync.Mutex
	kept    []byte
	lost    bool // more was read than was kept
	total   uint64
	err     error // how the client's body ended
	waiting bool
	closed  bool
}

// replayable reports whether another attempt can have the whole body.
func (s *source) replayable() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.lost || s.total == 0 && !s.waiting
}

// commit stops keeping: there will be no other attempt.
func (s *source) commit() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limit = 0
}

// started reports whether anything was asked of the client; a nil source was never asked.
func (s *source) started() bool {
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total > 0 || s.err != nil
}

func (s *source) ended() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return atEnd(s.err)
}

// atEnd: an error that wraps io.EOF is a fault, never a body's end.
func atEnd(err error) bool { return err == io.EOF } //nolint:errorlint // see above

func (s *source) reading() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting
}

// failed is the error of the client's side; nil = none.
func (s *source) failed() error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if atEnd(s.err) {
		return nil
	}
	return s.err
}

// close ends the body for all attempts and tells how much of it was read.
func (s *source) close() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed, s.kept = true, nil
	if s.release != nil {
		s.release()
		s.release = nil
	}
	return s.total
}

// view is one attempt's reader.
type view struct {
	s   *source
	pos uint64
	// trailer is filled when the body has ended.
	trailer http.Header

	mu     sync.Mutex
	closed bool
}

var errClosed = errors.New("body of an attempt that was given up")

// Read implements io.Reader.
func (v *view) Read(p []byte) (int, error) {
	if n, done, err := v.replay(p); done {
		return n, err
	}
	v.s.read.Lock()
	defer v.s.read.Unlock()
	// Another attempt's read may have brought something meanwhile.
	if n, done, err := v.replay(p); done {
		return n, err
	}
	return v.fetch(p)
}

// replay gives what was kept, or the body's end.
func (v *view) replay(p []byte) (n int, done bool, err error) {
	s := v.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.isClosed() || s.closed {
		return 0, true, errClosed
	}
	if v.pos < s.total {
		if s.lost && v.pos != s.total {
			return 0, true, errClosed
		}
		n = copy(p, s.kept[v.pos:])
		v.pos += uint64(n)
		return n, true, nil
	}
	if atEnd(s.err) {
		v.copyTrailer()
	}
	return 0, s.err != nil, s.err
}

func (v *view) fetch(p []byte) (int, error) {
	s := v.s
	if !s.wait() {
		return 0, errClosed
	}
	n, err := s.body.Read(p)
	s.touch()
	if atEnd(err) {
		s.whole()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting = false
	s.total += uint64(n)
	s.err = err
	switch {
	case s.lost || n == 0:
	case len(s.kept)+n > s.limit:
		s.lost, s.kept = true, nil
	default:
		s.kept = append(s.kept, p[:n]...)
	}
	if v.isClosed() || s.closed {
		return 0, errClosed
	}
	v.pos = s.total
	if atEnd(err) {
		v.copyTrailer()
	}
	return n, err
}

func (s *source) wait() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting = !s.closed
	return s.waiting
}

// abort lets no attempt read any more; true = one is waiting for the client, and must be woken.
func (s *source) abort() bool {
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return s.waiting
}

func (v *view) copyTrailer() {
	if v.s.trailer == nil || v.trailer == nil {
		return
	}
	for name, values := range v.s.trailer() {
		v.trailer[name] = values
	}
}

func (v *view) isClosed() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.closed
}

// Close ends the attempt's reading, not the client's body.
func (v *view) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.closed = true
	return nil
}

// discard reads up to n bytes; true = the body has ended.
func discard(r io.Reader, n int64) bool {
	_, err := io.CopyN(io.Discard, r, n)
	if err == nil {
		var one [1]byte
		_, err = io.ReadFull(r, one[:])
	}
	return atEnd(err)
}

// buffers of the copying of bodies.
type buffers struct{ pool sync.Pool }

const copySize = 32 << 10

func (b *buffers) get() *[copySize]byte {
	if v, ok := b.pool.Get().(*[copySize]byte); ok {
		return v
	}
	return new([copySize]byte)
}

func (b *buffers) put(v *[copySize]byte) { b.pool.Put(v) }
