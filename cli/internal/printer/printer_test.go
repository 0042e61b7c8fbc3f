// SPDX-License-Identifier: Apache-2.0

package printer

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/gen/relay"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

var at = timestamppb.New(time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.UTC))

// base is the flow of the sheet's examples: client-abc to server-xyz, first SYN.
func base(change ...func(*flow.Flow)) *flow.Flow {
	f := &flow.Flow{
		Time: at, Verdict: flow.Verdict_FORWARDED, NodeName: "default/worker-1", Type: flow.FlowType_L3_L4,
		IP: &flow.IP{Source: "10.0.1.5", Destination: "10.0.2.9", IpVersion: flow.IPVersion_IPv4},
		L4: &flow.Layer4{Protocol: &flow.Layer4_TCP{TCP: &flow.TCP{
			SourcePort: 41562, DestinationPort: 8080, Flags: &flow.TCPFlags{SYN: true}}}},
		Source:      &flow.Endpoint{ID: 11, Identity: 12345, Namespace: "default", PodName: "client-abc"},
		Destination: &flow.Endpoint{ID: 22, Identity: 23456, Namespace: "prod", PodName: "server-xyz"},
		EventType:   &flow.CiliumEventType{Type: 4}, IsReply: wrapperspb.Bool(false), Summary: "TCP Flags: SYN",
	}
	for _, c := range change {
		c(f)
	}
	return f
}

// reply is the answer to base, seen on its way out of the server's node.
func reply(f *flow.Flow) {
	f.Source, f.Destination = f.Destination, f.Source
	f.IP.Source, f.IP.Destination = f.IP.Destination, f.IP.Source
	tcp := f.L4.GetTCP()
	tcp.SourcePort, tcp.DestinationPort = tcp.DestinationPort, tcp.SourcePort
	f.IsReply, f.EventType.SubType, f.Summary = wrapperspb.Bool(true), 11, "TCP Flags: SYN, ACK"
}

func l7(typ flow.L7FlowType, record *flow.Layer7) func(*flow.Flow) {
	return func(f *flow.Flow) {
		record.Type = typ
		f.L7, f.Type, f.EventType = record, flow.FlowType_L7, &flow.CiliumEventType{Type: 129}
	}
}

func dns(f *flow.Flow) {
	f.L4 = &flow.Layer4{Protocol: &flow.Layer4_UDP{UDP: &flow.UDP{SourcePort: 50000, DestinationPort: 53}}}
}

func policy(verdict flow.Verdict, match uint32, dir flow.TrafficDirection) func(*flow.Flow) {
	return func(f *flow.Flow) {
		f.EventType = &flow.CiliumEventType{Type: 5}
		f.Verdict, f.PolicyMatchType, f.TrafficDirection = verdict, match, dir
	}
}

func response(f *flow.Flow) *observer.GetFlowsResponse {
	return &observer.GetFlowsResponse{ResponseTypes: &observer.GetFlowsResponse_Flow{Flow: f}, NodeName: f.GetNodeName(), Time: f.GetTime()}
}

func lost(e *flow.LostEvent) *observer.GetFlowsResponse {
	return &observer.GetFlowsResponse{ResponseTypes: &observer.GetFlowsResponse_LostEvents{LostEvents: e}, NodeName: "default/worker-1", Time: at}
}

// run prints with fresh options and returns what went to Out and to Err.
func run(t *testing.T, o Options, print func(*Printer) error) (out, errOut string) {
	t.Helper()
	var b, e bytes.Buffer
	o.Out = &b
	if o.Err == nil {
		o.Err = &e
	}
	p := New(o)
	if err := print(p); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String(), e.String()
}

