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
	faults, first := 0, *seed
	s := first
	for ; counts["packets"] < *cases; s++ {
		w := random.New(s, random.Limits{Packets: 3 * packetsOfWorld})
		f := n.disagreement(w.Cluster, w.Packets, counts)
		if f == nil {
			continue
		}
		t.Errorf("seed %d: %v", s, f.shrunk(w.Cluster, n.disagreement))
		if faults++; faults == *stop {
			t.Fatal("too many faults")
		}
	}
	t.Logf("seeds %d to %d: %v", first, s-1, counts)
	for _, key := range []string{
		"from_pod", "from_network", "from_host", "IPv4", "IPv6", "TCP", "UDP", "SCTP", "ICMP", "ICMPv6", "replies", "allow", "default-deny", "deny",
	} {
		if counts[key] < counts["packets"]/100 {
			t.Errorf("%d of %d packets are %s", counts[key], counts["packets"], key)
		}
	}
}

// disagreement loads a world and returns the first fault that a packet shows.
func (n *node) disagreement(cluster *reference.Cluster, packets []reference.Packet, counts map[string]int) *fault {
	c, f := compiled(cluster, packets)
	if f != nil {
		return f
	}
	l := n.load(c)
	defer l.unload()
	for i, p := range packets {
		if f := l.try(p, uint16(20000+i), counts); f != nil {
			return f
		}
	}
	return nil
}

// linkTypes of ICMPv6 keep a link going (neighbours, routers, multicast listeners), and packet-too-big always passes: no matter of policy.
var linkTypes = []uint8{2, 130, 131, 132, 133, 134, 135, 136, 137, 143}

// try sends a packet, and the answer if it passes.
func (l *loaded) try(p reference.Packet, sport uint16, counts map[string]int) *fault {
	from, to := l.canonical(p.From), l.canonical(p.To)
	program, ifindex := l.way(from, to)
	if program == "" || from == to {
		return nil
	}
	f := frame{src: l.address(from, p.V6), dst: l.address(to, p.V6), protocol: p.ProtocolNumber(), sport: sport, dport: uint16(p.Port)}
	if f.protocol == policy.ICMP || f.protocol == policy.ICMPv6 {
		f.dport, f.icmpType, f.icmpCode = 0, uint8(p.Port), uint8(p.Code)
		if f.protocol == policy.ICMPv6 && slices.Contains(linkTypes, f.icmpType) {
			return nil
		}
		if l.sent[f.message()] {
			return nil // no new connection: messages without an identifier are one with their like
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
	bad := func(format string, args ...any) *fault {
		text := fmt.Sprintf(format, args...)
		return &fault{"datapath " + program + " " + text, fmt.Sprintf("%s returns %d, verdicts %v, drops %v: %s", program, code, verdicts, drops, text), p}
	}
	if (code == actShot) != (want != datapath.PolicyAllow) {
		return bad("the reference says %v", want)
	}
	reason := map[datapath.PolicyVerdict]uint8{datapath.PolicyDefaultDeny: datapath.DropPolicy, datapath.PolicyDeny: datapath.DropPolicyDeny}[want]
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
	return nil
}

// judge is what the reference evaluator says of the sides that this node decides.
func (l *loaded) judge(from, to string, p reference.Packet) datapath.PolicyVerdict {
	egress, ingress := l.cluster.Decide(p)
	if l.endpoints[from] != 0 && egress != reference.Allow {
		return datapath.PolicyVerdict(egress)
	}
	if l.endpoints[to] != 0 && ingress != reference.Allow {
		return datapath.PolicyVerdict(ingress)
	}
	return datapath.PolicyAllow
}
