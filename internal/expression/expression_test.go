// SPDX-License-Identifier: Apache-2.0

package expression_test

import (
	"regexp/syntax"
	"strings"
	"testing"

	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	filterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weirmesh/weir/internal/expression"
)

func route(expression string) *routev3.Route {
	return &routev3.Route{Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: expression}}}}
}

// Expressions count wherever they stand: in lists, in maps, and packed.
func TestCost(t *testing.T) {
	one, err := expression.Instructions("/a.*")
	if err != nil || one < 4 {
		t.Fatalf("%d instructions, %v", one, err)
	}
	rules := &rbacv3.RBAC{Policies: map[string]*rbacv3.Policy{"shop/rule": {Permissions: []*rbacv3.Permission{{Rule: &rbacv3.Permission_UrlPath{UrlPath: &matcherv3.PathMatcher{
		Rule: &matcherv3.PathMatcher_Path{Path: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: "/a.*"}}}},
	}}}}}}}
	packed, err := anypb.New(&filterv3.RBACPerRoute{Rbac: &filterv3.RBAC{Rules: rules}})
	if err != nil {
		t.Fatal(err)
	}
	host := &routev3.VirtualHost{
		Routes:               []*routev3.Route{route("/a.*"), {Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}}}, route("/b.*")},
		TypedPerFilterConfig: map[string]*anypb.Any{"envoy.filters.http.rbac": packed},
	}
	if got, err := expression.Cost(&routev3.RouteConfiguration{VirtualHosts: []*routev3.VirtualHost{host}}); err != nil || got != 3*one {
		t.Errorf("%d instructions, %v; want %d", got, err, 3*one)
	}
}

// Counting ends where it is decided: a huge configuration costs the one who counts no more than the bound.
func TestCostIsBounded(t *testing.T) {
	c := &routev3.VirtualHost{}
	for range 2_000 {
		c.Routes = append(c.Routes, route("(x{1,100}){1,9}"))
	}
	each, err := expression.Instructions("(x{1,100}){1,9}")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := expression.Cost(c); err != nil || got <= expression.MaxInstructions || got > expression.MaxInstructions+each {
		t.Errorf("%d instructions, %v", got, err)
	}
	if _, err := expression.Cost(route("(")); err == nil || !strings.Contains(err.Error(), "missing closing") {
		t.Errorf("error %v", err)
	}
}

// Measuring must cost what the text costs: this program would take seconds to compile.
func TestInstructionsAreNotCompiled(t *testing.T) {
	text := "(" + strings.Repeat("a", 1000) + "){1000}"
	got, err := expression.Instructions(text)
	if err != nil || got != 2+1000*(2+1000) {
		t.Errorf("%d instructions, %v", got, err)
	}
	if allocs := testing.AllocsPerRun(10, func() { _, _ = expression.Instructions(text) }); allocs > 200 {
		t.Errorf("%.0f allocations", allocs)
	}
}

// A class of characters is one instruction, and may be some KiB.
func TestLargeClasses(t *testing.T) {
	for text, most := range map[string]int{"[a-z0-9_]": 3, `\d`: 3, `[^/]`: 3} {
		if n, err := expression.Instructions(text); err != nil || n > most {
			t.Errorf("%s: %d instructions, %v; want at most %d", text, n, err, most)
		}
	}
	if n, err := expression.Instructions(`\pL`); err != nil || n < 10 {
		t.Errorf("%d instructions, %v", n, err)
	}
}

// FuzzInstructions compares with the library's program. Where classes are large, more is counted.
func FuzzInstructions(f *testing.F) {
	for _, seed := range []string{
		"", "/a.*", "(a|b)*c{1,100}", "((x{1,1000}))", `\p{L}+`, "(?i)k", "[^/]+", "(", "(a*)*", "(?:a*)*", "(?:a*?)*", "(|a)*", "(a|b)*?{2,5}", "a{0}", "(?:a{0})+",
		"(?:){3,7}", "x{0,}", "x{1,}?", "x{5,}", "(?:x{2,3}){0,4}", `[^\x00-\x{10FFFF}]`, `a[^\x00-\x{10FFFF}]b|c`, `(?:[^\x00-\x{10FFFF}]|a)+`, `(?:[^\x00-\x{10FFFF}]+)?`,
		`(?:[^\x00-\x{10FFFF}]*|)*`, `(\b|^|$|\A|\z|\B)*`, "(?:^)*", "(?:a|b|cd)+?", "(?s).*", "(?U)a+?",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		const dear = 100_000 // for the library
		n, err := expression.Instructions(text)
		tree, parseErr := syntax.Parse(text, syntax.Perl)
		if (err == nil) != (parseErr == nil) {
			t.Fatalf("%v, the library: %v", err, parseErr)
		}
		if err != nil || n > dear {
			return
		}
		program, err := syntax.Compile(tree.Simplify())
		if err != nil {
			t.Fatal(err)
		}
		classes := 0
		for _, i := range program.Inst {
			classes += len(i.Rune) / 64
		}
		if want := len(program.Inst) + classes; n != want {
			t.Errorf("%d instructions, the library has %d and %d for large classes", n, len(program.Inst), classes)
		}
	})
}
