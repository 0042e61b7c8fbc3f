// SPDX-License-Identifier: Apache-2.0

package filter

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/internal/batch"
)

var errEmptyName = errors.New("invalid filter, name must not be empty")

// compileIPs: with a slash a prefix that contains the address, without one the same text.
func compileIPs(list []string, of func(*flow.IP) string) (Match, error) {
	if len(list) == 0 {
		return nil, nil
	}
	var texts []string
	var prefixes []netip.Prefix
	for _, text := range list {
		if strings.Contains(text, "/") {
			prefix, err := netip.ParsePrefix(text)
			if err != nil {
				return nil, fmt.Errorf("invalid IP prefix %q in filter: %w", text, err)
			}
			prefixes = append(prefixes, prefix)
			continue
		}
		if _, err := netip.ParseAddr(text); err != nil {
			return nil, fmt.Errorf("invalid IP address %q in filter: %w", text, err)
		}
		texts = append(texts, text)
	}
	return func(fl *flow.Flow) bool {
		has := of(fl.GetIP())
		if has == "" {
			return false
		}
		if slices.Contains(texts, has) {
			return true
		}
		if len(prefixes) == 0 {
			return false
		}
		addr, err := netip.ParseAddr(has)
		return err == nil && slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(addr) })
	}, nil
}

// splitName splits [namespace/]prefix; without a slash the namespace is "default", and an empty
// namespace is any.
func splitName(text string) (namespace, prefix string) {
	namespace, prefix, found := strings.Cut(text, "/")
	if !found {
		return "default", text
	}
	return namespace, prefix
}

// compileNames is the rule of pods and services.
func compileNames(list []string, of func(*flow.Flow) (namespace, name string)) (Match, error) {
	if len(list) == 0 {
		return nil, nil
	}
	type pattern struct{ namespace, prefix string }
	var want []pattern
	for _, text := range list {
		if text == "" {
			return nil, errEmptyName
		}
		namespace, prefix := splitName(text)
		want = append(want, pattern{namespace, prefix})
	}
	return func(fl *flow.Flow) bool {
		namespace, name := of(fl)
		if namespace == "" && name == "" {
			return false
		}
		for _, w := range want {
			if strings.HasPrefix(name, w.prefix) && (w.namespace == "" || w.namespace == namespace) {
				return true
			}
		}
		return false
	}, nil
}

func compileFQDNs(patterns []string, of func(*flow.Flow) []string) (Match, error) {
	if len(patterns) == 0 {
		return nil, nil
	}
	var parts []string
	for _, p := range patterns {
		part, err := fqdnPattern(p)
		if err != nil {
			return nil, err
		}
		parts = append(parts, part)
	}
	re, err := anchored(parts)
	if err != nil {
		return nil, err
	}
	return func(fl *flow.Flow) bool { return slices.ContainsFunc(of(fl), re.MatchString) }, nil
}

// fqdnPattern turns a name with `*` into a regular expression.
func fqdnPattern(pattern string) (string, error) {
	pattern = strings.ToLower(strings.TrimSuffix(strings.TrimSpace(pattern), "."))
	if pattern == "" {
		return "", errors.New("empty pattern")
	}
	if strings.HasSuffix(pattern, ".") {
		return "", errors.New("multiple trailing dots in pattern")
	}
	var out strings.Builder
	for _, r := range pattern {
		switch {
		case r == '.':
			out.WriteString(`\.`)
		case r == '*':
			out.WriteString(`[-.0-9a-z]*`)
		case r == '-' || r == '_' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z':
			out.WriteRune(r)
		default:
			return "", fmt.Errorf("%q: invalid rune in pattern", r)
		}
	}
	return out.String(), nil
}

// anchored makes one expression that matches whole names.
func anchored(parts []string) (*regexp.Regexp, error) {
	re, err := regexp.Compile(`\A(?:` + strings.Join(parts, "|") + `)\z`)
	if err != nil {
		return nil, fmt.Errorf("failed to compile regexp: %w", err)
	}
	return re, nil
}

// anyName is what an empty half of a node pattern stands for.
const anyName = `[-0-9_a-z]+(?:\.[-0-9_a-z]+)*`

// nodeNames matches cluster/node; a name without a cluster is of the default one.
type nodeNames struct{ re *regexp.Regexp }

// MatchString decides on a node name.
func (n nodeNames) MatchString(name string) bool {
	if name == "" {
		return false
	}
	if !strings.Contains(name, "/") {
		name = batch.DefaultCluster + "/" + name
	}
	return n.re.MatchString(name)
}

func compileNodeNames(patterns []string) (nodeNames, error) {
	var parts []string
	for _, pattern := range patterns {
		if pattern == "" {
			return nodeNames{}, errors.New("empty pattern")
		}
		cluster, node, found := strings.Cut(pattern, "/")
		if !found {
			cluster, node = "", pattern
		}
		if strings.Contains(node, "/") {
			return nodeNames{}, errors.New("too many slashes in pattern")
		}
		halves := [2]string{anyName, anyName}
		for i, half := range []string{cluster, node} {
			if half == "" {
				continue
			}
			part, err := fqdnPattern(half)
			if err != nil {
				return nodeNames{}, err
			}
			halves[i] = part
		}
		parts = append(parts, halves[0]+"/"+halves[1])
	}
	re, err := anchored(parts)
	return nodeNames{re}, err
}
