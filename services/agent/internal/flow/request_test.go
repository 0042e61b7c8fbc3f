// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/bpf/datapath"
	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// request builds a flow of a request the straightforward way.
func (o *oracle) request(r *Request) *flowpb.Flow {
	f := o.common(&datapath.Record{})
	f.Time = timestamppb.New(time.Unix(0, r.Time))
	f.Type, f.Verdict, f.EventType = flowpb.FlowType_L7, flowpb.Verdict_FORWARDED, &flowpb.CiliumEventType{Type: 129}
	if r.Denied {
		f.Verdict = flowpb.Verdict_DROPPED
	}
	f.TrafficDirection = flowpb.TrafficDirection(r.Direction)
	f.IsReply, f.Reply = wrapperspb.Bool(r.Response), r.Response //nolint:staticcheck // oracle
	f.ProxyPort = uint32(r.ProxyPort)
	if r.TraceID != "" {
		f.TraceContext = &flowpb.TraceContext{Parent: &flowpb.TraceParent{TraceId: r.TraceID}}
	}
	client, server := r.Client.Addr(), r.Server.Addr()
	svc := o.service(0, server, r.Server.Port(), r.Proto)
	src, dst := r.Client, r.Server
	f.Source, f.Destination, f.DestinationService = o.endpoint(client, r.ClientIdentity), o.endpoint(server, r.ServerIdentity), svc
	if r.Response {
		src, dst = dst, src
		f.Source, f.Destination, f.SourceService, f.DestinationService = f.Destination, f.Source, svc, nil
	}
	f.SourceNames, f.DestinationNames = o.names[src.Addr()], o.names[dst.Addr()]
	f.IP = &flowpb.IP{Source: src.Addr().String(), Destination: dst.Addr().String(), IpVersion: version(map[bool]uint8{true: 4, false: 6}[src.Addr().Is4()])}
	if r.Proto == 6 {
		f.L4 = &flowpb.Layer4{Protocol: &flowpb.Layer4_TCP{TCP: &flowpb.TCP{SourcePort: uint32(src.Port()), DestinationPort: uint32(dst.Port())}}}
	} else {
		f.L4 = &flowpb.Layer4{Protocol: &flowpb.Layer4_UDP{UDP: &flowpb.UDP{SourcePort: uint32(src.Port()), DestinationPort: uint32(dst.Port())}}}
	}
	if len(r.Rules) > 0 {
		policies := []*flowpb.Policy{{Kind: r.Rules[0].Kind, Namespace: r.Rules[0].Namespace, Name: r.Rules[0].Name, Labels: []string{"weir:policy.rule=spec.ingress[1]"}}}
		if r.Direction == 2 {
			f.EgressAllowedBy = policies
		} else {
			f.IngressAllowedBy = policies
		}
		f.PolicyLog = []string{r.Rules[0].Log}
	}
	o.layer7(f, r)
	return f
}

func (o *oracle) layer7(f *flowpb.Flow, r *Request) {
	f.L7 = &flowpb.Layer7{Type: flowpb.L7FlowType_REQUEST}
	if r.Response {
		f.L7.Type, f.L7.LatencyNs = flowpb.L7FlowType_RESPONSE, r.Latency
	}
	switch {
	case r.HTTP != nil:
		h := &flowpb.HTTP{Method: r.HTTP.Method, Url: r.HTTP.URL, Protocol: r.HTTP.Protocol}
		f.Summary = fmt.Sprintf("%s %s %s", h.Protocol, h.Method, h.Url) //nolint:staticcheck // oracle
		if r.Response {
			h.Code = r.HTTP.Code
			f.Summary = fmt.Sprintf("%s %d %dms (%s %s)", h.Protocol, h.Code, time.Duration(r.Latency).Milliseconds(), h.Method, h.Url) //nolint:staticcheck // oracle
		}
		for _, x := range r.HTTP.Headers {
			h.Headers = append(h.Headers, &flowpb.HTTPHeader{Key: x.Key, Value: x.Value})
		}
		f.L7.Record = &flowpb.Layer7_Http{Http: h}
	case r.DNS != nil:
		d := &flowpb.DNS{Query: r.DNS.Query, Qtypes: r.DNS.QTypes, ObservationSource: "proxy"}
		f.Summary = "DNS Query " + d.Query + " " + strings.Join(d.Qtypes, ",") //nolint:staticcheck // oracle
		if r.Response {
			d.Ips, d.Cnames, d.Rrtypes, d.Ttl, d.Rcode = r.DNS.IPs, r.DNS.CNames, r.DNS.RRTypes, r.DNS.TTL, r.DNS.RCode
			f.Summary = dnsSummary(r.DNS, true) //nolint:staticcheck // tested by itself
		}
		f.L7.Record = &flowpb.Layer7_Dns{Dns: d}
	default:
		f.Summary = "tls Fields: map[server_name:" + r.TLS.ServerName + "]" //nolint:staticcheck // oracle
	}
}

