// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestEncodeRanges(t *testing.T) {
	const tcp, udp = unix.IPPROTO_TCP, unix.IPPROTO_UDP
	rest := PolicyRange{Last: 65535, Verdict: PolicyDefaultDeny}
	for _, c := range []struct {
		name   string
		ranges []PolicyRange
		want   []PolicyRange // as decoded
		fault  string
	}{
		{"nothing", nil, []PolicyRange{rest}, ""},
		{"everything", everything, everything, ""},
		{"one port", []PolicyRange{allowPort(tcp, 80, 1)}, []PolicyRange{
			rest, {tcp, 0, 79, PolicyDefaultDeny, 0, 0}, allowPort(tcp, 80, 1), {tcp, 81, 65535, PolicyDefaultDeny, 0, 0},
		}, ""},
		{"neighbours of one rule", []PolicyRange{{tcp, 82, 90, PolicyAllow, 1, 0}, {tcp, 80, 81, PolicyAllow, 1, 0}}, []PolicyRange{
			rest, {tcp, 0, 79, PolicyDefaultDeny, 0, 0}, {tcp, 80, 90, PolicyAllow, 1, 0}, {tcp, 91, 65535, PolicyDefaultDeny, 0, 0},
		}, ""},
		{"a named protocol is its ranges alone", []PolicyRange{everything[0], denyPort(udp, 53, 2)}, []PolicyRange{
			everything[0], {udp, 0, 52, PolicyDefaultDeny, 0, 0}, denyPort(udp, 53, 2), {udp, 54, 65535, PolicyDefaultDeny, 0, 0},
		}, ""},
		{"the last protocol", []PolicyRange{{255, 0, 65535, PolicyAllow, 3, 0}}, []PolicyRange{rest, {255, 0, 65535, PolicyAllow, 3, 0}}, ""},
		{"two in one place", []PolicyRange{{tcp, 1, 5, PolicyAllow, 1, 0}, {tcp, 5, 6, PolicyAllow, 1, 0}}, nil, "two ranges hold port 5"},
		{"backwards", []PolicyRange{{tcp, 2, 1, PolicyAllow, 1, 0}}, nil, "not a range"},
		{"no verdict", []PolicyRange{{tcp, 2, 2, PolicyNone, 1, 0}}, nil, "verdict 0"},
		{"slots", []PolicyRange{{tcp, 80, 80, PolicyRedirect, MaxRule, MaxSlot}, {tcp, 81, 81, PolicyVisible, 0, 1}}, []PolicyRange{
			rest, {tcp, 0, 79, PolicyDefaultDeny, 0, 0}, {tcp, 80, 80, PolicyRedirect, MaxRule, MaxSlot}, {tcp, 81, 81, PolicyVisible, 0, 1},
			{tcp, 82, 65535, PolicyDefaultDeny, 0, 0},
		}, ""},
		{"a redirect to no slot", []PolicyRange{{tcp, 2, 2, PolicyRedirect, 1, 0}}, nil, "they need one"},
		{"an allow with a slot", []PolicyRange{{tcp, 2, 2, PolicyAllow, 1, 1}}, nil, "they need one"},
		{"too great a slot", []PolicyRange{{tcp, 2, 2, PolicyRedirect, 1, MaxSlot + 1}}, nil, "slot 4096"},
		{"too great a rule", []PolicyRange{{tcp, 2, 2, PolicyAllow, MaxRule + 1, 0}}, nil, "rule 1048576"},
		{"some ports of any protocol", []PolicyRange{{0, 2, 2, PolicyAllow, 1, 0}}, nil, "want all ports"},
	} {
		words, err := encodeRanges(c.ranges)
		if c.fault != "" {
			if err == nil || !strings.Contains(err.Error(), c.fault) {
				t.Errorf("%s: error %v, want %q", c.name, err, c.fault)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if got := decodeRanges(words); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s:\n got %v\nwant %v", c.name, got, c.want)
		}
	}
}

