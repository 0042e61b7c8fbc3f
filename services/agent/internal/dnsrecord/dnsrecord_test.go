// SPDX-License-Identifier: Apache-2.0

package dnsrecord

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
)

// agent takes records; breakAfter ends each of the first streams after so many messages, without an acknowledgement of the last.
type agent struct {
	agentv1.UnimplementedDNSServiceServer

	mu         sync.Mutex
	breakAfter []int
	got        map[uint64]string
	twice      int
	lost       uint64
	changed    chan struct{}
}

// SendRecords implements the service.
func (a *agent) SendRecords(stream agentv1.DNSService_SendRecordsServer) error {
	a.mu.Lock()
	limit := -1
	if len(a.breakAfter) > 0 {
		limit, a.breakAfter = a.breakAfter[0], a.breakAfter[1:]
	}
	a.mu.Unlock()
	for n := 1; ; n++ {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		if n == limit {
			return errors.New("broken")
		}
		a.mu.Lock()
		for i, r := range m.GetRecords() {
			number := m.GetFirst() + uint64(i)
			if a.got[number] != "" {
				a.twice++
			}
			a.got[number] = r.GetQuery()
		}
		a.lost += m.GetLost()
		a.mu.Unlock()
		if err := stream.Send(&agentv1.SendRecordsResponse{Last: m.GetFirst() + uint64(len(m.GetRecords())) - 1}); err != nil {
			return err
		}
		select {
		case a.changed <- struct{}{}:
		default:
		}
	}
}

func (a *agent) wait(t *testing.T, done func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		a.mu.Lock()
		ok := done()
		a.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-a.changed:
		case <-deadline:
			a.mu.Lock()
			defer a.mu.Unlock()
			t.Fatalf("the agent has %d records, %d lost", len(a.got), a.lost)
		}
	}
}

func connect(t *testing.T, a *agent) *grpc.ClientConn {
	t.Helper()
	ln := bufconn.Listen(1 << 16)
	server := grpc.NewServer()
	agentv1.RegisterDNSServiceServer(server, a)
	go func() { _ = server.Serve(ln) }() // it ends with Stop
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return ln.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func newAgent(breakAfter ...int) *agent {
	return &agent{breakAfter: breakAfter, got: map[uint64]string{}, changed: make(chan struct{}, 1)}
}

func run(t *testing.T, q *Queue, a *agent) (stop func()) {
	t.Helper()
	conn := connect(t, a)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- q.Run(ctx, conn) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func add(q *Queue, n int) {
	for i := range n {
		q.Add(&agentv1.DNSRecord{Query: fmt.Sprint(i)})
	}
}

func TestAllArriveInOrder(t *testing.T) {
	q, a := New(10000, 100), newAgent()
	stop := run(t, q, a)
	add(q, 1)
	a.wait(t, func() bool { return len(a.got) == 1 })
	add(q, 3000)
	stop() // what is queued is still sent
	for i := range 3000 {
		if got := a.got[uint64(101+i)]; got != fmt.Sprint(i) {
			t.Fatalf("record %d is %q", 101+i, got)
		}
	}
	if a.lost+uint64(a.twice) != 0 {
		t.Errorf("%d lost, %d twice", a.lost, a.twice)
	}
}

func TestFullQueueCounts(t *testing.T) {
	q, a := New(100, 1), newAgent()
	add(q, 130)
	stop := run(t, q, a)
	a.wait(t, func() bool { return len(a.got) == 100 && a.lost == 30 })
	stop() // when all is acknowledged
	if total, waiting, lost := q.Stats(); total != 130 || lost != 30 || waiting != 0 {
		t.Errorf("%d, %d wait, %d lost", total, waiting, lost)
	}
}

// A stream that breaks once costs nothing; one that breaks twice costs what was on both.
func TestBrokenStreams(t *testing.T) {
	for _, c := range []struct {
		breaks []int
		lost   uint64
	}{{[]int{1}, 0}, {[]int{2}, 0}, {[]int{1, 1}, maxBatch}} {
		t.Run(fmt.Sprint(c.breaks), func(t *testing.T) {
			q, a := New(10000, 1), newAgent(c.breaks...)
			add(q, maxBatch)
			run(t, q, a)
			if c.breaks[0] == 2 {
				a.wait(t, func() bool { return len(a.got) == maxBatch })
				add(q, 10)
				a.wait(t, func() bool { return len(a.got) == maxBatch+10 })
				return
			}
			a.wait(t, func() bool { return uint64(len(a.got))+a.lost == maxBatch && a.lost == c.lost })
		})
	}
}