func randomRequest(rng *rand.Rand, o *oracle, addresses []netip.Addr) *Request {
	client, server := pick(rng, addresses...), pick(rng, addresses...)
	for client.Is4() != server.Is4() {
		server = pick(rng, addresses...)
	}
	r := &Request{Time: int64(rng.Uint64N(1 << 60)), Response: rng.UintN(2) == 0, Denied: rng.UintN(3) == 0, Latency: rng.Uint64N(1 << 40), Proto: pick[uint8](rng, 6, 17),
		Client: netip.AddrPortFrom(client, uint16(rng.Uint32())), Server: netip.AddrPortFrom(server, pick[uint16](rng, 52, 80)),
		Direction: pick[uint8](rng, 0, 1, 2), ProxyPort: pick[uint16](rng, 0, 20001), TraceID: pick(rng, "", "4bf92f3577b34da6a3ce929d0e0e4736"),
		ClientIdentity: pick(rng, o.peers[client].Identity, 0), ServerIdentity: pick[uint32](rng, 0, 9)}
	if rng.UintN(2) == 0 {
		r.Rules = []desired.PolicyRule{{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "web", List: "ingress", Index: 1, Log: "seen"}}
	}
	switch rng.UintN(3) {
	case 0:
		r.HTTP = &HTTP{Code: rng.Uint32N(600), Method: pick(rng, "GET", "POST"), URL: "http://host/" + strings.Repeat("x", rng.IntN(300)), Protocol: "HTTP/1.1"}
		for i := range rng.IntN(4) {
			r.HTTP.Headers = append(r.HTTP.Headers, Header{fmt.Sprint("k", i), strings.Repeat("v", rng.IntN(200))})
		}
	case 1:
		r.DNS = &DNS{Query: "a.example.", QTypes: []string{"A", "AAAA"}[:rng.IntN(3)], RCode: pick[uint32](rng, 0, 3), TTL: rng.Uint32N(100)}
		r.DNS.IPs, r.DNS.CNames, r.DNS.RRTypes = pick(rng, nil, []string{"192.0.2.1"}), pick(rng, nil, []string{"b.example."}), pick(rng, nil, []string{"A"})
	default:
		r.TLS = &TLS{pick(rng, "", "a.example")}
	}
	return r
}

func TestRequestsEqualGeneratedCode(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	e, o, addresses, rng := world(seed)
	seen := map[string]bool{}
	for range 2000 {
		r := randomRequest(rng, o, addresses)
		got, ok := e.EncodeRequest(r)
		if !ok {
			t.Fatalf("%+v was refused", r)
		}
		compare(t, got, o.request(r), nil, seen)
	}
}

