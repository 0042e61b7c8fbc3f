// SPDX-License-Identifier: Apache-2.0

package dnsproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/services/agent/internal/dnswire"
)

// maxQuery is far more than a query needs.
const maxQuery = 4096

// readQueries serves clients' datagrams until the socket is closed.
func (p *Proxy) readQueries(ctx context.Context, c *net.UDPConn) error {
	buf, oob := make([]byte, maxQuery+1), make([]byte, 128)
	for {
		n, oobn, flags, client, err := c.ReadMsgUDPAddrPort(buf, oob)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("read queries: %w", err)
		}
		server, ok := destinationOf(oob[:oobn])
		if !ok || n > maxQuery || flags&unix.MSG_TRUNC != 0 {
			p.counters.Malformed.Add(1)
			continue
		}
		client = netip.AddrPortFrom(client.Addr().Unmap(), client.Port())
		if q := p.receive(append([]byte(nil), buf[:n]...), client, server, protoUDP, nil); q != nil {
			p.forward(ctx, q, buf[:n])
		}
	}
}

// forward sends a query to its server. wire may be changed.
func (p *Proxy) forward(ctx context.Context, q *query, wire []byte) {
	u, err := p.upstream(ctx, upstreamKey{q.client.Addr(), q.server})
	if err != nil {
		if errors.Is(err, errSocketsFull) {
			p.counters.SocketsFull.Add(1)
		} else {
			p.counters.Unreachable.Add(1)
		}
		p.fail(q, dnswire.RCodeServerFailure)
		return
	}
	id, err := u.table.add(q)
	if err != nil {
		p.counters.ClientOverload.Add(1)
		p.fail(q, dnswire.RCodeServerFailure)
		return
	}
	dnswire.SetID(wire, id)
	q.LimitSize(wire, p.cfg.UDPSize)
	_, err = u.conn.Write(wire)
	if errors.Is(err, unix.ECONNREFUSED) {
		// That was said of an earlier query.
		_, err = u.conn.Write(wire)
	}
	if err != nil {
		u.table.drop(id)
		p.counters.Unreachable.Add(1)
		p.fail(q, dnswire.RCodeServerFailure)
	}
}

// upstreamKey: a socket serves one client and one server.
type upstreamKey struct {
	client netip.Addr
	server netip.AddrPort
}

// upstream is a connected socket with the client's address. It has a new random port every now and then.
type upstream struct {
	key   upstreamKey
	conn  *net.UDPConn
	table table
	born  time.Time
	used  time.Time // guarded by upstreams.mu, as uses
	uses  int
}

const (
	// A port is used for so many queries and so long: it is half of what an answer's forger must guess.
	maxUses = 512
	maxAge  = 10 * time.Second
	maxIdle = 10 * time.Second
)

var errSocketsFull = errors.New("too many sockets to servers")

// upstreams are all sockets. Retired ones wait for their last answers.
type upstreams struct {
	mu      sync.Mutex
	all     map[upstreamKey]*upstream
	retired []*upstream
	clients map[netip.Addr]int // sockets of each, retired ones too
	total   int
}

// upstream returns the socket to a server for a client, a new one if need be.
func (p *Proxy) upstream(ctx context.Context, key upstreamKey) (*upstream, error) {
	s := &p.upstreams
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	u := s.all[key]
	if u != nil && u.uses < maxUses && now.Sub(u.born) < maxAge {
		u.uses++
		u.used = now
		return u, nil
	}
	if s.total >= p.cfg.MaxSockets || s.clients[key.client] >= p.cfg.MaxSocketsPerClient {
		s.makeRoomLocked(key.client, s.total >= p.cfg.MaxSockets)
	}
	if s.total >= p.cfg.MaxSockets || s.clients[key.client] >= p.cfg.MaxSocketsPerClient {
		if u != nil {
			return u, nil // an old port is better than no answer
		}
		return nil, errSocketsFull
	}
	conn, err := p.dial(ctx, "udp", key.client, key.server)
	if err != nil {
		return nil, fmt.Errorf("socket to %v: %w", key.server, err)
	}
	udp, _ := conn.(*net.UDPConn)
	if u != nil {
		s.retired = append(s.retired, u)
	}
	u = &upstream{key: key, conn: udp, born: now, used: now, uses: 1}
	s.all[key] = u
	s.clients[key.client]++
	s.total++
	p.tasks.Go(func() { p.readAnswers(u) })
	return u, nil
}

// makeRoomLocked closes the socket that was used least recently and waits for nothing: of a client, or of all.
func (s *upstreams) makeRoomLocked(client netip.Addr, ofAll bool) {
	var oldest *upstream
	for key, u := range s.all {
		if (ofAll || key.client == client) && (oldest == nil || u.used.Before(oldest.used)) && u.table.len() == 0 {
			oldest = u
		}
	}
	if oldest != nil {
		delete(s.all, oldest.key)
		s.closeLocked(oldest)
	}
}

func (s *upstreams) closeLocked(u *upstream) {
	_ = u.conn.Close() // the reader sees it
	s.total--
	if s.clients[u.key.client]--; s.clients[u.key.client] == 0 {
		delete(s.clients, u.key.client)
	}
}

// overdue takes the queries that have waited too long, and closes sockets that nobody needs.
func (s *upstreams) overdue(now time.Time, timeout time.Duration) []*query {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*query
	for key, u := range s.all {
		out = u.table.overdue(now.Add(-timeout), out)
		if now.Sub(u.used) > maxIdle && u.table.len() == 0 {
			delete(s.all, key)
			s.closeLocked(u)
		}
	}
	kept := s.retired[:0]
	for _, u := range s.retired {
		out = u.table.overdue(now.Add(-timeout), out)
		// Whoever got it before it retired has sent by now.
		if u.table.len() == 0 && now.Sub(u.used) > time.Second {
			s.closeLocked(u)
			continue
		}
		kept = append(kept, u)
	}
	clear(s.retired[len(kept):])
	s.retired = kept
	return out
}

func (s *upstreams) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, u := range s.all {
		delete(s.all, key)
		s.closeLocked(u)
	}
	for _, u := range s.retired {
		s.closeLocked(u)
	}
	s.retired = nil
}

func (s *upstreams) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total
}

// datagrams are buffers for answers; a socket has one only while it reads.
var datagrams = sync.Pool{New: func() any { b := make([]byte, dnswire.MaxSize); return &b }}

// readAnswers serves a server's datagrams until the socket is closed.
func (p *Proxy) readAnswers(u *upstream) {
	raw, err := u.conn.SyscallConn()
	if err != nil {
		return
	}
	for {
		var buffer *[]byte
		var n int
		var readErr error
		err := raw.Read(func(fd uintptr) bool {
			buffer, _ = datagrams.Get().(*[]byte)
			n, readErr = unix.Read(int(fd), *buffer)
			if errors.Is(readErr, unix.EAGAIN) {
				datagrams.Put(buffer)
				return false
			}
			return true
		})
		if err != nil {
			p.unreachable(u)
			return
		}
		if readErr != nil {
			p.unreachable(u)
		} else {
			p.datagram(u, (*buffer)[:n])
		}
		datagrams.Put(buffer)
	}
}

// unreachable ends what waits for a server that is said not to be there.
func (p *Proxy) unreachable(u *upstream) {
	for _, q := range u.table.clear() {
		p.lost(q)
	}
}

func (p *Proxy) datagram(u *upstream, msg []byte) {
	q := u.table.take(msg)
	if q == nil {
		p.counters.Mismatched.Add(1)
		return
	}
	p.answered(q, msg)
}
