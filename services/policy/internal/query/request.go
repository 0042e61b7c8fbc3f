// SPDX-License-Identifier: Apache-2.0

package query

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/internal/reserved"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/server"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// asked is what is asked on a connection: one of the kinds, or nothing.
type asked struct {
	http *policy.HTTPRequest
	dns  string
	sni  string
}

// Bounds of a request.
const (
	maxHeaders = 100
	maxText    = 8192
)

// askedOf reads what is asked; nil = nothing.
func askedOf(r *policyv1.ExplainConnectionRequest) (*asked, error) {
	given := 0
	for _, is := range []bool{r.GetHttp() != nil, r.GetDns() != "", r.GetSni() != ""} {
		if is {
			given++
		}
	}
	switch {
	case given == 0:
		return nil, nil
	case given > 1:
		return nil, grpcstatus.Error(codes.InvalidArgument, "http: only one of http, dns and sni can be asked")
	case len(r.GetDns()) > maxDNSName || len(r.GetSni()) > maxDNSName:
		return nil, grpcstatus.Errorf(codes.InvalidArgument, "dns: a name has at most %d characters", maxDNSName)
	case r.GetHttp() == nil:
		return &asked{dns: r.GetDns(), sni: r.GetSni()}, nil
	}
	h := r.GetHttp()
	q := &policy.HTTPRequest{Method: h.GetMethod(), Path: h.GetPath(), Host: h.GetHost()}
	if q.Method == "" {
		q.Method = "GET"
	}
	if q.Path == "" {
		q.Path = "/"
	}
	if len(h.GetHeaders()) > maxHeaders || len(q.Method)+len(q.Path)+len(q.Host) > maxText {
		return nil, grpcstatus.Error(codes.InvalidArgument, "http: the request is too large")
	}
	for _, x := range h.GetHeaders() {
		if x.GetName() == "" || len(x.GetName())+len(x.GetValue()) > maxText {
			return nil, grpcstatus.Error(codes.InvalidArgument, "http: a header has no name, or is too large")
		}
		q.Headers = append(q.Headers, policy.Header{Name: x.GetName(), Value: x.GetValue()})
	}
	return &asked{http: q}, nil
}

// judge asks the items of a filter one by one. It returns nothing where what is asked is not what the filter reads.
func (a *asked) judge(f *engine.Filter) (steps []*policyv1.FilterStep, refused bool) {
	if a == nil {
		return nil, false
	}
	accepted := f.Visibility
	add := func(s *policyv1.FilterStep) {
		steps = append(steps, s)
		accepted = accepted || s.GetAccepts()
	}
	switch {
	case a.http != nil && f.Kind == policy.FilterHTTP:
		for i := range f.HTTP {
			add(a.judgeHTTP(f, i))
		}
	case a.dns != "" && f.Kind == policy.FilterDNS:
		for i := range f.DNS {
			add(a.judgeDNS(f, i))
		}
	case a.sni != "" && f.Kind != policy.FilterDNS, a.http != nil && f.Kind == policy.FilterTLS:
		for i := range f.TLS {
			add(a.judgeTLS(f, i))
		}
	default:
		return nil, false
	}
	return steps, !accepted
}

func (a *asked) judgeHTTP(f *engine.Filter, i int) *policyv1.FilterStep {
	item := f.HTTP[i]
	s := &policyv1.FilterStep{Rule: server.RuleProto(f.Rules[item.Rule]), Item: httpInWords(&item.HTTPRule)}
	alone := func(rule policy.HTTPRule) ([]policy.Mutation, bool) {
		one := &policy.Filter{Kind: policy.FilterHTTP, HTTP: []policy.HTTPItem{{HTTPRule: rule}}}
		_, did, ok := one.AcceptsHTTP(*a.http)
		return did, ok
	}
	did, ok := alone(item.HTTPRule)
	if s.Accepts = ok; ok {
		var words []string
		for _, m := range did {
			words = append(words, mutationInWords(m))
		}
		s.Reason = strings.Join(words, "; ")
		return s
	}
	normal, redirect := policy.NormalizePath(a.http.Path)
	if redirect {
		s.Reason = "the path has an encoded slash: the client is sent to " + normal
		return s
	}
	var why []string
	for _, part := range []struct {
		rule policy.HTTPRule
		text string
	}{
		{policy.HTTPRule{Method: item.Method}, fmt.Sprintf("the method is %s", a.http.Method)},
		{policy.HTTPRule{Path: item.Path}, fmt.Sprintf("the path is %s", normal)},
		{policy.HTTPRule{Host: item.Host}, fmt.Sprintf("the host is %q", a.http.Host)},
		{policy.HTTPRule{Headers: item.Headers, HeaderMatches: item.HeaderMatches}, "the headers are not as it wants"},
	} {
		if _, ok := alone(part.rule); !ok {
			why = append(why, part.text)
		}
	}
	s.Reason = strings.Join(why, "; ")
	return s
}

