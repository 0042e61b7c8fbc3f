// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/mutation"
	"github.com/weirmesh/weir/services/proxy/internal/pathnorm"
	"github.com/weirmesh/weir/services/proxy/internal/route"
	"github.com/weirmesh/weir/services/proxy/internal/strict"
)

// session is a client's connection.
type session struct {
	m     *Manager
	conn  *model.Conn
	drain context.Context
	// guard of HTTP/1 connections; nil = HTTP/2.
	guard    http1
	began    time.Time
	requests atomic.Uint64
	// hijacked is called when a tunnel has ended.
	hijacked func() error
	// own: the connection is served by package h1, one request after the other.
	own bool
	// spare is the exchange of the last request, if it can be used for the next; current how the one under way is ended.
	spare   *exchange
	current atomic.Pointer[stream]
	// unhook lets go of the context of the connection's requests.
	unhook func() bool
}

// http1 is who reads an HTTP/1 connection.
type http1 interface {
	// Next is the request that the handler was called for, Done its end.
	Next() strict.Message
	Done()
	// Opaque makes the rest of the connection pass as it comes.
	Opaque()
	// Reuse says that nobody holds anything of the request any more.
	Reuse()
	// Abort ends all reads, Drain the connection when it is idle.
	Abort()
	Drain()
}

// exchange is one request and its answer.
type exchange struct {
	request
	// What follows is used again for a connection's next request, if nobody else can hold it.
	timer  timer
	stream stream
	// writing is held while a head is written: informational ones are written by the library's goroutine.
	writing sync.Mutex
	out     outgoing
}

// request is what belongs to one request alone.
type request struct {
	s *session
	m *Manager
	w http.ResponseWriter
	r *http.Request
	// q is the request as it is judged and sent on; length and upgrade what the client said of it.
	q       match.Request
	length  int64
	upgrade string
	expect  bool

	match      route.Match
	entry      model.Entry
	body       *source
	way        forwarding
	onResponse []mutation.List
	// close: the connection ends with this answer. replied: its head has been sent.
	close, replied bool
	sent           uint64
	// hooked lets go of the request's context, where it has one of its own.
	hooked func() bool
	// shared: somebody may still hold something of the exchange when it has ended.
	shared bool
	// tunnelled are the bytes that a tunnel brought from the client.
	tunnelled uint64
	// grpcStatus overrides what the status of an answer of the proxy's own means to gRPC.
	grpcStatus string
	// atEnd is called when the exchange has ended.
	atEnd []func()
}

// pick returns a number below n: for weights, shares and back-off, where nobody gains by guessing.
func pick(n uint64) uint64 { return rand.Uint64N(n) }

// ServeHTTP is the handler of a connection's requests.
func (s *session) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := s.exchange()
	x.request = request{s: s, m: s.m.current(), w: w, r: r, entry: model.Entry{Conn: s.conn, Start: time.Now()}}
	defer x.finish()
	if !x.read() {
		return
	}
	s.requests.Add(1)
	release, ok := x.m.env.Limits.Request(s.conn.Namespace)
	if !ok {
		x.reply(http.StatusServiceUnavailable, "overload", "UO", "request_overload")
		return
	}
	defer release()
	x.serve()
}

// exchange returns one for a new request.
func (s *session) exchange() *exchange {
	if x := s.spare; x != nil {
		s.spare = nil
		return x
	}
	x := &exchange{}
	x.timer.fire = x.expire
	return x
}

// read takes the request from whichever server it came.
func (x *exchange) read() bool {
	if x.s.guard == nil {
		return x.readHTTP2()
	}
	g := x.s.guard.Next()
	if g.Err != nil {
		x.close = true
		x.q = match.Request{Header: http.Header{}, Conn: x.s.conn}
		x.entry.Protocol = "HTTP/1.1"
		x.reply(g.Err.Status, http.StatusText(g.Err.Status), "DPE", "http1."+g.Err.Cause)
		return false
	}
	if !x.s.own {
		//nolint:errcheck // only HTTP/1 has it, and this is HTTP/1
		http.NewResponseController(x.w).EnableFullDuplex()
	}
	x.close = g.Close
	x.length, x.upgrade, x.expect = g.Length, g.Upgrade, g.Expect
	x.q = match.Request{Method: g.Method, Scheme: x.scheme(), Authority: g.Host, Path: g.Target, Header: g.Header, Conn: x.s.conn}
	x.entry.Protocol, x.entry.RequestHeaderBytes = "HTTP/1.1", uint64(g.Bytes)
	if g.Minor == 0 {
		x.entry.Protocol = "HTTP/1.0"
	}
	if x.q.Authority == "" {
		x.q.Authority = x.m.cfg.defaultHost
	}
	if x.q.Authority == "" {
		x.q.Authority = x.s.conn.Local.String()
	}
	return true
}

func (x *exchange) scheme() string {
	if x.s.conn.TLS {
		return "https"
	}
	return "http"
}

