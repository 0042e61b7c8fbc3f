// SPDX-License-Identifier: Apache-2.0

// Package pulse keeps packets going between network namespaces and counts every one, so that a test can say that none was lost, or that none came through.
package pulse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test/e2e/netns"
)

// Server answers UDP and TCP on one port of a namespace with what it got, and counts datagrams and connections by client address.
type Server struct {
	udp net.PacketConn
	tcp net.Listener
	wg  sync.WaitGroup

	mu          sync.Mutex
	datagrams   map[netip.Addr]uint64
	connections map[netip.Addr]uint64
	open        map[net.Conn]struct{}
}

// Listen starts a server in a namespace, on all of its addresses. The caller closes it.
func Listen(path string, port uint16) (*Server, error) {
	s := &Server{datagrams: map[netip.Addr]uint64{}, connections: map[netip.Addr]uint64{}, open: map[net.Conn]struct{}{}}
	err := netns.Do(path, func() error {
		var err error
		if s.udp, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port)); err != nil {
			return err
		}
		if err := s.udp.(*net.UDPConn).SetReadBuffer(8 << 20); err != nil {
			return err
		}
		s.tcp, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen on port %d: %w", port, err)
	}
	s.wg.Go(s.serveUDP)
	s.wg.Go(s.serveTCP)
	return s, nil
}

func (s *Server) serveUDP() {
	b := make([]byte, 2000)
	for {
		n, from, err := s.udp.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error that came for an answer
		}
		s.count(s.datagrams, from)
		_, _ = s.udp.WriteTo(b[:n], from)
	}
}

func (s *Server) serveTCP() {
	for {
		c, err := s.tcp.Accept()
		if err != nil {
			return
		}
		s.count(s.connections, c.RemoteAddr())
		s.mu.Lock()
		s.open[c] = struct{}{}
		s.mu.Unlock()
		s.wg.Go(func() {
			_, _ = io.Copy(c, c)
			c.Close()
			s.mu.Lock()
			delete(s.open, c)
			s.mu.Unlock()
		})
	}
}

func (s *Server) count(counts map[netip.Addr]uint64, from net.Addr) {
	a, err := netip.ParseAddrPort(from.String())
	if err != nil {
		return
	}
	s.mu.Lock()
	counts[a.Addr().Unmap()]++
	s.mu.Unlock()
}

// Datagrams is how many came from an address.
func (s *Server) Datagrams(from netip.Addr) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.datagrams[from]
}

// Connections is how many were accepted from an address.
func (s *Server) Connections(from netip.Addr) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.connections[from]
}

// Close ends the server and its connections.
func (s *Server) Close() {
	s.udp.Close()
	s.tcp.Close()
	s.mu.Lock()
	for c := range s.open {
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// Load is what a client does, again and again until it is stopped.
type Load struct {
	// From is the client's namespace, To the server.
	From string
	To   netip.AddrPort
	// Every is the pause between two datagrams, and between two exchanges of the kept connection.
	Every time.Duration
	// Connect is the pause between two new connections, one of UDP and one of TCP each; 0 = none.
	Connect time.Duration
	// Hopeless: nothing is expected to come through. Datagrams are sent and SYNs tried, nobody waits for an answer.
	Hopeless bool
}

// Result is what a client did.
type Result struct {
	// Datagrams sent, each of which the server should have counted.
	Datagrams uint64
	// Connections of TCP that were made and answered.
	Connections uint64
	// Retransmitted segments of all connections: a packet that was lost and sent again.
	Retransmitted uint64
	// Errors of exchanges that should have worked; at most ten are kept.
	Errors []error
}

// Client runs a Load. Make it with Start.
type Client struct {
	load   Load
	cancel context.CancelFunc
	wg     sync.WaitGroup

	datagrams, connections, retransmitted atomic.Uint64
	mu                                    sync.Mutex
	errs                                  []error
}

// Start begins a load.
func Start(ctx context.Context, load Load) (*Client, error) {
	ctx, cancel := context.WithCancel(ctx)
	c := &Client{load: load, cancel: cancel}
	udp, err := c.dial("udp")
	if err != nil {
		cancel()
		return nil, err
	}
	c.wg.Go(func() { c.datagramLoop(ctx, udp) })
	if !load.Hopeless {
		tcp, err := c.dial("tcp")
		if err != nil {
			cancel()
			c.wg.Wait()
			return nil, err
		}
		c.wg.Go(func() { c.keptLoop(ctx, tcp) })
	}
	if load.Connect > 0 {
		c.wg.Go(func() { c.connectLoop(ctx) })
	}
	return c, nil
}

// Stop ends the load and says what it did.
func (c *Client) Stop() Result {
	c.cancel()
	c.wg.Wait()
	return Result{c.datagrams.Load(), c.connections.Load(), c.retransmitted.Load(), c.errs}
}

func (c *Client) dial(network string) (net.Conn, error) {
	var conn net.Conn
	err := netns.Do(c.load.From, func() error {
		var err error
		d := net.Dialer{Timeout: 10 * time.Second}
		if c.load.Hopeless {
			d.Timeout = 200 * time.Millisecond
		}
		conn, err = d.Dial(network, c.load.To.String())
		return err
	})
	return conn, err
}

func (c *Client) fault(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.errs) < 10 {
		c.errs = append(c.errs, err)
	}
}

func (c *Client) send(conn net.Conn) {
	// An ICMP error for an earlier datagram is reported by a later call, which then sent nothing.
	for range 3 {
		if _, err := conn.Write([]byte("pulse")); err == nil {
			c.datagrams.Add(1)
			return
		}
	}
	c.fault(errors.New("a datagram could not be sent"))
}

func (c *Client) datagramLoop(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	t := time.NewTicker(c.load.Every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			c.send(conn)
		}
	}
}

