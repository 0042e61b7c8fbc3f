// SPDX-License-Identifier: Apache-2.0

// Package cluster is the lab's stand-in for an API server with its controllers: it holds the objects, expands Deployments to Pods and
// Services to EndpointSlices, schedules, gives addresses to Services, and lets others watch. It runs nothing; whoever runs the pods
// reports what became of them.
package cluster

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/object"
)

// Config is what a cluster is made of. All fields are required that do not say otherwise.
type Config struct {
	// Name is the cluster's own; default empty.
	Name  string
	Nodes []NodeConfig
	// ServiceV4 and ServiceV6 are where ClusterIPs come from.
	ServiceV4, ServiceV6 netip.Prefix
	// Families of the cluster, the first one preferred; none = IPv4 and IPv6.
	Families []corev1.IPFamily
	// BalancerV4 and BalancerV6 are where addresses of LoadBalancer services come from; the zero value = those services get none.
	BalancerV4, BalancerV6 netip.Prefix
	// DNSV4 and DNSV6 are kept for the service kube-dns in kube-system.
	DNSV4, DNSV6 netip.Addr
	// Reserved are names that no outside host can have; nodes' names are reserved anyway.
	Reserved []string
	// WatchLimit is how many events may wait for a slow reader before its watch is closed; 0 = 20,000.
	WatchLimit int
	// Now is the clock.
	Now func() time.Time
}

// NodeConfig is a node.
type NodeConfig struct {
	Name      string
	Addresses []netip.Addr
	PodCIDRs  []netip.Prefix
}

// Well-known names.
const (
	SystemNamespace = "kube-system"
	DNSService      = "kube-dns"
)

// Cluster holds the objects. Safe for concurrent use.
type Cluster struct {
	config Config

	mu       sync.Mutex
	revision int64
	objects  map[object.Key]object.Object
	// applied has the objects as they were last applied, to tell a change from a repetition.
	applied map[object.Key]object.Object
	// replacements are pods that start when the one of the same name is gone.
	replacements map[object.Key]*corev1.Pod
	leases       map[string]lease
	addresses    *allocator
	watches      map[*Watch]struct{}
}

