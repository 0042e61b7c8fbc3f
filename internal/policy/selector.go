// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"slices"
	"strings"

	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/internal/reserved"
)

// Sources of label keys that mean something here.
const (
	anySource      = ""
	reservedSource = "reserved"
	nodeSource     = "node"
	groupSource    = "cidrgroup"
)

// Selector is a label selector, with what its policy's scope adds to it (spec 3.2 to 3.4). It is never changed, and safe for concurrent use.
type Selector struct {
	requirements []requirement // ANDed; those that fail most often come first
	key          string
}

type operator uint8

const (
	opIn operator = iota
	opNotIn
	opExists
	opDoesNotExist
)

// requirement is one condition on one key.
type requirement struct {
	source, key string // source "" = any
	op          operator
	values      []string // sorted
	prefix      string   // of a label with the key, from the source (pods, if it is any)
}

// newSelector puts requirements into canonical order.
func newSelector(requirements []requirement) *Selector {
	texts := make([]string, len(requirements))
	for i := range requirements {
		texts[i] = requirements[i].String()
	}
	order := make([]int, len(requirements))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return strings.Compare(texts[a], texts[b]) })
	s := &Selector{}
	var key []string
	for _, i := range order {
		if len(key) > 0 && key[len(key)-1] == texts[i] {
			continue
		}
		q := requirements[i]
		q.prefix = cmp.Or(q.source, reserved.Source) + ":" + q.key + "="
		s.requirements = append(s.requirements, q)
		key = append(key, texts[i])
	}
	s.key = strings.Join(key, ",")
	slices.SortStableFunc(s.requirements, func(a, b requirement) int { return a.rank() - b.rank() })
	return s
}

// rank is low for requirements that few labels meet.
func (q *requirement) rank() int {
	switch {
	case q.op == opIn && q.key == reserved.NamespaceKey:
		return 0
	case q.op == opIn && q.key == reserved.ClusterKey:
		return 2
	case q.op == opIn:
		return 1
	}
	return 3
}

// with returns a selector that wants more.
func (s *Selector) with(more ...requirement) *Selector {
	return newSelector(append(slices.Clone(s.requirements), more...))
}

// Matches reports whether it selects something with these labels. A nil selector selects nothing.
func (s *Selector) Matches(labels labelset.Set) bool {
	if s == nil {
		return false
	}
	for i := range s.requirements {
		if !s.requirements[i].matches(labels) {
			return false
		}
	}
	return true
}

// Key is its canonical text: equal for selectors that are written alike but for order.
func (s *Selector) Key() string { return s.key }

// String is the text for people: the canonical one, or "everything".
func (s *Selector) String() string {
	if s.key == "" {
		return "everything"
	}
	return s.key
}

func (s *Selector) appendKeys(keys []string) []string {
	if s == nil {
		return keys
	}
	for i := range s.requirements {
		keys = append(keys, s.requirements[i].key)
	}
	return keys
}

// mentions reports whether a requirement meets a condition.
func (s *Selector) mentions(is func(requirement) bool) bool {
	return slices.ContainsFunc(s.requirements, is)
}

// missing returns the requirements that labels do not meet.
func (s *Selector) missing(labels labelset.Set) []requirement {
	var missing []requirement
	for i := range s.requirements {
		if !s.requirements[i].matches(labels) {
			missing = append(missing, s.requirements[i])
		}
	}
	return missing
}

// String is the canonical text of a requirement. Keys and values hold no character that it adds.
func (q requirement) String() string {
	name := q.key
	if q.source != anySource {
		name = q.source + ":" + q.key
	}
	switch q.op {
	case opExists:
		return name
	case opDoesNotExist:
		return "!" + name
	case opNotIn:
		return name + " notin (" + strings.Join(q.values, ",") + ")"
	}
	if len(q.values) == 1 {
		return name + "=" + q.values[0]
	}
	return name + " in (" + strings.Join(q.values, ",") + ")"
}

func (q *requirement) matches(labels labelset.Set) bool {
	present, in := q.look(labels)
	switch q.op {
	case opIn:
		return in
	case opNotIn:
		return !in
	case opExists:
		return present
	default:
		return !present
	}
}

// look reports whether labels have the key, and whether with one of the values.
func (q *requirement) look(labels labelset.Set) (present, in bool) {
	if len(labels) == 0 {
		return false, false
	}
	if q.source == reserved.Source || q.source == anySource && fromPods(labels[0]) && fromPods(labels[len(labels)-1]) {
		low, high := 0, len(labels) // sorted: if the first and the last are of pods, all are
		for low < high {
			if middle := (low + high) / 2; labels[middle] < q.prefix {
				low = middle + 1
			} else {
				high = middle
			}
		}
		if low == len(labels) || !strings.HasPrefix(labels[low], q.prefix) {
			return false, false
		}
		return true, slices.Contains(q.values, labels[low][len(q.prefix):])
	}
	for _, l := range labels {
		source := q.source
		if source == anySource {
			source = l[:max(0, strings.IndexByte(l, ':'))]
		}
		if value, ok := cut(l, source, q.key); ok {
			present = true
			in = in || slices.Contains(q.values, value)
		}
	}
	if !present && q.source == reservedSource && q.key == "world" {
		// The world of one family is the world as well.
		present = has(labels, "reserved:world-ipv4") || has(labels, "reserved:world-ipv6")
		in = present && slices.Contains(q.values, "")
	}
	return present, in
}

func fromPods(label string) bool { return strings.HasPrefix(label, reserved.Source+":") }

// cut returns the value of a label, if it has this source and key. Reserved and cidr labels may stand without `=`.
func cut(label, source, key string) (string, bool) {
	rest, ok := strings.CutPrefix(label, source)
	if !ok {
		return "", false
	}
	if rest, ok = strings.CutPrefix(rest, ":"); !ok {
		return "", false
	}
	if rest, ok = strings.CutPrefix(rest, key); !ok {
		return "", false
	}
	if rest == "" {
		return "", true
	}
	return rest[1:], rest[0] == '='
}

// has reports whether labels hold a reserved label, with or without `=`.
func has(labels labelset.Set, label string) bool {
	for _, l := range labels {
		if strings.HasPrefix(l, label) && (len(l) == len(label) || l[len(label):] == "=") {
			return true
		}
	}
	return false
}