// randomRanges makes ranges that do not overlap.
func randomRanges(r *rand.Rand) []PolicyRange {
	var out []PolicyRange
	if r.IntN(2) == 0 {
		out = append(out, PolicyRange{Last: 65535, Verdict: PolicyVerdict(1 + r.IntN(3)), Rule: r.Uint32N(3)})
	}
	for _, proto := range []uint8{1, 6, 7, 17, 132, 255} {
		if r.IntN(3) == 0 {
			continue
		}
		var cuts []int
		for range 2 * r.IntN(5) {
			cuts = append(cuts, r.IntN(65536))
		}
		cuts = append(cuts, []int{0, 65535}[:2*r.IntN(2)]...)
		slices.Sort(cuts)
		cuts = slices.Compact(cuts)
		for i := 0; i+1 < len(cuts); i += 2 {
			out = append(out, PolicyRange{proto, uint16(cuts[i]), uint16(cuts[i+1]), PolicyVerdict(1 + r.IntN(3)), r.Uint32N(3), 0})
		}
	}
	return out
}

// decidePlain is what ranges mean, word by word.
func decidePlain(ranges []PolicyRange, proto uint8, port uint16) (PolicyVerdict, uint32) {
	named := false
	for _, r := range ranges {
		if r.Proto == proto && proto != 0 {
			named = true
			if r.First <= port && port <= r.Last {
				return r.Verdict, r.Rule
			}
		}
	}
	for _, r := range ranges {
		if r.Proto == 0 && !named {
			return r.Verdict, r.Rule
		}
	}
	return PolicyDefaultDeny, 0
}

// What the programs and Lookup find is what the ranges say, at every edge of random rows.
func TestPolicyLookup(t *testing.T) {
	b := newBench(t, nil)
	p := b.Policies()
	r := rand.New(rand.NewPCG(1, 2))
	for round := range 20 {
		ranges := randomRanges(r)
		if err := p.SetPeer(9, idFar, ranges); err != nil {
			t.Fatal(err)
		}
		ports := []uint16{0, 65535}
		for _, x := range ranges {
			ports = append(ports, x.First-1, x.First, x.Last, x.Last+1)
		}
		for _, proto := range []uint8{0, 1, 6, 7, 8, 17, 132, 254, 255} {
			for _, port := range ports {
				wantVerdict, wantRule := decidePlain(ranges, proto, port)
				verdict, rule, own, err := p.Lookup(9, idFar, proto, port)
				if err != nil || verdict != wantVerdict || rule != wantRule || !own {
					t.Fatalf("round %d, %v: protocol %d port %d: %v by %d (row %v, %v), want %v by %d", round, ranges, proto, port, verdict, rule, own, err, wantVerdict, wantRule)
				}
			}
		}
		// The kernel, of two protocols that packets are easily made of.
		b.enforce(epA, EndpointPolicy{Ingress: 9, IngressAudit: true})
		for i, port := range ports[:min(len(ports), 12)] {
			for proto, data := range map[uint8][]byte{
				unix.IPPROTO_TCP: tcp(t, at(far4, uint16(1000+100*round+i)), at(podA4, port), syn, 1, 0, 0),
				unix.IPPROTO_UDP: udp(t, at(far4, uint16(1000+100*round+i)), at(podA4, port), 1),
			} {
				wantVerdict, wantRule := decidePlain(ranges, proto, port)
				want := outcome{verdict: wantVerdict, rule: wantRule, direction: DirectionIngress, audited: wantVerdict != PolicyAllow}
				if got := b.outcomeOf(tcProgFromNetwork, b.uplink, data); got != want && slices.Index(ports, port) == i {
					t.Fatalf("round %d, %v: protocol %d port %d:\n got %v\nwant %v", round, ranges, proto, port, got, want)
				}
			}
		}
	}
}

