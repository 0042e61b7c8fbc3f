// SPDX-License-Identifier: Apache-2.0

// Package object names the Kubernetes objects that the lab knows, and its own kind Host.
package object

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Annotations that the lab and the agents act upon.
const (
	// AnnotationAddresses gives a pod fixed addresses: a v4 and a v6 one, or one of them, with a comma between.
	AnnotationAddresses = "weir.dev/ip-addresses"
	// AnnotationUnmanaged, when "true", keeps the mesh's hands off a pod.
	AnnotationUnmanaged = "weir.dev/unmanaged"
)

// LabGroup is the API version of the lab's own kinds.
const LabGroup = "lab.weir.dev/v1"

// Key names an object. Namespace is empty for kinds that have none.
type Key struct {
	Kind      string
	Namespace string
	Name      string
}

// String is how kubectl names an object, with the namespace in front of the name.
func (k Key) String() string {
	if k.Namespace == "" {
		return k.Kind + "/" + k.Name
	}
	return k.Kind + "/" + k.Namespace + "/" + k.Name
}

// Object is a typed Kubernetes object, by pointer. Objects that were handed on are never changed; whoever needs another state makes a
// copy.
type Object interface {
	metav1.Object
	schema.ObjectKind
}

// Host is a host outside of the cluster: its own network namespace on the fabric, with routes to pods and services by way of the nodes.
type Host struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              HostSpec   `json:"spec"`
	Status            HostStatus `json:"status"`
}

// HostSpec says what a host is.
type HostSpec struct {
	// Addresses, v4 and v6; a prefix length is optional (default: the address alone).
	Addresses []string `json:"addresses"`
	// Containers run on the host, as in a pod.
	Containers []corev1.Container `json:"containers,omitempty"`
}

// HostStatus is what the lab says of a host.
type HostStatus struct {
	ContainerStatuses []corev1.ContainerStatus `json:"containerStatuses,omitempty"`
	Message           string                   `json:"message,omitempty"`
}

// Kind describes a kind.
type Kind struct {
	Name       string
	APIVersion string
	Namespaced bool
	// Derived kinds are made by the lab and may not be in a manifest.
	Derived bool
	// New makes an empty object.
	New func() Object
}

var kinds = map[string]Kind{
	"Namespace":     {"Namespace", "v1", false, false, func() Object { return new(corev1.Namespace) }},
	"Node":          {"Node", "v1", false, false, func() Object { return new(corev1.Node) }},
	"Pod":           {"Pod", "v1", true, false, func() Object { return new(corev1.Pod) }},
	"Service":       {"Service", "v1", true, false, func() Object { return new(corev1.Service) }},
	"ConfigMap":     {"ConfigMap", "v1", true, false, func() Object { return new(corev1.ConfigMap) }},
	"Deployment":    {"Deployment", "apps/v1", true, false, func() Object { return new(appsv1.Deployment) }},
	"Host":          {"Host", LabGroup, false, false, func() Object { return new(Host) }},
	"ReplicaSet":    {"ReplicaSet", "apps/v1", true, true, func() Object { return new(appsv1.ReplicaSet) }},
	"EndpointSlice": {"EndpointSlice", "discovery.k8s.io/v1", true, true, func() Object { return new(discoveryv1.EndpointSlice) }},
}

// ByName returns a kind.
func ByName(name string) (Kind, bool) {
	kind, ok := kinds[name]
	return kind, ok
}

// Manifests returns the kinds that a manifest may hold, by name.
func Manifests() []string {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(kinds)) {
		if !kinds[name].Derived {
			names = append(names, name)
		}
	}
	return names
}

// KindOf returns the kind of an object, also one whose own TypeMeta is empty.
func KindOf(o Object) string {
	switch o.(type) {
	case *corev1.Namespace:
		return "Namespace"
	case *corev1.Node:
		return "Node"
	case *corev1.Pod:
		return "Pod"
	case *corev1.Service:
		return "Service"
	case *corev1.ConfigMap:
		return "ConfigMap"
	case *appsv1.Deployment:
		return "Deployment"
	case *appsv1.ReplicaSet:
		return "ReplicaSet"
	case *discoveryv1.EndpointSlice:
		return "EndpointSlice"
	case *Host:
		return "Host"
	}
	return ""
}

// KeyOf returns an object's key.
func KeyOf(o Object) Key {
	return Key{Kind: KindOf(o), Namespace: o.GetNamespace(), Name: o.GetName()}
}

// Copy returns a deep copy.
func Copy[T Object](o T) T {
	var copied Object
	switch v := Object(o).(type) {
	case *corev1.Namespace:
		copied = v.DeepCopy()
	case *corev1.Node:
		copied = v.DeepCopy()
	case *corev1.Pod:
		copied = v.DeepCopy()
	case *corev1.Service:
		copied = v.DeepCopy()
	case *corev1.ConfigMap:
		copied = v.DeepCopy()
	case *appsv1.Deployment:
		copied = v.DeepCopy()
	case *appsv1.ReplicaSet:
		copied = v.DeepCopy()
	case *discoveryv1.EndpointSlice:
		copied = v.DeepCopy()
	case *Host:
		copied = v.DeepCopy()
	}
	return copied.(T)
}

// DeepCopy returns a copy that shares nothing.
func (h *Host) DeepCopy() *Host {
	c := *h
	h.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	c.Spec.Addresses = slices.Clone(h.Spec.Addresses)
	c.Spec.Containers = nil
	for _, container := range h.Spec.Containers {
		c.Spec.Containers = append(c.Spec.Containers, *container.DeepCopy())
	}
	c.Status.ContainerStatuses = nil
	for _, status := range h.Status.ContainerStatuses {
		c.Status.ContainerStatuses = append(c.Status.ContainerStatuses, *status.DeepCopy())
	}
	return &c
}

// JSON returns the object as Kubernetes sends it, apiVersion and kind included.
func JSON(o Object) ([]byte, error) {
	kind, ok := ByName(KindOf(o))
	if !ok {
		return nil, fmt.Errorf("encode %T: unknown kind", o)
	}
	copied := Copy(o)
	// Every kind embeds metav1.TypeMeta, which has this method.
	copied.SetGroupVersionKind(schema.FromAPIVersionAndKind(kind.APIVersion, kind.Name))
	data, err := json.Marshal(copied)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", KeyOf(o), err)
	}
	return data, nil
}
