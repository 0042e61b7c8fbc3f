// SPDX-License-Identifier: Apache-2.0

// Package match has the matchers of Envoy's API over requests: strings, headers, query parameters and paths.
package match

import (
	"net/http"
	"strings"

	"github.com/weirmesh/weir/services/proxy/internal/model"
)

// Request is what rules and routes see of a request: after normalisation, and after hop-by-hop headers were taken off.
type Request struct {
	Method, Scheme, Authority string
	// Path with its query, as it is sent on.
	Path string
	// Header has canonical names.
	Header http.Header
	Conn   *model.Conn
}

// URLPath is the path without query.
func (r *Request) URLPath() string {
	if i := strings.IndexByte(r.Path, '?'); i >= 0 {
		return r.Path[:i]
	}
	return r.Path
}

// Query is what follows the question mark.
func (r *Request) Query() string {
	if i := strings.IndexByte(r.Path, '?'); i >= 0 {
		return r.Path[i+1:]
	}
	return ""
}

// GRPC reports whether the content type is one of gRPC's.
func GRPC(h http.Header) bool {
	v := first(h["Content-Type"])
	const t = "application/grpc"
	return len(v) >= len(t) && strings.EqualFold(v[:len(t)], t) && (len(v) == len(t) || v[len(t)] == '+' || v[len(t)] == ';')
}

func first(v []string) string {
	if len(v) == 0 {
		return ""
	}
	return v[0]
}
