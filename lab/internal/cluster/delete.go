// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/object"
)

// Delete removes the objects with these keys, and all that depends on them.
func (c *Cluster) Delete(keys []object.Key) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var results []string
	// Namespaces last: they take with them what was named as well.
	ordered := slices.Clone(keys)
	slices.SortStableFunc(ordered, func(a, b object.Key) int {
		last := map[bool]int{true: 1}
		return last[a.Kind == "Namespace"] - last[b.Kind == "Namespace"]
	})
	for _, key := range ordered {
		if c.deleteOne(key) {
			results = append(results, word(key)+" deleted")
		} else {
			results = append(results, word(key)+" not found")
		}
	}
	c.reconcile()
	return results
}

func (c *Cluster) deleteOne(key object.Key) bool {
	current, ok := c.objects[key]
	if !ok {
		return false
	}
	delete(c.applied, key)
	delete(c.replacements, key)
	switch o := current.(type) {
	case *corev1.Pod:
		c.deletePod(o)
		return true
	case *corev1.Node:
		// Nodes last as long as the lab; what a manifest added to one goes.
		for _, node := range c.config.Nodes {
			if node.Name == o.Name {
				fresh := newNode(node, o.CreationTimestamp.Time)
				fresh.UID = o.UID
				c.put(fresh)
			}
		}
		return true
	case *corev1.Namespace:
		for _, inner := range c.keys() {
			if inner.Namespace == o.Name && !c.derived(inner) {
				c.deleteOne(inner)
			}
		}
		if o.Name == metav1.NamespaceDefault || o.Name == SystemNamespace {
			fresh := completeNamespace(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: o.Name}})
			inherit(fresh, o)
			if !sameJSON(fresh.ObjectMeta.Labels, o.Labels) || len(o.Annotations) > 0 {
				c.put(fresh)
			}
			return true
		}
	case *corev1.Service:
		c.addresses.release(o)
	}
	c.remove(key)
	return true
}

// derived reports whether the lab made an object itself, and so takes it away itself.
func (c *Cluster) derived(key object.Key) bool {
	return key.Kind == "ReplicaSet" || key.Kind == "EndpointSlice" && ownSlice(c.objects[key])
}

// CheckAlone reports what Apply would find wrong with objects in a cluster that has no others.
func (c *Cluster) CheckAlone(items []manifest.Item) error {
	_, err := New(c.config).Apply(items)
	return err
}

// Clear removes everything that did not come with the cluster. Pods end without grace; they are there until their runner says that they are gone.
func (c *Cluster) Clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, key := range c.keys() {
		current, exists := c.objects[key]
		if !exists || c.derived(key) {
			continue
		}
		pod, ok := current.(*corev1.Pod)
		if !ok || pod.Spec.NodeName == "" {
			c.deleteOne(key)
			continue
		}
		delete(c.applied, key)
		delete(c.replacements, key)
		ending := pod.DeepCopy()
		now, none := metav1.NewTime(c.config.Now()), int64(0)
		if ending.DeletionTimestamp == nil {
			ending.DeletionTimestamp = &now
		}
		ending.DeletionGracePeriodSeconds = &none
		c.put(ending)
	}
	c.reconcile()
}

// deletePod begins the end of a pod: at once when it never came to a node, else when its runner says so.
func (c *Cluster) deletePod(pod *corev1.Pod) {
	if pod.Spec.NodeName == "" {
		c.podGone(pod)
		return
	}
	if pod.DeletionTimestamp != nil {
		return
	}
	ending := pod.DeepCopy()
	now := metav1.NewTime(c.config.Now())
	ending.DeletionTimestamp = &now
	ending.DeletionGracePeriodSeconds = pod.Spec.TerminationGracePeriodSeconds
	c.put(ending)
}

// PodGone tells that nothing of a pod is left on its node.
func (c *Cluster) PodGone(uid types.UID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, pod := range c.pods() {
		if pod.UID == uid {
			c.podGone(pod)
			c.reconcile()
			return
		}
	}
}

func (c *Cluster) podGone(pod *corev1.Pod) {
	key := object.KeyOf(pod)
	c.remove(key)
	if replacement, ok := c.replacements[key]; ok {
		delete(c.replacements, key)
		replacement.UID = ""
		c.create(replacement)
	}
}
