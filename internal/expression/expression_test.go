// SPDX-License-Identifier: Apache-2.0

package expression_test

import (
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

// A hostile expression must not make counting dear: the parser bounds repetition, and what it takes it takes in time that grows with the text.
func FuzzInstructions(f *testing.F) {
	for _, seed := range []string{"", "/a.*", "(a|b)*c{1,100}", "((x{1,1000}))", `\p{L}+`, "(?i)k", "[^/]+", "("} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > 1024 {
			return
		}
		if n, err := expression.Instructions(text); err == nil && (n < 1 || n > 1_000*len(text)+10_000) {
			t.Errorf("%d instructions", n)
		}
	})
}
