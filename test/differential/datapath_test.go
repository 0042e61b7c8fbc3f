// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"fmt"
	"slices"
	"testing"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/test/reference"
	"github.com/weirmesh/weir/test/reference/random"
)

// TestDatapath compares what the programs do with packets with the reference evaluator.
func TestDatapath(t *testing.T) {
	n := newNode(t)
	counts := map[string]int{}
	s := *seed
	for ; counts["packets"] < *cases; s++ {
		report(t, scenarioOf(random.New(s, 3*packetsOfWorld)), s, n.fault, counts)
	}
	t.Logf("seeds %d to %d: %v", *seed, s-1, counts)
	for _, key := range []string{
		"from_pod", "from_network", "from_host", "IPv4", "IPv6", "TCP", "UDP", "SCTP", "ICMP", "ICMPv6", "replies", "allow", "default-deny", "deny",
		"live", "cut",
	} {
		if counts[key] < counts["packets"]/100 {
			t.Errorf("%d of %d packets are %s", counts[key], counts["packets"], key)
		}
	}
}

// TestDatapathFilters: what goes through a proxy is dropped while its slot has no listener, and what is only to be seen passes.
func TestDatapathFilters(t *testing.T) {
	n := newNode(t)
	counts := map[string]int{}
	s := *seed
	for ; counts["packets"] < *cases/3; s++ {
		w := random.NewRequests(s, packetsOfWorld)
		w.Cluster.Learnt = nil // names are weir-dns's
		report(t, scenarioOf(w), s, n.fault, counts)
	}
	t.Logf("seeds %d to %d: %v", *seed, s-1, counts)
	for _, key := range []string{"redirect", "visible", "allow", "default-deny", "deny"} {
		if counts[key] <= counts["packets"]/400 {
			t.Errorf("%d of %d packets are %s", counts[key], counts["packets"], key)
		}
	}
}

// fault sends the packets of a scenario, changes its policies, and goes on with the connections that live.
func (n *node) fault(s scenario, counts map[string]int) *fault {
	c, f := compiled(s.cluster)
	if f != nil {
		return f
	}
	if len(c.conflicts) > 0 {
		return nil
	}
	l := n.load(c, 0)
	defer func() { l.unload() }()
	var live []connection
	for i, p := range s.packets {
		first := l.frameOf(p, uint16(20000+i))
		passed, f := l.try(p, first, counts)
		if f != nil {
			return f
		}
		if passed {
			live = append(live, connection{p, first})
		}
	}
	if s.next == nil {
		return nil
	}
	if c, f = compiled(s.after()); f != nil {
		return f
	}
	before := l
	l = n.load(c, 1000)
	before.replaced(l)
	for _, conn := range live {
		backwards := (conn.packet.Port+len(conn.packet.From)+len(conn.packet.To))%2 == 0
		if f := l.goOn(conn, !backwards, counts); f != nil {
			return f
		}
	}
	return nil
}

// connection that has begun.
type connection struct {
	packet reference.Packet
	first  frame
}

// linkTypes of ICMPv6 keep a link going (neighbours, routers, multicast listeners), and packet-too-big always passes: no matter of policy.
var linkTypes = []uint8{2, 130, 131, 132, 133, 134, 135, 136, 137, 143}

func (l *loaded) frameOf(p reference.Packet, sport uint16) frame {
	f := frame{
		src: l.address(l.canonical(p.From), p.V6), dst: l.address(l.canonical(p.To), p.V6), protocol: p.ProtocolNumber(), sport: sport, dport: uint16(p.Port),
	}
	if f.protocol == policy.ICMP || f.protocol == policy.ICMPv6 {
		f.dport, f.icmpType, f.icmpCode = 0, uint8(p.Port), uint8(p.Code)
	}
	return f
}

