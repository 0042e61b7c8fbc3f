// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"cmp"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/weirmesh/weir/lab/internal/object"
)

// annotationScheduled marks pods whose node the lab chose.
const annotationScheduled = "lab.weir.dev/scheduled"

// alphabet is what Kubernetes makes random names of: no vowels, so no words.
const alphabet = "bcdfghjklmnpqrstvwxz2456789"

// maxRounds bounds reconcile; what one round makes, the next may have to look at, and nothing needs more than a few.
const maxRounds = 8

// reconcile brings what the lab makes itself in line with what was applied and reported. The caller holds c.mu.
func (c *Cluster) reconcile() {
	for range maxRounds {
		before := c.revision
		c.reconcileDeployments()
		c.schedule()
		c.reconcileSlices()
		if c.revision == before {
			return
		}
	}
}

func (c *Cluster) reconcileDeployments() {
	owned := map[string][]*corev1.Pod{} // by ReplicaSet uid
	for _, pod := range c.pods() {
		if owner := metav1.GetControllerOf(pod); owner != nil && owner.Kind == "ReplicaSet" {
			owned[string(owner.UID)] = append(owned[string(owner.UID)], pod)
		}
	}
	for _, set := range list[*appsv1.ReplicaSet](c) {
		owner := metav1.GetControllerOf(set)
		deployment, ok := c.objects[object.Key{Kind: "Deployment", Namespace: set.Namespace, Name: owner.Name}].(*appsv1.Deployment)
		if !ok || deployment.UID != owner.UID {
			// The deployment is gone: its pods go, and with the last of them the set.
			c.scale(set, owned[string(set.UID)], 0)
		}
	}
	for _, deployment := range list[*appsv1.Deployment](c) {
		c.reconcileDeployment(deployment, owned)
	}
}

// reconcileDeployment keeps one set of pods of the newest template, and ends older ones when the new pods are ready.
func (c *Cluster) reconcileDeployment(deployment *appsv1.Deployment, owned map[string][]*corev1.Pod) {
	hash := templateHash(deployment.Spec.Template)
	key := object.Key{Kind: "ReplicaSet", Namespace: deployment.Namespace, Name: deployment.Name + "-" + hash}
	replicas := int(*deployment.Spec.Replicas)
	current, ok := c.objects[key].(*appsv1.ReplicaSet)
	var old []*appsv1.ReplicaSet
	oldPods := 0
	for _, set := range list[*appsv1.ReplicaSet](c) {
		if metav1.IsControlledBy(set, deployment) && set.Name != key.Name {
			old = append(old, set)
			oldPods += len(owned[string(set.UID)])
		}
	}
	recreate := deployment.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType
	if recreate && oldPods > 0 {
		for _, set := range old {
			c.scale(set, owned[string(set.UID)], 0)
		}
		return
	}
	if !ok {
		current = newReplicaSet(deployment, key.Name, hash)
		c.create(current)
	}
	pods := owned[string(current.UID)]
	c.scale(current, pods, replicas)
	ready := 0
	for _, pod := range pods {
		if podReady(pod) {
			ready++
		}
	}
	if ready >= replicas {
		for _, set := range old {
			c.scale(set, owned[string(set.UID)], 0)
		}
	}
	c.setDeploymentStatus(deployment, current, len(pods)+oldPods, len(pods), ready)
}

func (c *Cluster) setDeploymentStatus(deployment *appsv1.Deployment, set *appsv1.ReplicaSet, all, updated, ready int) {
	changed := deployment.DeepCopy()
	changed.Status.Replicas = int32(all)
	changed.Status.UpdatedReplicas = int32(updated)
	changed.Status.ReadyReplicas, changed.Status.AvailableReplicas = int32(ready), int32(ready)
	changed.Status.UnavailableReplicas = max(*deployment.Spec.Replicas-int32(ready), 0)
	if !sameJSON(changed.Status, deployment.Status) {
		c.put(changed)
	}
	stored, ok := c.objects[object.KeyOf(set)].(*appsv1.ReplicaSet)
	if !ok {
		return
	}
	changedSet := stored.DeepCopy()
	changedSet.Spec.Replicas = deployment.Spec.Replicas
	changedSet.Status.Replicas, changedSet.Status.ReadyReplicas, changedSet.Status.AvailableReplicas = int32(updated), int32(ready), int32(ready)
	if !sameJSON(changedSet, stored) {
		c.put(changedSet)
	}
}

