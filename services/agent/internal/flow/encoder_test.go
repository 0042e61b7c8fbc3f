// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/weirmesh/weir/bpf/datapath"
	flowpb "github.com/weirmesh/weir/gen/flow"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

type fixedClock int64

func (c fixedClock) Unix(m uint64) int64 { return int64(m) + int64(c) }

// world makes a small cluster, for the encoder and for the oracle.
func world(seed uint64) (*Encoder, *oracle, []netip.Addr, *rand.Rand) {
	rng := rand.New(rand.NewPCG(seed, 1))
	o := &oracle{
		node: Node{Cluster: "default", Name: "node-1", Labels: []string{"a=b", "zone=1"}, Version: "1.2.3",
			IPv4: netip.MustParseAddr("172.30.0.11"), IPv6: netip.MustParseAddr("fd30::11")},
		shift: 1_700_000_000_000_000_000, peers: map[netip.Addr]Peer{}, labels: map[uint32][]string{},
		services: map[uint32]ServiceName{}, frontends: map[Frontend]ServiceName{}, interfaces: map[uint32]string{7: "wr0123456789"},
		rules: map[uint32]told{}, names: map[netip.Addr][]string{netip.MustParseAddr("192.0.2.1"): {"a.example", "b.example"}},
	}
	dir := NewDirectory("default", time.Now)
	for n, name := range reservedLabels {
		o.labels[n] = []string{"reserved:" + name}
	}
	for i := range uint32(5) {
		o.labels[300+i] = []string{fmt.Sprintf("k8s:app=a%d", i), "k8s:io.kubernetes.pod.namespace=default"}
		dir.SetIdentity(300+i, o.labels[300+i])
	}
	addresses := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
	for i := range 12 {
		a := netip.MustParseAddr(fmt.Sprintf("10.244.1.%d", i+2))
		if i%2 == 1 {
			a = netip.MustParseAddr(fmt.Sprintf("fd00:10:244:1::%x", i+2))
		}
		p := Peer{Identity: 300 + uint32(i%5), Namespace: "default", Pod: fmt.Sprintf("pod-%d", i)}
		if i%3 == 0 {
			p.EndpointID = uint32(i + 1)
			p.WorkloadKind, p.WorkloadName = "Deployment", "web"
		}
		o.peers[a] = p
		dir.SetPeer(a, p)
		addresses = append(addresses, a)
	}
	vip := netip.MustParseAddr("10.96.0.10")
	addresses = append(addresses, vip)
	for id, name := range map[uint32]ServiceName{1: {"kube-system", "dns"}, 2: {"default", "web"}} {
		f := Frontend{Addr: vip, Port: uint16(50 + id), Proto: 17}
		if id == 2 {
			f.Addr = netip.MustParseAddr("fd00:10:96::2")
		}
		o.services[id], o.frontends[f] = name, name
		dir.SetService(id, f, name)
	}
	web := desired.PolicyRule{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "web", Labels: []string{"k8s:a=b"}, List: "ingress", Log: "seen"}
	second := web
	second.Spec, second.List, second.Index = 1, "ingressDeny", 2
	dir.SetRules(11, 2, []desired.PolicyRule{web, second, {Kind: "NetworkPolicy", Name: "other", Log: "other"}})
	o.rules[11] = told{2, []*flowpb.Policy{{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "web",
		Labels: []string{"k8s:a=b", "weir:policy.rule=spec.ingress[0]", "weir:policy.rule=specs[1].ingressDeny[2]"}},
		{Kind: "NetworkPolicy", Name: "other", Labels: []string{"weir:policy.rule=spec"}}}, []string{"seen", "other"}}
	dir.SetRules(12, 4, []desired.PolicyRule{{Implicit: "allow-localhost"}})
	o.rules[12] = told{4, []*flowpb.Policy{{Labels: []string{"weir:policy.implicit=allow-localhost"}}}, nil}
	dir.SetRules(13, 1, nil)
	o.rules[13] = told{match: 1}
	dir.SetInterface(7, "wr0123456789")
	dir.SetName(netip.MustParseAddr("192.0.2.1"), "b.example", time.Second)
	dir.SetName(netip.MustParseAddr("192.0.2.1"), "a.example", time.Second)
	return NewEncoder(dir, fixedClock(o.shift), o.node), o, addresses, rng
}

