// SPDX-License-Identifier: Apache-2.0

package query

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/object"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// Bounds of one validation.
const (
	maxDocuments = 1000
	maxLines     = 200
	maxPairs     = 100_000
)

// ValidatePolicies checks documents and says what they would change: each after those before it.
func (s *Service) ValidatePolicies(ctx context.Context, r *policyv1.ValidatePoliciesRequest) (*policyv1.ValidatePoliciesResponse, error) {
	documents := split(r.GetDocuments())
	if len(documents) > maxDocuments {
		return nil, grpcstatus.Errorf(codes.InvalidArgument, "documents: %d, more than %d", len(documents), maxDocuments)
	}
	c, err := s.cluster(ctx)
	if err != nil {
		return nil, err
	}
	response := &policyv1.ValidatePoliciesResponse{}
	for _, document := range documents {
		v := &policyv1.Validated{}
		response.Documents = append(response.Documents, v)
		if kind := kindIn(document); object.IsEnvoy(kind) {
			c.validateConfig(v, kind, document)
			continue
		}
		o, err := policy.Parse(document, c.frozen.Options)
		var fault *policy.Error
		switch {
		case errors.As(err, &fault):
			v.Kind, v.Namespace, v.Name, v.Error, v.Field = fault.Ref.Kind, fault.Ref.Namespace, fault.Ref.Name, fault.Error(), fault.Field
			if fault.NotYet {
				v.NotYet = fault.Field
			}
			continue
		case err != nil:
			v.Error = err.Error()
			continue
		}
		v.Kind, v.Namespace, v.Name = o.Ref.Kind, o.Ref.Namespace, o.Ref.Name
		after := &cluster{frozen: c.frozen.With(object.Key{Kind: o.Ref.Kind, Namespace: o.Ref.Namespace, Name: o.Ref.Name}, o), snapshot: c.snapshot, routes: c.routes}
		v.Changes = append(c.changes(ctx, after), o.Warnings...)
		c = after
	}
	return response, nil
}

// split cuts YAML documents apart; empty ones are left out.
func split(data []byte) [][]byte {
	var all [][]byte
	var now []byte
	flush := func() {
		if len(bytes.TrimSpace(stripComments(now))) > 0 {
			all = append(all, now)
		}
		now = nil
	}
	for line := range bytes.Lines(data) {
		text := bytes.TrimRight(line, " \t\r\n")
		if bytes.Equal(text, []byte("---")) || bytes.HasPrefix(text, []byte("--- ")) {
			flush()
			if rest := bytes.TrimPrefix(text, []byte("---")); len(bytes.TrimSpace(rest)) > 0 {
				now = append(now, rest...)
				now = append(now, '\n')
			}
			continue
		}
		now = append(now, line...)
	}
	flush()
	return all
}

// stripComments leaves out lines that are comments, to see whether anything else is there.
func stripComments(data []byte) []byte {
	var kept []byte
	for line := range bytes.Lines(data) {
		if !bytes.HasPrefix(bytes.TrimSpace(line), []byte("#")) {
			kept = append(kept, line...)
		}
	}
	return kept
}

// place is a subject with its name.
type place struct {
	id    engine.SubjectID
	name  string
	peers []string // keys that its addresses have; empty = no address yet
}

// changes says in words what is different in another state, for the endpoints that there are.
func (c *cluster) changes(ctx context.Context, after *cluster) []string {
	places := c.places()
	names := map[string][]string{} // endpoints by peer
	for _, p := range places {
		for _, key := range p.peers {
			names[key] = append(names[key], p.name)
		}
	}
	var lines []string
	pairs := 0
	for _, group := range groupAlike(c, places) {
		subject := c.frozen.Subjects[group[0].id]
		for _, d := range directions {
			before, err := c.frozen.Resolve(subject.Subject, d)
			if err != nil {
				before = subject.Resolved[d-1]
			}
			next, err := after.frozen.Resolve(subject.Subject, d)
			if err != nil {
				lines = append(lines, fmt.Sprintf("%s: conflict, %s would keep its policy: %v", namesOf(group), word(d), err))
				continue
			}
			if same(before, next) {
				continue
			}
			lines = append(lines, switched(group, d, before, next)...)
			for key, others := range names {
				if pairs++; pairs > maxPairs || ctx.Err() != nil {
					return append(finish(lines), "there are more endpoints than are compared here")
				}
				lines = append(lines, c.compare(group, d, before, next, key, others)...)
			}
			lines = append(lines, c.compare(group, d, before, next, c.outsideKey(), []string{"the world outside"})...)
			if d == policy.Egress {
				lines = append(lines, c.compareNames(group, before, next)...)
			}
		}
	}
	if len(lines) == 0 {
		return []string{"nothing changes for the endpoints that there are"}
	}
	return finish(lines)
}

func finish(lines []string) []string {
	slices.Sort(lines)
	lines = slices.Compact(lines)
	if len(lines) > maxLines {
		lines = append(lines[:maxLines:maxLines], fmt.Sprintf("and %d more changes", len(lines)-maxLines))
	}
	return lines
}

func (c *cluster) outsideKey() string {
	if c.frozen.Options.DualStack {
		return "9"
	}
	return "2"
}

