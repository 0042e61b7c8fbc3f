// SPDX-License-Identifier: Apache-2.0

package filter

import (
	"errors"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/services/observer/internal/testflow"
)

// base is node-1's flow from default/client-6f9c4-abcde (10.244.1.5:32770) to prod/server-7d8f-vwxyz
// (10.244.2.7:8080), not a reply.
func base(change ...func(*flow.Flow)) *flow.Flow {
	f := testflow.Flow("node-1", 2, testflow.Base)
	for _, c := range change {
		c(f)
	}
	return f
}

func http(code uint32, method, url string, headers ...string) *flow.Flow {
	return base(func(f *flow.Flow) {
		h := &flow.HTTP{Code: code, Method: method, Url: url}
		for i := 0; i < len(headers); i += 2 {
			h.Headers = append(h.Headers, &flow.HTTPHeader{Key: headers[i], Value: headers[i+1]})
		}
		f.Type, f.EventType = flow.FlowType_L7, &flow.CiliumEventType{Type: 129}
		f.L7 = &flow.Layer7{Type: flow.L7FlowType_RESPONSE, Record: &flow.Layer7_Http{Http: h}}
	})
}

func layer4(l *flow.Layer4) *flow.Flow { return base(func(f *flow.Flow) { f.L4 = l }) }

func verdict(v flow.Verdict) func(*flow.Flow) { return func(f *flow.Flow) { f.Verdict = v } }

type ff = flow.FlowFilter

