// SPDX-License-Identifier: Apache-2.0

package ingest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	relayv1 "github.com/weirmesh/weir/gen/weir/relay/v1"
	"github.com/weirmesh/weir/internal/spiffe"
)

// fakeBus takes batches and acknowledges when the test says so.
type fakeBus struct{ sent chan *future }

type future struct {
	jetstream.PubAckFuture
	ok  chan *jetstream.PubAck
	err chan error
	id  string
}

func (f *future) Ok() <-chan *jetstream.PubAck { return f.ok }
func (f *future) Err() <-chan error            { return f.err }

func (b *fakeBus) PublishMsgAsync(m *nats.Msg, _ ...jetstream.PublishOpt) (jetstream.PubAckFuture, error) {
	f := &future{ok: make(chan *jetstream.PubAck, 1), err: make(chan error, 1), id: m.Subject}
	b.sent <- f
	return f, nil
}

// Publish implements Publisher.
func (b *fakeBus) Publish(string, []byte) error { return nil }

// fakeStream is the server's end of a stream.
type fakeStream struct {
	grpc.ServerStream
	ctx      context.Context
	requests chan *relayv1.PublishRequest
	answers  chan *relayv1.PublishResponse
}

func (s *fakeStream) Context() context.Context { return s.ctx }

func (s *fakeStream) Recv() (*relayv1.PublishRequest, error) {
	select {
	case r, ok := <-s.requests:
		if !ok {
			return nil, io.EOF
		}
		return r, nil
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
}

func (s *fakeStream) Send(r *relayv1.PublishResponse) error {
	s.answers <- r
	return nil
}

// agentContext is the context of a call by node-1's agent.
func agentContext(t *testing.T) context.Context {
	t.Helper()
	ca, err := spiffe.NewCA("test.local")
	if err != nil {
		t.Fatal(err)
	}
	certPEM, _, err := ca.Issue(spiffe.ID{TrustDomain: "test.local", Service: "agent", Node: "node-1"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(certPEM)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return peer.NewContext(t.Context(), &peer.Peer{
		Addr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1},
		AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{
			PeerCertificates: []*x509.Certificate{cert}, VerifiedChains: [][]*x509.Certificate{{cert}},
		}},
	})
}

func request(t *testing.T, first uint64, padding int) *relayv1.PublishRequest {
	t.Helper()
	data, err := proto.Marshal(&flowv1.Batch{
		Header:  &flowv1.BatchHeader{Node: "node-1", Epoch: 1, First: first, Count: 1},
		Records: []*flowv1.Record{{Item: &flowv1.Record_Flow{Flow: make([]byte, padding)}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return &relayv1.PublishRequest{Batch: data}
}

func newService(b *fakeBus, config Config) *Service {
	log := slog.New(slog.DiscardHandler)
	gate := NewGate()
	gate.Set(true)
	return New(config, b, gate, NewPresence("default", "relay", b, log), NewMetrics(prometheus.NewRegistry()), make(chan struct{}), log)
}

// offer sends until the relay stops reading; it returns what was handed to the bus.
func offer(t *testing.T, s *fakeStream, b *fakeBus, padding int) (sent []*future) {
	t.Helper()
	for first := uint64(1); ; first++ {
		select {
		case s.requests <- request(t, first, padding):
		case f := <-b.sent:
			sent = append(sent, f)
			first--
		case <-time.After(time.Second): // in the bubble's time: nothing else can go on
			return sent
		}
	}
}

// TestBackpressure: at its bounds the relay stops reading instead of dropping or buffering, and goes
// on when acknowledgements come.
func TestBackpressure(t *testing.T) {
	tests := []struct {
		name    string
		config  Config
		padding int
		want    int // batches handed to the bus before it stops
	}{
		// One more than the queue holds is with the goroutine that waits for its answer, and one
		// waits for a place in the queue.
		{"by number", Config{StreamBatches: 4, TotalBytes: 1 << 30}, 10, 6},
		{"by bytes", Config{StreamBatches: 100, TotalBytes: 3500}, 1000, 3},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := &fakeBus{sent: make(chan *future)}
				ctx, cancel := context.WithCancel(agentContext(t))
				stream := &fakeStream{ctx: ctx, requests: make(chan *relayv1.PublishRequest), answers: make(chan *relayv1.PublishResponse, 100)}
				service := newService(b, tt.config)
				done := make(chan error, 1)
				go func() { done <- service.Publish(stream) }()
				sent := offer(t, stream, b, tt.padding)
				if len(sent) != tt.want {
					t.Errorf("%d batches handed on, want %d", len(sent), tt.want)
				}
				if len(stream.answers) != 0 {
					t.Errorf("%d answers before any acknowledgement", len(stream.answers))
				}
				sent[0].ok <- &jetstream.PubAck{}
				if got := <-stream.answers; got.GetFirst() != 1 || got.GetError() != "" {
					t.Errorf("answer = %v, want 1 without an error", got)
				}
				if more := offer(t, stream, b, tt.padding); len(more) != 1 {
					t.Errorf("%d more batches handed on after one acknowledgement, want 1", len(more))
				}
				cancel()
				if err := <-done; !errors.Is(err, context.Canceled) && err == nil {
					t.Errorf("the handler ended with %v", err)
				}
				if !service.all.TryAcquire(tt.config.TotalBytes) {
					t.Error("the ended stream still holds memory")
				}
			})
		})
	}
}

// TestAnswers: what the bus says reaches the agent.
func TestAnswers(t *testing.T) {
	b := &fakeBus{sent: make(chan *future, 10)}
	stream := &fakeStream{ctx: agentContext(t), requests: make(chan *relayv1.PublishRequest, 10), answers: make(chan *relayv1.PublishResponse, 10)}
	service := newService(b, Config{StreamBatches: 4, TotalBytes: 1 << 20})
	done := make(chan error, 1)
	go func() { done <- service.Publish(stream) }()
	stream.requests <- request(t, 1, 1)
	stream.requests <- request(t, 2, 1)
	(<-b.sent).err <- errors.New("disk full")
	(<-b.sent).ok <- &jetstream.PubAck{Duplicate: true}
	if got := <-stream.answers; got.GetFirst() != 1 || got.GetError() != "store: disk full" {
		t.Errorf("answer = %v", got)
	}
	if got := <-stream.answers; got.GetFirst() != 2 || got.GetError() != "" {
		t.Errorf("answer = %v", got)
	}
	close(stream.requests)
	if err := <-done; err != nil {
		t.Errorf("the handler ended with %v", err)
	}
	service.gate.Set(false)
	stream = &fakeStream{ctx: agentContext(t), requests: make(chan *relayv1.PublishRequest, 1), answers: make(chan *relayv1.PublishResponse, 1)}
	go func() { done <- service.Publish(stream) }()
	stream.requests <- request(t, 3, 1)
	if got := <-stream.answers; got.GetFirst() != 3 || got.GetError() != ErrClosed.Error() {
		t.Errorf("answer with the gate closed = %v", got)
	}
	close(stream.requests)
	if err := <-done; err != nil {
		t.Errorf("the handler ended with %v", err)
	}
}
