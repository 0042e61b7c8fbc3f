// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"

	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/sockets"
)

// Cluster implements model.Cluster.
type Cluster struct {
	config   *config
	source   *clusterv3.Cluster
	counters *Counters
	dialer   *sockets.Dialer
	now      func() time.Time
	// generation changes with what connections are made of.
	generation uint64
	endpoints  atomic.Pointer[set]
	ejecting   sync.Mutex
}

// Name implements model.Cluster.
func (c *Cluster) Name() string { return c.config.name }

// Protocol implements model.Cluster.
func (c *Cluster) Protocol() model.Protocol { return c.config.protocol }

// Generation changes when connections that were made before should not be used any more: with TLS, or with how sockets are bound.
func (c *Cluster) Generation() uint64 { return c.generation }

// ConnectTimeout implements model.Cluster.
func (c *Cluster) ConnectTimeout() time.Duration { return c.config.connectTimeout }

// Acquire implements model.Cluster.
func (c *Cluster) Acquire(conn *model.Conn, avoid []netip.AddrPort) (model.Endpoint, func(ok bool), error) {
	if !enter(&c.counters.Requests, c.config.breakers.requests) {
		c.counters.Overflows.Add(1)
		return model.Endpoint{}, nil, model.ErrOverflow
	}
	var chosen *host
	var endpoint model.Endpoint
	if c.config.kind == original {
		// A client that came to the listener's own address would be sent to the listener again, and again.
		if !conn.Direct && conn.Local.IsValid() {
			endpoint = model.Endpoint{Address: conn.Local, Weight: 1, Healthy: true}
		}
	} else {
		choice := chooser{
			policy: c.config.policy, choices: c.config.choices, avoid: avoid, outlier: c.config.outlier != nil,
		}
		if conn.Source != nil {
			choice.family = familyOf(conn.Remote.Addr())
		}
		if choice.outlier {
			choice.now = c.now()
		}
		if chosen = choice.choose(c.endpoints.Load(), c.config.panicPercent); chosen != nil {
			endpoint = chosen.endpoint()
			chosen.active.Add(1)
		}
	}
	if !endpoint.Address.IsValid() && endpoint.Path == "" {
		c.counters.Requests.Add(-1)
		c.counters.NoEndpoint.Add(1)
		return model.Endpoint{}, nil, model.ErrNoEndpoint
	}
	c.counters.TotalRequests.Add(1)
	var done atomic.Bool
	return endpoint, func(ok bool) {
		if !done.CompareAndSwap(false, true) {
			return
		}
		c.counters.Requests.Add(-1)
		if !ok {
			c.counters.FailedRequests.Add(1)
		}
		if chosen != nil {
			chosen.active.Add(-1)
			c.report(chosen, false, ok)
		}
	}, nil
}

// Retry implements model.Cluster.
func (c *Cluster) Retry() (func(), bool) {
	if !enter(&c.counters.Retries, c.config.breakers.allowedRetries(c.counters.Requests.Load())) {
		c.counters.Overflows.Add(1)
		return nil, false
	}
	c.counters.TotalRetries.Add(1)
	return sync.OnceFunc(func() { c.counters.Retries.Add(-1) }), true
}

// Dial implements model.Cluster.
func (c *Cluster) Dial(ctx context.Context, conn *model.Conn, e model.Endpoint) (net.Conn, error) {
	if !enter(&c.counters.Pending, c.config.breakers.pending) {
		c.counters.Overflows.Add(1)
		return nil, model.ErrOverflow
	}
	defer c.counters.Pending.Add(-1)
	if !enter(&c.counters.Connections, c.config.breakers.connections) {
		c.counters.Overflows.Add(1)
		return nil, model.ErrOverflow
	}
	release := sync.OnceFunc(func() { c.counters.Connections.Add(-1) })
	ctx, cancel := context.WithTimeout(ctx, c.config.connectTimeout)
	defer cancel()
	up, err := c.connect(ctx, conn, e, release)
	if c.config.outlier != nil {
		c.report(c.find(e), true, err == nil)
	}
	if err != nil {
		release()
		c.counters.ConnectFailures.Add(1)
		return nil, fmt.Errorf("cluster %s: %w", c.config.name, err)
	}
	c.counters.TotalConnections.Add(1)
	return up, nil
}

// connect makes the connection; release is called when it is closed.
func (c *Cluster) connect(ctx context.Context, conn *model.Conn, e model.Endpoint, release func()) (net.Conn, error) {
	var raw net.Conn
	var err error
	if e.Path != "" {
		raw, err = c.dialer.DialUnix(ctx, e.Path)
	} else {
		raw, err = c.dialer.Dial(ctx, c.spec(conn), e.Address)
	}
	if err != nil {
		return nil, err
	}
	up := counted(raw, release)
	if c.config.tls == nil {
		return up, nil
	}
	return c.config.tls.Handshake(ctx, up)
}

func (c *Cluster) spec(conn *model.Conn) sockets.Spec {
	spec := sockets.Spec{Options: c.config.options, PortMin: c.config.portMin, PortMax: c.config.portMax}
	if conn == nil || conn.Source == nil {
		return spec
	}
	spec.Source, spec.Mark = conn.Remote.Addr().Unmap(), conn.Source.Mark
	if spec.PortMin == 0 {
		spec.PortMin, spec.PortMax = conn.Source.PortMin, conn.Source.PortMax
	}
	return spec
}

// find returns the host of an endpoint; nil = it has gone.
func (c *Cluster) find(e model.Endpoint) *host {
	for _, t := range c.endpoints.Load().tiers {
		for _, h := range t.hosts {
			if h.address == e.Address && h.path == e.Path {
				return h
			}
		}
	}
	return nil
}

// tcpConn keeps what *net.TCPConn can do (splice, half-close).
type tcpConn struct {
	*net.TCPConn

	release func()
}

// Close closes the connection and no longer counts it.
func (c *tcpConn) Close() error {
	c.release()
	return c.TCPConn.Close()
}

// Unwrap returns the connection itself, which splice needs; closing it alone would leave it counted.
func (c *tcpConn) Unwrap() *net.TCPConn { return c.TCPConn }

type otherConn struct {
	*net.UnixConn

	release func()
}

// Close closes the connection and no longer counts it.
func (c *otherConn) Close() error {
	c.release()
	return c.UnixConn.Close()
}

type anyConn struct {
	net.Conn

	release func()
}

// Close closes the connection and no longer counts it.
func (c *anyConn) Close() error {
	c.release()
	return c.Conn.Close()
}

func counted(raw net.Conn, release func()) net.Conn {
	switch conn := raw.(type) {
	case *net.TCPConn:
		return &tcpConn{TCPConn: conn, release: release}
	case *net.UnixConn:
		return &otherConn{UnixConn: conn, release: release}
	}
	return &anyConn{Conn: raw, release: release}
}
