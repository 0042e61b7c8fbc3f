// SPDX-License-Identifier: Apache-2.0

package h1

import (
	"errors"
	"io"
	"net/http"
	"strconv"
	"sync/atomic"

	"github.com/weirmesh/weir/services/proxy/internal/strict"
)

// sender sends a request's body while the answer is awaited: the one part of an exchange that has a goroutine of its own. A nil sender has sent everything.
type sender struct {
	whole atomic.Bool
}

const sendSize = 16 << 10

// startSender sends first, which is the head if it has not been sent yet, and the body.
func startSender(c *ClientConn, r *http.Request, first []byte) *sender {
	s := &sender{}
	go func() {
		defer r.Body.Close()
		if err := s.send(c, r, first); err != nil {
			// The reader is told by the connection's end, and by the client's side of the body.
			c.broken.Store(true)
			c.abort(err)
		}
	}()
	return s
}

// writeError is the server's side of a copy: it may have answered before it stopped reading, so the answer is still read.
type writeError struct{ error }

func (c *ClientConn) abort(err error) {
	var write writeError
	if !errors.As(err, &write) {
		c.nc.SetReadDeadline(past) //nolint:errcheck // a closed connection has no reader to wake
	}
}

// ended reports whether everything has been sent.
func (s *sender) ended() bool { return s == nil || s.whole.Load() }

func (s *sender) send(c *ClientConn, r *http.Request, first []byte) error {
	buf := append(make([]byte, 0, sendSize+len(first)), first...)
	chunked := r.ContentLength < 0
	remain := r.ContentLength
	const room = 32 // for a chunk's size and ends
	for {
		if cap(buf)-len(buf) < sendSize/2 {
			if _, err := c.nc.Write(buf); err != nil {
				return writeError{err}
			}
			buf = buf[:0]
		}
		at := len(buf)
		if chunked {
			at += room
		}
		n, err := r.Body.Read(buf[at : cap(buf)-2])
		if chunked {
			buf = appendChunk(buf, buf[at:at+n])
		} else {
			if remain -= int64(n); remain < 0 {
				return errBodyLength
			}
			buf = buf[:at+n]
		}
		if err != nil && !atEnd(err) {
			return err
		}
		if atEnd(err) {
			return s.finish(c, r, buf, chunked, remain)
		}
		if !chunked && remain == 0 {
			continue // the body's end comes with the next read
		}
		if _, err := c.nc.Write(buf); err != nil {
			return writeError{err}
		}
		buf = buf[:0]
	}
}

// appendChunk frames data that stands in buf's room, a little further on.
func appendChunk(buf, data []byte) []byte {
	if len(data) == 0 {
		return buf
	}
	buf = strconv.AppendInt(buf, int64(len(data)), 16)
	buf = append(buf, "\r\n"...)
	buf = append(buf, data...)
	return append(buf, "\r\n"...)
}

func (s *sender) finish(c *ClientConn, r *http.Request, buf []byte, chunked bool, remain int64) error {
	if !chunked && remain != 0 {
		return io.ErrUnexpectedEOF
	}
	if chunked {
		buf = append(buf, "0\r\n"...)
		for name, values := range r.Trailer {
			for _, v := range values {
				if strict.ValidName(name) && strict.ValidTrailer(name) && strict.ValidValue(v) {
					buf = append(append(append(append(buf, name...), ": "...), v...), "\r\n"...)
				}
			}
		}
		buf = append(buf, "\r\n"...)
	}
	// Before the write: the answer to its last byte may be read before the write returns.
	s.whole.Store(true)
	if len(buf) == 0 {
		return nil
	}
	if _, err := c.nc.Write(buf); err != nil {
		return writeError{err}
	}
	return nil
}
