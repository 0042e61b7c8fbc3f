// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"errors"
	"io"
	"net/http"
	"strings"

	"github.com/weirmesh/weir/services/proxy/internal/strict"
)

// respond sends an answer on.
func (w *forwarding) respond(a *answer) {
	x := w.x
	if a.resp.StatusCode == http.StatusSwitchingProtocols {
		w.switchProtocols(a)
		return
	}
	finished := false
	defer func() {
		a.resp.Body.Close()
		whole := x.body == nil || x.body.ended()
		a.release(finished && whole && !a.resp.Close)
		a.done(finished)
	}()
	streamed := a.resp.ContentLength < 0 && x.q.Method != http.MethodHead
	w.answerHead(a.resp)
	w.streaming.Store(true)
	if streamed {
		x.flush()
	}
	if err := x.copyBody(a.resp, streamed); err != nil {
		w.broken(err)
	}
	w.trailers(a.resp)
	finished = true
}

// answerHead takes the server's headers over.
func (w *forwarding) answerHead(resp *http.Response) {
	x := w.x
	h := x.w.Header()
	clear(h)
	connection := resp.Header["Connection"]
	for name, values := range resp.Header {
		if !strict.Hop(name) {
			h[name] = values
		}
	}
	dropNominated(h, connection)
	if len(resp.Trailer) > 0 {
		names := make([]string, 0, len(resp.Trailer))
		for name := range resp.Trailer {
			if strict.ValidTrailer(name) {
				names = append(names, name)
			}
		}
		h["Trailer"] = names
	}
	x.match.MutateResponse(h, &x.q)
	for _, l := range x.onResponse {
		l.Apply(h, &x.q)
	}
	if _, ok := h["Date"]; !ok {
		h["Date"] = nil
	}
	// A body that the client still sends after the answer's end would be taken for a request.
	if x.body != nil && x.s.guard != nil && !x.body.ended() && resp.ContentLength >= 0 {
		x.close = true
	}
	x.head(resp.StatusCode)
}

// dropNominated takes off what the server says concerns its connection.
func dropNominated(h http.Header, connection []string) {
	for _, v := range connection {
		for _, option := range strings.Split(v, ",") {
			switch name := http.CanonicalHeaderKey(strings.Trim(option, " \t")); name {
			case "Content-Length", "Content-Type", "":
			default:
				delete(h, name)
			}
		}
	}
}

func (x *exchange) flush() {
	if f, ok := x.w.(http.Flusher); ok {
		f.Flush()
	}
}

// errWrite is the client's side of a copy.
type errWrite struct{ error }

// Unwrap implements errors.
func (e errWrite) Unwrap() error { return e.error }

// copyBody sends the body on as it comes: what has come never waits for more.
func (x *exchange) copyBody(resp *http.Response, streamed bool) error {
	if resp.Body == http.NoBody || x.q.Method == http.MethodHead {
		return nil
	}
	buf := x.s.m.buffers.get()
	defer x.s.m.buffers.put(buf)
	remain := resp.ContentLength
	for {
		n, err := resp.Body.Read(buf[:])
		x.timer.touch()
		if n > 0 {
			m, werr := x.w.Write(buf[:n])
			x.sent += uint64(m)
			if werr != nil {
				return errWrite{werr}
			}
			remain -= int64(n)
		}
		if atEnd(err) || !streamed && remain == 0 && err == nil {
			return x.copied(resp, err, remain)
		}
		if err != nil {
			return err
		}
		if n > 0 {
			x.timer.touch()
			x.flush()
		}
	}
}

func (x *exchange) copied(resp *http.Response, err error, remain int64) error {
	if resp.ContentLength > 0 && remain != 0 {
		return io.ErrUnexpectedEOF
	}
	if atEnd(err) {
		return nil
	}
	// The library gives its connection back when it has seen the end.
	var one [1]byte
	if n, err := resp.Body.Read(one[:]); n > 0 || !atEnd(err) {
		return io.ErrUnexpectedEOF
	}
	return nil
}

// broken ends an answer that cannot be finished: the client must see that.
func (w *forwarding) broken(err error) {
	x := w.x
	var writing errWrite
	cause := w.causeOf(&try{}, err)
	switch {
	case errors.Is(cause, errTimeout):
		x.flag("UT")
		x.entry.Details = "upstream_response_timeout"
	case errors.Is(cause, errIdle):
		x.flag("SI")
		x.entry.Details = "stream_idle_timeout"
	case errors.Is(cause, errMaxStream):
		x.flag("UMSDR")
		x.entry.Details = "max_duration_timeout"
	case errors.As(err, &writing) || x.r.Context().Err() != nil:
		x.flag("DC")
		x.entry.Details = "downstream_remote_disconnect"
	default:
		x.flag("UC")
		x.entry.Details = "upstream_reset_after_response_started"
	}
	panic(http.ErrAbortHandler)
}

// trailers sends the answer's trailers, announced or not.
func (w *forwarding) trailers(resp *http.Response) {
	if len(resp.Trailer) == 0 {
		return
	}
	w.x.entry.Trailers = resp.Trailer
	h := w.x.w.Header()
	for name, values := range resp.Trailer {
		if strict.ValidTrailer(name) && len(values) > 0 {
			h[http.TrailerPrefix+name] = values
		}
	}
}
