// SPDX-License-Identifier: Apache-2.0

package runner

import (
	"strings"
	"testing"

	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/test/cases/format"
)

func drop(reason flowpb.DropReason, d flowpb.TrafficDirection) *flowpb.Flow {
	return &flowpb.Flow{Verdict: flowpb.Verdict_DROPPED, DropReasonDesc: reason, TrafficDirection: d}
}

func TestJudge(t *testing.T) {
	const in, out = flowpb.TrafficDirection_INGRESS, flowpb.TrafficDirection_EGRESS
	through := seen{arrived: true, answered: true, flows: []*flowpb.Flow{{Verdict: flowpb.Verdict_FORWARDED, PolicyLog: []string{"api"}}}}
	denied := seen{answered: true, drops: []*flowpb.Flow{drop(policyDenied, in)}}
	denied.flows = denied.drops
	for name, c := range map[string]struct {
		e    format.Expectation
		s    seen
		want Class
		got  string
	}{
		"allow":                         {format.Expectation{Verdict: format.Allow}, through, Passed, "allow"},
		"allow, denied":                 {format.Expectation{Verdict: format.Allow}, denied, WrongDeny, "deny"},
		"allow, no answer":              {format.Expectation{Verdict: format.Allow}, seen{arrived: true}, WrongDeny, "not whole"},
		"allow, lost":                   {format.Expectation{Verdict: format.Allow}, seen{}, WrongDeny, "lost"},
		"allow at the second try":       {format.Expectation{Verdict: format.Allow}, seen{true, true, denied.drops, denied.drops}, WrongDeny, "not whole"},
		"deny":                          {format.Expectation{Verdict: format.Deny}, denied, Passed, "deny"},
		"deny by a deny rule":           {format.Expectation{Verdict: format.Deny}, seen{drops: []*flowpb.Flow{drop(policyDenyList, out)}}, Passed, "deny"},
		"deny, through":                 {format.Expectation{Verdict: format.Deny}, through, WrongAllow, "allow"},
		"deny, through after a drop":    {format.Expectation{Verdict: format.Deny}, seen{true, false, denied.drops, denied.drops}, WrongAllow, "not whole"},
		"deny, lost":                    {format.Expectation{Verdict: format.Deny}, seen{}, Wrong, "lost"},
		"deny, dropped otherwise":       {format.Expectation{Verdict: format.Deny}, seen{drops: []*flowpb.Flow{drop(flowpb.DropReason_INVALID_SOURCE_IP, out)}}, Wrong, "not by policy"},
		"deny at its end":               {format.Expectation{Verdict: format.Deny, Direction: "ingress"}, denied, Passed, "deny"},
		"deny at the other end":         {format.Expectation{Verdict: format.Deny, Direction: "egress"}, denied, Wrong, "other end"},
		"redirect, through":             {format.Expectation{Verdict: format.Redirect, L7: format.Allow}, through, WrongDeny, "allow"},
		"redirect that may be an allow": {format.Expectation{Verdict: format.Redirect, L7: format.Allow, OrAllow: true}, through, Passed, "allow"},
		"request to be refused":         {format.Expectation{Verdict: format.Redirect, L7: format.Deny}, through, WrongAllow, "allow"},
		"authentication missing":        {format.Expectation{Verdict: format.AuthRequired}, through, WrongAllow, "allow"},
		"authenticated":                 {format.Expectation{Verdict: format.AuthRequired, Authenticated: true}, through, Passed, "allow"},
		"verdict of the flow":           {format.Expectation{Verdict: format.Allow, FlowVerdict: "AUDIT"}, through, Wrong, "flows do not say"},
		"log of the flow":               {format.Expectation{Verdict: format.Allow, FlowPolicyLog: format.Strings{"api"}}, through, Passed, "allow"},
		"other log":                     {format.Expectation{Verdict: format.Allow, FlowPolicyLog: format.Strings{"db"}}, through, Wrong, "flows do not say"},
	} {
		t.Run(name, func(t *testing.T) {
			var o Outcome
			judge(&o, &c.e, c.s)
			if o.Class != c.want || !strings.Contains(o.Got, c.got) {
				t.Errorf("%s, %q; want %s, %q", o.Class, o.Got, c.want, c.got)
			}
		})
	}
}
