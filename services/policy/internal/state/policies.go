// SPDX-License-Identifier: Apache-2.0

package state

import (
	"cmp"
	"errors"
	"maps"
	"slices"
	"strings"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/label"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// policyObject is a policy object in all its versions that matter.
type policyObject struct {
	object *object.Policy // the newest
	fault  error          // why it is not valid
	valid  *policy.Object // the newest valid one
	force  *policy.Object // the one in force; held back, valid is newer
	// changed: force was put in force since the last Commit. since is the first revision with it.
	changed bool
	since   uint64
}

// upsertPolicy takes a policy object in. One that is not valid has no effect: the valid one before it stays in force.
func (s *State) upsertPolicy(o *object.Policy) {
	p := s.policies[o.Key()]
	if p != nil && p.object.UID != o.UID {
		s.deletePolicy(o.Key()) // another object of the same name
		p = nil
	}
	if p == nil {
		p = &policyObject{}
		s.policies[o.Key()] = p
	} else if p.object.Spec == o.Spec && p.object.Generation == o.Generation {
		p.object = o // its status, most likely
		return
	}
	s.countNodePolicies(p.object, -1)
	p.object = o
	s.countNodePolicies(o, 1)
	parsed, err := policy.Parse(o.Raw, s.options)
	p.fault = err
	if err != nil {
		return
	}
	p.valid = parsed
	s.keepPolicy(o.Key(), parsed)
}

func (s *State) deletePolicy(key object.Key) {
	p := s.policies[key]
	if p == nil {
		return
	}
	delete(s.policies, key)
	s.countNodePolicies(p.object, -1)
	s.enforce(key, nil)
	s.keepPolicy(key, nil)
}

// countNodePolicies notes whether policies ask for labels of nodes beside those that the flag for it allows: then pods on different nodes may have
// different policies.
func (s *State) countNodePolicies(o *object.Policy, n int) {
	if o == nil || o.Kind != object.KindClusterNetworkPolicy && o.Kind != object.KindAdminNetworkPolicy && o.Kind != object.KindBaselineAdminNetworkPolicy ||
		!strings.Contains(o.Spec, `"nodes"`) {
		return
	}
	before := s.nodePolicies
	if s.nodePolicies += n; (before == 0) != (s.nodePolicies == 0) {
		s.variants.changed = true // look at all pods and nodes
	}
}

// enforce puts a version in force; nil = none.
func (s *State) enforce(key object.Key, o *policy.Object) {
	if key.Kind == object.KindCiliumCIDRGroup {
		var group *policy.CIDRGroup
		if o != nil {
			group = o.CIDRGroup
		}
		s.engine.SetGroup(key.Name, group)
		return
	}
	s.engine.SetObject(key, o)
}

// putInForce puts in force what is valid and not held back: a policy waits until each pod with a label that its selectors name, and that the
// identity filter dropped before, has its new number.
func (s *State) putInForce() {
	for key, p := range s.policies {
		if p.valid == p.force || s.heldBack(key) {
			continue
		}
		p.force, p.changed = p.valid, true
		s.enforce(key, p.valid)
	}
}

// heldBack reports whether pods still lack the number that a policy's selectors need.
func (s *State) heldBack(key object.Key) bool {
	keys := s.kept.of(key)
	if len(keys) == 0 {
		return false
	}
	for _, p := range s.pods {
		if p.wanted == p.inUse || p.inUse == nil {
			continue
		}
		if slices.ContainsFunc(keys, func(k string) bool { _, ok := p.object.Labels[k]; return ok }) {
			return true
		}
	}
	return false
}

// keeper counts the label keys that are part of identities because a policy names them.
type keeper struct {
	byPolicy  map[object.Key][]string
	byService map[object.Key][]string
	uses      map[object.Key]bool // policies with toServices
	counts    map[string]int
	// resting keys are named no longer, by how many more calls of Rest they stay.
	resting map[string]int
}

// rests is how many calls of Rest something stays that is not needed any more.
const rests = 2

func newKeeper() keeper {
	return keeper{
		byPolicy: map[object.Key][]string{}, byService: map[object.Key][]string{}, uses: map[object.Key]bool{}, counts: map[string]int{},
		resting: map[string]int{},
	}
}

func (k *keeper) has(key string) bool {
	_, rests := k.resting[key]
	return rests || k.counts[key] > 0
}

// of returns the dropped keys that a policy needs.
func (k *keeper) of(key object.Key) []string {
	keys := k.byPolicy[key]
	if k.uses[key] {
		for _, more := range k.byService {
			keys = append(slices.Clone(keys), more...)
		}
	}
	return keys
}

// count adds to the count of keys and returns those that are kept from now on.
func (k *keeper) count(keys []string, n int) []string {
	var fresh []string
	for _, key := range keys {
		known := k.has(key)
		k.counts[key] += n
		switch {
		case k.counts[key] > 0:
			delete(k.resting, key)
			if !known {
				fresh = append(fresh, key)
			}
		case n < 0:
			delete(k.counts, key)
			k.resting[key] = rests
		}
	}
	return fresh
}

func dropped(keys []string) []string {
	return slices.DeleteFunc(slices.Clone(keys), func(k string) bool { return label.Relevant(k) || label.Added(k) })
}

// keepPolicy says which keys a policy names; nil = it is gone.
func (s *State) keepPolicy(key object.Key, o *policy.Object) {
	k := &s.kept
	var keys []string
	uses := false
	if o != nil {
		keys, uses = dropped(o.LabelKeys()), o.UsesServices()
	}
	before := k.byPolicy[key]
	usedBefore := len(k.uses) > 0
	delete(k.byPolicy, key)
	delete(k.uses, key)
	if len(keys) > 0 {
		k.byPolicy[key] = keys
	}
	if uses {
		k.uses[key] = true
	}
	fresh := k.count(keys, 1)
	k.count(before, -1)
	if used := len(k.uses) > 0; used != usedBefore {
		n := 1
		if usedBefore {
			n = -1
		}
		for _, more := range k.byService {
			fresh = append(fresh, k.count(more, n)...)
		}
	}
	s.relabelKeys(fresh)
}

// keepService says which keys a service's selector names.
func (s *State) keepService(key object.Key, selector map[string]string) {
	k := &s.kept
	keys := dropped(slices.Sorted(maps.Keys(selector)))
	before := k.byService[key]
	delete(k.byService, key)
	if len(keys) > 0 {
		k.byService[key] = keys
	}
	if len(k.uses) == 0 {
		return
	}
	fresh := k.count(keys, 1)
	k.count(before, -1)
	s.relabelKeys(fresh)
}

// relabelKeys computes the identities of pods with any of these labels.
func (s *State) relabelKeys(keys []string) {
	if len(keys) == 0 {
		return
	}
	for _, p := range s.pods {
		if slices.ContainsFunc(keys, func(k string) bool { _, ok := p.object.Labels[k]; return ok }) {
			s.identify(p)
		}
	}
}

// Rest forgets what has not been needed for two calls. It must be called no more often than agents may lag: what a policy needed must outlive the policy on
// every node, or packets that old and new policy allow would be dropped between them.
func (s *State) Rest() {
	var gone []string
	for key, n := range s.kept.resting {
		if n--; n > 0 {
			s.kept.resting[key] = n
			continue
		}
		delete(s.kept.resting, key)
		gone = append(gone, key)
	}
	s.relabelKeys(gone)
	s.variants.rest()
	s.engine.Rest()
}

// PolicyStatus is what is known of a policy object, or of an Envoy configuration.
type PolicyStatus struct {
	Object *object.Policy
	// Fault is why the newest version is not valid; nil = it is.
	Fault error
	// Field is what is not enforced yet, if that is the fault.
	NotYet string
	// Waiting: the newest version is valid and held back until identities have their numbers.
	Waiting bool
	// Generation in force from revision Since on; Since 0 = none is.
	Generation int64
	Since      uint64
	// InForce: some generation is.
	InForce bool
	// Selected is how many endpoints it selects.
	Selected  int
	Conflicts []engine.Conflict
	Warnings  []string
	// Of an Envoy configuration: what it routes ("namespace/name:port", and the keys of the filters), and what keeps a part of it from having effect.
	Routes, RouteKeys, Problems []string
}

// PolicyStatuses returns what is known of all policy objects and Envoy configurations, sorted by namespace, kind and name.
func (s *State) PolicyStatuses() []PolicyStatus {
	conflicts := s.engine.Conflicts()
	all := make([]PolicyStatus, 0, len(s.policies))
	for key, p := range s.policies {
		st := PolicyStatus{
			Object: p.object, Fault: p.fault, Waiting: p.valid != p.force, Since: p.since, InForce: p.force != nil,
			Selected: s.engine.Selected(key), Conflicts: conflicts[key],
		}
		if p.force != nil {
			st.Generation = p.force.Generation
			st.Warnings = p.force.Warnings
		}
		var fault *policy.Error
		if errors.As(p.fault, &fault) && fault.NotYet {
			st.NotYet = fault.Field
		}
		slices.SortFunc(st.Conflicts, func(a, b engine.Conflict) int {
			return cmp.Or(strings.Compare(a.Subject.Node, b.Subject.Node), strings.Compare(a.Subject.Key, b.Subject.Key), strings.Compare(a.Text, b.Text))
		})
		all = append(all, st)
	}
	all = append(all, s.configStatuses()...)
	slices.SortFunc(all, func(a, b PolicyStatus) int {
		x, y := a.Object, b.Object
		return cmp.Or(cmp.Compare(x.Namespace, y.Namespace), cmp.Compare(x.Kind, y.Kind), cmp.Compare(x.Name, y.Name))
	})
	return all
}

// Policies counts policy objects and Envoy configurations: all, and those whose newest version is not valid.
func (s *State) Policies() (all, invalid int) {
	for _, p := range s.policies {
		if p.fault != nil {
			invalid++
		}
	}
	for _, c := range s.configs {
		if c.fault != nil {
			invalid++
		}
	}
	return len(s.policies) + len(s.configs), invalid
}

// Freeze returns a copy of what policies depend on, for questions.
func (s *State) Freeze() *engine.Frozen { return s.engine.Freeze() }

// Counters returns what the compiler did so far.
func (s *State) Counters() engine.Counters { return s.engine.Counters() }
