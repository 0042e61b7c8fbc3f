// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"slices"
	"strings"
)

// Name is what is allowed to addresses outside of the cluster that DNS gave a name which the selector matches (toFQDNs).
type Name struct {
	// NameSelector has exactly one member, in lower case, without a trailing dot.
	NameSelector
	// Term is its position in Resolved.Terms; the term matches no Peer without Names.
	Term int
	// Ranges are those with the verdict Allow, sorted, without overlap. A deny or an allow for the address's own class goes before them.
	Ranges []Range
}

// Names returns what is allowed by DNS names, in the order of the terms: together with what rules for any peer, for the entity `world` and for wider names
// say of the same ports, since every address with the name is a peer of these too. So of two selectors of one name the narrower has all that both say; of two
// that only happen to share an address neither does, and requests that just one of them accepts may be refused.
func (r *Resolved) Names() []Name {
	var all []Name
	for i, t := range r.Terms {
		if t.kind != termName {
			continue
		}
		var terms []int
		for j, other := range r.Terms {
			if i == j || other.Key == entityWorld || other.kind == termName && other.name.covers(t.name) {
				terms = append(terms, j)
			}
		}
		ranges := slices.DeleteFunc(r.Class(terms), func(x Range) bool { return x.Verdict != Allow })
		all = append(all, Name{NameSelector: t.name, Term: i, Ranges: ranges})
	}
	return all
}

// covers reports whether a canonical selector matches every name that another one does, as far as can be told from their form.
func (s NameSelector) covers(o NameSelector) bool {
	switch {
	case s.MatchPattern == "":
		return false
	case o.MatchName != "":
		return MatchName(s, o.MatchName)
	case strings.Trim(s.MatchPattern, "*") == "" && len(s.MatchPattern) < 3:
		return true
	}
	if rest, ok := strings.CutPrefix(s.MatchPattern, "**."); ok {
		return !strings.Contains(rest, "*") && strings.HasSuffix(o.MatchPattern, "."+rest) // no name begins with a dot
	}
	rest, ok := strings.CutPrefix(s.MatchPattern, "*.")
	label, same := strings.CutSuffix(o.MatchPattern, "."+rest)
	return ok && same && !strings.Contains(rest, "*") && !strings.Contains(label, ".") && label != "**"
}

// canonicalName is a name or pattern in the form in which it is compared; the root keeps its dot.
func canonicalName(text string) string {
	if text == "." {
		return text
	}
	return plainName(text)
}

// MatchName reports whether a selector matches a name (spec 8.2): either member may. One trailing dot of the name or the pattern is as good as none, and
// case does not matter. A selector with neither matches nothing.
func MatchName(s NameSelector, name string) bool {
	name = plainName(name)
	return s.MatchName != "" && plainName(s.MatchName) == name || s.MatchPattern != "" && matchPattern(plainName(s.MatchPattern), name)
}

// plainName is a name in lower case, without its trailing dot; the root is "".
func plainName(name string) string {
	return strings.TrimSuffix(strings.ToLower(name), ".")
}

// matchPattern compares plain names. Only `*` and `**` alone match a name with other characters than those that a `*` stands for.
func matchPattern(pattern, name string) bool {
	if pattern == "*" || pattern == "**" {
		return true
	}
	if rest, ok := strings.CutPrefix(pattern, "**."); ok {
		return matchSubdomain(rest, name, isNameCharacter)
	}
	return matchGlob(pattern, name, isNameCharacter)
}

func isNameCharacter(c byte) bool {
	return c == '-' || c == '_' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z'
}

// matchSubdomain matches one or more whole labels before a pattern.
func matchSubdomain(pattern, name string, in func(byte) bool) bool {
	start := 0
	for i := range len(name) {
		switch c := name[i]; {
		case c == '.' && i > start:
			if matchGlob(pattern, name[i+1:], in) {
				return true
			}
			start = i + 1
		case c == '.' || !in(c):
			return false
		}
	}
	return false
}

// matchGlob matches a whole text; `*` stands for any number of some characters, among which is no dot. Going back to the last star is enough: a star
// before it could take more only up to the next dot, which the last one reaches as well.
func matchGlob(pattern, text string, in func(byte) bool) bool {
	p, t, star, taken := 0, 0, -1, 0
	for t < len(text) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, taken = p, t
			p++
		case p < len(pattern) && pattern[p] == text[t]:
			p++
			t++
		case star >= 0 && in(text[taken]):
			taken++
			p, t = star+1, taken
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// MatchServerName reports whether a pattern of serverNames matches the server name of a TLS connection (spec 9.5). A connection without one matches none.
func MatchServerName(pattern, name string) bool {
	pattern, name = plainName(pattern), plainName(name)
	switch {
	case name == "":
		return false
	case strings.Trim(pattern, "*") == "":
		return isServerName(name)
	}
	if rest, ok := strings.CutPrefix(pattern, "**."); ok {
		return matchSubdomain(rest, name, isNoDot)
	}
	return matchGlob(pattern, name, isNoDot)
}

func isNoDot(c byte) bool { return c != '.' }

// isServerName reports whether a plain name has labels of letters, digits, dashes and underscores.
func isServerName(name string) bool {
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || strings.ContainsFunc(label, func(c rune) bool { return c > 127 || !isNameCharacter(byte(c)) }) {
			return false
		}
	}
	return true
}
