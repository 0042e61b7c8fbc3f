// SPDX-License-Identifier: Apache-2.0

package query

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/server"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// maxEndpoints bounds how many endpoints a row names.
const maxEndpoints = 100

// GetEffectivePolicy says what may reach an endpoint, and what it may reach.
func (s *Service) GetEffectivePolicy(ctx context.Context, r *policyv1.GetEffectivePolicyRequest) (*policyv1.GetEffectivePolicyResponse, error) {
	c, err := s.cluster(ctx)
	if err != nil {
		return nil, err
	}
	e, err := c.find("endpoint", r.GetEndpoint())
	if err != nil {
		return nil, err
	}
	if e.service != nil || e.node == "" {
		return nil, grpcstatus.Errorf(codes.InvalidArgument, `endpoint: %.80q is neither "namespace/pod" nor "node:NAME"`, r.GetEndpoint())
	}
	response := &policyv1.GetEffectivePolicyResponse{}
	for _, d := range directions {
		response.Directions = append(response.Directions, c.effective(e, d))
	}
	return response, nil
}

func (c *cluster) effective(e *end, d policy.Direction) *policyv1.EffectiveDirection {
	m := &policyv1.EffectiveDirection{Direction: policyv1.Direction(d), Audit: c.frozen.Options.Audit}
	_, resolved := c.resolved(e, d)
	if resolved == nil {
		return m
	}
	m.Enforced, m.EnforcedBy = resolved.Enforced, resolved.EnforcedBy
	p := c.frozen.View.Policies[resolved.Key]
	if p == nil {
		return m
	}
	endpoints := c.endpointsByClass(resolved, e)
	for _, class := range p.Classes {
		keys := make([]string, len(class.Selectors))
		for i, s := range class.Selectors {
			keys[i] = p.Selectors[s]
		}
		row := func(verdict policy.Verdict, rules []int) *policyv1.EffectiveRow {
			x := &policyv1.EffectiveRow{Peers: peersInWords(keys), Endpoints: endpoints[fmt.Sprint(class.Selectors)], Verdict: verdictProto(verdict)}
			for _, i := range rules {
				x.Rules = append(x.Rules, server.RuleProto(resolved.Rules[i]))
			}
			return x
		}
		for _, group := range groupRanges(class.Ranges) {
			x := row(group[0].Verdict, group[0].Rules)
			filterRow(x, group[0].Filter)
			x.Ports = portsOf(group, len(class.Ranges) == 1)
			m.Rows = append(m.Rows, x)
		}
		if rest := verdictAt(class.Ranges, policy.AnyProtocol, 0); rest == policy.DefaultDeny && !denies(class.Ranges) {
			x := row(policy.DefaultDeny, nil)
			x.Ports = "all other ports"
			if len(class.Ranges) == 0 {
				x.Ports = "all ports"
			}
			m.Rows = append(m.Rows, x)
		}
	}
	for _, n := range p.Names {
		for _, group := range groupRanges(n.Ranges) {
			x := &policyv1.EffectiveRow{Peers: "DNS " + nameInWords(n.NameSelector), Verdict: verdictProto(group[0].Verdict)}
			for _, i := range group[0].Rules {
				x.Rules = append(x.Rules, server.RuleProto(resolved.Rules[i]))
			}
			filterRow(x, group[0].Filter)
			x.Ports = portsOf(group, len(n.Ranges) == 1)
			m.Rows = append(m.Rows, x)
		}
	}
	return m
}

// filterRow says which requests a filter lets through.
func filterRow(x *policyv1.EffectiveRow, f *policy.Filter) {
	if f != nil {
		x.Requests, x.Visibility = itemsInWords(f), f.Visibility
	}
}

// sameFilter reports whether two filters say the same; ports have filters of their own.
func sameFilter(a, b *policy.Filter) bool {
	return (a == nil) == (b == nil) && (a == nil || a.Visibility == b.Visibility && sameItems(a, b))
}

func portsOf(group []policy.Range, alone bool) string {
	var ports []string
	for _, r := range group {
		ports = append(ports, portsInWords(r, alone))
	}
	return strings.Join(ports, ", ")
}

// denies reports whether a class says itself that what is not allowed is denied.
func denies(ranges []policy.Range) bool {
	return slices.ContainsFunc(ranges, func(r policy.Range) bool { return r.Proto == policy.AnyProtocol && r.Verdict == policy.DefaultDeny })
}

// groupRanges puts ranges together that are decided alike, in the order of the first.
func groupRanges(ranges []policy.Range) [][]policy.Range {
	var groups [][]policy.Range
next:
	for _, r := range ranges {
		for i, g := range groups {
			if g[0].Verdict == r.Verdict && slices.Equal(g[0].Rules, r.Rules) && sameFilter(g[0].Filter, r.Filter) {
				groups[i] = append(g, r)
				continue next
			}
		}
		groups = append(groups, []policy.Range{r})
	}
	return groups
}

// endpointsByClass names the endpoints of the cluster, by the terms that they match.
func (c *cluster) endpointsByClass(resolved *policy.Resolved, viewer *end) map[string][]string {
	all := map[string][]string{}
	classes := map[string]string{} // by peer
	for r := range c.snapshot.All(state.KindEndpoint) {
		e := r.(state.Endpoint)
		if e.HostNetwork || viewer.pod != nil && viewer.pod.UID == e.UID {
			continue
		}
		key := c.peerKey(&end{pod: &e}, e.Addresses[0], viewer.node)
		class, ok := classes[key]
		if !ok {
			class = "[]"
			if p := c.frozen.Peers[key]; p != nil {
				class = fmt.Sprint(resolved.Match(p))
			}
			classes[key] = class
		}
		all[class] = append(all[class], e.Namespace+"/"+e.Name)
	}
	for class, names := range all {
		slices.Sort(names)
		if len(names) > maxEndpoints {
			all[class] = append(names[:maxEndpoints:maxEndpoints], fmt.Sprintf("and %d more", len(names)-maxEndpoints))
		}
	}
	return all
}
