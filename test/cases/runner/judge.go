// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/test/cases/format"
	"github.com/weirmesh/weir/test/cases/live"
	"github.com/weirmesh/weir/test/cases/probe"
)

const (
	// tryLimit is how long a packet may take to arrive, or the flow of its drop to be told.
	tryLimit = 8 * time.Second
	// flowLimit is how long after a packet arrived its flows are waited for: a drop of an earlier one would be among them.
	flowLimit = 3 * time.Second
	// refusedRetry is how long after a refusal a service is tried again.
	refusedRetry = 100 * time.Millisecond
)

// try plays one expectation.
func (g *game) try(ctx context.Context, a *attempt) Outcome {
	o := Outcome{What: describe(a.index, a.e), Want: a.e.Verdict, Reason: a.e.Reason, How: Live}
	g.onConnection(ctx, a, &o, func(m *made) error { return g.send(ctx, a, m, &o) })
	return o
}

// onConnection calls play with the attempt's connection: the one that lives already, or one of its own. What could not be played is an outcome, too.
func (g *game) onConnection(ctx context.Context, a *attempt, o *Outcome, play func(*made) error) {
	m, err := a.made, a.failed
	if a.on == nil {
		if m, err = g.connection(ctx, a.e.Flow); err == nil {
			defer m.connection.Close()
		}
	}
	if err == nil {
		o.How = m.how
		err = play(m)
	}
	if err != nil {
		o.Class, o.Got, o.Detail = NotRun, "not runnable", err.Error()
	}
}

// send sends the expectation's message, and judges what becomes of it.
func (g *game) send(ctx context.Context, a *attempt, m *made, o *Outcome) error {
	related := a.e.RelatedTo.Kind != 0
	reply := a.e.ReplyOf.Kind != 0
	// The message's tuples are known only when it is sent, its flows come later: what was there before is no news.
	before := g.flows.Mark(append(m.connection.Tuples(), m.behind...))
	var message *probe.Message
	var err error
	switch {
	case related:
		message, err = g.related(ctx, a, m)
		if err == nil {
			before = live.Mark{}
		}
	case reply:
		message, err = m.connection.Reply()
	default:
		message, err = m.connection.Forward()
		// Sockets refuse a service at once while no node has heard of its backends, which come on their own way.
		for refused := time.Now().Add(tryLimit); m.service && errors.Is(err, unix.ECONNREFUSED) && time.Now().Before(refused) && ctx.Err() == nil; {
			time.Sleep(refusedRetry)
			message, err = m.connection.Again()
		}
	}
	if err != nil {
		return err
	}
	for _, t := range message.Tuples {
		if _, ok := before[t]; !ok {
			before[t] = 0
		}
	}
	seen := g.observe(ctx, message, before, m.managed && !related, a.e)
	judge(o, a.e, seen)
	return nil
}

// related sends an ICMP error about a connection.
func (g *game) related(ctx context.Context, a *attempt, m *made) (*probe.Message, error) {
	from, err := format.ParseEnd(a.e.From)
	if err != nil {
		return nil, err
	}
	to, err := format.ParseEnd(a.e.To)
	if err != nil {
		return nil, err
	}
	sender, err := g.places.find(ctx, from, g.c.Nodes[0].Name)
	if err != nil {
		return nil, err
	}
	v4 := m.source.Is4()
	addr := ofFamily(sender.addrs, v4)
	target := probe.Far{Place: m.from.at, Addr: netip.AddrPortFrom(m.source, 0)}
	if receiver, err := g.places.find(ctx, to, g.c.Nodes[0].Name); err == nil && !slices.Contains(receiver.addrs, m.source) {
		target = probe.Far{Place: receiver.at, Addr: netip.AddrPortFrom(ofFamily(receiver.addrs, v4), 0)}
	}
	kind, code := byte(3), byte(1)
	if !v4 {
		kind, code = 1, 3
	}
	if a.e.ICMP != nil {
		kind, code = byte(a.e.ICMP.Type), byte(a.e.ICMP.Code)
	}
	return m.connection.Related(sender.from, addr, target, kind, code)
}

// seen is what was observed of a message.
type seen struct {
	arrived, answered bool
	drops, flows      []*flowpb.Flow
}

