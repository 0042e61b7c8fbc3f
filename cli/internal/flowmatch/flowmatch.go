// SPDX-License-Identifier: Apache-2.0

// Package flowmatch decides whether flows pass the filters of a GetFlows
// request, by the rules of Hubble's server. The command line needs it to read
// flows from a file, and to refuse a bad filter value before it calls a server.
package flowmatch

import (
	"fmt"
	"slices"

	"github.com/weirmesh/weir/gen/flow"
)

// Matcher is a compiled pair of allow and deny lists. It is safe for concurrent use.
type Matcher struct {
	allow, deny []all
}

// Compile checks and compiles the lists.
func Compile(allow, deny []*flow.FlowFilter) (*Matcher, error) {
	var m Matcher
	var err error
	if m.allow, err = compileList(allow); err != nil {
		return nil, err
	}
	if m.deny, err = compileList(deny); err != nil {
		return nil, err
	}
	return &m, nil
}

// Match reports whether the allow list, unless empty, has a filter that f
// passes, and the deny list none.
func (m *Matcher) Match(f *flow.Flow) bool {
	passes := func(a all) bool { return a.match(f) }
	if len(m.allow) > 0 && !slices.ContainsFunc(m.allow, passes) {
		return false
	}
	return !slices.ContainsFunc(m.deny, passes)
}

// All reports that there are no filters at all.
func (m *Matcher) All() bool { return len(m.allow) == 0 && len(m.deny) == 0 }

// predicate is one condition on a flow.
type predicate func(*flow.Flow) bool

// all is one FlowFilter: the conditions of its fields. Without any it matches everything.
type all []predicate

func (a all) match(f *flow.Flow) bool {
	for _, p := range a {
		if !p(f) {
			return false
		}
	}
	return true
}

func compileList(filters []*flow.FlowFilter) ([]all, error) {
	out := make([]all, 0, len(filters))
	for _, f := range filters {
		a, err := compile(f)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

// compiler makes the condition of one field, or of one pair of them; nil = the field is not set.
type compiler func(*flow.FlowFilter) (predicate, error)

var compilers = []compiler{
	uuids, ips, pods, services, fqdns, labels, nodeLabels, workloads, clusters, identities, portNumbers,
	directions, verdicts, dropReasons, interfaces, eventTypes, httpFields, dnsQueries, protocols, replies,
	tcpFlags, nodeNames, ipVersions, traceIDs, encryptions, celExpressions,
}

func compile(f *flow.FlowFilter) (all, error) {
	var a all
	for _, c := range compilers {
		p, err := c(f)
		if err != nil {
			return nil, err
		}
		if p != nil {
			a = append(a, p)
		}
	}
	return a, nil
}

// join makes one condition of several; nil ones are left out.
func join(predicates ...predicate) predicate {
	var a all
	for _, p := range predicates {
		if p != nil {
			a = append(a, p)
		}
	}
	switch len(a) {
	case 0:
		return nil
	case 1:
		return a[0]
	}
	return a.match
}

// oneOf is membership of a flow's value in a list; an empty list is no condition.
func oneOf[T comparable](list []T, get func(*flow.Flow) T) predicate {
	if len(list) == 0 {
		return nil
	}
	return func(f *flow.Flow) bool { return slices.Contains(list, get(f)) }
}

// anyOf compiles each value of a list; a flow passes when one of them takes it.
func anyOf[T any](values []T, compileOne func(T) (predicate, error)) (predicate, error) {
	if len(values) == 0 {
		return nil, nil
	}
	var list []predicate
	for _, v := range values {
		p, err := compileOne(v)
		if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
	return func(f *flow.Flow) bool {
		return slices.ContainsFunc(list, func(p predicate) bool { return p(f) })
	}, nil
}

// sides compiles the source's and the destination's field of one kind.
func sides(source, destination []string, compileSide func(values []string, s side) (predicate, error)) (predicate, error) {
	p, err := compileSide(source, sourceSide)
	if err != nil {
		return nil, err
	}
	q, err := compileSide(destination, destinationSide)
	if err != nil {
		return nil, err
	}
	return join(p, q), nil
}

// side reads one end of a flow.
type side struct {
	name     string
	endpoint func(*flow.Flow) *flow.Endpoint
	service  func(*flow.Flow) *flow.Service
	ip       func(*flow.Flow) string
	names    func(*flow.Flow) []string
	port     func(l4ports) uint32
}

var (
	sourceSide = side{
		name: "source", endpoint: (*flow.Flow).GetSource, service: (*flow.Flow).GetSourceService,
		ip: func(f *flow.Flow) string { return f.GetIP().GetSource() }, names: (*flow.Flow).GetSourceNames, port: l4ports.GetSourcePort,
	}
	destinationSide = side{
		name: "destination", endpoint: (*flow.Flow).GetDestination, service: (*flow.Flow).GetDestinationService,
		ip: func(f *flow.Flow) string { return f.GetIP().GetDestination() }, names: (*flow.Flow).GetDestinationNames, port: l4ports.GetDestinationPort,
	}
)

// l4ports is a layer 4 protocol that has ports.
type l4ports interface {
	GetSourcePort() uint32
	GetDestinationPort() uint32
}

func layer4Ports(f *flow.Flow) l4ports {
	switch l := f.GetL4().GetProtocol().(type) {
	case *flow.Layer4_TCP:
		return l.TCP
	case *flow.Layer4_UDP:
		return l.UDP
	case *flow.Layer4_SCTP:
		return l.SCTP
	}
	return nil
}

func invalid(what, value, why string) error {
	return fmt.Errorf("invalid %s filter: %s %q", what, why, value)
}
