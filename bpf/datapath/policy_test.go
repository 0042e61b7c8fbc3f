// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// rows are the ranges of a policy's peers.
type rows map[uint32][]PolicyRange

var (
	everything = []PolicyRange{{Last: 65535, Verdict: PolicyAllow, Rule: 900}}
	nothing    = []PolicyRange{{Last: 65535, Verdict: PolicyDefaultDeny}}
)

func allowPort(proto uint8, port uint16, rule uint32) PolicyRange {
	return PolicyRange{Proto: proto, First: port, Last: port, Verdict: PolicyAllow, Rule: rule}
}

func denyPort(proto uint8, port uint16, rule uint32) PolicyRange {
	return PolicyRange{Proto: proto, First: port, Last: port, Verdict: PolicyDeny, Rule: rule}
}

// policy writes rows and bumps.
func (b *bench) policy(number uint32, rows rows) {
	b.Helper()
	for peer, ranges := range rows {
		if err := b.Policies().SetPeer(number, peer, ranges); err != nil {
			b.Fatal(err)
		}
	}
	b.bump()
}

func (b *bench) bump() {
	b.Helper()
	if err := b.Policies().Bump(); err != nil {
		b.Fatal(err)
	}
}

func (b *bench) enforce(id uint16, e EndpointPolicy) {
	b.Helper()
	if err := b.Policies().SetEndpoint(id, e); err != nil {
		b.Fatal(err)
	}
	b.bump()
}

// outcome is what became of a packet.
type outcome struct {
	reason uint8 // drop reason, 0 = it passed
	rule   uint32
	// of the verdict record, which there is for decisions only
	verdict   PolicyVerdict
	direction uint8
	audited   bool
}

func (o outcome) String() string {
	return fmt.Sprintf("{reason %d, rule %d, verdict %v, direction %d, audited %v}", o.reason, o.rule, o.verdict, o.direction, o.audited)
}

// outcomeOf runs a packet and reads its records. rule is that of the verdict record; a drop without one gives its own.
func (b *bench) outcomeOf(program string, ifindex uint32, data []byte, opts ...runOption) outcome {
	b.Helper()
	b.records()
	v := b.run(program, ifindex, data, opts...)
	var out outcome
	drops := 0
	for _, r := range b.records() {
		switch r.Type {
		case RecordVerdict:
			out.verdict, out.direction, out.audited, out.rule = PolicyVerdict(r.Verdict), r.Direction, r.Flags&FlagAudited != 0, r.Rule
		case RecordDrop:
			drops++
			out.reason = r.Reason
			if out.verdict == PolicyNone {
				out.rule = r.Rule
			} else if r.Rule != out.rule {
				b.Errorf("drop record names rule %d, verdict record %d", r.Rule, out.rule)
			}
		}
	}
	if dropped := v.code == actShot; dropped != (drops == 1) {
		b.Fatalf("verdict %d with %d drop records", v.code, drops)
	}
	return out
}

func (b *bench) expect(name string, want outcome, program string, ifindex uint32, data []byte, opts ...runOption) {
	b.Helper()
	if got := b.outcomeOf(program, ifindex, data, opts...); got != want {
		b.Errorf("%s:\n got %v\nwant %v", name, got, want)
	}
}

func denied(direction uint8, rule uint32) outcome {
	return outcome{reason: DropPolicyDeny, rule: rule, verdict: PolicyDeny, direction: direction}
}

func defaultDenied(direction uint8) outcome {
	return outcome{reason: DropPolicy, verdict: PolicyDefaultDeny, direction: direction}
}

func allowed(direction uint8, rule uint32) outcome {
	return outcome{rule: rule, verdict: PolicyAllow, direction: direction}
}

// passes: nothing was decided.
var passes = outcome{}

// family is one IP family of the unit tests' cluster.
type family struct {
	name                       string
	podA, podB, far, out, node netip.Addr
}

var families = []family{
	{"IPv4", podA4, podB4, far4, out4, node4},
	{"IPv6", podA6, podB6, far6, out6, node6},
}

func (f family) icmp() (proto, request, answer uint8) {
	if f.podA.Is4() {
		return unix.IPPROTO_ICMP, 8, 0
	}
	return unix.IPPROTO_ICMPV6, 128, 129
}

// sctpChunk makes a packet whose only chunk is an empty one.
func sctpChunk(t testing.TB, src, dst netip.AddrPort, chunk uint8) []byte {
	t.Helper()
	s := &layers.SCTP{SrcPort: layers.SCTPPort(src.Port()), DstPort: layers.SCTPPort(dst.Port()), VerificationTag: 1}
	return packet(t, ip(src.Addr(), dst.Addr(), layers.IPProtocolSCTP), s, gopacket.Payload([]byte{chunk, 0, 0, 4}))
}

