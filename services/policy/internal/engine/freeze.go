// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"maps"
	"net/netip"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// Frozen is a copy of what an engine knows, for questions. It is never changed, and safe for concurrent use.
type Frozen struct {
	Options  policy.Options
	Objects  map[object.Key]*policy.Object
	Subjects map[SubjectID]FrozenSubject
	Peers    map[string]*policy.Peer
	View     *View
	services map[name]policy.Service
	groups   map[string]*policy.CIDRGroup
	ports    map[string][]policy.NamedPort
}

// FrozenSubject is a subject and what is resolved for it.
type FrozenSubject struct {
	*policy.Subject
	// Resolved is nil where nothing is enforced: ingress, egress.
	Resolved [2]*policy.Resolved
	// Alike is equal for subjects that cannot be told apart.
	Alike string
}

// Freeze copies. View is the one of the last Commit.
func (e *Engine) Freeze() *Frozen {
	f := &Frozen{
		Options: e.options, Objects: map[object.Key]*policy.Object{}, Subjects: map[SubjectID]FrozenSubject{},
		Peers: make(map[string]*policy.Peer, len(e.peers)), View: e.view,
		services: maps.Clone(e.world.services), groups: maps.Clone(e.world.groups), ports: map[string][]policy.NamedPort{},
	}
	for _, scope := range e.objects {
		maps.Copy(f.Objects, scope)
	}
	for key, p := range e.peers {
		f.Peers[key] = p.peer
	}
	for n, ports := range e.world.ports {
		f.ports[n] = sortedKeys(ports, comparePorts)
	}
	for _, c := range e.classes {
		s := FrozenSubject{Subject: c.subject, Alike: c.key}
		for i := range c.sides {
			if r := c.sides[i].resolution; r != nil {
				s.Resolved[i] = r.resolved
			}
		}
		for id := range c.members {
			f.Subjects[id] = s
		}
	}
	return f
}

// Services implements policy.World.
func (f *Frozen) Services(namespace, service string, selector *policy.Selector) []policy.Service {
	return selectServices(f.services, namespace, service, selector)
}

// CIDRGroups implements policy.World.
func (f *Frozen) CIDRGroups(group string, selector *policy.Selector) []netip.Prefix {
	return selectGroups(f.groups, group, selector)
}

// NamedPorts implements policy.World.
func (f *Frozen) NamedPorts(port string) []policy.NamedPort { return f.ports[port] }

// With returns a copy with a policy object more, or in place of an older version.
func (f *Frozen) With(key object.Key, o *policy.Object) *Frozen {
	n := *f
	n.Objects = maps.Clone(f.Objects)
	if o.CIDRGroup != nil {
		n.groups = maps.Clone(f.groups)
		n.groups[key.Name] = o.CIDRGroup
		return &n
	}
	n.Objects[key] = o
	return &n
}

// Resolve compiles a subject's policy of one direction from the objects.
func (f *Frozen) Resolve(s *policy.Subject, d policy.Direction) (*policy.Resolved, error) {
	var rules []*policy.Rule
	namespace := namespaceOf(s.Labels)
	for key, o := range f.Objects {
		if key.Namespace != "" && key.Namespace != namespace {
			continue
		}
		for _, r := range o.Rules {
			if r.Direction == d && r.Selects(s) {
				rules = append(rules, r)
			}
		}
	}
	return policy.Resolve(f.Options, s, d, rules, f)
}
