// SPDX-License-Identifier: Apache-2.0

// Package flood bounds the frames of an HTTP/2 client that cost the server more than the client: resets of streams that have just been opened, settings and pings
// that want an answer, frames without content. It counts frames as they pass and interprets nothing; the library's server is the only reader of what they say.
package flood

import (
	"errors"
	"net"
	"time"

	"golang.org/x/net/http2"
)

// ErrFlood ends a connection with too many such frames.
var ErrFlood = errors.New("too many frames of a kind")

// allowance of a kind: what may come at once, and what each second adds.
type allowance struct {
	cause     string
	burst     float64
	perSecond float64
}

// Pings are the way gRPC clients measure the path, as fast as it answers; nobody has a use for hundreds of settings.
var (
	resets   = allowance{"rapid-reset", 200, 50}
	settings = allowance{"settings-flood", 100, 10}
	pings    = allowance{"ping-flood", 5000, 2000}
	priority = allowance{"priority-flood", 1000, 100}
	empty    = allowance{"empty-frames", 500, 50}
)

const (
	headerSize = 9
	// prefaceSize bytes come before the first frame.
	prefaceSize = len(http2.ClientPreface)
	kinds       = 5
)

// Conn counts the frames that are read.
type Conn struct {
	net.Conn
	refused func(cause string)
	now     func() time.Time

	skip   int // bytes until the next frame's header
	header [headerSize]byte
	have   int
	level  [kinds]float64
	last   [kinds]time.Time
	bad    bool
}

// New counts the frames of a connection whose preface is still to be read; refused hears of floods.
func New(c net.Conn, now func() time.Time, refused func(cause string)) *Conn {
	return &Conn{Conn: c, refused: refused, now: now, skip: prefaceSize}
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	if c.bad {
		return 0, ErrFlood
	}
	n, err := c.Conn.Read(p)
	if !c.count(p[:n]) {
		c.bad = true
		return 0, ErrFlood
	}
	return n, err
}

func (c *Conn) count(b []byte) bool {
	for len(b) > 0 {
		if c.skip > 0 {
			n := min(c.skip, len(b))
			c.skip -= n
			b = b[n:]
			continue
		}
		n := copy(c.header[c.have:], b)
		c.have += n
		b = b[n:]
		if c.have < headerSize {
			return true
		}
		c.have = 0
		c.skip = int(c.header[0])<<16 | int(c.header[1])<<8 | int(c.header[2])
		if !c.frame(http2.FrameType(c.header[3]), http2.Flags(c.header[4])) {
			return false
		}
	}
	return true
}

func (c *Conn) frame(t http2.FrameType, f http2.Flags) bool {
	switch {
	case t == http2.FrameRSTStream:
		return c.take(0, &resets)
	case t == http2.FrameSettings && !f.Has(http2.FlagSettingsAck):
		return c.take(1, &settings)
	case t == http2.FramePing && !f.Has(http2.FlagPingAck):
		return c.take(2, &pings)
	case t == http2.FramePriority, t > http2.FrameContinuation:
		return c.take(3, &priority)
	case c.skip == 0 && (t == http2.FrameData && !f.Has(http2.FlagDataEndStream) || t == http2.FrameContinuation || t == http2.FrameHeaders):
		return c.take(4, &empty)
	}
	return true
}

func (c *Conn) take(kind int, a *allowance) bool {
	now := c.now()
	if !c.last[kind].IsZero() {
		c.level[kind] = max(0, c.level[kind]-now.Sub(c.last[kind]).Seconds()*a.perSecond)
	}
	c.last[kind] = now
	c.level[kind]++
	if c.level[kind] > a.burst {
		c.refused(a.cause)
		return false
	}
	return true
}