func TestPolicyIngress(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			b := newBench(t, nil)
			icmp, request, _ := f.icmp()
			b.policy(5, rows{
				0: nothing,
				idFar: {
					{Proto: unix.IPPROTO_TCP, First: 80, Last: 84, Verdict: PolicyAllow, Rule: 11},
					denyPort(unix.IPPROTO_TCP, 85, 12),
					{Proto: unix.IPPROTO_TCP, First: 86, Last: 90, Verdict: PolicyAllow, Rule: 13},
					allowPort(unix.IPPROTO_UDP, 53, 14),
					allowPort(unix.IPPROTO_SCTP, 7, 15),
					allowPort(icmp, uint16(request), 16),
					allowPort(unix.IPPROTO_TCP, 65535, 17),
				},
				IdentityWorldIPv4: {allowPort(unix.IPPROTO_TCP, 443, 18)},
				IdentityWorldIPv6: {allowPort(unix.IPPROTO_TCP, 443, 18)},
			})
			b.enforce(epA, EndpointPolicy{Ingress: 5})
			in := DirectionIngress
			client := uint16(40000)
			for _, c := range []struct {
				name  string
				proto uint8
				src   netip.Addr
				port  uint16
				want  outcome
			}{
				{"first of a range", unix.IPPROTO_TCP, f.far, 80, allowed(in, 11)},
				{"last of a range", unix.IPPROTO_TCP, f.far, 84, allowed(in, 11)},
				{"below", unix.IPPROTO_TCP, f.far, 79, defaultDenied(in)},
				{"port 0", unix.IPPROTO_TCP, f.far, 0, defaultDenied(in)},
				{"deny in between", unix.IPPROTO_TCP, f.far, 85, denied(in, 12)},
				{"after it", unix.IPPROTO_TCP, f.far, 86, allowed(in, 13)},
				{"above", unix.IPPROTO_TCP, f.far, 91, defaultDenied(in)},
				{"last port", unix.IPPROTO_TCP, f.far, 65535, allowed(in, 17)},
				{"UDP", unix.IPPROTO_UDP, f.far, 53, allowed(in, 14)},
				{"UDP, the port of TCP", unix.IPPROTO_UDP, f.far, 80, defaultDenied(in)},
				{"SCTP", unix.IPPROTO_SCTP, f.far, 7, allowed(in, 15)},
				{"SCTP, another port", unix.IPPROTO_SCTP, f.far, 8, defaultDenied(in)},
				{"ping", icmp, f.far, 0, allowed(in, 16)},
				{"world", unix.IPPROTO_TCP, f.out, 443, allowed(in, 18)},
				{"world, another port", unix.IPPROTO_TCP, f.out, 80, defaultDenied(in)},
			} {
				client++
				var data []byte
				src, dst := at(c.src, client), at(f.podA, c.port)
				switch c.proto {
				case unix.IPPROTO_TCP:
					data = tcp(t, src, dst, syn, 1, 0, 0)
				case unix.IPPROTO_UDP:
					data = udp(t, src, dst, 10)
				case unix.IPPROTO_SCTP:
					data = sctpChunk(t, src, dst, 1)
				default:
					data = echo(t, c.src, f.podA, true, client, 8)
				}
				before := len(b.conns())
				b.expect(c.name, c.want, tcProgFromNetwork, b.uplink, data)
				if made, want := len(b.conns())-before, c.want.reason == 0; (made == 1) != want {
					t.Errorf("%s: %d entries made, outcome %v", c.name, made, c.want)
				}
			}
			// The node's own processes are a peer like any other: that they may pass is said by rows.
			b.expect("host", defaultDenied(in), tcProgFromHost, b.uplink, tcp(t, at(f.node, 1), at(f.podA, 80), syn, 1, 0, 0))
			b.policy(5, rows{IdentityHost: everything})
			b.expect("host with a row", allowed(in, 900), tcProgFromHost, b.uplink, tcp(t, at(f.node, 1), at(f.podA, 80), syn, 1, 0, 0))
			c := b.counters()
			if c.Policy.AllowedIngress != 9 || c.Policy.DeniedIngress != 8 || c.Policy.AllowedEgress+c.Policy.DeniedEgress != 0 {
				t.Errorf("counted %+v, want 9 allowed and 8 denied at ingress", c.Policy)
			}
			drops, err := b.Drops()
			if err != nil {
				t.Fatal(err)
			}
			found := false
			for _, d := range drops {
				found = found || d.Reason == DropPolicyDeny && d.Rule == 12 && d.Endpoint == epA && d.Port == 85 && d.Direction == in
			}
			if !found {
				t.Errorf("no row of rule 12 in %+v", drops)
			}
		})
	}
}

