// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"
	"regexp"
	"strings"

	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/expression"
)

// RuleName names one item of a filter in the way that the access log gives it back: namespace/name/list[index]#item.
func RuleName(rule *policyv1.PolicyRule, item int) string {
	if rule.GetImplicit() != "" {
		return fmt.Sprintf("/%s/[0]#%d", rule.GetImplicit(), item)
	}
	specs := ""
	if rule.GetSpec() > 0 {
		specs = fmt.Sprintf("specs[%d]/", rule.GetSpec())
	}
	return fmt.Sprintf("%s/%s/%s%s[%d]#%d", rule.GetNamespace(), rule.GetName(), specs, rule.GetList(), rule.GetIndex(), item)
}

// visibilityRule is the RBAC policy of what is only seen.
const visibilityRule = "visibility"

func everything() *rbacv3.Policy {
	return &rbacv3.Policy{
		Permissions: []*rbacv3.Permission{{Rule: &rbacv3.Permission_Any{Any: true}}},
		Principals:  anybody(),
	}
}

func anybody() []*rbacv3.Principal {
	return []*rbacv3.Principal{{Identifier: &rbacv3.Principal_Any{Any: true}}}
}

// httpRules are the rules of an HTTP filter; the kernel chose it by the peer, so that everybody who is here is meant.
func httpRules(f *policyv1.Filter) *rbacv3.RBAC {
	rules := &rbacv3.RBAC{Action: rbacv3.RBAC_ALLOW, Policies: map[string]*rbacv3.Policy{}}
	if f.GetVisibility() {
		rules.Policies[visibilityRule] = everything()
	}
	for i, item := range f.GetHttp() {
		p := everything()
		if matchers := conditions(item); len(matchers) > 0 {
			p.Permissions = []*rbacv3.Permission{allOf(matchers)}
		}
		rules.Policies[RuleName(item.GetRule(), i)] = p
	}
	return rules
}

func allOf(matchers []*routev3.HeaderMatcher) *rbacv3.Permission {
	set := &rbacv3.Permission_Set{}
	for _, m := range matchers {
		set.Rules = append(set.Rules, &rbacv3.Permission{Rule: &rbacv3.Permission_Header{Header: m}})
	}
	if len(set.GetRules()) == 1 {
		return set.GetRules()[0]
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_AndRules{AndRules: set}}
}

// part is an expression of an item: its field in the policy, and the header that it is matched with.
type part struct{ field, header, expression string }

func parts(item *policyv1.HTTPRule) [3]part {
	return [3]part{{"method", ":method", item.GetMethod()}, {"path", ":path", item.GetPath()}, {"host", ":authority", item.GetHost()}}
}

// conditions are what an item wants of a request; headers with an action are no conditions. The path is matched with its query, as `:path` has it.
func conditions(item *policyv1.HTTPRule) []*routev3.HeaderMatcher {
	var all []*routev3.HeaderMatcher
	for _, p := range parts(item) {
		if p.expression != "" {
			all = append(all, textMatcher(p.header, &matcherv3.StringMatcher{
				MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: p.expression}},
			}))
		}
	}
	for _, h := range item.GetHeaders() {
		if h.GetMismatch() == policyv1.Mismatch_MISMATCH_UNSPECIFIED {
			all = append(all, headerMatcher(h))
		}
	}
	return all
}

// dearest says which expression of a filter's items has most instructions, for who has to write others.
func dearest(items []*policyv1.HTTPRule) string {
	text, most := "", -1
	for i, item := range items {
		for _, p := range parts(item) {
			if n, err := expression.Instructions(p.expression); err == nil && n > most {
				text, most = fmt.Sprintf("%s.%s has most: %d", RuleName(item.GetRule(), i), p.field, n), n
			}
		}
	}
	return text
}

// headerMatcher matches a header that is as required.
func headerMatcher(h *policyv1.HeaderRule) *routev3.HeaderMatcher {
	if h.Value == nil {
		return &routev3.HeaderMatcher{Name: h.GetName(), HeaderMatchSpecifier: &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}}
	}
	return textMatcher(h.GetName(), &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: h.GetValue()}})
}

func textMatcher(name string, m *matcherv3.StringMatcher) *routev3.HeaderMatcher {
	return &routev3.HeaderMatcher{Name: name, HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: m}}
}

// tlsRules are the rules of connections with TLS that pass unread.
func tlsRules(f *policyv1.Filter) *rbacv3.RBAC {
	rules := &rbacv3.RBAC{Action: rbacv3.RBAC_ALLOW, Policies: map[string]*rbacv3.Policy{}}
	if f.GetVisibility() {
		rules.Policies[visibilityRule] = everything()
	}
	for i, item := range f.GetTls() {
		p := everything()
		if !item.GetAny() {
			p.Permissions = nil
			for _, name := range item.GetServerNames() {
				p.Permissions = append(p.Permissions, &rbacv3.Permission{Rule: &rbacv3.Permission_RequestedServerName{
					RequestedServerName: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{
						SafeRegex: &matcherv3.RegexMatcher{Regex: serverNameRegex(name)},
					}},
				}})
			}
		}
		if len(p.GetPermissions()) > 0 {
			rules.Policies[RuleName(item.GetRule(), i)] = p
		}
	}
	return rules
}

const label = `[-0-9_a-z]+`

// serverNameRegex makes a regular expression of a pattern of server names: `*` alone = any valid name, elsewhere characters without a dot; `**.` at the
// start = one or more labels; any other run of stars = one. The whole name must match; `.` at its end does not count.
func serverNameRegex(pattern string) string {
	pattern = strings.TrimSuffix(strings.ToLower(pattern), ".")
	if strings.Trim(pattern, "*") == "" {
		return label + `(\.` + label + `)*\.?`
	}
	var b strings.Builder
	if rest, ok := strings.CutPrefix(pattern, "**."); ok {
		b.WriteString(`([^.]+\.)+`)
		pattern = rest
	}
	for i, part := range strings.FieldsFunc(strings.ReplaceAll(pattern, "*", "\x00*\x00"), func(r rune) bool { return r == 0 }) {
		switch {
		case part != "*":
			b.WriteString(regexp.QuoteMeta(part))
		case i == 0 || !strings.HasSuffix(b.String(), `[^.]*`):
			b.WriteString(`[^.]*`)
		}
	}
	b.WriteString(`\.?`)
	return b.String()
}
