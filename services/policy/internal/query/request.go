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

// judge says what the items of a filter are and, where what is asked is what the filter reads, what each makes of it.
func (a *asked) judge(f *engine.Filter) (steps []*policyv1.FilterStep, answered, refused bool) {
	http := a != nil && a.http != nil && f.Kind == policy.FilterHTTP
	dns := a != nil && a.dns != "" && f.Kind == policy.FilterDNS
	tls := a != nil && (a.sni != "" && f.Kind != policy.FilterDNS || a.http != nil && f.Kind == policy.FilterTLS)
	add := func(rule int, item string, judge func(*policyv1.FilterStep)) {
		s := &policyv1.FilterStep{Rule: server.RuleProto(f.Rules[rule]), Item: item}
		if judge != nil {
			judge(s)
		}
		steps = append(steps, s)
	}
	for i := range f.HTTP {
		item := &f.HTTP[i]
		add(item.Rule, httpInWords(&item.HTTPRule), when(http, func(s *policyv1.FilterStep) { a.judgeHTTP(s, &item.HTTPRule) }))
	}
	for i := range f.DNS {
		item := &f.DNS[i]
		add(item.Rule, nameInWords(item.NameSelector), when(dns, func(s *policyv1.FilterStep) { a.judgeDNS(s, item.NameSelector) }))
	}
	for i := range f.TLS {
		item := &f.TLS[i]
		add(item.Rule, tlsInWords(item), when(tls, func(s *policyv1.FilterStep) { a.judgeTLS(s, item) }))
	}
	answered = http || dns || tls
	accepts := f.Visibility || slices.ContainsFunc(steps, (*policyv1.FilterStep).GetAccepts)
	return steps, answered, answered && !accepts
}

// when returns f, or nil.
func when(on bool, f func(*policyv1.FilterStep)) func(*policyv1.FilterStep) {
	if !on {
		return nil
	}
	return f
}

func (a *asked) judgeHTTP(s *policyv1.FilterStep, item *policy.HTTPRule) {
	alone := func(rule policy.HTTPRule) ([]policy.Mutation, bool) {
		one := &policy.Filter{Kind: policy.FilterHTTP, HTTP: []policy.HTTPItem{{HTTPRule: rule}}}
		_, did, ok := one.AcceptsHTTP(*a.http)
		return did, ok
	}
	did, ok := alone(*item)
	if s.Accepts = ok; ok {
		var words []string
		for _, m := range did {
			words = append(words, mutationInWords(m))
		}
		s.Reason = strings.Join(words, "; ")
		return
	}
	normal, redirect := policy.NormalizePath(a.http.Path)
	if redirect {
		s.Reason = "the path has an encoded slash: the client is sent to " + normal
		return
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

func (a *asked) judgeDNS(s *policyv1.FilterStep, item policy.NameSelector) {
	one := &policy.Filter{Kind: policy.FilterDNS, DNS: []policy.DNSItem{{NameSelector: item}}}
	_, s.Accepts = one.AcceptsDNS(a.dns)
}

// judgeTLS asks for a server name or, for a request in plain text, for a connection without TLS.
func (a *asked) judgeTLS(s *policyv1.FilterStep, item *policy.TLSItem) {
	one := &policy.Filter{Kind: policy.FilterTLS, TLS: []policy.TLSItem{{Any: item.Any, ServerNames: item.ServerNames}}}
	if _, s.Accepts = one.AcceptsSNI(a.sni, a.sni != ""); !s.Accepts && a.sni == "" {
		s.Reason = "the connection is without TLS"
	}
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
	if len(all) == 0 {
		return []string{"nothing"} // such as of names that match nothing
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
