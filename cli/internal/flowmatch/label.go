// SPDX-License-Identifier: Apache-2.0

package flowmatch

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weirmesh/weir/gen/flow"
)

func labels(f *flow.FlowFilter) (predicate, error) {
	return sides(f.GetSourceLabel(), f.GetDestinationLabel(), func(values []string, s side) (predicate, error) {
		return selectors(values, func(f *flow.Flow) []string { return s.endpoint(f).GetLabels() })
	})
}

func nodeLabels(f *flow.FlowFilter) (predicate, error) {
	return selectors(f.GetNodeLabels(), (*flow.Flow).GetNodeLabels)
}

func selectors(values []string, get func(*flow.Flow) []string) (predicate, error) {
	return anyOf(values, func(v string) (predicate, error) {
		sel, err := parseSelector(v)
		if err != nil {
			return nil, fmt.Errorf("invalid label filter %q: %w", v, err)
		}
		return func(f *flow.Flow) bool { return sel.match(get(f)) }, nil
	})
}

// selector is a Kubernetes label selector: requirements that all must hold.
type selector []requirement

// requirement is one comma-separated part of a selector.
type requirement struct {
	// source of the label (k8s, reserved, cidr, ...); empty = any.
	source, key string
	// prefix is set for cidr keys, which match every label of a network inside.
	prefix netip.Prefix
	op     operator
	values []string
}

type operator int

const (
	exists operator = iota
	missing
	in
	notIn
)

func (s selector) match(labels []string) bool {
	for _, r := range s {
		if !r.match(labels) {
			return false
		}
	}
	return true
}

func (r requirement) match(labels []string) bool {
	for _, l := range labels {
		name, value, _ := strings.Cut(l, "=")
		source, key, ok := strings.Cut(name, ":")
		if !ok {
			source, key = "", name
		}
		if !r.names(source, key) {
			continue
		}
		switch r.op {
		case exists:
			return true
		case missing:
			return false
		case in:
			if slices.Contains(r.values, value) {
				return true
			}
		case notIn:
			if slices.Contains(r.values, value) {
				return false
			}
		}
	}
	return r.op == missing || r.op == notIn
}

func (r requirement) names(source, key string) bool {
	if r.source != "" && r.source != source {
		return false
	}
	if r.prefix.IsValid() {
		p, err := netip.ParsePrefix(key)
		return err == nil && r.prefix.Bits() <= p.Bits() && r.prefix.Contains(p.Addr())
	}
	return r.key == key
}

// parseSelector reads `a=b`, `a==b`, `a!=b`, `a in (x,y)`, `a notin (x)`, `a`, `!a`, joined by commas.
func parseSelector(s string) (selector, error) {
	var sel selector
	for rest := strings.TrimSpace(s); rest != ""; {
		part, tail := splitRequirement(rest)
		r, err := parseRequirement(strings.TrimSpace(part))
		if err != nil {
			return nil, err
		}
		sel = append(sel, r)
		if tail == "" {
			break
		}
		if rest = strings.TrimSpace(tail[1:]); rest == "" {
			return nil, errors.New("ends with a comma")
		}
	}
	return sel, nil
}

// splitRequirement cuts at the first comma outside parentheses; the tail begins with it.
func splitRequirement(s string) (part, tail string) {
	depth := 0
	for i, c := range s {
		switch {
		case c == '(':
			depth++
		case c == ')':
			depth--
		case c == ',' && depth <= 0:
			return s[:i], s[i:]
		}
	}
	return s, ""
}

func parseRequirement(s string) (requirement, error) {
	var r requirement
	if key, ok := strings.CutPrefix(s, "!"); ok {
		r.op = missing
		return r, r.setKey(key)
	}
	if key, set, ok := strings.Cut(s, "("); ok {
		values, ok := strings.CutSuffix(set, ")")
		if !ok || strings.ContainsAny(values, "()") {
			return r, errors.New("unbalanced parentheses")
		}
		for v := range strings.SplitSeq(values, ",") {
			r.values = append(r.values, strings.TrimSpace(v))
		}
		fields := strings.Fields(key)
		if len(fields) != 2 || fields[1] != "in" && fields[1] != "notin" {
			return r, fmt.Errorf("expected `key in (...)` or `key notin (...)`, got %q", s)
		}
		r.op = in
		if fields[1] == "notin" {
			r.op = notIn
		}
		if err := checkValues(r.values); err != nil {
			return r, err
		}
		return r, r.setKey(fields[0])
	}
	key, value, ok := strings.Cut(s, "=")
	if !ok {
		r.op = exists
		return r, r.setKey(key)
	}
	r.op = in
	if before, negated := strings.CutSuffix(key, "!"); negated {
		key, r.op = before, notIn
	} else {
		value = strings.TrimPrefix(value, "=")
	}
	r.values = []string{strings.TrimSpace(value)}
	if err := checkValues(r.values); err != nil {
		return r, err
	}
	return r, r.setKey(key)
}

func checkValues(values []string) error {
	for _, v := range values {
		if strings.ContainsAny(v, "=!,() \t") {
			return fmt.Errorf("unexpected character in value %q", v)
		}
	}
	return nil
}

func (r *requirement) setKey(s string) error {
	s = strings.TrimSpace(s)
	if source, key, ok := strings.Cut(s, ":"); ok {
		if source != "any" {
			r.source = source
		}
		r.key = key
	} else {
		r.key = s
	}
	if r.key == "" || strings.ContainsAny(s, "=!,() \t") {
		return fmt.Errorf("invalid label key %q", s)
	}
	if r.source == "cidr" {
		if p, err := netip.ParsePrefix(r.key); err == nil {
			r.prefix = p.Masked()
		} else if a, err := netip.ParseAddr(r.key); err == nil {
			r.prefix = netip.PrefixFrom(a, a.BitLen())
		} else {
			return fmt.Errorf("invalid CIDR %q", r.key)
		}
	}
	return nil
}
