// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// zone is a DNS server by UDP and TCP on some addresses.
type zone struct {
	queries atomic.Int64
	handle  func(w mdns.ResponseWriter, m *mdns.Msg)
	// records of a name, as in a zone file, that a query of their type gets.
	records map[string][]string
}

func (z *zone) ServeDNS(w mdns.ResponseWriter, m *mdns.Msg) {
	z.queries.Add(1)
	if z.handle != nil {
		z.handle(w, m)
		return
	}
	a := new(mdns.Msg).SetReply(m)
	records, known := z.records[strings.ToLower(m.Question[0].Name)]
	if !known {
		a.Rcode = mdns.RcodeNameError
	}
	for _, text := range records {
		r, err := mdns.NewRR(text)
		if err != nil {
			panic(err)
		}
		if t := r.Header().Rrtype; t == m.Question[0].Qtype || t == mdns.TypeCNAME || !strings.EqualFold(r.Header().Name, m.Question[0].Name) {
			a.Answer = append(a.Answer, r)
		}
	}
	if size := uint16(512); w.RemoteAddr().Network() == "udp" {
		if o := m.IsEdns0(); o != nil {
			size = o.UDPSize()
		}
		a.Truncate(int(size))
	}
	_ = w.WriteMsg(a) // the client notices
}

func (w *world) zone(h *host, z *zone) {
	w.Helper()
	for _, v6 := range []bool{false, true} {
		addr := netip.AddrPortFrom(h.addr(v6), 53)
		udp, tcp := &mdns.Server{Handler: z}, &mdns.Server{Handler: z}
		w.do(inside(h.ns, func() (err error) {
			if udp.PacketConn, err = net.ListenPacket("udp", addr.String()); err == nil {
				tcp.Listener, err = net.Listen("tcp", addr.String())
			}
			return err
		}))
		for _, s := range []*mdns.Server{udp, tcp} {
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				_ = s.ActivateAndServe() // it ends with its socket
			}()
			w.Cleanup(func() { _ = s.Shutdown(); <-ended })
		}
	}
}

// dial connects from the client's pod.
func (w *world) dial(network string, to netip.AddrPort) (c net.Conn, err error) {
	err = inside(w.client.ns, func() error {
		d := net.Dialer{Timeout: 2 * time.Second}
		c, err = d.Dial(network, to.String())
		return err
	})
	return c, err
}

// exchange asks from the client's pod.
func (w *world) exchange(network string, to netip.Addr, m *mdns.Msg) (*mdns.Msg, error) {
	w.Helper()
	c, err := w.dial(network, netip.AddrPortFrom(to, 53))
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	client := mdns.Client{Net: network, Timeout: 3 * time.Second}
	got, _, err := client.ExchangeWithConn(m, &mdns.Conn{Conn: c, UDPSize: 4096})
	return got, err
}

func (w *world) ask(network string, to netip.Addr, name string, kind uint16) *mdns.Msg {
	w.Helper()
	got, err := w.exchange(network, to, new(mdns.Msg).SetQuestion(name, kind))
	if err != nil {
		w.drops()
		w.Fatalf("%s %s by %s from %v: %v", name, mdns.Type(kind), network, to, err)
	}
	return got
}

func allow(pattern string) []*agentv1.DNSFilter {
	return []*agentv1.DNSFilter{{Slot: slot, Rules: []*policyv1.DNSRule{
		{Rule: &policyv1.PolicyRule{Namespace: "default", Name: "dns", List: "egress"}, MatchPattern: pattern},
	}}}
}

func toNames(port uint32, patterns ...string) []*agentv1.DNSPolicy {
	p := &agentv1.DNSPolicy{Policy: policyNumber}
	for _, x := range patterns {
		p.Names = append(p.Names, &agentv1.DNSName{MatchPattern: x, Ranges: []*agentv1.DNSRange{{Protocol: protoTCP, First: port, Last: port, Rule: 2}}})
	}
	return []*agentv1.DNSPolicy{p}
}

