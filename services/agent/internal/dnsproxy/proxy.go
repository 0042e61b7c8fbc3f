// SPDX-License-Identifier: Apache-2.0

// Package dnsproxy stands between pods and their DNS servers. The kernel brings it the packets that policy sends through a filter, with the addresses
// that they had; it reads each query's name, refuses it or passes it on in the pod's name, byte for byte but for its number, and gives the answer
// back in the server's name when the kernel's maps hold the answer's addresses.
package dnsproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/services/agent/internal/dnswire"
)

// Names learns what answers say.
type Names interface {
	// Learn returns true when the answer may go out; else it calls done, once, when it may or may not.
	Learn(endpoint uint16, name string, addrs []netip.Addr, ttl time.Duration, done func(error)) bool
}

// Judge decides by policy.
type Judge interface {
	// Judge says what is decided for a query of a client (a local endpoint's address) to a server.
	Judge(client netip.Addr, server netip.AddrPort, proto uint8, name string) Judgement
}

// Verdict is what becomes of a query.
type Verdict uint8

// Verdicts.
const (
	// Unknown: the client is no endpoint of this node, or nothing lets it ask this server; it gets no answer in the server's name but a refusal.
	Unknown Verdict = iota
	Refuse
	Pass
)

// Judgement is a verdict and what it was made by.
type Judgement struct {
	Verdict  Verdict
	Endpoint uint16 // 0 = the client is none
	Slot     uint16
	// Rules that let it pass; opaque here.
	Rules any
}

// Record is what is told of a query or its answer.
type Record struct {
	Time           time.Time
	Client, Server netip.AddrPort
	Proto          uint8
	Denied         bool
	Query          string
	Type           uint16
	Slot           uint16
	Rules          any
	// Answer is nil for a query.
	Answer  *dnswire.Answer
	Latency time.Duration
}

// Config says how to proxy.
type Config struct {
	// Port on 127.0.0.1 and ::1; 0 = any, for tests.
	Port  uint16
	Judge Judge
	Names Names
	// Record is told of every query and answer; it must not block.
	Record func(Record)
	// Mark of upstream sockets; PortMin to PortMax are their source ports.
	Mark             int
	PortMin, PortMax uint16
	// RejectCode answers refused queries.
	RejectCode int
	// Timeout of a query at its server; NamesTimeout bounds how long an answer waits for the maps.
	Timeout, NamesTimeout time.Duration
	// MaxQueries in flight, in all and of one client.
	MaxQueries, MaxQueriesPerClient int
	// MaxSockets to servers, in all and of one client; MaxConns are TCP connections of clients, in all and of one client.
	MaxSockets, MaxSocketsPerClient, MaxConns, MaxConnsPerClient int
	// UDPSize is the largest UDP answer that servers are asked for.
	UDPSize uint16
	// Readers is how many goroutines read queries, for each family.
	Readers int
	Log     *slog.Logger
}

// Proxy is a DNS proxy. Make it with New, call Listen, then Run once.
type Proxy struct {
	cfg      Config
	log      *slog.Logger
	counters Counters
	answers  *answerer

	udp []*net.UDPConn
	tcp []*net.TCPListener

	flights   flights
	upstreams upstreams
	streams   streams
	waiting   waiting
	tasks     sync.WaitGroup // goroutines of sockets and connections
	stopping  atomic.Bool
}

// Counters count since the start.
type Counters struct {
	Queries, QueriesTCP, Answers            atomic.Uint64
	Refused, Unknown, Malformed             atomic.Uint64
	Overload, ClientOverload, SocketsFull   atomic.Uint64
	Timeouts, Unreachable, Mismatched       atomic.Uint64
	MalformedAnswers, NamesFailed, Unsent   atomic.Uint64
	Truncated, ConnsRefused, AnswersIgnored atomic.Uint64
	// Latency holds answered queries by time: see Buckets.
	Latency    [len(Buckets) + 1]atomic.Uint64
	LatencySum atomic.Int64 // ns
}

// Buckets are upper bounds of Counters.Latency.
var Buckets = [...]time.Duration{
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond, time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
	10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, time.Second, 5 * time.Second,
}

// New makes a proxy.
func New(cfg Config) (*Proxy, error) {
	p := &Proxy{cfg: cfg, log: cfg.Log.With("component", "dnsproxy")}
	p.flights.clients = map[netip.Addr]int{}
	p.upstreams.all = map[upstreamKey]*upstream{}
	p.upstreams.clients = map[netip.Addr]int{}
	p.streams.all = map[*stream]struct{}{}
	p.streams.clients = map[netip.Addr]int{}
	p.waiting.queries = map[*query]time.Time{}
	a, err := newAnswerer()
	if err != nil {
		return nil, err
	}
	p.answers = a
	return p, nil
}

// Listen opens the sockets that the kernel brings queries to. A node without a family has none of it.
func (p *Proxy) Listen(ctx context.Context) error {
	port := p.cfg.Port
	for _, host := range []string{"127.0.0.1", "::1"} {
		udp, err := listenUDP(ctx, host, port)
		if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT) {
			p.log.Warn("this node has no such address; its family is not served", "address", host)
			continue
		}
		if err != nil {
			return errors.Join(err, p.closeListeners())
		}
		p.udp = append(p.udp, udp)
		if bound, ok := udp.LocalAddr().(*net.UDPAddr); ok {
			port = uint16(bound.Port)
		}
		tcp, err := listenTCP(ctx, host, port)
		if err != nil {
			return errors.Join(err, p.closeListeners())
		}
		p.tcp = append(p.tcp, tcp)
	}
	return nil
}

// Port returns the port that it listens on.
func (p *Proxy) Port() uint16 {
	if len(p.udp) == 0 {
		return 0
	}
	a, _ := p.udp[0].LocalAddr().(*net.UDPAddr)
	return uint16(a.Port)
}

func (p *Proxy) closeListeners() error {
	var errs []error
	for _, c := range p.udp {
		errs = append(errs, c.Close())
	}
	for _, l := range p.tcp {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// drain is how long queries in flight may go on after the end.
const drain = time.Second

// Run serves until ctx ends; then it takes no more queries, and gives those in flight a second.
func (p *Proxy) Run(ctx context.Context) error {
	group, groupCtx := errgroup.WithContext(ctx)
	for _, c := range p.udp {
		for range max(p.cfg.Readers, 1) {
			group.Go(func() error { return p.readQueries(groupCtx, c) })
		}
	}
	for _, l := range p.tcp {
		group.Go(func() error { return p.accept(groupCtx, l) })
	}
	sweepCtx, stopSweep := context.WithCancel(context.WithoutCancel(ctx))
	swept := make(chan struct{})
	go func() {
		defer close(swept)
		p.sweep(sweepCtx)
	}()
	<-groupCtx.Done()
	p.stopping.Store(true)
	closeErr := p.closeListeners()
	err := group.Wait()
	for end := time.Now().Add(drain); p.flights.count() > 0 && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
	stopSweep()
	<-swept
	p.upstreams.closeAll()
	p.streams.closeAll()
	p.tasks.Wait()
	if err == nil && closeErr != nil {
		err = fmt.Errorf("close listeners: %w", closeErr)
	}
	return errors.Join(err, p.answers.close())
}

// Counters returns the live counters.
func (p *Proxy) Counters() *Counters { return &p.counters }

// InFlight returns how many queries wait for an answer, and on how many sockets and client connections.
func (p *Proxy) InFlight() (queries, sockets, conns int) {
	return p.flights.count(), p.upstreams.count(), p.streams.count()
}
