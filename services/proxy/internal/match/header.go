// SPDX-License-Identifier: Apache-2.0

package match

import (
	"fmt"
	"net/textproto"
	"strconv"
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
)

// Header matches one header of a request; pseudo headers (":path", ...) are headers too.
type Header struct {
	name string
	// value tests what is there; nil = presence is all that counts.
	value          String
	present        bool
	invert         bool
	missingIsEmpty bool
}

// Headers compiles a list of header matchers.
func (c *Compiler) Headers(list []*routev3.HeaderMatcher, path, name string) ([]Header, error) {
	out := make([]Header, 0, len(list))
	for i, m := range list {
		h, err := c.Header(m, fields.Index(path, name, i))
		if err != nil {
			return nil, err
		}
		out = append(out, h)
	}
	return out, nil
}

// Header compiles a header matcher, deprecated forms included.
func (c *Compiler) Header(m *routev3.HeaderMatcher, path string) (Header, error) {
	h := Header{name: CanonicalName(m.GetName()), invert: m.GetInvertMatch(), missingIsEmpty: m.GetTreatMissingHeaderAsEmpty(), present: true}
	if m.GetName() == "" {
		return h, fmt.Errorf("%s: empty", fields.Join(path, "name"))
	}
	var err error
	switch s := m.GetHeaderMatchSpecifier().(type) {
	case nil:
	case *routev3.HeaderMatcher_PresentMatch:
		h.present = s.PresentMatch
	case *routev3.HeaderMatcher_StringMatch:
		h.value, err = c.String(s.StringMatch, fields.Join(path, "string_match"))
	case *routev3.HeaderMatcher_RangeMatch:
		h.value = inRange(s.RangeMatch.GetStart(), s.RangeMatch.GetEnd())
	default:
		h.value, err = c.deprecated(m, path)
	}
	return h, err
}

// deprecated are the forms that string_match replaced; objects in the field still have them.
func (c *Compiler) deprecated(m *routev3.HeaderMatcher, path string) (String, error) {
	//nolint:staticcheck // the deprecated fields are what this function is for
	switch s := m.GetHeaderMatchSpecifier().(type) {
	case *routev3.HeaderMatcher_ExactMatch:
		return exact(s.ExactMatch, false), nil
	case *routev3.HeaderMatcher_PrefixMatch:
		return prefix(s.PrefixMatch, false), nil
	case *routev3.HeaderMatcher_SuffixMatch:
		return suffix(s.SuffixMatch, false), nil
	case *routev3.HeaderMatcher_ContainsMatch:
		return contains(s.ContainsMatch, false), nil
	case *routev3.HeaderMatcher_SafeRegexMatch:
		return c.Regex(s.SafeRegexMatch, fields.Join(path, "safe_regex_match"))
	}
	return nil, fields.NotSupported(fields.Join(path, "header_match_specifier"))
}

func inRange(start, end int64) String {
	return func(s string) bool {
		n, err := strconv.ParseInt(s, 10, 64)
		return err == nil && start <= n && n < end
	}
}

// CanonicalName of a header as requests hold it: pseudo headers in lower case, "host" as the authority.
func CanonicalName(name string) string {
	if strings.HasPrefix(name, ":") {
		return strings.ToLower(name)
	}
	if strings.EqualFold(name, "host") {
		return ":authority"
	}
	return textproto.CanonicalMIMEHeaderKey(name)
}

// Value of a header by its canonical name, several joined by commas.
func (r *Request) Value(name string) (string, bool) {
	switch name {
	case ":method":
		return r.Method, true
	case ":path":
		return r.Path, true
	case ":authority":
		return r.Authority, true
	case ":scheme":
		return r.Scheme, true
	}
	v := r.Header[name]
	switch len(v) {
	case 0:
		return "", false
	case 1:
		return v[0], true
	}
	return strings.Join(v, ","), true
}

// Match reports whether the request's header is as wanted. A header that is missing matches nothing but a test of presence, inverted or not.
func (h *Header) Match(r *Request) bool {
	v, ok := r.Value(h.name)
	if h.value == nil {
		return (ok == h.present) != h.invert
	}
	if !ok && !h.missingIsEmpty {
		return false
	}
	return h.value(v) != h.invert
}

// All reports whether all match.
func All(list []Header, r *Request) bool {
	for i := range list {
		if !list[i].Match(r) {
			return false
		}
	}
	return true
}
