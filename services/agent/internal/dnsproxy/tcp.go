// SPDX-License-Identifier: Apache-2.0

package dnsproxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/services/agent/internal/dnswire"
)

const (
	// A connection without queries is closed after streamIdle, a client that does not read after streamWrite.
	streamIdle  = 30 * time.Second
	streamWrite = 5 * time.Second
	// maxPipelined is how many queries of a connection may wait, maxQueued how many bytes wait for the client.
	maxPipelined = 256
	maxQueued    = 1 << 20
	// finishInterval is how often a stream whose client has asked all looks if it has been told all.
	finishInterval = 5 * time.Millisecond
)

// stream is a client's TCP connection and, from its first query that passes on, one to its server.
type stream struct {
	proxy          *Proxy
	client, server netip.AddrPort
	conn           net.Conn
	table          table

	out    chan []byte   // to the client
	queued atomic.Int64  // bytes that are not written
	flying atomic.Int64  // queries that have not ended
	gone   chan struct{} // closed by close

	mu       sync.Mutex
	upstream net.Conn
	closed   bool
}

// streams are all connections of clients.
type streams struct {
	mu      sync.Mutex
	all     map[*stream]struct{}
	clients map[netip.Addr]int
}

// accept serves clients' connections until the listener is closed.
func (p *Proxy) accept(ctx context.Context, l *net.TCPListener) error {
	for {
		conn, err := l.AcceptTCP()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			var temporary interface{ Temporary() bool }
			if errors.As(err, &temporary) && temporary.Temporary() {
				p.counters.ConnsRefused.Add(1)
				time.Sleep(10 * time.Millisecond) // out of descriptors, or the client is gone
				continue
			}
			return fmt.Errorf("accept: %w", err)
		}
		s := &stream{proxy: p, conn: conn, client: addrPortOf(conn.RemoteAddr()), server: addrPortOf(conn.LocalAddr()),
			out: make(chan []byte, maxPipelined), gone: make(chan struct{})}
		if p.cfg.Judge.Judge(s.client.Addr(), s.server, protoTCP, ".").Endpoint == 0 {
			p.counters.Unknown.Add(1)
			_ = conn.Close()
			continue
		}
		if !p.streams.add(s, p.cfg.MaxConns, p.cfg.MaxConnsPerClient) {
			p.counters.ConnsRefused.Add(1)
			_ = conn.SetLinger(0)
			_ = conn.Close()
			continue
		}
		p.tasks.Go(func() { s.serve(context.WithoutCancel(ctx)) })
	}
}

func addrPortOf(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

func (s *streams) add(x *stream, maxAll, maxClient int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.all) >= maxAll || s.clients[x.client.Addr()] >= maxClient {
		return false
	}
	s.all[x] = struct{}{}
	s.clients[x.client.Addr()]++
	return true
}

func (s *streams) remove(x *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, x)
	if s.clients[x.client.Addr()]--; s.clients[x.client.Addr()] == 0 {
		delete(s.clients, x.client.Addr())
	}
}

func (s *streams) overdue(now time.Time, timeout time.Duration) []*query {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*query
	for x := range s.all {
		out = x.table.overdue(now.Add(-timeout), out)
	}
	return out
}

func (s *streams) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for x := range s.all {
		x.close()
	}
}

func (s *streams) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.all)
}

// serve reads a client's queries.
func (s *stream) serve(ctx context.Context) {
	p := s.proxy
	defer p.streams.remove(s)
	defer s.end()
	p.tasks.Go(s.write)
	for {
		if err := s.conn.SetReadDeadline(time.Now().Add(streamIdle)); err != nil {
			return
		}
		msg, err := readMessage(s.conn, maxQuery)
		if err != nil {
			if errors.Is(err, io.EOF) {
				s.finish(p.cfg.Timeout)
			}
			return
		}
		q := p.receive(msg, s.client, s.server, protoTCP, s)
		if q == nil {
			continue
		}
		s.flying.Add(1)
		if s.table.len() >= maxPipelined {
			p.counters.ClientOverload.Add(1)
			p.fail(q, dnswire.RCodeServerFailure)
			continue
		}
		if err := s.forward(ctx, q); err != nil {
			p.counters.Unreachable.Add(1)
			p.fail(q, dnswire.RCodeServerFailure)
		}
	}
}

