// SPDX-License-Identifier: Apache-2.0

package policymap_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

func filtered(r desired.PolicyRange, key string) desired.PolicyRange {
	r.Filter = key
	return r
}

// apiPolicy: selector 0 passes a filter at port 80, is looked at on port 81, and everybody reaches port 443.
func apiPolicy(key string) *desired.Policy {
	return &desired.Policy{Key: key, Direction: desired.Ingress, Selectors: []string{"web"}, Rules: []desired.PolicyRule{rule("api"), rule("tls")},
		Filters: []desired.Filter{{Key: "http-a", Kind: desired.FilterHTTP}, {Key: "http-b", Kind: desired.FilterHTTP, Visibility: true},
			{Key: "dns-c", Kind: desired.FilterDNS, DNS: []desired.DNSRule{{Rule: rule("api"), MatchPattern: "*.test"}}}},
		Classes: []desired.PolicyClass{
			{Ranges: []desired.PolicyRange{ports(desired.Allow, 443, 443, 1)}},
			{Selectors: []uint32{0}, Ranges: []desired.PolicyRange{filtered(ports(desired.Allow, 80, 80, 0), "http-a"),
				filtered(ports(desired.Allow, 81, 81, 0), "http-b"), ports(desired.Allow, 443, 443, 1)}},
		},
		Names: []desired.PolicyName{{MatchPattern: "*.example", Ranges: []desired.PolicyRange{filtered(ports(desired.Allow, 80, 80, 0), "http-a"), ports(desired.Allow, 8080, 8080, 1)}}},
	}
}

func TestFilters(t *testing.T) {
	f := start(t)
	f.apply(false, []desired.Resource{selector("web", "300"), apiPolicy("p"), &desired.Subject{Key: "pod", Ingress: "p"}})
	f.prune()
	f.bind("pod", 7)
	f.expect("filters", 7, map[string]string{"300:80": "redirect http-a api", "300:81": "visible http-b api", "300:443": "allow tls", "301:80": "default-deny"})
	if c := f.rules.filters[3]; len(f.rules.filters) != 1 || c.Key != "dns-c" || c.DNS[0].MatchPattern != "*.test" {
		t.Errorf("weir-dns has filters %+v: want the one of slot 3", f.rules.filters)
	}
	want := []datapath.PolicyRange{{Proto: 6, First: 80, Last: 80, Verdict: datapath.PolicyRedirect, Slot: 1}, {Proto: 6, First: 8080, Last: 8080, Verdict: datapath.PolicyAllow}}
	names := f.rules.policies[2]
	if len(names) != 1 || names[0].MatchPattern != "*.example" {
		t.Fatalf("weir-dns has names %+v", names)
	}
	for i, r := range names[0].Ranges {
		if m := f.told.matches[r.Rule]; len(f.told.rules[r.Rule]) != 1 || m != 2 {
			t.Errorf("rule %d is %v by match %d: want one, by peer and port", r.Rule, f.told.rules[r.Rule], m)
		}
		r.Rule = 0
		if r != want[i] {
			t.Errorf("range %+v, want %+v", r, want[i])
		}
	}
	if keys := f.Filters(); len(keys) != 3 || len(f.FilterRules("http-a")) != 2 || !slices.Equal(f.FilterUsers("http-b"), []string{"p"}) {
		t.Errorf("filters %v, rules %v, users %v", keys, f.FilterRules("http-a"), f.FilterUsers("http-b"))
	}

	// Its rows change: weir-dns is told again.
	clear(f.rules.policies)
	f.apply(false, []desired.Resource{selector("web", "300", "305")})
	if len(f.rules.policies) != 1 {
		t.Errorf("weir-dns is told of %d policies, want the one whose rows changed", len(f.rules.policies))
	}
	f.apply(false, []desired.Resource{&desired.Subject{Key: "pod"}}, desired.Key{Kind: desired.KindPolicy, Name: "p"})
	if len(f.rules.policies) != 0 || len(f.Filters()) != 0 {
		t.Errorf("left: names %v, filters %v", f.rules.policies, f.Filters())
	}
}