// observe waits until it is clear what became of a message.
func (g *game) observe(ctx context.Context, m *probe.Message, since live.Mark, flows bool, e *format.Expectation) seen {
	limit := time.NewTimer(tryLimit)
	defer limit.Stop()
	var enough <-chan time.Time
	for {
		mail, told := g.net.Changed(), g.flows.Changed()
		s := seen{arrived: m.Arrived(), answered: !m.WantsAnswer || m.Answered(), flows: g.flows.Since(since)}
		s.drops = dropped(s.flows)
		switch {
		case len(s.drops) > 0:
			return s
		case s.arrived && s.answered:
			if !flows || len(s.flows) > 0 && toldAsWanted(e, s.flows) {
				return s
			}
			if enough == nil {
				enough = time.After(flowLimit)
			}
		}
		select {
		case <-ctx.Done():
			return s
		case <-limit.C:
			return s
		case <-enough:
			return s
		case <-mail:
		case <-told:
		}
	}
}

func dropped(flows []*flowpb.Flow) []*flowpb.Flow {
	return slices.DeleteFunc(slices.Clone(flows), func(f *flowpb.Flow) bool { return f.Verdict != flowpb.Verdict_DROPPED })
}

// toldAsWanted reports whether flows say what the case wants them to.
func toldAsWanted(e *format.Expectation, flows []*flowpb.Flow) bool {
	if want := strings.ToUpper(e.FlowVerdict); want != "" && !slices.ContainsFunc(flows, func(f *flowpb.Flow) bool { return f.Verdict.String() == want }) {
		return false
	}
	for _, text := range e.FlowPolicyLog {
		if !slices.ContainsFunc(flows, func(f *flowpb.Flow) bool { return slices.Contains(f.PolicyLog, text) }) {
			return false
		}
	}
	return true
}

// Drop reasons of policy.
const (
	policyDenied   = flowpb.DropReason_POLICY_DENIED
	policyDenyList = flowpb.DropReason_POLICY_DENY
)

// judge compares what was seen with what is expected.
func judge(o *Outcome, e *format.Expectation, s seen) {
	o.Detail = tell(s)
	byPolicy := slices.ContainsFunc(s.drops, func(f *flowpb.Flow) bool {
		return f.DropReasonDesc == policyDenied || f.DropReasonDesc == policyDenyList
	})
	switch {
	case s.arrived && s.answered && len(s.drops) == 0:
		o.Got = format.Allow
	case !s.arrived && byPolicy:
		o.Got = format.Deny
	case s.arrived:
		o.Got = "arrived, but not whole"
	case len(s.drops) > 0:
		o.Got = "dropped, but not by policy"
	default:
		o.Got = "lost without a word"
	}
	want := e.Verdict
	switch {
	case want == format.Redirect && e.L7 == format.Allow && e.OrAllow, want == format.AuthRequired && e.Authenticated:
		want = format.Allow
	}
	switch {
	case o.Got == want:
		o.Class = Passed
	case s.arrived && (want == format.Deny || want == format.AuthRequired || want == format.Redirect && e.L7 == format.Deny):
		o.Class = WrongAllow
		return
	case want == format.Allow || want == format.Redirect:
		o.Class = WrongDeny
		return
	default:
		o.Class = Wrong
		return
	}
	if e.Direction != "" && o.Got == format.Deny && !slices.ContainsFunc(s.drops, func(f *flowpb.Flow) bool { return strings.EqualFold(f.TrafficDirection.String(), e.Direction) }) {
		o.Class, o.Got = Wrong, "deny at the other end"
		return
	}
	if !toldAsWanted(e, s.flows) {
		o.Class, o.Got = Wrong, fmt.Sprintf("%s, but flows do not say verdict %q, log %q", o.Got, e.FlowVerdict, []string(e.FlowPolicyLog))
	}
}

// tell says in words what was seen.
func tell(s seen) string {
	text := "did not arrive"
	if s.arrived {
		text = "arrived"
		if !s.answered {
			text += ", no answer came back"
		}
	}
	var told []string
	for _, f := range s.flows {
		line := strings.ToLower(f.Verdict.String())
		if f.Verdict == flowpb.Verdict_DROPPED {
			line += " " + f.DropReasonDesc.String()
		}
		line += " at " + strings.ToLower(f.TrafficDirection.String())
		if by := deciders(f); by != "" {
			line += " by " + by
		}
		if !slices.Contains(told, line) {
			told = append(told, line)
		}
	}
	if len(told) == 0 {
		return text + "; no flow"
	}
	return text + "; flows: " + strings.Join(told, "; ")
}

func deciders(f *flowpb.Flow) string {
	var names []string
	for _, list := range [][]*flowpb.Policy{f.EgressAllowedBy, f.IngressAllowedBy, f.EgressDeniedBy, f.IngressDeniedBy} {
		for _, p := range list {
			names = append(names, strings.TrimPrefix(p.Namespace+"/"+p.Name, "/"))
		}
	}
	return strings.Join(names, ", ")
}
