// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"golang.org/x/net/http2"

	"github.com/weirmesh/weir/services/proxy/internal/flood"
	"github.com/weirmesh/weir/services/proxy/internal/guard"
	"github.com/weirmesh/weir/services/proxy/internal/h1"
	"github.com/weirmesh/weir/services/proxy/internal/model"
)

// Serve speaks HTTP with the client of nc until the connection has ended, and closes it. The end of ctx drains it: requests in flight are finished, then the
// connection is closed.
func (m *Manager) Serve(ctx context.Context, nc net.Conn, c *model.Conn) {
	defer nc.Close()
	s := &session{m: m, conn: c, drain: ctx, began: time.Now()}
	first, isHTTP2, err := m.sniff(ctx, nc)
	if err != nil {
		return
	}
	if isHTTP2 {
		s.serveHTTP2(ctx, &prefixed{Conn: nc, first: first})
		return
	}
	s.serveHTTP1(ctx, nc, first)
}

// firstGrace is what a connection that was accepted and has sent nothing has for its first request when it is drained: the client could not know.
const firstGrace = 2 * time.Second

const preface = http2.ClientPreface

// sniff reads until it is clear which version the client speaks: no request of HTTP/1 begins with HTTP/2's preface.
func (m *Manager) sniff(ctx context.Context, nc net.Conn) (first []byte, isHTTP2 bool, err error) {
	switch m.cfg.codec {
	case hcmv3.HttpConnectionManager_HTTP1:
		return nil, false, nil
	case hcmv3.HttpConnectionManager_HTTP2:
		return nil, true, nil
	}
	deadline := &firstDeadline{nc: nc}
	stop := context.AfterFunc(ctx, deadline.drain)
	defer stop()
	deadline.set(m.cfg.idle)
	buf := make([]byte, 0, 4<<10)
	for {
		n, err := nc.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if n == 0 && err != nil {
			return nil, false, err
		}
		k := min(len(buf), len(preface))
		if string(buf[:k]) != preface[:k] {
			break
		}
		if k == len(preface) {
			isHTTP2 = true
			break
		}
		if n == len(buf) {
			deadline.set(m.cfg.headers)
		}
	}
	return buf, isHTTP2, deadline.end()
}

// firstDeadline is a connection's read deadline until its version is known: whichever of idleness and drain comes last, the drain's stands.
type firstDeadline struct {
	nc      net.Conn
	mu      sync.Mutex
	drained bool
	ended   bool
}

func (d *firstDeadline) set(after time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if after > 0 && !d.drained {
		d.nc.SetReadDeadline(time.Now().Add(after)) //nolint:errcheck // the read says it
	}
}

func (d *firstDeadline) drain() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.drained = true; !d.ended {
		d.nc.SetReadDeadline(time.Now().Add(firstGrace)) //nolint:errcheck // the read says it
	}
}

func (d *firstDeadline) end() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ended = true
	return d.nc.SetReadDeadline(time.Time{})
}

func (s *session) serveHTTP1(ctx context.Context, nc net.Conn, first []byte) {
	if s.m.env.Library {
		s.serveLibrary(ctx, nc, first)
		return
	}
	cfg := s.m.cfg
	c := h1.NewConn(nc, first, h1.Config{Limits: cfg.limits, Idle: cfg.idle, Header: cfg.headers, Upgrades: s.upgrades, Grace: firstGrace, Refused: s.refused})
	s.guard, s.own, s.hijacked = c, true, func() error { return nil }
	stop := context.AfterFunc(ctx, c.Drain)
	defer stop()
	defer s.end()
	c.Serve(ctx, s)
}

// end lets go of what the session kept for its next request.
func (s *session) end() {
	if s.unhook != nil {
		s.unhook()
	}
	if s.spare != nil {
		s.spare.timer.release()
	}
}

func (s *session) upgrades(protocol string) bool {
	return protocol != "h2c" && s.m.current().knowsUpgrade(protocol)
}

func (s *session) refused(cause string) { s.m.current().env.Limits.Refused(s.conn.Namespace, cause) }

