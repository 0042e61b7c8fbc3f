// SPDX-License-Identifier: Apache-2.0

// Package progress says where policies are in force: for each object, which nodes hold its generation and which are behind, and why. It computes that;
// Writer tells it to the source.
package progress

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/hub"
	"github.com/weirmesh/weir/services/policy/internal/object"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// Lag is a node that is behind.
type Lag struct{ Node, Reason string }

// Object is a policy object and where it is in force.
type Object struct {
	state.PolicyStatus
	// Enforced is the generation in force on Enforcing nodes of Nodes; 0 = none.
	Enforced         int64
	Enforcing, Nodes int
	// Lagging are the nodes that do not enforce the newest valid generation.
	Lagging []Lag
	// Conflict texts: "namespace/pod: ...".
	Conflicts []string
}

// Of asks a hub, and says how things stand.
func Of(ctx context.Context, h *hub.Hub) ([]Object, error) {
	var statuses []state.PolicyStatus
	if err := h.Read(ctx, func(st *state.State) { statuses = st.PolicyStatuses() }); err != nil {
		return nil, err
	}
	st := h.Status()
	st.Proxies = h.Proxies()
	return Compute(statuses, st), nil
}

// Compute says how things stand.
func Compute(statuses []state.PolicyStatus, st hub.Status) []Object {
	nodes := nodesOf(st)
	refused := refusedObjects(st, statuses)
	held := make([]uint64, 0, len(nodes)) // rising
	for _, n := range nodes {
		if n.agent != nil && n.agent.Synced {
			held = append(held, n.agent.Held)
		}
	}
	slices.Sort(held)
	all := make([]Object, len(statuses))
	for i, s := range statuses {
		o := Object{PolicyStatus: s, Nodes: len(nodes)}
		troubles := refused[s.Object.Key()]
		if s.Since != 0 {
			o.Enforcing = len(held) - sort.Search(len(held), func(i int) bool { return held[i] >= s.Since })
		}
		if !s.InForce && s.Fault != nil {
			all[i] = o // nothing to wait for
			continue
		}
		if o.Enforcing < len(nodes) || len(troubles) > 0 || s.Waiting {
			o.Lagging, o.Enforcing = lagging(nodes, s, troubles)
		}
		if o.Enforcing > 0 {
			o.Enforced = s.Generation
		}
		o.Conflicts = append(o.Conflicts, s.Problems...)
		for _, c := range s.Conflicts {
			o.Conflicts = append(o.Conflicts, subjectName(st.Snapshot, c.Subject)+": "+c.Text)
		}
		all[i] = o
	}
	return all
}

type node struct {
	name  string
	agent *hub.Agent // nil = not connected
}

// nodesOf returns the cluster's nodes, sorted, with their agents.
func nodesOf(st hub.Status) []node {
	agents := map[string]*hub.Agent{}
	for i := range st.Agents {
		agents[st.Agents[i].Node] = &st.Agents[i]
	}
	var all []node
	for _, name := range st.Snapshot.Names(state.KindNode) {
		all = append(all, node{name, agents[name]})
	}
	return all
}

// lagging names the nodes that do not enforce an object, and counts the others.
func lagging(nodes []node, s state.PolicyStatus, troubles map[string]string) (lags []Lag, enforcing int) {
	for _, n := range nodes {
		reason := ""
		switch {
		case n.agent == nil:
			reason = "its agent is not connected"
		case !n.agent.Synced:
			reason = "its agent has not the whole state yet"
		case s.Since == 0 || !s.InForce:
			reason = "waits for identity numbers"
		case n.agent.Held < s.Since:
			reason = fmt.Sprintf("holds revision %d of %d", n.agent.Held, s.Since)
		case troubles[n.name] != "":
			reason = troubles[n.name]
		default:
			enforcing++
			if s.Waiting {
				reason = fmt.Sprintf("generation %d is in force, the newer one waits for identity numbers", s.Generation)
			}
		}
		if reason != "" {
			lags = append(lags, Lag{n.name, reason})
		}
	}
	return lags, enforcing
}

// refusedObjects finds the objects behind what agents refused, with the reason by node.
func refusedObjects(st hub.Status, statuses []state.PolicyStatus) map[object.Key]map[string]string {
	all := blames{}
	view := st.Snapshot.Policy()
	blame := func(node, policy, reason string) {
		p := view.Policies[policy]
		if p == nil {
			return
		}
		for _, r := range p.Rules {
			if r.Ref.Name == "" {
				continue
			}
			all.add(object.Key{Kind: r.Ref.Kind, Namespace: r.Ref.Namespace, Name: r.Ref.Name}, node, reason)
		}
	}
	for _, a := range st.Agents {
		n := view.Nodes[a.Node]
		if n == nil {
			continue
		}
		for what, reason := range a.Refusals {
			switch what.Kind {
			case state.KindPolicy:
				blame(a.Node, what.Key, reason)
			case state.KindSubject:
				s := n.Subjects[what.Key]
				blame(a.Node, s.Ingress, reason)
				blame(a.Node, s.Egress, reason)
			case state.KindSelector:
				for key := range n.Policies {
					if p := view.Policies[key]; p != nil && slices.Contains(p.Selectors, what.Key) {
						blame(a.Node, key, reason)
					}
				}
			}
		}
	}
	all.routes(st, statuses)
	all.proxies(st)
	all.untaken(st, statuses)
	return all
}

