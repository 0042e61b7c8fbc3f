// SPDX-License-Identifier: Apache-2.0

package h1

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/strict"
)

// ClientConn is a client's connection: an http.RoundTripper of one request at a time. An answer's body must be read to its end, or closed, before the next.
type ClientConn struct {
	nc     net.Conn
	raw    syscall.RawConn // nil = the connection cannot be looked at
	limits strict.Limits
	buf    buffer
	out    []byte
	in     responseBody
	// head and resp are the answer's, until the next.
	head strict.Response
	resp http.Response
	// broken: the connection can carry nothing more.
	broken atomic.Bool
	last   time.Time
}

// ErrBusy is the answer to a request that came before the last one's end.
var ErrBusy = errors.New("http/1: connection is busy")

// NewClientConn makes a client's connection; limits are those of answers' heads.
func NewClientConn(nc net.Conn, limits strict.Limits) *ClientConn {
	c := &ClientConn{nc: nc, limits: limits, buf: buffer{r: nc}, last: time.Now()}
	if s, ok := nc.(syscall.Conn); ok {
		if raw, err := s.SyscallConn(); err == nil {
			c.raw = raw
		}
	}
	c.in = responseBody{body: body{src: &c.buf, lenient: true, limits: limits}, c: c}
	return c
}

// Looks reports whether the connection can tell that the server has closed it.
func (c *ClientConn) Looks() bool { return c.raw != nil }

// continueTimeout is how long a server that was asked may take before it gets the body anyway: not all know how to answer.
const continueTimeout = time.Second

// fresh is how long after its use a connection is taken for alive without looking.
const fresh = 5 * time.Millisecond

// Usable reports whether the connection may carry a request: an idle one on which the server has said something, or has gone, may not.
func (c *ClientConn) Usable() bool {
	if c.broken.Load() || c.buf.i < c.buf.j {
		return false
	}
	if time.Since(c.last) < fresh || c.raw == nil || c.quiet() {
		return true
	}
	c.broken.Store(true)
	return false
}

// quiet looks at the socket without reading from it.
func (c *ClientConn) quiet() bool {
	quiet := false
	err := c.raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		quiet = errors.Is(err, syscall.EAGAIN)
		return true
	})
	return err == nil && quiet
}

// Broken reports whether the connection has ended.
func (c *ClientConn) Broken() bool { return c.broken.Load() }

// Close closes the connection.
func (c *ClientConn) Close() {
	c.broken.Store(true)
	c.nc.Close()
}

// Interrupt wakes whatever reads or writes; the connection is of no use then. The end of a request's context does that too.
func (c *ClientConn) Interrupt() {
	c.broken.Store(true)
	c.nc.SetDeadline(past) //nolint:errcheck // a closed connection has nobody to wake
}

// RoundTrip implements http.RoundTripper. The answer, but for the values of its header, is the connection's again when the next request is sent.
func (c *ClientConn) RoundTrip(r *http.Request) (*http.Response, error) {
	if c.broken.Load() {
		return nil, ErrBusy
	}
	ctx := r.Context()
	in := &c.in
	in.stop = nil
	if ctx.Done() != nil {
		in.stop = context.AfterFunc(ctx, c.Interrupt)
	}
	resp, err := c.roundTrip(r, httptrace.ContextClientTrace(ctx))
	if err != nil {
		c.Close()
		in.release()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, err
	}
	return resp, nil
}

