// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"net/netip"
	"time"

	mdns "github.com/miekg/dns"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/dnsnames"
	"github.com/weirmesh/weir/services/agent/internal/dnsproxy"
	"github.com/weirmesh/weir/services/agent/internal/dnsrules"
)

// nameMaps are the kernel's maps as dnsnames needs them.
type nameMaps struct{ *datapath.Names }

// SetPolicy writes a row.
func (m nameMaps) SetPolicy(policy, set uint32, ranges []dnsnames.Range) error {
	rows := make([]datapath.PolicyRange, len(ranges))
	for i, r := range ranges {
		rows[i] = datapath.PolicyRange{Proto: r.Proto, First: r.First, Last: r.Last, Verdict: dnsrules.VerdictOf(r), Rule: r.Rule, Slot: r.Slot}
	}
	return m.Names.SetPolicy(policy, set, rows)
}

// Policies lists the rows.
func (m nameMaps) Policies() ([]dnsnames.Row, error) {
	all, err := m.Names.Policies()
	if err != nil {
		return nil, err
	}
	rows := make([]dnsnames.Row, len(all))
	for i, r := range all {
		rows[i] = dnsnames.Row{Policy: r.Policy, Set: r.Set}
	}
	return rows, nil
}

// maxTold bounds the lists of one record.
const maxTold = 128

// recorded is a record with what it points to, in one piece of memory.
type recorded struct {
	record agentv1.DNSRecord
	time   timestamppb.Timestamp
	qtypes [1]string
}

// record queues what the proxy saw.
func (p *parts) record(r dnsproxy.Record) {
	x := &recorded{qtypes: [1]string{mdns.Type(r.Type).String()}}
	x.time.Seconds, x.time.Nanos = r.Time.Unix(), int32(r.Time.Nanosecond())
	m := &x.record
	m.Time, m.Protocol, m.Denied, m.Query, m.Qtypes, m.Slot = &x.time, uint32(r.Proto), r.Denied, r.Query, x.qtypes[:], uint32(r.Slot)
	var room [2 * len("[ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255]:65535")]byte
	client := r.Client.AppendTo(room[:0])
	ends := string(r.Server.AppendTo(client))
	m.Client, m.Server = ends[:len(client)], ends[len(client):]
	m.Rules, _ = r.Rules.([]*policyv1.PolicyRule)
	if a := r.Answer; a != nil {
		m.Response, m.Rcode, m.Ttl, m.LatencyNs = true, uint32(a.RCode), a.TTL, uint64(max(r.Latency, time.Nanosecond))
		m.Addresses = textsOf(a.Addresses[:min(len(a.Addresses), maxTold)], netip.Addr.String)
		m.Cnames = a.CNAMEs
		m.Rrtypes = textsOf(a.Types[:min(len(a.Types), maxTold)], func(t uint16) string { return mdns.Type(t).String() })
	}
	p.records.Add(m)
}

func textsOf[T any](list []T, text func(T) string) []string {
	if len(list) == 0 {
		return nil
	}
	out := make([]string, len(list))
	for i, x := range list {
		out[i] = text(x)
	}
	return out
}
