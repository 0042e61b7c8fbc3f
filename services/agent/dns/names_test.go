// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// echo serves TCP on a host outside.
func (w *world) echo(addr netip.AddrPort) {
	w.Helper()
	var l net.Listener
	w.do(inside(w.outside.ns, func() (err error) {
		l, err = net.Listen("tcp", addr.String())
		return err
	}))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c) // until the client closes
				_ = c.Close()
			}()
		}
	}()
	w.Cleanup(func() { _ = l.Close(); <-ended })
}

// alive fails the test if a connection does not carry a byte there and back.
func (w *world) alive(c net.Conn, what string) {
	w.Helper()
	w.do(c.SetDeadline(time.Now().Add(5 * time.Second)))
	_, err := c.Write([]byte{1})
	if err == nil {
		_, err = io.ReadFull(c, make([]byte, 1))
	}
	if err != nil {
		w.Fatalf("%s: %v", what, err)
	}
}

// denied fails the test unless the kernel drops a connection's first packet by policy.
func (w *world) denied(to netip.AddrPort) {
	w.Helper()
	w.Rings().Drain(1<<20, func(int, *datapath.Record, uint64) {})
	w.do(w.Rings().Commit(w.Rings().Positions()))
	fd, err := openSYN(w.client, to)
	w.do(err)
	defer func() { _ = syscall.Close(fd) }()
	w.until(fmt.Sprintf("a connection to %v is dropped", to), func() bool {
		dropped := false
		w.Rings().Drain(1<<20, func(_ int, r *datapath.Record, _ uint64) {
			dropped = dropped || r != nil && r.Type == datapath.RecordDrop && r.DstAddr() == to.Addr() && r.Dport == to.Port()
		})
		w.do(w.Rings().Commit(w.Rings().Positions()))
		return dropped
	})
}

