// SPDX-License-Identifier: Apache-2.0

// Package state decides what agents are told: it takes the cluster's objects, the identity numbers
// and what agents registered, and computes the resources of a node. It knows neither gRPC nor a
// Kubernetes client, starts nothing and waits for nothing.
//
// A State is changed by one goroutine through its methods; Commit then computes the parts that the
// changes touched and returns an immutable Snapshot with the Change since the last one.
package state

import (
	"cmp"
	"fmt"
	"strconv"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/internal/reserved"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/label"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// State is everything known. Make it with New; not safe for concurrent use.
type State struct {
	cluster string

	nodes      map[string]*object.Node
	namespaces map[string]*object.Namespace
	services   map[object.Key]*object.Service
	slices     map[object.Key]*object.EndpointSlice
	slicesOf   map[string]map[object.Key]*object.EndpointSlice // by service
	pods       map[object.Key]*pod
	byUID      map[string]*pod

	sets     map[string]*set   // by Set.Key; those that a pod uses
	byNumber map[uint32]*set   // those of sets that have a number
	acquire  []label.Set       // sets that came into use since the last TakeIdentityChanges
	release  []label.Set       // sets that went out of use
	agents   map[string]*agent // by node
	sequence uint64            // of registrations

	synced  bool
	missing map[string]bool // sets without a number at the time of the first sync

	dirty    [kinds]bool     // of all kinds but endpoints and services
	stale    map[string]bool // uids of endpoints
	claims   claims
	snapshot *Snapshot

	configs      map[object.Key]*configObject
	staleConfigs bool    // look at what configs route
	routing      routing // what they route
	// What proxies are rendered from changed.
	renderConfigsStale, renderSlotsStale bool

	slotUses   map[string]int                 // nodes with a slot of a filter
	visibility map[string]Warning             // pods and namespaces with a bad annotation
	seenIn     map[string][]policy.Visibility // by namespace
	warnings   []Warning                      // new ones since the last TakeWarnings

	options       policy.Options
	engine        *engine.Engine
	policies      map[object.Key]*policyObject
	kept          keeper                        // label keys that policies name
	variants      variants                      // how addresses are told apart
	staleServices map[string]bool               // namespace/name
	staleNodes    bool                          // addresses, labels or API servers changed
	apiServers    map[string]bool               // nodes
	ports         map[string][]policy.NamedPort // by pod uid, told to the engine
	subjectOn     map[string]string             // node of pods that are subjects, by uid
	subjectNodes  map[string]bool               // nodes that are subjects
	nodePeers     map[string]bool               // told to the engine
	nodePolicies  int                           // policies that ask for labels of nodes
	open          bool                          // Complete was true once
	standIns      bool
}

// pod is a pod and its identity: the one that its labels ask for, and the one in force, which stays
// until the new one has a number.
type pod struct {
	object *object.Pod
	wanted *set
	inUse  *set
}

// set is a label set that pods use.
type set struct {
	labels label.Set
	key    string
	number uint32 // 0 = not known yet
	fixed  bool
	refs   int
	// wanters are the pods whose labels ask for the set.
	wanters map[*pod]bool
}

// New returns an empty state of a cluster.
func New(cluster string) *State { return NewWith(policy.Options{ClusterName: cluster}) }

// NewWith returns an empty state.
func NewWith(o policy.Options) *State {
	cluster := o.ClusterName
	s := &State{
		cluster:    cluster,
		nodes:      map[string]*object.Node{},
		namespaces: map[string]*object.Namespace{},
		services:   map[object.Key]*object.Service{},
		slices:     map[object.Key]*object.EndpointSlice{},
		pods:       map[object.Key]*pod{},
		byUID:      map[string]*pod{},
		sets:       map[string]*set{},
		byNumber:   map[uint32]*set{},
		agents:     map[string]*agent{},
		missing:    map[string]bool{},
		stale:      map[string]bool{},
		claims:     newClaims(),
		snapshot:   &Snapshot{},
		slicesOf:   map[string]map[object.Key]*object.EndpointSlice{},

		options: o, engine: engine.New(o), policies: map[object.Key]*policyObject{}, kept: newKeeper(), variants: newVariants(),
		configs: map[object.Key]*configObject{}, slotUses: map[string]int{}, visibility: map[string]Warning{},
		seenIn:        map[string][]policy.Visibility{},
		staleServices: map[string]bool{}, staleNodes: true, apiServers: map[string]bool{}, ports: map[string][]policy.NamedPort{},
		subjectOn: map[string]string{}, subjectNodes: map[string]bool{}, nodePeers: map[string]bool{},
	}
	s.setReserved()
	return s
}

// SetStandIns says whether annotations may make pods stand for ends that they are not. Call it before the first object.
func (s *State) SetStandIns(on bool) { s.standIns = on }

// standIn are the reserved identities that pods may stand for.
var standIn = map[string]reserved.Identity{
	"init":    {Number: reserved.Init, Labels: label.Set{"reserved:init"}},
	"ingress": {Number: reserved.Ingress, Labels: label.Set{"reserved:ingress"}},
}

func (s *State) touch(kinds ...Kind) {
	for _, k := range kinds {
		s.dirty[k] = true
	}
}

// Upsert takes an object in.
func (s *State) Upsert(o object.Object) {
	switch o := o.(type) {
	case *object.Node:
		s.nodes[o.Name] = o
		s.touchNodes()
		s.staleNode(o.Name)
	case *object.Namespace:
		s.upsertNamespace(o)
		s.relabel(o.Name)
	case *object.Pod:
		s.upsertPod(o)
	case *object.Service:
		s.services[o.Key()] = o
		s.staleServices[o.Namespace+"/"+o.Name] = true
		s.keepService(o.Key(), o.Selector)
	case *object.EndpointSlice:
		s.dropSlice(o.Key())
		s.slices[o.Key()] = o
		s.addSlice(o)
	case *object.Policy:
		if object.IsEnvoy(o.Kind) {
			s.upsertConfig(o)
			return
		}
		s.upsertPolicy(o)
	}
}

// Delete forgets an object; one that is not there is fine.
func (s *State) Delete(key object.Key) {
	switch key.Kind {
	case object.KindNode:
		delete(s.nodes, key.Name)
		// What its agent registered goes with it: a node of that name that comes back is a new one.
		s.dropSlots(key.Name)
		delete(s.agents, key.Name)
		s.touchNodes()
		s.staleNode(key.Name)
	case object.KindNamespace:
		s.dropNamespace(key.Name)
		s.touch(KindNamespace)
		s.relabel(key.Name)
	case object.KindPod:
		if p, ok := s.pods[key]; ok {
			s.dropPod(p)
		}
	case object.KindService:
		delete(s.services, key)
		s.staleServices[key.Namespace+"/"+key.Name] = true
		s.keepService(key, nil)
	case object.KindEndpointSlice:
		s.dropSlice(key)
	case object.KindCiliumEnvoyConfig, object.KindCiliumClusterwideEnvoyConfig:
		s.deleteConfig(key)
	default:
		s.deletePolicy(key)
	}
}

// touchNodes says that nodes changed.
func (s *State) touchNodes() {
	s.touch(KindNode)
	s.staleNodes = true
}

func (s *State) upsertPod(o *object.Pod) {
	p, ok := s.pods[o.Key()]
	if ok && p.object.UID != o.UID {
		s.dropPod(p) // another pod of the same name
		ok = false
	}
	if !ok {
		p = &pod{}
		s.pods[o.Key()] = p
	}
	p.object = o
	s.byUID[o.UID] = p
	s.identify(p)
	s.touch(KindPod)
	s.staleEndpoint(o.UID)
}

func (s *State) dropPod(p *pod) {
	s.want(p, nil)
	s.unref(p.inUse)
	p.inUse = nil
	delete(s.visibility, p.object.Key().String())
	delete(s.pods, p.object.Key())
	delete(s.byUID, p.object.UID)
	if a := s.agents[p.object.Node]; a != nil {
		delete(a.endpoints, p.object.UID)
	}
	s.touch(KindPod)
	s.staleEndpoint(p.object.UID)
}

// relabel computes the identities of all pods of a namespace anew.
func (s *State) relabel(namespace string) {
	for key, p := range s.pods {
		if key.Namespace == namespace {
			s.identify(p)
		}
	}
}

// identify finds the set that a pod's labels ask for.
func (s *State) identify(p *pod) {
	var want *set
	if o := p.object; !o.HostNetwork && !o.Unmanaged && !o.Finished {
		want = s.ref(s.labelsOf(o))
	}
	s.want(p, want)
	s.settle(p)
}

// want replaces the set that a pod's labels ask for; the reference to the new one is taken over.
func (s *State) want(p *pod, u *set) {
	if p.wanted != nil {
		delete(p.wanted.wanters, p)
	}
	s.unref(p.wanted)
	if p.wanted = u; u != nil {
		u.wanters[p] = true
	}
}

// labelsOf returns a pod's label set, and its number if that is fixed.
func (s *State) labelsOf(o *object.Pod) (label.Set, uint32) {
	cluster := s.cluster
	if s.standIns {
		if r, ok := standIn[o.Reserved]; ok {
			return r.Labels, r.Number
		}
		cluster = cmp.Or(o.Cluster, s.cluster)
	}
	if dns, ok := reserved.DNS(o.Namespace, o.Labels, cluster); ok && cluster == s.cluster {
		return dns.Labels, dns.Number
	}
	l := label.Pod{Labels: o.Labels, Namespace: o.Namespace, ServiceAccount: o.ServiceAccount, Cluster: cluster}
	if ns := s.namespaces[o.Namespace]; ns != nil {
		l.NamespaceLabels = ns.Labels
	}
	l.Keep = s.kept.has
	return l.Identity(), 0
}

// settle puts the wanted set in force when it has a number, or when the pod needs none.
func (s *State) settle(p *pod) {
	if p.wanted == p.inUse || p.wanted != nil && p.wanted.number == 0 {
		return
	}
	if p.wanted != nil {
		p.wanted.refs++
	}
	s.unref(p.inUse)
	p.inUse = p.wanted
	s.touch(KindPod, KindIdentity)
	s.staleEndpoint(p.object.UID)
}

func (s *State) ref(labels label.Set, fixed uint32) *set {
	key := labels.Key()
	u, ok := s.sets[key]
	if !ok {
		u = &set{labels: labels, key: key, wanters: map[*pod]bool{}}
		s.sets[key] = u
		if fixed != 0 {
			u.fixed, u.number = true, fixed
			s.setByNumber(fixed, u)
			s.touch(KindIdentity)
		} else {
			s.acquire = append(s.acquire, labels)
			if !s.synced {
				s.missing[key] = true
			}
		}
	}
	u.refs++
	return u
}

func (s *State) unref(u *set) {
	if u == nil {
		return
	}
	if u.refs--; u.refs > 0 {
		return
	}
	delete(s.sets, u.key)
	delete(s.missing, u.key)
	if u.number != 0 {
		s.dropByNumber(u.number)
		s.touch(KindIdentity)
	}
	if !u.fixed {
		s.release = append(s.release, u.labels)
	}
}

// TakeIdentityChanges returns the label sets that came into use and those that went out of use
// since the last call. A set may be in both: what it is now is what counts, see Uses.
func (s *State) TakeIdentityChanges() (acquire, release []label.Set) {
	acquire, release = s.acquire, s.release
	s.acquire, s.release = nil, nil
	return acquire, release
}

// Uses reports whether a pod uses a label set.
func (s *State) Uses(labels label.Set) bool { return s.sets[labels.Key()] != nil }

// SetNumber takes in the number that the identity broker gave a set. A number outside the broker's
// range, or one that already means another set, is refused: the pods concerned then wait, since
// the wrong identity would be worse than none.
func (s *State) SetNumber(labels label.Set, number uint32) error {
	u := s.sets[labels.Key()]
	if u == nil || u.fixed {
		return nil // no longer used
	}
	if number < reserved.FirstGiven || number > reserved.LastGiven {
		return fmt.Errorf("identity number %d of %v is out of range", number, labels)
	}
	if u.number == number {
		return nil
	}
	if other := s.byNumber[number]; other != nil {
		return fmt.Errorf("identity number %d of %v already means %v", number, labels, other.labels)
	}
	if u.number != 0 {
		s.dropByNumber(u.number)
	}
	u.number = number
	s.setByNumber(number, u)
	delete(s.missing, u.key)
	for p := range u.wanters {
		s.settle(p)
		s.staleEndpoint(p.object.UID)
	}
	s.touch(KindPod, KindIdentity)
	return nil
}

// MarkSynced says that all objects that the source had at the start are in.
func (s *State) MarkSynced() { s.synced = true }

// Synced reports whether MarkSynced was called.
func (s *State) Synced() bool { return s.synced }

// Complete reports whether the state is whole: the source is synced, and every set that it used
// then has a number. Until it is, agents must not drop what they have from before.
func (s *State) Complete() bool { return s.synced && len(s.missing) == 0 }

// MissingNumbers returns how many sets in use have no number.
func (s *State) MissingNumbers() int {
	n := 0
	for _, u := range s.sets {
		if u.number == 0 {
			n++
		}
	}
	return n
}

func (s *State) setByNumber(number uint32, u *set) {
	s.byNumber[number] = u
	s.engine.SetPeer(&policy.Peer{Key: peerKey(number, ""), Labels: u.labels})
}

func (s *State) dropByNumber(number uint32) {
	delete(s.byNumber, number)
	if number <= reserved.WorldIPv6 {
		return // the peer is there without pods, too
	}
	s.engine.DeletePeer(peerKey(number, ""))
}

// peerKey names a peer of the cluster.
func peerKey(number uint32, variant string) string {
	key := strconv.FormatUint(uint64(number), 10)
	if variant != "" {
		key += "/" + variant
	}
	return key
}