// cases: a filter, flows that match, flows that do not. Every field of FlowFilter is here
// (TestEveryField sees to it), with both sides where there are two.
func cases() []struct {
	name     string
	filter   *ff
	yes, not []*flow.Flow
} {
	tcp := func(flags *flow.TCPFlags) *flow.Flow {
		return layer4(&flow.Layer4{Protocol: &flow.Layer4_TCP{TCP: &flow.TCP{SourcePort: 1, DestinationPort: 2, Flags: flags}}})
	}
	udp := layer4(&flow.Layer4{Protocol: &flow.Layer4_UDP{UDP: &flow.UDP{SourcePort: 53, DestinationPort: 5353}}})
	sctp := layer4(&flow.Layer4{Protocol: &flow.Layer4_SCTP{SCTP: &flow.SCTP{SourcePort: 53, DestinationPort: 5353}}})
	icmp4 := layer4(&flow.Layer4{Protocol: &flow.Layer4_ICMPv4{ICMPv4: &flow.ICMPv4{Type: 8}}})
	icmp6 := layer4(&flow.Layer4{Protocol: &flow.Layer4_ICMPv6{ICMPv6: &flow.ICMPv6{Type: 128}}})
	vrrp := layer4(&flow.Layer4{Protocol: &flow.Layer4_VRRP{VRRP: &flow.VRRP{}}})
	igmp := layer4(&flow.Layer4{Protocol: &flow.Layer4_IGMP{IGMP: &flow.IGMP{}}})
	dns := base(func(f *flow.Flow) {
		f.L7 = &flow.Layer7{Record: &flow.Layer7_Dns{Dns: &flow.DNS{Query: "www.example.com."}}}
	})
	kafka := base(func(f *flow.Flow) { f.L7 = &flow.Layer7{Record: &flow.Layer7_Kafka{Kafka: &flow.Kafka{}}} })
	none := &flow.Flow{}
	ip := func(source, destination, xlated string) *flow.Flow {
		return base(func(f *flow.Flow) {
			f.IP = &flow.IP{Source: source, Destination: destination, SourceXlated: xlated, IpVersion: flow.IPVersion_IPv6}
		})
	}
	names := func(source, destination []string) *flow.Flow {
		return base(func(f *flow.Flow) { f.SourceNames, f.DestinationNames = source, destination })
	}
	labels := func(list ...string) *flow.Flow { return base(func(f *flow.Flow) { f.Source.Labels = list }) }
	services := base(func(f *flow.Flow) {
		f.SourceService = &flow.Service{Namespace: "a", Name: "front"}
		f.DestinationService = &flow.Service{Namespace: "b", Name: "back"}
	})
	node := func(name string) *flow.Flow { return base(func(f *flow.Flow) { f.NodeName = name }) }
	reply := func(r *wrapperspb.BoolValue, v flow.Verdict) *flow.Flow {
		return base(func(f *flow.Flow) { f.IsReply, f.Verdict = r, v })
	}
	event := func(t, sub int32) *flow.Flow {
		return base(func(f *flow.Flow) { f.EventType = &flow.CiliumEventType{Type: t, SubType: sub} })
	}
	type c = struct {
		name     string
		filter   *ff
		yes, not []*flow.Flow
	}
	fl := func(f ...*flow.Flow) []*flow.Flow { return f }
	return []c{
		{"empty", &ff{}, fl(base(), none), nil},
		{"uuid", &ff{Uuid: []string{"x", "flow-2"}}, fl(base()), fl(none)},
		{"and", &ff{Uuid: []string{"flow-2"}, SourcePod: []string{"/other"}}, nil, fl(base())},

		{"source_ip", &ff{SourceIp: []string{"10.244.1.5"}}, fl(base()), fl(none, ip("10.244.1.50", "10.244.1.5", ""))},
		{"source_ip, prefix", &ff{SourceIp: []string{"1.1.1.1", "10.244.0.0/16"}}, fl(base()), fl(none, ip("10.245.1.5", "", ""), ip("broken", "", ""))},
		{"source_ip, text equality", &ff{SourceIp: []string{"fd00::1"}}, fl(ip("fd00::1", "", "")), fl(ip("fd00:0::1", "", ""))},
		{"source_ip, v6 prefix", &ff{SourceIp: []string{"fd00::/64"}}, fl(ip("fd00:0::1", "", "")), fl(base(), ip("fd01::1", "", ""))},
		{"destination_ip", &ff{DestinationIp: []string{"10.244.2.7"}}, fl(base()), fl(none, ip("10.244.2.7", "1.1.1.1", ""))},
		{"source_ip_xlated", &ff{SourceIpXlated: []string{"192.0.2.0/24"}}, fl(ip("1.1.1.1", "", "192.0.2.9")), fl(base(), none)},

		{"source_pod, default namespace", &ff{SourcePod: []string{"client-"}}, fl(base()), fl(none, base(func(f *flow.Flow) { f.Source.Namespace = "prod" }))},
		{"source_pod, namespace and prefix", &ff{SourcePod: []string{"default/cli"}}, fl(base()), fl(base(func(f *flow.Flow) { f.Source.PodName = "x-client" }))},
		{"source_pod, namespace", &ff{SourcePod: []string{"default/"}}, fl(base(), base(func(f *flow.Flow) { f.Source.PodName = "" })),
			fl(none, base(func(f *flow.Flow) { f.Source.Namespace = "default2" }))},
		{"source_pod, any namespace", &ff{SourcePod: []string{"/client"}}, fl(base(), base(func(f *flow.Flow) { f.Source.Namespace = "x" })), fl(none)},
		{"source_pod, anything", &ff{SourcePod: []string{"/"}}, fl(base()), fl(none)},
		{"destination_pod", &ff{DestinationPod: []string{"prod/server", "x"}}, fl(base()), fl(none, base(func(f *flow.Flow) { f.Source, f.Destination = f.Destination, f.Source }))},

		{"source_fqdn", &ff{SourceFqdn: []string{"*.Example.com."}}, fl(names([]string{"x", "www.example.com"}, nil), names([]string{"a.b.example.com"}, nil)),
			fl(base(), names([]string{"example.com", "wwwexample.com", "www.example.com.au", "a_b.example.com"}, nil), names(nil, []string{"www.example.com"}))},
		{"destination_fqdn", &ff{DestinationFqdn: []string{"a_b.c"}}, fl(names(nil, []string{"a_b.c"})), fl(names([]string{"a_b.c"}, []string{"axb.c", "a_bxc"}))},

		{"source_label, any source", &ff{SourceLabel: []string{"app=client"}}, fl(base(), labels("any:app=client"), labels("app=client")),
			fl(none, labels("k8s:app=clients"), labels("k8s:app2=client"))},
		{"source_label, source", &ff{SourceLabel: []string{"k8s:app==client"}}, fl(base()), fl(labels("container:app=client"))},
		{"source_label, and", &ff{SourceLabel: []string{"app=client,k8s:io.kubernetes.pod.namespace = default"}}, fl(base()), fl(labels("k8s:app=client"))},
		{"source_label, or", &ff{SourceLabel: []string{"app=x", "app=client"}}, fl(base()), fl(none)},
		{"source_label, not equal", &ff{SourceLabel: []string{"app!=client"}}, fl(none, labels("k8s:app=x"), labels("k8s:b=client")), fl(base())},
		{"source_label, in", &ff{SourceLabel: []string{"app in (x, client)"}}, fl(base()), fl(none, labels("k8s:app=y"))},
		{"source_label, notin", &ff{SourceLabel: []string{"app notin (x,client),io.kubernetes.pod.namespace"}}, fl(labels("k8s:app=y", "k8s:io.kubernetes.pod.namespace=a")), fl(base(), labels("k8s:app=y"))},
		{"source_label, exists", &ff{SourceLabel: []string{"reserved:host"}}, fl(labels("reserved:host")), fl(base(), labels("k8s:host"))},
		{"source_label, absent", &ff{SourceLabel: []string{"! app"}}, fl(none, labels("k8s:b=c")), fl(base())},
		{"source_label, empty value", &ff{SourceLabel: []string{"app="}}, fl(labels("k8s:app="), labels("k8s:app")), fl(base(), none)},
		{"source_label, greater", &ff{SourceLabel: []string{"tier > 2, tier < 5"}}, fl(labels("k8s:tier=3")), fl(base(), labels("k8s:tier=2"), labels("k8s:tier=5"), labels("k8s:tier=x"))},
		{"source_label, cidr", &ff{SourceLabel: []string{"cidr:10.0.0.0/8"}}, fl(labels("cidr:10.1.0.0/16"), labels("cidr:10.0.0.0/8")),
			fl(base(), labels("cidr:11.0.0.0/8"), labels("cidr:0.0.0.0/0"), labels("k8s:10.1.0.0/16"))},
		{"source_label, cidr v6", &ff{SourceLabel: []string{"cidr:2001-db8--0/32"}}, fl(labels("cidr:2001-db8-1--0/48")), fl(labels("cidr:2001-db9--0/48"))},
		{"destination_label", &ff{DestinationLabel: []string{"app=server"}}, fl(base()), fl(none, base(func(f *flow.Flow) { f.Destination.Labels = nil }))},
		{"node_labels", &ff{NodeLabels: []string{"kubernetes.io/hostname=node-1"}}, fl(base()), fl(none)},

		{"source_service", &ff{SourceService: []string{"a/fr"}}, fl(services), fl(base(), none)},
		{"source_service, default namespace", &ff{SourceService: []string{"front"}}, nil, fl(services)},
		{"destination_service", &ff{DestinationService: []string{"/back"}}, fl(services), fl(base(), none)},
		{"source_workload", &ff{SourceWorkload: []*flow.Workload{{Name: "x"}, {Kind: "Deployment", Name: "client"}}}, fl(base()), fl(none)},
		{"source_workload, name", &ff{SourceWorkload: []*flow.Workload{{Name: "client"}}}, fl(base()), fl(base(func(f *flow.Flow) { f.Source.Workloads[0].Name = "client2" }))},
		{"destination_workload, kind", &ff{DestinationWorkload: []*flow.Workload{{Kind: "Deployment"}}}, fl(base()), fl(none, base(func(f *flow.Flow) { f.Destination.Workloads[0].Kind = "DaemonSet" }))},
		{"source_cluster_name", &ff{SourceClusterName: []string{"default"}}, fl(base()), fl(none)},
		{"destination_cluster_name", &ff{DestinationClusterName: []string{"default"}}, fl(base()), fl(none, base(func(f *flow.Flow) { f.Destination.ClusterName = "default-2" }))},
		{"source_identity", &ff{SourceIdentity: []uint32{1, 12345}}, fl(base()), fl(none)},
		{"source_identity 0 needs an endpoint", &ff{SourceIdentity: []uint32{0}}, fl(base(func(f *flow.Flow) { f.Source = &flow.Endpoint{} })), fl(none, base())},
		{"destination_identity", &ff{DestinationIdentity: []uint32{23456}}, fl(base()), fl(none)},
		{"source_port", &ff{SourcePort: []string{"53", "32770"}}, fl(base(), udp, sctp), fl(none, icmp4)},
		{"source_port 0", &ff{SourcePort: []string{"0"}}, fl(layer4(&flow.Layer4{Protocol: &flow.Layer4_UDP{UDP: &flow.UDP{}}})), fl(none, icmp4)},
		{"destination_port", &ff{DestinationPort: []string{"8080"}}, fl(base()), fl(none, udp)},

		{"traffic_direction", &ff{TrafficDirection: []flow.TrafficDirection{flow.TrafficDirection_EGRESS}}, fl(base()), fl(none)},
		{"verdict", &ff{Verdict: []flow.Verdict{flow.Verdict_ERROR, flow.Verdict_FORWARDED}}, fl(base()), fl(none, base(verdict(flow.Verdict_DROPPED)))},
		{"drop_reason_desc", &ff{DropReasonDesc: []flow.DropReason{flow.DropReason_POLICY_DENIED}},
			fl(base(verdict(flow.Verdict_DROPPED), func(f *flow.Flow) { f.DropReasonDesc = flow.DropReason_POLICY_DENIED })),
			fl(none, base(func(f *flow.Flow) { f.DropReasonDesc = flow.DropReason_POLICY_DENIED }), base(verdict(flow.Verdict_DROPPED)))},
		{"interface, name", &ff{Interface: []*flow.NetworkInterface{{Name: "wr0123456789"}}}, fl(base()), fl(none, base(func(f *flow.Flow) { f.Interface.Name = "x" }))},
		{"interface, index", &ff{Interface: []*flow.NetworkInterface{{Index: 7}}}, fl(base()), fl(none, base(func(f *flow.Flow) { f.Interface.Index = 8 }))},
		{"event_type", &ff{EventType: []*flow.EventTypeFilter{{Type: 4}}}, fl(base(), event(4, 3)), fl(none, event(1, 0))},
		{"event_type, sub type", &ff{EventType: []*flow.EventTypeFilter{{Type: 4, MatchSubType: true}}}, fl(base()), fl(none, event(4, 3))},
		{"event_type, any type", &ff{EventType: []*flow.EventTypeFilter{{MatchSubType: true, SubType: 3}}}, fl(event(1, 3)), fl(base(), none)},
		{"event_type, any", &ff{EventType: []*flow.EventTypeFilter{{}}}, fl(base()), fl(none)},
		{"reply", &ff{Reply: []bool{false}}, fl(base(), reply(nil, flow.Verdict_DROPPED)), fl(reply(nil, flow.Verdict_FORWARDED), reply(wrapperspb.Bool(true), flow.Verdict_DROPPED))},
		{"reply, true", &ff{Reply: []bool{true}}, fl(reply(wrapperspb.Bool(true), flow.Verdict_FORWARDED)), fl(base(), none, reply(nil, flow.Verdict_DROPPED))},
		{"node_name", &ff{NodeName: []string{"node-1"}}, fl(base(), node("other/node-1"), node("node-1")), fl(none, node("default/node-11"))},
		{"node_name, cluster", &ff{NodeName: []string{"default/node-*"}}, fl(base(), node("node-7")), fl(none, node("other/node-1"))},
		{"node_name, whole cluster", &ff{NodeName: []string{"other/"}}, fl(node("other/x.y")), fl(base(), none)},
		{"node_name, any cluster", &ff{NodeName: []string{"/node-1"}}, fl(base(), node("other/node-1")), fl(none, node("other/node-2"))},
		{"ip_version", &ff{IpVersion: []flow.IPVersion{flow.IPVersion_IPv4}}, fl(base()), fl(none, ip("", "", ""))},
		{"ip_version, none", &ff{IpVersion: []flow.IPVersion{flow.IPVersion_IP_NOT_USED}}, fl(none), fl(base())},
		{"encrypted", &ff{Encrypted: []bool{true}}, fl(base(func(f *flow.Flow) { f.IP.Encrypted = true })), fl(base(), none)},
		{"encrypted, not", &ff{Encrypted: []bool{false}}, fl(base(), none), fl(base(func(f *flow.Flow) { f.IP.Encrypted = true }))},
		{"trace_id", &ff{TraceId: []string{"abc"}}, fl(base(func(f *flow.Flow) { f.TraceContext = &flow.TraceContext{Parent: &flow.TraceParent{TraceId: "abc"}} })), fl(base(), none)},
		{"ip_trace_id", &ff{IpTraceId: []uint64{7}}, fl(base(func(f *flow.Flow) { f.IpTraceId = &flow.IPTraceID{TraceId: 7} })), fl(base(), none)},

		{"protocol, icmp", &ff{Protocol: []string{"ICMP"}}, fl(icmp4, icmp6), fl(base(), none)},
		{"protocol, icmpv4", &ff{Protocol: []string{"icmpv4"}}, fl(icmp4), fl(icmp6)},
		{"protocol, icmpv6", &ff{Protocol: []string{"icmpv6"}}, fl(icmp6), fl(icmp4)},
		{"protocol, tcp or udp", &ff{Protocol: []string{"tcp", "UDP"}}, fl(base(), udp), fl(sctp, none)},
		{"protocol, sctp", &ff{Protocol: []string{"sctp"}}, fl(sctp), fl(base())},
		{"protocol, vrrp igmp", &ff{Protocol: []string{"vrrp", "igmp"}}, fl(vrrp, igmp), fl(base())},
		{"protocol, l7", &ff{Protocol: []string{"dns", "http", "kafka"}}, fl(dns, kafka, http(200, "", "")), fl(base())},
		{"tcp_flags", &ff{TcpFlags: []*flow.TCPFlags{{SYN: true, ACK: true}, {RST: true}}},
			fl(tcp(&flow.TCPFlags{SYN: true, ACK: true, ECE: true}), tcp(&flow.TCPFlags{RST: true})), fl(tcp(&flow.TCPFlags{SYN: true}), tcp(nil), udp, none)},
		{"tcp_flags, each", &ff{TcpFlags: []*flow.TCPFlags{{FIN: true, PSH: true, URG: true, CWR: true, NS: true, ECE: true}}},
			fl(tcp(&flow.TCPFlags{FIN: true, PSH: true, URG: true, CWR: true, NS: true, ECE: true})), fl(tcp(&flow.TCPFlags{FIN: true, PSH: true, URG: true, CWR: true, ECE: true}))},

		{"http_status_code", &ff{HttpStatusCode: []string{"404", "5+"}}, fl(http(404, "", ""), http(503, "", "")), fl(http(400, "", ""), http(0, "", ""), base())},
		{"http_status_code, two digits", &ff{HttpStatusCode: []string{"40+"}}, fl(http(404, "", "")), fl(http(414, "", ""))},
		{"http_status_code, with l7", &ff{HttpStatusCode: []string{"404"}, EventType: []*flow.EventTypeFilter{{Type: 1}, {Type: 129}}}, fl(http(404, "", "")), fl(base())},
		{"http_method", &ff{HttpMethod: []string{"get"}}, fl(http(0, "GET", "")), fl(http(0, "POST", ""), base())},
		{"http_path", &ff{HttpPath: []string{"^/a+$", "/b"}}, fl(http(0, "", "http://h/aa?x"), http(0, "", "/x/b")), fl(http(0, "", "http://h/c?/b"), http(0, "", "no url"), http(0, "", ""), base())},
		{"http_url", &ff{HttpUrl: []string{`\?x=1`}}, fl(http(0, "", "http://h/?x=1")), fl(http(0, "", "http://h/"), base())},
		{"http_header", &ff{HttpHeader: []*flow.HTTPHeader{{Key: "K", Value: "v"}}}, fl(http(0, "", "", "a", "b", "K", "v")), fl(http(0, "", "", "k", "v"), http(0, "", "", "K", "V"), base())},
		{"dns_query", &ff{DnsQuery: []string{`example\.com\.$`}}, fl(dns), fl(base(), none)},

		{"experimental", &ff{Experimental: &flow.FlowFilter_Experimental{CelExpression: []string{"_flow.uuid == 'x'", "_flow.verdict == Verdict.FORWARDED && _flow.l4.TCP.destination_port == uint(8080)"}}},
			fl(base()), fl(udp, none)},
		{"experimental, run-time error", &ff{Experimental: &flow.FlowFilter_Experimental{CelExpression: []string{"_flow.source.labels[0] == 'k8s:app=client'"}}}, fl(base()), fl(none)},
	}
}

