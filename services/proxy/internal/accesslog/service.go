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

// Tags of the first entry of a message.
const (
	// TagLost is how many entries of this log were lost since the last message that told.
	TagLost = "weir.lost"
	// TagSequence is the number of the entry in this process and log, from 1, with lost ones counted: a hole shows what a broken stream swallowed.
	TagSequence = "weir.sequence"
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

const (
	typicalEntry  = 512
	entryOverhead = 64
)

// pending is an encoded entry.
type pending struct {
	encoded []byte
	number  uint64
}

// sink gathers the entries of one stream.
type sink struct {
	stream stream

	mu      sync.Mutex
	entries []pending
	bytes   int64
	next    uint64 // number of the newest one
	lost    uint64 // since last told
	flush   time.Duration
	batch   int
	running bool
	kick    chan struct{}
}

// put takes an entry, or counts it as lost.
func (s *Service) put(l *logger, e *model.Entry) {
	k := l.sink
	encoded := l.encode(make([]byte, 0, typicalEntry), e)
	n := int64(len(encoded)) + entryOverhead
	k.mu.Lock()
	k.next++
	if k.bytes+n > s.config.StreamBytes || s.bytes.Add(n) > s.config.TotalBytes {
		if k.bytes+n <= s.config.StreamBytes {
			s.bytes.Add(-n)
		}
		k.lost++
		k.mu.Unlock()
		s.config.Lost(1)
		return
	}
	k.entries = append(k.entries, pending{encoded: encoded, number: k.next})
	k.bytes += n
	k.flush, k.batch = l.flush, l.batch
	full := k.bytes >= int64(k.batch)
	start := !k.running
	k.running = true
	k.mu.Unlock()
	if start {
		s.start(k)
	}
	if full {
		select {
		case k.kick <- struct{}{}:
		default:
		}
	}
}

func (s *Service) sink(at stream) *sink {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.sinks[at]
	if k == nil {
		k = &sink{stream: at, kick: make(chan struct{}, 1)}
		s.sinks[at] = k
	}
	return k
}

// start begins a sender, once Run has been called.
func (s *Service) start(k *sink) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx == nil || s.stopped {
		return
	}
	s.senders.Go(func() { s.send(s.ctx, k) })
}

// lastFlush is how long what waits at the end may take.
const lastFlush = time.Second

// Run sends until ctx ends, and then what still waits.
func (s *Service) Run(ctx context.Context) error {
	s.mu.Lock()
	s.ctx = ctx
	for _, k := range s.sinks {
		k.mu.Lock()
		waiting := len(k.entries) > 0
		k.running = waiting
		k.mu.Unlock()
		if waiting {
			s.senders.Go(func() { s.send(ctx, k) })
		}
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

// taken is a message's worth of entries.
type taken struct {
	entries []pending
	bytes   int64
	lost    uint64
}

// take takes a message's worth out of a sink. none = it has been idle, and its sender ends.
func (k *sink) take(idle bool) (t taken, none bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.entries) == 0 {
		if idle {
			k.running = false
		}
		return taken{}, true
	}
	n := min(len(k.entries), maxEntries)
	t = taken{entries: k.entries[:n:n], lost: k.lost}
	for _, e := range t.entries {
		t.bytes += int64(len(e.encoded)) + entryOverhead
	}
	// What it holds stays counted until it is sent: a server that does not read makes the sink full.
	k.entries, k.lost = k.entries[n:], 0
	if len(k.entries) == 0 {
		k.entries = nil
		return t, false
	}
	select {
	case k.kick <- struct{}{}:
	default:
	}
	return t, false
}

// maxEntries of one message: a server takes 4 MiB at once.
const maxEntries = 1000

// delivered gives back the room of what was sent.
func (s *Service) delivered(k *sink, t taken) {
	k.mu.Lock()
	k.bytes -= t.bytes
	k.mu.Unlock()
	s.bytes.Add(-t.bytes)
	s.sent.Add(uint64(len(t.entries)))
}

// send is the sender of one sink: it ends when the sink has been idle, or when ctx has ended and all is sent or given up.
func (s *Service) send(ctx context.Context, k *sink) {
	out := &outgoing{service: s, sink: k}
	defer out.close()
	timer := time.NewTimer(s.interval(k))
	defer timer.Stop()
	lastUse := time.Now()
	for {
		ending := false
		select {
		case <-ctx.Done():
			ending = true
		case <-k.kick:
		case <-timer.C:
		}
		t, none := k.take(time.Since(lastUse) > s.config.Idle)
		if none {
			k.mu.Lock()
			over := !k.running
			k.mu.Unlock()
			if ending || over {
				return
			}
			timer.Reset(s.interval(k))
			continue
		}
		lastUse = time.Now()
		if !out.deliver(ctx, t) {
			k.mu.Lock()
			k.bytes -= t.bytes
			k.mu.Unlock()
			s.bytes.Add(-t.bytes)
			s.config.Lost(uint64(len(t.entries)))
			return
		}
		timer.Reset(s.interval(k))
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