// blames are the reasons why objects are not in force, by object and node.
type blames map[object.Key]map[string]string

func (b blames) add(key object.Key, node, reason string) {
	if b[key] == nil {
		b[key] = map[string]string{}
	}
	b[key][node] = reason
}

// routes finds the Envoy configurations behind services that agents refused.
func (b blames) routes(st hub.Status, statuses []state.PolicyStatus) {
	for _, a := range st.Agents {
		for what, reason := range a.Refusals {
			if what.Kind != state.KindService {
				continue
			}
			for i := range statuses {
				routes := func(r string) bool { return strings.HasPrefix(r, what.Key+":") }
				if slices.ContainsFunc(statuses[i].Routes, routes) {
					b.add(statuses[i].Object.Key(), a.Node, reason)
				}
			}
		}
	}
}

// proxies finds the objects behind what proxies refused. An agent's reason goes before a proxy's: without a slot there is nothing to refuse.
func (b blames) proxies(st hub.Status) {
	for _, f := range st.Faults {
		reason := "its proxy refused " + f.Resource + ": " + f.Reason
		for _, key := range behind(st.Snapshot, f.Resource) {
			if b[key][f.Node] == "" {
				b.add(key, f.Node, reason)
			}
		}
	}
}

// untaken finds the objects behind filters of which a node's proxies have not taken the newest revision. What is only to be seen counts for nothing, and
// for names there are no proxies.
func (b blames) untaken(st hub.Status, statuses []state.PolicyStatus) {
	view, render := st.Snapshot.Policy(), st.Snapshot.Render()
	b.untakenRoutes(st, statuses)
	for node, n := range view.Nodes {
		taken, connected := st.Proxies[node]
		seen := map[string]bool{}
		for key := range n.Policies {
			for _, f := range view.Policies[key].Filters {
				if f.Visibility || f.Kind == policy.FilterDNS || seen[f.Key] {
					continue
				}
				seen[f.Key] = true
				if revision := render.Revision(f.Key); revision == "" || taken[f.Key] != revision {
					b.await(st.Snapshot, node, f.Key, connected)
				}
			}
		}
	}
}

// untakenRoutes: each node has a slot of each route.
func (b blames) untakenRoutes(st hub.Status, statuses []state.PolicyStatus) {
	render := st.Snapshot.Render()
	for i := range statuses {
		for _, key := range statuses[i].RouteKeys {
			for _, node := range st.Snapshot.Names(state.KindNode) {
				taken, connected := st.Proxies[node]
				if revision := render.Revision(key); revision == "" || taken[key] != revision {
					b.await(st.Snapshot, node, key, connected)
				}
			}
		}
	}
}

// await blames the objects behind a filter, but for those that are in worse trouble.
func (b blames) await(s *state.Snapshot, node, filter string, connected bool) {
	reason := "its proxy has not taken the newest " + filter + " yet"
	if !connected {
		reason = "its proxy is not connected: what it would filter there is refused, or goes by what it had"
	}
	for _, key := range behind(s, filter) {
		if b[key][node] == "" {
			b.add(key, node, reason)
		}
	}
}

// behind returns the objects that a filter or configuration is made of.
func behind(s *state.Snapshot, resource string) []object.Key {
	if parts := strings.Split(resource, "/"); len(parts) == 3 {
		return []object.Key{{Kind: parts[0], Namespace: parts[1], Name: parts[2]}}
	}
	if route, ok := s.Render().Route(resource); ok {
		return []object.Key{{Kind: route.Kind, Namespace: route.Namespace, Name: route.Name}}
	}
	var all []object.Key
	f := s.Policy().Filters[resource]
	if f == nil {
		return nil
	}
	for _, i := range f.Items() {
		if ref := f.Rules[i].Ref; ref.Name != "" {
			all = append(all, object.Key{Kind: ref.Kind, Namespace: ref.Namespace, Name: ref.Name})
		}
	}
	return all
}

func subjectName(s *state.Snapshot, id engine.SubjectID) string {
	if r, ok := s.Get(state.Key{Kind: state.KindPod, Name: id.Key}); ok {
		if p, ok := r.(state.Pod); ok {
			return p.Namespace + "/" + p.Name
		}
	}
	return id.Key + " of " + id.Node
}

// maxNamed bounds how many nodes and conflicts a message names.
const maxNamed = 5

// Message says in words where an object is in force.
func (o *Object) Message() string {
	var b strings.Builder
	if o.Since == 0 || !o.InForce {
		b.WriteString("in force on no node")
	} else {
		fmt.Fprintf(&b, "generation %d in force on %d/%d nodes", o.Generation, o.Enforcing, o.Nodes)
	}
	for i, l := range o.Lagging {
		if i == maxNamed {
			fmt.Fprintf(&b, "; and %d more", len(o.Lagging)-i)
			break
		}
		fmt.Fprintf(&b, "; %s: %s", l.Node, l.Reason)
	}
	for i, c := range o.Conflicts {
		if i == maxNamed {
			fmt.Fprintf(&b, "; and %d more conflicts", len(o.Conflicts)-i)
			break
		}
		fmt.Fprintf(&b, "; conflict at %s", c)
	}
	for _, w := range o.Warnings {
		fmt.Fprintf(&b, "; note: %s", w)
	}
	return b.String()
}
