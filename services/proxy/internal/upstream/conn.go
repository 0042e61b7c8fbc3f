// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"github.com/weirmesh/weir/services/proxy/internal/h1"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/strict"
)

// ConnectError is a connection that could not be made: nothing was sent.
type ConnectError struct{ Err error }

// Error implements error.
func (e *ConnectError) Error() string { return "connect: " + e.Err.Error() }

// Unwrap implements errors.
func (e *ConnectError) Unwrap() error { return e.Err }

type netConn = net.Conn

// roundTripper is one connection, of the library.
type roundTripper interface {
	RoundTrip(*http.Request) (*http.Response, error)
	// reserve reports whether one more request may be sent.
	reserve() bool
	// dead: it never will carry one again.
	dead() bool
	close()
}

// Conn is an upstream connection, for one request.
type Conn struct {
	pool *Pool
	lane lane
	rt   roundTripper

	// Under the pool's lock.
	uses, inUse int
	since       time.Time
	// idle: it is in the pool's list, between these two.
	idle          bool
	before, after *Conn
}

// RoundTrip sends a request and returns the answer's head.
func (c *Conn) RoundTrip(r *http.Request) (*http.Response, error) { return c.rt.RoundTrip(r) }

// Own is the connection itself if the proxy speaks HTTP/1 on it without the library, else nil: whoever has a request on it can interrupt it.
func (c *Conn) Own() *h1.ClientConn {
	if own, ok := c.rt.(ownConn); ok {
		return own.ClientConn
	}
	return nil
}

// Used reports whether the connection had carried a request before: an early end may then mean only that the server closed it as idle.
func (c *Conn) Used() bool { return c.uses > 0 }

// Release gives the connection back. reuse: the exchange ended as it should.
func (c *Conn) Release(reuse bool) { c.pool.put(c, reuse) }

// connector makes connections by the library.
type connector struct {
	h1      *http.Transport
	h2      *http2.Transport //nolint:staticcheck // net/http does not say whether one more stream has room on a connection
	limits  strict.Limits
	library bool
}

type dialKey struct{}

//nolint:staticcheck // http2.Transport, as above
func newConnector(maxHeader int64, library bool) connector {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		d, ok := ctx.Value(dialKey{}).(func(context.Context) (net.Conn, error))
		if !ok {
			return nil, errors.New("no dialer")
		}
		return d(ctx)
	}
	return connector{
		library: library, limits: strict.Limits{Bytes: int(maxHeader), Count: maxHeaders},
		h1: &http.Transport{
			DialContext: dial, DisableCompression: true, MaxResponseHeaderBytes: maxHeader, ExpectContinueTimeout: time.Second,
			ReadBufferSize: 4 << 10, WriteBufferSize: 4 << 10,
		},
		h2: &http2.Transport{
			AllowHTTP: true, DisableCompression: true, MaxHeaderListSize: uint32(min(maxHeader, 1<<30)), StrictMaxConcurrentStreams: false,
			ReadIdleTimeout: time.Minute, PingTimeout: 15 * time.Second, MaxReadFrameSize: 16 << 10,
		},
	}
}

func (t connector) connect(ctx context.Context, p model.Protocol, dial func(context.Context) (netConn, error)) (*Conn, error) {
	if p == model.HTTP2 {
		nc, err := dial(ctx)
		if err != nil {
			return nil, err
		}
		cc, err := t.h2.NewClientConn(nc) //nolint:staticcheck // as above
		if err != nil {
			nc.Close()
			return nil, err
		}
		cc.ReserveNewRequest()
		return &Conn{rt: &h2Conn{ClientConn: cc}, inUse: 1}, nil
	}
	nc, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	if c := h1.NewClientConn(nc, t.limits); !t.library && c.Looks() {
		return &Conn{rt: ownConn{c}, inUse: 1}, nil
	}
	made := func(context.Context) (net.Conn, error) { return nc, nil }
	// The library counts the time of the dial only; the connection outlives the request.
	cc, err := t.h1.NewClientConn(context.WithValue(ctx, dialKey{}, made), "http", "upstream:80")
	if err != nil {
		nc.Close()
		return nil, err
	}
	return &Conn{rt: h1Conn{cc}, inUse: 1}, nil
}

// maxHeaders of an answer.
const maxHeaders = 1000

// ownConn is a connection that can be looked at; TLS cannot.
type ownConn struct{ *h1.ClientConn }

func (c ownConn) reserve() bool { return c.Usable() }
func (c ownConn) dead() bool    { return c.Broken() }
func (c ownConn) close()        { c.Close() }

type h1Conn struct{ *http.ClientConn }

// reserve: the pool gives the connection to one request at a time, and the library's RoundTrip waits until the answer before has been put away.
func (c h1Conn) reserve() bool { return c.Err() == nil }
func (c h1Conn) dead() bool    { return c.Err() != nil }
func (c h1Conn) close()        { c.Close() }

type h2Conn struct {
	*http2.ClientConn
	once sync.Once
}

func (c *h2Conn) reserve() bool { return c.ReserveNewRequest() }

func (c *h2Conn) dead() bool {
	s := c.State()
	return s.Closed || s.Closing
}

func (c *h2Conn) close() { c.once.Do(func() { c.ClientConn.Close() }) }
