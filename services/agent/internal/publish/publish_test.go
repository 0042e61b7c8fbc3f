// SPDX-License-Identifier: Apache-2.0

package publish_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	relayv1 "github.com/weirmesh/weir/gen/weir/relay/v1"
	"github.com/weirmesh/weir/services/agent/internal/batch"
	"github.com/weirmesh/weir/services/agent/internal/publish"
	"github.com/weirmesh/weir/services/agent/internal/spool"
)

// relay is a relay that does as it is told for each batch.
type relay struct {
	relayv1.UnimplementedRelayServiceServer
	// answer decides on a batch, given how often it has come to this relay: nil = store and acknowledge.
	answer func(first uint64, times int) error

	mu     sync.Mutex
	seen   map[uint64]int
	stored []uint64
}

type refusal string

func (r refusal) Error() string { return string(r) }

const (
	lostAck  refusal = "lost acknowledgement"
	notToday refusal = "stream is full"
)

func (r *relay) Publish(stream grpc.BidiStreamingServer[relayv1.PublishRequest, relayv1.PublishResponse]) error {
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	for {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		b := &flowv1.Batch{}
		if err := proto.Unmarshal(req.Batch, b); err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		first := b.Header.First
		r.mu.Lock()
		r.seen[first]++
		var verdict error
		if r.answer != nil {
			verdict = r.answer(first, r.seen[first])
		}
		if verdict == nil || errors.Is(verdict, lostAck) {
			r.stored = append(r.stored, first)
		}
		r.mu.Unlock()
		response := &relayv1.PublishResponse{Epoch: b.Header.Epoch, First: first}
		switch {
		case verdict == nil:
		case errors.Is(verdict, lostAck):
			return status.Error(codes.Unavailable, "gone after storing")
		case errors.Is(verdict, notToday):
			response.Error = string(notToday)
		default:
			return verdict
		}
		if err := stream.Send(response); err != nil {
			return err
		}
	}
}

func (r *relay) got() []uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.stored)
}

// network serves relays by their names.
type network map[string]*bufconn.Listener

func serve(t *testing.T, relays map[string]*relay) network {
	t.Helper()
	n := network{}
	for name, r := range relays {
		r.seen = map[uint64]int{}
		ln := bufconn.Listen(1 << 20)
		s := grpc.NewServer()
		relayv1.RegisterRelayServiceServer(s, r)
		done := make(chan struct{})
		go func() { defer close(done); _ = s.Serve(ln) }()
		t.Cleanup(func() { s.Stop(); <-done })
		n[name] = ln
	}
	return n
}

func (n network) dial(address string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			if n[address] == nil {
				return nil, status.Error(codes.Unavailable, "nobody there")
			}
			return n[address].DialContext(ctx)
		}))
}

func push(s *spool.Spool, n int) {
	sealer := batch.NewSealer("n", "default", 5)
	for range n {
		sealer.AddAgentEvent(1, []byte("event"))
		b, _ := sealer.Seal()
		s.Push(b)
	}
}

// run publishes until the spool is empty and returns the batches that were acknowledged.
func run(t *testing.T, n network, s *spool.Spool, addresses ...string) []uint64 {
	t.Helper()
	var mu sync.Mutex
	var acked []uint64
	moved := make(chan struct{}, 1)
	signal := func() {
		select {
		case moved <- struct{}{}:
		default:
		}
	}
	p := publish.New(publish.Config{Addresses: addresses, Dial: n.dial, Spool: s, Log: slog.New(slog.DiscardHandler),
		Acked:   func(b *batch.Sealed) { mu.Lock(); acked = append(acked, b.First); mu.Unlock(); signal() },
		Changed: func(string) { signal() }})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	patience := time.After(time.Minute)
	for waiting := true; waiting && s.Stats().Batches > 0; {
		select {
		case <-moved:
		case <-patience:
			waiting = false
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if left := s.Stats().Batches; left > 0 {
		t.Fatalf("%d batches are left", left)
	}
	mu.Lock()
	defer mu.Unlock()
	return acked
}

func numbers(n int) []uint64 {
	var list []uint64
	for i := range n {
		list = append(list, uint64(i+1))
	}
	return list
}

func TestInOrderToOneRelay(t *testing.T) {
	r := &relay{}
	n := serve(t, map[string]*relay{"a": r})
	s := spool.New(1 << 20)
	push(s, 50)
	if acked := run(t, n, s, "a"); !slices.Equal(acked, numbers(50)) || !slices.Equal(r.got(), numbers(50)) {
		t.Errorf("acknowledged %v, stored %v", acked, r.got())
	}
}

func TestFailoverResendsWhatWasNotAcknowledged(t *testing.T) {
	// The first relay stores batch 4 and dies before it says so; batches 1 to 3 are done.
	a := &relay{answer: func(first uint64, _ int) error {
		if first == 4 {
			return lostAck
		}
		return nil
	}}
	b := &relay{}
	n := serve(t, map[string]*relay{"a": a, "b": b})
	s := spool.New(1 << 20)
	push(s, 10)
	acked := run(t, n, s, "a", "none", "b")
	slices.Sort(acked)
	if !slices.Equal(acked, numbers(10)) {
		t.Errorf("acknowledged %v, want each of 1 to 10 once", acked)
	}
	if got := b.got(); !slices.Contains(got, 4) || slices.Contains(got, 3) {
		t.Errorf("the second relay got %v, want 4 and what follows", got)
	}
}

func TestRelayThatCannotStore(t *testing.T) {
	r := &relay{answer: func(first uint64, times int) error {
		if first == 2 && times < 3 {
			return notToday
		}
		return nil
	}}
	n := serve(t, map[string]*relay{"a": r})
	s := spool.New(1 << 20)
	push(s, 3)
	run(t, n, s, "a")
	got := r.got()
	slices.Sort(got)
	if got = slices.Compact(got); !slices.Equal(got, numbers(3)) {
		t.Errorf("stored %v, want 1 to 3", got)
	}
}

func TestUnreadableBatchIsGivenUpAndTold(t *testing.T) {
	r := &relay{answer: func(first uint64, _ int) error {
		if first == 2 {
			return status.Error(codes.InvalidArgument, "cannot be read")
		}
		return nil
	}}
	n := serve(t, map[string]*relay{"a": r})
	s := spool.New(1 << 20)
	push(s, 3)
	run(t, n, s, "a")
	news, _ := s.TakeLosses()
	if len(news) != 1 || news[0].First != 2 || news[0].Cause != flowv1.Cause_CAUSE_INVALID {
		t.Errorf("losses %v, want batch 2 as invalid", news)
	}
}
