// SPDX-License-Identifier: Apache-2.0

package state

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/label"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// variants tell addresses of one identity apart, where a policy does: by networks that they lie in and by named ports.
type variants struct {
	told     uint64 // of the engine, at the last look
	changed  bool
	networks resting[netip.Prefix]
	names    resting[string]
	refs     map[string]int      // peers, by endpoints
	of       map[string][]string // peers, by endpoint's uid
}

// resting is a set whose members stay for a while after they were needed last.
type resting[K comparable] map[K]int

func newVariants() variants {
	return variants{networks: resting[netip.Prefix]{}, names: resting[string]{}, refs: map[string]int{}, of: map[string][]string{}}
}

// set makes the set that of needed and resting members; it reports whether there are new ones.
func (r resting[K]) set(needed map[K]bool) bool {
	fresh := false
	for k := range needed {
		if _, ok := r[k]; !ok {
			fresh = true
		}
		r[k] = 0
	}
	for k, n := range r {
		if n == 0 && !needed[k] {
			r[k] = rests + 1
		}
	}
	return fresh
}

// rest reports whether a member is gone.
func (r resting[K]) rest() bool {
	gone := false
	for k, n := range r {
		switch {
		case n > 1:
			r[k] = n - 1
		case n == 1:
			delete(r, k)
			gone = true
		}
	}
	return gone
}

func (v *variants) rest() {
	if v.networks.rest() {
		v.changed = true
	}
	if v.names.rest() {
		v.changed = true
	}
}

// refreshVariants has all addresses looked at when what tells them apart changed.
func (s *State) refreshVariants() {
	v := &s.variants
	if told := s.engine.Told(); told != v.told {
		v.told = told
		networks, names := map[netip.Prefix]bool{}, map[string]bool{}
		for _, p := range s.engine.Networks() {
			networks[p] = true
		}
		for n := range s.engine.Names() {
			names[n] = true
		}
		if v.networks.set(networks) {
			v.changed = true
		}
		if v.names.set(names) {
			v.changed = true
		}
	}
	if !v.changed {
		return
	}
	v.changed = false
	for uid := range s.byUID {
		s.stale[uid] = true
	}
	s.staleNodes = true
}

// networksOf returns the networks that an address lies in, sorted.
func (v *variants) networksOf(addr netip.Addr) []netip.Prefix {
	var in []netip.Prefix
	for p := range v.networks {
		if p.Contains(addr) {
			in = append(in, p)
		}
	}
	slices.SortFunc(in, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	return in
}

// portsOf returns those of a pod's ports that policies name.
func (v *variants) portsOf(o *object.Pod) []policy.NamedPort {
	return slices.DeleteFunc(namedPorts(o), func(p policy.NamedPort) bool { _, ok := v.names[p.Name]; return !ok })
}

func namedPorts(o *object.Pod) []policy.NamedPort {
	var all []policy.NamedPort
	for _, p := range o.Ports {
		all = append(all, policy.NamedPort{Name: p.Name, Proto: protocolNumber(p.Protocol), Port: p.Port})
	}
	return all
}

func protocolNumber(p object.Protocol) uint8 {
	switch p {
	case object.UDP:
		return policy.UDP
	case object.SCTP:
		return policy.SCTP
	}
	return policy.TCP
}

// variantText is the one written form.
func variantText(ports []policy.NamedPort, networks []netip.Prefix) string {
	var parts []string
	for _, p := range ports {
		protocol := map[uint8]string{policy.TCP: "TCP", policy.UDP: "UDP", policy.SCTP: "SCTP"}[p.Proto]
		parts = append(parts, fmt.Sprintf("%s=%d/%s", p.Name, p.Port, protocol))
	}
	for _, n := range networks {
		parts = append(parts, n.String())
	}
	return strings.Join(parts, ";")
}

// setVariants computes the variants of an endpoint, and has the engine know those peers. labels are those of its identity.
func (s *State) setVariants(e *Endpoint, o *object.Pod, labels label.Set) {
	var peers []string
	ports := s.variants.portsOf(o)
	for i, addr := range e.Addresses {
		networks := s.variants.networksOf(addr)
		variant := variantText(ports, networks)
		if variant == "" {
			continue
		}
		if e.Variants == nil {
			e.Variants = make([]string, len(e.Addresses))
		}
		e.Variants[i] = variant
		key := peerKey(e.Identity, variant)
		if !slices.Contains(peers, key) {
			peers = append(peers, key)
			s.engine.SetPeer(&policy.Peer{Key: key, Labels: labels, Networks: networks, NamedPorts: ports})
		}
	}
	s.replaceVariants(e.UID, peers)
}

// replaceVariants says which variant peers an endpoint has; one that no endpoint has is gone.
func (s *State) replaceVariants(uid string, peers []string) {
	v := &s.variants
	for _, key := range peers {
		v.refs[key]++
	}
	for _, key := range v.of[uid] {
		if v.refs[key]--; v.refs[key] == 0 {
			delete(v.refs, key)
			s.engine.DeletePeer(key)
		}
	}
	if len(peers) > 0 {
		v.of[uid] = peers
	} else {
		delete(v.of, uid)
	}
}

// tellPods tells the engine of stale pods: whether they are subjects, and which ports they name.
func (s *State) tellPods() {
	for uid := range s.stale {
		p := s.byUID[uid]
		var node string
		var ports []policy.NamedPort
		if p != nil && !p.object.Finished && !p.object.HostNetwork {
			ports = namedPorts(p.object)
			if p.inUse != nil && !p.object.Unmanaged {
				node = p.object.Node
			}
		}
		if before := s.ports[uid]; !slices.Equal(before, ports) {
			for _, port := range ports {
				s.engine.AddPort(port)
			}
			for _, port := range before {
				s.engine.RemovePort(port)
			}
			if s.ports[uid] = ports; len(ports) == 0 {
				delete(s.ports, uid)
			}
		}
		if before, ok := s.subjectOn[uid]; ok && before != node {
			s.engine.DeleteSubject(engine.SubjectID{Node: before, Key: uid})
			delete(s.subjectOn, uid)
		}
		if node != "" {
			s.subjectOn[uid] = node
			s.engine.SetSubject(engine.SubjectID{Node: node, Key: uid}, &policy.Subject{
				Labels: p.inUse.labels, NamedPorts: ports, Node: s.nodeLabels(node), Visibility: s.visibilityOf(p.object),
			})
		}
	}
}

// nodeLabels returns the labels of a pod's node, where a policy asks for them: else pods of all nodes are alike.
func (s *State) nodeLabels(node string) label.Set {
	n := s.nodes[node]
	if n == nil || s.nodePolicies == 0 {
		return nil
	}
	return labelsWith("k8s", n.Labels)
}

// labelsWith returns labels of one source with others, as a set.
func labelsWith(source string, labels map[string]string, more ...string) label.Set {
	set := make(label.Set, 0, len(labels)+len(more))
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		set = append(set, source+":"+key+"="+labels[key])
	}
	set = append(set, more...)
	slices.Sort(set)
	return slices.Compact(set)
}
