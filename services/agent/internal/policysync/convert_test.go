// SPDX-License-Identifier: Apache-2.0

package policysync

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

func tcp(first, last uint32, rules ...uint32) *policyv1.PolicyRange {
	return &policyv1.PolicyRange{Protocol: 6, First: first, Last: last, Verdict: policyv1.Verdict_VERDICT_ALLOW, Rules: rules}
}

func filtered(key string, verdict policyv1.Verdict) *policyv1.PolicyRange {
	r := tcp(80, 80, 0)
	r.Filter, r.Verdict = key, verdict
	return r
}

// What cannot be read of a policy decides nothing: it is left out, and what is left out is denied.
func TestPolicyParts(t *testing.T) {
	tests := []struct {
		name    string
		class   *policyv1.PolicyClass
		want    string
		classes int // that are left, the one of everybody else included
		ranges  int // of the class
	}{
		{"good", &policyv1.PolicyClass{Selectors: []uint32{0, 1}, Ranges: []*policyv1.PolicyRange{tcp(1, 2), tcp(3, 3, 0)}}, "", 2, 2},
		{"selector", &policyv1.PolicyClass{Selectors: []uint32{2}}, "classes[1].selectors", 1, 0},
		{"order of selectors", &policyv1.PolicyClass{Selectors: []uint32{1, 0}}, "classes[1].selectors", 1, 0},
		{"protocol", &policyv1.PolicyClass{Selectors: []uint32{0}, Ranges: []*policyv1.PolicyRange{{Protocol: 256, Verdict: 1}}}, "ranges[0].protocol", 2, 0},
		{"ports", &policyv1.PolicyClass{Selectors: []uint32{0}, Ranges: []*policyv1.PolicyRange{tcp(1, 1), tcp(3, 2)}}, "ranges[1]", 2, 0},
		{"too high", &policyv1.PolicyClass{Selectors: []uint32{0}, Ranges: []*policyv1.PolicyRange{tcp(3, 65536)}}, "ranges[0]", 2, 0},
		{"overlap", &policyv1.PolicyClass{Selectors: []uint32{0}, Ranges: []*policyv1.PolicyRange{tcp(1, 5), tcp(5, 6)}}, "overlaps", 2, 0},
		{"rule", &policyv1.PolicyClass{Selectors: []uint32{0}, Ranges: []*policyv1.PolicyRange{tcp(1, 5, 1)}}, "no rule 1", 2, 0},
		{"filter", &policyv1.PolicyClass{Selectors: []uint32{0}, Ranges: []*policyv1.PolicyRange{filtered("f", 1)}}, "", 2, 1},
		{"unknown filter", &policyv1.PolicyClass{Selectors: []uint32{0}, Ranges: []*policyv1.PolicyRange{filtered("g", 1)}}, `no filter "g"`, 2, 0},
		{"filter of what is denied", &policyv1.PolicyClass{Selectors: []uint32{0}, Ranges: []*policyv1.PolicyRange{filtered("f", 3)}}, "nothing is allowed", 2, 0},
		{"verdict", &policyv1.PolicyClass{Selectors: []uint32{0}, Ranges: []*policyv1.PolicyRange{{Protocol: 6, First: 1, Last: 1, Verdict: 9}}}, "verdict", 2, 0},
	}
	for _, tt := range tests {
		u, err := policyOf(&policyv1.Policy{Key: "p", Direction: 1, Selectors: []string{"a", "b"}, Rules: []*policyv1.PolicyRule{{Name: "r"}},
			Filters: []*policyv1.Filter{{Key: "f", Kind: 1}}, Classes: []*policyv1.PolicyClass{{}, tt.class}})
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		p := u.Resource.(*desired.Policy)
		if len(p.Classes) != tt.classes || tt.classes == 2 && len(p.Classes[1].Ranges) != tt.ranges {
			t.Errorf("%s: classes %+v", tt.name, p.Classes)
		}
	}
}