func setAddr(hi, lo *uint64, a netip.Addr) {
	b := a.As16()
	*hi, *lo = binary.NativeEndian.Uint64(b[:8]), binary.NativeEndian.Uint64(b[8:])
}

func pick[T any](rng *rand.Rand, of ...T) T { return of[rng.IntN(len(of))] }

func randomRecord(rng *rand.Rand, o *oracle, addresses []netip.Addr) datapath.Record {
	var r datapath.Record
	r.Type = pick(rng, datapath.RecordTrace, datapath.RecordTrace, datapath.RecordDrop, datapath.RecordVerdict, datapath.RecordTranslation,
		datapath.RecordFinal)
	r.Time = rng.Uint64N(1 << 50)
	src := pick(rng, addresses...)
	dst := pick(rng, addresses...)
	for dst.Is4() != src.Is4() {
		dst = pick(rng, addresses...)
	}
	backend := pick(rng, addresses...)
	for backend.Is4() != src.Is4() {
		backend = pick(rng, addresses...)
	}
	setAddr(&r.Src.Hi, &r.Src.Lo, src)
	setAddr(&r.Dst.Hi, &r.Dst.Lo, dst)
	setAddr(&r.Xlated.Hi, &r.Xlated.Lo, backend)
	identity := func(a netip.Addr) uint32 {
		if p, ok := o.peers[a]; ok {
			return pick(rng, p.Identity, p.Identity, p.Identity, 0, 301)
		}
		return pick(rng, uint32(9), 10, 2, 1, 6, 0, 99999)
	}
	r.SrcIdentity, r.DstIdentity = identity(src), identity(dst)
	if r.Type == datapath.RecordTranslation {
		r.DstIdentity = identity(backend)
		r.SocketCookie, r.CgroupId, r.XlatedPort = rng.Uint64(), rng.Uint64N(100), uint16(rng.Uint32())
	}
	r.IpVersion = 4
	if src.Is6() {
		r.IpVersion = 6
	}
	r.Proto = pick(rng, uint8(6), 6, 6, 17, 1, 58, 132, 47)
	r.Sport, r.Dport = uint16(rng.Uint32()), pick(rng, uint16(51), 52, 80, 0, uint16(rng.Uint32()))
	r.TcpFlags, r.IcmpType, r.IcmpCode = uint8(rng.Uint32()), uint8(rng.Uint32()), uint8(rng.Uint32N(4))
	r.Service = pick(rng, uint32(0), 0, 1, 2, 77)
	r.Endpoint, r.Direction = uint16(rng.Uint32()), uint8(rng.UintN(3))
	r.Ifindex = pick(rng, uint32(0), 7, 300)
	r.Point = pick(rng, datapath.PointToEndpoint, datapath.PointFromEndpoint, datapath.PointToHost, datapath.PointToNetwork)
	r.Reason = uint8(rng.UintN(6))
	if r.Type == datapath.RecordDrop {
		r.Reason = pick(rng, datapath.DropInvalidSourceIP, datapath.DropConntrackFull, datapath.DropUnknownFragment, datapath.DropPolicy,
			datapath.DropPolicyDeny)
	}
	r.Flags = uint8(rng.Uint32())
	r.Rule = pick(rng, uint32(0), 11, 12, 13, 99)
	r.Verdict = pick(rng, uint8(datapath.PolicyAllow), uint8(datapath.PolicyDefaultDeny), uint8(datapath.PolicyDeny), uint8(datapath.PolicyRedirect), uint8(datapath.PolicyVisible))
	if v := datapath.PolicyVerdict(r.Verdict); r.Type == datapath.RecordVerdict && (v == datapath.PolicyRedirect || v == datapath.PolicyVisible && rng.UintN(2) == 0) {
		r.XlatedPort = 7 // its slot
	}
	r.Known = uint8(rng.UintN(8))
	r.HandshakeUs, r.SrttUs, r.Retransmissions = rng.Uint32N(3), rng.Uint32(), rng.Uint32N(3)
	r.ForwardFlags, r.ReverseFlags = uint8(rng.Uint32()), uint8(rng.Uint32())
	r.Connection = pick(rng, rng.Uint64(), rng.Uint64(), 0)
	r.Forward.Packets, r.Forward.Bytes = rng.Uint64N(5), rng.Uint64()
	r.Forward.First, r.Forward.Last = rng.Uint64N(1<<50), rng.Uint64N(1<<50)
	r.Reverse.Packets, r.Reverse.Bytes = rng.Uint64N(5), rng.Uint64N(1e9)
	r.Reverse.First, r.Reverse.Last = rng.Uint64N(1<<50), rng.Uint64N(1<<50)
	for i := range r.SrcMac {
		r.SrcMac[i] = uint8(rng.Uint32())
		r.DstMac[i] = uint8(rng.UintN(2)) * r.SrcMac[0]
	}
	if rng.UintN(3) == 0 {
		r.SrcMac, r.DstMac = [6]byte{}, [6]byte{}
	}
	return r
}

var uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

// compare decodes what the encoder made and compares it with the oracle.
func compare(t *testing.T, got *Flow, want *flowpb.Flow, wantStats *observerv1.FlowStats, seen map[string]bool) {
	t.Helper()
	f := &flowpb.Flow{}
	if err := proto.Unmarshal(got.Body, f); err != nil {
		t.Fatalf("body does not decode: %v", err)
	}
	if !uuidPattern.MatchString(f.Uuid) || seen[f.Uuid] {
		t.Fatalf("uuid %q is malformed or used twice", f.Uuid)
	}
	seen[f.Uuid] = true
	f.Uuid = ""
	if diff := cmp.Diff(want, f, protocmp.Transform()); diff != "" {
		t.Fatalf("flow (-want +got):\n%s", diff)
	}
	if want.Time.AsTime().UnixNano() != got.Time {
		t.Fatalf("time %d, want %d", got.Time, want.Time.AsTime().UnixNano())
	}
	if got.Meta.SourceNamespace != want.Source.Namespace || got.Meta.DestinationNamespace != want.Destination.Namespace ||
		got.Meta.Verdict != int32(want.Verdict) || got.Meta.EventType != want.EventType.Type {
		t.Fatalf("meta %+v of %v", got.Meta, want)
	}
	if wantStats == nil {
		if got.Stats != nil {
			t.Fatal("stats of a flow that has none")
		}
		return
	}
	s := &observerv1.FlowStats{}
	if err := proto.Unmarshal(got.Stats, s); err != nil {
		t.Fatalf("stats do not decode: %v", err)
	}
	if diff := cmp.Diff(wantStats, s, protocmp.Transform()); diff != "" {
		t.Fatalf("stats (-want +got):\n%s", diff)
	}
}

func TestEncoderEqualsGeneratedCode(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	e, o, addresses, rng := world(seed)
	seen := map[string]bool{}
	for range 3000 {
		r := randomRecord(rng, o, addresses)
		n := 0
		ok := e.Encode(&r, func(f *Flow) {
			var want *flowpb.Flow
			var stats *observerv1.FlowStats
			if r.Type == datapath.RecordTranslation {
				want = o.translation(&r, n == 1)
			} else {
				want = o.packet(&r)
				if r.Connection != 0 {
					stats = o.stats(&r)
				}
			}
			n++
			compare(t, f, want, stats, seen)
		})
		wantFlows := 1
		if r.Type == datapath.RecordTranslation {
			wantFlows = 2
		}
		if !ok || n != wantFlows {
			t.Fatalf("record %+v: %t, %d flows, want %d", r, ok, n, wantFlows)
		}
	}
}

