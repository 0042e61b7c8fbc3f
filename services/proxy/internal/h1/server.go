// SPDX-License-Identifier: Apache-2.0

package h1

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/alarm"
	"github.com/weirmesh/weir/services/proxy/internal/strict"
)

// Config of a server's connections.
type Config struct {
	Limits strict.Limits
	// Idle between requests, Header from a request's first byte to its head's last; 0 = no limit.
	Idle, Header time.Duration
	// Upgrades reports whether a protocol may be switched to.
	Upgrades func(protocol string) bool
	// Grace is what a connection without any request so far has for its first one when it is drained.
	Grace time.Duration
	// Refused hears of what was refused.
	Refused func(cause string)
}

// Conn is a server's connection.
type Conn struct {
	nc  net.Conn
	cfg Config
	buf buffer
	msg strict.Message
	in  body
	w   response
	// ctx of all requests: it ends when the client has gone.
	ctx    context.Context
	cancel context.CancelFunc
	// r is what the handler is given. It and its head are used again if the handler keeps nothing of them (Reuse): reusable.
	r        *http.Request
	reusable bool
	// continued: the client was told to send its body, or did not ask.
	continued bool
	hijacked  bool

	mu       sync.Mutex
	draining bool
	aborted  bool
	idle     bool
	served   bool // a request has come
	handling bool
	whole    bool          // the request's body has been read
	watching chan struct{} // closed when the watch has ended; nil = nobody watches
	alarm    alarm.Alarm
	// cut: the connection has a read deadline.
	cut bool
}

// watchAfter: most requests are answered sooner, and nobody needs to know whether their clients are still there.
const watchAfter = 100 * time.Millisecond

// lingering is how long a client may take to read an answer that ends the connection.
const lingering = 500 * time.Millisecond

var past = time.Unix(1, 0)

// NewConn makes a connection of which first was read already.
func NewConn(nc net.Conn, first []byte, cfg Config) *Conn {
	c := &Conn{nc: nc, cfg: cfg, buf: buffer{r: nc, b: first[:cap(first)], j: len(first)}}
	if cap(first) == 0 {
		c.buf.b = nil
	}
	c.in = body{src: &c.buf, limits: cfg.Limits}
	c.w.c = c
	return c
}

// Next is the request that the handler was called for.
func (c *Conn) Next() strict.Message { return c.msg }

// Done is for the library's server, which does not know when a request has ended.
func (c *Conn) Done() {}

// Reuse is what a handler calls that keeps nothing of its request, and lets nobody else keep it: the next one is read into the same memory.
func (c *Conn) Reuse() {
	c.reusable = c.msg.Err == nil && c.msg.Length == 0 && c.msg.Bytes <= bufferSize
}

// Opaque is for the guard, which reads for somebody else.
func (c *Conn) Opaque() {}

// Drain ends the connection when it is idle, or becomes so.
func (c *Conn) Drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
	if c.idle && !c.served {
		c.deadline(time.Now().Add(c.cfg.Grace))
	} else if c.idle {
		c.deadline(past)
	}
}

// deadline sets the connection's read deadline. Called with the lock held.
func (c *Conn) deadline(t time.Time) {
	c.cut = !t.IsZero()
	c.nc.SetReadDeadline(t) //nolint:errcheck // a closed connection has no reader to wake
}

// Abort makes the read under way and all others end.
func (c *Conn) Abort() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.aborted = true
	c.deadline(past)
}

// Serve serves the connection's requests one after the other and returns when it has ended, or a tunnel that the handler made of it has. It does not close it.
func (c *Conn) Serve(ctx context.Context, h http.Handler) {
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer c.cancel()
	c.alarm.Do = c.expire
	defer c.stop()
	for {
		r, err := c.next()
		if err != nil {
			return
		}
		if !c.serve(h, r) {
			return
		}
	}
}