func TestCompact(t *testing.T) {
	denied := func(f *flow.Flow) {
		f.Verdict, f.IsReply = flow.Verdict_DROPPED, nil
		f.EventType = &flow.CiliumEventType{Type: 1, SubType: 133}
	}
	tests := []struct {
		name string
		opts Options
		in   *flow.Flow
		want string
	}{
		{"trace", Options{}, base(),
			"May  6 07:08:09.123: default/client-abc:41562 (ID:12345) -> prod/server-xyz:8080 (ID:23456) to-endpoint FORWARDED (TCP Flags: SYN)"},
		{"reply", Options{}, base(reply),
			"May  6 07:08:09.123: default/client-abc:41562 (ID:12345) <- prod/server-xyz:8080 (ID:23456) to-network FORWARDED (TCP Flags: SYN, ACK)"},
		{"drop", Options{}, base(denied),
			"May  6 07:08:09.123: default/client-abc:41562 (ID:12345) <> prod/server-xyz:8080 (ID:23456) Policy denied DROPPED (TCP Flags: SYN)"},
		{"dns request", Options{}, base(dns, l7(flow.L7FlowType_REQUEST, &flow.Layer7{Record: &flow.Layer7_Dns{Dns: &flow.DNS{ObservationSource: "proxy"}}}), func(f *flow.Flow) { f.Summary = "DNS Query example.com. A" }),
			"May  6 07:08:09.123: default/client-abc:50000 (ID:12345) -> prod/server-xyz:53 (ID:23456) dns-request proxy FORWARDED (DNS Query example.com. A)"},
		{"http response", Options{}, base(reply, l7(flow.L7FlowType_RESPONSE, &flow.Layer7{Record: &flow.Layer7_Http{Http: &flow.HTTP{Code: 200}}}), func(f *flow.Flow) { f.Summary = "HTTP/1.1 200 12ms (GET http://server.prod/api/v1)" }),
			"May  6 07:08:09.123: default/client-abc:41562 (ID:12345) <- prod/server-xyz:8080 (ID:23456) http-response FORWARDED (HTTP/1.1 200 12ms (GET http://server.prod/api/v1))"},
		{"kafka sample", Options{}, base(l7(flow.L7FlowType_SAMPLE, &flow.Layer7{Record: &flow.Layer7_Kafka{Kafka: &flow.Kafka{}}})),
			"May  6 07:08:09.123: default/client-abc:41562 (ID:12345) -> prod/server-xyz:8080 (ID:23456) kafka-sample FORWARDED (TCP Flags: SYN)"},
		{"l7 without record", Options{}, base(l7(flow.L7FlowType_UNKNOWN_L7_TYPE, &flow.Layer7{})),
			"May  6 07:08:09.123: default/client-abc:41562 (ID:12345) -> prod/server-xyz:8080 (ID:23456) l7-unknown_l7_type FORWARDED (TCP Flags: SYN)"},
		{"allowed by", Options{PolicyNames: true}, base(policy(flow.Verdict_FORWARDED, 2, flow.TrafficDirection_EGRESS), func(f *flow.Flow) {
			f.EgressAllowedBy = []*flow.Policy{{Name: "allow-web", Kind: "CiliumNetworkPolicy"}, {Name: "nameless kind"}, {Name: "np1", Kind: "NetworkPolicy"}}
		}),
			"May  6 07:08:09.123: default/client-abc:41562 (ID:12345) -> prod/server-xyz:8080 (ID:23456) policy-verdict:L3-L4 EGRESS ALLOWED BY allow-web (CiliumNetworkPolicy), np1 (NetworkPolicy) (TCP Flags: SYN)"},
		{"denied", Options{}, base(policy(flow.Verdict_DROPPED, 0, flow.TrafficDirection_INGRESS), func(f *flow.Flow) { f.IsReply = nil }),
			"May  6 07:08:09.123: default/client-abc:41562 (ID:12345) <> prod/server-xyz:8080 (ID:23456) policy-verdict:none INGRESS DENIED (TCP Flags: SYN)"},
		{"audited", Options{}, base(policy(flow.Verdict_AUDIT, 0, flow.TrafficDirection_EGRESS), func(f *flow.Flow) { f.AuthType = flow.AuthType_SPIRE }),
			"May  6 07:08:09.123: default/client-abc:41562 (ID:12345) -> prod/server-xyz:8080 (ID:23456) policy-verdict:none EGRESS AUDITED (TCP Flags: SYN; Auth: SPIRE)"},
		{"names", Options{}, base(func(f *flow.Flow) {
			f.Destination = &flow.Endpoint{Identity: 2}
			f.DestinationNames = []string{"example.com", "www.example.com"}
			f.EventType.SubType, f.Summary = 3, "TCP Flags: ACK"
		}),
			"May  6 07:08:09.123: default/client-abc:41562 (ID:12345) -> example.com,www.example.com:8080 (world) to-stack FORWARDED (TCP Flags: ACK)"},
		{"ipv6", Options{}, base(func(f *flow.Flow) {
			f.IP = &flow.IP{Source: "fd00::1", Destination: "2001:db8::1", IpVersion: flow.IPVersion_IPv6}
			f.Source, f.Destination = &flow.Endpoint{Identity: 1}, nil
			f.EventType.SubType, f.Summary = 3, "TCP Flags: ACK"
		}),
			"May  6 07:08:09.123: [fd00::1]:41562 (host) -> [2001:db8::1]:8080 (unknown) to-stack FORWARDED (TCP Flags: ACK)"},
		{"icmp with trace id", Options{}, base(func(f *flow.Flow) {
			f.L4 = &flow.Layer4{Protocol: &flow.Layer4_ICMPv4{ICMPv4: &flow.ICMPv4{Type: 8}}}
			f.IpTraceId, f.IsReply = &flow.IPTraceID{TraceId: 42}, nil
			f.EventType.SubType, f.Summary = 10, "ICMPv4 EchoRequest"
		}),
			"May  6 07:08:09.123: default/client-abc (ID:12345) <> prod/server-xyz (ID:23456) from-network FORWARDED (IP Trace ID: 42; ICMPv4 EchoRequest)"},
		{"no ip", Options{}, &flow.Flow{Time: at, Verdict: flow.Verdict_DROPPED, Summary: "ARP", EventType: &flow.CiliumEventType{Type: 1, SubType: 166},
			Ethernet: &flow.Ethernet{Source: "aa:bb:cc:00:00:01", Destination: "ff:ff:ff:ff:ff:ff"}},
			"May  6 07:08:09.123: aa:bb:cc:00:00:01 (unknown) <> ff:ff:ff:ff:ff:ff (unknown) Unsupported L2 protocol DROPPED (ARP)"},
		{"node", Options{NodeName: true}, base(),
			"May  6 07:08:09.123 [default/worker-1]: default/client-abc:41562 (ID:12345) -> prod/server-xyz:8080 (ID:23456) to-endpoint FORWARDED (TCP Flags: SYN)"},
		{"service", Options{}, base(func(f *flow.Flow) {
			f.Destination = &flow.Endpoint{Namespace: "wrong"}
			f.DestinationService = &flow.Service{Name: "web", Namespace: "prod"}
		}),
			"May  6 07:08:09.123: default/client-abc:41562 (ID:12345) -> prod/web:8080 (unknown) to-endpoint FORWARDED (TCP Flags: SYN)"},
		{"numeric", Options{Numeric: true}, base(),
			"May  6 07:08:09.123: 10.0.1.5:41562 (ID:12345) -> 10.0.2.9:8080 (ID:23456) to-endpoint FORWARDED (TCP Flags: SYN)"},
		{"socket translation", Options{}, base(func(f *flow.Flow) {
			f.Type, f.Verdict, f.EventType = flow.FlowType_SOCK, flow.Verdict_TRANSLATED, &flow.CiliumEventType{Type: 7}
			f.SockXlatePoint, f.Summary = flow.SocketTranslationPoint_SOCK_XLATE_POINT_POST_DIRECTION_FWD, "TCP"
		}),
			"May  6 07:08:09.123: default/client-abc:41562 (ID:12345) -> prod/server-xyz:8080 (ID:23456) post-xlate-fwd TRANSLATED (TCP)"},
		{"empty", Options{}, &flow.Flow{}, "N/A:  (unknown) <>  (unknown) UNKNOWN VERDICT_UNKNOWN ()"},
		{"forged line", Options{}, base(func(f *flow.Flow) { f.Summary = "a\x1b[2J\r\nb\tc\x07\u009b\u202e" }),
			`May  6 07:08:09.123: default/client-abc:41562 (ID:12345) -> prod/server-xyz:8080 (ID:23456) to-endpoint FORWARDED (a^[[2J\r\nb\tc^G\u009b\u202e)`},
		{"time zone and layout", Options{Layout: time.RFC3339, Location: time.FixedZone("", 3600)}, base(),
			"2024-05-06T08:08:09+01:00: default/client-abc:41562 (ID:12345) -> prod/server-xyz:8080 (ID:23456) to-endpoint FORWARDED (TCP Flags: SYN)"},
		{"statistics", Options{Stats: true}, base(withStats(t)),
			"May  6 07:08:09.123: default/client-abc:41562 (ID:12345) -> prod/server-xyz:8080 (ID:23456) to-endpoint FORWARDED (TCP Flags: SYN; > 3/180B < 2/120B handshake 150us srtt 90us retrans 0 final)"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, _ := run(t, tt.opts, func(p *Printer) error { return p.Response(response(tt.in)) })
			if got != tt.want+"\n" {
				t.Errorf("\n got %swant %s", got, tt.want)
			}
		})
	}
}

