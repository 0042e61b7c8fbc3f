// SPDX-License-Identifier: Apache-2.0

package reference

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Request is what is asked on a connection. Nothing set = nothing is known of it.
type Request struct {
	HTTP *HTTPRequest
	DNS  *DNSQuery
	TLS  *TLSHello
}

// HTTPRequest is one request.
type HTTPRequest struct {
	Method, Path, Host string
	// Headers in order, as "Name: value".
	Headers []string
}

// DNSQuery is one question.
type DNSQuery struct{ Name string }

// TLSHello begins TLS; "" = without a server name.
type TLSHello struct{ SNI string }

// whole matches an expression against a whole text; absent matches anything (spec 10.1).
func whole(expression, s string) bool {
	return expression == "" || regexp.MustCompile(`\A(?:`+expression+`)\z`).MatchString(s)
}

// Normalise is what a request target is judged as; redirected: the client is sent there instead (spec 10.1).
func Normalise(target string) (path string, redirected bool) {
	path, query, asked := strings.Cut(target, "?")
	if !strings.HasPrefix(path, "/") {
		return target, false
	}
	for {
		decoded := percentCode.ReplaceAllStringFunc(path, func(code string) string {
			n, err := strconv.ParseUint(code[1:], 16, 8)
			if err != nil {
				panic(err)
			}
			switch char := byte(n); {
			case char == '/' || char == '\\':
				redirected = true
				return "/"
			case strings.ContainsRune("-._~", rune(char)) || '0' <= char && char <= '9' || 'a' <= char && char <= 'z' || 'A' <= char && char <= 'Z':
				return string(rune(char))
			}
			return code
		})
		if decoded == path {
			break
		}
		path = decoded
	}
	path = repeatedSlash.ReplaceAllString(withoutDots(strings.ReplaceAll(path, `\`, "/")), "/")
	if asked {
		path += "?" + query
	}
	return path, redirected
}

var (
	percentCode   = regexp.MustCompile(`%[0-9A-Fa-f]{2}`)
	repeatedSlash = regexp.MustCompile(`/+`)
)

// withoutDots is the algorithm of RFC 3986, 5.2.4, in its own words.
func withoutDots(in string) string {
	out := ""
	for in != "" {
		switch {
		case strings.HasPrefix(in, "/./"):
			in = in[2:]
		case in == "/.":
			in = "/"
		case strings.HasPrefix(in, "/../"), in == "/..":
			in = "/" + strings.TrimPrefix(strings.TrimPrefix(in, "/.."), "/")
			out = out[:max(0, strings.LastIndex(out, "/"))]
		default:
			end := strings.IndexByte(in[1:], '/') + 1
			if end == 0 {
				end = len(in)
			}
			out, in = out+in[:end], in[end:]
		}
	}
	return out
}

// headerChange is what an item does to the headers that go on.
type headerChange struct{ action, name, value string }

// httpItem: does an item of rules.http match, and what does it do (spec 10.1)?
func httpItem(item map[string]any, q *HTTPRequest) (changes []headerChange, matches bool) {
	path, redirected := Normalise(q.Path)
	if redirected || !whole(text(item["method"]), q.Method) || !whole(text(item["path"]), path) || !whole(text(item["host"]), q.Host) {
		return nil, false
	}
	for _, h := range texts(item["headers"]) {
		name, value, exact := strings.Cut(h, " ")
		have, there := q.header(strings.TrimSuffix(name, ":"))
		if !there || exact && have != value {
			return nil, false
		}
	}
	for _, m := range list(item["headerMatches"]) {
		match := object(m)
		name, value, mismatch := text(match["name"]), text(match["value"]), text(match["mismatch"])
		have, there := q.header(name)
		switch {
		case there && (value == "" || have == value):
		case mismatch == "":
			return nil, false
		case value != "": // a header that may have any value is not there, if it is not as required: there is nothing to add or to remove
			changes = append(changes, headerChange{mismatch, name, value})
		}
	}
	return changes, true
}

func (q *HTTPRequest) header(name string) (joined string, there bool) {
	var values []string
	for _, h := range q.Headers {
		if have, value, _ := strings.Cut(h, ":"); strings.EqualFold(have, name) {
			values = append(values, strings.TrimPrefix(value, " "))
		}
	}
	return strings.Join(values, ","), len(values) > 0
}

// changed is the headers after changes.
func changed(headers []string, changes []headerChange) []string {
	out := slices.Clone(headers)
	for _, c := range changes {
		is := func(h string) bool { name, _, _ := strings.Cut(h, ":"); return strings.EqualFold(name, c.name) }
		if c.action == "DELETE" || c.action == "REPLACE" {
			out = slices.DeleteFunc(out, is)
		}
		if c.action == "ADD" || c.action == "REPLACE" {
			out = append(out, c.name+": "+c.value)
		}
	}
	return out
}

// plainName is how names are compared: lower case, without one trailing dot (spec 8.2).
func plainName(name string) string { return strings.TrimSuffix(strings.ToLower(name), ".") }

// nameItem: does an item of toFQDNs or rules.dns match a name? Either member may.
func nameItem(item map[string]any, name string) bool {
	exact, pattern := text(item["matchName"]), text(item["matchPattern"])
	return exact != "" && plainName(exact) == plainName(name) || pattern != "" && namePattern(plainName(pattern), `[-a-z0-9_]`).MatchString(plainName(name))
}

// namePattern writes the table of spec 8.2 as an expression; char is what a star stands for.
func namePattern(pattern, char string) *regexp.Regexp {
	if pattern == "*" || pattern == "**" {
		return regexp.MustCompile(`(?s)\A.*\z`)
	}
	labels := ""
	if strings.HasPrefix(pattern, "**.") {
		labels, pattern = `(`+char+`+\.)+`, pattern[len("**."):]
	}
	var literal []string
	for _, part := range strings.Split(pattern, "*") {
		literal = append(literal, regexp.QuoteMeta(part))
	}
	return regexp.MustCompile(`\A` + labels + strings.Join(literal, char+`*`) + `\z`)
}

// serverName: does a pattern of serverNames match (spec 9.5)?
func serverName(pattern, sni string) bool {
	pattern, sni = plainName(pattern), plainName(sni)
	if strings.Trim(pattern, "*") == "" {
		return regexp.MustCompile(`\A[-a-z0-9_]+(\.[-a-z0-9_]+)*\z`).MatchString(sni)
	}
	return sni != "" && namePattern(pattern, `[^.]`).MatchString(sni)
}

// HTTPPasses says what becomes of a request under the items of one rules.http list (none = everything passes): whether it passes, with which headers, or to
// where it is redirected instead of being judged.
func HTTPPasses(items []map[string]any, q *HTTPRequest) (passes bool, headers []string, location string) {
	if path, redirected := Normalise(q.Path); redirected {
		return false, nil, path
	}
	var changes []headerChange
	for _, i := range items {
		did, matches := httpItem(i, q)
		passes = passes || matches
		changes = append(changes, did...)
	}
	return passes || len(items) == 0, changed(q.Headers, changes), ""
}

// DNSPasses says whether a query for a name passes under the items of one rules.dns list (none = every name passes).
func DNSPasses(items []map[string]any, name string) bool {
	return len(items) == 0 || slices.ContainsFunc(items, func(i map[string]any) bool { return nameItem(i, name) })
}

// SNIPasses says whether a connection passes under a list of serverNames; tls = it has TLS at all.
func SNIPasses(patterns []string, sni string, tls bool) bool {
	return tls && slices.ContainsFunc(patterns, func(p string) bool { return serverName(p, sni) })
}
