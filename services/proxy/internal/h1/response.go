// SPDX-License-Identifier: Apache-2.0

package h1

import (
	"bufio"
	"errors"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/strict"
)

// response writes a server's answer. It is an http.ResponseWriter with what http.ResponseController asks for; one serves all answers of its connection.
type response struct {
	c      *Conn
	header http.Header
	out    []byte // what is written and not sent

	// mu: the body is read, and 100 sent, by another goroutine than the handler's.
	mu      sync.Mutex
	r       *http.Request
	wrote   bool // the head was written
	status  int
	chunked bool
	empty   bool  // no body may follow
	remain  int64 // of a body of known length; -1 = unknown
	closing bool
	err     error
}

// flushSize is what is sent at once without being asked.
const flushSize = 16 << 10

var errBodyLength = errors.New("body longer than was said")

func (w *response) begin(r *http.Request) {
	if w.header == nil {
		w.header = make(http.Header)
	}
	clear(w.header)
	w.r, w.wrote, w.status, w.chunked, w.empty, w.remain, w.closing, w.err = r, false, 0, false, false, 0, false, nil
	if cap(w.out) > 2*flushSize {
		w.out = nil
	}
	w.out = w.out[:0]
}

// Header implements http.ResponseWriter.
func (w *response) Header() http.Header { return w.header }

// WriteHeader implements http.ResponseWriter.
func (w *response) WriteHeader(status int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.wrote {
		return
	}
	if status < http.StatusOK {
		w.line(status)
		w.fields()
		w.out = append(w.out, "\r\n"...)
		w.send()
		return
	}
	w.head(status)
}

func (w *response) line(status int) {
	if w.r.ProtoMinor == 0 {
		w.out = append(w.out, "HTTP/1.0 "...)
	} else {
		w.out = append(w.out, "HTTP/1.1 "...)
	}
	w.out = strconv.AppendInt(w.out, int64(status), 10)
	w.out = append(w.out, ' ')
	w.out = append(w.out, http.StatusText(status)...)
	w.out = append(w.out, "\r\n"...)
}

func (w *response) fields() {
	for name, values := range w.header {
		if strings.HasPrefix(name, http.TrailerPrefix) || !strict.ValidName(name) {
			continue
		}
		for _, v := range values {
			if !strict.ValidValue(v) {
				continue
			}
			w.out = append(w.out, name...)
			w.out = append(w.out, ": "...)
			w.out = append(w.out, v...)
			w.out = append(w.out, "\r\n"...)
		}
	}
}

// head decides how the body is framed.
func (w *response) head(status int) {
	w.wrote, w.status = true, status
	w.empty = w.r.Method == http.MethodHead || status == http.StatusNoContent || status == http.StatusNotModified
	connection := w.header["Connection"]
	w.closing = len(connection) > 0 && strings.EqualFold(connection[0], "close")
	delete(w.header, "Connection")
	delete(w.header, "Transfer-Encoding")
	length, ok := int64(-1), false
	if v := w.header["Content-Length"]; len(v) > 0 {
		n, err := strconv.ParseInt(v[0], 10, 64)
		length, ok = n, err == nil && n >= 0
		if !ok || status == http.StatusNoContent {
			delete(w.header, "Content-Length")
		}
	}
	w.line(status)
	if _, set := w.header["Date"]; !set {
		w.out = append(w.out, "Date: "...)
		w.out = time.Now().UTC().AppendFormat(w.out, http.TimeFormat)
		w.out = append(w.out, "\r\n"...)
	}
	switch {
	case w.empty:
		w.remain = 0
	case ok:
		w.remain = length
	case w.r.ProtoMinor == 0:
		w.remain, w.closing = -1, true
	default:
		w.remain, w.chunked = -1, true
		w.out = append(w.out, "Transfer-Encoding: chunked\r\n"...)
	}
	w.fields()
	switch {
	case w.closing:
		w.out = append(w.out, "Connection: close\r\n"...)
	case w.r.ProtoMinor == 0:
		w.out = append(w.out, "Connection: keep-alive\r\n"...)
	}
	w.out = append(w.out, "\r\n"...)
}

