// SPDX-License-Identifier: Apache-2.0

package dnsproxy

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/services/agent/internal/testns"
)

// fakeNames hold answers back until the test lets them go.
type fakeNames struct {
	mu     sync.Mutex
	done   []func(error)
	atOnce sync.WaitGroup // with early, done is called at once, by another goroutine
	early  bool
}

func (f *fakeNames) Learn(_ uint16, _ string, _ []netip.Addr, _ time.Duration, done func(error)) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.done = append(f.done, done)
	if f.early {
		f.atOnce.Go(func() { done(nil) })
		runtime.Gosched()
	}
	return false
}

type fakeJudge struct{}

func (fakeJudge) Judge(netip.Addr, netip.AddrPort, uint8, string) Judgement {
	return Judgement{Verdict: Pass, Endpoint: 1}
}

type bench struct {
	*Proxy
	names   *fakeNames
	stream  *stream
	client  *dns.Conn
	records []Record
}

// newBench is a proxy whose one client's connection is a pipe.
func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{names: &fakeNames{}}
	p, err := New(Config{Judge: fakeJudge{}, Names: b.names, Record: func(r Record) { b.records = append(b.records, r) }, Timeout: time.Minute,
		NamesTimeout: time.Second, MaxQueries: 3, MaxQueriesPerClient: 2, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	client, conn := net.Pipe()
	b.Proxy, b.client = p, &dns.Conn{Conn: client}
	b.stream = &stream{proxy: p, conn: conn, out: make(chan []byte, maxPipelined), gone: make(chan struct{}), client: netip.MustParseAddrPort("10.0.0.1:1"),
		server: netip.MustParseAddrPort("10.0.0.2:53")}
	written := make(chan struct{})
	go func() { defer close(written); b.stream.write() }()
	t.Cleanup(func() {
		b.stream.close()
		<-written
		if err := errors.Join(client.Close(), p.answers.close()); err != nil {
			t.Error(err)
		}
	})
	if err := client.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) query(t *testing.T, id uint16) *query {
	t.Helper()
	m := new(dns.Msg).SetQuestion("a.example.", dns.TypeA)
	m.Id = id
	wire, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	q := b.receive(wire, b.stream.client, b.stream.server, protoTCP, b.stream)
	if q != nil {
		b.stream.flying.Add(1)
	}
	return q
}

func (b *bench) answer(t *testing.T, q *query) []byte {
	t.Helper()
	var m dns.Msg
	if err := m.Unpack(q.wire); err != nil {
		t.Fatal(err)
	}
	a := new(dns.Msg).SetReply(&m)
	rr, err := dns.NewRR("a.example. 60 IN A 1.2.3.4")
	if err != nil {
		t.Fatal(err)
	}
	a.Answer = []dns.RR{rr}
	wire, err := a.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return wire
}

// An answer waits for the maps: released when they hold it, a failure when they cannot or do not in time; once in any case.
func TestAnswersWaitForTheMaps(t *testing.T) {
	for _, c := range []struct {
		name  string
		end   func(b *bench)
		rcode int
	}{
		{"written", func(b *bench) { b.names.done[0](nil) }, dns.RcodeSuccess},
		{"full", func(b *bench) { b.names.done[0](errors.New("full")) }, dns.RcodeServerFailure},
		{"stuck", func(b *bench) {
			for _, q := range b.waiting.overdue(time.Now().Add(time.Minute)) {
				b.fail(q, dns.RcodeServerFailure)
			}
			b.names.done[0](nil) // too late
		}, dns.RcodeServerFailure},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			q := b.query(t, 7)
			msg := b.answer(t, q)
			b.answered(q, msg, nil)
			clear(msg) // its buffer is used again
			if b.stream.queued.Load() != 0 || b.flights.count() != 1 {
				t.Fatalf("%d bytes sent, %d in flight", b.stream.queued.Load(), b.flights.count())
			}
			c.end(b)
			got, err := b.client.ReadMsg()
			if err != nil || got.Id != 7 || got.Rcode != c.rcode || (len(got.Answer) == 1) != (c.rcode == dns.RcodeSuccess) {
				t.Fatalf("answer %v, %v", got, err)
			}
			if len(b.stream.out) != 0 || b.flights.count() != 0 || b.stream.flying.Load() != 0 || len(b.waiting.queries) != 0 {
				t.Error("something is left")
			}
			if len(b.records) != 2 || b.records[1].Answer.RCode != c.rcode || b.records[1].Latency <= 0 {
				t.Errorf("records %+v", b.records)
			}
		})
	}
}

