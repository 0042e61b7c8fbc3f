// SPDX-License-Identifier: Apache-2.0

package policy

import "strings"

// NormalizePath returns a request target as it is judged and sent on (spec 10.1). Redirect: it held an encoded slash or backslash; it is not judged, the
// client is sent to the path that is returned. The query is never touched, nor is a target that does not begin with a slash.
//
// The order is that of RFC 3986 and of Envoy: codes of unreserved characters, dot segments (an empty segment counts as one), then slashes that are
// repeated. A backslash is a slash. Proxies refuse targets with `%` that begins no code; here it stays.
func NormalizePath(target string) (normal string, redirect bool) {
	path, query, hasQuery := strings.Cut(target, "?")
	if !strings.HasPrefix(path, "/") {
		return target, false
	}
	for before := ""; path != before; { // what is decoded may complete a code that was none: `%2%65`
		before = path
		decoded, slashes := decodePath(path)
		path, redirect = decoded, redirect || slashes
	}
	path = mergeSlashes(removeDots(path))
	if hasQuery {
		path += "?" + query
	}
	return path, redirect
}

// decodePath decodes what stands for itself. Slashes: it decoded a slash or a backslash.
func decodePath(path string) (decoded string, slashes bool) {
	var out strings.Builder
	for i := 0; i < len(path); i++ {
		c := path[i]
		if c == '%' && i+2 < len(path) && hexDigit(path[i+1]) >= 0 && hexDigit(path[i+2]) >= 0 {
			code := byte(hexDigit(path[i+1])<<4 | hexDigit(path[i+2]))
			switch {
			case code == '/', code == '\\':
				slashes = true
				c = '/'
			case isUnreserved(code):
				c = code
			default:
				out.WriteString(path[i : i+3])
				i += 2
				continue
			}
			i += 2
		}
		if c == '\\' {
			c = '/'
		}
		out.WriteByte(c)
	}
	return out.String(), slashes
}

func hexDigit(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

func isUnreserved(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '.' || c == '_' || c == '~'
}

// removeDots resolves the segments . and .. of a path that begins with a slash.
func removeDots(path string) string {
	segments := strings.Split(path[1:], "/")
	out := make([]string, 0, len(segments))
	for i, s := range segments {
		last := i == len(segments)-1
		switch s {
		case ".":
		case "..":
			if len(out) > 0 {
				out = out[:len(out)-1]
			}
		default:
			out = append(out, s)
			continue
		}
		if last {
			out = append(out, "")
		}
	}
	return "/" + strings.Join(out, "/")
}

func mergeSlashes(path string) string {
	if !strings.Contains(path, "//") {
		return path
	}
	out := make([]byte, 0, len(path))
	for i := range len(path) {
		if path[i] != '/' || i == 0 || path[i-1] != '/' {
			out = append(out, path[i])
		}
	}
	return string(out)
}