// decode returns the flow as the observer decodes it for a filter: only the fields that it reads.
func decode(t *testing.T, f *Filter, fl *flow.Flow) *flow.Flow {
	t.Helper()
	data, err := proto.Marshal(fl)
	if err != nil {
		t.Fatal(err)
	}
	if m := f.Fields(); m != nil {
		data = m.Append(nil, data)
	}
	out := &flow.Flow{}
	if err := proto.Unmarshal(data, out); err != nil {
		t.Fatal(err)
	}
	return out
}

// header is the header of a batch that holds just this flow.
func headerOf(fl *flow.Flow) *batch.Header {
	h := testflow.Batch("node-1", 1, 1, testflow.Record(fl)).GetHeader()
	cluster, node, found := strings.Cut(fl.GetNodeName(), "/")
	if !found {
		cluster, node = "default", cluster
	}
	return &batch.Header{Node: node, Cluster: cluster, Namespaces: h.GetNamespaces(), Verdicts: h.GetVerdicts(), EventTypes: h.GetEventTypes()}
}

func TestFields(t *testing.T) {
	for _, tt := range cases() {
		t.Run(tt.name, func(t *testing.T) {
			white, err := Compile([]*ff{tt.filter}, nil)
			if err != nil {
				t.Fatal(err)
			}
			black, err := Compile(nil, []*ff{tt.filter})
			if err != nil {
				t.Fatal(err)
			}
			try := func(fl *flow.Flow, want bool) {
				t.Helper()
				for what, seen := range map[string]*flow.Flow{"whole": fl, "as decoded": decode(t, white, fl)} {
					if got := white.Match(seen); got != want {
						t.Errorf("%s: match = %t, want %t, of %v", what, got, want, fl)
					}
					if got := black.Match(seen); got == want {
						t.Errorf("%s: on the blacklist: match = %t, of %v", what, got, fl)
					}
				}
				if want && !white.MayMatch(headerOf(fl)) {
					t.Errorf("the batch is skipped of %v", fl)
				}
			}
			for _, fl := range tt.yes {
				try(fl, true)
			}
			for _, fl := range tt.not {
				try(fl, false)
			}
		})
	}
}

