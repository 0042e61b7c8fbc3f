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
		policy.Rules = append(policy.Rules, desired.PolicyRule{Kind: r.GetKind(), Namespace: r.GetNamespace(), Name: r.GetName(), UID: r.GetUid(), Spec: r.GetSpec(),
			List: r.GetList(), Index: r.GetIndex(), Log: r.GetLog(), Labels: r.GetLabels(), Implicit: r.GetImplicit()})
	}
	for i, c := range p.GetClasses() {
		class := desired.PolicyClass{Selectors: c.GetSelectors()}
		if !slices.IsSorted(class.Selectors) || len(class.Selectors) > 0 && int(class.Selectors[len(class.Selectors)-1]) >= len(policy.Selectors) {
			fail("classes[%d].selectors: want positions of selectors, rising", i)
			continue
		}
		ranges, err := rangesOf(c.GetRanges(), len(policy.Rules))
		if err != nil {
			fail("classes[%d].%w", i, err)
		}
		class.Ranges = ranges
		policy.Classes = append(policy.Classes, class)
	}
	return desired.Upsert{Key: desired.Key{Kind: desired.KindPolicy, Name: p.GetKey()}, Resource: policy}, wrap("policy", p.GetKey(), errs...)
}

// rangesOf returns no range at all when one of them makes no sense.
func rangesOf(list []*policyv1.PolicyRange, rules int) ([]desired.PolicyRange, error) {
	var out []desired.PolicyRange
	for i, r := range list {
		x := desired.PolicyRange{Proto: uint8(r.GetProtocol()), First: uint16(r.GetFirst()), Last: uint16(r.GetLast()), Verdict: desired.Verdict(r.GetVerdict()), Rules: r.GetRules()}
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
		}
		if i > 0 {
			before := out[i-1]
			if x.Proto < before.Proto || x.Proto == before.Proto && x.First <= before.Last {
				return nil, fmt.Errorf("ranges[%d]: not sorted, or it overlaps the one before", i)
			}
		}
		for _, n := range x.Rules {
			if int(n) >= rules {
				return nil, fmt.Errorf("ranges[%d].rules: there is no rule %d", i, n)
			}
		}
		out = append(out, x)
	}
	return out, nil
}
