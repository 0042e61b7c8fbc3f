// SPDX-License-Identifier: Apache-2.0

package reference

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

const (
	namespaceKey        = "io.kubernetes.pod.namespace"
	namespaceLabelsStem = "io.cilium.k8s.namespace.labels."
	clusterKey          = "io.cilium.k8s.policy.cluster"
)

// term of a selector; all of them must hold.
type term struct {
	source, key string // source "" = any
	operator    string
	values      []string
}

// keyOf splits a key as written (spec 3.2).
func keyOf(written string) (source, key string) {
	if s, k, ok := strings.Cut(written, ":"); ok {
		if s == "any" {
			s = ""
		}
		return s, k
	}
	if k, ok := strings.CutPrefix(written, "reserved."); ok {
		return "reserved", k
	}
	return "", written
}

// terms of a label selector as written.
func terms(selector any) []term {
	var out []term
	s := object(selector)
	for k, v := range object(s["matchLabels"]) {
		source, key := keyOf(k)
		out = append(out, term{source, key, "In", []string{text(v)}})
	}
	for _, e := range list(s["matchExpressions"]) {
		m := object(e)
		source, key := keyOf(text(m["key"]))
		out = append(out, term{source, key, text(m["operator"]), texts(m["values"])})
	}
	return out
}

func (t term) holds(labels []label) bool {
	present, among := false, false
	for _, l := range labels {
		if l.key == t.key && (t.source == "" || t.source == l.source) {
			present = true
			among = among || slices.Contains(t.values, l.value)
		}
	}
	switch t.operator {
	case "In":
		return present && among
	case "NotIn":
		return !among
	case "Exists":
		return present
	case "DoesNotExist":
		return !present
	}
	panic("operator " + t.operator)
}

func all(terms []term, labels []label) bool {
	for _, t := range terms {
		if !t.holds(labels) {
			return false
		}
	}
	return true
}

// plain matches a selector of Kubernetes' own APIs: keys have no source there. A nil selector matches nothing; callers know when absent means all.
func plain(selector any, labels map[string]string) bool {
	if selector == nil {
		return false
	}
	s := object(selector)
	for k, v := range object(s["matchLabels"]) {
		if have, ok := labels[k]; !ok || have != text(v) {
			return false
		}
	}
	for _, e := range list(s["matchExpressions"]) {
		m := object(e)
		have, ok := labels[text(m["key"])]
		among := ok && slices.Contains(texts(m["values"]), have)
		holds := map[string]bool{"In": among, "NotIn": !among, "Exists": ok, "DoesNotExist": !ok}[text(m["operator"])]
		if !holds {
			return false
		}
	}
	return true
}

func mentions(ts []term, what func(term) bool) bool { return slices.ContainsFunc(ts, what) }

func isReserved(t term) bool { return t.source == "reserved" }

func isOf(key string) func(term) bool {
	return func(t term) bool { return t.key == key && (t.source == "" || t.source == "k8s") }
}

func isNamespaceLabel(t term) bool {
	return strings.HasPrefix(t.key, namespaceLabelsStem) && (t.source == "" || t.source == "k8s")
}

// The decoded forms of YAML and JSON. Null is the same as absent (spec 5.1).

func object(v any) map[string]any {
	switch m := v.(type) {
	case nil:
		return nil
	case map[string]any:
		return m
	}
	panic(fmt.Sprintf("%v is no object", v))
}

func list(v any) []any {
	switch l := v.(type) {
	case nil:
		return nil
	case []any:
		return l
	}
	panic(fmt.Sprintf("%v is no list", v))
}

func text(v any) string {
	switch t := v.(type) {
	case nil:
		return ""
	case string:
		return t
	case int:
		return strconv.Itoa(t)
	case float64:
		return strconv.FormatFloat(t, 'f', -1, 64)
	}
	panic(fmt.Sprintf("%v is no text", v))
}

func texts(v any) []string {
	var out []string
	for _, e := range list(v) {
		out = append(out, text(e))
	}
	return out
}

func number(v any) int {
	n, err := strconv.Atoi(text(v))
	if err != nil {
		return 0
	}
	return n
}