func TestPolicyEgressAndReplies(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			b := newBench(t, nil)
			b.policy(6, rows{0: nothing, idFar: {allowPort(unix.IPPROTO_TCP, 80, 21), allowPort(unix.IPPROTO_UDP, 53, 22)}})
			b.policy(7, rows{0: nothing})
			b.enforce(epA, EndpointPolicy{Ingress: 7, Egress: 6})
			out := DirectionEgress
			client, server := at(f.podA, 1000), at(f.far, 80)
			b.expect("SYN", allowed(out, 21), tcProgFromPod, b.ifA, tcp(t, client, server, syn, 1, 0, 0))
			b.expect("SYN+ACK needs no rule", passes, tcProgFromNetwork, b.uplink, tcp(t, server, client, syn|ack, 1, 2, 0))
			b.expect("ACK", passes, tcProgFromPod, b.ifA, tcp(t, client, server, ack, 2, 2, 0))
			b.expect("another port", defaultDenied(out), tcProgFromPod, b.ifA, tcp(t, client, at(f.far, 81), syn, 1, 0, 0))
			b.expect("world", defaultDenied(out), tcProgFromPod, b.ifA, tcp(t, client, at(f.out, 80), syn, 1, 0, 0))
			b.expect("UDP", allowed(out, 22), tcProgFromPod, b.ifA, udp(t, client, at(f.far, 53), 4))
			b.expect("UDP answer", passes, tcProgFromNetwork, b.uplink, udp(t, at(f.far, 53), client, 4))
			b.expect("UDP answer of nobody asked", defaultDenied(DirectionIngress), tcProgFromNetwork, b.uplink, udp(t, at(f.far, 53), at(f.podA, 1001), 4))

			// A SYN+ACK out of nowhere is no answer, and opens nothing for the SYN after it.
			attacker, victim := at(f.far, 80), at(f.podA, 22)
			b.expect("stray SYN+ACK", defaultDenied(DirectionIngress), tcProgFromNetwork, b.uplink, tcp(t, attacker, victim, syn|ack, 1, 1, 0))
			b.expect("SYN after it", defaultDenied(DirectionIngress), tcProgFromNetwork, b.uplink, tcp(t, attacker, victim, syn, 1, 0, 0))
			b.expect("middle of a connection", defaultDenied(DirectionIngress), tcProgFromNetwork, b.uplink, tcp(t, attacker, victim, ack, 1, 1, 5))
		})
	}
}

func TestPolicyCutsBothWays(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			b := newBench(t, nil)
			b.policy(5, rows{0: everything})
			b.enforce(epA, EndpointPolicy{Ingress: 5})
			client, server := at(f.far, 1000), at(f.podA, 80)
			request := func() []byte { return tcp(t, client, server, ack|psh, 2, 2, 3) }
			answer := func() []byte { return tcp(t, server, client, ack|psh, 2, 5, 3) }
			in := DirectionIngress
			b.expect("SYN", allowed(in, 900), tcProgFromNetwork, b.uplink, tcp(t, client, server, syn, 1, 0, 0))
			b.expect("SYN+ACK", passes, tcProgFromPod, b.ifA, tcp(t, server, client, syn|ack, 1, 2, 0))
			b.expect("request", passes, tcProgFromNetwork, b.uplink, request())
			b.bump()
			b.expect("request after a change elsewhere", passes, tcProgFromNetwork, b.uplink, request())
			b.bump()
			b.expect("answer after a change elsewhere", passes, tcProgFromPod, b.ifA, answer())

			// Written, and not yet in force for live connections.
			if err := b.Policies().SetPeer(5, idFar, []PolicyRange{denyPort(unix.IPPROTO_TCP, 80, 31)}); err != nil {
				t.Fatal(err)
			}
			b.expect("request before the bump", passes, tcProgFromNetwork, b.uplink, request())
			b.bump()
			// The answer comes first: decided by the forward direction all the same.
			b.expect("answer", denied(in, 31), tcProgFromPod, b.ifA, answer())
			cut := outcome{reason: DropPolicyDeny, rule: 31}
			b.expect("request", cut, tcProgFromNetwork, b.uplink, request())
			b.expect("answer again", cut, tcProgFromPod, b.ifA, answer())
			conns := b.conns()
			if len(conns) != 1 || conns[0].Forward.Packets != 4 || conns[0].Reverse.Packets != 2 {
				t.Errorf("entries %+v, want one that counts 4 and 2 packets: dropped ones are in none", conns)
			}
			b.expect("reset by the pod", cut, tcProgFromPod, b.ifA, tcp(t, server, client, rst, 2, 0, 0))

			b.policy(5, rows{idFar: everything})
			b.expect("allowed again", allowed(in, 900), tcProgFromNetwork, b.uplink, request())
			b.expect("answer", passes, tcProgFromPod, b.ifA, answer())
			b.policy(5, rows{idFar: nothing})
			b.expect("default deny", defaultDenied(in), tcProgFromNetwork, b.uplink, request())
			b.enforce(epA, EndpointPolicy{})
			b.expect("no longer enforced", passes, tcProgFromNetwork, b.uplink, request())
		})
	}
}