func (s *session) serveLibrary(ctx context.Context, nc net.Conn, first []byte) {
	cfg := s.m.cfg
	g := guard.New(nc, first, guard.Config{
		Limits: cfg.limits, Idle: cfg.idle, Header: cfg.headers,
		Upgrades: s.upgrades, Grace: firstGrace, Refused: s.refused,
	})
	s.guard = g
	stop := context.AfterFunc(ctx, g.Drain)
	defer stop()
	l := &oneConn{conn: g, done: make(chan struct{})}
	srv := &http.Server{
		Handler: s, ErrorLog: s.m.errorLog(), DisableGeneralOptionsHandler: true,
		// The guard has checked all sizes; what it writes is small.
		MaxHeaderBytes: 64 << 10,
		ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				l.Close()
			}
		},
		Protocols: http1Only(),
	}
	s.hijacked = l.Close
	srv.Serve(l) //nolint:errcheck // it ends when the connection has
}

// knowsUpgrade: a route may switch on what the manager has not.
func (m *Manager) knowsUpgrade(protocol string) bool {
	if _, ok := m.cfg.upgrades[protocol]; ok {
		return true
	}
	t := m.table()
	return t != nil && t.Upgrades(protocol)
}

func http1Only() *http.Protocols {
	var p http.Protocols
	p.SetHTTP1(true)
	return &p
}

//nolint:staticcheck // net/http's own server of HTTP/2 takes what a listener accepted, not a connection of which the beginning was read
func (s *session) serveHTTP2(ctx context.Context, nc net.Conn) {
	cfg := s.m.cfg
	base := &http.Server{Handler: s, ErrorLog: s.m.errorLog(), MaxHeaderBytes: cfg.limits.Bytes}
	h2 := &http2.Server{
		MaxConcurrentStreams: cfg.maxStreams, MaxReadFrameSize: 16 << 10, IdleTimeout: cfg.idle, PermitProhibitedCipherSuites: true,
		MaxUploadBufferPerStream: cfg.streamWindow, MaxUploadBufferPerConnection: cfg.connWindow, WriteByteTimeout: time.Minute,
		MaxDecoderHeaderTableSize: 4 << 10, ReadIdleTimeout: 5 * time.Minute,
		CountError: func(kind string) {
			s.m.current().env.Limits.Refused(s.conn.Namespace, "http2-"+strings.ReplaceAll(kind, "_", "-"))
		},
	}
	if err := http2.ConfigureServer(base, h2); err != nil {
		s.m.env.Log.Error("http/2 server", "error", err)
		return
	}
	// Shutdown of a server that listens on nothing only tells its connections.
	shutdown := func() { base.Shutdown(context.WithoutCancel(ctx)) } //nolint:errcheck // there is no listener
	ended := make(chan struct{})
	defer close(ended)
	stop := context.AfterFunc(ctx, func() {
		if s.requests.Load() == 0 {
			// The first request's answer ends the connection too.
			select {
			case <-ended:
			case <-time.After(firstGrace):
			}
		}
		shutdown()
	})
	defer stop()
	nc = flood.New(nc, time.Now, s.refused)
	h2.ServeConn(nc, &http2.ServeConnOpts{BaseConfig: base, Handler: s})
}

// errorLog swallows what the library says of its clients: it is counted, not logged.
func (m *Manager) errorLog() *log.Logger { return log.New(io.Discard, "", 0) }

// prefixed is a connection with something to be read first.
type prefixed struct {
	net.Conn
	first []byte
}

// Read implements io.Reader.
func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.first) > 0 {
		n := copy(b, p.first)
		p.first = p.first[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// oneConn is a listener that has one connection, and ends with it.
type oneConn struct {
	conn net.Conn
	once sync.Once
	done chan struct{}
}

// Accept implements net.Listener.
func (l *oneConn) Accept() (net.Conn, error) {
	if c := l.conn; c != nil {
		l.conn = nil
		return c, nil
	}
	<-l.done
	return nil, io.EOF
}

// Close implements net.Listener.
func (l *oneConn) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements net.Listener.
func (l *oneConn) Addr() net.Addr { return &net.TCPAddr{} }
