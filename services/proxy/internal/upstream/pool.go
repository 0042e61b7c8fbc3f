// SPDX-License-Identifier: Apache-2.0

// Package upstream keeps connections to upstream endpoints. None is ever shared between two client addresses.
package upstream

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/model"
)

// Config bounds a pool.
type Config struct {
	// MaxIdle connections in the whole pool, and MaxIdleLane of one lane (client address, endpoint, mark, protocol); beyond them the oldest are closed.
	MaxIdle, MaxIdleLane int
	// IdleTimeout after which an idle connection is closed.
	IdleTimeout time.Duration
	// MaxHeaderBytes of a response.
	MaxHeaderBytes int64
	// Library makes all connections the library's: the oracle of tests.
	Library bool
}

func (c Config) withDefaults() Config {
	if c.MaxIdle == 0 {
		c.MaxIdle = 4096
	}
	if c.MaxIdleLane == 0 {
		c.MaxIdleLane = 64
	}
	if c.IdleTimeout == 0 {
		c.IdleTimeout = time.Minute
	}
	if c.MaxHeaderBytes == 0 {
		c.MaxHeaderBytes = 256 << 10
	}
	return c
}

// lane is what a connection may be used for. The client's address is part of it, and what distinguishes stages, so that no two of them share a connection.
type lane struct {
	client     netip.Addr
	mark       uint32
	source     bool
	cluster    string
	generation uint64
	endpoint   model.Endpoint
	protocol   model.Protocol
}

// Pool of upstream connections, safe for concurrent use.
type Pool struct {
	cfg   Config
	conns connector

	mu     sync.Mutex
	lanes  map[lane]*conns
	idle   idleList // those that carry nothing
	closed bool
}

// conns of one lane.
type conns struct {
	// free carry no request (HTTP/1) or may carry more (HTTP/2); the one used last is at the end.
	free []*Conn
	idle int
}

// NewPool makes a pool; zero fields of the configuration have defaults.
func NewPool(cfg Config) *Pool {
	cfg = cfg.withDefaults()
	return &Pool{cfg: cfg, conns: newConnector(cfg.MaxHeaderBytes, cfg.Library), lanes: map[lane]*conns{}}
}

// generation distinguishes configurations of a cluster whose connections differ.
type generation interface{ Generation() uint64 }

// laneOf a request; protocol is never SameAsClient.
func laneOf(c *model.Conn, cl model.Cluster, e model.Endpoint, protocol model.Protocol) lane {
	// Weight and health change without the endpoint's becoming another.
	l := lane{client: c.Remote.Addr().Unmap(), cluster: cl.Name(), endpoint: model.Endpoint{Address: e.Address, Path: e.Path}, protocol: protocol}
	if c.Source != nil {
		l.mark, l.source = c.Source.Mark, true
	}
	if g, ok := cl.(generation); ok {
		l.generation = g.Generation()
	}
	return l
}

// Take returns a connection for one request that was used before; nil = there is none. Each that is taken must be released.
func (p *Pool) Take(c *model.Conn, cl model.Cluster, e model.Endpoint, protocol model.Protocol) *Conn {
	return p.take(laneOf(c, cl, e, protocol))
}

// Get returns a connection for one request. fresh forbids one that was used before. Each that is got must be released.
func (p *Pool) Get(ctx context.Context, c *model.Conn, cl model.Cluster, e model.Endpoint, protocol model.Protocol, fresh bool) (*Conn, error) {
	l := laneOf(c, cl, e, protocol)
	if !fresh {
		if conn := p.take(l); conn != nil {
			return conn, nil
		}
	}
	if d := cl.ConnectTimeout(); d > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	conn, err := p.conns.connect(ctx, protocol, func(ctx context.Context) (netConn, error) { return cl.Dial(ctx, c, e) })
	if err != nil {
		return nil, &ConnectError{Err: err}
	}
	conn.pool, conn.lane = p, l
	if protocol == model.HTTP2 {
		p.share(conn)
	}
	return conn, nil
}

// take finds a usable connection, the one used last.
func (p *Pool) take(l lane) *Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	cs := p.lanes[l]
	if cs == nil {
		return nil
	}
	for i := len(cs.free) - 1; i >= 0; i-- {
		conn := cs.free[i]
		if !conn.rt.reserve() {
			if conn.rt.dead() {
				p.remove(cs, i, conn)
			}
			continue
		}
		p.unidle(cs, conn)
		conn.uses++
		conn.inUse++
		if l.protocol != model.HTTP2 {
			cs.free = append(cs.free[:i], cs.free[i+1:]...)
		}
		return conn
	}
	p.drop(l, cs)
	return nil
}