// readHTTP2 checks what the library leaves to the handler: what would be another message in HTTP/1.
func (x *exchange) readHTTP2() bool {
	r := x.r
	x.length, x.entry.Protocol = r.ContentLength, "HTTP/2"
	x.q = match.Request{Method: r.Method, Scheme: x.scheme(), Authority: r.Host, Path: r.RequestURI, Header: r.Header, Conn: x.s.conn}
	cause := x.refuseHTTP2()
	if cause == "" {
		return true
	}
	x.m.env.Limits.Refused(x.s.conn.Namespace, cause)
	status := http.StatusBadRequest
	if cause == "header-count" {
		status = http.StatusRequestHeaderFieldsTooLarge
	}
	x.reply(status, http.StatusText(status), "DPE", "http2."+cause)
	return false
}

func (x *exchange) refuseHTTP2() string {
	h := x.q.Header
	// The library adds what it found missing; only what the client said is sent on.
	if host, ok := h["Host"]; ok {
		if len(host) != 1 || !strings.EqualFold(host[0], x.q.Authority) {
			return "host"
		}
		delete(h, "Host")
	}
	if v, ok := h["Content-Length"]; ok && (len(v) != 1 || v[0] != strconv.FormatInt(x.length, 10)) {
		return "content-length"
	}
	for _, name := range []string{"Connection", "Transfer-Encoding", "Upgrade", "Keep-Alive", "Proxy-Connection"} {
		if _, ok := h[name]; ok {
			return "connection-header"
		}
	}
	n, bytes := 0, 0
	for name, values := range h {
		if !strict.ValidName(name) {
			return "header-name"
		}
		n += len(values)
		for _, v := range values {
			bytes += len(name) + len(v)
			if !strict.ValidValue(v) || strings.Trim(v, " \t") != v {
				return "header-value"
			}
		}
	}
	x.entry.RequestHeaderBytes = uint64(bytes)
	switch {
	case n > x.m.cfg.limits.Count:
		return "header-count"
	case !strict.ValidMethod(x.q.Method) || x.q.Method == http.MethodConnect:
		return "method"
	case !strict.ValidHost(x.q.Authority):
		return "host"
	case !strict.ValidTarget(x.q.Path) || x.q.Path[0] != '/' && (x.q.Path != "*" || x.q.Method != http.MethodOptions):
		return "target"
	}
	strict.HopByHop(h)
	delete(h, "Trailer")
	return ""
}

// serve judges a request and sends it on.
func (x *exchange) serve() {
	e := &x.entry
	e.Method, e.Scheme, e.RequestHeaders = x.q.Method, x.q.Scheme, x.q.Header
	x.q.Authority = x.m.cfg.stripPort(x.q.Authority, x.s.conn.Local.Port())
	e.Authority, e.Path = x.q.Authority, x.q.Path
	if x.q.Method == http.MethodConnect {
		x.close = true
		x.reply(http.StatusMethodNotAllowed, "", "DPE", "connect")
		return
	}
	if !x.normalize() {
		return
	}
	if table := x.m.table(); table != nil {
		var found bool
		x.match, found = table.Match(&x.q, pick)
		if found {
			e.Route = x.match.Route.Name
		}
	}
	if x.upgrade != "" && !x.upgradeAllowed() {
		x.upgrade = ""
		delete(x.q.Header, "Upgrade")
		x.close = true // what follows the request was held, for the other protocol
	}
	for i := range x.m.cfg.filters {
		if !x.filter(&x.m.cfg.filters[i]) {
			return
		}
	}
	x.act()
}

func (x *exchange) upgradeAllowed() bool {
	if x.match.Route != nil && x.match.Route.Forward != nil {
		if allowed, said := x.match.Route.Forward.Upgrades[x.upgrade]; said {
			return allowed
		}
	}
	return x.m.cfg.upgrades[x.upgrade]
}

func (x *exchange) filter(f *filter) bool {
	if o, ok := x.match.Override(f.name); ok {
		if o.Disabled {
			return true
		}
		if s, ok := o.Config.(stage); ok {
			return s.request(x)
		}
	}
	return f.disabled || f.do.request(x)
}

// normalize brings the path into the form that is judged; false = it has been answered.
func (x *exchange) normalize() bool {
	path, redirect, err := pathnorm.Normalize(x.q.Path, x.m.cfg.norm)
	switch {
	case errors.Is(err, pathnorm.ErrMalformed) || errors.Is(err, pathnorm.ErrSlash):
		x.reply(http.StatusBadRequest, "", "DPE", "path_normalization_failed")
		return false
	case redirect:
		x.entry.Path = path
		if match.GRPC(x.q.Header) {
			x.reply(http.StatusBadRequest, "", "", "path_normalization_failed")
			return false
		}
		x.w.Header().Set("Location", path)
		x.reply(http.StatusTemporaryRedirect, "", "", "path_normalization_failed")
		return false
	}
	x.q.Path, x.entry.Path = path, path
	return true
}

// act does what the route says.
func (x *exchange) act() {
	r := x.match.Route
	if r == nil {
		x.reply(http.StatusNotFound, "", "NR", "route_not_found")
		return
	}
	switch {
	case r.Redirect != nil:
		x.w.Header().Set("Location", r.Redirect.Location(&x.q))
		x.match.MutateResponse(x.w.Header(), &x.q)
		x.reply(r.Redirect.Status, "", "", "direct_response")
	case r.Direct != nil:
		x.match.MutateResponse(x.w.Header(), &x.q)
		x.reply(r.Direct.Status, r.Direct.Body, "", "direct_response")
	default:
		x.forward()
	}
}

