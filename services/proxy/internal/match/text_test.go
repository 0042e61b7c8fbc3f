// SPDX-License-Identifier: Apache-2.0

package match

import (
	"regexp"
	"testing"

	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
)

// FuzzRegex: whatever the shape of an expression, it matches whole texts as the library says.
func FuzzRegex(f *testing.F) {
	for _, re := range []string{"GET|HEAD", "(GET|HEAD)", "/.*", "/a/.*|/b|/c/.*", ".*", "", "GET|", "GE|GET", "(?i)get|HEAD", "a|b|c|d|e|f|g|h|i|j", "(?s)/.*|x", "(a)(b|c)", "^a|b$"} {
		for _, s := range []string{"GET", "HEAD", "GE", "", "/", "/a/b", "/b", "/b/", "/c/", "b", "ab", "/\n", "x\xff", "get"} {
			f.Add(re, s)
		}
	}
	f.Fuzz(func(t *testing.T, re, s string) {
		match, err := (*Compiler)(nil).Regex(&matcherv3.RegexMatcher{Regex: re}, "")
		if err != nil {
			return
		}
		if want := regexp.MustCompile(`\A(?:` + re + `)\z`).MatchString(s); match(s) != want {
			t.Errorf("%q on %q: %v, the library says %v", re, s, !want, want)
		}
	})
}
