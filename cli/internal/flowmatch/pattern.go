// SPDX-License-Identifier: Apache-2.0

package flowmatch

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/weirmesh/weir/gen/flow"
)

// namePattern compiles a DNS or node name in which `*` stands for any run of
// the characters of such names, dots included.
func namePattern(pattern string) (*regexp.Regexp, error) {
	body, err := patternBody(pattern)
	if err != nil {
		return nil, err
	}
	return regexp.Compile("^" + body + "$")
}

func patternBody(pattern string) (string, error) {
	pattern = strings.ToLower(strings.TrimSuffix(strings.TrimSpace(pattern), "."))
	switch {
	case pattern == "":
		return "", errors.New("empty pattern")
	case strings.HasSuffix(pattern, "."):
		return "", errors.New("multiple trailing dots in pattern")
	}
	var b strings.Builder
	for _, r := range pattern {
		switch {
		case r == '*':
			b.WriteString(`[-.0-9a-z]*`)
		case r == '.':
			b.WriteString(`[.]`)
		case r == '-' || r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z':
			b.WriteRune(r)
		default:
			return "", fmt.Errorf("%q: invalid rune in pattern", r)
		}
	}
	return b.String(), nil
}

// nodeNames matches node, cluster/node, cluster/ and /node. Flows that name no cluster are of "default".
func nodeNames(f *flow.FlowFilter) (predicate, error) {
	return anyOf(f.GetNodeName(), func(v string) (predicate, error) {
		cluster, node, ok := strings.Cut(v, "/")
		if !ok {
			cluster, node = "", cluster
		}
		if v == "" {
			return nil, errors.New("invalid node name filter: empty pattern")
		}
		if strings.Contains(node, "/") {
			return nil, invalid("node name", v, "too many slashes in")
		}
		re := "^"
		for i, part := range []string{cluster, node} {
			if i == 1 {
				re += "/"
			}
			if part == "" {
				re += "[^/]*"
				continue
			}
			body, err := patternBody(part)
			if err != nil {
				return nil, fmt.Errorf("invalid node name filter: %w", err)
			}
			re += body
		}
		compiled, err := regexp.Compile(re + "$")
		if err != nil {
			return nil, fmt.Errorf("invalid node name filter: %w", err)
		}
		return func(f *flow.Flow) bool {
			name := f.GetNodeName()
			if name == "" {
				return false
			}
			if !strings.Contains(name, "/") {
				name = "default/" + name
			}
			return compiled.MatchString(name)
		}, nil
	})
}
