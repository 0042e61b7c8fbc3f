// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"regexp"
	"slices"
	"strings"
)

// HTTPRequest is a request as it came in.
type HTTPRequest struct {
	Method string
	// Path is the request target with its query; AcceptsHTTP normalises it.
	Path string
	// Host is Host or :authority, with its port if it was sent.
	Host    string
	Headers []Header
}

// Header is one header line.
type Header struct{ Name, Value string }

// Mutation is what an item that matched does because a header was not as required.
type Mutation struct {
	// Rule is a position in Resolved.Rules.
	Rule int
	// Action is LOG, ADD, DELETE or REPLACE.
	Action      string
	Name, Value string
}

// AcceptsHTTP reports whether a request passes, by which rules (positions in Resolved.Rules, each once), and what becomes of its headers (spec 10.1). If
// an item has an action on headers, all items are evaluated; else the first one that matches ends it. A path that must be redirected (NormalizePath) is
// not judged, and does not pass, but for visibility alone, which never refuses.
func (f *Filter) AcceptsHTTP(q HTTPRequest) (rules []int, mutations []Mutation, ok bool) {
	path, redirect := NormalizePath(q.Path)
	switch {
	case f.Kind != FilterHTTP:
		return nil, nil, false
	case f.Visibility:
		return nil, nil, true // whatever its path
	case redirect:
		return nil, nil, false
	}
	q.Path = path
	all := slices.ContainsFunc(f.HTTP, func(i HTTPItem) bool { return i.acts() })
	for i := range f.HTTP {
		item := &f.HTTP[i]
		did, matches := item.matches(&q)
		if !matches {
			continue
		}
		if !slices.Contains(rules, item.Rule) {
			rules = append(rules, item.Rule)
		}
		for _, m := range did {
			m.Rule = item.Rule
			mutations = append(mutations, m)
		}
		if !all {
			break
		}
	}
	return rules, mutations, len(rules) > 0
}

// AcceptsDNS reports whether a query for a name passes, and by which rules (positions in Resolved.Rules, each once).
func (f *Filter) AcceptsDNS(name string) (rules []int, ok bool) {
	if f.Kind != FilterDNS {
		return nil, false
	}
	for i := range f.DNS {
		item := &f.DNS[i]
		if (item.NameSelector == NameSelector{} || MatchName(item.NameSelector, name)) && !slices.Contains(rules, item.Rule) {
			rules = append(rules, item.Rule)
		}
	}
	return rules, f.Visibility || len(rules) > 0
}

// AcceptsSNI reports whether a connection with this server name ("" = none) passes unread, and by which rules (positions in Resolved.Rules, each once).
// Of a Filter of kind HTTP it is what becomes of connections with TLS: its TLS items are alternatives to those for requests. Visibility alone refuses none.
func (f *Filter) AcceptsSNI(name string, tls bool) (rules []int, ok bool) {
	for i := range f.TLS {
		item := &f.TLS[i]
		if (item.Any || tls && slices.ContainsFunc(item.ServerNames, func(p string) bool { return MatchServerName(p, name) })) &&
			!slices.Contains(rules, item.Rule) {
			rules = append(rules, item.Rule)
		}
	}
	return rules, f.Visibility || len(rules) > 0
}

// acts reports whether the item has an action on headers.
func (h *HTTPRule) acts() bool {
	return slices.ContainsFunc(h.HeaderMatches, func(m HeaderMatch) bool { return m.Mismatch != "" })
}

// matches compares a request with a normalised path.
func (h *HTTPRule) matches(q *HTTPRequest) (did []Mutation, ok bool) {
	if !matchWhole(h.Method, q.Method) || !matchWhole(h.Path, q.Path) || !matchWhole(h.Host, q.Host) {
		return nil, false
	}
	for _, c := range h.Conditions() {
		have, present := q.header(c.Name)
		if present && (!c.Exact || have == c.Value) {
			continue
		}
		if c.Mismatch == "" {
			return nil, false
		}
		did = append(did, Mutation{Action: c.Mismatch, Name: c.Name, Value: c.Value})
	}
	return did, true
}

// header returns the values of a header, joined by commas.
func (q *HTTPRequest) header(name string) (value string, present bool) {
	var all []string
	for _, h := range q.Headers {
		if strings.EqualFold(h.Name, name) {
			all = append(all, h.Value)
		}
	}
	return strings.Join(all, ","), len(all) > 0
}

// matchWhole matches a valid expression against a whole text; an empty one matches all. The longest match from the start is the whole text, if any is.
func matchWhole(expression, text string) bool {
	if expression == "" {
		return true
	}
	re, err := regexp.Compile(expression)
	if err != nil {
		return false
	}
	re.Longest()
	at := re.FindStringIndex(text)
	return at != nil && at[0] == 0 && at[1] == len(text)
}

// HeaderCondition is what an item wants of one header.
type HeaderCondition struct {
	Name string
	// Value that it must have, if Exact; else any will do. Several values of one header are compared joined by ",".
	Value string
	Exact bool
	// Mismatch is what becomes of a request whose header is not so: "" = the item does not match; else it matches, and LOG, ADD, DELETE or REPLACE.
	Mismatch string
}

// Conditions returns what an item wants of headers: those of `headers` as they are written there, then those of `headerMatches`. An action to add or set
// a header that may have any value has nothing to add: it is LOG.
func (h *HTTPRule) Conditions() []HeaderCondition {
	all := make([]HeaderCondition, 0, len(h.Headers)+len(h.HeaderMatches))
	for _, text := range h.Headers {
		name, value, exact := strings.Cut(text, " ")
		all = append(all, HeaderCondition{Name: strings.TrimSuffix(name, ":"), Value: value, Exact: exact})
	}
	for _, m := range h.HeaderMatches {
		c := HeaderCondition{Name: m.Name, Value: m.Value, Exact: m.Value != "", Mismatch: m.Mismatch}
		if !c.Exact && c.Mismatch != "" {
			c.Mismatch = "LOG"
		}
		all = append(all, c)
	}
	return all
}