// A policy for which there is no slot does not replace the one before, and without one before nothing passes.
func TestSlotsAreFull(t *testing.T) {
	f := start(t)
	f.slots.max = 2
	f.apply(false, append(state(), apiPolicy("q")))
	f.prune()
	f.bind("pod", 7)
	f.apply(false, []desired.Resource{&desired.Subject{Key: "pod", Ingress: "q"}, &desired.Subject{Key: "new", Ingress: "q"}})
	f.bind("new", 8)
	f.expect("refused", 7, map[string]string{"300:80": "allow allow"})
	f.expect("refused, nothing before", 8, map[string]string{"300:443": "default-deny"})
	key := desired.Key{Kind: desired.KindPolicy, Name: "q"}
	if r := f.Refusals()[key]; !strings.Contains(r, "slots are full") {
		t.Errorf("refusals %v", f.Refusals())
	}
	if len(f.rules.policies) != 0 {
		t.Errorf("names %v of a policy that is not in force", f.rules.policies)
	}
	f.slots.max = 3
	if err := f.Retry(); err != nil || len(f.Refusals()) != 0 {
		t.Errorf("retry: %v, refusals %v", err, f.Refusals())
	}
	f.expect("a slot is free", 8, map[string]string{"300:80": "redirect http-a api"})

	// A class of a policy in force that needs one slot more: what has none is denied, the rest holds.
	more := apiPolicy("q")
	more.Filters = append(more.Filters, desired.Filter{Key: "http-d", Kind: desired.FilterHTTP})
	more.Classes = slices.Clone(more.Classes)
	more.Classes[1].Ranges = []desired.PolicyRange{filtered(ports(desired.Allow, 80, 80, 0), "http-d")}
	f.apply(false, []desired.Resource{more, selector("web", "300", "306")})
	f.expect("a class that needs more", 8, map[string]string{"300:80": "default-deny", "306:80": "default-deny", "306:443": "default-deny", "301:443": "allow tls"})
	if len(f.Refusals()) != 1 {
		t.Errorf("refusals %v", f.Refusals())
	}
}

// Where a peer finds no room, it may be judged as everybody else only if that lets it pass no more than it should.
func TestFiltersInAFullMap(t *testing.T) {
	open := func(filter string) *desired.Policy {
		return &desired.Policy{Key: "p", Direction: desired.Ingress, Selectors: []string{"web"}, Rules: []desired.PolicyRule{rule("r")},
			Filters: []desired.Filter{{Key: "http-a", Kind: desired.FilterHTTP}, {Key: "http-v", Kind: desired.FilterHTTP, Visibility: true}},
			Classes: []desired.PolicyClass{{Ranges: []desired.PolicyRange{filtered(ports(desired.Allow, 80, 80, 0), filter)}},
				{Selectors: []uint32{0}, Ranges: []desired.PolicyRange{filtered(ports(desired.Allow, 80, 80, 0), "http-a"), ports(desired.Allow, 81, 81, 0)}}}}
	}
	for _, tt := range []struct{ rest, want string }{
		{"", "default-deny"}, {"http-v", "default-deny"}, {"http-a", "redirect http-a r"},
	} {
		f := start(t)
		f.apply(false, []desired.Resource{selector("web"), open(tt.rest), &desired.Subject{Key: "pod", Ingress: "p"}})
		f.prune()
		f.bind("pod", 7)
		f.kernel.max = len(f.kernel.rows)
		f.apply(false, []desired.Resource{selector("web", "300")})
		f.expect("others pass "+tt.rest, 7, map[string]string{"300:80": tt.want})
	}
}

// After a restart, too, all rows are written and weir-dns can be told before an endpoint gets its policy.
func TestPruneStopsBeforeEndpoints(t *testing.T) {
	f := start(t)
	f.apply(false, state())
	f.prune()
	f.bind("pod", 7)
	f.restart()
	f.apply(true, state())
	must(t, f.Adopt("pod", 7))
	f.apply(false, []desired.Resource{apiPolicy("q"), &desired.Subject{Key: "pod", Ingress: "q"}})
	before := f.kernel.endpoints[7]
	must(t, f.Prune(func() {
		if f.kernel.endpoints[7] != before || len(f.rules.policies) != 1 {
			t.Errorf("endpoint %+v, was %+v; weir-dns is told of %d policies", f.kernel.endpoints[7], before, len(f.rules.policies))
		}
	}))
	f.expect("after", 7, map[string]string{"300:80": "redirect http-a api"})
}
