// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"context"
	"net/http"
	"net/netip"
	"net/textproto"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

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
	avoid   []netip.AddrPort
	retries int
	answer  answer
	// streaming: the answer's head has been sent, so that a deadline must wake a write too.
	streaming atomic.Bool
}

// answer is what an attempt got.
type answer struct {
	x    *exchange
	resp *http.Response
	conn *upstream.Conn
	// done gives endpoint and budget back.
	done func(ok bool)
	// stop ends the attempt's context; nil = it had none.
	stop func()
}

// release lets go of the connection.
func (a *answer) release(reuse bool) {
	if a.stop != nil {
		a.stop()
	}
	a.x.stream.leave()
	a.conn.Release(reuse)
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
	x.hook()
	defer x.unhook()
	w := &x.way
	w.x, w.f, w.cluster = x, f, cluster
	w.openBody()
	w.watch()
	if a := w.attempts(); a != nil {
		w.respond(a)
	}
}

// hook makes the client's going away end the stream.
func (x *exchange) hook() {
	s, ctx := x.s, x.r.Context()
	x.stream.begin(ctx)
	if !s.own {
		x.hooked = context.AfterFunc(ctx, func() { x.stream.end(context.Cause(ctx)) })
		return
	}
	// All requests of the connection have the same context.
	s.current.Store(&x.stream)
	if s.unhook == nil {
		s.unhook = context.AfterFunc(ctx, func() { s.current.Load().end(context.Cause(ctx)) })
	}
}

func (x *exchange) unhook() {
	if x.hooked != nil {
		x.hooked()
	}
	x.shared = x.stream.finish() || x.shared
}

func (x *exchange) appendForwardedFor() {
	v := x.s.conn.Remote.Addr().Unmap().String()
	if old := x.q.Header["X-Forwarded-For"]; len(old) > 0 {
		v = strings.Join(old, ",") + "," + v
	}
	x.q.Header["X-Forwarded-For"] = []string{v}
}

// watch starts the stream's timers.
func (w *forwarding) watch() {
	x := w.x
	idle, longest := x.m.cfg.streamIdle, x.m.cfg.maxStream
	if w.f.Idle >= 0 {
		idle = w.f.Idle
	}
	if w.f.MaxStream >= 0 {
		longest = w.f.MaxStream
	}
	now := x.entry.Start
	x.timer.start(now, idle)
	if longest > 0 {
		x.timer.deadline(now, deadlineStream, longest)
	}
	if x.length == 0 {
		w.bodyWhole(now)
	} else if x.m.cfg.request > 0 {
		x.timer.deadline(now, deadlineRequest, x.m.cfg.request)
	}
}

// expire is called by the timer.
func (x *exchange) expire(cause error) {
	x.stream.end(cause)
	// The library waits for whoever sends the body, and that one for the client.
	if x.body.abort() {
		x.stopReading()
	}
	if x.way.streaming.Load() {
		http.NewResponseController(x.w).SetWriteDeadline(time.Unix(1, 0)) //nolint:errcheck // the write says it
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
func (w *forwarding) bodyWhole(now time.Time) {
	timeout := w.f.Timeout
	if w.f.GRPCTimeoutMax >= 0 {
		if d, ok := grpcTimeout(w.x.q.Header.Get("Grpc-Timeout")); ok {
			if timeout = d; w.f.GRPCTimeoutMax > 0 {
				timeout = min(timeout, w.f.GRPCTimeoutMax)
			}
		}
	}
	if w.x.m.cfg.request > 0 && w.x.length != 0 {
		w.x.timer.deadline(now, deadlineRequest, 0)
	}
	if timeout > 0 {
		w.x.timer.deadline(now, deadlineResponse, timeout)
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
	s := &source{body: x.r.Body, touch: x.timer.touch, trailer: func() http.Header { return x.r.Trailer }, whole: func() { w.bodyWhole(time.Now()) }, lost: true}
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
		again := wants && w.retries < w.f.Retry.Num && w.x.stream.over() == nil && (w.x.body == nil || w.x.body.replayable())
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
	case <-w.x.stream.context().Done():
		return false
	}
}

// discard ends an answer that is not sent on.
func (a *answer) discard() {
	whole := discard(a.resp.Body, defaultBuffer)
	a.resp.Body.Close()
	a.release(whole && !a.resp.Close)
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
	var t try
	if w.f.Retry != nil && w.f.Retry.PerTry > 0 {
		t.limit(x.stream.context(), w.f.Retry.PerTry)
	}
	conn, err := w.connect(&t, e, fresh)
	if err != nil {
		defer t.end()
		return nil, w.classify(w.causeOf(&t, err), false), false
	}
	resp, sent, err := w.roundTrip(&t, conn) //nolint:bodyclose // who takes the answer closes it
	if err != nil {
		defer t.end()
		x.stream.leave()
		conn.Release(false)
		stale = conn.Used() && !t.over() && x.stream.over() == nil && (x.body == nil || x.body.replayable()) && (!sent || idempotent(x.q.Method))
		return nil, w.classify(w.causeOf(&t, err), !sent), stale
	}
	t.answered()
	x.timer.touch()
	w.answer = answer{x: x, resp: resp, conn: conn, stop: t.stop}
	return &w.answer, nil, false
}

func (w *forwarding) connect(t *try, e model.Endpoint, fresh bool) (*upstream.Conn, error) {
	x := w.x
	if !fresh {
		if conn := x.m.env.Upstreams.Take(x.s.conn, w.cluster, e, w.protocol()); conn != nil {
			return conn, nil
		}
	}
	ctx := t.ctx
	if ctx == nil {
		ctx = x.stream.context()
	}
	return x.m.env.Upstreams.Get(ctx, x.s.conn, w.cluster, e, w.protocol(), true)
}

// roundTrip sends the request and waits for the answer's head. sent: the server may have got the request's.
func (w *forwarding) roundTrip(t *try, conn *upstream.Conn) (resp *http.Response, sent bool, err error) {
	if own := conn.Own(); own != nil && w.x.body == nil && t.ctx == nil {
		return w.direct(own)
	}
	w.x.shared = true
	if t.ctx == nil {
		t.ctx = w.x.stream.context()
	}
	var began atomic.Bool
	req, body := w.request(t.ctx, &began)
	resp, err = conn.RoundTrip(req)
	if err != nil && body != nil {
		body.Close()
	}
	return resp, began.Load(), err
}

// causeOf is why an attempt ended: what ended the stream, or the attempt, if anything did.
func (w *forwarding) causeOf(t *try, err error) error {
	if cause := w.x.stream.over(); cause != nil {
		return cause
	}
	if t.over() {
		return context.Cause(t.ctx)
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
