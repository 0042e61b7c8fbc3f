// SPDX-License-Identifier: Apache-2.0

package flowmatch

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/gen/flow"
)

func decode[M proto.Message](t testing.TB, text string, m M) M {
	t.Helper()
	if err := protojson.Unmarshal([]byte(text), m); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return m
}

const (
	tcpFlow = `{"uuid":"u1","verdict":"FORWARDED","IP":{"source":"10.0.1.5","destination":"10.0.2.9","source_xlated":"172.30.0.11","ipVersion":"IPv4","encrypted":true},
	  "l4":{"TCP":{"source_port":41562,"destination_port":8080,"flags":{"SYN":true,"ACK":true}}},
	  "source":{"ID":1,"identity":300,"cluster_name":"east","namespace":"default","labels":["k8s:app=client","k8s:env=prod"],"pod_name":"client-abc","workloads":[{"name":"client","kind":"Deployment"}]},
	  "destination":{"identity":2,"labels":["reserved:world","cidr:10.1.0.0/16"]},"destination_names":["www.example.com"],"destination_service":{"name":"web","namespace":"prod"},
	  "node_name":"worker-1","node_labels":["zone=a"],"event_type":{"type":4,"sub_type":11},"traffic_direction":"EGRESS","is_reply":false,
	  "interface":{"index":3,"name":"eth0"},"trace_context":{"parent":{"trace_id":"t1"}},"ip_trace_id":{"trace_id":"7"}}`
	httpFlow = `{"verdict":"FORWARDED","IP":{"source":"fd00::1","destination":"fd00::2","ipVersion":"IPv6"},"l7":{"type":"RESPONSE","http":{"code":404,"method":"GET","url":"http://web/api/v1?x=1","headers":[{"key":"A","value":"b"}]}},"event_type":{"type":129},"node_name":"east/worker-2"}`
	dnsFlow  = `{"verdict":"FORWARDED","l4":{"UDP":{"source_port":5,"destination_port":53}},"l7":{"type":"REQUEST","dns":{"query":"web.default."}},"event_type":{"type":129}}`
	dropFlow = `{"verdict":"DROPPED","drop_reason_desc":"POLICY_DENIED","l4":{"ICMPv6":{"type":128}},"event_type":{"type":1,"sub_type":133}}`
)

