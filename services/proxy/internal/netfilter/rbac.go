// SPDX-License-Identifier: Apache-2.0

// Package netfilter holds what is done to connections whose bytes are not looked at: admission by network RBAC, and passing them on.
package netfilter

import (
	"fmt"
	"net/netip"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	networkrbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/resource"
)

// condition is a compiled permission or principal.
type condition func(*model.Conn) bool

// RBAC admits connections.
type RBAC struct{ rules, shadow *ruleSet }

type ruleSet struct {
	action   rbacv3.RBAC_Action
	policies []rbacPolicy // in the order of their names
}

type rbacPolicy struct {
	name        string
	permissions []condition
	principals  []condition
}

// maxDepth bounds how deep conditions nest.
const maxDepth = 32

// rbacCompiler compiles the parts of policies.
type rbacCompiler struct{ *match.Compiler }

// CompileRBAC compiles the filter.
func CompileRBAC(path string, in *networkrbacv3.RBAC, matchers *match.Compiler) (*RBAC, error) {
	if err := fields.Only(in, path, "rules", "shadow_rules", "shadow_rules_stat_prefix", "stat_prefix", "enforcement_type"); err != nil {
		return nil, err
	}
	x := rbacCompiler{matchers}
	rules, err := x.rules(path+".rules", in.GetRules())
	if err != nil {
		return nil, err
	}
	shadow, err := x.rules(path+".shadow_rules", in.GetShadowRules())
	if err != nil {
		return nil, err
	}
	return &RBAC{rules: rules, shadow: shadow}, nil
}

// Decide returns whether a connection may go on, and the name of the policy that says so: the one that matched, or else the shadow rules' one.
func (r *RBAC) Decide(c *model.Conn) (policy string, ok bool) {
	ok = true
	if r.rules != nil {
		policy, ok = r.rules.decide(c)
	}
	if policy == "" && r.shadow != nil {
		policy, _ = r.shadow.decide(c)
	}
	return policy, ok
}

func (r *ruleSet) decide(c *model.Conn) (string, bool) {
	for i := range r.policies {
		p := &r.policies[i]
		if some(p.permissions, c) && some(p.principals, c) {
			return p.name, r.action != rbacv3.RBAC_DENY
		}
	}
	return "", r.action != rbacv3.RBAC_ALLOW
}

func some(of []condition, c *model.Conn) bool {
	return slices.ContainsFunc(of, func(f condition) bool { return f(c) })
}

func (x rbacCompiler) rules(path string, in *rbacv3.RBAC) (*ruleSet, error) {
	if in == nil {
		return nil, nil //nolint:nilnil // no rules
	}
	if err := fields.Only(in, path, "action", "policies"); err != nil {
		return nil, err
	}
	r := &ruleSet{action: in.GetAction()}
	names := make([]string, 0, len(in.GetPolicies()))
	for name := range in.GetPolicies() {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		x.Step()
		p, at := in.GetPolicies()[name], fields.Key(path, "policies", name)
		if err := fields.Only(p, at, "permissions", "principals"); err != nil {
			return nil, err
		}
		out := rbacPolicy{name: name}
		for i, permission := range p.GetPermissions() {
			c, err := x.permission(fields.Index(at, "permissions", i), permission, 0)
			if err != nil {
				return nil, err
			}
			out.permissions = append(out.permissions, c)
		}
		for i, principal := range p.GetPrincipals() {
			c, err := x.principal(fields.Index(at, "principals", i), principal, 0)
			if err != nil {
				return nil, err
			}
			out.principals = append(out.principals, c)
		}
		r.policies = append(r.policies, out)
	}
	return r, nil
}

// combine compiles a list of conditions.
func combine[T any](path string, in []T, depth int, compile func(string, T, int) (condition, error)) ([]condition, error) {
	var out []condition
	for i, one := range in {
		c, err := compile(fmt.Sprintf("%s[%d]", path, i), one, depth+1)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

func and(of []condition) condition {
	return func(c *model.Conn) bool {
		for _, f := range of {
			if !f(c) {
				return false
			}
		}
		return true
	}
}

func or(of []condition) condition { return func(c *model.Conn) bool { return some(of, c) } }

func not(f condition) condition { return func(c *model.Conn) bool { return !f(c) } }

func always(value bool) condition { return func(*model.Conn) bool { return value } }

func (x rbacCompiler) permission(path string, in *rbacv3.Permission, depth int) (condition, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("%s: nested too deep", path)
	}
	switch r := in.GetRule().(type) {
	case *rbacv3.Permission_Any:
		return always(r.Any), nil
	case *rbacv3.Permission_AndRules:
		all, err := combine(path+".and_rules.rules", r.AndRules.GetRules(), depth, x.permission)
		return and(all), err
	case *rbacv3.Permission_OrRules:
		all, err := combine(path+".or_rules.rules", r.OrRules.GetRules(), depth, x.permission)
		return or(all), err
	case *rbacv3.Permission_NotRule:
		f, err := x.permission(path+".not_rule", r.NotRule, depth+1)
		return not(f), err
	case *rbacv3.Permission_DestinationIp:
		return within(path+".destination_ip", r.DestinationIp, func(c *model.Conn) netip.Addr { return c.Local.Addr() })
	case *rbacv3.Permission_DestinationPort:
		return func(c *model.Conn) bool { return uint32(c.Local.Port()) == r.DestinationPort }, nil
	case *rbacv3.Permission_DestinationPortRange:
		low, high := r.DestinationPortRange.GetStart(), r.DestinationPortRange.GetEnd()
		return func(c *model.Conn) bool { port := int32(c.Local.Port()); return port >= low && port < high }, nil
	case *rbacv3.Permission_RequestedServerName:
		name, err := x.String(r.RequestedServerName, path+".requested_server_name")
		return func(c *model.Conn) bool { return name(c.ServerName) }, err
	}
	return nil, fmt.Errorf("%s: %T is not supported for connections", path, in.GetRule())
}

func (x rbacCompiler) principal(path string, in *rbacv3.Principal, depth int) (condition, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("%s: nested too deep", path)
	}
	remote := func(c *model.Conn) netip.Addr { return c.Remote.Addr() }
	switch p := in.GetIdentifier().(type) {
	case *rbacv3.Principal_Any:
		return always(p.Any), nil
	case *rbacv3.Principal_AndIds:
		all, err := combine(path+".and_ids.ids", p.AndIds.GetIds(), depth, x.principal)
		return and(all), err
	case *rbacv3.Principal_OrIds:
		all, err := combine(path+".or_ids.ids", p.OrIds.GetIds(), depth, x.principal)
		return or(all), err
	case *rbacv3.Principal_NotId:
		f, err := x.principal(path+".not_id", p.NotId, depth+1)
		return not(f), err
	case *rbacv3.Principal_SourceIp:
		return within(path+".source_ip", p.SourceIp, remote) //nolint:staticcheck // tenants still write it
	case *rbacv3.Principal_DirectRemoteIp:
		return within(path+".direct_remote_ip", p.DirectRemoteIp, remote)
	case *rbacv3.Principal_RemoteIp:
		return within(path+".remote_ip", p.RemoteIp, remote)
	}
	return nil, fmt.Errorf("%s: %T is not supported for connections", path, in.GetIdentifier())
}

func within(path string, in *corev3.CidrRange, address func(*model.Conn) netip.Addr) (condition, error) {
	prefix, err := resource.Prefix(path, in)
	return func(c *model.Conn) bool { return prefix.Contains(address(c).Unmap()) }, err
}