// places returns the subjects of the cluster with their names.
func (c *cluster) places() []place {
	byUID := map[string]place{}
	for r := range c.snapshot.All(state.KindPod) {
		p := r.(state.Pod)
		byUID[p.UID] = place{name: p.Namespace + "/" + p.Name}
	}
	for r := range c.snapshot.All(state.KindEndpoint) {
		e := r.(state.Endpoint)
		if e.HostNetwork {
			continue
		}
		p := place{name: e.Namespace + "/" + e.Name}
		for _, a := range e.Addresses {
			if key := c.peerKey(&end{pod: &e}, a, ""); !slices.Contains(p.peers, key) {
				p.peers = append(p.peers, key)
			}
		}
		byUID[e.UID] = p
	}
	var all []place
	for id := range c.frozen.Subjects {
		p := byUID[id.Key]
		p.id = id
		switch id.Key {
		case state.SubjectHost:
			p.name = "node:" + id.Node
		case state.SubjectHealth:
			continue // nobody asks
		}
		if p.name != "" {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b place) int { return strings.Compare(a.name, b.name) })
	return all
}

// groupAlike puts subjects together that cannot be told apart.
func groupAlike(c *cluster, places []place) map[string][]place {
	groups := map[string][]place{}
	for _, p := range places {
		key := c.frozen.Subjects[p.id].Alike
		groups[key] = append(groups[key], p)
	}
	return groups
}

const maxNames = 5

func namesOf(group []place) string {
	var names []string
	for _, p := range group {
		names = append(names, p.name)
	}
	return few(names)
}

// few joins names, and counts those that are too many.
func few(names []string) string {
	if len(names) > maxNames {
		return strings.Join(names[:maxNames], ", ") + fmt.Sprintf(" and %d more", len(names)-maxNames)
	}
	return strings.Join(names, ", ")
}

func word(d policy.Direction) string {
	if d == policy.Ingress {
		return "ingress"
	}
	return "egress"
}

func enforced(r *policy.Resolved) bool { return r != nil && r.Enforced }

func same(a, b *policy.Resolved) bool {
	return enforced(a) == enforced(b) && (!enforced(a) || a.Key == b.Key)
}

// switched says whether default deny begins or ends.
func switched(group []place, d policy.Direction, before, after *policy.Resolved) []string {
	was, is := enforced(before) && before.DefaultDeny, enforced(after) && after.DefaultDeny
	switch {
	case !was && is:
		return []string{fmt.Sprintf("%s: %s becomes default deny", namesOf(group), word(d))}
	case was && !is:
		return []string{fmt.Sprintf("%s: %s is not default deny any more", namesOf(group), word(d))}
	}
	return nil
}

// compare says what changes between subjects and the endpoints of one peer.
func (c *cluster) compare(group []place, d policy.Direction, before, after *policy.Resolved, key string, others []string) []string {
	p := c.frozen.Peers[key]
	if p == nil {
		return nil
	}
	return changesInWords(group, d, compareRanges(rangesOf(before, p), rangesOf(after, p)), few(others))
}

// changesInWords says what changes between subjects and others, a line for each kind of change.
func changesInWords(group []place, d policy.Direction, differences []difference, others string) []string {
	ports := map[string][]string{}
	for _, x := range differences {
		text := map[change]string{
			denied: "allowed now, would be denied by " + word(d), allowed: "denied now, would be allowed by " + word(d), filtered: "allowed by " + word(d),
		}[x.change()]
		switch now, before := itemsInWords(x.at.Filter), itemsInWords(x.was.Filter); {
		case x.at.Verdict != policy.Allow:
		case len(now) > 0:
			text += " for " + few(now) + " only"
			if len(before) > 0 {
				text += ", now for " + few(before)
			}
		case len(before) > 0:
			text += " whatever is asked, now for " + few(before) + " only"
		}
		ports[text] = append(ports[text], portsInWords(x.at, len(differences) == 1))
	}
	var lines []string
	for text, list := range ports {
		from, to := others, namesOf(group)
		if d == policy.Egress {
			from, to = to, from
		}
		lines = append(lines, fmt.Sprintf("%s -> %s, %s: %s", from, to, few(list), text))
	}
	return lines
}

// compareNames says what changes for addresses by their DNS names, which nobody here knows. Without a rule for a name its address is as others outside.
func (c *cluster) compareNames(group []place, before, after *policy.Resolved) []string {
	world := c.frozen.Peers[c.outsideKey()]
	if world == nil {
		return nil
	}
	named := func(r *policy.Resolved) map[policy.NameSelector][]policy.Range {
		all := map[policy.NameSelector][]policy.Range{}
		if enforced(r) {
			for _, n := range r.Names() {
				all[n.NameSelector] = n.Ranges
			}
		}
		return all
	}
	was, is := named(before), named(after)
	selectors := maps.Clone(was)
	maps.Copy(selectors, is)
	var lines []string
	for selector := range selectors {
		then, ok := was[selector]
		if !ok {
			then = rangesOf(before, world)
		}
		now, ok := is[selector]
		if !ok {
			now = rangesOf(after, world)
		}
		lines = append(lines, changesInWords(group, policy.Egress, compareRanges(then, now), "DNS "+nameInWords(selector))...)
	}
	return lines
}

func rangesOf(r *policy.Resolved, p *policy.Peer) []policy.Range {
	if !enforced(r) {
		return everything()
	}
	return r.Class(r.Match(p))
}