// scale makes a set have n pods, not counting those that are ending; a set that is to have none goes with its last pod.
func (c *Cluster) scale(set *appsv1.ReplicaSet, pods []*corev1.Pod, n int) {
	live := slices.DeleteFunc(slices.Clone(pods), func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil })
	for len(live) < n {
		pod := newPod(set)
		c.create(pod)
		live = append(live, pod)
	}
	// The least useful first: not ready, then the newest.
	slices.SortStableFunc(live, func(a, b *corev1.Pod) int {
		if podReady(a) != podReady(b) {
			if podReady(a) {
				return 1
			}
			return -1
		}
		return b.CreationTimestamp.Compare(a.CreationTimestamp.Time)
	})
	for len(live) > n {
		c.deletePod(live[0])
		live = live[1:]
	}
	if n == 0 && len(pods) == 0 && !c.newest(set) {
		c.remove(object.KeyOf(set))
	}
}

// newest reports whether the set is that of its deployment's template: it stays at zero replicas.
func (c *Cluster) newest(set *appsv1.ReplicaSet) bool {
	owner := metav1.GetControllerOf(set)
	deployment, ok := c.objects[object.Key{Kind: "Deployment", Namespace: set.Namespace, Name: owner.Name}].(*appsv1.Deployment)
	return ok && deployment.UID == owner.UID && set.Name == deployment.Name+"-"+templateHash(deployment.Spec.Template)
}

func newReplicaSet(deployment *appsv1.Deployment, name, hash string) *appsv1.ReplicaSet {
	template := *deployment.Spec.Template.DeepCopy()
	template.Labels = maps.Clone(template.Labels)
	template.Labels[appsv1.DefaultDeploymentUniqueLabelKey] = hash
	selector := deployment.Spec.Selector.DeepCopy()
	if selector.MatchLabels == nil {
		selector.MatchLabels = map[string]string{}
	}
	selector.MatchLabels[appsv1.DefaultDeploymentUniqueLabelKey] = hash
	return &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: deployment.Namespace, Name: name, Labels: template.Labels,
			OwnerReferences: []metav1.OwnerReference{controller("apps/v1", "Deployment", deployment)},
		},
		Spec: appsv1.ReplicaSetSpec{Replicas: deployment.Spec.Replicas, Selector: selector, Template: template},
	}
}

func newPod(set *appsv1.ReplicaSet) *corev1.Pod {
	template := set.Spec.Template.DeepCopy()
	// A name of a pod has at most 63 characters when it is also a host name; Kubernetes cuts the prefix as well.
	prefix := set.Name
	if len(prefix) > 57 {
		prefix = prefix[:57]
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: set.Namespace, Name: prefix + "-" + randomName(5),
			Labels: template.Labels, Annotations: template.Annotations,
			GenerateName:    set.Name + "-",
			OwnerReferences: []metav1.OwnerReference{controller("apps/v1", "ReplicaSet", set)},
		},
		Spec: template.Spec,
	}
}

func controller(version, kind string, owner metav1.Object) metav1.OwnerReference {
	yes := true
	return metav1.OwnerReference{APIVersion: version, Kind: kind, Name: owner.GetName(), UID: owner.GetUID(), Controller: &yes, BlockOwnerDeletion: &yes}
}