// New makes a cluster with its nodes and the namespaces that every cluster has.
func New(config Config) *Cluster {
	if config.WatchLimit == 0 {
		config.WatchLimit = 20_000
	}
	if len(config.Families) == 0 {
		config.Families = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
	}
	c := &Cluster{
		config:       config,
		objects:      map[object.Key]object.Object{},
		applied:      map[object.Key]object.Object{},
		replacements: map[object.Key]*corev1.Pod{},
		leases:       map[string]lease{},
		addresses:    newAllocator(config),
		watches:      map[*Watch]struct{}{},
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range []string{metav1.NamespaceDefault, SystemNamespace} {
		namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
		c.create(completeNamespace(namespace))
	}
	for _, node := range config.Nodes {
		c.create(newNode(node, c.config.Now()))
	}
	return c
}

func completeNamespace(namespace *corev1.Namespace) *corev1.Namespace {
	if namespace.Labels == nil {
		namespace.Labels = map[string]string{}
	}
	// Kubernetes gives every namespace this label; policies select by it.
	namespace.Labels[corev1.LabelMetadataName] = namespace.Name
	namespace.Status.Phase = corev1.NamespaceActive
	return namespace
}

// Apply creates and changes objects, all or none. The error joins manifest.Fault values.
func (c *Cluster) Apply(items []manifest.Item) ([]string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.admit(items); err != nil {
		return nil, err
	}
	var results []string
	// Namespaces and nodes first: the others refer to them.
	for _, item := range inOrder(items) {
		verb := c.applyOne(object.Copy(item.Object))
		results = append(results, word(item.Key())+" "+verb)
	}
	c.reconcile()
	return results, nil
}

func inOrder(items []manifest.Item) []manifest.Item {
	rank := func(i manifest.Item) int {
		switch i.Key().Kind {
		case "Namespace", "Node":
			return 0
		case "Pod", "Deployment", "Host":
			return 2
		}
		// What pods begin with, policies among it.
		return 1
	}
	sorted := slices.Clone(items)
	slices.SortStableFunc(sorted, func(a, b manifest.Item) int { return rank(a) - rank(b) })
	return sorted
}

// word names an object in results: deployment/todoui, with the namespace when it is not the default one.
func word(key object.Key) string {
	name := strings.ToLower(key.Kind) + "/" + key.Name
	if key.Namespace != "" && key.Namespace != metav1.NamespaceDefault {
		name += " (namespace " + key.Namespace + ")"
	}
	return name
}

// applyOne takes over one object and says what that did. The object is the caller's copy.
func (c *Cluster) applyOne(wanted object.Object) string {
	key := object.KeyOf(wanted)
	before, existed := c.applied[key]
	if existed && sameAsApplied(before, wanted) {
		return "unchanged"
	}
	c.applied[key] = object.Copy(wanted)
	current, exists := c.objects[key]
	if exists {
		inherit(wanted, current)
	}
	switch o := wanted.(type) {
	case *corev1.Namespace:
		completeNamespace(o)
	case *corev1.Node:
		wanted = mergeNode(current.(*corev1.Node), o)
	case *corev1.Service:
		var previous *corev1.Service
		if exists {
			previous = current.(*corev1.Service)
		}
		c.addresses.complete(o, previous)
	case *corev1.Pod:
		completePod(o)
		if exists {
			return c.applyPod(current.(*corev1.Pod), o)
		}
	case *object.Raw:
		o.Generation = 1
		if exists {
			o.Generation = current.GetGeneration()
			if !o.SameContent(current.(*object.Raw)) {
				o.Generation++
			}
		}
	}
	if !exists {
		c.create(wanted)
		return "created"
	}
	c.put(wanted)
	return "configured"
}

// completePod fills in what the API server would and Weir acts upon.
func completePod(pod *corev1.Pod) {
	if pod.Spec.ServiceAccountName == "" {
		pod.Spec.ServiceAccountName = "default"
	}
}

// applyPod changes a pod: metadata in place, anything else by a new pod when the old one is gone.
func (c *Cluster) applyPod(current, wanted *corev1.Pod) string {
	onlyMetadata := sameJSON(schedulable(current), schedulable(wanted)) &&
		sameRequests(current.Annotations, wanted.Annotations) && current.DeletionTimestamp == nil
	if onlyMetadata {
		changed := current.DeepCopy()
		changed.Labels, changed.Annotations = wanted.Labels, maps.Clone(wanted.Annotations)
		if mark, ok := current.Annotations[annotationScheduled]; ok {
			if changed.Annotations == nil {
				changed.Annotations = map[string]string{}
			}
			changed.Annotations[annotationScheduled] = mark
		}
		c.put(changed)
		return "configured"
	}
	wanted.Status = corev1.PodStatus{}
	c.replacements[object.KeyOf(wanted)] = wanted
	c.deletePod(current)
	return "replaced"
}

// schedulable is the spec as the manifest gives it: without the node that the lab chose.
func schedulable(pod *corev1.Pod) corev1.PodSpec {
	spec := *pod.Spec.DeepCopy()
	if pod.Annotations[annotationScheduled] != "" || spec.NodeName == "" {
		spec.NodeName = ""
	}
	return spec
}

// sameRequests compares the annotations that take effect only when a pod starts.
func sameRequests(a, b map[string]string) bool {
	for _, key := range []string{object.AnnotationAddresses, object.AnnotationUnmanaged} {
		if a[key] != b[key] {
			return false
		}
	}
	return true
}

// inherit keeps what an object has for life.
func inherit(wanted, current object.Object) {
	wanted.SetUID(current.GetUID())
	wanted.SetCreationTimestamp(current.GetCreationTimestamp())
	inheritStatus(wanted, current)
}

// SetPodStatus changes the status of a pod by change; a pod that is gone is ignored.
func (c *Cluster) SetPodStatus(uid types.UID, change func(*corev1.PodStatus)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, pod := range c.pods() {
		if pod.UID != uid {
			continue
		}
		changed := pod.DeepCopy()
		change(&changed.Status)
		if sameJSON(changed.Status, pod.Status) {
			return
		}
		c.put(changed)
		c.reconcile()
		return
	}
}

// SetHostStatus changes the status of an outside host by change; a host that is gone is ignored.
func (c *Cluster) SetHostStatus(uid types.UID, change func(*object.HostStatus)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, o := range c.objects {
		if host, ok := o.(*object.Host); ok && host.UID == uid {
			changed := host.DeepCopy()
			change(&changed.Status)
			c.put(changed)
			return
		}
	}
}

// List returns all objects of a kind, by namespace and name.
func List[T object.Object](c *Cluster) []T {
	c.mu.Lock()
	defer c.mu.Unlock()
	return list[T](c)
}

func list[T object.Object](c *Cluster) []T {
	var found []T
	for _, o := range c.objects {
		if typed, ok := o.(T); ok {
			found = append(found, typed)
		}
	}
	slices.SortFunc(found, func(a, b T) int {
		return cmp.Or(strings.Compare(a.GetNamespace(), b.GetNamespace()), strings.Compare(a.GetName(), b.GetName()))
	})
	return found
}

// Objects returns the objects of a kind, by namespace and name; an empty namespace or name stands for all.
func (c *Cluster) Objects(kind, namespace, name string) []object.Object {
	c.mu.Lock()
	defer c.mu.Unlock()
	var found []object.Object
	for _, key := range c.keys() {
		if key.Kind == kind && (namespace == "" || key.Namespace == namespace) && (name == "" || key.Name == name) {
			found = append(found, c.objects[key])
		}
	}
	return found
}

// Get returns an object.
func Get[T object.Object](c *Cluster, key object.Key) (T, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	o, ok := c.objects[key].(T)
	return o, ok
}

func (c *Cluster) pods() []*corev1.Pod { return list[*corev1.Pod](c) }

func (c *Cluster) keys() []object.Key {
	return slices.SortedFunc(maps.Keys(c.objects), func(a, b object.Key) int {
		return cmp.Or(strings.Compare(a.Kind, b.Kind), strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
}

// create stores a new object, which is the caller's copy.
func (c *Cluster) create(o object.Object) {
	o.SetUID(types.UID(newUID()))
	o.SetCreationTimestamp(metav1.NewTime(c.config.Now().Truncate(time.Second)))
	if pod, ok := o.(*corev1.Pod); ok {
		completePod(pod)
		pod.Status = corev1.PodStatus{Phase: corev1.PodPending}
	}
	c.put(o)
}

// put stores a state of an object, which is the caller's copy, and tells the watches.
func (c *Cluster) put(o object.Object) {
	key := object.KeyOf(o)
	c.revision++
	o.SetResourceVersion(strconv.FormatInt(c.revision, 10))
	eventType := Modified
	if _, exists := c.objects[key]; !exists {
		eventType = Added
	}
	c.objects[key] = o
	c.tell(Event{Type: eventType, Object: o})
}

func (c *Cluster) remove(key object.Key) {
	o, ok := c.objects[key]
	if !ok {
		return
	}
	delete(c.objects, key)
	c.revision++
	c.tell(Event{Type: Deleted, Object: o})
}

// newUID returns a random (version 4) UUID.
func newUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// admit checks what one object alone cannot tell: what it refers to, and what others have already.
func (c *Cluster) admit(items []manifest.Item) error {
	namespaces := map[string]bool{}
	for _, namespace := range list[*corev1.Namespace](c) {
		namespaces[namespace.Name] = true
	}
	for _, item := range items {
		if item.Key().Kind == "Namespace" {
			namespaces[item.Key().Name] = true
		}
	}
	var errs []error
	fault := func(item manifest.Item, field, format string, args ...any) {
		errs = append(errs, manifest.Fault{File: item.File, Line: item.Line, Field: field, Expected: fmt.Sprintf(format, args...)})
	}
	taken := c.addresses.clone()
	seen := map[object.Key]manifest.Item{}
	for _, item := range items {
		key := item.Key()
		if other, twice := seen[key]; twice {
			fault(item, "metadata.name", "%s is also in %s, line %d", key, other.File, other.Line)
			continue
		}
		seen[key] = item
		if key.Namespace != "" && !namespaces[key.Namespace] {
			fault(item, "metadata.namespace", "namespace %s does not exist; add a Namespace object", key.Namespace)
		}
		switch o := item.Object.(type) {
		case *corev1.Node:
			if err := c.admitNode(o); err != nil {
				fault(item, "metadata.name", "%v", err)
			}
		case *corev1.Pod:
			if o.Spec.NodeName != "" && !c.hasNode(o.Spec.NodeName) {
				fault(item, "spec.nodeName", "%s is not a node of this lab", o.Spec.NodeName)
			}
		case *object.Host:
			if c.hasNode(o.Name) || slices.Contains(c.config.Reserved, o.Name) {
				fault(item, "metadata.name", "%s is a name of the lab's own", o.Name)
			}
		case *corev1.Service:
			current, _ := c.objects[key].(*corev1.Service)
			if field, err := taken.admit(o, current); err != nil {
				fault(item, field, "%v", err)
			}
		case *discoveryv1.EndpointSlice:
			if current, exists := c.objects[key]; exists && ownSlice(current) {
				fault(item, "metadata.name", "%s is the lab's own slice of a service with a selector", o.Name)
			}
		}
	}
	return errors.Join(errs...)
}

func (c *Cluster) hasNode(name string) bool {
	return slices.ContainsFunc(c.config.Nodes, func(n NodeConfig) bool { return n.Name == name })
}
