// SPDX-License-Identifier: Apache-2.0

// Package traffic makes seeded random traffic between pods: TCP with orderly ends, resets and refused or unanswered
// connections, UDP with and without fragments, ICMP and ICMPv6 echoes.
package traffic

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/weirmesh/weir/test/e2e/procnet"
)

// Ports of the servers that Serve opens, and one that stays closed.
const (
	TCPPort    = 7000
	UDPPort    = 7001
	ClosedPort = 7009
)

// Serve answers traffic on every address until ctx ends. A TCP client sends 8 bytes (request length, response length), then the request.
func Serve(ctx context.Context) error {
	var lc net.ListenConfig
	tcp, err := lc.Listen(ctx, "tcp", fmt.Sprintf(":%d", TCPPort))
	if err != nil {
		return fmt.Errorf("serve tcp: %w", err)
	}
	udp, err := lc.ListenPacket(ctx, "udp", fmt.Sprintf(":%d", UDPPort))
	if err != nil {
		return fmt.Errorf("serve udp: %w", err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { serveTCP(tcp) })
	wg.Go(func() { serveUDP(udp) })
	err = serveWho(ctx)
	tcp.Close()
	udp.Close()
	wg.Wait()
	return err
}

func serveTCP(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			var head [8]byte
			for {
				if _, err := io.ReadFull(c, head[:]); err != nil {
					return
				}
				if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(head[:]))); err != nil {
					return
				}
				if _, err := c.Write(make([]byte, binary.BigEndian.Uint32(head[4:]))); err != nil {
					return
				}
			}
		}()
	}
}

func serveUDP(pc net.PacketConn) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		if n >= 4 { // the first four bytes say how long an answer is wanted
			answer := min(int(binary.BigEndian.Uint32(buf)), 60000)
			if answer > 0 {
				_, _ = pc.WriteTo(buf[:answer], from)
			}
		}
	}
}

// Config says what Run makes.
type Config struct {
	Seed    uint64
	Count   int
	Targets []netip.Addr
	// Unanswered is an address that nobody has; unset = no half-open connections.
	Unanswered []netip.Addr
	Parallel   int
	// Over spreads the beginnings of the connections over this time; 0 = as fast as Parallel allows.
	Over time.Duration
}

// Run makes Count connections, one kind and target each by chance, and returns how many of each kind it made.
// The same seed makes the same sequence.
func Run(ctx context.Context, cfg Config) (map[string]int, error) {
	if len(cfg.Targets) == 0 {
		return nil, errors.New("traffic: no targets")
	}
	rng := rand.New(rand.NewPCG(cfg.Seed, 0))
	kinds := []struct {
		name   string
		weight int
		do     func(context.Context, *rand.Rand, *numbers, netip.Addr) error
	}{
		{"tcp", 6, tcpExchange},
		{"tcp-reset", 2, tcpReset},
		{"tcp-refused", 1, tcpRefused},
		{"udp", 4, udpExchange},
		{"udp-fragments", 2, udpFragments},
		{"echo", 2, echo},
	}
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		errs  []error
		count = map[string]int{}
		slots = make(chan struct{}, max(1, cfg.Parallel))
	)
	own := newNumbers(rng.Uint32())
	start := time.Now()
	for n := range cfg.Count {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Until(start.Add(cfg.Over * time.Duration(n) / time.Duration(cfg.Count)))):
		}
		pick, target, seed := rng.IntN(total), cfg.Targets[rng.IntN(len(cfg.Targets))], rng.Uint64()
		i := 0
		for pick >= kinds[i].weight {
			pick -= kinds[i].weight
			i++
		}
		k := kinds[i]
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
			defer cancel()
			err := k.do(ctx, rand.New(rand.NewPCG(seed, 1)), own, target)
			mu.Lock()
			defer mu.Unlock()
			count[k.name]++
			if err != nil {
				errs = append(errs, fmt.Errorf("%s to %s: %w", k.name, target, err))
			}
		})
	}
	for _, a := range cfg.Unanswered {
		wg.Go(func() {
			d := net.Dialer{Timeout: 6 * time.Second} // longer than the node waits for a neighbour before it says so
			if c, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(a, TCPPort).String()); err == nil {
				c.Close()
				mu.Lock()
				errs = append(errs, fmt.Errorf("half-open to %s: somebody answered", a))
				mu.Unlock()
			}
			mu.Lock()
			count["tcp-half-open"]++
			mu.Unlock()
		})
	}
	wg.Wait()
	return count, errors.Join(errs...)
}

func tcpRequest(c net.Conn, rng *rand.Rand) error {
	return tcpTransfer(c, size(rng), size(rng))
}

func tcpTransfer(c net.Conn, req, resp int) error {
	msg := make([]byte, 8+req)
	binary.BigEndian.PutUint32(msg, uint32(req))
	binary.BigEndian.PutUint32(msg[4:], uint32(resp))
	if _, err := c.Write(msg); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if _, err := io.CopyN(io.Discard, c, int64(resp)); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	return nil
}

// size is small most of the time, and now and then large enough for many segments.
func size(rng *rand.Rand) int {
	if rng.IntN(5) == 0 {
		return rng.IntN(300_000)
	}
	return rng.IntN(2000)
}

