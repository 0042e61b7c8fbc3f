// SPDX-License-Identifier: Apache-2.0

package rbac

import (
	"fmt"
	"net/netip"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
)

func (x compiler) permission(p *rbacv3.Permission, path string) (matcher, error) {
	switch r := p.GetRule().(type) {
	case *rbacv3.Permission_Any:
		return always(r.Any, fields.Join(path, "any"))
	case *rbacv3.Permission_AndRules:
		list, err := compileAll(r.AndRules.GetRules(), fields.Join(path, "and_rules"), "rules", x.permission)
		return func(q *match.Request) bool { return allOf(list, q) }, err
	case *rbacv3.Permission_OrRules:
		list, err := compileAll(r.OrRules.GetRules(), fields.Join(path, "or_rules"), "rules", x.permission)
		return func(q *match.Request) bool { return anyOf(list, q) }, err
	case *rbacv3.Permission_NotRule:
		m, err := x.permission(r.NotRule, fields.Join(path, "not_rule"))
		return func(q *match.Request) bool { return !m(q) }, err
	case *rbacv3.Permission_Header:
		return x.header(r.Header, fields.Join(path, "header"))
	case *rbacv3.Permission_UrlPath:
		return x.urlPath(r.UrlPath, fields.Join(path, "url_path"))
	case *rbacv3.Permission_DestinationIp:
		return address(r.DestinationIp, fields.Join(path, "destination_ip"), func(q *match.Request) netip.Addr { return q.Conn.Local.Addr() })
	case *rbacv3.Permission_DestinationPort:
		port := r.DestinationPort
		return func(q *match.Request) bool { return uint32(q.Conn.Local.Port()) == port }, nil
	case *rbacv3.Permission_DestinationPortRange:
		start, end := r.DestinationPortRange.GetStart(), r.DestinationPortRange.GetEnd()
		return func(q *match.Request) bool { p := int32(q.Conn.Local.Port()); return start <= p && p < end }, nil
	case *rbacv3.Permission_RequestedServerName:
		m, err := x.String(r.RequestedServerName, fields.Join(path, "requested_server_name"))
		return func(q *match.Request) bool { return m(q.Conn.ServerName) }, err
	}
	return nil, unknown(p, path)
}

func (x compiler) principal(p *rbacv3.Principal, path string) (matcher, error) {
	remote := func(q *match.Request) netip.Addr { return q.Conn.Remote.Addr() }
	switch r := p.GetIdentifier().(type) {
	case *rbacv3.Principal_Any:
		return always(r.Any, fields.Join(path, "any"))
	case *rbacv3.Principal_AndIds:
		list, err := compileAll(r.AndIds.GetIds(), fields.Join(path, "and_ids"), "ids", x.principal)
		return func(q *match.Request) bool { return allOf(list, q) }, err
	case *rbacv3.Principal_OrIds:
		list, err := compileAll(r.OrIds.GetIds(), fields.Join(path, "or_ids"), "ids", x.principal)
		return func(q *match.Request) bool { return anyOf(list, q) }, err
	case *rbacv3.Principal_NotId:
		m, err := x.principal(r.NotId, fields.Join(path, "not_id"))
		return func(q *match.Request) bool { return !m(q) }, err
	case *rbacv3.Principal_Header:
		return x.header(r.Header, fields.Join(path, "header"))
	case *rbacv3.Principal_UrlPath:
		return x.urlPath(r.UrlPath, fields.Join(path, "url_path"))
	case *rbacv3.Principal_DirectRemoteIp:
		return address(r.DirectRemoteIp, fields.Join(path, "direct_remote_ip"), remote)
	case *rbacv3.Principal_RemoteIp:
		return address(r.RemoteIp, fields.Join(path, "remote_ip"), remote)
	case *rbacv3.Principal_SourceIp:
		return address(r.SourceIp, fields.Join(path, "source_ip"), remote) //nolint:staticcheck // the deprecated form is still written
	}
	return nil, unknown(p, path)
}

// unknown names the member that is not implemented.
func unknown(m proto.Message, path string) error {
	if err := fields.Only(m, path); err != nil {
		return err
	}
	return fmt.Errorf("%s: empty", path)
}

func compileAll[T any](list []T, path, name string, compile func(T, string) (matcher, error)) ([]matcher, error) {
	if len(list) == 0 {
		return nil, fmt.Errorf("%s: empty", fields.Join(path, name))
	}
	out := make([]matcher, 0, len(list))
	for i, x := range list {
		m, err := compile(x, fields.Index(path, name, i))
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, nil
}

func always(v bool, path string) (matcher, error) {
	if !v {
		return nil, fmt.Errorf("%s: only true is meant", path)
	}
	return func(*match.Request) bool { return true }, nil
}

func (x compiler) header(m *routev3.HeaderMatcher, path string) (matcher, error) {
	h, err := x.Header(m, path)
	return h.Match, err
}

func (x compiler) urlPath(m *matcherv3.PathMatcher, path string) (matcher, error) {
	s, err := x.String(m.GetPath(), fields.Join(path, "path"))
	return func(q *match.Request) bool { return s(q.URLPath()) }, err
}

func address(c *corev3.CidrRange, path string, of func(*match.Request) netip.Addr) (matcher, error) {
	a, err := netip.ParseAddr(c.GetAddressPrefix())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", fields.Join(path, "address_prefix"), err)
	}
	p, err := a.Prefix(int(c.GetPrefixLen().GetValue()))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", fields.Join(path, "prefix_len"), err)
	}
	return func(q *match.Request) bool { return p.Contains(of(q).Unmap()) }, nil
}
