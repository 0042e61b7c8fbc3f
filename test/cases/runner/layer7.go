// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/test/cases/format"
	"github.com/weirmesh/weir/test/cases/live"
	"github.com/weirmesh/weir/test/cases/probe"
)

// askLimit is how long a request may take; a connection that policy drops is given up earlier, by its flow.
const askLimit = 8 * time.Second

// asked is what was observed of a request, whatever its protocol.
type asked struct {
	// arrived at the server, through a proxy or not.
	arrived, proxied bool
	// answered by somebody else than the server: a refusal.
	refused bool
	drops   []*flowpb.Flow
	flows   []*flowpb.Flow
	status  string
	body    string
	headers map[string][]string
	detail  string
}

// tryLayer7 plays an expectation that asks something on its connection.
func (g *game) tryLayer7(ctx context.Context, a *attempt) Outcome {
	o := Outcome{What: describe(a.index, a.e) + askedWords(a.e), Want: wantLayer7(a.e), Reason: a.e.Reason, How: Live}
	fail := func(err error) Outcome {
		o.Class, o.Got, o.Detail = NotRun, "not runnable", err.Error()
		return o
	}
	m := a.made
	if a.on == nil {
		var err error
		if m, err = g.connection(ctx, a.e.Flow); err != nil {
			return fail(err)
		}
		defer m.connection.Close()
	} else if a.failed != nil {
		return fail(a.failed)
	}
	http, dns, tls, err := a.e.Request()
	if err != nil {
		return fail(err)
	}
	before := g.flows.Mark(append(m.connection.Tuples(), m.behind...))
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	var seen asked
	switch {
	case dns != nil || http == nil && tls == nil && a.e.Port == dnsPort:
		if dns == nil {
			dns = &format.DNS{Query: "weir-cases.example"}
		}
		seen, err = g.askDNS(ctx, m, dns, before)
	default:
		seen, err = g.askHTTP(ctx, a, m, http, tls, before)
	}
	if err != nil {
		return fail(err)
	}
	g.awaitTold(ctx, a.e, m, before, &seen)
	judgeLayer7(&o, a.e, &seen)
	return o
}

const dnsPort = 53

func askedWords(e *format.Expectation) string {
	http, dns, tls, err := e.Request()
	switch {
	case err != nil:
		return ""
	case http != nil:
		text := " " + http.Method + " " + http.Path
		if http.Host != "" {
			text += " of " + http.Host
		}
		if len(http.Headers) > 0 {
			text += fmt.Sprintf(" %q", http.Headers)
		}
		return text
	case dns != nil:
		return " " + dns.Query + " " + dns.Type
	case tls != nil:
		return fmt.Sprintf(" SNI %q", tls.SNI)
	}
	return ""
}

func wantLayer7(e *format.Expectation) string {
	if e.Verdict == format.Redirect && e.L7 != "" {
		return e.Verdict + ", " + e.L7
	}
	return e.Verdict
}

// untilDropped ends a context when a flow says that policy dropped the connection.
func (g *game) untilDropped(ctx context.Context, since live.Mark) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		for {
			changed := g.flows.Changed()
			if len(dropsByPolicy(g.flows.Since(since))) > 0 {
				cancel()
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
		}
	}()
	return ctx, cancel
}

func dropsByPolicy(flows []*flowpb.Flow) []*flowpb.Flow {
	return slices.DeleteFunc(slices.Clone(flows), func(f *flowpb.Flow) bool {
		return f.GetL7() != nil || f.Verdict != flowpb.Verdict_DROPPED || f.DropReasonDesc != policyDenied && f.DropReasonDesc != policyDenyList
	})
}

func (g *game) askHTTP(ctx context.Context, a *attempt, m *made, http *format.HTTP, tls *format.TLS, before live.Mark) (asked, error) {
	conn := a.open
	if conn == nil {
		var err error
		conn, err = g.connect(ctx, m, before)
		if err != nil {
			seen := asked{flows: g.flows.Since(before), detail: "not connected: " + err.Error()}
			seen.drops = dropsByPolicy(seen.flows)
			return seen, nil
		}
	}
	if http == nil {
		http = &format.HTTP{Method: "GET", Path: "/"}
	}
	q := probe.Request{Method: http.Method, Target: http.Path, Host: http.Host, Headers: http.Headers}
	if q.Host == "" {
		q.Host = "weir-cases.example"
	}
	if tls != nil {
		q.TLS, q.ServerName = true, tls.SNI
	}
	limited, cancel := g.untilDropped(ctx, before)
	defer cancel()
	stop := context.AfterFunc(limited, func() { _ = conn.SetDeadline(time.Now()) }) // ends what waits
	x := m.connection.Ask(ctx, conn, q)
	stop()
	seen := asked{arrived: x.Arrived, flows: g.flows.Since(before), body: x.Body, headers: x.Header}
	seen.proxied = x.Arrived && x.Source.Port() != m.connection.Local().Port()
	seen.drops = dropsByPolicy(seen.flows)
	seen.refused = !x.Arrived && (x.Status != 0 || x.Err != nil && len(seen.drops) == 0 && isEnd(x.Err))
	if x.Status != 0 {
		seen.status = strconv.Itoa(x.Status)
	}
	seen.detail = fmt.Sprintf("arrived %t (from %s), status %q, error %v", x.Arrived, x.Source, seen.status, x.Err)
	return seen, nil
}