func TestPoliciesMaps(t *testing.T) {
	pin := bpffs(t)
	inNetns(t)
	cfg := smallConfig(pin)
	cfg.PolicyPeersMax, cfg.PolicyRangesMax = 8, 16
	d := load(t, cfg)
	p := d.Policies()
	port := func(n int) []PolicyRange { return []PolicyRange{allowPort(unix.IPPROTO_TCP, uint16(n), 1)} } // 3 words
	usage := func(rows, ranges int) {
		t.Helper()
		got := p.Usage()
		if got[0].Entries != rows || got[1].Entries != ranges || got[0].Max != 8 || got[1].Max != 16 {
			t.Errorf("usage %+v, want %d rows and %d ranges", got, rows, ranges)
		}
	}
	set := func(policy, peer uint32, ranges []PolicyRange) {
		t.Helper()
		if err := p.SetPeer(policy, peer, ranges); err != nil {
			t.Fatal(err)
		}
	}
	for peer := range uint32(5) {
		set(1, peer, port(80))
	}
	usage(5, 3) // equal rows share their ranges
	for i := range 4 {
		set(1, uint32(i), port(81+i))
	}
	usage(5, 15)
	if err := p.SetPeer(1, 9, port(99)); !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), "policy_ranges") {
		t.Errorf("sixth block: %v, want ErrFull of policy_ranges", err)
	}
	if _, _, own, err := p.Lookup(1, 9, unix.IPPROTO_TCP, 99); own || err != nil {
		t.Errorf("a row was made of what did not fit: %v", err)
	}
	set(1, 3, port(81)) // frees one, which the next takes when programs are done with it
	set(1, 9, port(99))
	usage(6, 15)
	set(1, 10, port(80))
	set(1, 11, port(80))
	if err := p.SetPeer(2, 1, port(80)); !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), "policy_peers") {
		t.Errorf("ninth row: %v, want ErrFull of policy_peers", err)
	}
	want, err := p.List()
	if err != nil || len(want) != 8 {
		t.Fatalf("list of %d rows, error %v", len(want), err)
	}
	if err := p.SetEndpoint(7, EndpointPolicy{Ingress: 1, Egress: 2, EgressAudit: true}); err != nil {
		t.Fatal(err)
	}
	if err := p.Bump(); err != nil {
		t.Fatal(err)
	}

	// Another process finds it all.
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = load(t, cfg)
	p = d.Policies()
	if got, err := p.List(); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("after a reload (error %v):\n got %v\nwant %v", err, got, want)
	}
	usage(8, 15)
	all, err := p.Endpoints()
	if err != nil || !reflect.DeepEqual(all, map[uint16]EndpointPolicy{7: {Ingress: 1, Egress: 2, EgressAudit: true}}) {
		t.Errorf("endpoints %v, error %v", all, err)
	}
	if g, err := p.Generation(); err != nil || g != 1 {
		t.Errorf("generation %d, error %v, want 1", g, err)
	}
	if err := p.DeletePolicy(1); err != nil {
		t.Fatal(err)
	}
	usage(0, 15) // programs may still read what rests
	words, err := encodeRanges(port(7))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		set(2, uint32(i), port(7+i))
	}
	usage(5, 5*len(words))
	if err := p.SetPeer(0, 1, nil); err == nil {
		t.Error("policy 0 was taken")
	}
	if err := p.SetEndpoint(1, EndpointPolicy{Ingress: MaxPolicy + 1}); err == nil {
		t.Error("a policy number of 31 bits was taken")
	}
}

// Room that is given back joins with what is free beside it.
func TestBlocksJoin(t *testing.T) {
	b := &blocks{}
	for _, e := range []extent{{10, 5}, {30, 5}, {15, 5}, {5, 5}, {20, 10}} {
		b.give(e)
	}
	if want := []extent{{5, 30}}; !slices.Equal(b.free, want) {
		t.Errorf("free %v, want %v", b.free, want)
	}
	if base, ok := b.allocate(31); ok {
		t.Errorf("31 of 30 at %d", base)
	}
	if base, ok := b.allocate(30); !ok || base != 5 || len(b.free) != 0 {
		t.Errorf("30 of 30 at %d, %v, left %v", base, ok, b.free)
	}
}

func FuzzRanges(f *testing.F) {
	f.Add(uint64(1), uint8(6), uint16(80))
	f.Fuzz(func(t *testing.T, seed uint64, proto uint8, port uint16) {
		ranges := randomRanges(rand.New(rand.NewPCG(seed, seed)))
		words, err := encodeRanges(ranges)
		if err != nil {
			t.Fatal(err)
		}
		verdict, rule := decidePlain(ranges, proto, port)
		word := decideRange(words, proto, port)
		if PolicyVerdict(word>>32&0xff) != verdict || uint32(word) != rule {
			t.Fatalf("%v: protocol %d port %d: %x, want %v by %d", ranges, proto, port, word, verdict, rule)
		}
		again, err := encodeRanges(decodeRanges(words))
		if err != nil || !slices.Equal(again, words) {
			t.Fatalf("%v: decoded and encoded again: %v", fmt.Sprint(words), again)
		}
	})
}
