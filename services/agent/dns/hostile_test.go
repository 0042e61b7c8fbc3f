// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
)

// details asks the status socket.
func (w *world) details() map[string]string {
	w.Helper()
	conn, err := grpc.NewClient("unix://"+filepath.Join(w.dir, "dns.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	w.do(err)
	defer func() { _ = conn.Close() }()
	got, err := statusv1.NewStatusServiceClient(conn).GetStatus(w.Context(), &statusv1.GetStatusRequest{})
	w.do(err)
	out := map[string]string{}
	for _, d := range got.GetDetails() {
		out[d.GetName()] = d.GetValue()
	}
	return out
}

// What is not the answer to the query is not believed, and what is not its name's is not learnt.
func TestForgedAnswers(t *testing.T) {
	w := newWorld(t)
	w.agent.set(allow("*"), toNames(8080, "**.example"))
	z := &zone{handle: func(rw mdns.ResponseWriter, m *mdns.Msg) {
		reply := func(change func(*mdns.Msg), records ...string) {
			a := new(mdns.Msg).SetReply(m)
			for _, r := range records {
				rr, err := mdns.NewRR(r)
				if err != nil {
					panic(err)
				}
				a.Answer = append(a.Answer, rr)
			}
			change(a)
			_ = rw.WriteMsg(a) // the client notices
		}
		name := m.Question[0].Name
		forged := name + " 600 IN A 6.6.6.6"
		reply(func(a *mdns.Msg) { a.Id++ }, forged)
		reply(func(a *mdns.Msg) { a.Question[0].Name = "x" + name }, forged)
		reply(func(a *mdns.Msg) { a.Question[0].Qtype = mdns.TypeAAAA }, forged)
		reply(func(a *mdns.Msg) { a.Question = nil }, forged)
		reply(func(a *mdns.Msg) { a.Response = false }, forged)
		_, _ = rw.Write([]byte{1, 2, 3})
		extra, err := mdns.NewRR("victim.example. 600 IN A 6.6.6.7")
		if err != nil {
			panic(err)
		}
		reply(func(a *mdns.Msg) { a.Extra, a.Ns = append(a.Extra, extra), append(a.Ns, extra) },
			name+" 600 IN A 1.2.3.4", "victim.example. 600 IN A 6.6.6.8", "x."+name+" 600 IN A 6.6.6.9")
		reply(func(*mdns.Msg) {}, forged) // too late
	}}
	w.zone(w.server, z)
	for _, network := range []string{"udp", "tcp"} {
		got := w.ask(network, w.server.v4, "good.example.", mdns.TypeA)
		if len(got.Answer) != 3 || !strings.Contains(got.Answer[0].String(), "1.2.3.4") {
			t.Errorf("%s: answer %v", network, got)
		}
	}
	if got := w.addresses(); len(got) != 1 || got[netip.MustParseAddr("1.2.3.4")] == 0 {
		t.Errorf("learnt %v", got)
	}
}

func TestTruncatedAndBig(t *testing.T) {
	w := newWorld(t)
	var records []string
	for i := range 300 {
		records = append(records, fmt.Sprintf("big.example. 600 IN A 10.9.%d.%d", i/250, i%250))
	}
	w.zone(w.server, &zone{records: map[string][]string{"big.example.": records}})
	w.agent.set(allow("*"), toNames(8080, "*.example"))
	m := new(mdns.Msg).SetQuestion("big.example.", mdns.TypeA).SetEdns0(4096, false)
	got, err := w.exchange("udp", w.server.v4, m)
	if err != nil || !got.Truncated || len(got.Answer) > 100 {
		t.Fatalf("by UDP: %v", err)
	}
	got = w.ask("tcp", w.server.v4, "big.example.", mdns.TypeA)
	if len(got.Answer) != 300 {
		t.Errorf("%d records by TCP", len(got.Answer))
	}
	if got := len(w.addresses()); got != 300 {
		t.Errorf("%d addresses are open, want 300", got)
	}
}

func TestZoneTransfer(t *testing.T) {
	w := newWorld(t)
	w.agent.set(allow("*"), nil)
	soa, err := mdns.NewRR("zone.example. 600 IN SOA ns.zone.example. a.b. 1 1 1 1 1")
	w.do(err)
	w.zone(w.server, &zone{handle: func(rw mdns.ResponseWriter, m *mdns.Msg) {
		envelopes := make(chan *mdns.Envelope)
		go func() {
			defer close(envelopes)
			envelopes <- &mdns.Envelope{RR: []mdns.RR{soa}}
			for i := range 50 {
				rr, err := mdns.NewRR(fmt.Sprintf("h%d.zone.example. 600 IN A 10.0.0.%d", i, i))
				if err != nil {
					panic(err)
				}
				envelopes <- &mdns.Envelope{RR: []mdns.RR{rr}}
			}
			envelopes <- &mdns.Envelope{RR: []mdns.RR{soa}}
		}()
		_ = new(mdns.Transfer).Out(rw, m, envelopes) // the client notices
	}})
	c, err := w.dial("tcp", netip.AddrPortFrom(w.server.v4, 53))
	w.do(err)
	defer func() { _ = c.Close() }()
	answers, err := (&mdns.Transfer{Conn: &mdns.Conn{Conn: c}}).In(new(mdns.Msg).SetAxfr("zone.example."), "")
	w.do(err)
	n := 0
	for e := range answers {
		w.do(e.Error)
		n += len(e.RR)
	}
	if n != 52 {
		t.Errorf("%d records, want 52", n)
	}
}

// Whatever comes, the next query is answered.
func TestMalformedQueries(t *testing.T) {
	w := newWorld(t)
	w.zone(w.server, &zone{records: web("web.example.", 60)})
	w.agent.set(allow("*.example"), nil)
	good, err := new(mdns.Msg).SetQuestion("web.example.", mdns.TypeA).Pack()
	w.do(err)
	r := rand.New(rand.NewPCG(1, 2))
	udp, err := w.dial("udp", netip.AddrPortFrom(w.server.v4, 53))
	w.do(err)
	defer func() { _ = udp.Close() }()
	for range 500 {
		b := append([]byte(nil), good...)
		for range 1 + r.IntN(4) {
			b[r.IntN(len(b))] = byte(r.Uint32())
		}
		_, err := udp.Write(b[:r.IntN(len(b)+1)])
		w.do(err)
	}
	for i := range 30 {
		tcp, err := w.dial("tcp", netip.AddrPortFrom(w.server.v4, 53))
		w.do(err)
		junk := make([]byte, 2+r.IntN(200))
		for j := range junk {
			junk[j] = byte(r.Uint32())
		}
		if i%2 == 0 {
			binary.BigEndian.PutUint16(junk, uint16(len(junk)-2))
		}
		_, _ = tcp.Write(junk) // it may be closed already
		w.do(tcp.Close())
	}
	two := append([]byte(nil), good...)
	two[5] = 2
	two = append(two, good[12:]...)
	if _, err := udp.Write(two); err != nil {
		t.Fatal(err)
	}
	if got := w.ask("udp", w.server.v4, "web.example.", mdns.TypeA); len(got.Answer) != 1 {
		t.Errorf("answer %v", got)
	}
	if got := w.ask("tcp", w.server.v4, "web.example.", mdns.TypeA); len(got.Answer) != 1 {
		t.Errorf("answer %v", got)
	}
}

// A client's flood is answered with failures above the bound, and those that no server answers are given up.
func TestFlood(t *testing.T) {
	w := newWorld(t)
	w.stop(w.dns, syscall.SIGTERM)
	w.dns = w.start("--queries-per-client-max", "50", "--upstream-timeout", "300ms")
	w.agent.set(allow("*.example"), nil)
	w.zone(w.outside, &zone{records: web("web.example.", 60)})
	mute := &zone{handle: func(mdns.ResponseWriter, *mdns.Msg) {}}
	w.zone(w.server, mute)
	c, err := w.dial("udp", netip.AddrPortFrom(w.server.v4, 53))
	w.do(err)
	defer func() { _ = c.Close() }()
	conn := &mdns.Conn{Conn: c}
	for i := range 80 {
		w.do(conn.WriteMsg(new(mdns.Msg).SetQuestion(fmt.Sprintf("n%d.example.", i), mdns.TypeA)))
	}
	w.do(c.SetReadDeadline(time.Now().Add(5 * time.Second)))
	for range 30 {
		got, err := conn.ReadMsg()
		if err != nil || got.Rcode != mdns.RcodeServerFailure {
			t.Fatalf("above the bound: %v, %v", got, err)
		}
	}
	w.until("the others are given up", func() bool {
		d := w.details()
		return strings.Contains(d["queries"], " 0 in flight") && strings.HasPrefix(d["servers"], "50 timeouts")
	})
	if n := mute.queries.Load(); n != 50 {
		t.Errorf("%d queries reached the server, want 50", n)
	}
	if got := w.ask("udp", w.outside.v4, "web.example.", mdns.TypeA); len(got.Answer) != 1 {
		t.Errorf("answer %v", got)
	}
}

// A client may ask several things at once and close its side; it gets all answers, in whatever order.
func TestPipelined(t *testing.T) {
	w := newWorld(t)
	w.agent.set(allow("*.example"), nil)
	hold := make(chan struct{})
	w.zone(w.server, &zone{handle: func(rw mdns.ResponseWriter, m *mdns.Msg) {
		if m.Question[0].Name == "slow.example." {
			go func() {
				<-hold
				_ = rw.WriteMsg(new(mdns.Msg).SetReply(m)) // the client notices
			}()
			return
		}
		_ = rw.WriteMsg(new(mdns.Msg).SetReply(m))
	}})
	c, err := w.dial("tcp", netip.AddrPortFrom(w.server.v6, 53))
	w.do(err)
	defer func() { _ = c.Close() }()
	conn := &mdns.Conn{Conn: c}
	for i, name := range []string{"slow.example.", "quick.example.", "refused.org."} {
		m := new(mdns.Msg).SetQuestion(name, mdns.TypeA)
		m.Id = uint16(i)
		w.do(conn.WriteMsg(m))
	}
	half, _ := c.(*net.TCPConn)
	w.do(half.CloseWrite(), c.SetReadDeadline(time.Now().Add(10*time.Second)))
	got := map[uint16]int{}
	for i := range 3 {
		if i == 2 {
			close(hold)
		}
		m, err := conn.ReadMsg()
		w.do(err)
		got[m.Id] = m.Rcode
		if i < 2 && m.Id == 0 {
			t.Error("the slow answer came first")
		}
	}
	if len(got) != 3 || got[2] != mdns.RcodeRefused {
		t.Errorf("answers %v", got)
	}
	if _, err := conn.ReadMsg(); !errors.Is(err, io.EOF) {
		t.Errorf("after the last answer: %v", err)
	}
}
