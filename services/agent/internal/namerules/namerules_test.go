// SPDX-License-Identifier: Apache-2.0

package namerules_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/namerules"
)

const patience = time.Minute

type fixture struct {
	t *testing.T
	*namerules.Server
	client  agentv1.DNSServiceClient
	records []string
	lost    uint64
	// draining, when closed, ends the streams.
	draining chan struct{}
}

func start(t *testing.T) *fixture {
	f := &fixture{t: t, draining: make(chan struct{})}
	f.Server = namerules.New(namerules.Config{Record: func(r *agentv1.DNSRecord) { f.records = append(f.records, r.GetQuery()) },
		Lost: func(n uint64) { f.lost += n }, Draining: f.draining, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	ln := bufconn.Listen(1 << 16)
	s := grpc.NewServer()
	agentv1.RegisterDNSServiceServer(s, f.Server)
	go func() { _ = s.Serve(ln) }()
	t.Cleanup(s.Stop)
	conn, err := grpc.NewClient("passthrough:x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return ln.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	f.client = agentv1.NewDNSServiceClient(conn)
	return f
}

// dns is a weir-dns.
type dns struct {
	t      *testing.T
	stream grpc.BidiStreamingClient[agentv1.SyncDNSRequest, agentv1.SyncDNSResponse]
	cancel context.CancelFunc
}

func (f *fixture) connect() *dns {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), patience)
	stream, err := f.client.SyncDNS(ctx)
	if err == nil {
		err = stream.Send(&agentv1.SyncDNSRequest{Message: &agentv1.SyncDNSRequest_Hello{Hello: &agentv1.DNSHello{Version: "v1"}}})
	}
	if err != nil {
		f.t.Fatal(err)
	}
	f.until("connected", func(s namerules.Status) bool { return s.Connected })
	return &dns{f.t, stream, cancel}
}

// until waits for a status.
func (f *fixture) until(what string, ok func(namerules.Status) bool) {
	f.t.Helper()
	for end := time.Now().Add(patience); !ok(f.Status()); {
		if time.Now().After(end) {
			f.t.Fatalf("not %s: %+v", what, f.Status())
		}
		time.Sleep(time.Millisecond)
	}
}

// expect takes a response and describes it.
func (d *dns) expect(when, want string) uint64 {
	d.t.Helper()
	r, err := d.stream.Recv()
	if err != nil {
		d.t.Fatalf("%s: %v", when, err)
	}
	var words []string
	for _, x := range r.Filters {
		words = append(words, fmt.Sprintf("filter %d %d", x.Slot, len(x.Rules)))
	}
	for _, x := range r.RemovedFilters {
		words = append(words, fmt.Sprintf("no filter %d", x))
	}
	for _, p := range r.Policies {
		text := fmt.Sprintf("policy %d", p.Policy)
		for _, n := range p.Names {
			text += " " + n.MatchName + n.MatchPattern
			for _, x := range n.Ranges {
				text += fmt.Sprintf(" %d:%d-%d slot %d rule %d", x.Protocol, x.First, x.Last, x.Slot, x.Rule)
				if x.Visibility {
					text += " visible"
				}
			}
		}
		words = append(words, text)
	}
	for _, x := range r.RemovedPolicies {
		words = append(words, fmt.Sprintf("no policy %d", x))
	}
	slices.Sort(words)
	if r.Synced {
		words = append(words, "synced")
	}
	if got := fmt.Sprint(words); got != "["+want+"]" {
		d.t.Errorf("%s: %s, want [%s]", when, got, want)
	}
	return r.Revision
}

func (d *dns) ack(revision uint64) {
	d.t.Helper()
	if err := d.stream.Send(&agentv1.SyncDNSRequest{Message: &agentv1.SyncDNSRequest_Ack{Ack: revision}}); err != nil {
		d.t.Fatal(err)
	}
}

func filter(patterns ...string) desired.Filter {
	f := desired.Filter{Key: "dns-x", Kind: desired.FilterDNS}
	for _, p := range patterns {
		f.DNS = append(f.DNS, desired.DNSRule{MatchPattern: p})
	}
	return f
}

func names(pattern string) []namerules.Name {
	return []namerules.Name{{MatchPattern: pattern, Ranges: []datapath.PolicyRange{
		{Proto: 6, First: 80, Last: 80, Verdict: datapath.PolicyVisible, Slot: 4, Rule: 7}, {Proto: 6, First: 443, Last: 443, Verdict: datapath.PolicyAllow, Rule: 8}}}}
}

const ranges = " 6:80-80 slot 4 rule 7 visible 6:443-443 slot 0 rule 8"

func TestSync(t *testing.T) {
	f := start(t)
	f.SetFilter(3, filter("*.test"))
	f.SetPolicy(2, names("*.test"))
	f.Flush(patience) // nobody is there
	d := f.connect()
	f.Flush(patience) // held back: nothing to wait for
	f.Complete()
	f.Complete()
	f.Flush(0)
	d.ack(d.expect("first", "filter 3 1 policy 2 *.test"+ranges+" synced"))
	f.until("acknowledged", func(s namerules.Status) bool { return s.Acked == s.Revision })

	// A change waits until it is acknowledged, and is told as one.
	flushed := make(chan struct{})
	f.SetFilter(3, filter("*.test"))
	f.SetFilter(5, filter("*.test", "*.more"))
	f.SetPolicy(2, nil)
	f.SetPolicy(6, names("a"))
	go func() {
		defer close(flushed)
		f.Flush(patience)
	}()
	revision := d.expect("change", "filter 5 2 no policy 2 policy 6 a"+ranges)
	select {
	case <-flushed:
		t.Error("the change did not wait")
	default:
	}
	d.ack(revision)
	<-flushed
	f.KeepFilters(func(slot uint16) bool { return slot == 5 })
	f.Flush(0)
	d.ack(d.expect("a slot rests", "no filter 3"))

	// One that does not answer is not waited for twice; another one gets everything.
	f.until("acknowledged", func(s namerules.Status) bool { return s.Acked == s.Revision })
	f.SetPolicy(6, names("b"))
	f.Flush(time.Nanosecond)
	f.SetPolicy(6, names("c"))
	f.Flush(time.Hour)
	if s := f.Status(); s.Late != 1 || s.Acked == s.Revision {
		t.Errorf("status %+v", s)
	}
	second := f.connect()
	second.ack(second.expect("a second one", "filter 5 2 policy 6 c"+ranges+" synced"))
	d.cancel()
	f.until("caught up", func(s namerules.Status) bool { return s.Connected && s.Acked == s.Revision })
	second.cancel()
	f.until("gone", func(s namerules.Status) bool { return !s.Connected })
	f.SetPolicy(6, nil)
	f.Flush(time.Hour) // nobody is there
}

func TestHelloComesFirst(t *testing.T) {
	f := start(t)
	stream, err := f.client.SyncDNS(t.Context())
	if err == nil {
		err = stream.Send(&agentv1.SyncDNSRequest{Message: &agentv1.SyncDNSRequest_Ack{Ack: 1}})
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("a stream without hello: %v", err)
	}
}

func TestRecords(t *testing.T) {
	f := start(t)
	send := func(stream grpc.BidiStreamingClient[agentv1.SendRecordsRequest, agentv1.SendRecordsResponse], first, lost, want uint64, queries ...string) {
		t.Helper()
		r := &agentv1.SendRecordsRequest{First: first, Lost: lost}
		for _, q := range queries {
			r.Records = append(r.Records, &agentv1.DNSRecord{Query: q})
		}
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
		got, err := stream.Recv()
		if err != nil || got.GetLast() != want {
			t.Errorf("records from %d: acknowledged %d, %v, want %d", first, got.GetLast(), err, want)
		}
	}
	stream, err := f.client.SendRecords(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	send(stream, 1, 0, 2, "a", "b")
	send(stream, 3, 5, 3, "c")
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if stream, err = f.client.SendRecords(t.Context()); err != nil {
		t.Fatal(err)
	}
	send(stream, 2, 0, 4, "b", "c", "d") // b and c were taken, and the acknowledgement was lost
	send(stream, 1, 1, 1, "new")         // another weir-dns that counts anew
	send(stream, 101, 2, 100)            // one that goes on higher, and has only losses to tell
	if want := []string{"a", "b", "c", "d", "new"}; !slices.Equal(f.records, want) || f.lost != 8 {
		t.Errorf("records %q, %d lost; want %q and 8", f.records, f.lost, want)
	}
}

func TestDrainEndsStreams(t *testing.T) {
	f := start(t)
	records, err := f.client.SendRecords(t.Context())
	if err == nil {
		err = records.Send(&agentv1.SendRecordsRequest{First: 1, Records: []*agentv1.DNSRecord{{Query: "a"}}})
	}
	if err == nil {
		_, err = records.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	close(f.draining)
	if _, err := records.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream of records ended with %v, want Unavailable", err)
	}
}

// What a weir-dns may have rows of is gone when all that are connected have acknowledged that, and not while none is.
func TestGone(t *testing.T) {
	f := start(t)
	f.Complete()
	f.SetPolicy(2, names("a"))
	f.Flush(0)
	check := func(when string, policy uint32, want bool) {
		t.Helper()
		if got := f.Gone(policy); got != want {
			t.Errorf("%s: policy %d is gone: %v", when, policy, got)
		}
	}
	check("nobody is connected", 9, false)
	d := f.connect()
	revision := d.expect("first", "policy 2 a"+ranges+" synced")
	check("not acknowledged", 9, false)
	d.ack(revision)
	f.until("acknowledged", func(s namerules.Status) bool { return s.Acked == s.Revision })
	check("of an agent of before", 9, true)
	check("has names", 2, false)

	f.SetPolicy(2, nil)
	check("not told", 2, false)
	f.Flush(0)
	revision = d.expect("taken back", "no policy 2")
	check("told", 2, false)
	second := f.connect()
	d.ack(revision)
	second.ack(second.expect("a second one", "synced"))
	f.until("acknowledged", func(s namerules.Status) bool { return s.Acked == s.Revision })
	check("acknowledged", 2, true)

	f.SetPolicy(2, names("a"))
	check("names again", 2, false)
	f.SetPolicy(2, nil)
	d.cancel()
	second.cancel()
	f.until("disconnected", func(s namerules.Status) bool { return !s.Connected })
	f.Flush(0)
	check("nobody is connected any more", 2, false)
	third := f.connect()
	third.ack(third.expect("a third one", "synced"))
	f.until("acknowledged", func(s namerules.Status) bool { return s.Acked == s.Revision })
	check("acknowledged by a new one", 2, true)
}