// A filter or a name that cannot be read is left out, and so is what names it.
func TestFiltersAndNames(t *testing.T) {
	names := []*policyv1.PolicyName{
		{MatchName: "a.test", Ranges: []*policyv1.PolicyRange{filtered("f", 1)}},
		{MatchName: "b.test", MatchPattern: "*", Ranges: []*policyv1.PolicyRange{tcp(1, 1)}},
		{MatchPattern: "*.c.test", Ranges: []*policyv1.PolicyRange{filtered("none", 1)}},
		{MatchPattern: "*.d.test", Ranges: []*policyv1.PolicyRange{filtered("", 3)}},
		{MatchPattern: "*.e.test", Ranges: []*policyv1.PolicyRange{tcp(443, 443, 0)}},
	}
	u, err := policyOf(&policyv1.Policy{Key: "p", Direction: 2, Rules: []*policyv1.PolicyRule{{Name: "r"}}, Names: names, Filters: []*policyv1.Filter{
		{Key: "f", Kind: policyv1.FilterKind_FILTER_KIND_DNS, Visibility: true, Dns: []*policyv1.DNSRule{{Rule: &policyv1.PolicyRule{Name: "r"}, MatchPattern: "*.x"}}},
		{Key: "", Kind: 1}, {Key: strings.Repeat("k", 64), Kind: 1}, {Key: "route", Kind: policyv1.FilterKind_FILTER_KIND_ROUTE}},
		Classes: []*policyv1.PolicyClass{{Ranges: []*policyv1.PolicyRange{filtered("route", 1)}}}})
	for _, want := range []string{"filters[1].key", "filters[2].key", "filters[3].kind", "names[1].match_name", "names[2].ranges[0].filter", "names[3].ranges[0].verdict", "classes[0].ranges[0].filter"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: want %s", err, want)
		}
	}
	p := u.Resource.(*desired.Policy)
	if len(p.Filters) != 1 || !p.Filters[0].Visibility || p.Filters[0].DNS[0].MatchPattern != "*.x" || p.Filters[0].DNS[0].Rule.Name != "r" {
		t.Errorf("filters %+v", p.Filters)
	}
	if len(p.Names) != 2 || p.Names[0].Ranges[0].Filter != "f" || p.Names[1].MatchPattern != "*.e.test" || !p.Whole() || len(p.Classes[0].Ranges) != 0 {
		t.Errorf("policy %+v", p)
	}
}

func TestServiceParts(t *testing.T) {
	u, err := serviceOf(&policyv1.Service{Namespace: "default", Name: "web", ExternalIps: []string{"192.0.2.1", "x"}, SourceRanges: []string{"nonsense"}, HealthCheckNodePort: 70000,
		AffinitySeconds: 60, Algorithm: policyv1.Algorithm_ALGORITHM_MAGLEV, Ports: []*policyv1.ServicePort{{Protocol: 1, Port: 80, NodePort: 70000,
			Backends: []*policyv1.Backend{{Address: "::ffff:10.1.0.5", Port: 8080, Node: "n1", Terminating: true}, {Address: "10.1.0.6"}}}, {Protocol: 9, Port: 1}}})
	s := u.Resource.(*desired.Service)
	for _, want := range []string{"external_ips", "source_ranges", "health_check_node_port", "node port 70000", "backend \"10.1.0.6\"", "protocol 9"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want it to name %s", err, want)
		}
	}
	// A range that cannot be read lets nobody in, rather than everybody.
	if len(s.SourceRanges) != 1 || s.SourceRanges[0].Contains(netip.MustParseAddr("192.0.2.9")) || !s.Maglev || s.HealthCheckNodePort != 0 || len(s.Ports) != 1 || s.Ports[0].NodePort != 0 {
		t.Errorf("service %+v", s)
	}
	if b := s.Ports[0].Backends; len(b) != 1 || b[0] != (desired.Backend{Addr: netip.MustParseAddrPort("10.1.0.5:8080"), Node: "n1", Terminating: true}) {
		t.Errorf("backends %+v", b)
	}
}