// isEnd reports whether the other side ended the connection, rather than saying nothing.
func isEnd(err error) bool {
	var timeout net.Error
	return !errors.As(err, &timeout) || !timeout.Timeout()
}

// connect opens a connection; a service whose backends no node has heard of yet is tried again.
func (g *game) connect(ctx context.Context, m *made, before live.Mark) (net.Conn, error) {
	for refused := time.Now().Add(tryLimit); ; {
		limited, cancel := g.untilDropped(ctx, before)
		conn, err := m.connection.Connect(limited)
		cancel()
		if err == nil || !m.service || !errors.Is(err, unix.ECONNREFUSED) || time.Now().After(refused) || ctx.Err() != nil {
			return conn, err
		}
		time.Sleep(refusedRetry)
	}
}

func (g *game) askDNS(ctx context.Context, m *made, q *format.DNS, before live.Mark) (asked, error) {
	kind := dnsmessage.TypeA
	switch strings.ToUpper(q.Type) {
	case "", "A":
	case "AAAA":
		kind = dnsmessage.TypeAAAA
	case "MX":
		kind = dnsmessage.TypeMX
	case "TXT":
		kind = dnsmessage.TypeTXT
	case "SRV":
		kind = dnsmessage.TypeSRV
	case "PTR":
		kind = dnsmessage.TypePTR
	case "ANY":
		kind = dnsmessage.TypeALL
	default:
		return asked{}, fmt.Errorf("dns.type: %q is not known", q.Type)
	}
	limited, cancel := g.untilDropped(ctx, before)
	defer cancel()
	l := m.connection.Resolve(limited, probe.Query{Name: q.Query, Type: kind})
	seen := asked{flows: g.flows.Since(before)}
	seen.arrived = l.Answered && l.RCode == dnsmessage.RCodeSuccess && l.Arrived
	seen.proxied = seen.arrived && l.Source.Port() != m.connection.Local().Port()
	seen.refused = l.Answered && l.RCode != dnsmessage.RCodeSuccess
	seen.drops = dropsByPolicy(seen.flows)
	if l.Answered {
		seen.status = rcodeWords(l.RCode)
	}
	seen.detail = fmt.Sprintf("answered %t %s, arrived %t (from %s), error %v", l.Answered, seen.status, l.Arrived, l.Source, l.Err)
	return seen, nil
}

func rcodeWords(r dnsmessage.RCode) string {
	switch r {
	case dnsmessage.RCodeSuccess:
		return "NOERROR"
	case dnsmessage.RCodeNameError:
		return "NXDOMAIN"
	case dnsmessage.RCodeRefused:
		return "REFUSED"
	case dnsmessage.RCodeServerFailure:
		return "SERVFAIL"
	}
	return r.String()
}

// awaitTold waits a little for the flows that the case wants, and for the drop of what neither arrived nor was refused.
func (g *game) awaitTold(ctx context.Context, e *format.Expectation, m *made, before live.Mark, seen *asked) {
	limit := time.NewTimer(flowLimit)
	defer limit.Stop()
	for {
		changed := g.flows.Changed()
		seen.flows = g.flows.Since(before)
		seen.drops = dropsByPolicy(seen.flows)
		told := !m.managed || (len(seen.flows) > 0 && toldAsWanted(e, seen.flows))
		if told && (seen.arrived || seen.refused || len(seen.drops) > 0) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-limit.C:
			return
		case <-changed:
		}
	}
}

// judgeLayer7 compares what was seen with what is expected.
func judgeLayer7(o *Outcome, e *format.Expectation, s *asked) {
	o.Detail = s.detail + "; " + tell(seen{arrived: s.arrived, answered: true, flows: s.flows})
	switch {
	case s.arrived && s.proxied:
		o.Got = "redirect, allow"
	case s.arrived:
		o.Got = format.Allow
	case s.refused:
		o.Got = "redirect, deny"
	case len(s.drops) > 0:
		o.Got = format.Deny
	default:
		o.Got = "lost without a word"
	}
	ok := o.Got == wantLayer7(e) || e.Verdict == format.Redirect && e.L7 == "" && strings.HasPrefix(o.Got, format.Redirect) ||
		e.OrAllow && o.Got == format.Allow || e.Verdict == format.AuthRequired && e.Authenticated && s.arrived
	forbidden := e.Verdict == format.Deny || e.Verdict == format.AuthRequired && !e.Authenticated || e.L7 == format.Deny
	switch {
	case !ok && s.arrived && forbidden:
		o.Class = WrongAllow
	case !ok && !s.arrived && !forbidden:
		o.Class = WrongDeny
	case !ok:
		o.Class = Wrong
	default:
		o.Class = Passed
		judgeTold(o, e, s)
	}
}