// TestEveryField: each field of the message has a row, a matching case and one that does not.
func TestEveryField(t *testing.T) {
	rows := map[string]bool{}
	for _, f := range fields() {
		rows[f.name] = true
	}
	yes, not := map[string]bool{}, map[string]bool{}
	for _, c := range cases() {
		name, _, _ := strings.Cut(c.name, ",")
		name, _, _ = strings.Cut(name, " ")
		yes[name], not[name] = yes[name] || len(c.yes) > 0, not[name] || len(c.not) > 0
	}
	all := (&ff{}).ProtoReflect().Descriptor().Fields()
	for i := range all.Len() {
		name := string(all.Get(i).Name())
		if !rows[name] || !yes[name] || !not[name] {
			t.Errorf("%s: row %t, matching case %t, other case %t", name, rows[name], yes[name], not[name])
		}
	}
}

func TestErrors(t *testing.T) {
	l7 := []*flow.EventTypeFilter{{Type: 4}}
	tests := []struct {
		field  string
		filter *ff
		want   string
	}{
		{"source_ip", &ff{SourceIp: []string{"x"}}, `invalid IP address "x" in filter: `},
		{"source_ip", &ff{SourceIp: []string{"1.2.3.4/40"}}, `invalid IP prefix "1.2.3.4/40" in filter: `},
		{"destination_ip", &ff{DestinationIp: []string{""}}, `invalid IP address "" in filter: `},
		{"source_ip_xlated", &ff{SourceIpXlated: []string{"/"}}, `invalid IP prefix "/" in filter: `},
		{"source_pod", &ff{SourcePod: []string{""}}, "invalid filter, name must not be empty"},
		{"destination_pod", &ff{DestinationPod: []string{"a", ""}}, "invalid filter, name must not be empty"},
		{"source_service", &ff{SourceService: []string{""}}, "invalid source service filter: invalid filter, name must not be empty"},
		{"destination_service", &ff{DestinationService: []string{""}}, "invalid destination service filter: invalid filter, name must not be empty"},
		{"source_cluster_name", &ff{SourceClusterName: []string{""}}, "invalid filter, name must not be empty"},
		{"source_fqdn", &ff{SourceFqdn: []string{"a b"}}, "' ': invalid rune in pattern"},
		{"source_fqdn", &ff{SourceFqdn: []string{"."}}, "empty pattern"},
		{"destination_fqdn", &ff{DestinationFqdn: []string{"a.."}}, "multiple trailing dots in pattern"},
		{"source_label", &ff{SourceLabel: []string{"a in x"}}, "invalid source label filter: "},
		{"source_label", &ff{SourceLabel: []string{"a in (x"}}, "invalid source label filter: "},
		{"source_label", &ff{SourceLabel: []string{"a=b c"}}, "invalid source label filter: "},
		{"source_label", &ff{SourceLabel: []string{"=b"}}, "invalid source label filter: "},
		{"source_label", &ff{SourceLabel: []string{"a,"}}, "invalid source label filter: "},
		{"source_label", &ff{SourceLabel: []string{"a b"}}, "invalid source label filter: "},
		{"source_label", &ff{SourceLabel: []string{"a > x"}}, "invalid source label filter: "},
		{"source_label", &ff{SourceLabel: []string{"a=" + strings.Repeat("x", 64)}}, "invalid source label filter: "},
		{"source_label", &ff{SourceLabel: []string{"a:b:c"}}, "invalid source label filter: "},
		{"destination_label", &ff{DestinationLabel: []string{"cidr:x"}}, "invalid destination label filter: "},
		{"node_labels", &ff{NodeLabels: []string{"!"}}, "invalid node label filter: "},
		{"source_port", &ff{SourcePort: []string{"x"}}, `invalid source port filter: invalid port "x": `},
		{"destination_port", &ff{DestinationPort: []string{"65536"}}, `invalid destination port filter: invalid port "65536": `},
		{"protocol", &ff{Protocol: []string{"x"}}, `invalid protocol filter: unknown protocol: "x"`},
		{"http_status_code", &ff{HttpStatusCode: []string{"99"}}, `invalid http status code filter: invalid status code prefix: "99"`},
		{"http_status_code", &ff{HttpStatusCode: []string{"600"}}, `invalid http status code filter: invalid status code prefix: "600"`},
		{"http_status_code", &ff{HttpStatusCode: []string{"404+"}}, `invalid http status code filter: invalid status code prefix: "404+"`},
		{"http_status_code", &ff{HttpStatusCode: []string{"+"}}, `invalid http status code filter: invalid status code prefix: "+"`},
		{"http_path", &ff{HttpPath: []string{"("}}, "invalid http path filter: (: "},
		{"http_url", &ff{HttpUrl: []string{"("}}, "invalid http url filter: (: "},
		{"dns_query", &ff{DnsQuery: []string{"("}}, "invalid DNS query filter: "},
		{"http_status_code", &ff{HttpStatusCode: []string{"404"}, EventType: l7}, "filtering by http status code requires the event type filter to only match 'l7' events"},
		{"http_method", &ff{HttpMethod: []string{"GET"}, EventType: l7}, "filtering by http method requires the event type filter to only match 'l7' events"},
		{"http_path", &ff{HttpPath: []string{"/"}, EventType: l7}, "filtering by http path requires the event type filter to only match 'l7' events"},
		{"http_url", &ff{HttpUrl: []string{"/"}, EventType: l7}, "filtering by http url requires the event type filter to only match 'l7' events"},
		{"http_header", &ff{HttpHeader: []*flow.HTTPHeader{{}}, EventType: l7}, "filtering by http headers requires the event type filter to only match 'l7' events"},
		{"node_name", &ff{NodeName: []string{"a/b/c"}}, "too many slashes in pattern"},
		{"node_name", &ff{NodeName: []string{""}}, "empty pattern"},
		{"experimental", &ff{Experimental: &flow.FlowFilter_Experimental{CelExpression: []string{"_flow.nope"}}}, "error compiling CEL expression: "},
		{"experimental", &ff{Experimental: &flow.FlowFilter_Experimental{CelExpression: []string{"_flow.uuid"}}}, `error compiling CEL expression: got "string", wanted "bool" result type`},
	}
	for _, tt := range tests {
		t.Run(tt.field+" "+tt.want, func(t *testing.T) {
			for what, lists := range map[string][2][]*ff{"white": {{{}, tt.filter}, nil}, "black": {nil, {tt.filter}}} {
				_, err := Compile(lists[0], lists[1])
				var faulty *Error
				if !errors.As(err, &faulty) || faulty.Field != tt.field || !strings.HasPrefix(err.Error(), tt.want) {
					t.Errorf("%s: error %q, want field %s, %q", what, err, tt.field, tt.want)
				}
			}
		})
	}
}

