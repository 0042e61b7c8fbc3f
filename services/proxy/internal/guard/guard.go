// SPDX-License-Identifier: Apache-2.0

// Package guard stands between a client's connection and the library's HTTP/1 server. It alone reads what the client sent; the server gets a head that the guard
// wrote from what it read, so that there are no two readings of a message. Deleting it leaves the library's own parser.
package guard

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/strict"
)

// Config of a guarded connection.
type Config struct {
	Limits strict.Limits
	// Idle between requests, Header from a request's first byte to its head's last; 0 = no limit.
	Idle, Header time.Duration
	// Upgrades reports whether a protocol may be switched to: what follows such a request is kept until it has been answered.
	Upgrades func(protocol string) bool
	// Grace is what a connection without any request so far has for its first one when it is drained.
	Grace time.Duration
	// Refused hears of what was refused.
	Refused func(cause string)
}

type state uint8

const (
	head state = iota
	fixed
	chunkSize
	chunkData
	chunkEnd
	trailer
	// held: an upgrade was asked for; opaque: it was granted.
	held
	opaque
	ended
)

const (
	bufferSize = 8 << 10
	// maxChunkLine bounds a chunk's size and extensions.
	maxChunkLine = 4 << 10
	maxHeld      = 64 << 10
)

// Conn is a guarded connection. Reads must not overlap, as those of the library's server do not.
type Conn struct {
	net.Conn
	cfg    Config
	buf    []byte // what was read and not looked at
	seen   int    // of buf, what End has seen
	blank  int    // bytes of empty lines before the head
	out    []byte // what the server gets before anything else
	state  state
	remain int64

	mu       sync.Mutex
	requests []strict.Message
	served   bool // a request has come
	active   bool // a request is being answered
	began    bool // a head has begun, and its deadline runs
	armed    bool // a deadline of the guard's own is set
	outer    bool // the server has set a deadline
	waiting  bool // the connection is idle
	draining bool
	aborted  bool
}

// New guards a connection; first is what was read of it already.
func New(c net.Conn, first []byte, cfg Config) *Conn {
	return &Conn{Conn: c, cfg: cfg, buf: first}
}

// Next is the request whose head the server has just read.
func (c *Conn) Next() strict.Message {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.requests[0]
	c.requests, c.active, c.served = c.requests[1:], true, true
	return r
}

// Reuse is for h1, which reads the next request into the memory of the last one.
func (c *Conn) Reuse() {}

// Done says that the request has been answered.
func (c *Conn) Done() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.active = false
}

// Opaque makes the rest of the connection pass as it comes. Nothing may be reading.
func (c *Conn) Opaque() { c.state = opaque }

// Drain ends the connection when it is idle, or becomes so.
func (c *Conn) Drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
	if c.waiting && !c.served {
		c.armed = true
		c.Conn.SetReadDeadline(time.Now().Add(c.cfg.Grace)) //nolint:errcheck // a closed connection has no reader to wake
	} else if c.waiting {
		c.armed = true
		c.Conn.SetReadDeadline(aPast) //nolint:errcheck // a closed connection has no reader to wake
	}
}

// Abort makes the read under way and all others end.
func (c *Conn) Abort() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.aborted = true
	c.Conn.SetReadDeadline(aPast) //nolint:errcheck // a closed connection has no reader to wake
}

var aPast = time.Unix(1, 0)

// SetReadDeadline is called by the server to wake its own read, and to make it possible again.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.IsZero() && !c.outer || c.aborted {
		return nil
	}
	c.outer = !t.IsZero()
	return c.Conn.SetReadDeadline(t)
}