// The maps may be written before Learn has returned.
func TestWrittenAtOnce(t *testing.T) {
	b := newBench(t)
	b.names.early = true
	for i := range uint16(200) {
		q := b.query(t, i)
		b.answered(q, b.answer(t, q), nil)
		got, err := b.client.ReadMsg()
		if err != nil || got.Id != i || len(got.Answer) != 1 {
			t.Fatalf("answer %v, %v", got, err)
		}
		b.names.atOnce.Wait()
	}
}

func TestBounds(t *testing.T) {
	b := newBench(t)
	for i := range uint16(3) {
		if q := b.query(t, i); (q != nil) != (i < 2) {
			t.Errorf("query %d passes: %v", i, q != nil)
		}
	}
	if got, err := b.client.ReadMsg(); err != nil || got.Id != 2 || got.Rcode != dns.RcodeServerFailure {
		t.Errorf("answer %v, %v", got, err)
	}
	if got := b.flights.begin(netip.MustParseAddr("10.0.0.8"), 3, 2); got != room {
		t.Errorf("another client: %v", got)
	}
	if got := b.flights.begin(netip.MustParseAddr("10.0.0.9"), 3, 2); got != fullForAll {
		t.Errorf("the fourth query: %v", got)
	}
}

func TestTable(t *testing.T) {
	b := newBench(t)
	q := b.query(t, 7)
	var x table
	id, err := x.add(q)
	if err != nil {
		t.Fatal(err)
	}
	msg := b.answer(t, q)
	if x.take(bytes.Clone(msg)) != nil && id != 7 {
		t.Error("an answer with the client's number is taken")
	}
	msg[0], msg[1] = byte(id>>8), byte(id)
	if got := x.take(msg); got != q || msg[0] != 0 || msg[1] != 7 {
		t.Errorf("took %v, number %d", got, msg[:2])
	}
	msg[0], msg[1] = byte(id>>8), byte(id)
	if x.take(msg) != nil {
		t.Error("an answer is taken twice")
	}
	for range maxTable {
		if _, err := x.add(q); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := x.add(q); !errors.Is(err, errTableFull) {
		t.Errorf("one more: %v", err)
	}
	if got := x.overdue(time.Now().Add(time.Second), nil); len(got) != maxTable || x.len() != 0 {
		t.Errorf("%d overdue, %d left", len(got), x.len())
	}
}

// Answers of all lengths arrive with the source that they claim, and the kernel believes their checksums.
func TestAnswerer(t *testing.T) {
	testns.Do(t, func() {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
			return
		}
		a, err := newAnswerer()
		if err != nil {
			t.Error(err)
			return
		}
		for _, c := range []struct{ listen, from string }{{"127.0.0.1:0", "127.0.0.5:53"}, {"[::1]:0", "[::1]:53"}} {
			if err := answerAll(a, c.listen, netip.MustParseAddrPort(c.from)); err != nil {
				t.Error(err)
			}
		}
		if err := a.send(netip.MustParseAddrPort("127.0.0.5:53"), netip.MustParseAddrPort("127.0.0.1:9"), make([]byte, 65535)); !errors.Is(err, unix.EMSGSIZE) {
			t.Errorf("too long: %v", err)
		}
		if err := a.close(); err != nil {
			t.Error(err)
		}
	})
}

func answerAll(a *answerer, listen string, from netip.AddrPort) error {
	c, err := net.ListenPacket("udp", listen)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	to := netip.MustParseAddrPort(c.LocalAddr().String())
	for n := range 300 {
		msg := make([]byte, n)
		for i := range msg {
			msg[i] = byte(255 - i*n)
		}
		if err := a.send(from, to, msg); err != nil {
			return err
		}
		buf := make([]byte, 1000)
		got, source, err := c.ReadFrom(buf)
		if err != nil || !bytes.Equal(buf[:got], msg) || source.String() != from.String() {
			return fmt.Errorf("%d bytes from %v: got %d from %v, %w", n, from, got, source, err)
		}
	}
	return nil
}

func FuzzDestination(f *testing.F) {
	f.Add([]byte{24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 20, 0, 0, 0, 2, 0, 0, 53, 10, 0, 0, 1})
	f.Fuzz(func(t *testing.T, oob []byte) {
		if a, ok := destinationOf(oob); ok && !a.IsValid() {
			t.Errorf("%x: %v", oob, a)
		}
	})
}

// A query that the server's connection does not take is not left to wait.
func TestUnsentQueryIsTold(t *testing.T) {
	up, far := net.Pipe()
	if err := errors.Join(far.Close(), up.Close()); err != nil {
		t.Fatal(err)
	}
	s := &stream{upstream: up}
	if err := s.forward(t.Context(), &query{wire: make([]byte, 12)}); err == nil || s.table.len() != 0 {
		t.Errorf("forwarded: %v, %d wait", err, s.table.len())
	}
}
