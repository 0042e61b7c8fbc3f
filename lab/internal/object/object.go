// SPDX-License-Identifier: Apache-2.0

// Package object names the Kubernetes objects that the lab knows, and its own kind Host.
package object

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

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

// AnnotationCluster names another cluster of the mesh, of which a pod stands in for one: services of this cluster do not select it.
const AnnotationCluster = "weir.dev/cluster"

// SliceManager is who made the EndpointSlices of services with a selector, in their label.
const SliceManager = "lab.weir.dev"

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
	// Plugged says that the host is on the fabric.
	Plugged bool `json:"plugged,omitempty"`
}

// Kind describes a kind.
type Kind struct {
	Name       string
	APIVersion string
	Namespaced bool
	// Derived kinds are made by the lab and may not be in a manifest.
	Derived bool
	// Raw kinds are handed on as they are, in any version of their group.
	Raw bool
	// New makes an empty object.
	New func() Object
}

var kinds = byName(
	Kind{Name: "Namespace", APIVersion: "v1", New: func() Object { return new(corev1.Namespace) }},
	Kind{Name: "Node", APIVersion: "v1", New: func() Object { return new(corev1.Node) }},
	Kind{Name: "Pod", APIVersion: "v1", Namespaced: true, New: func() Object { return new(corev1.Pod) }},
	Kind{Name: "Service", APIVersion: "v1", Namespaced: true, New: func() Object { return new(corev1.Service) }},
	Kind{Name: "ConfigMap", APIVersion: "v1", Namespaced: true, New: func() Object { return new(corev1.ConfigMap) }},
	Kind{Name: "Deployment", APIVersion: "apps/v1", Namespaced: true, New: func() Object { return new(appsv1.Deployment) }},
	Kind{Name: "Host", APIVersion: LabGroup, New: func() Object { return new(Host) }},
	Kind{Name: "ReplicaSet", APIVersion: "apps/v1", Namespaced: true, Derived: true, New: func() Object { return new(appsv1.ReplicaSet) }},
	Kind{Name: "EndpointSlice", APIVersion: "discovery.k8s.io/v1", Namespaced: true, New: func() Object { return new(discoveryv1.EndpointSlice) }},
	rawKind("NetworkPolicy", "networking.k8s.io/v1", true),
	rawKind("CiliumNetworkPolicy", "cilium.io/v2", true),
	rawKind("CiliumClusterwideNetworkPolicy", "cilium.io/v2", false),
	rawKind("CiliumCIDRGroup", "cilium.io/v2", false),
	rawKind("CiliumEnvoyConfig", "cilium.io/v2", true),
	rawKind("CiliumClusterwideEnvoyConfig", "cilium.io/v2", false),
	rawKind("ClusterNetworkPolicy", "policy.networking.k8s.io/v1alpha2", false),
	rawKind("AdminNetworkPolicy", "policy.networking.k8s.io/v1alpha1", false),
	rawKind("BaselineAdminNetworkPolicy", "policy.networking.k8s.io/v1alpha1", false),
)

func rawKind(name, version string, namespaced bool) Kind {
	return Kind{Name: name, APIVersion: version, Namespaced: namespaced, Raw: true, New: func() Object { return &Raw{TypeMeta: metav1.TypeMeta{Kind: name}} }}
}

func byName(all ...Kind) map[string]Kind {
	kinds := map[string]Kind{}
	for _, kind := range all {
		kinds[kind.Name] = kind
	}
	return kinds
}

// Accepts reports whether an object of this kind may have the API version.
func (k Kind) Accepts(version string) bool {
	if !k.Raw {
		return version == k.APIVersion
	}
	group, _, _ := strings.Cut(k.APIVersion, "/")
	given, name, found := strings.Cut(version, "/")
	return found && given == group && name != ""
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
	switch o := o.(type) {
	case *Raw:
		return o.Kind
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
	case *Raw:
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
	if _, raw := o.(*Raw); raw {
		data, err := json.Marshal(o)
		if err != nil {
			return nil, fmt.Errorf("encode %s: %w", KeyOf(o), err)
		}
		return data, nil
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
