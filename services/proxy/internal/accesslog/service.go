// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/services/proxy/internal/model"
)

// Config of the service.
type Config struct {
	// Node tells the server who we are.
	Node *corev3.Node
	// Clusters finds the server.
	Clusters model.Clusters
	// StreamBytes and TotalBytes bound what waits, for one log and for all.
	StreamBytes, TotalBytes int64
	// Idle is after how long without entries a stream is closed; 0 = a minute.
	Idle time.Duration
	// Lost counts entries that there was no room for, or whose stream could not be made in time at the end.
	Lost func(n uint64)
	Log  *slog.Logger
}

// Service keeps the streams. Make it with New; Log may be called before Run.
type Service struct {
	config   Config
	verdicts verdicts
	bytes    atomic.Int64
	sent     atomic.Uint64

	mu      sync.Mutex
	sinks   map[stream]*sink
	conns   map[string]*grpc.ClientConn
	ctx     context.Context //nolint:containedctx // the life of the senders, which begin at the first entry
	stopped bool
	senders sync.WaitGroup
}

// New makes the service.
func New(config Config) *Service {
	if config.Idle == 0 {
		config.Idle = time.Minute
	}
	if config.Lost == nil {
		config.Lost = func(uint64) {}
	}
	return &Service{config: config, sinks: map[stream]*sink{}, conns: map[string]*grpc.ClientConn{}}
}

// put takes an entry, or counts it as lost.
func (s *Service) put(l *logger, e *model.Entry) {
	k := l.sink
	k.mu.Lock()
	k.flush, k.batch = l.flush, l.batch
	var taken outcome
	if e.Begin && !e.Stream && e.Begun == nil {
		taken = s.begin(l, e)
	} else {
		taken = s.end(l, e)
	}
	if taken.lost {
		k.next++
		k.lost++
	}
	start := !k.running && !k.empty()
	k.mu.Unlock()
	if taken.lost {
		s.config.Lost(1)
	}
	if start {
		s.start(k)
	}
	if taken.kick {
		k.wake()
	}
}

// outcome says whether an entry was lost, and whether the sender should know that there is enough to send.
type outcome struct{ lost, kick bool }

// begin keeps the beginning of a request.
func (s *Service) begin(l *logger, e *model.Entry) outcome {
	k := l.sink
	b := newBeginning(l)
	l.encodeTo(&b.entry, e)
	if !s.reserve(k, sizeOf(b.entry.b)) {
		b.recycle()
		return outcome{lost: true}
	}
	k.begun.push(b)
	e.Begun = b
	return outcome{}
}

// end adds any other entry, after the beginning of its request if it does not repeat that.
func (s *Service) end(l *logger, e *model.Entry) (o outcome) {
	k := l.sink
	x := &k.ending
	*x = x.emptied()
	l.encodeTo(x, e)
	size := sizeOf(x.b)
	if b, ok := e.Begun.(*beginning); ok && b.logger == l {
		e.Begun = nil
		if !b.told {
			k.begun.remove(b)
			if x.repeats(&b.entry) && s.reserve(k, size-sizeOf(b.entry.b)) {
				size = 0 // it has the beginning's room
			} else {
				o.kick = k.add(b.entry.b)
			}
		}
		b.recycle()
	}
	if size > 0 && !s.reserve(k, size) {
		o.lost = true
	} else {
		o.kick = k.add(x.b) || o.kick
	}
	if cap(x.b) > maxKept {
		x.b = nil
	}
	return o
}

// reserve takes room for so many bytes more, or fewer; false = there is none.
func (s *Service) reserve(k *sink, n int64) bool {
	if n > 0 && k.bytes+n > s.config.StreamBytes {
		return false
	}
	if all := s.bytes.Add(n); n > 0 && all > s.config.TotalBytes {
		s.bytes.Add(-n)
		return false
	}
	k.bytes += n
	return true
}

func (s *Service) sink(at stream) *sink {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.sinks[at]
	if k == nil {
		k = newSink(at)
		s.sinks[at] = k
	}
	return k
}

