// SPDX-License-Identifier: Apache-2.0

package policysync

import (
	"fmt"
	"slices"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// policyOf turns a policy into ours. A part that cannot be read is left out, and what it would decide is denied: a class without ranges, a range that
// nobody covers.
func policyOf(p *policyv1.Policy) (desired.Upsert, error) {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	policy := &desired.Policy{Key: p.GetKey(), Direction: desired.Direction(p.GetDirection()), Selectors: p.GetSelectors()}
	if p.GetDirection() != policyv1.Direction_DIRECTION_INGRESS && p.GetDirection() != policyv1.Direction_DIRECTION_EGRESS {
		fail("direction %d is unknown", p.GetDirection())
	}
	for _, r := range p.GetRules() {
		policy.Rules = append(policy.Rules, ruleOf(r))
	}
	for i, f := range p.GetFilters() {
		filter, err := filterOf(f)
		if err != nil {
			fail("filters[%d].%w", i, err)
			continue
		}
		policy.Filters = append(policy.Filters, filter)
	}
	for i, c := range p.GetClasses() {
		class := desired.PolicyClass{Selectors: c.GetSelectors()}
		if !slices.IsSorted(class.Selectors) || len(class.Selectors) > 0 && int(class.Selectors[len(class.Selectors)-1]) >= len(policy.Selectors) {
			fail("classes[%d].selectors: want positions of selectors, rising", i)
			continue
		}
		ranges, err := rangesOf(c.GetRanges(), policy)
		if err != nil {
			fail("classes[%d].%w", i, err)
		}
		class.Ranges = ranges
		policy.Classes = append(policy.Classes, class)
	}
	for i, n := range p.GetNames() {
		name, err := nameOf(n, policy)
		if err != nil {
			fail("names[%d].%w", i, err)
			continue
		}
		policy.Names = append(policy.Names, name)
	}
	return desired.Upsert{Key: desired.Key{Kind: desired.KindPolicy, Name: p.GetKey()}, Resource: policy}, wrap("policy", p.GetKey(), errs...)
}

// rangesOf returns no range at all when one of them makes no sense.
func rangesOf(list []*policyv1.PolicyRange, p *desired.Policy) ([]desired.PolicyRange, error) {
	var out []desired.PolicyRange
	for i, r := range list {
		x := desired.PolicyRange{Proto: uint8(r.GetProtocol()), First: uint16(r.GetFirst()), Last: uint16(r.GetLast()), Verdict: desired.Verdict(r.GetVerdict()),
			Rules: r.GetRules(), Filter: r.GetFilter()}
		if x.Proto == 0 {
			x.First, x.Last = 0, 65535
		}
		switch {
		case r.GetProtocol() > 255:
			return nil, fmt.Errorf("ranges[%d].protocol: %d is none", i, r.GetProtocol())
		case x.Proto != 0 && (r.GetFirst() > r.GetLast() || r.GetLast() > 65535):
			return nil, fmt.Errorf("ranges[%d]: %d to %d are no ports", i, r.GetFirst(), r.GetLast())
		case r.GetVerdict() < policyv1.Verdict_VERDICT_ALLOW || r.GetVerdict() > policyv1.Verdict_VERDICT_DENY:
			return nil, fmt.Errorf("ranges[%d].verdict: %d is unknown", i, r.GetVerdict())
		case x.Filter != "" && x.Verdict != desired.Allow:
			return nil, fmt.Errorf("ranges[%d].filter: nothing is allowed through it", i)
		case x.Filter != "" && p.Filter(x.Filter) == nil:
			return nil, fmt.Errorf("ranges[%d].filter: there is no filter %q", i, x.Filter)
		}
		if i > 0 {
			before := out[i-1]
			if x.Proto < before.Proto || x.Proto == before.Proto && x.First <= before.Last {
				return nil, fmt.Errorf("ranges[%d]: not sorted, or it overlaps the one before", i)
			}
		}
		for _, n := range x.Rules {
			if int(n) >= len(p.Rules) {
				return nil, fmt.Errorf("ranges[%d].rules: there is no rule %d", i, n)
			}
		}
		out = append(out, x)
	}
	return out, nil
}

func ruleOf(r *policyv1.PolicyRule) desired.PolicyRule {
	return desired.PolicyRule{Kind: r.GetKind(), Namespace: r.GetNamespace(), Name: r.GetName(), UID: r.GetUid(), Spec: r.GetSpec(),
		List: r.GetList(), Index: r.GetIndex(), Log: r.GetLog(), Labels: r.GetLabels(), Implicit: r.GetImplicit()}
}

// maxFilterKey bounds keys of filters, as the policy service does.
const maxFilterKey = 63

func filterOf(f *policyv1.Filter) (desired.Filter, error) {
	x := desired.Filter{Key: f.GetKey(), Kind: desired.FilterKind(f.GetKind()), Visibility: f.GetVisibility()}
	switch {
	case x.Key == "" || len(x.Key) > maxFilterKey:
		return x, fmt.Errorf("key: %q has not 1 to %d characters", x.Key, maxFilterKey)
	case f.GetKind() < policyv1.FilterKind_FILTER_KIND_HTTP || f.GetKind() > policyv1.FilterKind_FILTER_KIND_DNS:
		return x, fmt.Errorf("kind: %d is no policy's", f.GetKind())
	}
	for _, r := range f.GetDns() {
		x.DNS = append(x.DNS, desired.DNSRule{Rule: ruleOf(r.GetRule()), MatchName: r.GetMatchName(), MatchPattern: r.GetMatchPattern()})
	}
	return x, nil
}

func nameOf(n *policyv1.PolicyName, p *desired.Policy) (desired.PolicyName, error) {
	x := desired.PolicyName{MatchName: n.GetMatchName(), MatchPattern: n.GetMatchPattern()}
	if (x.MatchName == "") == (x.MatchPattern == "") {
		return x, fmt.Errorf("match_name %q, match_pattern %q: want exactly one", x.MatchName, x.MatchPattern)
	}
	ranges, err := rangesOf(n.GetRanges(), p)
	if err != nil {
		return x, err
	}
	for i, r := range ranges {
		if r.Verdict != desired.Allow {
			return x, fmt.Errorf("ranges[%d].verdict: names only allow", i)
		}
	}
	x.Ranges = ranges
	return x, nil
}