func TestDNSSummary(t *testing.T) {
	for _, tt := range []struct {
		dns      DNS
		response bool
		want     string
	}{
		{DNS{Query: "example.com.", QTypes: []string{"A"}}, false, "DNS Query example.com. A"},
		{DNS{Query: "example.com.", QTypes: []string{"A", "AAAA"}}, false, "DNS Query example.com. A,AAAA"},
		{DNS{Query: "example.com.", QTypes: []string{"A"}, IPs: []string{"1.2.3.4", "5.6.7.8"}, CNames: []string{"a.b."}, TTL: 30}, true,
			`DNS Answer "1.2.3.4,5.6.7.8" CNAMEs: "a.b." TTL: 30 (Proxy example.com. A)`},
		{DNS{Query: "x.", QTypes: []string{"A"}, RCode: 3}, true, "DNS Answer RCode: Non-Existent Domain TTL: 0 (Proxy x. A)"},
		{DNS{Query: "x.", QTypes: []string{"A"}, RCode: 5}, true, "DNS Answer RCode: Query Refused TTL: 0 (Proxy x. A)"},
		{DNS{Query: "x.", QTypes: []string{"AAAA"}, TTL: 5}, true, "DNS Answer  TTL: 5 (Proxy x. AAAA)"},
	} {
		if got := dnsSummary(&tt.dns, tt.response); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}

func TestRequestsThatMakeNoSense(t *testing.T) {
	e, _, _, _ := world(1)
	v4, v6 := netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("[fd00::1]:1")
	for _, r := range []Request{{}, {Client: v4, Server: v4}, {Client: v4, Server: v6, TLS: &TLS{}}, {Client: v4, TLS: &TLS{}}} {
		if _, ok := e.EncodeRequest(&r); ok {
			t.Errorf("%+v was taken", r)
		}
	}
}

// A request on a connection that the kernel told of names the service that the client asked for, and who the ends were then.
func TestRequestOfAKnownConnection(t *testing.T) {
	e, o, _, _ := world(1)
	var r datapath.Record
	r.Type, r.IpVersion, r.Proto, r.Sport, r.Dport, r.Service = datapath.RecordTrace, 4, 6, 41000, 8080, 2
	r.XlatedPort = 5 // its slot
	setAddr(&r.Src.Hi, &r.Src.Lo, netip.MustParseAddr("10.244.1.2"))
	setAddr(&r.Dst.Hi, &r.Dst.Lo, netip.MustParseAddr("192.0.2.1"))
	r.SrcIdentity, r.DstIdentity = 300, 9
	q := &Request{Client: netip.MustParseAddrPort("10.244.1.2:41000"), Server: netip.MustParseAddrPort("192.0.2.1:8080"), Proto: 6, Response: true, Latency: 1,
		ServerIdentity: 2, TLS: &TLS{}}
	// Asked twice before the kernel told of it.
	for range 2 {
		if _, known := e.proxied.of(q); known {
			t.Fatal("it is known already")
		}
	}
	if r.Slot() != 5 || !e.Encode(&r, func(*Flow) {}) {
		t.Fatalf("record %+v", r)
	}
	got, ok := e.EncodeRequest(q)
	if !ok {
		t.Fatal("refused")
	}
	q.ClientIdentity, q.ServerIdentity = 300, 9
	want := o.request(q)
	want.SourceService = &flowpb.Service{Name: "web", Namespace: "default"}
	compare(t, got, want, nil, map[string]bool{})
	for i := range 2 * maxProxied {
		r.Sport, r.Dport = uint16(i), uint16(i>>16)+1
		e.proxied.note(&r)
	}
	if len(e.proxied.young)+len(e.proxied.old) > 2*maxProxied {
		t.Errorf("%d and %d connections", len(e.proxied.young), len(e.proxied.old))
	}
	if _, known := e.proxied.of(q); known {
		t.Error("the oldest connection is still known")
	}
}

// An address keeps a name for an hour at least, and the newest of many.
func TestNamesOfAddresses(t *testing.T) {
	now := time.Unix(1000, 0)
	d := NewDirectory("default", func() time.Time { return now })
	a := netip.MustParseAddr("192.0.2.1")
	expect := func(when string, want ...string) {
		t.Helper()
		if got := d.end(a.As16(), 2).names; !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", when, got, want)
		}
	}
	expect("nothing")
	d.SetName(a, "b.example", time.Minute)
	d.SetName(a, "a.example", 2*time.Hour)
	expect("two", "a.example", "b.example")
	now = now.Add(time.Hour)
	d.Expire()
	expect("an hour later", "a.example")
	for i := range maxNames {
		now = now.Add(time.Second)
		d.SetName(a, fmt.Sprint(i), time.Hour+time.Minute)
	}
	if got := d.end(a.As16(), 2).names; len(got) != maxNames || slices.Contains(got, "a.example") {
		t.Errorf("many: %q: want %d, without the one that ends first", got, maxNames)
	}
	for i := range maxNamed {
		d.SetName(netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), "x", 0)
	}
	if len(d.names) != maxNamed {
		t.Errorf("%d addresses, want %d", len(d.names), maxNamed)
	}
}