// try sends a packet, and the answer if it passes.
func (l *loaded) try(p reference.Packet, f frame, counts map[string]int) (passed bool, _ *fault) {
	from, to := l.canonical(p.From), l.canonical(p.To)
	program, ifindex := l.way(from, to)
	if program == "" || from == to || f.protocol == policy.ICMPv6 && slices.Contains(linkTypes, f.icmpType) {
		return false, nil
	}
	if f.protocol == policy.ICMP || f.protocol == policy.ICMPv6 {
		if l.sent[f.message()] {
			return false, nil // no new connection: messages without an identifier are one with their like
		}
		l.sent[f.message()] = true
	}
	code := l.run(program, ifindex, f.bytes())
	verdicts, drops := l.drain()
	want := l.judge(from, to, p)
	note := func(keys ...string) {
		for _, k := range keys {
			if counts != nil {
				counts[k]++
			}
		}
	}
	family := "IPv4"
	if p.V6 {
		family = "IPv6"
	}
	note("packets", program, family, p.Protocol, want.String())
	bad := func(format string, args ...any) (bool, *fault) {
		text := fmt.Sprintf(format, args...)
		return false, &fault{"datapath " + program + " " + text, fmt.Sprintf("%s returns %d, verdicts %v, drops %v: %s", program, code, verdicts, drops, text), p}
	}
	if want == datapath.PolicyVisible {
		want = datapath.PolicyAllow
	}
	if (code == actShot) != (want != datapath.PolicyAllow) {
		return bad("the reference says %v", want)
	}
	reason := map[datapath.PolicyVerdict]uint8{
		datapath.PolicyDefaultDeny: datapath.DropPolicy, datapath.PolicyDeny: datapath.DropPolicyDeny, datapath.PolicyRedirect: datapath.DropNoListener,
	}[want]
	if reason != 0 && !slices.Equal(drops, []uint8{reason}) {
		return bad("dropped for %v, want %d", drops, reason)
	}
	expected := l.expected(from, to, p)
	for _, e := range expected {
		if got := verdicts[e.at]; got != e.told {
			return bad("endpoint %d, direction %d: verdict and rule %v, want %v", e.at.endpoint, e.at.direction, got, e.told)
		}
	}
	if len(verdicts) != len(expected) {
		return bad("verdicts of %d sides, want %d", len(verdicts), len(expected))
	}
	if answer, ok := f.reply(); ok && want == datapath.PolicyAllow {
		program, ifindex := l.way(to, from)
		note("replies")
		if code := l.run(program, ifindex, answer.bytes()); code == actShot {
			_, drops := l.drain()
			return bad("the answer is dropped by %s: %v", program, drops)
		}
		l.drain()
	}
	return want == datapath.PolicyAllow, nil
}

// goOn sends the next packet of a connection, forwards or backwards, and another one the other way: both directions stop if the policies of now
// forbid it.
func (l *loaded) goOn(c connection, forward bool, counts map[string]int) *fault {
	from, to := l.canonical(c.packet.From), l.canonical(c.packet.To)
	want := l.judge(from, to, c.packet)
	there := c.first
	there.goesOn = true
	for range 2 {
		next, src, dst := there, from, to
		if !forward {
			var ok bool
			if next, ok = there.reply(); !ok {
				return nil
			}
			src, dst = to, from
		}
		program, ifindex := l.way(src, dst)
		code := l.run(program, ifindex, next.bytes())
		verdicts, drops := l.drain()
		if (code == actShot) != (want != datapath.PolicyAllow) {
			text := fmt.Sprintf("live connection, forward %v: %s returns %d, verdicts %v, drops %v; the reference says %v", forward, program, code, verdicts, drops, want)
			return &fault{fmt.Sprintf("live %v %v", forward, want), text, c.packet}
		}
		forward = !forward
	}
	if counts != nil {
		counts["live"]++
		if want != datapath.PolicyAllow {
			counts["cut"]++
		}
	}
	return nil
}

// judge is what the reference evaluator says of the sides that this node decides: the first that drops, or goes through a proxy.
func (l *loaded) judge(from, to string, p reference.Packet) datapath.PolicyVerdict {
	egress, ingress := l.cluster.Ask(p, reference.Request{})
	out := datapath.PolicyAllow
	for _, side := range []struct {
		subject string
		answer  reference.Answer
	}{{from, egress}, {to, ingress}} {
		switch {
		case l.endpoints[side.subject] == 0:
		case side.answer.Verdict != reference.Allow && !l.options.Audit: // told, not dropped (spec 4.2)
			return datapath.PolicyVerdict(side.answer.Verdict)
		case side.answer.Visible:
			out = datapath.PolicyVisible
		case side.answer.Proxy != "":
			return datapath.PolicyRedirect
		}
	}
	return out
}