// TestHeader: what a header can rule out is ruled out, and nothing else.
func TestHeader(t *testing.T) {
	h := &batch.Header{Node: "node-1", Cluster: "default", Namespaces: []string{"", "prod"}, Verdicts: 1 << flow.Verdict_FORWARDED, EventTypes: 1<<4 | 1<<31}
	tests := []struct {
		name   string
		filter *ff
		want   bool
	}{
		{"verdict", &ff{Verdict: []flow.Verdict{flow.Verdict_DROPPED, flow.Verdict_ERROR}}, false},
		{"verdict, one of", &ff{Verdict: []flow.Verdict{flow.Verdict_DROPPED, flow.Verdict_FORWARDED}}, true},
		{"verdict out of range", &ff{Verdict: []flow.Verdict{flow.Verdict_DROPPED, 99}}, true},
		{"event type", &ff{EventType: []*flow.EventTypeFilter{{Type: 1}}}, false},
		{"event type l7", &ff{EventType: []*flow.EventTypeFilter{{Type: 129}}}, true},
		{"any event type", &ff{EventType: []*flow.EventTypeFilter{{Type: 1}, {}}}, true},
		{"unknown event type", &ff{EventType: []*flow.EventTypeFilter{{Type: 1000}}}, true},
		{"namespace", &ff{SourcePod: []string{"dev/"}}, false},
		{"namespace there", &ff{SourcePod: []string{"dev/", "prod/x"}}, true},
		{"default namespace", &ff{DestinationPod: []string{"x"}}, false},
		{"any namespace", &ff{DestinationPod: []string{"/x"}}, true},
		{"both ends", &ff{SourcePod: []string{"prod/"}, DestinationPod: []string{"dev/"}}, false},
		{"node", &ff{NodeName: []string{"node-2"}}, false},
		{"node there", &ff{NodeName: []string{"node-*"}}, true},
	}
	for _, tt := range tests {
		f, err := Compile([]*ff{tt.filter}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := f.MayMatch(h); got != tt.want {
			t.Errorf("%s: may match = %t", tt.name, got)
		}
		either, err := Compile([]*ff{tt.filter, {Uuid: []string{"x"}}}, nil)
		if err != nil || !either.MayMatch(h) {
			t.Errorf("%s, or another: skipped, %v", tt.name, err)
		}
		black, err := Compile(nil, []*ff{tt.filter})
		if err != nil || !black.MayMatch(h) {
			t.Errorf("%s, on the blacklist: skipped, %v", tt.name, err)
		}
	}
	f, err := Compile([]*ff{{NodeName: []string{"node-1"}}}, nil)
	if err != nil || !f.MayConcern("default/node-1") || f.MayConcern("default/node-2") {
		t.Errorf("gaps of the wrong nodes concern a reader: %v", err)
	}
}

func TestEverything(t *testing.T) {
	some := []*ff{{Uuid: []string{"x"}}}
	for _, tt := range []struct {
		white, black []*ff
		want         bool
	}{
		{nil, nil, true}, {[]*ff{{}}, nil, true}, {append(some, &ff{}), nil, true}, {some, nil, false}, {nil, some, false}, {[]*ff{{}}, []*ff{{}}, false},
	} {
		f, err := Compile(tt.white, tt.black)
		if err != nil || f.Everything() != tt.want {
			t.Errorf("%v, %v: everything = %t, %v", tt.white, tt.black, f.Everything(), err)
		}
	}
}

// FuzzRequest: whatever a client sends is refused or decides every flow, the same whether the flow
// is decoded wholly or only as far as needed.
func FuzzRequest(f *testing.F) {
	for _, c := range cases() {
		data, err := proto.Marshal(c.filter)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	var flows []*flow.Flow
	for _, c := range cases() {
		flows = append(append(flows, c.yes...), c.not...)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		one := &ff{}
		if proto.Unmarshal(data, one) != nil {
			return
		}
		compiled, err := Compile([]*ff{one}, nil)
		if err != nil {
			if err.Error() == "" {
				t.Fatal("an error without words")
			}
			return
		}
		for _, fl := range flows {
			match := compiled.Match(fl)
			if match != compiled.Match(decode(t, compiled, fl)) {
				t.Fatalf("%v decides differently on a part of %v", one, fl)
			}
			if match && !compiled.MayMatch(headerOf(fl)) {
				t.Fatalf("%v skips the batch of %v", one, fl)
			}
		}
	})
}

// FuzzSelector: whatever a selector says, it is refused or decides.
func FuzzSelector(f *testing.F) {
	for _, c := range cases() {
		for _, s := range c.filter.GetSourceLabel() {
			f.Add(s)
		}
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseSelector(text)
		if err == nil {
			s.matches([]string{"k8s:app=client", "reserved:host", "cidr:10.0.0.0/8", "", ":", "="})
		}
	})
}

func BenchmarkMatch(b *testing.B) {
	data, err := proto.Marshal(base())
	if err != nil {
		b.Fatal(err)
	}
	for name, one := range map[string]*ff{
		"verdict": {Verdict: []flow.Verdict{flow.Verdict_DROPPED}},
		"pod":     {SourcePod: []string{"default/client"}, DestinationPort: []string{"8080"}},
		"label":   {SourceLabel: []string{"k8s:app=client"}},
		"cel":     {Experimental: &flow.FlowFilter_Experimental{CelExpression: []string{"_flow.verdict == Verdict.DROPPED"}}},
	} {
		b.Run(name, func(b *testing.B) {
			f, err := Compile([]*ff{one}, nil)
			if err != nil {
				b.Fatal(err)
			}
			var fl flow.Flow
			var buf []byte
			b.ReportAllocs()
			for b.Loop() {
				item := data
				if m := f.Fields(); m != nil {
					buf = m.Append(buf[:0], data)
					item = buf
				}
				if err := proto.Unmarshal(item, &fl); err != nil {
					b.Fatal(err)
				}
				f.Match(&fl)
			}
		})
	}
}