func TestEncodeRefuses(t *testing.T) {
	e, o, addresses, rng := world(1)
	good := randomRecord(rng, o, addresses)
	for _, tt := range []struct {
		name   string
		change func(*datapath.Record)
	}{
		{"no type", func(r *datapath.Record) { r.Type = 0 }},
		{"an unknown type", func(r *datapath.Record) { r.Type = 200 }},
		{"no IP version", func(r *datapath.Record) { r.IpVersion = 0 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := good
			tt.change(&r)
			if e.Encode(&r, func(*Flow) { t.Error("a flow was made") }) {
				t.Error("record was taken")
			}
		})
	}
}

// Whoever had the address when the packet went is named, also when the record comes after the pod is gone.
func TestDirectoryOverTime(t *testing.T) {
	now := time.Unix(1000, 0)
	d := NewDirectory("default", func() time.Time { return now })
	a := netip.MustParseAddr("10.244.1.9")
	podOf := func(identity uint32) string {
		var f flowpb.Endpoint
		if err := proto.Unmarshal(d.end(a.As16(), identity).endpoint, &f); err != nil {
			t.Fatal(err)
		}
		return f.PodName
	}
	steps := []struct {
		name     string
		do       func()
		identity uint32
		want     string
	}{
		{"nobody", func() {}, 300, ""},
		{"first owner", func() { d.SetPeer(a, Peer{Identity: 300, Pod: "one"}) }, 300, "one"},
		{"identity not told", func() {}, 0, "one"},
		{"gone, late record", func() { d.RemovePeer(a) }, 300, "one"},
		{"second owner", func() { d.SetPeer(a, Peer{Identity: 301, Pod: "two"}) }, 301, "two"},
		{"late record of the first", func() {}, 300, "one"},
		{"third owner", func() { d.SetPeer(a, Peer{Identity: 302, Pod: "three"}) }, 302, "three"},
		{"late record of the first, again", func() {}, 300, "one"},
		{"second owner comes back", func() { d.SetPeer(a, Peer{Identity: 301, Pod: "two"}) }, 301, "two"},
		{"a stranger's identity", func() {}, 555, ""},
		{"after its time", func() { now = now.Add(departedFor + time.Second); d.Expire() }, 300, ""},
		{"second is still there", func() {}, 301, "two"},
	}
	for _, s := range steps {
		s.do()
		if got := podOf(s.identity); got != s.want {
			t.Errorf("%s: pod %q, want %q", s.name, got, s.want)
		}
	}
}

// An identity's labels may come after its first flow.
func TestLabelsComeLate(t *testing.T) {
	d := NewDirectory("default", time.Now)
	a := netip.MustParseAddr("10.244.1.9")
	d.SetPeer(a, Peer{Identity: 300, Pod: "one"})
	before := string(d.end(a.As16(), 300).endpoint)
	d.SetIdentity(300, []string{"k8s:z=1", "k8s:a=2"})
	var f flowpb.Endpoint
	if err := proto.Unmarshal(d.end(a.As16(), 300).endpoint, &f); err != nil {
		t.Fatal(err)
	}
	if before == string(d.end(a.As16(), 300).endpoint) || !cmp.Equal(f.Labels, []string{"k8s:a=2", "k8s:z=1"}) {
		t.Errorf("labels %q, want them sorted", f.Labels)
	}
}

// An identity may go with its last pod, before the pod's last flows.
func TestLabelsStayForLastFlows(t *testing.T) {
	now := time.Unix(1000, 0)
	d := NewDirectory("default", func() time.Time { return now })
	a := netip.MustParseAddr("10.244.1.9")
	labelsOf := func() []string {
		var f flowpb.Endpoint
		if err := proto.Unmarshal(d.end(a.As16(), 300).endpoint, &f); err != nil {
			t.Fatal(err)
		}
		return f.Labels
	}
	d.SetIdentity(300, []string{"k8s:a=2"})
	d.SetPeer(a, Peer{Identity: 300, Pod: "one"})
	d.RemovePeer(a)
	d.RemoveIdentity(300)
	if got := labelsOf(); !cmp.Equal(got, []string{"k8s:a=2"}) {
		t.Errorf("labels of a gone identity: %q", got)
	}
	if len(d.Labels(300)) > 0 {
		t.Errorf("a gone identity is still listed: %q", d.Labels(300))
	}
	now = now.Add(departedFor + time.Second)
	d.Expire()
	if got := labelsOf(); len(got) > 0 {
		t.Errorf("labels after their time: %q", got)
	}
}