// serve calls the handler; false = the connection ends.
func (c *Conn) serve(h http.Handler, r *http.Request) (again bool) {
	c.w.begin(r)
	c.setHandling(true)
	defer func() {
		if p := recover(); p != nil {
			c.setHandling(false)
			again = false
			if !errors.Is(asError(p), http.ErrAbortHandler) {
				panic(p)
			}
		}
	}()
	h.ServeHTTP(&c.w, r)
	c.setHandling(false)
	if c.hijacked || c.w.finish() != nil {
		return false
	}
	// After Abort somebody may still be in a read of the body: nothing of it is looked at.
	if aborted := c.isAborted(); aborted || c.w.closing || !c.in.ended() {
		c.linger(aborted || !c.in.ended() || c.buf.i < c.buf.j || c.msg.Err != nil)
		return false
	}
	c.buf.shrink()
	return true
}

func asError(p any) error {
	err, _ := p.(error)
	return err
}

// linger lets the client read the answer: closing while it still sends would reset the connection, and the answer with it.
func (c *Conn) linger(sending bool) {
	cw, ok := c.nc.(interface{ CloseWrite() error })
	if !ok || cw.CloseWrite() != nil || !sending {
		return
	}
	if c.nc.SetReadDeadline(time.Now().Add(lingering)) != nil {
		return
	}
	var rest [1024]byte
	for {
		if _, err := c.nc.Read(rest[:]); err != nil {
			return
		}
	}
}

// next reads a request's head. What is refused is a request too, which the handler answers.
func (c *Conn) next() (*http.Request, error) {
	if c.r == nil || !c.reusable {
		c.msg.Request, c.r = &strict.Request{}, new(http.Request).WithContext(c.ctx)
	}
	c.msg.Err, c.reusable = nil, false
	r := c.msg.Request
	if err := c.head(r); err != nil {
		var bad *strict.Error
		if !errors.As(err, &bad) {
			return nil, err
		}
		c.cfg.Refused(bad.Cause)
		c.msg = strict.Message{Err: bad}
		r = &strict.Request{Method: http.MethodGet, Minor: 1, Close: true, Header: http.Header{}}
	}
	c.in.begin(r.Length)
	c.continued = !r.Expect
	c.mu.Lock()
	c.whole = r.Length == 0
	c.mu.Unlock()
	req := c.r
	req.Method, req.Proto, req.ProtoMajor, req.ProtoMinor = r.Method, "HTTP/1.1", 1, r.Minor
	req.Header, req.Host, req.RequestURI, req.Body, req.ContentLength = r.Header, r.Host, r.Target, http.NoBody, r.Length
	if r.Length != 0 {
		req.Body = &requestBody{c: c, r: req}
	}
	return req, nil
}

// head reads a head, with the deadline of idle connections before its first byte and that of heads after it.
func (c *Conn) head(r *strict.Request) error {
	seen, blank, began, armed := 0, 0, false, false
	defer func() {
		if armed {
			c.disarm()
		}
	}()
	for {
		if n := strict.Blank(c.buf.data(), strict.MaxBlank-blank); n > 0 {
			c.buf.i += n
			seen, blank = 0, blank+n
		}
		data := c.buf.data()
		n, err := strict.End(data, seen, c.cfg.Limits)
		if err != nil {
			return err
		}
		if n > 0 {
			if err := r.Parse(data[:n], c.cfg.Limits); err != nil {
				return err
			}
			c.buf.i += n
			if r.Upgrade != "" && (r.Length != 0 || !c.cfg.Upgrades(r.Upgrade)) {
				r.Upgrade = ""
				delete(r.Header, "Upgrade")
			}
			return nil
		}
		seen = len(data)
		limit := c.cfg.Idle
		if seen > 0 {
			limit = c.cfg.Header
		}
		if seen == 0 || !began {
			if err := c.arm(limit, seen == 0); err != nil {
				return err
			}
			armed, began = true, seen > 0
		}
		if err := c.fillHead(); err != nil {
			return err
		}
	}
}

