// SPDX-License-Identifier: Apache-2.0

package dnsproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

// upstreamKey: a socket serves one client and one server.
type upstreamKey struct {
	client netip.Addr
	server netip.AddrPort
}

// upstream is a connected socket with the client's address. It has a new random port every now and then.
type upstream struct {
	key   upstreamKey
	conn  net.Conn
	raw   syscall.RawConn
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
	raw, err := udp.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("socket to %v: %w", key.server, err), conn.Close())
	}
	if u != nil {
		s.retired = append(s.retired, u)
	}
	u = &upstream{key: key, conn: conn, raw: raw, born: now, used: now, uses: 1}
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
