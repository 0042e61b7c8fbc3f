// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

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

// sink gathers the entries of one stream.
type sink struct {
	stream stream

	mu      sync.Mutex
	entries []*commonParts
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
	parts, size := l.build(e)
	n := int64(size)
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
	parts.size, parts.number = n, k.next
	k.entries = append(k.entries, parts)
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
	entries []*commonParts
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
		t.bytes += e.size
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

// outgoing is the stream of one sink.
type outgoing struct {
	service *Service
	sink    *sink
	client  alsv3.AccessLogService_StreamAccessLogsClient
	cancel  context.CancelFunc
}

// retry is how soon a stream that broke is made again.
const retry = 100 * time.Millisecond

// deliver sends a message, again and again until it went or ctx has ended for a while.
func (o *outgoing) deliver(ctx context.Context, t taken) bool {
	message := o.message(t)
	deadline, cancel := afterEnd(ctx, lastFlush)
	defer cancel()
	for {
		if o.try(deadline, message) {
			o.service.delivered(o.sink, t)
			return true
		}
		wait := time.NewTimer(retry)
		select {
		case <-deadline.Done():
			wait.Stop()
			return false
		case <-wait.C:
		}
	}
}

// afterEnd returns a context that ends some time after another did.
func afterEnd(ctx context.Context, grace time.Duration) (context.Context, context.CancelFunc) {
	later, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(grace, cancel) })
	return later, func() { stop(); cancel() }
}

// try makes the stream if there is none, and sends.
func (o *outgoing) try(ctx context.Context, message *alsv3.StreamAccessLogsMessage) bool {
	if o.client == nil {
		conn, err := o.service.conn(o.sink.stream.cluster)
		if err != nil {
			o.service.config.Log.Debug("access log has no connection", "error", err)
			return false
		}
		// The stream lives longer than this call: it ends by close.
		streamCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		stop := context.AfterFunc(ctx, cancel)
		client, err := alsv3.NewAccessLogServiceClient(conn).StreamAccessLogs(streamCtx, grpc.WaitForReady(true))
		if err != nil || !stop() {
			cancel()
			return false
		}
		o.client, o.cancel = client, cancel
		message.Identifier = &alsv3.StreamAccessLogsMessage_Identifier{Node: o.service.config.Node, LogName: o.sink.stream.name}
	}
	stop := context.AfterFunc(ctx, o.cancel)
	err := o.client.Send(message)
	stop()
	message.Identifier = nil
	if err != nil {
		o.cancel()
		o.client = nil
		return false
	}
	return true
}

// close ends the stream; what was sent has time to arrive.
func (o *outgoing) close() {
	if o.client == nil {
		return
	}
	defer o.cancel()
	timer := time.AfterFunc(lastFlush, o.cancel)
	defer timer.Stop()
	if _, err := o.client.CloseAndRecv(); err != nil {
		o.service.config.Log.Debug("access log stream ended", "error", err)
	}
}

// message makes the message of some entries; the first one carries the tags.
func (o *outgoing) message(t taken) *alsv3.StreamAccessLogsMessage {
	head := &t.entries[0].common
	if head.CustomTags == nil {
		head.CustomTags = map[string]string{}
	}
	head.CustomTags[TagSequence] = strconv.FormatUint(t.entries[0].number, 10)
	if t.lost > 0 {
		head.CustomTags[TagLost] = strconv.FormatUint(t.lost, 10)
	}
	message := &alsv3.StreamAccessLogsMessage{}
	if o.sink.stream.tcp {
		list := make([]*datav3.TCPAccessLogEntry, 0, len(t.entries))
		for _, e := range t.entries {
			list = append(list, &e.tcp)
		}
		message.LogEntries = &alsv3.StreamAccessLogsMessage_TcpLogs{TcpLogs: &alsv3.StreamAccessLogsMessage_TCPAccessLogEntries{LogEntry: list}}
		return message
	}
	list := make([]*datav3.HTTPAccessLogEntry, 0, len(t.entries))
	for _, e := range t.entries {
		list = append(list, &e.http)
	}
	message.LogEntries = &alsv3.StreamAccessLogsMessage_HttpLogs{HttpLogs: &alsv3.StreamAccessLogsMessage_HTTPAccessLogEntries{LogEntry: list}}
	return message
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

// verdicts keeps the metadata of the policies met, which are few, instead of making it anew for each entry.
type verdicts struct {
	mu    sync.RWMutex
	known map[verdict]*corev3.Metadata
}

const maxVerdicts = 4096

func (v *verdicts) get(of verdict) *corev3.Metadata {
	if of.policy == "" && !of.denied {
		return nil
	}
	v.mu.RLock()
	m := v.known[of]
	v.mu.RUnlock()
	if m != nil {
		return m
	}
	m = of.metadata()
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.known == nil || len(v.known) >= maxVerdicts {
		v.known = map[verdict]*corev3.Metadata{}
	}
	v.known[of] = m
	return m
}