func (c *Client) keptLoop(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	t := time.NewTicker(c.load.Every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			c.retransmitted.Add(Retransmitted(conn))
			return
		case <-t.C:
			if err := exchange(conn); err != nil {
				c.fault(fmt.Errorf("kept connection: %w", err))
				return
			}
		}
	}
}

func (c *Client) connectLoop(ctx context.Context) {
	t := time.NewTicker(c.load.Connect)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if udp, err := c.dial("udp"); err != nil {
			c.fault(err)
		} else {
			c.send(udp)
			udp.Close()
		}
		tcp, err := c.dial("tcp")
		if c.load.Hopeless {
			if err == nil {
				c.connections.Add(1)
				tcp.Close()
			}
			continue
		}
		if err == nil {
			err = exchange(tcp)
			c.retransmitted.Add(Retransmitted(tcp))
			tcp.Close()
		}
		if err != nil {
			c.fault(fmt.Errorf("new connection: %w", err))
			continue
		}
		c.connections.Add(1)
	}
}

func exchange(conn net.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("pulse")); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 5))
	return err
}

// Retransmitted is how many segments a TCP connection has sent more than once, its SYN included.
func Retransmitted(conn net.Conn) uint64 {
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return 0
	}
	var n uint64
	_ = raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			n = uint64(info.Total_retrans)
		}
	})
	return n
}

// A Streamed is a stream of datagrams from a server to a client that asked once and never again.
type Streamed struct {
	client, server net.PacketConn
	wg             sync.WaitGroup
	sent, arrived  atomic.Uint64
}

// Stream asks once from the client's namespace and then sends answers from the server's, one each interval, until Close.
func Stream(client, server string, at netip.AddrPort, every time.Duration) (*Streamed, error) {
	s := &Streamed{}
	err := netns.Do(server, func() (err error) {
		s.server, err = net.ListenPacket("udp", at.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	err = netns.Do(client, func() (err error) {
		s.client, err = net.ListenPacket("udp", ":0")
		return err
	})
	if err != nil {
		s.server.Close()
		return nil, err
	}
	if _, err := s.client.WriteTo([]byte("begin"), net.UDPAddrFromAddrPort(at)); err != nil {
		s.Close()
		return nil, err
	}
	b := make([]byte, 100)
	if err := s.server.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		s.Close()
		return nil, err
	}
	_, from, err := s.server.ReadFrom(b)
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("the request of a stream: %w", err)
	}
	s.wg.Go(func() {
		for {
			if _, err := s.server.WriteTo([]byte("stream"), from); errors.Is(err, net.ErrClosed) {
				return
			} else if err == nil {
				s.sent.Add(1)
			}
			time.Sleep(every)
		}
	})
	s.wg.Go(func() {
		b := make([]byte, 100)
		for {
			if _, _, err := s.client.ReadFrom(b); errors.Is(err, net.ErrClosed) {
				return
			} else if err == nil {
				s.arrived.Add(1)
			}
		}
	})
	return s, nil
}

// Sent counts the answers that were sent.
func (s *Streamed) Sent() uint64 { return s.sent.Load() }

// Arrived counts those that the client got.
func (s *Streamed) Arrived() uint64 { return s.arrived.Load() }

// Close ends the stream.
func (s *Streamed) Close() {
	s.client.Close()
	s.server.Close()
	s.wg.Wait()
}
