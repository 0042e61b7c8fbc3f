// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"encoding/json"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/test/reference"
	"github.com/weirmesh/weir/test/reference/random"
)

// TestRequests compares filters, and what they accept, with the reference evaluator.
func TestRequests(t *testing.T) {
	worlds := uint64((*cases*3 + packetsOfWorld - 1) / packetsOfWorld)
	t.Logf("%d worlds of %d requests, seeds %d to %d", worlds, packetsOfWorld, *seed, *seed+worlds-1)
	counts := map[string]int{}
	for s := *seed; s < *seed+worlds; s++ {
		report(t, scenarioOf(random.NewRequests(s, packetsOfWorld)), s, requestFault, counts)
	}
	t.Logf("sides: %v", counts)
	for _, key := range []string{
		"http true", "http false", "tls true", "tls false", "dns true", "dns false", "visible", "changed headers", "names", "conflicts",
	} {
		if counts[key] == 0 {
			t.Errorf("no side is of the kind: %s", key)
		}
	}
}

// requestFault compares verdicts, filters and what becomes of requests.
func requestFault(s scenario, counts map[string]int) (f *fault) {
	var p reference.Packet
	defer func() {
		if r := recover(); r != nil {
			f = &fault{fmt.Sprint("panic: ", r), fmt.Sprintf("%v\n%s", r, debug.Stack()), p}
		}
	}()
	c, f := compiled(s.cluster)
	if f != nil {
		return f
	}
	if counts == nil {
		counts = map[string]int{}
	}
	var q reference.Request
	for i := range s.packets {
		p, q = s.packets[i], s.requests[i]
		from, to := c.canonical(p.From), c.canonical(p.To)
		if from == to {
			continue
		}
		egress, ingress := s.cluster.Ask(p, q)
		for _, side := range []struct {
			subject, peer string
			direction     policy.Direction
			side          reference.Side
			want          reference.Answer
		}{{from, to, policy.Egress, reference.Egress, egress}, {to, from, policy.Ingress, reference.Ingress, ingress}} {
			if c.conflicts[resolvedKey{side.subject, side.direction}] != nil {
				counts["conflicts"]++
				continue
			}
			decision, err := c.decision(side.subject, side.peer, side.direction, p)
			if err != nil {
				return &fault{"inner", err.Error(), p}
			}
			if c.resolved[resolvedKey{side.subject, side.direction}] != nil && s.cluster.Conflicts(side.side, side.subject, side.peer, p) {
				return &fault{"conflict", "the reference sees a conflict of rules, and the compiler none", p}
			}
			if text := differs(decision, side.want, q, counts); text != "" {
				return &fault{"answer " + text, fmt.Sprintf("%s: %s: %+v, filter %s; the reference says %+v", side.side, text, decision, filterText(decision.Filter), side.want), p}
			}
		}
		if len(s.cluster.Learnt) > 0 {
			counts["names"]++
		}
	}
	return nil
}