// openSYN begins a connection and does not wait for it.
func openSYN(h *host, to netip.AddrPort) (fd int, err error) {
	err = inside(h.ns, func() error {
		var sa syscall.Sockaddr = &syscall.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
		family := syscall.AF_INET6
		if to.Addr().Is4() {
			family, sa = syscall.AF_INET, &syscall.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
		}
		if fd, err = syscall.Socket(family, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := syscall.Connect(fd, sa); err != nil && err != syscall.EINPROGRESS {
			return err
		}
		return nil
	})
	return fd, err
}

// addresses is what the kernel has names of.
func (w *world) addresses() map[netip.Addr]uint32 {
	w.Helper()
	names, err := datapath.OpenNames(w.pin)
	w.do(err)
	out, err := names.Addresses()
	w.do(err, names.Close())
	return out
}

// web is a name with the addresses of the outside host.
func web(name string, ttl int) map[string][]string {
	return map[string][]string{name: {fmt.Sprintf("%s %d IN A 172.30.0.81", name, ttl), fmt.Sprintf("%s %d IN AAAA fd30::81", name, ttl)}}
}

var targets = map[uint16]netip.AddrPort{
	mdns.TypeA: netip.MustParseAddrPort("172.30.0.81:8080"), mdns.TypeAAAA: netip.MustParseAddrPort("[fd30::81]:8080"),
}

func TestAnswerOpensItsAddress(t *testing.T) {
	w := newWorld(t)
	z := &zone{records: web("web.example.", 1)}
	z.records["alias.example."] = []string{"alias.example. 1 IN CNAME web.elsewhere.", "web.elsewhere. 1 IN A 172.30.0.81", "web.elsewhere. 1 IN AAAA fd30::81"}
	z.records["web.org."] = []string{"web.org. 60 IN A 172.30.0.81"}
	w.zone(w.server, z)
	w.agent.set(allow("*"), toNames(8080, "*.example"))
	for kind, to := range targets {
		w.echo(to)
		for _, name := range []string{"web.example.", "alias.example."} {
			w.denied(to)
			// The first packet after the answer passes: dial has no retry but SYN's, a second later.
			w.ask("udp", w.server.v4, name, kind)
			began := time.Now()
			c, err := w.dial("tcp", to)
			if err != nil {
				w.drops()
				t.Fatal(err)
			}
			if took := time.Since(began); took > 900*time.Millisecond {
				t.Errorf("the first packet was dropped: connected after %v", took)
			}
			w.alive(c, "connected")
			// Its time is over, and it stays for its connection.
			w.until("its connection alone keeps it", func() bool { return strings.Contains(w.details()["names"], " 1 kept by live") })
			if _, ok := w.addresses()[to.Addr()]; !ok {
				t.Errorf("%v is gone under a live connection", to)
			}
			w.alive(c, "after the answer's time")
			w.do(c.Close())
			w.until("the address is gone", func() bool { return len(w.addresses()) == 0 })
		}
	}
	// Another name of that server, which no policy selects, opens nothing.
	w.ask("udp", w.server.v4, "web.org.", mdns.TypeA)
	w.denied(targets[mdns.TypeA])
}

func TestRulesAndPoliciesChange(t *testing.T) {
	w := newWorld(t)
	w.zone(w.server, &zone{records: web("web.example.", 600)})
	to := targets[mdns.TypeA]
	w.echo(to)
	w.agent.set(allow("*.example"), nil)
	w.ask("udp", w.server.v4, "web.example.", mdns.TypeA)
	w.denied(to)
	// A policy that comes later knows what was learnt before.
	w.agent.set(allow("*.example"), toNames(8080, "web.*"))
	c, err := w.dial("tcp", to)
	w.do(err, c.Close())
	// It loses the name; the next query is refused.
	w.agent.set(allow("*.org"), nil)
	w.denied(to)
	if got := w.ask("udp", w.server.v4, "web.example.", mdns.TypeA); got.Rcode != mdns.RcodeRefused {
		t.Errorf("answer %v", got)
	}
	// Visibility lets all pass.
	w.agent.set([]*agentv1.DNSFilter{{Slot: slot, Visibility: true}}, nil)
	if got := w.ask("tcp", w.server.v6, "web.example.", mdns.TypeA); len(got.Answer) != 1 {
		t.Errorf("answer %v", got)
	}
	// A rule without name accepts all; no filter refuses all.
	w.agent.set([]*agentv1.DNSFilter{{Slot: slot, Rules: []*policyv1.DNSRule{{}}}}, nil)
	if got := w.ask("udp", w.server.v4, "web.example.", mdns.TypeA); len(got.Answer) != 1 {
		t.Errorf("answer %v", got)
	}
	w.agent.set(nil, nil)
	if got := w.ask("udp", w.server.v4, "web.example.", mdns.TypeA); got.Rcode != mdns.RcodeRefused {
		t.Errorf("answer %v", got)
	}
}

func TestKilledAndAgentAway(t *testing.T) {
	w := newWorld(t)
	z := &zone{records: web("web.example.", 600)}
	z.records["new.example."] = []string{"new.example. 600 IN AAAA fd30::81"}
	w.zone(w.server, z)
	to, newTo := targets[mdns.TypeA], targets[mdns.TypeAAAA]
	w.echo(to)
	w.echo(newTo)
	w.agent.set(allow("*.example"), toNames(8080, "*.example"))
	w.ask("udp", w.server.v4, "web.example.", mdns.TypeA)
	c, err := w.dial("tcp", to)
	w.do(err)
	w.until("rules are on disk", func() bool {
		b, err := os.ReadFile(filepath.Join(w.dir, "state", "rules"))
		return err == nil && bytes.Contains(b, []byte("*.example"))
	})

	w.stop(w.dns, syscall.SIGKILL)
	w.alive(c, "weir-dns is dead: a live connection")
	again, err := w.dial("tcp", to)
	w.do(err, again.Close())
	if got, err := w.exchange("tcp", w.server.v4, new(mdns.Msg).SetQuestion("web.example.", mdns.TypeA)); err == nil {
		t.Errorf("weir-dns is dead, and there is an answer: %v", got)
	}

	// It comes back while the agent is away: rules and names are on disk.
	w.agent.stop()
	w.dns = w.start()
	w.alive(c, "weir-dns is back: a live connection")
	if again, err = w.dial("tcp", to); err != nil {
		t.Fatalf("a known name after the restart: %v", err)
	}
	w.do(again.Close())
	w.denied(newTo)
	w.ask("udp", w.server.v4, "new.example.", mdns.TypeAAAA)
	if again, err = w.dial("tcp", newTo); err != nil {
		t.Fatalf("a new name while the agent is away: %v", err)
	}
	w.do(again.Close())
	if got := w.ask("udp", w.server.v4, "secret.org.", mdns.TypeA); got.Rcode != mdns.RcodeRefused {
		t.Errorf("answer %v", got)
	}

	// The agent gets what it missed.
	w.agent.take(0)
	w.agent.serve()
	records := w.agent.take(3)
	if len(records) != 3 || records[2].GetQuery() != "secret.org." || !records[2].GetDenied() {
		t.Errorf("records %v", records)
	}
	w.stop(w.dns, syscall.SIGTERM)
	if _, ok := w.addresses()[to.Addr()]; !ok {
		t.Error("a graceful end took the names away")
	}
}

// The datapath is removed and loaded anew under a running weir-dns: it goes on with the new maps, which get the names that it knows.
func TestMapsReplaced(t *testing.T) {
	w := newWorld(t)
	z := &zone{records: web("web.example.", 600)}
	z.records["new.example."] = []string{"new.example. 600 IN AAAA fd30::81"}
	w.zone(w.server, z)
	known, fresh := targets[mdns.TypeA], targets[mdns.TypeAAAA]
	w.echo(known)
	w.echo(fresh)
	w.agent.set(allow("*.example"), toNames(8080, "*.example"))
	w.ask("udp", w.server.v4, "web.example.", mdns.TypeA)

	w.reload()
	w.until("the new maps have the name", func() bool { _, ok := w.addresses()[known.Addr()]; return ok })
	c, err := w.dial("tcp", known)
	w.do(err, c.Close())
	w.denied(fresh)
	w.until("a query is answered", func() bool {
		m, err := w.exchange("udp", w.server.v4, new(mdns.Msg).SetQuestion("new.example.", mdns.TypeAAAA))
		return err == nil && m.Rcode == mdns.RcodeSuccess
	})
	c, err = w.dial("tcp", fresh)
	w.do(err, c.Close())
	w.stop(w.dns, syscall.SIGTERM)
}
