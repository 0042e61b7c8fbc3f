// SPDX-License-Identifier: Apache-2.0

package match

import (
	"net/url"
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
)

// Query matches one query parameter: its first value counts.
type Query struct {
	name  string
	value String
	// present is what is wanted when value is nil.
	present bool
}

// Query compiles a query parameter matcher.
func (c *Compiler) Query(m *routev3.QueryParameterMatcher, path string) (Query, error) {
	q := Query{name: m.GetName(), present: true}
	var err error
	switch s := m.GetQueryParameterMatchSpecifier().(type) {
	case nil:
	case *routev3.QueryParameterMatcher_PresentMatch:
		q.present = s.PresentMatch
	case *routev3.QueryParameterMatcher_StringMatch:
		q.value, err = c.String(s.StringMatch, fields.Join(path, "string_match"))
	default:
		err = fields.NotSupported(fields.Join(path, "query_parameter_match_specifier"))
	}
	return q, err
}

// Match reports whether the raw query has the parameter as wanted.
func (q *Query) Match(raw string) bool {
	v, ok := parameter(raw, q.name)
	if q.value == nil {
		return ok == q.present
	}
	return ok && q.value(v)
}

func parameter(raw, name string) (string, bool) {
	for raw != "" {
		var item string
		item, raw, _ = strings.Cut(raw, "&")
		k, v, _ := strings.Cut(item, "=")
		if decode(k) == name && item != "" {
			return decode(v), true
		}
	}
	return "", false
}

func decode(s string) string {
	if strings.IndexByte(s, '%') < 0 {
		return s
	}
	if d, err := url.PathUnescape(s); err == nil {
		return d
	}
	return s
}
