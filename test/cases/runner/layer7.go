// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"context"
	"errors"
	"fmt"
	"io"
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

// editLimit is how long after an edit in place was in force in the kernel a proxy may still judge as before: it is told on its own way.
const editLimit = 2 * time.Second

// tryEdited plays an expectation that asks something on its connection; again, if a policy was edited in place just now.
func (g *game) tryEdited(ctx context.Context, a *attempt) Outcome {
	until := time.Now().Add(editLimit)
	for {
		o := g.tryLayer7(ctx, a)
		if o.Class == Passed || !g.edited || time.Now().After(until) || ctx.Err() != nil {
			return o
		}
		time.Sleep(refusedRetry)
	}
}

// tryLayer7 plays an expectation that asks something on its connection.
func (g *game) tryLayer7(ctx context.Context, a *attempt) Outcome {
	o := Outcome{What: describe(a.index, a.e) + askedWords(a.e), Want: wantLayer7(a.e), Reason: a.e.Reason, How: Live}
	g.onConnection(ctx, a, &o, func(m *made) error { return g.ask(ctx, a, m, &o) })
	return o
}

// ask makes the expectation's request, and judges what becomes of it.
func (g *game) ask(ctx context.Context, a *attempt, m *made, o *Outcome) error {
	http, dns, tls, err := a.e.Request()
	if err != nil {
		return err
	}
	tuples := append(m.connection.Tuples(), m.behind...)
	if a.e.Direction != "" {
		for _, t := range m.connection.Tuples() {
			t.Src = netip.AddrPortFrom(t.Src.Addr(), 0) // a proxy of the client's side goes on from another port
			tuples = append(tuples, t)
		}
	}
	before := g.flows.Mark(tuples)
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
		return err
	}
	g.awaitTold(ctx, a.e, m, before, &seen)
	judgeLayer7(o, a.e, &seen)
	return nil
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
	q := requestOf(http, tls)
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

// requestOf is what is sent.
func requestOf(http *format.HTTP, tls *format.TLS) probe.Request {
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
	return q
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
	kind, err := queryType(q.Type)
	if err != nil {
		return asked{}, err
	}
	limited, cancel := g.untilDropped(ctx, before)
	defer cancel()
	l := m.connection.Resolve(limited, probe.Query{Name: q.Query, Type: kind})
	seen := asked{flows: g.flows.Since(before)}
	seen.arrived = l.Answered && l.RCode == dnsmessage.RCodeSuccess && l.Arrived
	seen.proxied = seen.arrived && l.Source.Port() != m.connection.Local().Port()
	seen.drops = dropsByPolicy(seen.flows)
	cut := errors.Is(l.Err, unix.ECONNRESET) || errors.Is(l.Err, io.EOF)
	seen.refused = l.Answered && l.RCode != dnsmessage.RCodeSuccess || cut && len(seen.drops) == 0
	if l.Answered {
		seen.status = rcodeWords(l.RCode)
	}
	seen.detail = fmt.Sprintf("answered %t %s, arrived %t (from %s), error %v", l.Answered, seen.status, l.Arrived, l.Source, l.Err)
	return seen, nil
}

// queryTypes are those that have names here; others are written TYPE65.
var queryTypes = map[string]dnsmessage.Type{
	"": dnsmessage.TypeA, "A": dnsmessage.TypeA, "AAAA": dnsmessage.TypeAAAA, "NS": dnsmessage.TypeNS, "CNAME": dnsmessage.TypeCNAME, "SOA": dnsmessage.TypeSOA,
	"PTR": dnsmessage.TypePTR, "MX": dnsmessage.TypeMX, "TXT": dnsmessage.TypeTXT, "SRV": dnsmessage.TypeSRV, "ANY": dnsmessage.TypeALL,
	"NAPTR": 35, "DS": 43, "DNSKEY": 48, "SVCB": 64, "HTTPS": 65, "CAA": 257,
}

func queryType(text string) (dnsmessage.Type, error) {
	text = strings.ToUpper(text)
	if t, ok := queryTypes[text]; ok {
		return t, nil
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(text, "TYPE"), 10, 16)
	if err != nil {
		return 0, fmt.Errorf("dns.type: %q is not known", text)
	}
	return dnsmessage.Type(n), nil
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
		told := !m.managed || (len(seen.flows) > 0 && toldAsWanted(e, seen.flows) && decidedAt(e, seen.flows))
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
	if !decidedAt(e, s.flows) {
		wrong("flows do not say that it was denied at %s", e.Direction)
	}
	if !toldAsWanted(e, s.flows) {
		wrong("flows do not say verdict %q, log %q", e.FlowVerdict, []string(e.FlowPolicyLog))
	}
}

// decidedAt reports whether flows say that a denial was the decision of the end that a case names, if it names one.
func decidedAt(e *format.Expectation, flows []*flowpb.Flow) bool {
	if e.Direction == "" || e.Verdict != format.Deny && e.L7 != format.Deny {
		return true
	}
	return slices.ContainsFunc(flows, func(f *flowpb.Flow) bool {
		return f.Verdict == flowpb.Verdict_DROPPED && strings.EqualFold(f.TrafficDirection.String(), e.Direction)
	})
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

// openLayer7 opens the connection of an expectation about a live one, and makes a first request on it: what is asked later is not the first.
func (g *game) openLayer7(ctx context.Context, a *attempt) error {
	http, dns, tls, err := a.e.Request()
	if err != nil {
		return err
	}
	before := g.flows.Mark(a.made.connection.Tuples())
	ctx, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	if dns != nil {
		limited, stop := g.untilDropped(ctx, before)
		defer stop()
		l := a.made.connection.Resolve(limited, probe.Query{Name: dns.Query, Type: dnsmessage.TypeA})
		if !l.Answered {
			return fmt.Errorf("the first query: %w", l.Err)
		}
		return nil
	}
	conn, err := g.connect(ctx, a.made, before)
	if err != nil {
		return fmt.Errorf("the connection did not open: %w", err)
	}
	if tls != nil {
		if conn, err = probe.Secure(ctx, conn, tls.SNI); err != nil {
			return err
		}
	} else if http != nil {
		limited, stop := g.untilDropped(ctx, before)
		x := a.made.connection.Ask(limited, conn, requestOf(http, tls))
		stop()
		if x.Status == 0 {
			return fmt.Errorf("the first request: %w", x.Err)
		}
	}
	a.open = conn
	return nil
}
