// SPDX-License-Identifier: Apache-2.0

package route

import (
	"fmt"
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
)

// Route is one route: what it matches and exactly one of what is done.
type Route struct {
	Name string

	path    func(string) bool
	headers []match.Header
	queries []match.Query
	grpc    bool

	Forward  *Forward
	Redirect *Redirect
	Direct   *Direct

	level level
}

// Direct is an answer that the proxy gives itself.
type Direct struct {
	Status int
	Body   string
}

// matches asks what is cheap first.
func (r *Route) matches(q *match.Request) bool {
	if !r.path(q.URLPath()) || !match.All(r.headers, q) {
		return false
	}
	if r.grpc && !match.GRPC(q.Header) {
		return false
	}
	for i := range r.queries {
		if !r.queries[i].Match(q.Query()) {
			return false
		}
	}
	return true
}

func (c *compiler) route(r *routev3.Route, v *routev3.VirtualHost, path string) (*Route, error) {
	if err := fields.Only(r, path, "name", "match", "route", "redirect", "direct_response", "metadata", "decorator", "typed_per_filter_config",
		"request_headers_to_add", "request_headers_to_remove", "response_headers_to_add", "response_headers_to_remove",
		"per_request_buffer_limit_bytes", "request_body_buffer_limit", "stat_prefix"); err != nil {
		return nil, err
	}
	c.matchers.Step()
	out := &Route{Name: r.GetName()}
	rewritten, err := c.match(out, r.GetMatch(), fields.Join(path, "match"))
	if err != nil {
		return nil, err
	}
	if out.level, err = c.level(r, path); err != nil {
		return nil, err
	}
	switch a := r.GetAction().(type) {
	case *routev3.Route_Route:
		out.Forward, err = c.forward(r, v, a.Route, rewritten, fields.Join(path, "route"))
	case *routev3.Route_Redirect:
		out.Redirect, err = c.redirect(a.Redirect, rewritten, fields.Join(path, "redirect"))
	case *routev3.Route_DirectResponse:
		out.Direct, err = c.direct(a.DirectResponse, fields.Join(path, "direct_response"))
	default:
		err = fmt.Errorf("%s: no action", path)
	}
	return out, err
}

// matched tells how much of a path a route matched, for what replaces it.
type matched func(path string) int

func (c *compiler) match(r *Route, m *routev3.RouteMatch, path string) (whole matched, err error) {
	if err := fields.Only(m, path, "prefix", "path", "safe_regex", "path_separated_prefix", "case_sensitive", "headers", "query_parameters", "grpc"); err != nil {
		return nil, err
	}
	fold := m.GetCaseSensitive() != nil && !m.GetCaseSensitive().GetValue()
	if r.path, whole, err = c.path(m, fold, path); err != nil {
		return nil, err
	}
	if r.headers, err = c.matchers.Headers(m.GetHeaders(), path, "headers"); err != nil {
		return nil, err
	}
	for i, q := range m.GetQueryParameters() {
		query, err := c.matchers.Query(q, fields.Index(path, "query_parameters", i))
		if err != nil {
			return nil, err
		}
		r.queries = append(r.queries, query)
	}
	r.grpc = m.GetGrpc() != nil
	return whole, nil
}

func (c *compiler) path(m *routev3.RouteMatch, fold bool, path string) (func(string) bool, matched, error) {
	all := func(p string) int { return len(p) }
	same := func(a, b string) bool { return a == b || fold && strings.EqualFold(a, b) }
	begins := func(p, with string) bool { return len(p) >= len(with) && same(p[:len(with)], with) }
	switch s := m.GetPathSpecifier().(type) {
	case *routev3.RouteMatch_Prefix:
		if s.Prefix == "/" {
			return func(p string) bool { return strings.HasPrefix(p, "/") }, func(string) int { return 1 }, nil
		}
		return func(p string) bool { return begins(p, s.Prefix) }, func(string) int { return len(s.Prefix) }, nil
	case *routev3.RouteMatch_Path:
		return func(p string) bool { return same(p, s.Path) }, all, nil
	case *routev3.RouteMatch_PathSeparatedPrefix:
		n := len(s.PathSeparatedPrefix)
		ok := func(p string) bool { return begins(p, s.PathSeparatedPrefix) && (len(p) == n || p[n] == '/') }
		return ok, func(string) int { return n }, nil
	case *routev3.RouteMatch_SafeRegex:
		f, err := c.matchers.Regex(s.SafeRegex, fields.Join(path, "safe_regex"))
		return f, all, err
	}
	return nil, nil, fmt.Errorf("%s: no path", path)
}

func (c *compiler) direct(d *routev3.DirectResponseAction, path string) (*Direct, error) {
	if err := fields.Only(d, path, "status", "body"); err != nil {
		return nil, err
	}
	if d.GetBody() != nil {
		if err := fields.Only(d.GetBody(), fields.Join(path, "body"), "inline_bytes", "inline_string"); err != nil {
			return nil, err
		}
	}
	body := d.GetBody().GetInlineString() + string(d.GetBody().GetInlineBytes())
	if uint64(len(body)) > uint64(c.maxBody) {
		return nil, fmt.Errorf("%s: body of %d bytes, the most is %d", path, len(body), c.maxBody)
	}
	if s := d.GetStatus(); s < 200 || s > 599 {
		return nil, fmt.Errorf("%s: status %d", path, s)
	}
	return &Direct{Status: int(d.GetStatus()), Body: body}, nil
}
