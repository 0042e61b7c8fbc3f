// SPDX-License-Identifier: Apache-2.0

package route

import (
	"fmt"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
)

// pathRewrite changes the path of a request, never its query.
type pathRewrite struct {
	prefix string
	whole  matched
	regex  *substitution
}

func (c *compiler) pathRewrite(prefix string, regex *matcherv3.RegexMatchAndSubstitute, whole matched, path string) (pathRewrite, error) {
	if prefix != "" && regex != nil {
		return pathRewrite{}, fmt.Errorf("%s: prefix_rewrite and regex_rewrite exclude each other", path)
	}
	if prefix != "" && !strings.HasPrefix(prefix, "/") {
		return pathRewrite{}, fmt.Errorf("%s: must begin with a slash", fields.Join(path, "prefix_rewrite"))
	}
	s, err := c.substitution(regex, fields.Join(path, "regex_rewrite"))
	return pathRewrite{prefix: prefix, whole: whole, regex: s}, err
}

func (p *pathRewrite) apply(target string) string {
	if p.prefix == "" && p.regex == nil {
		return target
	}
	path, query := target, ""
	if i := strings.IndexByte(target, '?'); i >= 0 {
		path, query = target[:i], target[i:]
	}
	if p.regex != nil {
		return p.regex.apply(path) + query
	}
	return p.prefix + path[min(len(path), p.whole(path)):] + query
}

type substitution struct {
	re   *regexp.Regexp
	with string
}

var backReference = regexp.MustCompile(`\\(\d|\\)`)

func (c *compiler) substitution(m *matcherv3.RegexMatchAndSubstitute, path string) (*substitution, error) {
	if m == nil {
		return nil, nil
	}
	re, err := c.matchers.Substitution(m.GetPattern(), fields.Join(path, "pattern"))
	if err != nil {
		return nil, err
	}
	var bad error
	with := backReference.ReplaceAllStringFunc(strings.ReplaceAll(m.GetSubstitution(), "$", "$$"), func(ref string) string {
		if ref == `\\` {
			return `\`
		}
		if n, _ := strconv.Atoi(ref[1:]); n > re.NumSubexp() {
			bad = fmt.Errorf("%s: %s has no group", fields.Join(path, "substitution"), ref)
		}
		return "${" + ref[1:] + "}"
	})
	return &substitution{re: re, with: with}, bad
}

func (s *substitution) apply(text string) string { return s.re.ReplaceAllString(text, s.with) }

// hostRewrite changes the authority.
type hostRewrite struct {
	literal, header string
	regex           *substitution
}

func (c *compiler) hostRewrite(a *routev3.RouteAction, path string) (h hostRewrite, err error) {
	h.literal = a.GetHostRewriteLiteral()
	if name := a.GetHostRewriteHeader(); name != "" {
		h.header = match.CanonicalName(name)
	}
	h.regex, err = c.substitution(a.GetHostRewritePathRegex(), fields.Join(path, "host_rewrite_path_regex"))
	return h, err
}

func (h *hostRewrite) apply(r *match.Request, path string) string {
	switch {
	case h.literal != "":
		return h.literal
	case h.header != "":
		if v, ok := r.Value(h.header); ok && v != "" {
			return v
		}
	case h.regex != nil:
		return h.regex.apply(path)
	}
	return r.Authority
}

// Redirect sends the client elsewhere.
type Redirect struct {
	Status       int
	scheme, host string
	port         uint32
	path         string
	rewrite      pathRewrite
	stripQuery   bool
}

func (c *compiler) redirect(a *routev3.RedirectAction, whole matched, path string) (*Redirect, error) {
	if err := fields.Only(a, path, "https_redirect", "scheme_redirect", "host_redirect", "port_redirect", "path_redirect", "prefix_rewrite",
		"regex_rewrite", "response_code", "strip_query"); err != nil {
		return nil, err
	}
	d := &Redirect{host: a.GetHostRedirect(), port: a.GetPortRedirect(), path: a.GetPathRedirect(), scheme: a.GetSchemeRedirect(), stripQuery: a.GetStripQuery()}
	if a.GetHttpsRedirect() {
		d.scheme = "https"
	}
	codes := map[routev3.RedirectAction_RedirectResponseCode]int{
		routev3.RedirectAction_MOVED_PERMANENTLY: http.StatusMovedPermanently, routev3.RedirectAction_FOUND: http.StatusFound,
		routev3.RedirectAction_SEE_OTHER: http.StatusSeeOther, routev3.RedirectAction_TEMPORARY_REDIRECT: http.StatusTemporaryRedirect,
		routev3.RedirectAction_PERMANENT_REDIRECT: http.StatusPermanentRedirect,
	}
	if d.Status = codes[a.GetResponseCode()]; d.Status == 0 {
		return nil, fields.NotSupported(fields.Join(path, "response_code"))
	}
	var err error
	d.rewrite, err = c.pathRewrite(a.GetPrefixRewrite(), a.GetRegexRewrite(), whole, path)
	return d, err
}

// Location is where the client is sent.
func (d *Redirect) Location(r *match.Request) string {
	scheme, host := r.Scheme, r.Authority
	if d.scheme != "" {
		scheme = d.scheme
		host = withoutPort(host, r.Scheme)
	}
	if d.host != "" {
		host = d.host
	}
	if d.port != 0 {
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
			if strings.Contains(h, ":") {
				host = "[" + h + "]"
			}
		}
		host += ":" + strconv.Itoa(int(d.port))
	}
	target := d.rewrite.apply(r.Path)
	if d.path != "" {
		target = d.path
		if q := r.Query(); q != "" && !strings.Contains(d.path, "?") {
			target += "?" + q
		}
	}
	if d.stripQuery {
		target, _, _ = strings.Cut(target, "?")
	}
	return scheme + "://" + host + target
}

// withoutPort takes the default port of the scheme off: it would be wrong for another.
func withoutPort(host, scheme string) string {
	switch scheme {
	case "http":
		return strings.TrimSuffix(host, ":80")
	case "https":
		return strings.TrimSuffix(host, ":443")
	}
	return host
}
