// SPDX-License-Identifier: Apache-2.0

package state

import (
	"maps"
	"slices"
	"strings"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// Warning is what is wrong with an object that is taken in all the same.
type Warning struct {
	Object object.Key
	Text   string
}

// TakeWarnings returns the warnings that are new since the last call.
func (s *State) TakeWarnings() []Warning {
	fresh := s.warnings
	s.warnings = nil
	return fresh
}

// Warnings returns what is wrong with objects, by their names.
func (s *State) Warnings() []Warning {
	var all []Warning
	for _, key := range slices.Sorted(maps.Keys(s.visibility)) {
		all = append(all, s.visibility[key])
	}
	return all
}

// visible reads an annotation. One that is not in order has no effect, and is told.
func (s *State) visible(owner object.Key, v object.Visibility) []policy.Visibility {
	name := owner.String()
	if strings.TrimSpace(v.Text) == "" {
		delete(s.visibility, name)
		return nil
	}
	parsed, err := policy.ParseVisibility(v.Text)
	if err == nil {
		delete(s.visibility, name)
		return parsed
	}
	warning := Warning{owner, "metadata.annotations[" + v.Annotation + "] has no effect: " + err.Error()}
	if s.visibility[name] != warning {
		s.visibility[name] = warning
		s.warnings = append(s.warnings, warning)
	}
	return nil
}

// visibilityOf returns what is to be seen of a pod's traffic: as it says itself or, without an annotation of its own, as its namespace says.
func (s *State) visibilityOf(p *object.Pod) []policy.Visibility {
	if own := s.visible(p.Key(), p.Visibility); p.Visibility.Annotation != "" {
		return own
	}
	return s.seenIn[p.Namespace]
}

// upsertNamespace takes a namespace in; its pods may be seen otherwise.
func (s *State) upsertNamespace(n *object.Namespace) {
	s.namespaces[n.Name] = n
	s.see(n.Name, s.visible(n.Key(), n.Visibility))
	s.touch(KindNamespace)
}

func (s *State) dropNamespace(name string) {
	delete(s.namespaces, name)
	delete(s.visibility, object.Key{Kind: object.KindNamespace, Name: name}.String())
	s.see(name, nil)
}

func (s *State) see(namespace string, v []policy.Visibility) {
	if slices.Equal(s.seenIn[namespace], v) {
		return
	}
	if s.seenIn[namespace] = v; len(v) == 0 {
		delete(s.seenIn, namespace)
	}
	for _, p := range s.pods {
		if p.object.Namespace == namespace {
			s.staleEndpoint(p.object.UID)
		}
	}
}
