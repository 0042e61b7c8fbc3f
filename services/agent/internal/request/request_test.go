// SPDX-License-Identifier: Apache-2.0

package request_test

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/request"
)

func answer() *agentv1.DNSRecord {
	return &agentv1.DNSRecord{Time: timestamppb.New(time.Unix(100, 5)), Client: "10.0.0.1:4000", Server: "[::ffff:10.0.0.2]:53", Protocol: 17, Response: true, Query: "a.test.",
		Qtypes: []string{"A"}, Addresses: []string{"192.0.2.1", "nonsense"}, Ttl: 30, LatencyNs: 7, Rules: []*policyv1.PolicyRule{{Name: "dns", List: "egress", Index: 2}}}
}

func TestOfDNS(t *testing.T) {
	r, ok := request.OfDNS(answer(), time.Second)
	if !ok || r.Time != 101*1e9+5 || r.Server.String() != "10.0.0.2:53" || r.Direction != 2 || r.Latency != 7 || r.DNS.Query != "a.test." || r.DNS.TTL != 30 ||
		r.Rules[0].Name != "dns" || r.Rules[0].Index != 2 {
		t.Errorf("%+v, %t", r, ok)
	}
	addresses, name, ttl := request.Named(r)
	if len(addresses) != 1 || addresses[0].String() != "192.0.2.1" || name != "a.test" || ttl != 30*time.Second {
		t.Errorf("names %v %s %s", addresses, name, ttl)
	}
	for _, tt := range []struct {
		name   string
		change func(*agentv1.DNSRecord)
		sense  bool
	}{
		{"no client", func(r *agentv1.DNSRecord) { r.Client = "" }, false},
		{"families", func(r *agentv1.DNSRecord) { r.Client = "[fd00::1]:4000" }, false},
		{"protocol", func(r *agentv1.DNSRecord) { r.Protocol = 256 + 17 }, false},
		{"no time", func(r *agentv1.DNSRecord) { r.Time = nil }, false},
		{"a query names nobody", func(r *agentv1.DNSRecord) { r.Response = false }, true},
		{"a denied one neither", func(r *agentv1.DNSRecord) { r.Denied = true }, true},
		{"nor does an error", func(r *agentv1.DNSRecord) { r.Rcode = 3 }, true},
	} {
		record := answer()
		tt.change(record)
		r, ok := request.OfDNS(record, 0)
		if ok != tt.sense {
			t.Errorf("%s: %t, want %t", tt.name, ok, tt.sense)
		}
		if ok {
			if addresses, _, _ := request.Named(r); len(addresses) != 0 {
				t.Errorf("%s: names %v", tt.name, addresses)
			}
		}
	}
}

func TestQueueIsBounded(t *testing.T) {
	q := request.NewQueue(2)
	for range 5 {
		q.Put(&flow.Request{})
	}
	q.Lose(7)
	q.Malformed()
	want := request.Losses{Dropped: 3, Lost: 7, Malformed: 1}
	if got := q.TakeLosses(); got != want {
		t.Errorf("losses %+v, want %+v", got, want)
	}
	if got := q.TakeLosses(); got != (request.Losses{}) {
		t.Errorf("losses %+v are told twice", got)
	}
	if got := q.Stats(); got.Taken != 2 || got.Losses != want {
		t.Errorf("stats %+v", got)
	}
	room := make([]*flow.Request, 1)
	for i := range 3 {
		if n := q.Take(room); n != min(1, max(0, 2-i)) {
			t.Errorf("take %d: %d requests", i, n)
		}
	}
}

// Requests come out as they went in, however many are put and taken at once.
func TestQueueKeepsOrder(t *testing.T) {
	const size = 5
	q := request.NewQueue(size)
	var in, out int64
	for round := range 100 {
		for range min(round%4+1, size-int(in-out)) {
			in++
			q.Put(&flow.Request{Time: in})
		}
		room := make([]*flow.Request, round%3+1)
		for _, r := range room[:q.Take(room)] {
			if out++; r.Time != out {
				t.Fatalf("round %d: request %d, want %d", round, r.Time, out)
			}
		}
	}
	if got := q.Stats(); got.Taken != uint64(in) || got.Losses != (request.Losses{}) || out < 100 {
		t.Errorf("%d put, %d taken, %+v", in, out, got)
	}
}

func FuzzOfDNS(f *testing.F) {
	b, err := proto.Marshal(answer())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	e := flow.NewEncoder(flow.NewDirectory("default", time.Now), noClock{}, flow.Node{Cluster: "default", Name: "n"})
	f.Fuzz(func(t *testing.T, b []byte) {
		record := &agentv1.DNSRecord{}
		if proto.Unmarshal(b, record) != nil {
			return
		}
		r, ok := request.OfDNS(record, 0)
		if !ok {
			return
		}
		request.Named(r)
		if _, ok := e.EncodeRequest(r); !ok {
			t.Fatalf("%+v makes no flow", r)
		}
	})
}

type noClock struct{}

func (noClock) Unix(m uint64) int64 { return int64(m) }