func TestMatch(t *testing.T) {
	tests := []struct {
		filter string
		flow   string
		want   bool
	}{
		{`{}`, `{}`, true},
		{`{"uuid":["u1"]}`, tcpFlow, true},
		{`{"uuid":["u2"]}`, tcpFlow, false},
		{`{"source_ip":["10.0.1.5"]}`, tcpFlow, true},
		{`{"source_ip":["10.0.0.0/16"]}`, tcpFlow, true},
		{`{"source_ip":["10.0.2.0/24"]}`, tcpFlow, false},
		{`{"destination_ip":["10.0.2.9"],"source_ip":["1.1.1.1"]}`, tcpFlow, false},
		{`{"source_ip":["fd00:0::1"]}`, httpFlow, false}, // text, not value
		{`{"source_ip":["fd00::/64"]}`, httpFlow, true},
		{`{"source_ip":["0.0.0.0/0"]}`, `{}`, false},
		{`{"source_ip_xlated":["172.30.0.0/24"]}`, tcpFlow, true},
		{`{"source_ip_xlated":["172.30.0.0/24"]}`, httpFlow, false},
		{`{"source_pod":["client"]}`, tcpFlow, true},
		{`{"source_pod":["default/client-abc"]}`, tcpFlow, true},
		{`{"source_pod":["default/"]}`, tcpFlow, true},
		{`{"source_pod":["/client"]}`, tcpFlow, true},
		{`{"source_pod":["/"]}`, tcpFlow, true},
		{`{"source_pod":["/"]}`, dnsFlow, false},
		{`{"source_pod":["prod/"]}`, tcpFlow, false},
		{`{"source_pod":["abc"]}`, tcpFlow, false},
		{`{"destination_pod":["/"]}`, tcpFlow, false},
		{`{"destination_service":["prod/we"]}`, tcpFlow, true},
		{`{"destination_service":["web"]}`, tcpFlow, false},
		{`{"destination_fqdn":["*.example.com"]}`, tcpFlow, true},
		{`{"destination_fqdn":["WWW.example.com."]}`, tcpFlow, true},
		{`{"destination_fqdn":["example.com"]}`, tcpFlow, false},
		{`{"source_fqdn":["*"]}`, tcpFlow, false},
		{`{"source_label":["app=client"]}`, tcpFlow, true},
		{`{"source_label":["k8s:app==client,env!=dev"]}`, tcpFlow, true},
		{`{"source_label":["any:app"]}`, tcpFlow, true},
		{`{"source_label":["reserved:app"]}`, tcpFlow, false},
		{`{"source_label":["app in (a, client),env notin (dev)"]}`, tcpFlow, true},
		{`{"source_label":["!app"]}`, tcpFlow, false},
		{`{"source_label":["!tier"]}`, tcpFlow, true},
		{`{"source_label":["tier notin (a)"]}`, tcpFlow, true},
		{`{"source_label":["app=x","env=prod"]}`, tcpFlow, true},
		{`{"source_label":[""]}`, tcpFlow, true},
		{`{"destination_label":["reserved:world"]}`, tcpFlow, true},
		{`{"destination_label":["cidr:10.0.0.0/8"]}`, tcpFlow, true},
		{`{"destination_label":["cidr:10.1.2.0/24"]}`, tcpFlow, false},
		{`{"node_labels":["zone=a"]}`, tcpFlow, true},
		{`{"source_workload":[{"name":"client"}]}`, tcpFlow, true},
		{`{"source_workload":[{"kind":"Deployment"}]}`, tcpFlow, true},
		{`{"source_workload":[{"name":"client","kind":"Job"}]}`, tcpFlow, false},
		{`{"destination_workload":[{}]}`, tcpFlow, false},
		{`{"source_cluster_name":["east"]}`, tcpFlow, true},
		{`{"source_cluster_name":["ea*"]}`, tcpFlow, false},
		{`{"source_identity":[299,300]}`, tcpFlow, true},
		{`{"source_identity":[0]}`, dnsFlow, false},
		{`{"destination_port":["8080"]}`, tcpFlow, true},
		{`{"source_port":["8080"]}`, tcpFlow, false},
		{`{"destination_port":["0"]}`, dropFlow, false},
		{`{"traffic_direction":["INGRESS","EGRESS"]}`, tcpFlow, true},
		{`{"verdict":["DROPPED"]}`, tcpFlow, false},
		{`{"drop_reason_desc":["POLICY_DENIED"]}`, dropFlow, true},
		{`{"drop_reason_desc":["DROP_REASON_UNKNOWN"]}`, tcpFlow, false},
		{`{"interface":[{"name":"eth0"}]}`, tcpFlow, true},
		{`{"interface":[{"index":4,"name":"eth0"}]}`, tcpFlow, false},
		{`{"interface":[{}]}`, dropFlow, false},
		{`{"event_type":[{"type":4}]}`, tcpFlow, true},
		{`{"event_type":[{"type":4,"match_sub_type":true}]}`, tcpFlow, false},
		{`{"event_type":[{"match_sub_type":true,"sub_type":11}]}`, tcpFlow, true},
		{`{"event_type":[{}]}`, `{}`, false},
		{`{"http_status_code":["404"]}`, httpFlow, true},
		{`{"http_status_code":["4+"]}`, httpFlow, true},
		{`{"http_status_code":["41+"]}`, httpFlow, false},
		{`{"http_status_code":["4+"]}`, dnsFlow, false},
		{`{"http_method":["get"],"event_type":[{"type":1},{"type":129}]}`, httpFlow, true},
		{`{"http_path":["^/api/v\\d$"]}`, httpFlow, true},
		{`{"http_path":["x=1"]}`, httpFlow, false},
		{`{"http_url":["x=1"]}`, httpFlow, true},
		{`{"http_header":[{"key":"A","value":"b"}]}`, httpFlow, true},
		{`{"http_header":[{"key":"a","value":"b"}]}`, httpFlow, false},
		{`{"dns_query":["^web\\."]}`, dnsFlow, true},
		{`{"protocol":["TCP"]}`, tcpFlow, true},
		{`{"protocol":["icmp"]}`, dropFlow, true},
		{`{"protocol":["icmpv4"]}`, dropFlow, false},
		{`{"protocol":["http","dns"]}`, dnsFlow, true},
		{`{"reply":[false]}`, tcpFlow, true},
		{`{"reply":[true,false]}`, httpFlow, false}, // unset is neither
		{`{"reply":[false]}`, dropFlow, true},       // but a drop counts as no reply
		{`{"tcp_flags":[{"SYN":true}]}`, tcpFlow, true},
		{`{"tcp_flags":[{"FIN":true},{"SYN":true,"ACK":true}]}`, tcpFlow, true},
		{`{"tcp_flags":[{"SYN":true,"RST":true}]}`, tcpFlow, false},
		{`{"tcp_flags":[{}]}`, dnsFlow, false},
		{`{"node_name":["worker-*"]}`, tcpFlow, true},
		{`{"node_name":["default/worker-1"]}`, tcpFlow, true},
		{`{"node_name":["east/"]}`, httpFlow, true},
		{`{"node_name":["/worker-2"]}`, httpFlow, true},
		{`{"node_name":["*"]}`, dnsFlow, false},
		{`{"ip_version":["IPv4"]}`, tcpFlow, true},
		{`{"ip_version":["IP_NOT_USED"]}`, dropFlow, true},
		{`{"trace_id":["t1"],"ip_trace_id":["7"]}`, tcpFlow, true},
		{`{"ip_trace_id":["8"]}`, tcpFlow, false},
		{`{"encrypted":[true]}`, tcpFlow, true},
		{`{"encrypted":[false]}`, dropFlow, true},
		{`{"experimental":{"cel_expression":["_flow.verdict == Verdict.DROPPED"]}}`, dropFlow, true},
		{`{"experimental":{"cel_expression":["_flow.source.pod_name.startsWith('x')","_flow.l4.TCP.destination_port == 8080u"]}}`, tcpFlow, true},
		{`{"experimental":{"cel_expression":["_flow.source.cluster_name.matches(\"^(e.*)$\")"]}}`, tcpFlow, true},
		{`{"experimental":{"cel_expression":["_flow.node_labels[5] == ''"]}}`, tcpFlow, false}, // fails at run time
	}
	for _, tt := range tests {
		f := decode(t, tt.flow, &flow.Flow{})
		filter := []*flow.FlowFilter{decode(t, tt.filter, &flow.FlowFilter{})}
		allow, err := Compile(filter, nil)
		if err != nil {
			t.Errorf("%s: %v", tt.filter, err)
			continue
		}
		if got := allow.Match(f); got != tt.want {
			t.Errorf("allow %s on %.60s...: %v, want %v", tt.filter, tt.flow, got, tt.want)
		}
		deny, err := Compile(nil, filter)
		if err != nil {
			t.Fatal(err)
		}
		if got := deny.Match(f); got == tt.want {
			t.Errorf("deny %s on %.60s...: %v, want %v", tt.filter, tt.flow, got, !tt.want)
		}
	}
}

