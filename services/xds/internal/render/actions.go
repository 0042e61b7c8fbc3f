// SPDX-License-Identifier: Apache-2.0

package render

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// MaxActions is how many different header actions one filter may have: routes are made for every combination of those that may be due.
const MaxActions = 6

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
	sets := make([]int, 1<<len(actions))
	for i := range sets {
		sets[i] = i
	}
	slices.SortStableFunc(sets, func(a, b int) int { return bits.OnesCount(uint(b)) - bits.OnesCount(uint(a)) })
	routes := make([]*routev3.Route, 0, len(sets))
	for _, set := range sets {
		routes = append(routes, variant(actions, set))
	}
	return routes, nil
}

func variant(actions []action, set int) *routev3.Route {
	r := passRoute()
	var labels []string
	for i, a := range actions {
		if set&(1<<i) == 0 {
			continue
		}
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
	if len(all) > MaxActions {
		return nil, fmt.Errorf("%d headerMatches with an action meet on this port; at most %d can: each combination of them is a route", len(all), MaxActions)
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