// Whatever comes over the wire, what is taken of it makes sense.
func FuzzUpdate(f *testing.F) {
	for _, u := range []*policyv1.Update{
		{Revision: 1, Upserts: []*policyv1.Resource{{Resource: &policyv1.Resource_Policy{Policy: &policyv1.Policy{Key: "p", Direction: 1, Selectors: []string{"s"},
			Rules: []*policyv1.PolicyRule{{Name: "r"}}, Classes: []*policyv1.PolicyClass{{}, {Selectors: []uint32{0}, Ranges: []*policyv1.PolicyRange{tcp(1, 5, 0)}}}}}},
			{Resource: &policyv1.Resource_Selector{Selector: &policyv1.Selector{Key: "s", Members: []string{"b", "a", "a"}}}}},
			SelectorChanges: []*policyv1.SelectorChange{{Key: "s", Joined: []string{"c", "c"}, Left: []string{"a"}}}},
		{Upserts: []*policyv1.Resource{{Resource: &policyv1.Resource_Endpoint{Endpoint: &policyv1.Endpoint{Uid: "u", Addresses: []string{"10.1.0.5"}, Identity: 300, Variants: []string{"x", "y"}}}},
			{Resource: &policyv1.Resource_Service{Service: &policyv1.Service{Name: "s", Ports: []*policyv1.ServicePort{{Protocol: 1, Port: 1}}}}}},
			Removals: []*policyv1.ResourceKey{{Kind: 10, Key: "u"}, {Kind: 11}}},
	} {
		b, err := proto.Marshal(u)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		u := &policyv1.Update{}
		if proto.Unmarshal(b, u) != nil {
			return
		}
		upserts, _, _ := convert(u)
		changed, err := changedSelectors(u.GetSelectorChanges(), upserts, desired.NewStore())
		if err != nil {
			changed = nil
		}
		for _, x := range append(upserts, changed...) {
			switch r := x.Resource.(type) {
			case *desired.Selector:
				if !slices.IsSorted(r.Members) || len(slices.Compact(slices.Clone(r.Members))) != len(r.Members) {
					t.Errorf("selector %q", r.Members)
				}
			case *desired.Policy:
				for _, c := range r.Classes {
					for _, s := range c.Selectors {
						_ = r.Selectors[s]
					}
					for i, p := range c.Ranges {
						if p.First > p.Last || p.Verdict < desired.Allow || p.Verdict > desired.Deny || i > 0 && c.Ranges[i-1].Proto == p.Proto && c.Ranges[i-1].Last >= p.First {
							t.Errorf("ranges %+v", c.Ranges)
						}
						for _, n := range p.Rules {
							_ = r.Rules[n]
						}
					}
				}
			case *desired.Endpoint:
				for i := range r.Addresses {
					_ = r.Peer(i)
				}
			case *desired.Service:
				for _, p := range r.Ports {
					if p.Port == 0 {
						t.Errorf("service %+v", r)
					}
				}
			}
		}
	})
}

// A file that passed its checksum may still be of another program.
func FuzzState(f *testing.F) {
	f.Add([]byte(`{"time":"2026-01-01T00:00:00Z","policies":[{"Key":"p"}],"peers":[{"Key":"cidr:10.0.0.0/8"}]}`))
	f.Add([]byte(`{"nodes":[null]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, _, err := decodeState(b)
		if err != nil {
			return
		}
		for _, u := range all {
			if p, ok := u.Resource.(*desired.Policy); ok && !p.Whole() {
				t.Errorf("policy %+v", p)
			}
		}
		store := desired.NewStore()
		store.Apply(all, nil)
		if len(store.All()) > len(all) {
			t.Error("the state has grown")
		}
	})
}