func TestListsCombine(t *testing.T) {
	f := decode(t, tcpFlow, &flow.Flow{})
	yes, no := &flow.FlowFilter{Uuid: []string{"u1"}}, &flow.FlowFilter{Uuid: []string{"u2"}}
	for _, tt := range []struct {
		name        string
		allow, deny []*flow.FlowFilter
		want        bool
	}{
		{"none", nil, nil, true},
		{"one of the allow list", []*flow.FlowFilter{no, yes}, nil, true},
		{"none of the allow list", []*flow.FlowFilter{no, no}, nil, false},
		{"deny wins", []*flow.FlowFilter{yes}, []*flow.FlowFilter{no, yes}, false},
		{"empty filter denies all", nil, []*flow.FlowFilter{{}}, false},
	} {
		m, err := Compile(tt.allow, tt.deny)
		if err != nil {
			t.Fatal(err)
		}
		if got := m.Match(f); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestCompileErrors(t *testing.T) {
	for filter, want := range map[string]string{
		`{"source_ip":["x"]}`:                                     `invalid IP address "x" in filter: `,
		`{"destination_ip":["1.2.3.4/33"]}`:                       `invalid IP prefix "1.2.3.4/33" in filter: `,
		`{"source_pod":[""]}`:                                     `invalid filter, name must not be empty`,
		`{"source_fqdn":["a b"]}`:                                 `' ': invalid rune in pattern`,
		`{"source_port":["x"]}`:                                   `invalid source port filter: invalid port "x": `,
		`{"destination_port":["65536"]}`:                          `invalid destination port filter: invalid port "65536": `,
		`{"http_status_code":["99"]}`:                             `invalid http status code filter: invalid status code prefix: "99"`,
		`{"http_status_code":["200"],"event_type":[{"type":1}]}`:  `filtering by http status code requires the event type filter to only match 'l7' events`,
		`{"http_url":["("]}`:                                      `invalid http url filter: error parsing regexp`,
		`{"http_path":["("]}`:                                     `invalid http path filter: error parsing regexp`,
		`{"dns_query":["("]}`:                                     `invalid dns query filter: error parsing regexp`,
		`{"protocol":["x"]}`:                                      `invalid protocol filter: unknown protocol: "x"`,
		`{"node_name":["a/b/c"]}`:                                 `too many slashes in`,
		`{"node_name":[""]}`:                                      `empty pattern`,
		`{"source_cluster_name":[""]}`:                            `must not be empty`,
		`{"source_label":["a in x"]}`:                             `invalid label`,
		`{"source_label":["a in (x"]}`:                            `unbalanced parentheses`,
		`{"source_label":["a,"]}`:                                 `ends with a comma`,
		`{"source_label":["=b"]}`:                                 `invalid label key`,
		`{"source_label":["cidr:x"]}`:                             `invalid CIDR "x"`,
		`{"node_labels":["a=b=c"]}`:                               `unexpected character in value`,
		`{"experimental":{"cel_expression":["_flow.nothing"]}}`:   `error compiling CEL expression: `,
		`{"experimental":{"cel_expression":["_flow.node_name"]}}`: `expected result type bool, got string`,
	} {
		if _, err := Compile([]*flow.FlowFilter{decode(t, filter, &flow.FlowFilter{})}, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", filter, err, want)
		}
	}
}

// FuzzCompile holds that no filter and no flow panics, and that deny is the opposite of allow.
func FuzzCompile(f *testing.F) {
	for _, filter := range []string{`{"source_label":["a in (b,c),!d"]}`, `{"node_name":["*/x"]}`, `{"source_ip":["::/0"]}`, `{"http_path":["a|b"]}`, `{"destination_fqdn":["*.a."]}`} {
		m := decode(f, filter, &flow.FlowFilter{})
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		record, err := proto.Marshal(decode(f, tcpFlow, &flow.Flow{}))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, record)
	}
	f.Fuzz(func(t *testing.T, filterWire, flowWire []byte) {
		filter, record := &flow.FlowFilter{}, &flow.Flow{}
		if proto.Unmarshal(filterWire, filter) != nil || proto.Unmarshal(flowWire, record) != nil {
			return
		}
		// CEL is another project's parser, and takes its time.
		filter.Experimental = nil
		allow, err := Compile([]*flow.FlowFilter{filter}, nil)
		if err != nil {
			return
		}
		deny, err := Compile(nil, []*flow.FlowFilter{filter})
		if err != nil {
			t.Fatalf("deny refuses what allow takes: %v", err)
		}
		if allow.Match(record) == deny.Match(record) {
			t.Fatalf("allow and deny agree on %v for %v", filter, record)
		}
	})
}
