// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"regexp"
	"slices"
	"strings"

	"github.com/weirmesh/weir/internal/reserved"
)

// Kubernetes' syntax of label keys and values.
var (
	labelName   = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
	labelPrefix = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	labelValue  = regexp.MustCompile(`^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$`)
	sourceName  = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_]*[A-Za-z0-9])?$`)
)

// keyStyle says how a kind writes label keys.
type keyStyle uint8

const (
	sourced       keyStyle = iota // cilium.io: `source:key`, no source = any
	plainKeys                     // Kubernetes: keys of the object itself
	namespaceKeys                 // Kubernetes: keys of the namespace
)

var operators = map[string]operator{"In": opIn, "NotIn": opNotIn, "Exists": opExists, "DoesNotExist": opDoesNotExist}

// selector reads a label selector; nil = absent. A null selector of Kubernetes' kinds is the caller's.
func (r *reader) selector(n node, style keyStyle) *Selector {
	requirements, ok := r.requirements(n, style)
	if !ok {
		return nil
	}
	return newSelector(requirements)
}

func (r *reader) requirements(n node, style keyStyle) ([]requirement, bool) {
	if !r.object(n, "matchLabels", "matchExpressions") {
		return nil, false
	}
	var all []requirement
	if labels := n.child("matchLabels"); !labels.absent() {
		m, ok := labels.v.(map[string]any)
		if !ok {
			r.wrongType(labels, "an object")
			return nil, false
		}
		for _, k := range labels.keys() {
			at := node{labels.path + "[" + k + "]", m[k]}
			q := requirement{op: opIn, values: []string{r.str(at)}}
			q.source, q.key = r.labelKey(at, k, style)
			r.labelValue(at, q.values[0])
			all = append(all, q)
		}
	}
	items, _ := r.items(n.child("matchExpressions"), "key", "operator", "values")
	for _, item := range items {
		all = append(all, r.expression(item, style))
	}
	return all, r.err == nil
}

func (r *reader) expression(n node, style keyStyle) requirement {
	var q requirement
	q.source, q.key = r.labelKey(n.child("key"), r.str(n.child("key")), style)
	text := r.str(n.child("operator"))
	op, ok := operators[text]
	if !ok {
		r.fail(n.child("operator"), "invalid label selector: operator: Invalid value: %q: not a valid selector operator", text)
		return q
	}
	q.op = op
	values, _ := r.strings(n.child("values"))
	for i, v := range values {
		r.labelValue(node{path: n.child("values").path + "[" + itoa(i) + "]"}, v)
	}
	switch list := op == opIn || op == opNotIn; {
	case list && len(values) == 0:
		r.fail(n.child("values"), "invalid label selector: values: Required value: must be specified when `operator` is 'In' or 'NotIn'")
	case !list && len(values) > 0:
		r.fail(n.child("values"), "invalid label selector: values: Forbidden: may not be specified when `operator` is 'Exists' or 'DoesNotExist'")
	}
	slices.Sort(values)
	q.values = slices.Compact(values)
	return q
}

// labelKey splits a key into source and key proper, and checks it.
func (r *reader) labelKey(n node, text string, style keyStyle) (source, key string) {
	switch style {
	case plainKeys:
		source, key = reserved.Source, text
	case namespaceKeys:
		source, key = reserved.Source, text
		defer func() { key = reserved.NamespaceLabelsKey + key }()
	default:
		source, key = splitKey(text)
	}
	if source != anySource && !sourceName.MatchString(source) {
		r.fail(n, "invalid label selector: key: Invalid value: %q: the source before the colon is not valid", text)
	}
	name := key
	if i := strings.LastIndexByte(key, '/'); i >= 0 {
		name = key[i+1:]
		if prefix := key[:i]; len(prefix) > 253 || !labelPrefix.MatchString(prefix) {
			r.fail(n, "invalid label selector: key: Invalid value: %q: prefix part must be a lower case DNS subdomain of at most 253 characters", text)
		}
	}
	if !labelName.MatchString(name) {
		r.fail(n, "invalid label selector: key: Invalid value: %q: name part must be 1 to 63 characters of [-A-Za-z0-9_.], and begin and end with a letter or digit", text)
	}
	return source, key
}

// splitKey takes the source off a key: what stands before the first colon. A key that begins with `reserved.` has that source as well.
func splitKey(text string) (source, key string) {
	source, key, ok := strings.Cut(text, ":")
	switch {
	case ok && source == "any":
		return anySource, key
	case ok && source == "":
		return "?", key // no source is valid here; refused by the caller
	case ok:
		return source, key
	}
	if key, ok := strings.CutPrefix(text, reservedSource+"."); ok {
		return reservedSource, key
	}
	return anySource, text
}

func (r *reader) labelValue(n node, value string) {
	if !labelValue.MatchString(value) {
		r.fail(n, "invalid label selector: values: Invalid value: %q: a label value must be at most 63 characters of [-A-Za-z0-9_.], and begin and end with a letter or digit", value)
	}
}

// Requirements that scopes add.

func inNamespace(name string) requirement {
	return requirement{source: reserved.Source, key: reserved.NamespaceKey, op: opIn, values: []string{name}}
}

func inAnyNamespace() requirement {
	return requirement{source: reserved.Source, key: reserved.NamespaceKey, op: opExists}
}

func (r *reader) inLocalCluster() requirement { return inCluster(r.o.cluster()) }

func inCluster(name string) requirement {
	return requirement{source: reserved.Source, key: reserved.ClusterKey, op: opIn, values: []string{name}}
}

func (o Options) cluster() string {
	if o.ClusterName == "" {
		return "default"
	}
	return o.ClusterName
}

func isReserved(q requirement) bool { return q.source == reservedSource }

// isPodKey reports whether a requirement is on a key of pods: without a source, or with theirs.
func isPodKey(q requirement, key string) bool {
	return q.key == key && (q.source == anySource || q.source == reserved.Source)
}

func namesNamespace(q requirement) bool {
	return isPodKey(q, reserved.NamespaceKey) ||
		strings.HasPrefix(q.key, reserved.NamespaceLabelsKey) && (q.source == anySource || q.source == reserved.Source)
}

func namesCluster(q requirement) bool { return isPodKey(q, reserved.ClusterKey) }

// subjectScope forces the namespace of a namespaced policy on its subjects (spec 3.4).
func (r *reader) subjectScope(n node, requirements []requirement) *Selector {
	if r.ref.Namespace == "" {
		return newSelector(requirements)
	}
	// Only a matchLabels entry with exactly this key is overwritten; any other term stays beside.
	const exact = reserved.Source + ":" + reserved.NamespaceKey
	if labels, _ := n.child("matchLabels").v.(map[string]any); labels[exact] != nil {
		if other, _ := labels[exact].(string); other != r.ref.Namespace {
			r.warn(n, "the policy applies in its own namespace %s, not in %s", r.ref.Namespace, other)
		}
		drop := inNamespace(labels[exact].(string)).String()
		i := slices.IndexFunc(requirements, func(q requirement) bool { return q.String() == drop })
		requirements = slices.Delete(slices.Clone(requirements), i, i+1)
	}
	return newSelector(append(requirements, inNamespace(r.ref.Namespace)))
}

// peerScope adds namespace and cluster to a peer selector of a cilium.io policy (spec 3.4).
func (r *reader) peerScope(s *Selector, subjectIsInit bool) *Selector {
	if s.mentions(isReserved) {
		return s
	}
	var add []requirement
	if !s.mentions(namesNamespace) {
		switch {
		case r.ref.Namespace != "":
			add = append(add, inNamespace(r.ref.Namespace))
		case !subjectIsInit:
			add = append(add, inAnyNamespace())
		}
	}
	return r.clusterScope(s.with(add...))
}

// clusterScope limits a peer selector to the local cluster, unless it names clusters.
func (r *reader) clusterScope(s *Selector) *Selector {
	if r.o.AllClusters || s.mentions(namesCluster) || s.mentions(isReserved) {
		return s
	}
	return s.with(r.inLocalCluster())
}
