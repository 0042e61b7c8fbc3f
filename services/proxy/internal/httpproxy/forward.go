// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"context"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/route"
	"github.com/weirmesh/weir/services/proxy/internal/strict"
	"github.com/weirmesh/weir/services/proxy/internal/upstream"
)

// forwarding is the way of one request to its cluster.
type forwarding struct {
	x       *exchange
	f       *route.Forward
	cluster model.Cluster
	ctx     context.Context
	avoid   []netip.AddrPort
	retries int
	// streaming: the answer's head has been sent, so that a deadline must wake a write too.
	streaming atomic.Bool
}

// answer is what an attempt got.
type answer struct {
	resp *http.Response
	conn *upstream.Conn
	// done gives endpoint and budget back.
	done func(ok bool)
	// stop ends the attempt's context.
	stop func()
}

// forward sends the request to the route's cluster and the answer back.
func (x *exchange) forward() {
	f := x.match.Route.Forward
	cluster := x.m.env.Clusters.Cluster(x.match.Cluster.Name)
	if cluster == nil {
		x.reply(f.NotFound, "", "NC", "cluster_not_found")
		return
	}
	x.entry.Cluster = cluster.Name()
	if x.m.cfg.logBegin {
		x.log(true)
	}
	x.match.MutateRequest(&x.q)
	x.match.Rewrite(&x.q)
	if x.q.Path == "" || !strict.ValidTarget(x.q.Path) || !strict.ValidHost(x.q.Authority) {
		x.reply(http.StatusInternalServerError, "", "", "rewrite_made_no_target")
		return
	}
	if x.m.cfg.xff {
		x.appendForwardedFor()
	}
	ctx, cancel := context.WithCancelCause(x.r.Context())
	defer cancel(nil)
	w := &forwarding{x: x, f: f, cluster: cluster, ctx: ctx}
	w.openBody()
	w.watch(cancel)
	if a := w.attempts(); a != nil {
		w.respond(a)
	}
}

func (x *exchange) appendForwardedFor() {
	v := x.s.conn.Remote.Addr().Unmap().String()
	if old := x.q.Header["X-Forwarded-For"]; len(old) > 0 {
		v = strings.Join(old, ",") + "," + v
	}
	x.q.Header["X-Forwarded-For"] = []string{v}
}

// watch starts the stream's timers.
func (w *forwarding) watch(cancel context.CancelCauseFunc) {
	x := w.x
	idle, longest := x.m.cfg.streamIdle, x.m.cfg.maxStream
	if w.f.Idle >= 0 {
		idle = w.f.Idle
	}
	if w.f.MaxStream >= 0 {
		longest = w.f.MaxStream
	}
	x.timer.start(idle, func(cause error) {
		cancel(cause)
		// The library waits for whoever sends the body, and that one for the client.
		if x.body.abort() {
			x.stopReading()
		}
		if w.streaming.Load() {
			http.NewResponseController(x.w).SetWriteDeadline(time.Unix(1, 0)) //nolint:errcheck // the write says it
		}
	})
	if longest > 0 {
		x.timer.deadline(deadlineStream, longest)
	}
	if x.length == 0 {
		w.bodyWhole()
	} else if x.m.cfg.request > 0 {
		x.timer.deadline(deadlineRequest, x.m.cfg.request)
	}
}

func (x *exchange) stopReading() {
	if x.s.guard != nil {
		x.s.guard.Abort()
		return
	}
	x.r.Body.Close()
}

// bodyWhole starts the time that the answer may take.
func (w *forwarding) bodyWhole() {
	timeout := w.f.Timeout
	if w.f.GRPCTimeoutMax >= 0 {
		if d, ok := grpcTimeout(w.x.q.Header.Get("Grpc-Timeout")); ok {
			if timeout = d; w.f.GRPCTimeoutMax > 0 {
				timeout = min(timeout, w.f.GRPCTimeoutMax)
			}
		}
	}
	if w.x.m.cfg.request > 0 && w.x.length != 0 {
		w.x.timer.deadline(deadlineRequest, 0)
	}
	if timeout > 0 {
		w.x.timer.deadline(deadlineResponse, timeout)
	}
}