// SetDeadline is SetReadDeadline for reads.
func (c *Conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// Read gives the server a head that was checked, or a part of a body.
func (c *Conn) Read(p []byte) (int, error) {
	for {
		if len(c.out) > 0 {
			n := copy(p, c.out)
			c.out = c.out[n:]
			return n, nil
		}
		n, err := c.step(p)
		if err != nil {
			err = c.fail(err)
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// fail turns what was refused into a request that the handler answers, in its turn.
func (c *Conn) fail(err error) error {
	var bad *strict.Error
	if !errors.As(err, &bad) {
		return err
	}
	c.cfg.Refused(bad.Cause)
	if c.state != head {
		c.state = ended
		return err
	}
	c.push(strict.Message{Err: bad})
	c.state, c.out = ended, []byte("GET / HTTP/1.1\r\nHost: refused\r\nConnection: close\r\n\r\n")
	return nil
}

func (c *Conn) push(r strict.Message) {
	c.mu.Lock()
	c.requests = append(c.requests, r)
	c.mu.Unlock()
}

func (c *Conn) step(p []byte) (int, error) {
	switch c.state {
	case head:
		return 0, c.readHead()
	case fixed, chunkData:
		return c.readData(p)
	case chunkSize:
		return 0, c.readChunkSize()
	case chunkEnd:
		return 0, c.readChunkEnd()
	case trailer:
		return 0, c.readTrailer()
	case held:
		if len(c.buf) >= maxHeld {
			return 0, &strict.Error{Status: 400, Cause: "upgrade"}
		}
		return 0, c.fill()
	case opaque:
		if len(c.buf) > 0 {
			n := copy(p, c.buf)
			c.buf = c.buf[n:]
			return n, nil
		}
		return c.Conn.Read(p)
	}
	return 0, io.EOF
}

// fill reads more into the buffer.
func (c *Conn) fill() error {
	if cap(c.buf)-len(c.buf) < bufferSize/4 {
		c.buf = append(make([]byte, 0, max(bufferSize, 2*len(c.buf))), c.buf...)
	}
	n, err := c.Conn.Read(c.buf[len(c.buf):cap(c.buf)])
	c.buf = c.buf[:len(c.buf)+n]
	if n > 0 {
		return nil
	}
	return err
}

func (c *Conn) readHead() error {
	if n := strict.Blank(c.buf, strict.MaxBlank-c.blank); n > 0 {
		c.buf, c.seen, c.blank = c.buf[n:], 0, c.blank+n
	}
	n, err := strict.End(c.buf, c.seen, c.cfg.Limits)
	if err != nil {
		return err
	}
	if n == 0 {
		c.seen = len(c.buf)
		return c.fillHead()
	}
	c.seen, c.blank = 0, 0
	c.disarm()
	r, err := strict.Parse(c.buf[:n], c.cfg.Limits)
	if err != nil {
		return err
	}
	c.buf = c.buf[n:]
	if r.Upgrade != "" && (r.Length != 0 || !c.cfg.Upgrades(r.Upgrade)) {
		r.Upgrade = ""
		delete(r.Header, "Upgrade")
	}
	c.push(strict.Message{Request: r})
	c.out = appendHead(c.out[:0], r)
	switch {
	case r.Upgrade != "":
		c.state = held
	case r.Length > 0:
		c.state, c.remain = fixed, r.Length
	case r.Length < 0:
		c.state = chunkSize
	}
	return nil
}

// fillHead reads with the deadline that counts: of idle connections before a head's first byte, of heads after it. While a request is being answered, the
// server reads only to see whether the client goes away, and nothing is idle.
func (c *Conn) fillHead() error {
	if err := c.arm(); err != nil {
		return err
	}
	err := c.fill()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting = false
	switch {
	case err == nil || !errors.Is(err, os.ErrDeadlineExceeded):
		return err
	case c.aborted:
		return io.EOF
	case c.outer:
		return err // the server woke its own read
	case len(c.buf) > 0 && !c.draining:
		return &strict.Error{Status: 408, Cause: "header-timeout"}
	}
	return io.EOF
}

func (c *Conn) arm() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	// The server may read on before its handler has taken the request.
	idle := len(c.buf) == 0 && !c.active && len(c.requests) == 0
	if c.aborted || idle && c.draining && c.served {
		return io.EOF
	}
	var limit time.Duration
	switch {
	case idle && c.draining:
		limit = c.cfg.Grace
	case idle:
		limit = c.cfg.Idle
	case len(c.buf) > 0 && !c.began:
		limit, c.began = c.cfg.Header, true
	}
	if limit > 0 && !c.outer {
		c.armed = true
		c.Conn.SetReadDeadline(time.Now().Add(limit)) //nolint:errcheck // the read says it
	}
	c.waiting = idle
	return nil
}

// disarm: bodies have no deadline of the guard's; whoever waits for one calls Abort.
func (c *Conn) disarm() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.armed && !c.outer && !c.aborted {
		c.Conn.SetReadDeadline(time.Time{}) //nolint:errcheck // the read says it
	}
	c.armed, c.began = false, false
}

// appendHead writes what the server must know to frame the message; the handler takes the rest from Next.
func appendHead(b []byte, r *strict.Request) []byte {
	b = append(b, r.Method...)
	if r.Minor == 0 {
		b = append(b, " / HTTP/1.0\r\nHost: guarded\r\n"...)
	} else {
		b = append(b, " / HTTP/1.1\r\nHost: guarded\r\n"...)
	}
	switch {
	case r.Length > 0:
		b = append(strconv.AppendInt(append(b, "Content-Length: "...), r.Length, 10), "\r\n"...)
	case r.Length < 0:
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	}
	if r.Expect {
		b = append(b, "Expect: 100-continue\r\n"...)
	}
	switch {
	case r.Close:
		b = append(b, "Connection: close\r\n"...)
	case r.Minor == 0:
		b = append(b, "Connection: keep-alive\r\n"...)
	}
	return append(b, "\r\n"...)
}

func (c *Conn) readData(p []byte) (int, error) {
	if int64(len(p)) > c.remain {
		p = p[:c.remain]
	}
	var n int
	var err error
	if len(c.buf) > 0 {
		n = copy(p, c.buf)
		c.buf = c.buf[n:]
	} else {
		n, err = c.Conn.Read(p)
	}
	c.remain -= int64(n)
	if c.remain == 0 {
		c.endData()
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (c *Conn) endData() {
	if c.state == chunkData {
		c.state = chunkEnd
		return
	}
	c.state = head
}

// line takes one line, without its end; ok is false when more was read and it must be tried again.
func (c *Conn) line(limit int) (line []byte, ok bool, err error) {
	i := bytes.IndexByte(c.buf, '\n')
	if i < 0 {
		if len(c.buf) > limit {
			return nil, false, &strict.Error{Status: 400, Cause: "chunk-line"}
		}
		if err := c.fill(); err != nil {
			return nil, false, midBody(err)
		}
		return nil, false, nil
	}
	if i == 0 || c.buf[i-1] != '\r' {
		return nil, false, &strict.Error{Status: 400, Cause: "bare-lf"}
	}
	line = c.buf[:i-1]
	c.buf = c.buf[i+1:]
	return line, true, nil
}

func midBody(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (c *Conn) readChunkSize() error {
	line, ok, err := c.line(maxChunkLine)
	if !ok {
		return err
	}
	n, err := strict.ChunkSize(line)
	if err != nil {
		return err
	}
	if n == 0 {
		c.state, c.seen = trailer, 0
		return nil
	}
	c.out = append(strconv.AppendInt(c.out[:0], n, 16), "\r\n"...)
	c.state, c.remain = chunkData, n
	return nil
}

func (c *Conn) readChunkEnd() error {
	line, ok, err := c.line(2)
	if !ok {
		return err
	}
	if len(line) > 0 {
		return &strict.Error{Status: 400, Cause: "chunk-end"}
	}
	c.out, c.state = append(c.out[:0], "\r\n"...), chunkSize
	return nil
}

func (c *Conn) readTrailer() error {
	n := 0
	if bytes.HasPrefix(c.buf, []byte("\r\n")) {
		n = 2
	} else if len(c.buf) > 1 {
		var err error
		if n, err = strict.TrailerEnd(c.buf, c.cfg.Limits); err != nil {
			return err
		}
	}
	if n == 0 {
		return midBody(c.fill())
	}
	h, err := strict.Trailer(c.buf[:n], c.cfg.Limits)
	if err != nil {
		return err
	}
	c.buf = c.buf[n:]
	c.out = append(c.out[:0], "0\r\n"...)
	for name, values := range h {
		for _, v := range values {
			c.out = append(append(append(append(c.out, name...), ": "...), v...), "\r\n"...)
		}
	}
	c.out = append(c.out, "\r\n"...)
	c.state = head
	return nil
}
