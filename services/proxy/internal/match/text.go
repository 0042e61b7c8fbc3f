// SPDX-License-Identifier: Apache-2.0

package match

import (
	"fmt"
	"regexp/syntax"
	"strings"

	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
)

// String matches a text.
type String func(string) bool

// String compiles a string matcher.
func (c *Compiler) String(m *matcherv3.StringMatcher, path string) (String, error) {
	if err := fields.Only(m, path, "exact", "prefix", "suffix", "contains", "safe_regex", "ignore_case"); err != nil {
		return nil, err
	}
	fold := m.GetIgnoreCase()
	switch p := m.GetMatchPattern().(type) {
	case *matcherv3.StringMatcher_Exact:
		return exact(p.Exact, fold), nil
	case *matcherv3.StringMatcher_Prefix:
		return prefix(p.Prefix, fold), nil
	case *matcherv3.StringMatcher_Suffix:
		return suffix(p.Suffix, fold), nil
	case *matcherv3.StringMatcher_Contains:
		return contains(p.Contains, fold), nil
	case *matcherv3.StringMatcher_SafeRegex:
		return c.Regex(p.SafeRegex, fields.Join(path, "safe_regex"))
	}
	return nil, fmt.Errorf("%s: no pattern", path)
}

func exact(want string, fold bool) String {
	if fold {
		return func(s string) bool { return len(s) == len(want) && equalFold(s, want) }
	}
	return func(s string) bool { return s == want }
}

func prefix(want string, fold bool) String {
	if fold {
		return func(s string) bool { return len(s) >= len(want) && equalFold(s[:len(want)], want) }
	}
	return func(s string) bool { return strings.HasPrefix(s, want) }
}

func suffix(want string, fold bool) String {
	if fold {
		return func(s string) bool { return len(s) >= len(want) && equalFold(s[len(s)-len(want):], want) }
	}
	return func(s string) bool { return strings.HasSuffix(s, want) }
}

func contains(want string, fold bool) String {
	if fold {
		want = lower(want)
		return func(s string) bool { return strings.Contains(lower(s), want) }
	}
	return func(s string) bool { return strings.Contains(s, want) }
}

// Only ASCII letters fold: two texts that differ in other letters are two names.
func equalFold(a, b string) bool {
	for i := range len(a) {
		if lowerByte(a[i]) != lowerByte(b[i]) {
			return false
		}
	}
	return true
}

func lower(s string) string {
	for i := range len(s) {
		if s[i] != lowerByte(s[i]) {
			b := []byte(s)
			for j := range b {
				b[j] = lowerByte(b[j])
			}
			return string(b)
		}
	}
	return s
}

func lowerByte(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// plain returns a cheaper matcher for the commonest shapes: a literal, a literal followed by ".*", and several of these of which one must match.
func plain(re *syntax.Regexp) String {
	switch re.Op {
	case syntax.OpCapture:
		return plain(re.Sub[0])
	case syntax.OpAlternate:
		return oneOf(re.Sub)
	}
	parts := []*syntax.Regexp{re}
	if re.Op == syntax.OpConcat {
		parts = re.Sub
	}
	var text string
	if p := parts[0]; p.Op == syntax.OpLiteral && p.Flags&syntax.FoldCase == 0 {
		text, parts = string(p.Rune), parts[1:]
	}
	switch {
	case len(parts) == 0:
		return exact(text, false)
	case len(parts) == 1 && parts[0].Op == syntax.OpStar && parts[0].Sub[0].Op == syntax.OpAnyCharNotNL:
		return func(s string) bool { return strings.HasPrefix(s, text) && strings.IndexByte(s[len(text):], '\n') < 0 }
	}
	return nil
}

// maxPlain is how many texts are compared one after the other; an automaton has to be asked for more.
const maxPlain = 8

func oneOf(list []*syntax.Regexp) String {
	if len(list) > maxPlain {
		return nil
	}
	all := make([]String, len(list))
	for i, re := range list {
		if all[i] = plain(re); all[i] == nil {
			return nil
		}
	}
	return func(s string) bool {
		for _, f := range all {
			if f(s) {
				return true
			}
		}
		return false
	}
}