func filterText(f *policy.Filter) string {
	raw, err := json.Marshal(f)
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

// differs compares a decision and what it makes of a request with the reference's answer; "" = they agree.
func differs(d policy.Decision, want reference.Answer, q reference.Request, counts map[string]int) string {
	counts[want.Verdict.String()]++
	if reference.Verdict(d.Verdict) != want.Verdict {
		return "verdict"
	}
	proxy := ""
	if d.Filter != nil {
		proxy = d.Filter.Kind.String()
	}
	if proxy != want.Proxy {
		return "proxy"
	}
	if d.Filter == nil {
		return ""
	}
	if d.Filter.Visibility != want.Visible {
		return "visibility"
	}
	if want.Visible {
		counts["visible"]++
	}
	passes, headers, asked := judge(d.Filter, q)
	if !asked {
		return ""
	}
	counts[fmt.Sprint(proxy, " ", want.Passes)]++
	if passes != want.Passes {
		return "request"
	}
	if q.HTTP == nil || !passes {
		return ""
	}
	if !slices.Equal(byName(headers), byName(want.Headers)) {
		return fmt.Sprintf("headers %q", headers)
	}
	if !slices.Equal(headers, q.HTTP.Headers) {
		counts["changed headers"]++
	}
	return ""
}

// byName sorts headers by name: the order of values of one name means something, that of names does not.
func byName(headers []string) []string {
	name := func(h string) string {
		name, _, _ := strings.Cut(h, ":")
		return strings.ToLower(name)
	}
	out := make([]string, len(headers))
	for i, h := range headers {
		_, value, _ := strings.Cut(h, ":")
		out[i] = name(h) + ":" + value
	}
	slices.SortStableFunc(out, func(a, b string) int { return strings.Compare(name(a), name(b)) })
	return out
}

// judge asks the compiled filter. A request of another kind than what the filter reads is nobody's question.
func judge(f *policy.Filter, q reference.Request) (passes bool, headers []string, asked bool) {
	switch {
	case q.TLS != nil && f.Kind != policy.FilterDNS:
		_, passes = f.AcceptsSNI(q.TLS.SNI, true)
		return passes, nil, true
	case q.HTTP != nil && f.Kind == policy.FilterTLS:
		_, passes = f.AcceptsSNI("", false)
		return passes, q.HTTP.Headers, true
	case q.HTTP != nil && f.Kind == policy.FilterHTTP:
		passes, headers = acceptsHTTP(f, q.HTTP)
		return passes, headers, true
	case q.DNS != nil && f.Kind == policy.FilterDNS:
		_, passes = f.AcceptsDNS(q.DNS.Name)
		return passes, nil, true
	}
	return false, nil, false
}

func acceptsHTTP(f *policy.Filter, q *reference.HTTPRequest) (passes bool, headers []string) {
	request := policy.HTTPRequest{Method: q.Method, Path: q.Path, Host: q.Host}
	for _, h := range q.Headers {
		name, value, _ := strings.Cut(h, ": ")
		request.Headers = append(request.Headers, policy.Header{Name: name, Value: value})
	}
	_, mutations, passes := f.AcceptsHTTP(request)
	headers = slices.Clone(q.Headers)
	for _, m := range mutations {
		if m.Action == "DELETE" || m.Action == "REPLACE" {
			headers = slices.DeleteFunc(headers, func(h string) bool {
				name, _, _ := strings.Cut(h, ":")
				return strings.EqualFold(name, m.Name)
			})
		}
		if m.Action == "ADD" || m.Action == "REPLACE" {
			headers = append(headers, m.Name+": "+m.Value)
		}
	}
	return passes, headers
}

// TestTrials asks compiled filters what trials ask of real proxies.
func TestTrials(t *testing.T) {
	faults := 0
	fault := func(seed uint64, format string, args ...any) {
		t.Errorf("seed %d: %s", seed, fmt.Sprintf(format, args...))
		if faults++; faults >= *stop {
			t.Fatal("too many faults")
		}
	}
	for s := *seed; s < *seed+uint64(*cases/10); s++ {
		trial := random.RandomHTTP(s)
		f := filterOf(t, "ingress", `{"port": "80", "protocol": "TCP"}`, "rules", map[string]any{"http": trial.Rules})
		for _, ask := range trial.Asks {
			passes, headers := acceptsHTTP(f, &ask.Request)
			location, redirect := policy.NormalizePath(ask.Request.Path)
			if passes != ask.Passes || passes && !slices.Equal(headers, ask.Headers) || redirect != (ask.Location != "") || redirect && location != ask.Location {
				fault(s, "%v: %+v: %t %q %q", trial.Rules, ask, passes, headers, location)
			}
		}
		names := random.RandomDNS(s)
		f = filterOf(t, "egress", `{"port": "53"}`, "rules", map[string]any{"dns": names.Rules})
		for _, ask := range names.Asks {
			if _, passes := f.AcceptsDNS(ask.Name); passes != ask.Passes {
				fault(s, "%v: %+v: %t", names.Rules, ask, passes)
			}
		}
		servers := random.RandomSNI(s)
		f = filterOf(t, "egress", `{"port": "443", "protocol": "TCP"}`, "serverNames", servers.ServerNames)
		for _, ask := range servers.Asks {
			if _, passes := f.AcceptsSNI(ask.Name, ask.TLS); passes != ask.Passes {
				fault(s, "%v: %+v: %t", servers.ServerNames, ask, passes)
			}
		}
	}
}

// filterOf compiles one rule with a member above L4.
func filterOf(t *testing.T, direction, port, member string, value any) *policy.Filter {
	t.Helper()
	raw, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	document := fmt.Sprintf(`{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "p", "namespace": "shop"}, "spec":
		{"endpointSelector": {}, %q: [{"toPorts": [{"ports": [%s], %q: %s}]}]}}`, direction, port, member, raw)
	o, err := policy.Parse([]byte(document), policy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := policy.Resolve(policy.Options{}, &policy.Subject{Labels: []string{"k8s:io.kubernetes.pod.namespace=shop"}}, o.Rules[0].Direction, o.Rules, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range r.Class(nil) {
		if x.Filter != nil {
			return x.Filter
		}
	}
	t.Fatalf("%s has no filter", document)
	return nil
}