func (s *stream) forward(ctx context.Context, q *query) error {
	up, err := s.connect(ctx)
	if err != nil {
		return err
	}
	id, err := s.table.add(q)
	if err != nil {
		return err
	}
	out := framed(q.wire)
	dnswire.SetID(out[2:], id)
	if err = up.SetWriteDeadline(time.Now().Add(streamWrite)); err == nil {
		_, err = up.Write(out)
	}
	if err != nil {
		s.table.drop(id)
		return fmt.Errorf("send to server: %w", err)
	}
	return nil
}

// finish gives a client that has asked all, and closed its side, the answers that it waits for.
func (s *stream) finish(limit time.Duration) {
	ticker := time.NewTicker(finishInterval)
	defer ticker.Stop()
	for end := time.Now().Add(limit); s.flying.Load()+s.queued.Load() > 0 && time.Now().Before(end); {
		select {
		case <-s.gone:
			return
		case <-ticker.C:
		}
	}
}

// connect returns the connection to the server. One that the server has closed is replaced.
func (s *stream) connect(ctx context.Context) (net.Conn, error) {
	s.mu.Lock()
	up, closed := s.upstream, s.closed
	s.mu.Unlock()
	if closed {
		return nil, net.ErrClosed
	}
	if up != nil {
		return up, nil
	}
	up, err := s.proxy.dial(ctx, "tcp", s.client.Addr(), s.server)
	if err != nil {
		return nil, fmt.Errorf("connect to server: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = up.Close()
		return nil, net.ErrClosed
	}
	s.upstream = up
	s.proxy.tasks.Go(func() { s.readAnswers(up) })
	return up, nil
}

// readAnswers serves the server's messages until it closes the connection.
func (s *stream) readAnswers(up net.Conn) {
	p := s.proxy
	for {
		msg, err := readMessage(up, dnswire.MaxSize)
		if err != nil {
			break
		}
		q := s.table.take(msg)
		if q == nil {
			p.counters.Mismatched.Add(1)
			continue
		}
		p.answered(q, msg, nil)
	}
	_ = up.Close()
	s.mu.Lock()
	if s.upstream == up {
		s.upstream = nil
	}
	s.mu.Unlock()
	for _, q := range s.table.clear() {
		p.lost(q)
	}
}

// send gives the client a message, without waiting: who lets too much lie loses its connection.
func (s *stream) send(msg []byte) {
	out := framed(msg)
	if s.queued.Add(int64(len(out))) <= maxQueued {
		select {
		case s.out <- out:
			return
		default:
		}
	}
	s.queued.Add(-int64(len(out)))
	s.proxy.counters.Unsent.Add(1)
	s.close()
}

// sendAll gives the client a message of many: its sender waits for the client.
func (s *stream) sendAll(msg []byte) {
	out := framed(msg)
	s.queued.Add(int64(len(out)))
	select {
	case s.out <- out:
	case <-s.gone:
	}
}

func framed(msg []byte) []byte {
	return append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(msg)), uint16(len(msg))), msg...)
}

// write sends what is queued for the client.
func (s *stream) write() {
	for {
		select {
		case <-s.gone:
			return
		case out := <-s.out:
			err := s.conn.SetWriteDeadline(time.Now().Add(streamWrite))
			if err == nil {
				_, err = s.conn.Write(out)
			}
			if err != nil {
				s.proxy.counters.Unsent.Add(1)
				s.close()
				return
			}
			s.queued.Add(-int64(len(out)))
		}
	}
}

// close closes both ends; who reads them sees it.
func (s *stream) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	close(s.gone)
	_ = s.conn.Close()
	if s.upstream != nil {
		_ = s.upstream.Close()
	}
}

// end settles what is left when the client is gone.
func (s *stream) end() {
	s.close()
	for _, q := range s.table.clear() {
		s.proxy.settle(q)
	}
}

// readMessage reads a message with its length before it.
func readMessage(r io.Reader, limit int) ([]byte, error) {
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	size := int(binary.BigEndian.Uint16(head[:]))
	if size > limit {
		return nil, fmt.Errorf("message of %d bytes: at most %d are taken", size, limit)
	}
	msg := make([]byte, size)
	if _, err := io.ReadFull(r, msg); err != nil {
		return nil, err
	}
	return msg, nil
}
