// SPDX-License-Identifier: Apache-2.0

// Package flowfilter turns the filter flags of `weir observe` into the allow
// and deny lists of a GetFlows request.
//
// Filters know a source and a destination, people also ask for "either side".
// So each list is built as two filters, left and right: a one-sided flag sets
// both, an either-side flag sets the source in left and the destination in
// right. Several either-side flags therefore describe the same side, and equal
// filters collapse into one.
package flowfilter

import (
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/gen/flow"
)

// Builder collects filter flags in the order in which they were given. The
// zero value is ready; it is not safe for concurrent use.
type Builder struct {
	allow, deny list
	// negate is set by --not, for exactly the next flag.
	negate bool
}

// Allow returns the allow list; nil = everything.
func (b *Builder) Allow() []*flow.FlowFilter { return b.allow.filters() }

// Deny returns the deny list; nil = nothing.
func (b *Builder) Deny() []*flow.FlowFilter { return b.deny.filters() }

// Finish reports a --not that no flag followed.
func (b *Builder) Finish() error {
	if b.negate {
		return errors.New("trailing --not found in the arguments")
	}
	return nil
}

// Set applies one flag. The name is without dashes.
func (b *Builder) Set(name, value string) error {
	if name == "not" {
		if b.negate {
			return errors.New("consecutive --not statements")
		}
		b.negate = true
		return nil
	}
	target := &b.allow
	if b.negate {
		target = &b.deny
		b.negate = false
	}
	return target.set(name, value)
}

// exclusive are the groups of flags of which one list takes only one.
var exclusive = [][]string{
	{"from-fqdn", "from-ip", "ip", "fqdn", "from-namespace", "namespace", "from-all-namespaces", "all-namespaces"},
	{"from-fqdn", "from-ip", "ip", "fqdn", "from-pod", "pod"},
	{"to-fqdn", "to-ip", "ip", "fqdn", "to-namespace", "namespace", "to-all-namespaces", "all-namespaces"},
	{"to-fqdn", "to-ip", "ip", "fqdn", "to-pod", "pod"},
	{"to-pod", "namespace", "all-namespaces"},
	{"from-pod", "namespace", "all-namespaces"},
	{"to-service", "namespace", "all-namespaces"},
	{"from-service", "namespace", "all-namespaces"},
	{"label", "from-label"},
	{"label", "to-label"},
	{"service", "from-service"},
	{"service", "to-service"},
	{"port", "to-port"},
	{"port", "from-port"},
	{"identity", "to-identity"},
	{"identity", "from-identity"},
	{"workload", "to-workload"},
	{"workload", "from-workload"},
	{"encrypted", "unencrypted"},
}

// list is the allow or the deny list while it is being built.
type list struct {
	left, right *flow.FlowFilter
	// Namespaces wait until all names are known, which they are prefixed onto.
	either, source, destination namespaces
	used                        []string
}

func (l *list) set(name, value string) error {
	set, ok := setters[name]
	if !ok {
		return fmt.Errorf("unknown filter --%s", name)
	}
	if !slices.Contains(l.used, name) {
		l.used = append(l.used, name)
	}
	for _, group := range exclusive {
		var found []string
		for _, other := range group {
			if slices.Contains(l.used, other) {
				found = append(found, other)
			}
		}
		if len(found) > 1 {
			return fmt.Errorf("filters --%s and --%s cannot be combined", found[0], found[1])
		}
	}
	if l.left == nil {
		l.left, l.right = &flow.FlowFilter{}, &flow.FlowFilter{}
	}
	if err := set(l, value); err != nil {
		return err
	}
	return l.checkNamespaces()
}

func (l *list) filters() []*flow.FlowFilter {
	if l.left == nil {
		return nil
	}
	left, right := proto.CloneOf(l.left), proto.CloneOf(l.right)
	for _, f := range []*flow.FlowFilter{left, right} {
		l.source.applySource(f)
		l.destination.applyDestination(f)
	}
	l.either.applySource(left)
	l.either.applyDestination(right)
	for _, f := range []*flow.FlowFilter{left, right} {
		matchClusterPatterns(f)
	}
	if proto.Equal(left, right) {
		return []*flow.FlowFilter{left}
	}
	return []*flow.FlowFilter{left, right}
}

// both changes both filters.
func (l *list) both(change func(*flow.FlowFilter)) {
	change(l.left)
	change(l.right)
}
