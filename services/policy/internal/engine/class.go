// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/internal/reserved"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// class is what subjects have in common that are alike.
type class struct {
	key       string
	subject   *policy.Subject
	namespace string
	members   map[SubjectID]struct{}
	asked     map[question]struct{}
	compiled  bool
	// selectedBy are the objects of which a rule selects it.
	selectedBy map[object.Key]bool
	sides      [2]side
}

// side is one direction of a class.
type side struct {
	// resolution is nil if nothing is enforced.
	resolution *resolution
	// conflict is why the rules of now could not be resolved; then resolution is the last good one. concerned are their objects.
	conflict  error
	concerned []object.Key
}

// node is what the engine knows of a node.
type node struct {
	subjects map[string]*class // by key
}

var directions = [2]policy.Direction{policy.Ingress, policy.Egress}

// SetSubject takes a subject in.
func (e *Engine) SetSubject(id SubjectID, s *policy.Subject) {
	key := classKey(s)
	n := e.nodes[id.Node]
	if n == nil {
		n = &node{subjects: map[string]*class{}}
		e.nodes[id.Node] = n
	}
	before := n.subjects[id.Key]
	if before != nil && before.key == key {
		return
	}
	c := e.classes[key]
	if c == nil {
		c = &class{key: key, subject: s, namespace: namespaceOf(s.Labels), members: map[SubjectID]struct{}{}, asked: map[question]struct{}{}}
		e.classes[key] = c
		if e.byNamespace[c.namespace] == nil {
			e.byNamespace[c.namespace] = map[*class]struct{}{}
		}
		e.byNamespace[c.namespace][c] = struct{}{}
		e.dirty[c] = struct{}{}
	}
	c.members[id] = struct{}{}
	e.countSelected(c, 1)
	n.subjects[id.Key] = c
	e.changed.nodes[id.Node] = struct{}{}
	if before != nil {
		e.leave(before, id)
	}
}

// DeleteSubject forgets a subject.
func (e *Engine) DeleteSubject(id SubjectID) {
	n := e.nodes[id.Node]
	if n == nil || n.subjects[id.Key] == nil {
		return
	}
	c := n.subjects[id.Key]
	delete(n.subjects, id.Key)
	if len(n.subjects) == 0 {
		delete(e.nodes, id.Node)
	}
	e.changed.nodes[id.Node] = struct{}{}
	e.leave(c, id)
}

func (e *Engine) leave(c *class, id SubjectID) {
	delete(c.members, id)
	e.countSelected(c, -1)
	if len(c.members) > 0 {
		return
	}
	e.world.forget(c)
	for i := range c.sides {
		e.release(c.sides[i].resolution)
	}
	delete(e.classes, c.key)
	delete(e.dirty, c)
	delete(e.byNamespace[c.namespace], c)
	if len(e.byNamespace[c.namespace]) == 0 {
		delete(e.byNamespace, c.namespace)
	}
}

// countSelected says that subjects of a class came or went.
func (e *Engine) countSelected(c *class, n int) {
	for key := range c.selectedBy {
		if e.selected[key] += n; e.selected[key] == 0 {
			delete(e.selected, key)
		}
	}
}

// Selected returns how many subjects an object selects.
func (e *Engine) Selected(key object.Key) int { return e.selected[key] }

func classKey(s *policy.Subject) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%t\x01%s\x01%s\x01", s.Host, s.Labels.Key(), s.Node.Key())
	for _, p := range s.NamedPorts {
		fmt.Fprintf(&b, "%s=%d/%d,", p.Name, p.Port, p.Proto)
	}
	for _, v := range s.Visibility {
		fmt.Fprintf(&b, "\x01%d/%d/%d/%d", v.Direction, v.Port, v.Proto, v.Kind)
	}
	return b.String()
}

func namespaceOf(labels labelset.Set) string {
	const prefix = reserved.Source + ":" + reserved.NamespaceKey + "="
	for _, l := range labels {
		if ns, ok := strings.CutPrefix(l, prefix); ok {
			return ns
		}
	}
	return ""
}