func (c *Conn) arm(limit time.Duration, idle bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.aborted || idle && c.draining && c.served {
		return io.EOF
	}
	if idle && c.draining {
		limit = c.cfg.Grace
	}
	c.idle = idle
	c.await(limit)
	return nil
}

func (c *Conn) disarm() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.idle = false
	c.await(0)
}

// await sets how long a read may take; 0 = as long as it likes. Called with the lock held.
func (c *Conn) await(limit time.Duration) {
	if c.cut && !c.aborted {
		c.deadline(time.Time{})
	}
	c.wakeAfter(limit)
}

// wakeAfter makes expire be called after some time; 0 = never. Called with the lock held.
func (c *Conn) wakeAfter(d time.Duration) {
	if d <= 0 {
		c.alarm.Set(time.Time{}, time.Time{})
		return
	}
	now := time.Now()
	c.alarm.Set(now.Add(d), now)
}

// expire is called when the alarm's time may have come: a reader is woken, a handler's client is watched.
func (c *Conn) expire() {
	c.mu.Lock()
	due := c.alarm.Due(time.Now())
	if due && c.handling {
		c.mu.Unlock()
		c.watch()
		return
	}
	if due {
		c.deadline(past)
	}
	c.mu.Unlock()
}

func (c *Conn) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.alarm.Stop()
}

func (c *Conn) fillHead() error {
	err := c.buf.fill()
	if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.buf.i < c.buf.j && !c.aborted {
		return &strict.Error{Status: http.StatusRequestTimeout, Cause: "header-timeout"}
	}
	return io.EOF
}

func (c *Conn) isAborted() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.aborted
}

// setHandling begins and ends the time in which the client's going away matters.
func (c *Conn) setHandling(on bool) {
	c.mu.Lock()
	c.handling = on
	if on {
		c.served = true
		c.wakeAfter(watchAfter)
		c.mu.Unlock()
		return
	}
	c.wakeAfter(0)
	watching := c.watching
	if watching != nil {
		c.deadline(past)
	}
	c.mu.Unlock()
	if watching == nil {
		return
	}
	<-watching
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watching = nil
	if !c.aborted {
		c.deadline(time.Time{})
	}
}

// watch reads while the handler works: the client's going away ends the requests' context, what it sends is kept.
func (c *Conn) watch() {
	c.mu.Lock()
	if !c.handling || c.watching != nil || c.aborted {
		c.mu.Unlock()
		return
	}
	if !c.whole {
		c.wakeAfter(watchAfter)
		c.mu.Unlock()
		return
	}
	if c.buf.i < c.buf.j {
		c.mu.Unlock() // the next request is there already: reading on would not end
		return
	}
	done := make(chan struct{})
	c.watching = done
	c.mu.Unlock()
	defer close(done)
	if err := c.buf.fill(); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.cancel()
	}
}

// requestBody is a request's body.
type requestBody struct {
	c      *Conn
	r      *http.Request
	mu     sync.Mutex
	closed bool
}

// Read implements io.Reader.
func (b *requestBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, http.ErrBodyReadAfterClose
	}
	if err := b.c.continueBody(); err != nil {
		return 0, err
	}
	n, err := b.c.in.Read(p)
	if atEnd(err) {
		b.r.Trailer = b.c.in.trailer
		b.c.mu.Lock()
		b.c.whole = true
		b.c.mu.Unlock()
	}
	var bad *strict.Error
	if errors.As(err, &bad) {
		b.closed = true
		b.c.cfg.Refused(bad.Cause)
	}
	return n, err
}

// Close implements io.Closer.
func (b *requestBody) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	return nil
}

// continueBody tells a client that waits for it to send its body.
func (c *Conn) continueBody() error {
	if c.continued {
		return nil
	}
	c.continued = true
	return c.w.writeContinue()
}
