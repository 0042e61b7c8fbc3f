// SPDX-License-Identifier: Apache-2.0

package state

import (
	"testing"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/engine"
)

// The same filter, out of a policy with more rules and with its items in another order, has the same revision; one that says anything else has not.
func TestFilterRevision(t *testing.T) {
	rule := func(name string) policy.RuleName {
		return policy.RuleName{Ref: policy.Ref{Namespace: "default", Name: name}, List: "ingress"}
	}
	get := func(rule int, path string) policy.HTTPItem {
		return policy.HTTPItem{Rule: rule, HTTPRule: policy.HTTPRule{Method: "GET", Path: path}}
	}
	filter := func(rules []policy.RuleName, items ...policy.HTTPItem) *engine.Filter {
		return &engine.Filter{Filter: &policy.Filter{Key: "http-1", Kind: policy.FilterHTTP, HTTP: items}, Namespace: "default", Rules: rules}
	}
	a, b, c := rule("a"), rule("b"), rule("c")
	base := filter([]policy.RuleName{a, b}, get(0, "/a"), get(1, "/b"))
	if filterRevision(base) != filterRevision(filter([]policy.RuleName{c, b, a}, get(1, "/b"), get(2, "/a"))) {
		t.Error("the same filter of another policy has another revision")
	}
	seen := map[string]string{filterRevision(base): "base"}
	for name, f := range map[string]*engine.Filter{
		"path":    filter([]policy.RuleName{a, b}, get(0, "/a"), get(1, "/c")),
		"rule":    filter([]policy.RuleName{a, c}, get(0, "/a"), get(1, "/b")),
		"swapped": filter([]policy.RuleName{b, a}, get(0, "/a"), get(1, "/b")),
		"less":    filter([]policy.RuleName{a, b}, get(0, "/a")),
		"none":    filter([]policy.RuleName{a, b}),
		"tls":     {Filter: &policy.Filter{Key: "http-1", Kind: policy.FilterHTTP, TLS: []policy.TLSItem{{ServerNames: []string{"a"}}}}, Namespace: "default"},
		"any":     {Filter: &policy.Filter{Key: "http-1", Kind: policy.FilterHTTP, TLS: []policy.TLSItem{{Any: true}}}, Namespace: "default"},
		"seen":    {Filter: &policy.Filter{Key: "http-1", Kind: policy.FilterHTTP, Visibility: true}, Namespace: "default"},
	} {
		revision := filterRevision(f)
		if other, there := seen[revision]; there {
			t.Errorf("%s and %s have the same revision", name, other)
		}
		seen[revision] = name
	}
}