func TestICMPSummary(t *testing.T) {
	for _, tt := range []struct {
		six        bool
		typ, code  uint8
		wantSuffix string
	}{
		{false, 8, 0, "ICMPv4 EchoRequest"}, {false, 3, 3, "ICMPv4 DestinationUnreachable(Port)"}, {false, 3, 99, "ICMPv4 DestinationUnreachable(Code: 99)"},
		{false, 11, 0, "ICMPv4 TimeExceeded(TTLExceeded)"}, {false, 200, 1, "ICMPv4 200(1)"}, {false, 8, 4, "ICMPv4 EchoRequest(Code: 4)"},
		{true, 129, 0, "ICMPv6 EchoReply"}, {true, 1, 4, "ICMPv6 DestinationUnreachable(PortUnreachable)"}, {true, 2, 0, "ICMPv6 PacketTooBig"},
	} {
		if got := icmpSummary(tt.six, tt.typ, tt.code); got != tt.wantSuffix {
			t.Errorf("type %d code %d: %q, want %q", tt.typ, tt.code, got, tt.wantSuffix)
		}
	}
}

func FuzzRecordToFlow(f *testing.F) {
	e, o, addresses, rng := world(1)
	for range 20 {
		r := randomRecord(rng, o, addresses)
		b, err := binary.Append(nil, binary.NativeEndian, &r)
		if err == nil {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := datapath.DecodeRecord(b)
		if err != nil {
			return
		}
		e.Encode(&r, func(got *Flow) {
			var flow flowpb.Flow
			if err := proto.Unmarshal(got.Body, &flow); err != nil {
				t.Errorf("body: %v", err)
			}
			var s observerv1.FlowStats
			if err := proto.Unmarshal(got.Stats, &s); err != nil {
				t.Errorf("stats: %v", err)
			}
		})
	})
}

// What one flow costs: real lookups and copies, records of an established TCP connection between two pods.
func BenchmarkEncode(b *testing.B) {
	e, o, addresses, rng := world(1)
	records := benchRecords(o, addresses, rng)
	b.ReportAllocs()
	size := 0
	for i := 0; b.Loop(); i++ {
		e.Encode(&records[i&1023], func(f *Flow) { size += len(f.Body) + len(f.Stats) })
	}
	b.ReportMetric(float64(size)/float64(b.N), "bytes/flow")
}

// The straightforward way, for comparison.
func BenchmarkEncodeGenerated(b *testing.B) {
	_, o, addresses, rng := world(1)
	records := benchRecords(o, addresses, rng)
	b.ReportAllocs()
	var buf, stats []byte
	for i := 0; b.Loop(); i++ {
		r := &records[i&1023]
		f := o.packet(r)
		f.Uuid = "00000000-0000-8000-a000-000000000000"
		var err error
		if buf, err = (proto.MarshalOptions{}).MarshalAppend(buf[:0], f); err != nil {
			b.Fatal(err)
		}
		if stats, err = (proto.MarshalOptions{}).MarshalAppend(stats[:0], o.stats(r)); err != nil {
			b.Fatal(err)
		}
	}
}

// benchRecords are records of TCP connections between pods, whose identities agree with their addresses.
func benchRecords(o *oracle, addresses []netip.Addr, rng *rand.Rand) []datapath.Record {
	var records []datapath.Record
	for len(records) < 1024 {
		r := randomRecord(rng, o, addresses)
		src, dst := o.peers[r.SrcAddr()], o.peers[r.DstAddr()]
		if r.Type == datapath.RecordTrace && r.Connection != 0 && src.Identity != 0 && dst.Identity != 0 {
			r.Proto, r.Known, r.SrcIdentity, r.DstIdentity, r.Ifindex = 6, 7, src.Identity, dst.Identity, 7
			r.Forward.Packets, r.Reverse.Packets = 10, 10
			records = append(records, r)
		}
	}
	return records
}
