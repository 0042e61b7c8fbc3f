// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"context"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/h1"
	"github.com/weirmesh/weir/services/proxy/internal/match"
)

// try is the time that one attempt has. The zero try has no context and no end of its own.
type try struct {
	ctx   context.Context
	stop  func()
	timer *time.Timer
}

func (t *try) limit(parent context.Context, after time.Duration) {
	ctx, cancel := context.WithCancelCause(parent)
	timer := time.AfterFunc(after, func() { cancel(errPerTry) })
	t.ctx, t.timer, t.stop = ctx, timer, func() { timer.Stop(); cancel(nil) }
}

// answered: what follows is not the attempt's time any more.
func (t *try) answered() {
	if t.timer != nil {
		t.timer.Stop()
	}
}

func (t *try) over() bool { return t.ctx != nil && t.ctx.Err() != nil }

func (t *try) end() {
	if t.stop != nil {
		t.stop()
	}
}

// outgoing is a request without a body for a connection of package h1, which keeps nothing of it: all of an exchange's have the same memory.
type outgoing struct {
	r     *http.Request
	url   url.URL
	began bool
}

func (x *exchange) newOutgoing() *http.Request {
	trace := &httptrace.ClientTrace{WroteHeaders: func() { x.out.began = true }, Got1xxResponse: x.informational}
	return new(http.Request).WithContext(httptrace.WithClientTrace(context.Background(), trace))
}

// direct sends a request without a body, and is interrupted when the stream ends.
func (w *forwarding) direct(conn *h1.ClientConn) (resp *http.Response, sent bool, err error) {
	x := w.x
	if err := x.stream.enter(conn); err != nil {
		return nil, false, err
	}
	out := &x.out
	if out.r == nil {
		out.r = x.newOutgoing()
	}
	r := out.r
	out.began = false
	target(&out.url, &x.q)
	if x.upgrade != "" {
		x.q.Header["Connection"] = []string{"Upgrade"}
	}
	r.Method, r.URL, r.Host, r.Header = x.q.Method, &out.url, x.q.Authority, x.q.Header
	resp, err = conn.RoundTrip(r)
	return resp, out.began, err
}

// request makes the upstream request. The target goes out as it was judged, so it is opaque to the library.
func (w *forwarding) request(ctx context.Context, sent *atomic.Bool) (*http.Request, *view) {
	x := w.x
	trace := &httptrace.ClientTrace{WroteHeaders: func() { sent.Store(true) }, Got1xxResponse: x.informational}
	// A request's context can be set only by a copy, and the client's has to be copied anyway.
	r := x.r.WithContext(httptrace.WithClientTrace(ctx, trace))
	r.Method, r.URL, r.Host, r.Header, r.RequestURI = x.q.Method, &url.URL{}, x.q.Authority, x.q.Header, ""
	target(r.URL, &x.q)
	r.Proto, r.ProtoMajor, r.ProtoMinor, r.TransferEncoding, r.Close = "HTTP/1.1", 1, 1, nil, false
	r.Body, r.ContentLength, r.Trailer = nil, 0, nil
	if _, ok := x.q.Header["User-Agent"]; !ok {
		x.q.Header["User-Agent"] = nil
	}
	if x.upgrade != "" {
		x.q.Header["Connection"] = []string{"Upgrade"}
	}
	var v *view
	if x.body != nil {
		v = &view{s: x.body}
		r.Body, r.ContentLength = v, x.length
		if x.length < 0 {
			v.trailer = http.Header{}
			r.Trailer = v.trailer
		}
	}
	return r, v
}

func target(u *url.URL, q *match.Request) {
	*u = url.URL{Scheme: q.Scheme, Host: q.Authority, Opaque: q.Path}
	if strings.HasPrefix(q.Path, "//") {
		// Opaque would read as an authority.
		u.Opaque = ""
		u.RawPath, u.RawQuery, u.ForceQuery = q.URLPath(), q.Query(), strings.HasSuffix(q.Path, "?")
		if p, err := url.PathUnescape(u.RawPath); err == nil {
			u.Path = p
		}
	}
}