func TestQueriesPassByTheirRules(t *testing.T) {
	w := newWorld(t)
	z := &zone{records: map[string][]string{
		"web.example.": {"web.example. 60 IN A 172.30.0.81", "web.example. 60 IN AAAA fd30::81"}, "secret.org.": {"secret.org. 60 IN A 172.30.0.82"},
	}}
	w.zone(w.server, z)
	w.zone(w.outside, z)
	w.agent.set(allow("*.example"), nil)
	for _, h := range []*host{w.server, w.outside} {
		for _, v6 := range []bool{false, true} {
			for _, network := range []string{"udp", "tcp"} {
				to := h.addr(v6)
				t.Run(fmt.Sprintf("%s %v", network, to), func(t *testing.T) {
					got := w.ask(network, to, "wEb.eXample.", mdns.TypeA)
					if len(got.Answer) != 1 || got.Question[0].Name != "wEb.eXample." {
						t.Errorf("answer %v", got)
					}
					if got := w.ask(network, to, "none.example.", mdns.TypeTXT); got.Rcode != mdns.RcodeNameError {
						t.Errorf("answer %v", got)
					}
					before := z.queries.Load()
					if got := w.ask(network, to, "secret.org.", mdns.TypeA); got.Rcode != mdns.RcodeRefused || len(got.Answer) != 0 {
						t.Errorf("answer %v", got)
					}
					if z.queries.Load() != before {
						t.Error("a refused query reached the server")
					}
					records := w.agent.take(5)
					checkRecords(t, records, network, w.client.addr(v6), to)
				})
			}
		}
	}
}

func checkRecords(t *testing.T, records []*agentv1.DNSRecord, network string, client, server netip.Addr) {
	t.Helper()
	proto := map[string]uint32{"udp": protoUDP, "tcp": protoTCP}[network]
	var got []string
	for _, r := range records {
		c, err := netip.ParseAddrPort(r.GetClient())
		if err != nil || c.Addr() != client || r.GetServer() != netip.AddrPortFrom(server, 53).String() || r.GetProtocol() != proto || r.GetSlot() != slot {
			t.Errorf("record %v", r)
		}
		if r.GetResponse() != (r.GetLatencyNs() > 0) || r.GetDenied() == (len(r.GetRules()) > 0) {
			t.Errorf("record %v", r)
		}
		got = append(got, fmt.Sprint(r.GetQuery(), r.GetQtypes(), r.GetResponse(), r.GetDenied(), r.GetRcode(), r.GetAddresses(), r.GetRrtypes(), r.GetTtl()))
	}
	want := []string{
		"web.example.[A] false false 0 [] [] 0", "web.example.[A] true false 0 [172.30.0.81] [A] 60", "none.example.[TXT] false false 0 [] [] 0",
		"none.example.[TXT] true false 3 [] [] 0", "secret.org.[A] false true 0 [] [] 0",
	}
	if !slices.Equal(got, want) {
		t.Errorf("records\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// The first query after a change of rows is judged by the new ones, though what the old ones said is remembered.
func TestRowsChange(t *testing.T) {
	w := newWorld(t)
	w.zone(w.server, &zone{records: web("web.example.", 600)})
	const other = slot + 1
	w.do(w.Slots().Set(other, dnsPort))
	filters := allow("*.example")
	w.agent.set(append(filters, &agentv1.DNSFilter{Slot: other, Rules: []*policyv1.DNSRule{{MatchPattern: "*.org"}}}), nil)
	for i := range 20 {
		by, want := uint16(slot), mdns.RcodeSuccess
		if i%2 > 0 {
			by, want = other, mdns.RcodeRefused
		}
		row := []datapath.PolicyRange{{Proto: protoUDP, First: 53, Last: 53, Verdict: datapath.PolicyRedirect, Slot: by, Rule: 1}}
		w.do(w.Policies().SetPeer(policyNumber, 0, row), w.Policies().Bump())
		for range 2 {
			if got := w.ask("udp", w.server.v4, "web.example.", mdns.TypeA); got.Rcode != want {
				t.Fatalf("round %d: answer %v", i, got)
			}
		}
	}
}
