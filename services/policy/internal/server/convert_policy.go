// SPDX-License-Identifier: Apache-2.0

package server

import (
	"strings"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// PolicyProto makes the message of a policy, as agents get it.
func PolicyProto(p *engine.Policy) *policyv1.Policy {
	m := &policyv1.Policy{Key: p.Key, Direction: policyv1.Direction(p.Direction), Selectors: p.Selectors}
	for _, c := range p.Classes {
		class := &policyv1.PolicyClass{Ranges: rangesProto(c.Ranges)}
		for _, s := range c.Selectors {
			class.Selectors = append(class.Selectors, uint32(s))
		}
		m.Classes = append(m.Classes, class)
	}
	for _, n := range p.Rules {
		m.Rules = append(m.Rules, RuleProto(n))
	}
	for _, n := range p.Names {
		m.Names = append(m.Names, &policyv1.PolicyName{MatchName: n.MatchName, MatchPattern: n.MatchPattern, Ranges: rangesProto(n.Ranges)})
	}
	for _, f := range p.Filters {
		// What requests must be is the proxies' alone; the DNS proxy gets its rules from the agent.
		filter := filterProto(f)
		for i := range f.DNS {
			filter.Dns = append(filter.Dns, dnsProto(f, &f.DNS[i]))
		}
		m.Filters = append(m.Filters, filter)
	}
	return m
}

func rangesProto(ranges []policy.Range) []*policyv1.PolicyRange {
	var all []*policyv1.PolicyRange
	for _, r := range ranges {
		x := &policyv1.PolicyRange{Protocol: uint32(r.Proto), First: uint32(r.First), Last: uint32(r.Last), Verdict: policyv1.Verdict(r.Verdict)}
		for _, i := range r.Rules {
			x.Rules = append(x.Rules, uint32(i))
		}
		if r.Filter != nil {
			x.Filter = r.Filter.Key
		}
		all = append(all, x)
	}
	return all
}

// RuleProto makes the message of a rule's name.
func RuleProto(n policy.RuleName) *policyv1.PolicyRule {
	return &policyv1.PolicyRule{
		Kind: n.Ref.Kind, Namespace: n.Ref.Namespace, Name: n.Ref.Name, Uid: n.Ref.UID, Spec: uint32(n.Spec), List: n.List, Index: uint32(n.Index),
		Log: n.Log, Labels: n.Labels, Implicit: n.Implicit,
	}
}

// filterProto makes the message of a filter without its items.
func filterProto(f *engine.Filter) *policyv1.Filter {
	return &policyv1.Filter{
		Key: f.Key, Kind: policyv1.FilterKind(f.Kind), Direction: policyv1.Direction(f.Direction), Namespace: f.Namespace, Visibility: f.Visibility,
	}
}

// FilterProto makes the message of a filter with all its items.
func FilterProto(f *engine.Filter) *policyv1.Filter {
	m := filterProto(f)
	for i := range f.HTTP {
		m.Http = append(m.Http, httpProto(f, &f.HTTP[i]))
	}
	for i := range f.DNS {
		m.Dns = append(m.Dns, dnsProto(f, &f.DNS[i]))
	}
	for i := range f.TLS {
		t := &f.TLS[i]
		m.Tls = append(m.Tls, &policyv1.TLSRule{Rule: itemRule(f, t.Rule), Any: t.Any, ServerNames: t.ServerNames})
	}
	return m
}

func itemRule(f *engine.Filter, i int) *policyv1.PolicyRule {
	if i < 0 || i >= len(f.Rules) {
		return nil
	}
	return RuleProto(f.Rules[i])
}

func dnsProto(f *engine.Filter, item *policy.DNSItem) *policyv1.DNSRule {
	return &policyv1.DNSRule{Rule: itemRule(f, item.Rule), MatchName: item.MatchName, MatchPattern: item.MatchPattern}
}

func httpProto(f *engine.Filter, item *policy.HTTPItem) *policyv1.HTTPRule {
	m := &policyv1.HTTPRule{Rule: itemRule(f, item.Rule), Method: item.Method, Path: item.Path, Host: item.Host}
	for _, c := range item.Conditions() {
		h := &policyv1.HeaderRule{Name: c.Name, Mismatch: mismatchProto(c.Mismatch)}
		if c.Exact {
			h.Value = &c.Value
		}
		m.Headers = append(m.Headers, h)
	}
	return m
}

func mismatchProto(action string) policyv1.Mismatch {
	return policyv1.Mismatch(policyv1.Mismatch_value["MISMATCH_"+action]) // "" is unspecified
}

// RouteProto makes the message of a route.
func RouteProto(r state.Route) *policyv1.Route {
	namespace, name, _ := strings.Cut(r.Service, "/")
	return &policyv1.Route{
		Kind: r.Kind, Namespace: r.Namespace, Name: r.Name, Listener: r.Listener, ServiceNamespace: namespace, ServiceName: name,
		ServicePort: uint32(r.Port),
	}
}