// grpcTimeout reads a grpc-timeout header: up to eight digits and a unit.
func grpcTimeout(s string) (time.Duration, bool) {
	if len(s) < 2 || len(s) > 9 {
		return 0, false
	}
	units := map[byte]time.Duration{'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': time.Nanosecond}
	unit, ok := units[s[len(s)-1]]
	n, err := strconv.ParseUint(s[:len(s)-1], 10, 32)
	if !ok || err != nil || n == 0 {
		return 0, false
	}
	return time.Duration(n) * unit, true
}

// openBody prepares the request's body, to be kept for other attempts if the route wants any and the tenant has room.
func (w *forwarding) openBody() {
	x := w.x
	if x.length == 0 || x.r.Body == nil {
		return
	}
	s := &source{body: x.r.Body, touch: x.timer.touch, trailer: func() http.Header { return x.r.Trailer }, whole: w.bodyWhole, lost: true}
	if w.f.Retry.Wants(&x.q) {
		limit := int64(defaultBuffer)
		if w.f.BufferLimit >= 0 {
			limit = w.f.BufferLimit
		}
		if x.length > 0 && x.length <= limit {
			limit = x.length
		}
		if x.length <= limit && limit > 0 {
			if release, ok := x.m.env.Limits.Buffer(x.s.conn.Namespace, int(limit)); ok {
				s.limit, s.lost, s.release = int(limit), false, release
			}
		}
	}
	x.body = s
}

// attempts tries until there is an answer to send on; nil = the client was answered, or has gone.
func (w *forwarding) attempts() *answer {
	wants := w.f.Retry.Wants(&w.x.q)
	for {
		w.x.entry.Attempts++
		a, fail := w.attempt(wants)
		again := wants && w.retries < w.f.Retry.Num && w.ctx.Err() == nil && (w.x.body == nil || w.x.body.replayable())
		if fail != nil {
			if again && w.f.Retry.AfterFailure(fail.kind) && w.again() {
				continue
			}
			w.refuse(fail, wants)
			return nil
		}
		if !wants || !w.f.Retry.AfterAnswer(a.resp.StatusCode, a.resp.Header) {
			return a
		}
		if !again || !w.again() {
			w.x.flag("URX")
			return a
		}
		a.discard()
	}
}

// again waits before one more attempt, if the budget allows it.
func (w *forwarding) again() bool {
	done, ok := w.cluster.Retry()
	if !ok {
		return false
	}
	w.retries++
	// The budget counts retries in flight; this one is in flight until the request has ended.
	w.x.atEnd = append(w.x.atEnd, done)
	t := time.NewTimer(w.f.Retry.BackOff(w.retries, pick))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-w.ctx.Done():
		return false
	}
}

// discard ends an answer that is not sent on.
func (a *answer) discard() {
	whole := discard(a.resp.Body, defaultBuffer)
	a.resp.Body.Close()
	a.stop()
	a.conn.Release(whole && !a.resp.Close)
	a.done(false)
}

func (w *forwarding) protocol() model.Protocol {
	p := w.cluster.Protocol()
	switch {
	case w.x.upgrade != "":
		return model.HTTP1
	case p != model.SameAsClient:
		return p
	case w.x.s.guard == nil:
		return model.HTTP2
	}
	return model.HTTP1
}