func withStats(t *testing.T) func(*flow.Flow) {
	t.Helper()
	a, err := anypb.New(&observerv1.FlowStats{
		Forward: &observerv1.DirectionStats{Packets: 3, Bytes: 180}, Reverse: &observerv1.DirectionStats{Packets: 2, Bytes: 120},
		HandshakeRttUs: proto.Uint32(150), SrttUs: proto.Uint32(90), Retransmissions: proto.Uint32(0), Final: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	return func(f *flow.Flow) { f.Extensions = a }
}

func TestColors(t *testing.T) {
	got, _ := run(t, Options{Color: true}, func(p *Printer) error {
		return p.Response(response(base(func(f *flow.Flow) { f.Source.PodName = "a\x1b[31m"; f.AuthType = flow.AuthType_TEST_ALWAYS_FAIL })))
	})
	want := "May  6 07:08:09.123: \x1b[36mdefault/a^[[31m:\x1b[33m41562\x1b[0m\x1b[0m \x1b[35m(ID:12345)\x1b[0m -> \x1b[36mprod/server-xyz:\x1b[33m8080\x1b[0m\x1b[0m \x1b[35m(ID:23456)\x1b[0m to-endpoint \x1b[32mFORWARDED\x1b[0m (TCP Flags: SYN; Auth: \x1b[31mTEST_ALWAYS_FAIL\x1b[0m)\n"
	if got != want {
		t.Errorf("\n got %q\nwant %q", got, want)
	}
	for v, code := range map[flow.Verdict]string{
		flow.Verdict_FORWARDED: "32", flow.Verdict_REDIRECTED: "32", flow.Verdict_DROPPED: "31", flow.Verdict_ERROR: "31",
		flow.Verdict_AUDIT: "33", flow.Verdict_TRACED: "33", flow.Verdict_TRANSLATED: "33",
	} {
		if got := (painter{on: true}).verdict(v, "x"); got != "\x1b["+code+"mx\x1b[0m" {
			t.Errorf("%v: %q", v, got)
		}
	}
	if got := (painter{on: true}).verdict(0, "x"); got != "x" {
		t.Errorf("unknown verdict is coloured: %q", got)
	}
	for _, f := range []Format{Table, JSON, Flat} {
		out, _ := run(t, Options{Format: f, Color: true}, func(p *Printer) error { return p.Response(response(base())) })
		if strings.Contains(out, "\x1b") {
			t.Errorf("format %d is coloured: %q", f, out)
		}
	}
}

var (
	ringLoss = lost(&flow.LostEvent{Source: flow.LostEventSource_PERF_EVENT_RING_BUFFER, NumEventsLost: 17, Cpu: wrapperspb.Int32(3)})
	gap      = &observerv1.Gap{NodeName: "default/worker-1", Place: flowv1.Place_PLACE_RELAY, Cause: flowv1.Cause_CAUSE_MISSING,
		Epoch: 3, First: 100, Last: 116, Count: 17, FirstTime: at, LastTime: timestamppb.New(at.AsTime().Add(time.Second))}
)

func TestLosses(t *testing.T) {
	spanned := proto.CloneOf(ringLoss)
	spanned.GetLostEvents().Source, spanned.GetLostEvents().NumEventsLost, spanned.GetLostEvents().Cpu = flow.LostEventSource_HUBBLE_RING_BUFFER, 5, nil
	spanned.GetLostEvents().First, spanned.GetLostEvents().Last = at, timestamppb.New(at.AsTime().Add(time.Second))
	withdrawn := proto.CloneOf(gap)
	withdrawn.Withdrawn, withdrawn.FirstTime = true, nil
	unnumbered := &observerv1.Gap{NodeName: "default/worker-1", Place: flowv1.Place_PLACE_KERNEL, Cause: flowv1.Cause_CAUSE_SLOW_READER, Count: 2}

	out, _ := run(t, Options{}, func(p *Printer) error {
		for _, r := range []*observer.GetFlowsResponse{ringLoss, spanned} {
			if err := p.Response(r); err != nil {
				return err
			}
		}
		for _, g := range []*observerv1.Gap{gap, withdrawn, unnumbered} {
			if err := p.Record(&observerv1.GetFlowsResponse{Item: &observerv1.GetFlowsResponse_Gap{Gap: g}}); err != nil {
				return err
			}
		}
		return nil
	})
	want := `May  6 07:08:09.123 EVENTS LOST: PERF_EVENT_RING_BUFFER CPU(3) 17
May  6 07:08:09.123 EVENTS LOST: HUBBLE_RING_BUFFER CPU(0) 5 (first: May  6 07:08:09.123, last: May  6 07:08:10.123)
May  6 07:08:09.123 EVENTS LOST: default/worker-1 relay missing 17 (epoch: 3, numbers: 100-116, first: May  6 07:08:09.123, last: May  6 07:08:10.123)
May  6 07:08:10.123 EVENTS FOUND: default/worker-1 relay missing 17 (epoch: 3, numbers: 100-116)
N/A EVENTS LOST: default/worker-1 kernel slow reader 2
`
	if out != want {
		t.Errorf("compact\n%swant\n%s", out, want)
	}

	both := func(p *Printer) error {
		if err := p.Response(ringLoss); err != nil {
			return err
		}
		return p.Gap(unnumbered)
	}
	if out, _ = run(t, Options{Format: Dict, NodeName: true}, both); out != `  TIMESTAMP: May  6 07:08:09.123
       NODE: default/worker-1
     SOURCE: PERF_EVENT_RING_BUFFER
       TYPE: EVENTS LOST
    VERDICT: -
    SUMMARY: CPU(3) - 17
------------
  TIMESTAMP: N/A
       NODE: default/worker-1
     SOURCE: default/worker-1 kernel
       TYPE: EVENTS LOST
    VERDICT: -
    SUMMARY: slow reader - 2
` {
		t.Errorf("dict\n%s", out)
	}
	if out, _ = run(t, Options{Format: Table}, both); out != `TIMESTAMP             SOURCE                    DESTINATION   TYPE          VERDICT   SUMMARY
May  6 07:08:09.123   PERF_EVENT_RING_BUFFER    -             EVENTS LOST   -         CPU(3) - 17
N/A                   default/worker-1 kernel   -             EVENTS LOST   -         slow reader - 2
` {
		t.Errorf("table\n%s", out)
	}
	if out, _ = run(t, Options{Format: JSON}, both); out != `{"lost_events":{"source":"PERF_EVENT_RING_BUFFER","num_events_lost":"17","cpu":3},"node_name":"default/worker-1","time":"2024-05-06T07:08:09.123456789Z"}
{"gap":{"node_name":"default/worker-1","place":"PLACE_KERNEL","cause":"CAUSE_SLOW_READER","count":"2"},"node_name":"default/worker-1"}
` {
		t.Errorf("json\n%s", out)
	}
	out, errOut := run(t, Options{Format: Flat}, both)
	if out != "" || errOut != "May  6 07:08:09.123 EVENTS LOST: PERF_EVENT_RING_BUFFER CPU(3) 17\nN/A EVENTS LOST: default/worker-1 kernel slow reader 2\n" {
		t.Errorf("flat: out %q, err %q", out, errOut)
	}
}

func TestDictAndTable(t *testing.T) {
	two := func(p *Printer) error {
		if err := p.Response(response(base())); err != nil {
			return err
		}
		return p.Response(response(base(reply)))
	}
	out, _ := run(t, Options{Format: Dict}, two)
	if want := `  TIMESTAMP: May  6 07:08:09.123
     SOURCE: default/client-abc:41562
DESTINATION: prod/server-xyz:8080
       TYPE: to-endpoint
    VERDICT: FORWARDED
    SUMMARY: TCP Flags: SYN
------------
  TIMESTAMP: May  6 07:08:09.123
     SOURCE: prod/server-xyz:8080
DESTINATION: default/client-abc:41562
       TYPE: to-network
    VERDICT: FORWARDED
    SUMMARY: TCP Flags: SYN, ACK
`; out != want {
		t.Errorf("dict\n%s", out)
	}
	out, _ = run(t, Options{Format: Table}, two)
	if want := `TIMESTAMP             SOURCE                     DESTINATION                TYPE          VERDICT     SUMMARY
May  6 07:08:09.123   default/client-abc:41562   prod/server-xyz:8080       to-endpoint   FORWARDED   TCP Flags: SYN
May  6 07:08:09.123   prod/server-xyz:8080       default/client-abc:41562   to-network    FORWARDED   TCP Flags: SYN, ACK
`; out != want {
		t.Errorf("table\n%s", out)
	}
	out, _ = run(t, Options{Format: Table, NodeName: true}, func(p *Printer) error { return p.Response(response(base())) })
	if want := `TIMESTAMP             NODE               SOURCE                     DESTINATION            TYPE          VERDICT     SUMMARY
May  6 07:08:09.123   default/worker-1   default/client-abc:41562   prod/server-xyz:8080   to-endpoint   FORWARDED   TCP Flags: SYN
`; out != want {
		t.Errorf("table with node\n%s", out)
	}
}

func TestJSON(t *testing.T) {
	f := base(func(f *flow.Flow) {
		f.Uuid, f.Verdict, f.DropReason, f.DropReasonDesc = "u-1", flow.Verdict_DROPPED, 133, flow.DropReason_POLICY_DENIED
		f.EventType, f.TrafficDirection, f.IsReply = &flow.CiliumEventType{Type: 1, SubType: 133}, flow.TrafficDirection_EGRESS, nil
		f.Source.Labels = []string{"k8s:app=client"}
	})
	out, _ := run(t, Options{Format: JSON}, func(p *Printer) error { return p.Response(response(f)) })
	want := `{"flow":{"time":"2024-05-06T07:08:09.123456789Z","uuid":"u-1","verdict":"DROPPED","drop_reason":133,"IP":{"source":"10.0.1.5","destination":"10.0.2.9","ipVersion":"IPv4"},"l4":{"TCP":{"source_port":41562,"destination_port":8080,"flags":{"SYN":true}}},"source":{"ID":11,"identity":12345,"namespace":"default","labels":["k8s:app=client"],"pod_name":"client-abc"},"destination":{"ID":22,"identity":23456,"namespace":"prod","pod_name":"server-xyz"},"Type":"L3_L4","node_name":"default/worker-1","event_type":{"type":1,"sub_type":133},"traffic_direction":"EGRESS","drop_reason_desc":"POLICY_DENIED","Summary":"TCP Flags: SYN"},"node_name":"default/worker-1","time":"2024-05-06T07:08:09.123456789Z"}` + "\n"
	if out != want {
		t.Errorf("\n got %swant %s", out, want)
	}

	// Statistics resolve; an extension of unknown type costs only itself.
	out, _ = run(t, Options{Format: JSON}, func(p *Printer) error {
		return p.Response(response(&flow.Flow{Extensions: base(withStats(t)).Extensions}))
	})
	if want := `{"flow":{"extensions":{"@type":"type.googleapis.com/weir.observer.v1.FlowStats","forward":{"packets":"3","bytes":"180"},"reverse":{"packets":"2","bytes":"120"},"handshake_rtt_us":150,"srtt_us":90,"retransmissions":0,"final":true}}}` + "\n"; out != want {
		t.Errorf("statistics\n got %swant %s", out, want)
	}
	foreign := &flow.Flow{NodeName: "a&b", Extensions: &anypb.Any{TypeUrl: "type.googleapis.com/no.such.Type"}}
	out, _ = run(t, Options{Format: JSON}, func(p *Printer) error { return p.Response(response(foreign)) })
	if want := `{"flow":{"node_name":"a\u0026b"},"node_name":"a\u0026b"}` + "\n"; out != want {
		t.Errorf("unknown extension\n got %swant %s", out, want)
	}
	if foreign.Extensions == nil {
		t.Error("printing changed the flow")
	}
}

func TestFlat(t *testing.T) {
	f := base(withStats(t), func(f *flow.Flow) {
		f.Verdict, f.DropReason, f.DropReasonDesc = flow.Verdict_DROPPED, 189, flow.DropReason_AUTH_REQUIRED
		f.SocketCookie = 1<<53 - 1
	})
	out, _ := run(t, Options{Format: Flat}, func(p *Printer) error { return p.Response(response(f)) })
	var got struct {
		Desc   string `json:"drop_reason_desc"`
		Cookie uint64 `json:"socket_cookie"`
		Stats  struct {
			Forward struct{ Packets, Bytes uint64 }
		}
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if got.Desc != "Authentication required" || got.Cookie != 1<<53-1 || got.Stats.Forward.Bytes != 180 || strings.Count(out, "\n") != 1 {
		t.Errorf("%+v from %s", got, out)
	}
}

func TestNodeStatus(t *testing.T) {
	status := func(state relay.NodeState, message string, names ...string) *observer.GetFlowsResponse {
		return &observer.GetFlowsResponse{ResponseTypes: &observer.GetFlowsResponse_NodeStatus{NodeStatus: &relay.NodeStatusEvent{
			StateChange: state, NodeNames: names, Message: message}}, NodeName: "relay-host", Time: at}
	}
	all := []*observer.GetFlowsResponse{
		status(relay.NodeState_NODE_CONNECTED, "", "default/worker-1", "default/worker-2", "default/worker-3", "default/worker-4", "default/worker-5"),
		status(relay.NodeState_NODE_UNAVAILABLE, "", "default/worker-6"),
		status(relay.NodeState_NODE_ERROR, "boom", "default/worker-7"),
		status(relay.NodeState_NODE_GONE, "", "default/worker-8"),
	}
	print := func(p *Printer) error {
		for _, r := range all {
			if err := p.Response(r); err != nil {
				return err
			}
		}
		return nil
	}
	out, errOut := run(t, Options{Debug: true}, print)
	if want := `May  6 07:08:09.123 [relay-host]: Receiving flows from 5 nodes: default/worker-1, default/worker-2 (and 3 more)
May  6 07:08:09.123 [relay-host]: 1 nodes are unavailable: default/worker-6
May  6 07:08:09.123 [relay-host]: Error "boom" on 1 nodes: default/worker-7
May  6 07:08:09.123 [relay-host]: 1 nodes removed from cluster: default/worker-8
`; errOut != want || out != "" {
		t.Errorf("debug: out %q, err\n%s", out, errOut)
	}
	if _, errOut = run(t, Options{Format: Flat}, print); strings.Count(errOut, "\n") != 2 {
		t.Errorf("without debug only unavailable and error are shown:\n%s", errOut)
	}
	if _, errOut = run(t, Options{Format: JSON}, print); !strings.HasPrefix(errOut, `{"node_status":{"state_change":"NODE_UNAVAILABLE","node_names":["default/worker-6"]},"node_name":"relay-host","time":"2024-05-06T07:08:09.123456789Z"}`+"\n") {
		t.Errorf("json: %s", errOut)
	}
	if _, errOut = run(t, Options{Format: Dict}, print); errOut != `  TIMESTAMP: May  6 07:08:09.123
      STATE: NODE_UNAVAILABLE
      NODES: default/worker-6
    MESSAGE: N/A
------------
  TIMESTAMP: May  6 07:08:09.123
      STATE: NODE_ERROR
      NODES: default/worker-7
    MESSAGE: "boom"
` {
		t.Errorf("dict\n%s", errOut)
	}
	// Err = nil silences them.
	p := New(Options{Out: &bytes.Buffer{}})
	if err := print(p); err != nil {
		t.Error(err)
	}
}