func TestPolicyFollowsPeer(t *testing.T) {
	b := newBench(t, nil)
	b.policy(5, rows{0: nothing, idFar: {allowPort(unix.IPPROTO_TCP, 80, 41)}, 0x03000001: {allowPort(unix.IPPROTO_TCP, 81, 42)}})
	b.enforce(epA, EndpointPolicy{Ingress: 5})
	client, server := at(far4, 1000), at(podA4, 80)
	data := func(flags uint8) []byte { return tcp(t, client, server, flags, 1, 0, 0) }
	in := DirectionIngress
	b.expect("SYN", allowed(in, 41), tcProgFromNetwork, b.uplink, data(syn))
	row := IPCacheEntry{Identity: idFar, Peer: 0x03000001}
	if err := b.IPCache().Upsert(netip.PrefixFrom(far4, 32), row); err != nil {
		t.Fatal(err)
	}
	b.bump()
	b.expect("the peer became a variant", defaultDenied(in), tcProgFromNetwork, b.uplink, data(ack))
	b.expect("the variant's port", allowed(in, 42), tcProgFromNetwork, b.uplink, tcp(t, client, at(podA4, 81), syn, 1, 0, 0))
	if err := b.IPCache().Upsert(netip.PrefixFrom(far4, 32), IPCacheEntry{Identity: idFar}); err != nil {
		t.Fatal(err)
	}
	b.bump()
	b.expect("and none again", allowed(in, 41), tcProgFromNetwork, b.uplink, data(ack))
}

func TestPolicyBetweenLocalPods(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			b := newBench(t, nil)
			b.policy(5, rows{0: nothing, idA: {allowPort(unix.IPPROTO_TCP, 80, 51)}})
			b.policy(6, rows{0: nothing, idB: {allowPort(unix.IPPROTO_TCP, 80, 52), allowPort(unix.IPPROTO_TCP, 81, 53)}})
			b.enforce(epA, EndpointPolicy{Egress: 6})
			b.enforce(epB, EndpointPolicy{Ingress: 5})
			client := at(f.podA, 1000)
			b.records()
			if v := b.run(tcProgFromPod, b.ifA, tcp(t, client, at(f.podB, 80), syn, 1, 0, 0)); v.code != actRedirect || v.redirect != b.ifB {
				t.Fatalf("verdict %+v, want redirect to %d", v, b.ifB)
			}
			var verdicts []string
			for _, r := range b.records() {
				if r.Type == RecordVerdict {
					verdicts = append(verdicts, fmt.Sprintf("endpoint %d direction %d rule %d", r.Endpoint, r.Direction, r.Rule))
				}
			}
			if got, want := fmt.Sprint(verdicts), "[endpoint 7 direction 2 rule 52 endpoint 8 direction 1 rule 51]"; got != want {
				t.Errorf("verdict records %s, want %s", got, want)
			}
			b.expect("answer", passes, tcProgFromPod, b.ifB, tcp(t, at(f.podB, 80), client, syn|ack, 1, 2, 0))
			b.expect("refused by the client's egress", defaultDenied(DirectionEgress), tcProgFromPod, b.ifA, tcp(t, client, at(f.podB, 82), syn, 1, 0, 0))
			b.expect("refused by the server's ingress", defaultDenied(DirectionIngress), tcProgFromPod, b.ifA, tcp(t, client, at(f.podB, 81), syn, 1, 0, 0))
			b.expect("a pod to itself, by a service", passes, tcProgFromPod, b.ifA, tcp(t, client, at(f.podA, 82), syn, 1, 0, 0))
		})
	}
}
