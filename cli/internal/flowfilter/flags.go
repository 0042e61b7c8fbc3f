// SPDX-License-Identifier: Apache-2.0

package flowfilter

import (
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/weirmesh/weir/cli/internal/eventname"
	"github.com/weirmesh/weir/gen/flow"
)

// flagHelp describes one filter flag. noValue is what pflag passes when the flag has no value.
type flagHelp struct {
	name, short, noValue, usage string
}

var flagHelps = []flagHelp{
	{"not", "", "true", "Negate the next filter, as in --not --from-ip 2.2.2.2"},
	{"pod", "", "", "Flows of a pod, [namespace/]prefix of its name; without namespace: default"},
	{"from-pod", "", "", "Flows from a pod, [namespace/]prefix"},
	{"to-pod", "", "", "Flows to a pod, [namespace/]prefix"},
	{"namespace", "n", "", "Flows of a namespace"},
	{"from-namespace", "", "", "Flows from a namespace"},
	{"to-namespace", "", "", "Flows to a namespace"},
	{"all-namespaces", "A", "true", "Flows of any namespace"},
	{"from-all-namespaces", "", "true", "Flows from any namespace"},
	{"to-all-namespaces", "", "true", "Flows to any namespace"},
	{"service", "", "", "Flows of a service, [namespace/]prefix of its name"},
	{"from-service", "", "", "Flows from a service, [namespace/]prefix"},
	{"to-service", "", "", "Flows to a service, [namespace/]prefix"},
	{"workload", "", "", "Flows of a workload: name, Kind/name or Kind/"},
	{"from-workload", "", "", "Flows from a workload"},
	{"to-workload", "", "", "Flows to a workload"},
	{"label", "l", "", `Flows of endpoints with these labels, such as "app=todoui" or "reserved:world"`},
	{"from-label", "", "", "Flows from endpoints with these labels"},
	{"to-label", "", "", "Flows to endpoints with these labels"},
	{"identity", "", "", "Flows of an identity: number or reserved name"},
	{"from-identity", "", "", "Flows from an identity"},
	{"to-identity", "", "", "Flows to an identity"},
	{"ip", "", "", "Flows of an address or CIDR"},
	{"from-ip", "", "", "Flows from an address or CIDR"},
	{"to-ip", "", "", "Flows to an address or CIDR"},
	{"snat-ip", "", "", "Flows masqueraded with an address or CIDR"},
	{"ipv4", "4", "v4", "IPv4 flows"},
	{"ipv6", "6", "v6", "IPv6 flows"},
	{"ip-version", "", "", "IPv4, IPv6 or non-IP flows: v4, v6, none"},
	{"fqdn", "", "", `Flows of a DNS name; "*" matches any run of characters`},
	{"from-fqdn", "", "", "Flows from a DNS name"},
	{"to-fqdn", "", "", "Flows to a DNS name"},
	{"port", "", "", "Flows from or to a port"},
	{"from-port", "", "", "Flows from a port"},
	{"to-port", "", "", "Flows to a port"},
	{"cluster", "", "", `Flows of a cluster; "*" matches any run of characters`},
	{"from-cluster", "", "", "Flows from a cluster"},
	{"to-cluster", "", "", "Flows to a cluster"},
	{"protocol", "", "", "Flows of an L4 or L7 protocol, such as udp or http"},
	{"tcp-flags", "", "", `TCP flows with all of these flags, such as "syn,ack"`},
	{"type", "t", "", "Event type TYPE[:SUBTYPE]: capture, drop, l7, policy-verdict, trace, trace-sock; sub-types of trace: " + strings.Join(eventname.TracePoints(), ", ")},
	{"verdict", "", "", "Verdict: " + strings.Join(verdicts(), ", ")},
	{"drop-reason-desc", "", "", `Drops for a reason, such as POLICY_DENIED or "Policy denied"`},
	{"traffic-direction", "", "", "Direction seen from the endpoint: ingress or egress"},
	{"http-status", "", "", `HTTP status code or its beginning, such as 404 or 5+`},
	{"http-method", "", "", "HTTP method"},
	{"http-path", "", "", "HTTP path, regular expression"},
	{"http-url", "", "", "HTTP URL, regular expression"},
	{"http-header", "", "", "HTTP header, name:value"},
	{"trace-id", "", "", "Trace id of a request"},
	{"ip-trace-id", "", "", "IP trace id"},
	{"node-name", "", "", `Flows seen on a node, such as "worker-*" or "cluster/node"`},
	{"node-label", "", "", "Flows seen on nodes with these labels"},
	{"interface", "", "", "Flows seen at a network interface"},
	{"encrypted", "", "true", "Encrypted flows"},
	{"unencrypted", "", "true", "Flows that are not encrypted"},
	{"uuid", "", "", "The flow with this id"},
	{"cel-expression", "", "", "CEL expression on _flow, such as '_flow.verdict == Verdict.DROPPED'"},
}

// Register adds the filter flags, in the order of the help text, to fs.
func (b *Builder) Register(fs *pflag.FlagSet) {
	for _, h := range flagHelps {
		f := fs.VarPF(&value{b: b, name: h.name}, h.name, h.short, h.usage)
		f.NoOptDefVal = h.noValue
	}
}

// value makes a flag of the builder; pflag hands Set values without names.
type value struct {
	b    *Builder
	name string
}

func (v *value) Set(s string) error { return v.b.Set(v.name, s) }
func (v *value) String() string     { return "" }
func (v *value) Type() string       { return "filter" }

// Completions returns the values that a shell offers for flags with a closed set of them.
func Completions() map[string][]string {
	types := eventname.FlowTypes()
	for _, p := range eventname.TracePoints() {
		types = append(types, "trace:"+p)
	}
	reasons := make([]string, 0, len(flow.DropReason_name))
	for _, name := range flow.DropReason_name {
		reasons = append(reasons, name)
	}
	slices.Sort(reasons)
	ids := eventname.Identities()
	return map[string][]string{
		"type":              types,
		"verdict":           verdicts(),
		"drop-reason-desc":  reasons,
		"protocol":          {"dns", "http", "icmp", "icmpv4", "icmpv6", "igmp", "kafka", "sctp", "tcp", "udp", "vrrp"},
		"http-status":       {"1+", "2+", "3+", "4+", "5+", "200", "201", "204", "301", "302", "304", "400", "401", "403", "404", "405", "408", "409", "429", "500", "501", "502", "503", "504"},
		"http-method":       {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"},
		"identity":          ids,
		"from-identity":     ids,
		"to-identity":       ids,
		"traffic-direction": {"ingress", "egress"},
		"ip-version":        {"none", "v4", "v6"},
		"tcp-flags":         {"SYN", "ACK", "RST", "FIN", "PSH", "URG", "ECE", "CWR", "NS"},
	}
}

func verdicts() []string {
	var out []string
	for n := int32(1); flow.Verdict_name[n] != ""; n++ {
		out = append(out, flow.Verdict_name[n])
	}
	return out
}