func mutationInWords(m policy.Mutation) string {
	switch m.Action {
	case "ADD":
		return "adds header " + m.Name + ": " + m.Value
	case "DELETE":
		return "removes header " + m.Name
	case "REPLACE":
		return "sets header " + m.Name + ": " + m.Value
	}
	return "header " + m.Name + " is not as it wants, which is logged"
}

func (a *asked) judgeDNS(f *engine.Filter, i int) *policyv1.FilterStep {
	item := f.DNS[i]
	one := &policy.Filter{Kind: policy.FilterDNS, DNS: []policy.DNSItem{{NameSelector: item.NameSelector}}}
	_, ok := one.AcceptsDNS(a.dns)
	return &policyv1.FilterStep{Rule: server.RuleProto(f.Rules[item.Rule]), Item: nameInWords(item.NameSelector), Accepts: ok}
}

// judgeTLS asks for a server name or, for a request in plain text, for a connection without TLS.
func (a *asked) judgeTLS(f *engine.Filter, i int) *policyv1.FilterStep {
	item := f.TLS[i]
	one := &policy.Filter{Kind: f.Kind, TLS: []policy.TLSItem{{Any: item.Any, ServerNames: item.ServerNames}}}
	_, ok := one.AcceptsSNI(a.sni, a.sni != "")
	s := &policyv1.FilterStep{Rule: server.RuleProto(f.Rules[item.Rule]), Item: tlsInWords(&item), Accepts: ok}
	if !ok && a.sni == "" {
		s.Reason = "the connection is without TLS"
	}
	return s
}

// itemsInWords says what a filter lets through, an item each; nil = everything.
func itemsInWords(f *policy.Filter) []string {
	if f == nil || f.Visibility {
		return nil
	}
	var all []string
	for i := range f.HTTP {
		all = append(all, httpInWords(&f.HTTP[i].HTTPRule))
	}
	for i := range f.DNS {
		all = append(all, nameInWords(f.DNS[i].NameSelector))
	}
	for i := range f.TLS {
		all = append(all, tlsInWords(&f.TLS[i]))
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// httpInWords is such as "GET /public/.* host a.example header X-A: 1".
func httpInWords(r *policy.HTTPRule) string {
	var words []string
	if r.Method != "" {
		words = append(words, r.Method)
	}
	if r.Path != "" {
		words = append(words, r.Path)
	}
	if r.Host != "" {
		words = append(words, "host "+r.Host)
	}
	for _, c := range r.Conditions() {
		text := "header " + c.Name
		if c.Exact {
			text += ": " + c.Value
		}
		if c.Mismatch != "" {
			text += " (else " + c.Mismatch + ")"
		}
		words = append(words, text)
	}
	if len(words) == 0 {
		return "every request"
	}
	return strings.Join(words, " ")
}

func nameInWords(s policy.NameSelector) string {
	switch {
	case s.MatchName != "" && s.MatchPattern != "":
		return "names " + s.MatchName + " and " + s.MatchPattern
	case s.MatchName != "":
		return "name " + s.MatchName
	case s.MatchPattern != "":
		return "names " + s.MatchPattern
	}
	return "every name"
}

func tlsInWords(t *policy.TLSItem) string {
	if t.Any {
		return "every connection"
	}
	return "TLS to " + strings.Join(t.ServerNames, ", ")
}

// nameSteps finds the selectors of names that bear on a port, for a peer outside of the cluster.
func nameSteps(r *policy.Resolved, p *policy.Peer, proto uint8, port uint16) []*policyv1.NameStep {
	if !outside(p) {
		return nil
	}
	var all []*policyv1.NameStep
	for _, n := range r.Names() {
		at, ok := rangeAt(n.Ranges, proto, port)
		if !ok {
			continue
		}
		s := &policyv1.NameStep{Selector: n.MatchName + n.MatchPattern}
		for _, i := range at.Rules {
			s.Rules = append(s.Rules, server.RuleProto(r.Rules[i]))
		}
		s.Matches = slices.ContainsFunc(p.Names, func(name string) bool { return policy.MatchName(n.NameSelector, name) })
		all = append(all, s)
	}
	return all
}

// outside reports whether a peer is outside of the cluster.
func outside(p *policy.Peer) bool {
	switch identityOf(p.Key) {
	case reserved.World, reserved.WorldIPv4, reserved.WorldIPv6:
		return true
	}
	return p.Prefix.IsValid()
}

// routeOf returns what a pod's connection to a service goes through first.
func (c *cluster) routeOf(source *end, s *state.Service, proto uint8, port uint16) *policyv1.Route {
	if source.pod == nil || proto != policy.TCP {
		return nil
	}
	for _, p := range s.Ports {
		if number, _ := protocolOf(string(p.Protocol)); number == proto && p.Port == port && p.Route != "" {
			if route, ok := c.routes[p.Route]; ok {
				return server.RouteProto(route)
			}
		}
	}
	return nil
}

// namespaceOf is the namespace of an end; empty = it has none.
func (c *cluster) namespaceOf(e *end) string {
	if e.pod == nil {
		return ""
	}
	return e.pod.Namespace
}
