// SPDX-License-Identifier: Apache-2.0

package dnsproxy

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/weirmesh/weir/services/agent/internal/dnswire"
)

// knownNames are in the maps already.
type knownNames struct{}

func (knownNames) Learn(uint16, string, []netip.Addr, time.Duration, func(error)) bool { return true }

// BenchmarkProxied is all that is done for a query and its answer but calls of the kernel.
func BenchmarkProxied(b *testing.B) {
	p, err := New(Config{Judge: fakeJudge{}, Names: knownNames{}, Record: func(Record) {}, MaxQueries: 2, MaxQueriesPerClient: 2, UDPSize: 1232,
		Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = p.answers.close() }()
	m := new(dns.Msg).SetQuestion("api.example.com.", dns.TypeA)
	query, err := m.Pack()
	if err != nil {
		b.Fatal(err)
	}
	a := new(dns.Msg).SetReply(m)
	for _, text := range []string{"api.example.com. 60 IN A 192.0.2.1", "api.example.com. 60 IN A 192.0.2.2"} {
		rr, err := dns.NewRR(text)
		if err != nil {
			b.Fatal(err)
		}
		a.Answer = append(a.Answer, rr)
	}
	a.Compress = true
	answer, err := a.Pack()
	if err != nil {
		b.Fatal(err)
	}
	client, server := netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:53")
	u, out := &upstream{}, newAnswers(answerBatch)
	b.ReportAllocs()
	for b.Loop() {
		q := p.receive(append([]byte(nil), query...), client, server, protoUDP, nil)
		id, err := u.table.add(q)
		if err != nil {
			b.Fatal(err)
		}
		dnswire.SetID(answer, id)
		p.datagram(u, answer, out)
		if len(out.queries) != 1 {
			b.Fatal("no answer")
		}
		out.reset()
	}
}