// attempt sends the request once; an idle connection that turns out to be dead costs nothing.
func (w *forwarding) attempt(retrying bool) (*answer, *failure) {
	if !retrying && w.x.body != nil {
		w.x.body.commit()
	}
	endpoint, done, err := w.cluster.Acquire(w.x.s.conn, w.avoid)
	if err != nil {
		return nil, w.classify(err, false)
	}
	if w.f.Retry != nil && w.f.Retry.AvoidPrevious {
		w.avoid = append(w.avoid, endpoint.Address)
	}
	w.x.entry.Upstream = endpoint.Address
	for fresh := false; ; fresh = true {
		a, fail, stale := w.send(endpoint, fresh)
		if fail == nil {
			a.done = done
			return a, nil
		}
		if !stale || fresh {
			done(false)
			return nil, fail
		}
	}
}

// send sends the request on one connection. stale: the connection had been idle and nothing says that the server began.
func (w *forwarding) send(e model.Endpoint, fresh bool) (a *answer, fail *failure, stale bool) {
	x := w.x
	ctx, stop := w.ctx, func() {}
	var perTry *time.Timer
	if w.f.Retry != nil && w.f.Retry.PerTry > 0 {
		c, cancel := context.WithCancelCause(w.ctx)
		perTry = time.AfterFunc(w.f.Retry.PerTry, func() { cancel(errPerTry) })
		ctx, stop = c, func() { perTry.Stop(); cancel(nil) }
	}
	conn, err := x.m.env.Upstreams.Get(ctx, x.s.conn, w.cluster, e, w.protocol(), fresh)
	if err != nil {
		defer stop()
		return nil, w.classify(causeOf(ctx, err), false), false
	}
	var sent atomic.Bool
	req, body := w.request(ctx, &sent)
	resp, err := conn.RoundTrip(req) //nolint:bodyclose // who takes the answer closes it
	if err != nil {
		defer stop()
		if body != nil {
			body.Close()
		}
		conn.Release(false)
		stale = conn.Used() && ctx.Err() == nil && (x.body == nil || x.body.replayable()) && (!sent.Load() || idempotent(x.q.Method))
		return nil, w.classify(causeOf(ctx, err), !sent.Load()), stale
	}
	if perTry != nil {
		perTry.Stop()
	}
	x.timer.touch()
	return &answer{resp: resp, conn: conn, stop: stop}, nil, false
}

func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

func idempotent(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return false
}

// request makes the upstream request. The target goes out as it was judged, so it is opaque to the library.
func (w *forwarding) request(ctx context.Context, sent *atomic.Bool) (*http.Request, *view) {
	x := w.x
	trace := &httptrace.ClientTrace{WroteHeaders: func() { sent.Store(true) }, Got1xxResponse: x.informational}
	// A request's context can be set only by a copy, and the client's has to be copied anyway.
	r := x.r.WithContext(httptrace.WithClientTrace(ctx, trace))
	r.Method, r.URL, r.Host, r.Header, r.RequestURI = x.q.Method, target(&x.q), x.q.Authority, x.q.Header, ""
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

func target(q *match.Request) *url.URL {
	u := &url.URL{Scheme: q.Scheme, Host: q.Authority, Opaque: q.Path}
	if strings.HasPrefix(q.Path, "//") {
		// Opaque would read as an authority.
		u.Opaque = ""
		u.RawPath, u.RawQuery, u.ForceQuery = q.URLPath(), q.Query(), strings.HasSuffix(q.Path, "?")
		if p, err := url.PathUnescape(u.RawPath); err == nil {
			u.Path = p
		}
	}
	return u
}

// informational passes 1xx answers on; 100 is sent by the library when the body is read.
func (x *exchange) informational(code int, header textproto.MIMEHeader) error {
	if code == http.StatusContinue || x.entry.Protocol == "HTTP/1.0" {
		return nil
	}
	x.writing.Lock()
	defer x.writing.Unlock()
	if x.replied {
		return nil // a deadline was faster
	}
	h := x.w.Header()
	for name, values := range header {
		h[name] = values
	}
	strict.HopByHop(h)
	delete(h, "Content-Length")
	x.w.WriteHeader(code)
	clear(h)
	return nil
}
