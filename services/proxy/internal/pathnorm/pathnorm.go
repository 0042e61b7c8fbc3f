// SPDX-License-Identifier: Apache-2.0

// Package pathnorm normalises request targets: what rules judge is what the server gets.
package pathnorm

import (
	"errors"
	"strings"
)

// Slashes says what happens to paths with an encoded slash or backslash.
type Slashes uint8

// What happens to them.
const (
	Keep Slashes = iota
	Reject
	Redirect
	Unescape
)

// Options of normalisation.
type Options struct {
	// Dots: resolve "." and ".." and decode unreserved characters. Merge: repeated slashes become one.
	Dots, Merge bool
	Slashes     Slashes
}

// What makes a target unacceptable.
var (
	ErrMalformed = errors.New("malformed percent code")
	ErrSlash     = errors.New("encoded slash")
)

// Normalize returns the target as it is judged and sent on. redirect: the client must be sent there. The query is never touched, and "*" is left.
//
// A malformed percent code is an error, since decoding what stands around it could make a new code.
func Normalize(target string, o Options) (out string, redirect bool, err error) {
	if target == "*" || target == "" {
		return target, false, nil
	}
	path, query := target, ""
	if i := strings.IndexByte(target, '?'); i >= 0 {
		path, query = target[:i], target[i:]
	}
	if !interesting(path) {
		return target, false, nil
	}
	if o.Dots || o.Slashes != Keep {
		if err := wellFormed(path); err != nil {
			return "", false, err
		}
	}
	if o.Slashes != Keep {
		if p, found := unescapeSlashes(path); found {
			if o.Slashes == Reject {
				return "", false, ErrSlash
			}
			path, redirect = p, o.Slashes == Redirect
		}
	}
	if o.Dots {
		path = resolve(decodeUnreserved(path))
	}
	if o.Merge {
		path = merge(path)
	}
	return path + query, redirect, nil
}

// interesting reports whether a path may need any work: most do not.
func interesting(path string) bool {
	for i := range len(path) {
		switch path[i] {
		case '%', '\\':
			return true
		case '/':
			if i+1 < len(path) && (path[i+1] == '/' || path[i+1] == '.') {
				return true
			}
		}
	}
	return false
}

func wellFormed(path string) error {
	for i := 0; i < len(path); i++ {
		if path[i] != '%' {
			continue
		}
		if i+2 >= len(path) || hex(path[i+1]) < 0 || hex(path[i+2]) < 0 {
			return ErrMalformed
		}
		i += 2
	}
	return nil
}

// Paths here are well-formed: two hexadecimal digits follow each percent sign.

func unescapeSlashes(path string) (string, bool) {
	var b strings.Builder
	from := 0
	for i := 0; i+2 < len(path); i++ {
		if path[i] != '%' {
			continue
		}
		if c := byte(hex(path[i+1])<<4 | hex(path[i+2])); c == '/' || c == '\\' {
			b.WriteString(path[from:i])
			b.WriteByte(c)
			from = i + 3
		}
		i += 2
	}
	if from == 0 {
		return path, false
	}
	b.WriteString(path[from:])
	return b.String(), true
}

func decodeUnreserved(path string) string {
	if strings.IndexByte(path, '%') < 0 && strings.IndexByte(path, '\\') < 0 {
		return path
	}
	b := make([]byte, 0, len(path))
	for i := 0; i < len(path); i++ {
		switch path[i] {
		case '\\':
			b = append(b, '/')
		case '%':
			if c := byte(hex(path[i+1])<<4 | hex(path[i+2])); unreserved(c) {
				b = append(b, c)
			} else {
				b = append(b, path[i:i+3]...)
			}
			i += 2
		default:
			b = append(b, path[i])
		}
	}
	return string(b)
}

// resolve removes dot segments as RFC 3986, 5.2.4 does. Empty segments are segments.
func resolve(path string) string {
	if !strings.Contains(path, "/.") {
		return path
	}
	out := make([]byte, 0, len(path))
	for rest := path; rest != ""; {
		// rest begins with a slash; the segment goes to the next one.
		end := strings.IndexByte(rest[1:], '/') + 1
		if end == 0 {
			end = len(rest)
		}
		segment := rest[:end]
		rest = rest[end:]
		switch segment {
		case "/.", "/..":
			if segment == "/.." {
				out = out[:lastSlash(out)]
			}
			if rest == "" {
				out = append(out, '/')
			}
		default:
			out = append(out, segment...)
		}
	}
	return string(out)
}

func lastSlash(b []byte) int {
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] == '/' {
			return i
		}
	}
	return 0
}

func merge(path string) string {
	if !strings.Contains(path, "//") {
		return path
	}
	b := make([]byte, 0, len(path))
	for i := range len(path) {
		if path[i] == '/' && len(b) > 0 && b[len(b)-1] == '/' {
			continue
		}
		b = append(b, path[i])
	}
	return string(b)
}

func unreserved(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '.' || c == '_' || c == '~'
}

func hex(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c && c <= 'f':
		return int(c-'a') + 10
	case 'A' <= c && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}