func (c *ClientConn) roundTrip(r *http.Request, trace *httptrace.ClientTrace) (*http.Response, error) {
	c.writeHead(r)
	if trace != nil && trace.WroteHeaders != nil {
		trace.WroteHeaders()
	}
	waits := r.Body != nil && r.ContentLength != 0 && strings.EqualFold(r.Header.Get("Expect"), "100-continue")
	c.in.sender = nil
	switch {
	case r.Body == nil || r.ContentLength == 0 || waits:
		if _, err := c.nc.Write(c.out); err != nil {
			return nil, err
		}
	default:
		c.in.sender = startSender(c, r, c.out)
	}
	for {
		if waits {
			c.nc.SetReadDeadline(time.Now().Add(continueTimeout)) //nolint:errcheck // the read says it
		}
		head, err := c.readHead()
		if waits {
			c.nc.SetReadDeadline(time.Time{}) //nolint:errcheck // the read says it
			if r.Context().Err() != nil {
				return nil, context.Cause(r.Context())
			}
		}
		if waits && errors.Is(err, os.ErrDeadlineExceeded) {
			waits, c.in.sender = false, startSender(c, r, nil)
			continue
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		if head.Status >= http.StatusOK || head.Status == http.StatusSwitchingProtocols {
			return c.response(r, head, waits)
		}
		if head.Status == http.StatusContinue && waits {
			waits = false
			c.in.sender = startSender(c, r, nil)
			continue
		}
		if trace != nil && trace.Got1xxResponse != nil {
			if err := trace.Got1xxResponse(head.Status, textproto.MIMEHeader(head.Header)); err != nil {
				return nil, err
			}
		}
	}
}

// writeHead writes a head that its maker has validated: names, values and target are those that a strict reader accepted.
func (c *ClientConn) writeHead(r *http.Request) {
	b := c.out[:0]
	b = append(b, r.Method...)
	b = append(b, ' ')
	b = append(b, r.URL.RequestURI()...)
	b = append(b, " HTTP/1.1\r\nHost: "...)
	b = append(b, r.Host...)
	b = append(b, "\r\n"...)
	switch {
	case r.Body == nil && len(r.Header["Content-Length"]) == 0 && !expectsBody(r.Method):
	case r.ContentLength >= 0:
		b = append(strconv.AppendInt(append(b, "Content-Length: "...), r.ContentLength, 10), "\r\n"...)
	default:
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	}
	for name, values := range r.Header {
		switch name {
		case "Content-Length", "Transfer-Encoding", "Host":
			continue
		}
		for _, v := range values {
			b = append(append(append(append(b, name...), ": "...), v...), "\r\n"...)
		}
	}
	c.out = append(b, "\r\n"...)
}

// expectsBody: without a length, some servers wait for the body of these.
func expectsBody(method string) bool {
	return method == http.MethodPost || method == http.MethodPut || method == http.MethodPatch
}

func (c *ClientConn) readHead() (*strict.Response, error) {
	for seen := 0; ; {
		data := c.buf.data()
		n, err := strict.ResponseEnd(data, seen, c.limits)
		if err != nil {
			return nil, err
		}
		if n > 0 {
			if n > bufferSize {
				c.head = strict.Response{}
			}
			err := c.head.Parse(data[:n], c.limits)
			c.buf.i += n
			return &c.head, err
		}
		seen = len(data)
		if err := c.buf.fill(); err != nil {
			return nil, err
		}
	}
}

func (c *ClientConn) response(r *http.Request, head *strict.Response, waits bool) (*http.Response, error) {
	resp := &c.resp
	*resp = http.Response{StatusCode: head.Status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: head.Minor, Header: head.Header,
		ContentLength: head.Length, Close: head.Close || waits}
	in := &c.in
	in.resp, in.closed = resp, false
	if head.Status == http.StatusSwitchingProtocols {
		resp.Body = &tunnel{c: c}
		return resp, nil
	}
	if r.Method == http.MethodHead || head.Status == http.StatusNoContent || head.Status == http.StatusNotModified {
		in.begin(0)
		if r.Method != http.MethodHead {
			resp.ContentLength = 0
		}
		resp.Body = http.NoBody
		in.finish()
		return resp, nil
	}
	switch {
	case head.Length >= 0 || head.Chunked:
		in.begin(head.Length)
	default:
		in.err, in.trailer, in.state = nil, nil, untilClose
		resp.Close = true
	}
	resp.Trailer = head.Trailer
	if head.Length == 0 {
		resp.Body = http.NoBody
		in.finish()
		return resp, nil
	}
	resp.Body = in
	return resp, nil
}

// responseBody is an answer's body. Its end, or its being closed, ends the exchange.
type responseBody struct {
	body
	c      *ClientConn
	resp   *http.Response
	stop   func() bool
	sender *sender
	closed bool
}

// Read implements io.Reader.
func (b *responseBody) Read(p []byte) (int, error) {
	if b.closed {
		return 0, http.ErrBodyReadAfterClose
	}
	n, err := b.body.Read(p)
	if atEnd(err) {
		if len(b.trailer) > 0 {
			b.resp.Trailer = b.trailer
		}
		b.finish()
	}
	return n, err
}

// finish ends the exchange after the answer's last byte.
func (b *responseBody) finish() {
	b.closed = true
	// A request that is still being sent when its answer has ended leaves the connection at no message's begin.
	if !b.release() || b.resp.Close || !b.sender.ended() {
		b.c.broken.Store(true)
	}
	b.c.last = time.Now()
	b.c.buf.shrink()
}

// Close implements io.Closer: before the end it ends the connection.
func (b *responseBody) Close() error {
	if b.closed {
		return nil
	}
	b.closed = true
	b.release()
	b.c.Close()
	return nil
}

// release lets the context go; false = it has ended, and the connection with it.
func (b *responseBody) release() bool { return b.stop == nil || b.stop() }

// tunnel is the connection after a switch of protocols.
type tunnel struct{ c *ClientConn }

// Read implements io.Reader.
func (t *tunnel) Read(p []byte) (int, error) {
	if b := &t.c.buf; b.i < b.j {
		n := copy(p, b.data())
		b.i += n
		return n, nil
	}
	return t.c.nc.Read(p)
}

// Write implements io.Writer.
func (t *tunnel) Write(p []byte) (int, error) { return t.c.nc.Write(p) }

// CloseWrite ends one direction.
func (t *tunnel) CloseWrite() error {
	if cw, ok := t.c.nc.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return nil
}

// Close implements io.Closer.
func (t *tunnel) Close() error {
	t.c.in.release()
	t.c.Close()
	return nil
}
