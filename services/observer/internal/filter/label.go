// SPDX-License-Identifier: Apache-2.0

package filter

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/gen/flow"
)

func compileLabels(list []string, what string, of func(*flow.Flow) []string) (Match, error) {
	if len(list) == 0 {
		return nil, nil
	}
	var want []selector
	for _, text := range list {
		s, err := parseSelector(text)
		if err != nil {
			return nil, fmt.Errorf("invalid %s label filter: %w", what, err)
		}
		want = append(want, s)
	}
	return func(fl *flow.Flow) bool {
		labels := of(fl)
		return slices.ContainsFunc(want, func(s selector) bool { return s.matches(labels) })
	}, nil
}

// selector is a Kubernetes label selector: all requirements must hold.
type selector []requirement

type operator int

const (
	exists operator = iota
	absent
	in
	notIn
	greater
	less
)

// requirement is one term. An empty source is any source.
type requirement struct {
	source, key string
	prefix      netip.Prefix // of a cidr key
	op          operator
	values      []string
	number      int64
}

func (s selector) matches(labels []string) bool {
	for i := range s {
		if !s[i].matches(labels) {
			return false
		}
	}
	return true
}

func (r *requirement) matches(labels []string) bool {
	value, found := r.find(labels)
	switch r.op {
	case absent:
		return !found
	case in:
		return found && slices.Contains(r.values, value)
	case notIn:
		return !found || !slices.Contains(r.values, value)
	case greater, less:
		n, err := strconv.ParseInt(value, 10, 64)
		if !found || err != nil {
			return false
		}
		return r.op == greater && n > r.number || r.op == less && n < r.number
	}
	return found
}

// find returns the value of the first label with the key, which is written source:key=value.
func (r *requirement) find(labels []string) (string, bool) {
	for _, label := range labels {
		source, rest, found := strings.Cut(label, ":")
		if !found {
			source, rest = "", label
		}
		if r.source != "" && r.source != source {
			continue
		}
		key, value, _ := strings.Cut(rest, "=")
		if r.prefix.IsValid() {
			if prefix, ok := parseCIDRKey(key); ok && prefix.Bits() >= r.prefix.Bits() && r.prefix.Contains(prefix.Addr()) {
				return value, true
			}
			continue
		}
		if key == r.key {
			return value, true
		}
	}
	return "", false
}

// parseCIDRKey reads the key of a cidr label. IPv6 is written with "-" for ":", and with a zero
// where it would begin or end with one.
func parseCIDRKey(key string) (netip.Prefix, bool) {
	prefix, err := netip.ParsePrefix(strings.ReplaceAll(key, "-", ":"))
	return prefix, err == nil
}

// parser reads a selector.
type parser struct {
	text string
	at   int
}

// parseSelector reads `a=b, k8s:c in (d, e), !f`. An empty selector selects everything.
func parseSelector(text string) (selector, error) {
	p := &parser{text: text}
	var s selector
	p.space()
	if p.done() {
		return s, nil
	}
	for {
		r, err := p.requirement()
		if err != nil {
			return nil, fmt.Errorf("unable to parse requirement: %w", err)
		}
		s = append(s, r)
		p.space()
		if p.done() {
			return s, nil
		}
		if !p.take(",") {
			return nil, fmt.Errorf("unable to parse requirement: found '%s', expected: ',' or 'end of string'", p.text[p.at:])
		}
	}
}

func (p *parser) done() bool { return p.at >= len(p.text) }

func (p *parser) space() {
	for !p.done() && strings.ContainsRune(" \t\r\n", rune(p.text[p.at])) {
		p.at++
	}
}

func (p *parser) take(token string) bool {
	if strings.HasPrefix(p.text[p.at:], token) {
		p.at += len(token)
		return true
	}
	return false
}

// word reads up to white space or a special character.
func (p *parser) word() string {
	start := p.at
	for !p.done() && !strings.ContainsRune(" \t\r\n=!,()<>", rune(p.text[p.at])) {
		p.at++
	}
	return p.text[start:p.at]
}

func (p *parser) requirement() (requirement, error) {
	var r requirement
	p.space()
	if p.take("!") {
		r.op = absent
		p.space()
	}
	key := p.word()
	if err := r.setKey(key); err != nil {
		return r, err
	}
	if r.op == absent {
		return r, nil
	}
	p.space()
	var err error
	switch {
	case p.done() || p.text[p.at] == ',':
		return r, nil
	case p.take("!="):
		r.op = notIn
		r.values, err = p.single()
	case p.take("==") || p.take("="):
		r.op = in
		r.values, err = p.single()
	case p.take(">"), p.take("<"):
		r.op = less
		if p.text[p.at-1] == '>' {
			r.op = greater
		}
		if r.values, err = p.single(); err == nil {
			if r.number, err = strconv.ParseInt(r.values[0], 10, 64); err != nil {
				err = fmt.Errorf("for 'Gt', 'Lt' operators, the value must be an integer: %w", err)
			}
		}
	default:
		word := p.word()
		switch word {
		case "in":
			r.op = in
		case "notin":
			r.op = notIn
		default:
			return r, fmt.Errorf("found '%s', expected: in, notin, =, ==, !=, gt, lt", p.text[p.at-len(word):])
		}
		r.values, err = p.list()
	}
	return r, err
}

func (r *requirement) setKey(key string) error {
	source, rest, found := strings.Cut(key, ":")
	if !found {
		source, rest = "", key
	}
	if rest == "" || strings.Contains(rest, ":") {
		return fmt.Errorf("invalid label key %q", key)
	}
	if source == "any" {
		source = ""
	}
	r.source, r.key = source, rest
	if source == "cidr" {
		prefix, ok := parseCIDRKey(rest)
		if !ok {
			return fmt.Errorf("invalid label key %q: it is no prefix", key)
		}
		r.prefix = prefix
	}
	return checkKey(rest)
}

// checkKey is Kubernetes' rule of a qualified name.
func checkKey(key string) error {
	name := key
	if i := strings.LastIndexByte(key, '/'); i >= 0 {
		name = key[i+1:]
	}
	if name == "" || len(key) > 253+1+63 || strings.ContainsFunc(key, func(r rune) bool {
		return r != '/' && r != '.' && r != '-' && r != '_' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) {
		return fmt.Errorf("invalid label key %q", key)
	}
	return nil
}

func checkValue(value string) error {
	if len(value) > 63 || strings.ContainsFunc(value, func(r rune) bool {
		return r != '.' && r != '-' && r != '_' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) {
		return fmt.Errorf("invalid label value %q", value)
	}
	return nil
}

// single reads one value, which may be empty.
func (p *parser) single() ([]string, error) {
	p.space()
	value := p.word()
	return []string{value}, checkValue(value)
}

// list reads (a, b, c).
func (p *parser) list() ([]string, error) {
	p.space()
	if !p.take("(") {
		return nil, fmt.Errorf("found '%s', expected: '('", p.text[p.at:])
	}
	var values []string
	for {
		p.space()
		value := p.word()
		if err := checkValue(value); err != nil {
			return nil, err
		}
		values = append(values, value)
		p.space()
		switch {
		case p.take(","):
		case p.take(")"):
			return values, nil
		default:
			return nil, fmt.Errorf("found '%s', expected: ',' or ')'", p.text[p.at:])
		}
	}
}
