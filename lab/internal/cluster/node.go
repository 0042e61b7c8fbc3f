// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/lab/internal/object"
)

// newNode makes the object of a node, as a kubelet would register it.
func newNode(config NodeConfig, now time.Time) *corev1.Node {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{
		Name:              config.Name,
		CreationTimestamp: metav1.NewTime(now.Truncate(time.Second)),
		Labels: map[string]string{
			corev1.LabelHostname:   config.Name,
			corev1.LabelOSStable:   "linux",
			corev1.LabelArchStable: runtime.GOARCH,
		},
	}}
	for _, cidr := range config.PodCIDRs {
		node.Spec.PodCIDRs = append(node.Spec.PodCIDRs, cidr.String())
	}
	if len(node.Spec.PodCIDRs) > 0 {
		node.Spec.PodCIDR = node.Spec.PodCIDRs[0]
	}
	for _, address := range config.Addresses {
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: address.String()})
	}
	node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: config.Name})
	node.Status.Conditions = []corev1.NodeCondition{{
		Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "LabRuns",
		LastTransitionTime: node.CreationTimestamp, LastHeartbeatTime: node.CreationTimestamp,
	}}
	return node
}

// mergeNode adds what a manifest says of a node: labels and annotations.
func mergeNode(current, wanted *corev1.Node) *corev1.Node {
	node := current.DeepCopy()
	node.Labels = map[string]string{}
	for _, key := range []string{corev1.LabelHostname, corev1.LabelOSStable, corev1.LabelArchStable} {
		node.Labels[key] = current.Labels[key]
	}
	maps.Copy(node.Labels, wanted.Labels)
	node.Annotations = maps.Clone(wanted.Annotations)
	return node
}

// admitNode checks a node's manifest: the node is there, and its addresses are those it started with.
func (c *Cluster) admitNode(wanted *corev1.Node) error {
	i := slices.IndexFunc(c.config.Nodes, func(n NodeConfig) bool { return n.Name == wanted.Name })
	if i < 0 {
		return fmt.Errorf("%s is not a node of this lab, which has %d", wanted.Name, len(c.config.Nodes))
	}
	config := c.config.Nodes[i]
	for _, address := range wanted.Status.Addresses {
		parsed, err := netip.ParseAddr(address.Address)
		if address.Type == corev1.NodeInternalIP && (err != nil || !slices.Contains(config.Addresses, parsed)) {
			return fmt.Errorf("address %s: a node's addresses are fixed when the lab starts", address.Address)
		}
	}
	for _, cidr := range wanted.Spec.PodCIDRs {
		parsed, err := netip.ParsePrefix(cidr)
		if err != nil || !slices.Contains(config.PodCIDRs, parsed) {
			return fmt.Errorf("pod CIDR %s: a node's CIDRs are fixed when the lab starts", cidr)
		}
	}
	return nil
}

// sameAsApplied reports whether a manifest says the same as before.
func sameAsApplied(a, b object.Object) bool { return sameJSON(a, b) }

func sameJSON(a, b any) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && string(x) == string(y)
}

// inheritStatus keeps an object's status when its spec changes.
func inheritStatus(wanted, current object.Object) {
	switch o := wanted.(type) {
	case *corev1.Pod:
		o.Status = *current.(*corev1.Pod).Status.DeepCopy()
	case *appsv1.Deployment:
		o.Status = *current.(*appsv1.Deployment).Status.DeepCopy()
	case *corev1.Service:
		o.Status = *current.(*corev1.Service).Status.DeepCopy()
	case *object.Host:
		o.Status = current.(*object.Host).DeepCopy().Status
	case *object.Raw:
		o.Status = current.(*object.Raw).Status
	case *corev1.Namespace:
		o.Status = current.(*corev1.Namespace).Status
	}
}