// SetObject puts a policy object in force; nil = it is gone.
func (e *Engine) SetObject(key object.Key, o *policy.Object) {
	before := e.objects[key.Namespace][key]
	e.mark(key.Namespace, before)
	e.mark(key.Namespace, o)
	if o == nil {
		delete(e.objects[key.Namespace], key)
		if len(e.objects[key.Namespace]) == 0 {
			delete(e.objects, key.Namespace)
		}
		return
	}
	if e.objects[key.Namespace] == nil {
		e.objects[key.Namespace] = map[object.Key]*policy.Object{}
	}
	e.objects[key.Namespace][key] = o
}

// mark has the classes compiled that an object selects.
func (e *Engine) mark(namespace string, o *policy.Object) {
	if o == nil {
		return
	}
	visit := func(c *class) {
		if _, ok := e.dirty[c]; !ok && slices.ContainsFunc(o.Rules, func(r *policy.Rule) bool { return r.Selects(c.subject) }) {
			e.dirty[c] = struct{}{}
		}
	}
	if namespace != "" {
		for c := range e.byNamespace[namespace] {
			visit(c)
		}
		return
	}
	for _, c := range e.classes {
		visit(c)
	}
}

// Compile resolves what changed. Networks, Names and the CIDR peers are right after it.
func (e *Engine) Compile() {
	for c := range e.dirty {
		e.compile(c)
	}
	clear(e.dirty)
}

func (e *Engine) compile(c *class) {
	e.world.forget(c)
	e.countSelected(c, -len(c.members))
	c.selectedBy = map[object.Key]bool{}
	rules := [2][]*policy.Rule{}
	concerned := [2]map[object.Key]bool{{}, {}}
	for _, scope := range scopes(c.namespace) {
		for key, o := range e.objects[scope] {
			for _, r := range o.Rules {
				if r.Selects(c.subject) {
					i := int(r.Direction) - 1
					rules[i] = append(rules[i], r)
					concerned[i][key] = true
					c.selectedBy[key] = true
				}
			}
		}
	}
	e.countSelected(c, len(c.members))
	for i, d := range directions {
		e.counts.Resolved++
		resolved, err := policy.Resolve(e.options, c.subject, d, rules[i], asker{e.world, c})
		s := &c.sides[i]
		s.conflict, s.concerned = err, nil
		if err != nil {
			s.concerned = slices.SortedFunc(maps.Keys(concerned[i]), compareObjects)
			if c.compiled {
				continue // the last good one stays
			}
			resolved = e.closed(c.subject, d)
		}
		next := e.acquire(resolved, c.namespace)
		if next == s.resolution {
			e.release(next)
			continue
		}
		e.release(s.resolution)
		s.resolution = next
		for id := range c.members {
			e.changed.nodes[id.Node] = struct{}{}
		}
	}
	c.compiled = true
}

// closed is the policy of a subject whose rules were never resolved: nothing is let in or out but what needs no rule.
func (e *Engine) closed(s *policy.Subject, d policy.Direction) *policy.Resolved {
	o := e.options
	o.Enforcement = policy.ModeAlways
	resolved, err := policy.Resolve(o, s, d, nil, nil)
	if err != nil {
		panic(fmt.Sprintf("no rules are in conflict: %v", err))
	}
	return resolved
}

func scopes(namespace string) []string {
	if namespace == "" {
		return []string{""}
	}
	return []string{"", namespace}
}

// Conflict is an endpoint whose rules contradict each other.
type Conflict struct {
	Subject SubjectID
	Text    string
}

// Conflicts returns the endpoints whose newest rules could not be resolved, by object.
func (e *Engine) Conflicts() map[object.Key][]Conflict {
	var all map[object.Key][]Conflict
	for _, c := range e.classes {
		for i := range c.sides {
			if c.sides[i].conflict == nil {
				continue
			}
			if all == nil {
				all = map[object.Key][]Conflict{}
			}
			for _, key := range c.sides[i].concerned {
				for id := range c.members {
					all[key] = append(all[key], Conflict{id, c.sides[i].conflict.Error()})
				}
			}
		}
	}
	return all
}