// share lets others use a new HTTP/2 connection at once.
func (p *Pool) share(conn *Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	cs := p.lane(conn.lane)
	cs.free = append(cs.free, conn)
}

func (p *Pool) lane(l lane) *conns {
	cs := p.lanes[l]
	if cs == nil {
		cs = &conns{}
		p.lanes[l] = cs
	}
	return cs
}

func (p *Pool) drop(l lane, cs *conns) {
	if len(cs.free) == 0 {
		delete(p.lanes, l)
	}
}

// remove closes a connection that can carry nothing more.
func (p *Pool) remove(cs *conns, i int, conn *Conn) {
	cs.free = append(cs.free[:i], cs.free[i+1:]...)
	p.unidle(cs, conn)
	if conn.inUse == 0 {
		conn.rt.close()
	}
}

func (p *Pool) unidle(cs *conns, conn *Conn) {
	if !conn.idle {
		return
	}
	p.idle.remove(conn)
	cs.idle--
}

// put takes a connection back after a request.
func (p *Pool) put(conn *Conn, reuse bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	conn.inUse--
	cs := p.lane(conn.lane)
	shared := conn.lane.protocol == model.HTTP2
	if shared && conn.inUse > 0 {
		return
	}
	// A stream that ended badly leaves the others of its connection alone.
	if !reuse && !shared || p.closed || conn.rt.dead() {
		p.forget(cs, conn)
		return
	}
	if !shared {
		cs.free = append(cs.free, conn)
	}
	conn.since = time.Now()
	p.idle.push(conn)
	cs.idle++
	if cs.idle > p.cfg.MaxIdleLane {
		p.forget(cs, oldest(cs))
	}
	if p.idle.n > p.cfg.MaxIdle {
		first := p.idle.first
		p.forget(p.lane(first.lane), first)
	}
}

// oldest idle connection of a lane: those used last are at the end.
func oldest(cs *conns) *Conn {
	for _, conn := range cs.free {
		if conn.idle {
			return conn
		}
	}
	return nil
}

// forget closes a connection that carries nothing.
func (p *Pool) forget(cs *conns, conn *Conn) {
	for i := range cs.free {
		if cs.free[i] == conn {
			cs.free = append(cs.free[:i], cs.free[i+1:]...)
			break
		}
	}
	p.unidle(cs, conn)
	p.drop(conn.lane, cs)
	conn.rt.close()
}

// idleList is connections in the order in which they became idle. It is linked through them: every request takes one off and puts one back.
type idleList struct {
	first, last *Conn
	n           int
}

func (l *idleList) push(c *Conn) {
	c.idle, c.before, c.after = true, l.last, nil
	if l.last == nil {
		l.first = c
	} else {
		l.last.after = c
	}
	l.last = c
	l.n++
}

func (l *idleList) remove(c *Conn) {
	if c.before == nil {
		l.first = c.after
	} else {
		c.before.after = c.after
	}
	if c.after == nil {
		l.last = c.before
	} else {
		c.after.before = c.before
	}
	c.idle, c.before, c.after = false, nil, nil
	l.n--
}

// Run closes idle connections in time, and all of them when ctx ends.
func (p *Pool) Run(ctx context.Context) error {
	tick := time.NewTicker(max(p.cfg.IdleTimeout/4, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			p.reap(time.Time{}, true, true)
			return nil
		case now := <-tick.C:
			p.reap(now.Add(-p.cfg.IdleTimeout), false, false)
		}
	}
}

// reap closes what has been idle since before a time, or everything that is idle; last: nothing will be idle any more.
func (p *Pool) reap(before time.Time, all, last bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = p.closed || last
	for conn := p.idle.first; conn != nil; {
		next := conn.after
		if all || conn.since.Before(before) || conn.rt.dead() {
			p.forget(p.lane(conn.lane), conn)
		} else if !all && !conn.since.Before(before) {
			break
		}
		conn = next
	}
}

// Idle is the number of idle connections, Lanes that of lanes that hold any.
func (p *Pool) Idle() (idle, lanes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.idle.n, len(p.lanes)
}

// CloseIdle closes what is idle now. Connections that carry something live on.
func (p *Pool) CloseIdle() { p.reap(time.Time{}, true, false) }