// start begins the sender of a sink that has none, once Run has been called.
func (s *Service) start(k *sink) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx != nil && !s.stopped {
		s.startLocked(s.ctx, k)
	}
}

func (s *Service) startLocked(ctx context.Context, k *sink) {
	k.mu.Lock()
	start := !k.running && !k.empty()
	k.running = k.running || start
	k.mu.Unlock()
	if start {
		s.senders.Go(func() { s.send(ctx, k) })
	}
}

// lastFlush is how long what waits at the end may take.
const lastFlush = time.Second

// Run sends until ctx ends, and then what still waits.
func (s *Service) Run(ctx context.Context) error {
	s.mu.Lock()
	s.ctx = ctx
	for _, k := range s.sinks {
		s.startLocked(ctx, k)
	}
	s.mu.Unlock()
	<-ctx.Done()
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	s.senders.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, c := range s.conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// Sent returns how many entries were handed to a stream.
func (s *Service) Sent() uint64 { return s.sent.Load() }

// Waiting returns how many bytes wait.
func (s *Service) Waiting() int64 { return s.bytes.Load() }

// release gives back the room of what was sent or given up.
func (s *Service) release(k *sink, bytes int64) {
	k.mu.Lock()
	k.bytes -= bytes
	k.mu.Unlock()
	s.bytes.Add(-bytes)
}

// send is the sender of one sink: it ends when the sink has been idle, or when ctx has ended and all is sent or given up.
func (s *Service) send(ctx context.Context, k *sink) {
	out := &outgoing{service: s, sink: k}
	defer out.close()
	timer := time.NewTimer(s.interval(k))
	defer timer.Stop()
	lastUse := time.Now()
	for {
		timed := false // what waits is sent however little it is, beginnings too
		select {
		case <-ctx.Done():
			timed = true
		case <-k.kick:
		case <-timer.C:
			timed = true
			timer.Reset(s.interval(k))
		}
		c := k.take(timed, time.Since(lastUse) > s.config.Idle)
		if c == nil {
			k.mu.Lock()
			over := !k.running
			k.mu.Unlock()
			if over || ctx.Err() != nil && timed {
				return
			}
			continue
		}
		lastUse = time.Now()
		if !out.deliver(ctx, c) {
			entries, bytes := k.abandon()
			s.bytes.Add(-bytes)
			s.config.Lost(entries)
			return
		}
	}
}

func (s *Service) interval(k *sink) time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.flush
}

// conn returns the connection to a cluster, through the cluster's own endpoints and sockets.
func (s *Service) conn(name string) (*grpc.ClientConn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.conns[name]; c != nil {
		return c, nil
	}
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		cluster := s.config.Clusters.Cluster(name)
		if cluster == nil {
			return nil, model.ErrNoCluster
		}
		e, release, err := cluster.Acquire(&model.Conn{}, nil)
		if err != nil {
			return nil, err
		}
		conn, err := cluster.Dial(ctx, nil, e)
		release(err == nil)
		return conn, err
	}
	conn, err := grpc.NewClient("passthrough:///"+name, grpc.WithContextDialer(dial), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority(name),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}}))
	if err != nil {
		return nil, err
	}
	s.conns[name] = conn
	return conn, nil
}

// verdicts keeps the encoded metadata of the policies met, which are few, instead of making it anew for each entry.
type verdicts struct {
	mu    sync.RWMutex
	known map[verdict][]byte
}

const maxVerdicts = 4096

func (v *verdicts) get(of verdict) []byte {
	v.mu.RLock()
	m, ok := v.known[of]
	v.mu.RUnlock()
	if ok {
		return m
	}
	of.policy = strings.Clone(of.policy)
	m, err := proto.Marshal(of.metadata())
	if err != nil {
		return nil // no text of it can be wrong: names of policies come from messages
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.known == nil || len(v.known) >= maxVerdicts {
		v.known = map[verdict][]byte{}
	}
	v.known[of] = m
	return m
}