// numbers gives source ports and echo identifiers, none twice in a run: a tuple that is used again later is one connection to who counts tuples, and
// two to conntrack.
type numbers struct{ port, echo atomic.Uint32 }

const firstPort, portCount = 10000, 20000 // below ip_local_port_range

func newNumbers(start uint32) *numbers {
	n := &numbers{}
	n.port.Store(start % portCount)
	n.echo.Store(start)
	return n
}

func (n *numbers) dial(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	for {
		port := firstPort + int(n.port.Add(1)%portCount)
		d := net.Dialer{LocalAddr: &net.TCPAddr{Port: port}}
		if network == "udp" {
			d.LocalAddr = &net.UDPAddr{Port: port}
		}
		c, err := d.DialContext(ctx, network, to.String())
		if !errors.Is(err, syscall.EADDRINUSE) {
			return c, err
		}
	}
}

func dialTCP(ctx context.Context, n *numbers, to netip.Addr, port uint16) (*net.TCPConn, error) {
	c, err := n.dial(ctx, "tcp", netip.AddrPortFrom(to, port))
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func tcpExchange(ctx context.Context, rng *rand.Rand, n *numbers, to netip.Addr) error {
	c, err := dialTCP(ctx, n, to, TCPPort)
	if err != nil {
		return err
	}
	defer c.Close()
	for range 1 + rng.IntN(4) {
		if err := tcpRequest(c, rng); err != nil {
			return err
		}
	}
	return nil
}

func tcpReset(ctx context.Context, rng *rand.Rand, n *numbers, to netip.Addr) error {
	c, err := dialTCP(ctx, n, to, TCPPort)
	if err != nil {
		return err
	}
	if err := tcpRequest(c, rng); err != nil {
		c.Close()
		return err
	}
	if err := c.SetLinger(0); err != nil { // close sends a reset
		return err
	}
	return c.Close()
}

func tcpRefused(ctx context.Context, _ *rand.Rand, n *numbers, to netip.Addr) error {
	c, err := dialTCP(ctx, n, to, ClosedPort)
	if err == nil {
		c.Close()
		return errors.New("a closed port accepted")
	}
	return nil
}

func udpSend(ctx context.Context, n *numbers, to netip.Addr, request, answer int) error {
	c, err := n.dial(ctx, "udp", netip.AddrPortFrom(to, UDPPort))
	if err != nil {
		return err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return err
	}
	msg := make([]byte, max(4, request))
	binary.BigEndian.PutUint32(msg, uint32(answer))
	if _, err := c.Write(msg); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if answer == 0 {
		return nil
	}
	if _, err := c.Read(make([]byte, 1<<16)); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	return nil
}

func udpExchange(ctx context.Context, rng *rand.Rand, n *numbers, to netip.Addr) error {
	return udpSend(ctx, n, to, rng.IntN(1200), min(rng.IntN(1200), 1200))
}

func udpFragments(ctx context.Context, rng *rand.Rand, n *numbers, to netip.Addr) error {
	return udpSend(ctx, n, to, 2000+rng.IntN(18000), 2000+rng.IntN(18000))
}

// echo pings a few times with an identifier of its own.
func echo(ctx context.Context, rng *rand.Rand, n *numbers, to netip.Addr) error {
	network, proto := "ip4:icmp", 1
	var request, reply icmp.Type = ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply
	if to.Is6() {
		network, proto = "ip6:ipv6-icmp", 58
		request, reply = ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
	}
	c, err := icmp.ListenPacket(network, "")
	if err != nil {
		return fmt.Errorf("raw socket: %w", err)
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	if err := c.SetDeadline(deadline); err != nil {
		return err
	}
	id := int(n.echo.Add(1) & 0xffff)
	dst := &net.IPAddr{IP: to.AsSlice()}
	for seq := range 1 + rng.IntN(3) {
		m := icmp.Message{Type: request, Body: &icmp.Echo{ID: id, Seq: seq, Data: make([]byte, rng.IntN(500))}}
		b, err := m.Marshal(nil)
		if err != nil {
			return err
		}
		if _, err := c.WriteTo(b, dst); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		buf := make([]byte, 2000)
		for {
			length, _, err := c.ReadFrom(buf)
			if err != nil {
				return fmt.Errorf("read: %w", err)
			}
			got, err := icmp.ParseMessage(proto, buf[:length])
			if err != nil || got.Type != reply {
				continue
			}
			if e, ok := got.Body.(*icmp.Echo); ok && e.ID == id && e.Seq == seq {
				break
			}
		}
	}
	return nil
}

// Ready returns nil when somebody in this network namespace serves a UDP port: that which its server opens last. It sends no packet, which would be in the
// captures, and opens no socket, which could be in the server's way when it begins. TCP's table would do as well, but takes 4 ms to read, with all
// namespaces' connections in it: too much for hundreds of pods that are probed each second.
func Ready(port string) error {
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return fmt.Errorf("ready: port %q: %w", port, err)
	}
	served, err := procnet.Served("udp")
	if err != nil {
		return fmt.Errorf("ready: %w", err)
	}
	if !slices.ContainsFunc(served, func(a netip.AddrPort) bool { return a.Port() == uint16(n) }) {
		return fmt.Errorf("ready: nobody serves UDP port %s yet", port)
	}
	return nil
}