// judgeTold checks what an expectation says beside its verdict.
func judgeTold(o *Outcome, e *format.Expectation, s *asked) {
	wrong := func(format string, args ...any) {
		o.Class, o.Got = Wrong, o.Got+", but "+fmt.Sprintf(format, args...)
	}
	if want := e.WantStatus(); want != "" && s.status != want {
		wrong("status %s, want %s", s.status, want)
	}
	if want, said := e.WantBody(); said && s.body != want {
		wrong("body %q, want %q", s.body, want)
	}
	if want := e.WantRCode(); want != "" && s.status != want {
		wrong("code %s, want %s", s.status, want)
	}
	upstream, err := e.Upstream()
	if err != nil {
		wrong("%v", err)
	}
	for name, want := range upstream {
		got := s.headers[textproto.CanonicalMIMEHeaderKey(name)]
		if !slices.Equal(split(got), split(want)) {
			wrong("the server got %s: %q, want %q", name, got, want)
		}
	}
	if !toldAsWanted(e, s.flows) {
		wrong("flows do not say verdict %q, log %q", e.FlowVerdict, []string(e.FlowPolicyLog))
	}
}

// split is values one by one, however they were joined.
func split(values []string) []string {
	var all []string
	for _, v := range values {
		for part := range strings.SplitSeq(v, ",") {
			all = append(all, strings.TrimSpace(part))
		}
	}
	return all
}

// openLayer7 opens the connection of an expectation about a live one, on which a request is made later.
func (g *game) openLayer7(ctx context.Context, a *attempt) error {
	before := g.flows.Mark(a.made.connection.Tuples())
	ctx, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	conn, err := g.connect(ctx, a.made, before)
	if err != nil {
		return fmt.Errorf("the connection did not open: %w", err)
	}
	a.open = conn
	return nil
}

// nameServers are those that a client may ask: the cluster's first, then any pod, then one outside.
func (g *game) nameServers(client string) []string {
	var first, rest []string
	for i := range g.c.Pods {
		p := &g.c.Pods[i]
		name := p.Namespace + "/" + p.Name
		switch {
		case name == client || p.HostNetwork:
		case p.Labels["k8s-app"] == "kube-dns" || strings.Contains(p.Name, "dns"):
			first = append(first, name)
		default:
			rest = append(rest, name)
		}
	}
	outside := "ip:" + outsideServer.String()
	return append(append(first, outside), rest...)
}

// outsideServer is a name server that the world of a case may have.
var outsideServer = netip.MustParseAddr("198.51.100.53")

// resolveAnswers makes the queries whose answers a case says came back at a time.
func (g *game) resolveAnswers(ctx context.Context, at float64) error {
	for i := range g.c.DNSAnswers {
		d := &g.c.DNSAnswers[i]
		if d.At != at {
			continue
		}
		if err := g.resolveAnswer(ctx, d); err != nil {
			return fmt.Errorf("dns_answers[%d]: %w", i, err)
		}
	}
	return nil
}

// nameLimit is how long a query may take before another server is asked.
const nameLimit = 1500 * time.Millisecond

func (g *game) resolveAnswer(ctx context.Context, d *format.DNSAnswer) error {
	var v4, v6 []netip.Addr
	for _, text := range d.IPs {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return fmt.Errorf("ips: %w", err)
		}
		if a.Is4() {
			v4 = append(v4, a)
		} else {
			v6 = append(v6, a)
		}
	}
	kinds := []dnsmessage.Type{dnsmessage.TypeA}
	if len(v6) > 0 {
		kinds = append(kinds, dnsmessage.TypeAAAA)
	}
	for _, server := range g.nameServers(d.Client) {
		// A rule that restricts names makes them known; a server that is reached without one does not. Those that are restricted may be only one of both protocols.
		for _, protocol := range []string{format.UDP, format.TCP} {
			m, err := g.connection(ctx, format.Flow{From: d.Client, To: server, Port: dnsPort, Protocol: protocol})
			if err != nil {
				continue // of another family
			}
			done := g.resolveVia(ctx, m, d, append(v4, v6...), kinds)
			m.connection.Close()
			if done {
				return nil
			}
		}
	}
	// Nobody may be asked: then no answer can have come, and none is known.
	return nil
}

func (g *game) resolveVia(ctx context.Context, m *made, d *format.DNSAnswer, addresses []netip.Addr, kinds []dnsmessage.Type) bool {
	g.net.Answer(m.source, d.Name, addresses, uint32(d.TTL))
	before := g.flows.Mark(m.connection.Tuples())
	for _, kind := range kinds {
		limited, cancel := context.WithTimeout(ctx, nameLimit)
		limited, stop := g.untilDropped(limited, before)
		l := m.connection.Resolve(limited, probe.Query{Name: d.Name, Type: kind})
		stop()
		cancel()
		if !l.Answered || l.RCode != dnsmessage.RCodeSuccess {
			return false
		}
		m.connection.CloseRequests()
	}
	return true
}
