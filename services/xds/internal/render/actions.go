// SPDX-License-Identifier: Apache-2.0

package render

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// MaxActionRoutes is how many routes the header actions of one filter may make: there is one for every combination of those that may be due at once.
const MaxActionRoutes = 128

// action is something to do when an item matches and a header is not as it requires.
type action struct {
	label   string
	when    []*routev3.HeaderMatcher
	add     *corev3.HeaderValueOption
	remove  string
	message string // of what it is made, to tell equal ones
}

// variants are the routes of a filter. Envoy changes headers by route alone, so each combination of due actions is a route of its own, the largest
// first: of the routes that match, the first one has all that is due.
func variants(items []*policyv1.HTTPRule) ([]*routev3.Route, error) {
	actions, err := actionsOf(items)
	if err != nil {
		return nil, err
	}
	sets, err := combinations(actions)
	if err != nil {
		return nil, err
	}
	routes := make([]*routev3.Route, 0, len(sets))
	for _, set := range sets {
		routes = append(routes, variant(set))
	}
	return routes, nil
}

// combinations are the sets of actions that one request may have due, the largest first.
func combinations(actions []action) ([][]action, error) {
	sets := [][]action{nil}
	for _, a := range actions {
		for _, set := range sets {
			if slices.ContainsFunc(set, func(b action) bool { return disjoint(a.when, b.when) }) {
				continue
			}
			if len(sets) == MaxActionRoutes {
				return nil, fmt.Errorf("%d headerMatches with an action meet on this port, in more combinations than the %d that can be: each is a route",
					len(actions), MaxActionRoutes)
			}
			sets = append(sets, append(slices.Clip(set), a))
		}
	}
	slices.SortStableFunc(sets, func(a, b []action) int { return len(b) - len(a) })
	return sets, nil
}

// disjoint reports whether no request can match both: two expressions for one part of it begin with texts that differ. (It may miss some.)
func disjoint(a, b []*routev3.HeaderMatcher) bool {
	for _, m := range a {
		for _, n := range b {
			if strings.HasPrefix(m.GetName(), ":") && m.GetName() == n.GetName() &&
				apart(m.GetStringMatch().GetSafeRegex().GetRegex(), n.GetStringMatch().GetSafeRegex().GetRegex()) {
				return true
			}
		}
	}
	return false
}

// apart reports whether no text matches both expressions as a whole.
func apart(a, b string) bool {
	x, err := regexp.Compile(a)
	if err != nil {
		return false
	}
	y, err := regexp.Compile(b)
	if err != nil {
		return false
	}
	begin, whole := x.LiteralPrefix()
	other, otherWhole := y.LiteralPrefix()
	return !strings.HasPrefix(begin, other) && !strings.HasPrefix(other, begin) || whole && otherWhole && begin != other
}

func variant(actions []action) *routev3.Route {
	r := passRoute()
	var labels []string
	for _, a := range actions {
		labels = append(labels, a.label)
		r.Match.Headers = append(r.Match.Headers, a.when...)
		if a.add != nil {
			r.RequestHeadersToAdd = append(r.RequestHeadersToAdd, a.add)
		}
		if a.remove != "" {
			r.RequestHeadersToRemove = append(r.RequestHeadersToRemove, a.remove)
		}
	}
	if len(labels) > 0 {
		r.Name = "mismatch:" + strings.Join(labels, ";")
	}
	return r
}

// actionsOf collects the items' actions, each once.
func actionsOf(items []*policyv1.HTTPRule) ([]action, error) {
	var all []action
	for i, item := range items {
		for _, h := range item.GetHeaders() {
			if h.GetMismatch() == policyv1.Mismatch_MISMATCH_UNSPECIFIED {
				continue
			}
			a, err := actionOf(item, i, h)
			if err != nil {
				return nil, err
			}
			if !slices.ContainsFunc(all, func(b action) bool { return a.message == b.message }) {
				all = append(all, a)
			}
		}
	}
	return all, nil
}

func actionOf(item *policyv1.HTTPRule, i int, h *policyv1.HeaderRule) (action, error) {
	name, kind := strings.ToLower(h.GetName()), strings.TrimPrefix(h.GetMismatch().String(), "MISMATCH_")
	a := action{when: conditions(item), label: fmt.Sprintf("%s:%s:%s", RuleName(item.GetRule(), i), kind, name)}
	changes := h.GetMismatch() != policyv1.Mismatch_MISMATCH_LOG && h.Value != nil
	if changes && (strings.HasPrefix(name, ":") || name == "host") {
		return a, fmt.Errorf("headerMatches: %s of the header %q is not possible", kind, h.GetName())
	}
	value := &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: h.GetName(), Value: strings.ReplaceAll(h.GetValue(), "%", "%%")}}
	switch h.GetMismatch() {
	case policyv1.Mismatch_MISMATCH_LOG:
	case policyv1.Mismatch_MISMATCH_ADD:
		value.AppendAction = corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD
		a.add = value
	case policyv1.Mismatch_MISMATCH_REPLACE:
		value.AppendAction = corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD
		a.add = value
	case policyv1.Mismatch_MISMATCH_DELETE:
		a.remove = h.GetName()
	default:
		return a, errors.New("headerMatches: unknown action " + kind)
	}
	if h.Value == nil {
		a.add, a.remove = nil, "" // a header that may have any value: there is nothing to set, and nothing wrong to remove
	}
	mismatch := headerMatcher(h)
	mismatch.InvertMatch = true
	if h.Value != nil {
		mismatch.TreatMissingHeaderAsEmpty = true // else a missing header would match neither way
	}
	a.when = append(a.when, mismatch)
	a.message = fmt.Sprint(kind, name, h.GetValue(), matcherText(a.when))
	return a, nil
}

// matcherText tells matchers apart.
func matcherText(matchers []*routev3.HeaderMatcher) string {
	var b strings.Builder
	for _, m := range matchers {
		fmt.Fprintf(&b, "|%s|%t|%t|%q|%q", m.GetName(), m.GetInvertMatch(), m.GetPresentMatch(),
			m.GetStringMatch().GetExact(), m.GetStringMatch().GetSafeRegex().GetRegex())
	}
	return b.String()
}
