// SPDX-License-Identifier: Apache-2.0

// Package desired is the state that the policy service wants this node to have: the last word on every resource, as plain values. It decides
// nothing; it tells what changed, and lets a pod's start wait for what it needs.
package desired

import (
	"context"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"sync"
)

// Kind says what a resource is.
type Kind uint8

// Kinds of resources.
const (
	KindNode Kind = iota + 1
	KindEndpoint
	KindService
	KindNamespace
	KindIdentity
	KindPod
	KindPeer
	KindSelector
	KindPolicy
	KindSubject
)

// Key names a resource.
type Key struct {
	Kind Kind
	Name string
}

// Node is a member of the cluster.
type Node struct {
	Name      string
	Addresses []netip.Addr
	PodCIDRs  []netip.Prefix
	Labels    map[string]string
	Health    []netip.Addr
}

// Endpoint is a pod with addresses, anywhere in the cluster.
type Endpoint struct {
	UID, Node, Namespace, Name string
	Addresses                  []netip.Addr
	Identity                   uint32
	Workload                   Workload
	HostNetwork                bool
	// Variants tell the addresses from others of the identity in policies, one for each; empty = nothing does.
	Variants []string `json:",omitempty"`
}

// Peer names what policies know the i-th address by: "<identity>/<variant>", or "" when the identity says it all.
func (e *Endpoint) Peer(i int) string {
	if i >= len(e.Variants) || e.Variants[i] == "" {
		return ""
	}
	return strconv.FormatUint(uint64(e.Identity), 10) + "/" + e.Variants[i]
}

// Workload owns pods.
type Workload struct{ Kind, Name string }

// Pod is what this node must know before it starts a pod.
type Pod struct {
	UID, Namespace, Name string
	Identity             uint32
	Workload             Workload
	Addresses            []netip.Addr
	NamedPorts           map[string]uint32
	Unmanaged            bool
}

// Namespace is a Kubernetes namespace.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// Identity is a number and its labels, sorted.
type Identity struct {
	Number uint32
	Labels []string
}

// Resource is one of *Node, *Endpoint, *Service, *Namespace, *Identity, *Pod, *Peer, *Selector, *Policy, *Subject. Nobody changes one that was
// handed over.
type Resource any

// Upsert is a resource with its key.
type Upsert struct {
	Key      Key
	Resource Resource
}

// Change is what happened to a resource; New is nil when it is gone, Old when it is new.
type Change struct {
	Key      Key
	Old, New Resource
}

// Store holds the state. Safe for concurrent use.
type Store struct {
	mu        sync.Mutex
	resources map[Key]Resource
	stale     map[Key]struct{} // of an earlier stream and not sent again yet
	changed   chan struct{}    // closed and replaced at every change
}

// NewStore makes an empty store.
func NewStore() *Store {
	return &Store{resources: map[Key]Resource{}, changed: make(chan struct{})}
}

// Begin says that a new stream begins: what it does not send until Complete is gone.
func (s *Store) Begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stale = make(map[Key]struct{}, len(s.resources))
	for k := range s.resources {
		s.stale[k] = struct{}{}
	}
}

// Complete ends the first state of a stream and returns the removal of what it did not send.
func (s *Store) Complete() []Change {
	s.mu.Lock()
	defer s.mu.Unlock()
	var changes []Change
	for k := range s.stale {
		changes = append(changes, Change{Key: k, Old: s.resources[k]})
		delete(s.resources, k)
	}
	s.stale = nil
	s.wakeLocked()
	return changes
}

// Apply takes one update and returns what changed, in the update's order, upserts first.
func (s *Store) Apply(upserts []Upsert, removals []Key) []Change {
	s.mu.Lock()
	defer s.mu.Unlock()
	changes := make([]Change, 0, len(upserts)+len(removals))
	for _, u := range upserts {
		delete(s.stale, u.Key)
		changes = append(changes, Change{Key: u.Key, Old: s.resources[u.Key], New: u.Resource})
		s.resources[u.Key] = u.Resource
	}
	for _, k := range removals {
		delete(s.stale, k)
		old, ok := s.resources[k]
		if !ok {
			continue
		}
		changes = append(changes, Change{Key: k, Old: old})
		delete(s.resources, k)
	}
	s.wakeLocked()
	return changes
}

func (s *Store) wakeLocked() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// All returns every resource, nodes and identities before what refers to them.
func (s *Store) All() []Upsert {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Upsert, 0, len(s.resources))
	for k, r := range s.resources {
		all = append(all, Upsert{k, r})
	}
	order := [...]int{KindNode: 0, KindIdentity: 1, KindNamespace: 2, KindPeer: 3, KindSelector: 4, KindPolicy: 5, KindSubject: 6, KindEndpoint: 7,
		KindService: 8, KindPod: 9}
	slices.SortFunc(all, func(a, b Upsert) int {
		if d := order[a.Key.Kind] - order[b.Key.Kind]; d != 0 {
			return d
		}
		if a.Key.Name < b.Key.Name {
			return -1
		}
		return 1
	})
	return all
}

// Count counts the resources of a kind.
func (s *Store) Count(kind Kind) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for k := range s.resources {
		if k.Kind == kind {
			n++
		}
	}
	return n
}

// Get returns a resource, or nil.
func (s *Store) Get(k Key) Resource {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.resources[k]
}

// Equal says whether two resources say the same.
func Equal(a, b Resource) bool {
	if a == b {
		return true
	}
	// Selectors may have many members, and change often.
	if x, ok := a.(*Selector); ok {
		y, ok := b.(*Selector)
		return ok && x.Key == y.Key && slices.Equal(x.Members, y.Members)
	}
	return reflect.DeepEqual(a, b)
}

// Node returns a node, or nil.
func (s *Store) Node(name string) *Node {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, _ := s.resources[Key{KindNode, name}].(*Node)
	return n
}

// Pod finds a pod of this node by namespace and name, and by uid unless that is empty; or nil.
func (s *Store) Pod(namespace, name, uid string) *Pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.podLocked(namespace, name, uid)
}

func (s *Store) podLocked(namespace, name, uid string) *Pod {
	if uid != "" {
		p, _ := s.resources[Key{KindPod, uid}].(*Pod)
		if p != nil && (p.Namespace != namespace || p.Name != name) {
			return nil
		}
		return p
	}
	for k := range s.resources {
		if k.Kind != KindPod {
			continue
		}
		if p, ok := s.resources[k].(*Pod); ok && p.Namespace == namespace && p.Name == name {
			return p
		}
	}
	return nil
}

// WaitNode waits until a node is known with its pod CIDRs. The error is ctx's.
func (s *Store) WaitNode(ctx context.Context, name string) (*Node, error) {
	for {
		s.mu.Lock()
		n, _ := s.resources[Key{KindNode, name}].(*Node)
		changed := s.changed
		s.mu.Unlock()
		if n != nil && len(n.PodCIDRs) > 0 {
			return n, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-changed:
		}
	}
}

// WaitPod waits until the pod is known with its identity, and this node with its pod CIDRs. The error is ctx's.
func (s *Store) WaitPod(ctx context.Context, node, namespace, name, uid string) (*Pod, *Node, error) {
	for {
		s.mu.Lock()
		p := s.podLocked(namespace, name, uid)
		n, _ := s.resources[Key{KindNode, node}].(*Node)
		changed := s.changed
		s.mu.Unlock()
		if p != nil && (p.Identity != 0 || p.Unmanaged) && n != nil && len(n.PodCIDRs) > 0 {
			return p, n, nil
		}
		select {
		case <-ctx.Done():
			return p, n, ctx.Err()
		case <-changed:
		}
	}
}
