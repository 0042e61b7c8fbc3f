// SPDX-License-Identifier: Apache-2.0

package dns

import (
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

// record queues what the proxy saw.
func (p *parts) record(r dnsproxy.Record) {
	m := &agentv1.DNSRecord{
		Time: timestamppb.New(r.Time), Client: r.Client.String(), Server: r.Server.String(), Protocol: uint32(r.Proto), Denied: r.Denied,
		Query: r.Query, Qtypes: []string{mdns.Type(r.Type).String()}, Slot: uint32(r.Slot),
	}
	m.Rules, _ = r.Rules.([]*policyv1.PolicyRule)
	if a := r.Answer; a != nil {
		m.Response, m.Rcode, m.Ttl, m.LatencyNs = true, uint32(a.RCode), a.TTL, uint64(max(r.Latency, time.Nanosecond))
		for _, addr := range a.Addresses[:min(len(a.Addresses), maxTold)] {
			m.Addresses = append(m.Addresses, addr.String())
		}
		m.Cnames = a.CNAMEs
		for _, t := range a.Types[:min(len(a.Types), maxTold)] {
			m.Rrtypes = append(m.Rrtypes, mdns.Type(t).String())
		}
	}
	p.records.Add(m)
}