// flag notes a response flag.
func (x *exchange) flag(f string) {
	if f != "" {
		x.entry.Flags = append(x.entry.Flags, f)
	}
}

// reply answers in the server's place.
func (x *exchange) reply(status int, body, flag, details string) {
	x.flag(flag)
	if x.entry.Details = details; x.replied {
		return
	}
	r := reply{status: status, body: body, contentType: "text/plain", flag: flag}
	x.m.cfg.replies.apply(&r, &x.q)
	h := x.w.Header()
	for _, l := range x.onResponse {
		l.Apply(h, &x.q)
	}
	r.headers.Apply(h, &x.q)
	if match.GRPC(x.q.Header) {
		h["Content-Type"] = []string{"application/grpc"}
		if x.grpcStatus == "" {
			x.grpcStatus = grpcStatus(r.status)
		}
		h["Grpc-Status"] = []string{x.grpcStatus}
		if r.body != "" {
			h["Grpc-Message"] = []string{grpcMessage(r.body)}
		}
		r.status, r.body = http.StatusOK, ""
	} else if r.body != "" {
		if _, ok := h["Content-Type"]; !ok {
			h["Content-Type"] = []string{r.contentType}
		}
	}
	if r.status >= http.StatusOK && r.status != http.StatusNoContent && r.status != http.StatusNotModified {
		h["Content-Length"] = []string{strconv.Itoa(len(r.body))}
	}
	x.head(r.status)
	if r.body != "" && x.q.Method != http.MethodHead {
		n, _ := x.w.Write([]byte(r.body))
		x.sent += uint64(n)
	}
}

// head sends the answer's head, which the response writer's header has.
func (x *exchange) head(status int) {
	h := x.w.Header()
	if x.ending() {
		h["Connection"] = []string{"close"}
	}
	// What the server did not say is not said for it; a nil value keeps the library from it. Answers of the proxy's own have a date.
	if _, ok := h["Content-Type"]; !ok {
		h["Content-Type"] = nil
	}
	x.writing.Lock()
	defer x.writing.Unlock()
	x.entry.Status, x.replied = status, true
	x.w.WriteHeader(status)
}

// ending reports whether the connection ends with this answer.
func (x *exchange) ending() bool {
	c := x.m.cfg
	if x.close || c.maxRequests > 0 && x.s.guard != nil && x.s.requests.Load() >= c.maxRequests || c.maxConn > 0 && time.Since(x.s.began) > c.maxConn {
		return true
	}
	// A client that still waits to be asked for its body is not; what it sends next would be no request.
	return x.s.drain.Err() != nil || x.expect && !x.body.started()
}

// finish ends an exchange: what was left of the body, the log.
func (x *exchange) finish() {
	if x.body != nil {
		x.entry.RequestBytes = x.body.close()
	}
	x.entry.RequestBytes += x.tunnelled
	for _, f := range x.atEnd {
		f()
	}
	x.log(false)
	aborted := recover()
	x.letGo(aborted == nil)
	if g := x.s.guard; g != nil {
		if aborted == nil && x.entry.Status != http.StatusSwitchingProtocols {
			x.drainBody(g)
		}
		g.Done()
		if x.entry.Status == http.StatusSwitchingProtocols {
			x.s.hijacked() //nolint:errcheck // it has none
		}
	}
	if aborted != nil {
		panic(aborted)
	}
}

// letGo ends what watched the exchange, and keeps it for the next request if nobody else has anything of it.
func (x *exchange) letGo(whole bool) {
	s := x.s
	if !s.own || !whole || x.shared || x.length != 0 || x.body != nil {
		x.timer.release()
		return
	}
	x.timer.stop()
	s.guard.Reuse()
	s.spare = x
}

// Of a body that nobody wanted, as much is read as is cheaper than a new connection; for as long as an honest client needs.
const (
	drainBytes = 256 << 10
	drainTime  = 5 * time.Second
)

func (x *exchange) drainBody(g http1) {
	if x.length == 0 || x.r.Body == nil || x.body != nil && x.body.ended() {
		return
	}
	if x.expect && !x.body.started() || x.body != nil && x.body.reading() {
		g.Abort() // the client was not asked for the body, or somebody still waits for it
		return
	}
	t := time.AfterFunc(drainTime, g.Abort)
	defer t.Stop()
	if !discard(x.r.Body, drainBytes) {
		g.Abort()
	}
}

// log tells of the request, at its begin and at its end.
func (x *exchange) log(begin bool) {
	if x.m.env.Logger == nil {
		return
	}
	e := &x.entry
	e.Begin = begin
	e.ResponseBytes = x.sent
	if !begin {
		e.Duration = time.Since(e.Start)
		if e.ResponseHeaders == nil {
			e.ResponseHeaders = x.w.Header()
		}
	}
	x.m.env.Logger.Log(e)
}