// Write implements http.ResponseWriter.
func (w *response) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.wrote {
		w.head(http.StatusOK)
	}
	switch {
	case w.err != nil:
		return 0, w.err
	case w.empty:
		return 0, http.ErrBodyNotAllowed
	case len(p) == 0:
		return 0, nil
	case w.remain >= 0 && int64(len(p)) > w.remain:
		return 0, errBodyLength
	}
	if w.remain >= 0 {
		w.remain -= int64(len(p))
	}
	if w.chunked {
		w.out = strconv.AppendInt(w.out, int64(len(p)), 16)
		w.out = append(w.out, "\r\n"...)
	}
	if !w.chunked && len(w.out) == 0 && len(p) >= flushSize/2 {
		_, w.err = w.c.nc.Write(p)
		return len(p), w.err
	}
	w.out = append(w.out, p...)
	if w.chunked {
		w.out = append(w.out, "\r\n"...)
	}
	if len(w.out) >= flushSize {
		w.send()
	}
	return len(p), w.err
}

func (w *response) send() {
	if w.err == nil && len(w.out) > 0 {
		_, w.err = w.c.nc.Write(w.out)
	}
	w.out = w.out[:0]
}

// Flush implements http.Flusher.
func (w *response) Flush() { w.FlushError() } //nolint:errcheck // the next write says it

// FlushError is what http.ResponseController asks for.
func (w *response) FlushError() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.wrote {
		w.head(http.StatusOK)
	}
	w.send()
	return w.err
}

// EnableFullDuplex is what http.ResponseController asks for; it always is.
func (w *response) EnableFullDuplex() error { return nil }

// SetWriteDeadline is what http.ResponseController asks for.
func (w *response) SetWriteDeadline(t time.Time) error { return w.c.nc.SetWriteDeadline(t) }

// Hijack implements http.Hijacker.
func (w *response) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	w.c.setHandling(false)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.c.hijacked = true
	return &hijacked{Conn: w.c.nc, buf: &w.c.buf}, nil, nil
}

// finish sends what is left of the answer.
func (w *response) finish() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.wrote {
		w.head(http.StatusOK)
	}
	if w.remain > 0 {
		w.send()
		return errBodyLength
	}
	if w.chunked {
		w.out = append(w.out, "0\r\n"...)
		w.trailers()
		w.out = append(w.out, "\r\n"...)
	}
	w.send()
	return w.err
}

func (w *response) trailers() {
	for name, values := range w.header {
		name, ok := strings.CutPrefix(name, http.TrailerPrefix)
		if !ok || !strict.ValidName(name) || !strict.ValidTrailer(name) {
			continue
		}
		for _, v := range values {
			if strict.ValidValue(v) {
				w.out = append(append(append(append(w.out, name...), ": "...), v...), "\r\n"...)
			}
		}
	}
}

// writeContinue tells the client to send its body, unless the answer was faster.
func (w *response) writeContinue() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.wrote {
		return http.ErrBodyReadAfterClose
	}
	w.out = append(w.out, "HTTP/1.1 100 Continue\r\n\r\n"...)
	w.send()
	return w.err
}

// hijacked is a connection with what was read of it too early.
type hijacked struct {
	net.Conn
	buf *buffer
}

// Read implements net.Conn.
func (h *hijacked) Read(p []byte) (int, error) {
	if h.buf.i < h.buf.j {
		n := copy(p, h.buf.data())
		h.buf.i += n
		return n, nil
	}
	return h.Conn.Read(p)
}

// CloseWrite ends one direction.
func (h *hijacked) CloseWrite() error {
	if cw, ok := h.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return nil
}