// templateHash is a short name of a pod template's content.
func templateHash(template corev1.PodTemplateSpec) string {
	data, err := json.Marshal(template)
	if err != nil {
		// A template came out of JSON, so it goes back into it.
		panic(fmt.Sprintf("encode pod template: %v", err))
	}
	hash := fnv.New32a()
	hash.Write(data)
	var name strings.Builder
	for _, digit := range strconv.FormatUint(uint64(hash.Sum32()), 10) {
		name.WriteByte(alphabet[int(digit)%len(alphabet)])
	}
	return name.String()
}

func randomName(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	for i := range b {
		b[i] = alphabet[int(b[i])%len(alphabet)]
	}
	return string(b)
}

// schedule gives pods without a node one: of those that the selector allows, the one with the fewest pods of the same owner, then the
// fewest pods.
func (c *Cluster) schedule() {
	total := map[string]int{}
	byOwner := map[string]int{}
	pods := c.pods()
	for _, pod := range pods {
		if pod.Spec.NodeName != "" && pod.DeletionTimestamp == nil {
			total[pod.Spec.NodeName]++
			byOwner[ownerOf(pod)+"@"+pod.Spec.NodeName]++
		}
	}
	// The oldest first, so that a restart of all gives each the place it would have had.
	slices.SortStableFunc(pods, func(a, b *corev1.Pod) int { return a.CreationTimestamp.Compare(b.CreationTimestamp.Time) })
	nodes := list[*corev1.Node](c)
	for _, pod := range pods {
		if pod.Spec.NodeName != "" || pod.DeletionTimestamp != nil {
			continue
		}
		var fitting []string
		for _, node := range nodes {
			if labels.SelectorFromSet(pod.Spec.NodeSelector).Matches(labels.Set(node.Labels)) {
				fitting = append(fitting, node.Name)
			}
		}
		changed := pod.DeepCopy()
		if len(fitting) == 0 {
			SetCondition(&changed.Status, corev1.PodScheduled, false, "Unschedulable",
				fmt.Sprintf("no node has the labels %s", labels.Set(pod.Spec.NodeSelector)), metav1.NewTime(c.config.Now()))
			if !sameJSON(changed.Status, pod.Status) {
				c.put(changed)
			}
			continue
		}
		owner := ownerOf(pod)
		node := slices.MinFunc(fitting, func(a, b string) int {
			return cmp.Or(cmp.Compare(byOwner[owner+"@"+a], byOwner[owner+"@"+b]), cmp.Compare(total[a], total[b]), strings.Compare(a, b))
		})
		changed.Spec.NodeName = node
		changed.Annotations = maps.Clone(changed.Annotations)
		if changed.Annotations == nil {
			changed.Annotations = map[string]string{}
		}
		changed.Annotations[annotationScheduled] = "true"
		SetCondition(&changed.Status, corev1.PodScheduled, true, "", "", metav1.NewTime(c.config.Now()))
		c.put(changed)
		total[node]++
		byOwner[owner+"@"+node]++
	}
}

func ownerOf(pod *corev1.Pod) string {
	if owner := metav1.GetControllerOf(pod); owner != nil {
		return string(owner.UID)
	}
	return string(pod.UID)
}

// SetCondition sets one of a pod's conditions; the time of its last change stays while its state does.
func SetCondition(status *corev1.PodStatus, kind corev1.PodConditionType, ok bool, reason, message string, now metav1.Time) {
	state := corev1.ConditionFalse
	if ok {
		state = corev1.ConditionTrue
	}
	condition := corev1.PodCondition{Type: kind, Status: state, Reason: reason, Message: message, LastTransitionTime: now}
	for i, old := range status.Conditions {
		if old.Type != kind {
			continue
		}
		if old.Status == state {
			condition.LastTransitionTime = old.LastTransitionTime
		}
		status.Conditions[i] = condition
		return
	}
	status.Conditions = append(status.Conditions, condition)
}

func podReady(pod *corev1.Pod) bool {
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodReady {
			return condition.Status == corev1.ConditionTrue
		}
	}
	return false
}
