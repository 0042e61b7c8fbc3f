// SPDX-License-Identifier: Apache-2.0

// Package filter decides which flows a request wants, with the rules and the error texts of Hubble's
// API: a flow matches when any filter of the whitelist does (or there is none) and none of the
// blacklist; a filter matches when all of its fields do; a field matches when any of its values does.
//
// A request is compiled once, into closures over a decoded flow. What a batch's header alone can
// rule out is ruled out there (MayMatch), and Fields says how little of a flow must be decoded.
package filter

import (
	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/mask"
)

// Match decides on one flow.
type Match func(*flow.Flow) bool

// Error says which field of a request is invalid. Its text is Hubble's.
type Error struct {
	// Field is the field of flow.FlowFilter.
	Field string
	Err   error
}

// Error returns Hubble's text.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Filter is a compiled request. It is safe for concurrent use. The zero value wants everything.
type Filter struct {
	white, black []single
	fields       *mask.Mask
}

// single is one compiled FlowFilter.
type single struct {
	matches []Match
	header  header
}

// Compile checks and compiles both lists.
func Compile(whitelist, blacklist []*flow.FlowFilter) (*Filter, error) {
	f := &Filter{}
	var paths []string
	whole := false
	compile := func(list []*flow.FlowFilter) ([]single, error) {
		var out []single
		for _, one := range list {
			s, need, err := compileOne(one)
			if err != nil {
				return nil, err
			}
			for _, path := range need {
				if path == everything {
					whole = true
				} else {
					paths = append(paths, path)
				}
			}
			out = append(out, s)
		}
		return out, nil
	}
	var err error
	if f.white, err = compile(whitelist); err != nil {
		return nil, err
	}
	if f.black, err = compile(blacklist); err != nil {
		return nil, err
	}
	// An empty filter matches everything: on the whitelist it is as if there were none.
	if !whole && len(paths) > 0 {
		f.fields = mask.Paths(paths...)
	}
	return f, nil
}

func compileOne(f *flow.FlowFilter) (single, []string, error) {
	var s single
	var paths []string
	for _, field := range fields() {
		match, err := field.compile(f)
		if err != nil {
			return s, nil, &Error{Field: field.name, Err: err}
		}
		if match != nil {
			s.matches = append(s.matches, match)
			paths = append(paths, field.paths...)
		}
	}
	var err error
	if s.header, err = compileHeader(f); err != nil {
		return s, nil, err
	}
	return s, paths, nil
}

// Everything reports whether every flow matches.
func (f *Filter) Everything() bool {
	if len(f.black) > 0 {
		return false
	}
	if len(f.white) == 0 {
		return true
	}
	for _, s := range f.white {
		if len(s.matches) == 0 {
			return true
		}
	}
	return false
}

// Match decides on a flow, of which at least Fields is decoded.
func (f *Filter) Match(fl *flow.Flow) bool {
	return (len(f.white) == 0 || anyOf(f.white, fl)) && !anyOf(f.black, fl)
}

func anyOf(list []single, fl *flow.Flow) bool {
	for i := range list {
		if list[i].match(fl) {
			return true
		}
	}
	return false
}

func (s *single) match(fl *flow.Flow) bool {
	for _, m := range s.matches {
		if !m(fl) {
			return false
		}
	}
	return true
}

// MayMatch reports whether a batch can hold a flow that matches. It never says no to one that does.
func (f *Filter) MayMatch(h *batch.Header) bool {
	if len(f.white) == 0 {
		return true
	}
	for i := range f.white {
		if f.white[i].header.mayMatch(h) {
			return true
		}
	}
	return false
}

// MayConcern reports whether a flow of a node could match: readers are told of gaps of such nodes.
func (f *Filter) MayConcern(nodeName string) bool {
	if len(f.white) == 0 {
		return true
	}
	for i := range f.white {
		if f.white[i].header.node == nil || f.white[i].header.node.MatchString(nodeName) {
			return true
		}
	}
	return false
}

// Fields returns the fields of a flow that Match reads; nil = all of them.
func (f *Filter) Fields() *mask.Mask { return f.fields }

// header is what a filter wants of a batch's header. Zero values want nothing.
type header struct {
	verdicts   uint32
	eventTypes uint32
	namespaces [][]string // one of each list
	node       interface{ MatchString(string) bool }
}

func compileHeader(f *flow.FlowFilter) (header, error) {
	var h header
	for _, v := range f.GetVerdict() {
		if v < 0 || v > 31 {
			h.verdicts = 0
			break
		}
		h.verdicts |= 1 << v
	}
	for _, t := range f.GetEventType() {
		bit, ok := eventTypeBit(t.GetType())
		if !ok {
			h.eventTypes = 0
			break
		}
		h.eventTypes |= 1 << bit
	}
	for _, pods := range [][]string{f.GetSourcePod(), f.GetDestinationPod()} {
		if list, ok := podNamespaces(pods); ok {
			h.namespaces = append(h.namespaces, list)
		}
	}
	if len(f.GetNodeName()) > 0 {
		node, err := compileNodeNames(f.GetNodeName())
		if err != nil {
			return h, &Error{Field: "node_name", Err: err}
		}
		h.node = node
	}
	return h, nil
}

// eventTypeBit returns the bit of BatchHeader.event_types; false = the header does not tell.
func eventTypeBit(t int32) (uint, bool) {
	switch {
	case t > 0 && t < 31:
		return uint(t), true
	case t == 129: // L7
		return 31, true
	}
	return 0, false
}

// podNamespaces returns the namespaces that a list of pod patterns is limited to; false = it is not.
func podNamespaces(patterns []string) ([]string, bool) {
	var list []string
	for _, p := range patterns {
		namespace, _ := splitName(p)
		if namespace == "" {
			return nil, false
		}
		list = append(list, namespace)
	}
	return list, len(list) > 0
}

func (w *header) mayMatch(h *batch.Header) bool {
	if w.verdicts != 0 && w.verdicts&h.Verdicts == 0 {
		return false
	}
	if w.eventTypes != 0 && w.eventTypes&h.EventTypes == 0 {
		return false
	}
	if w.node != nil && !w.node.MatchString(event.NodeName(h.Cluster, h.Node)) {
		return false
	}
	for _, list := range w.namespaces {
		found := false
		for _, namespace := range list {
			for _, has := range h.Namespaces {
				found = found || has == namespace
			}
		}
		if !found {
			return false
		}
	}
	return true
}
