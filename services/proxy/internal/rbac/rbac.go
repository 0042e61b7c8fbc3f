// SPDX-License-Identifier: Apache-2.0

// Package rbac judges requests by the policies of Envoy's RBAC filters.
package rbac

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
)

// Rules are compiled policies.
type Rules struct {
	action   rbacv3.RBAC_Action
	policies []policy
}

type policy struct {
	name        string
	permissions []matcher
	principals  []matcher
}

// matcher is a permission or a principal.
type matcher func(*match.Request) bool

// compiler compiles the parts of policies.
type compiler struct{ *match.Compiler }

// Compile compiles policies; nil is nil: no rules, which judge nothing.
func Compile(c *rbacv3.RBAC, matchers *match.Compiler, path string) (*Rules, error) {
	if c == nil {
		return nil, nil
	}
	if err := fields.Only(c, path, "action", "policies"); err != nil {
		return nil, err
	}
	if _, known := rbacv3.RBAC_Action_name[int32(c.GetAction())]; !known {
		return nil, fields.NotSupported(fields.Join(path, "action"))
	}
	r := &Rules{action: c.GetAction(), policies: make([]policy, 0, len(c.GetPolicies()))}
	var errs []error
	// By name, as Envoy does: which policy is told of several that match does not depend on chance.
	for _, name := range slices.Sorted(maps.Keys(c.GetPolicies())) {
		p, err := compiler{matchers}.policy(name, c.GetPolicies()[name], fields.Key(path, "policies", name))
		errs = append(errs, err)
		r.policies = append(r.policies, p)
	}
	return r, errors.Join(errs...)
}

func (x compiler) policy(name string, c *rbacv3.Policy, path string) (policy, error) {
	x.Step()
	p := policy{name: name}
	if err := fields.Only(c, path, "permissions", "principals"); err != nil {
		return p, err
	}
	if len(c.GetPermissions()) == 0 || len(c.GetPrincipals()) == 0 {
		return p, fmt.Errorf("%s: permissions and principals are needed", path)
	}
	for i, in := range c.GetPermissions() {
		m, err := x.permission(in, fields.Index(path, "permissions", i))
		if err != nil {
			return p, err
		}
		p.permissions = append(p.permissions, m)
	}
	for i, in := range c.GetPrincipals() {
		m, err := x.principal(in, fields.Index(path, "principals", i))
		if err != nil {
			return p, err
		}
		p.principals = append(p.principals, m)
	}
	return p, nil
}

// Match returns the first policy that matches; "" = none.
func (r *Rules) Match(q *match.Request) (name string, ok bool) {
	for i := range r.policies {
		p := &r.policies[i]
		if anyOf(p.permissions, q) && anyOf(p.principals, q) {
			return p.name, true
		}
	}
	return "", false
}

// Allow judges a request; policy is the one that decided, if one did. No rules allow.
func (r *Rules) Allow(q *match.Request) (policy string, ok bool) {
	if r == nil {
		return "", true
	}
	policy, matched := r.Match(q)
	switch r.action {
	case rbacv3.RBAC_ALLOW:
		return policy, matched
	case rbacv3.RBAC_LOG:
		return policy, true
	}
	return policy, !matched
}

func anyOf(list []matcher, q *match.Request) bool {
	for _, m := range list {
		if m(q) {
			return true
		}
	}
	return false
}

func allOf(list []matcher, q *match.Request) bool {
	for _, m := range list {
		if !m(q) {
			return false
		}
	}
	return true
}
