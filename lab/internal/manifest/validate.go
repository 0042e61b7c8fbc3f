// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/weirmesh/weir/lab/internal/object"
)

// validate checks what types cannot say, fills defaults in, and returns notes on what has no effect in a lab.
func (d *decoder) validate(kind object.Kind, value object.Object) []string {
	d.metadata(kind, value)
	v := &validator{decoder: d}
	switch o := value.(type) {
	case *corev1.Pod:
		v.pod(o)
	case *appsv1.Deployment:
		v.deployment(o)
	case *corev1.Service:
		v.service(o)
	case *discoveryv1.EndpointSlice:
		v.slice(o)
	case *corev1.ConfigMap:
		if len(o.BinaryData) > 0 {
			v.note("binaryData")
		}
	case *corev1.Node:
		v.node(o)
	case *object.Host:
		v.host(o)
	}
	var notes []string
	for _, path := range slices.Compact(v.ignored) {
		notes = append(notes, fmt.Sprintf("%s: %s has no effect in a lab", object.KeyOf(value), path))
	}
	return notes
}

// metadata checks names, namespace, labels and annotations.
func (d *decoder) metadata(kind object.Kind, value object.Object) {
	nameCheck := validation.IsDNS1123Subdomain
	switch kind.Name {
	case "Service":
		nameCheck = validation.IsDNS1035Label
	case "Namespace", "Node", "Host":
		// Nodes and hosts give network namespaces their names, in which the dot tells a pod from them.
		nameCheck = validation.IsDNS1123Label
	}
	switch {
	case value.GetName() == "" && value.GetGenerateName() != "":
		d.at("metadata.generateName", "not supported: give metadata.name")
	case value.GetName() == "":
		d.at("metadata.name", "required")
	default:
		d.problems("metadata.name", nameCheck(value.GetName()))
	}
	d.namespace(kind, value)
	d.labels("metadata.labels", value.GetLabels())
	for _, key := range slices.Sorted(maps.Keys(value.GetAnnotations())) {
		d.problems("metadata.annotations."+key, validation.IsQualifiedName(strings.ToLower(key)))
	}
}

func (d *decoder) namespace(kind object.Kind, value object.Object) {
	switch {
	case !kind.Namespaced && value.GetNamespace() != "":
		d.at("metadata.namespace", "kind %s has no namespace", kind.Name)
	case kind.Namespaced && value.GetNamespace() == "":
		value.SetNamespace(metav1.NamespaceDefault)
	case kind.Namespaced:
		d.problems("metadata.namespace", validation.IsDNS1123Label(value.GetNamespace()))
	}
}

func (d *decoder) labels(path string, set map[string]string) {
	for _, key := range slices.Sorted(maps.Keys(set)) {
		d.problems(path+"."+key, validation.IsQualifiedName(key))
		d.problems(path+"."+key, validation.IsValidLabelValue(set[key]))
	}
}

func (d *decoder) problems(path string, problems []string) {
	for _, problem := range problems {
		d.at(path, "%s", problem)
	}
}

// validator checks one object.
type validator struct {
	*decoder
	ignored []string
}

func (v *validator) note(path string) { v.ignored = append(v.ignored, path) }

func (v *validator) pod(pod *corev1.Pod) {
	v.podMeta("metadata", pod.ObjectMeta, pod.Spec.HostNetwork)
	v.podSpec("spec", &pod.Spec)
}

// podMeta checks the annotations that ask for something.
func (v *validator) podMeta(path string, meta metav1.ObjectMeta, hostNetwork bool) {
	if value, ok := meta.Annotations[object.AnnotationAddresses]; ok {
		field := path + ".annotations." + object.AnnotationAddresses
		if hostNetwork {
			v.at(field, "a pod on the host's network has the node's addresses")
		}
		if _, err := ParseAddresses(value); err != nil {
			v.at(field, "%v", err)
		}
	}
	if value, ok := meta.Annotations[object.AnnotationUnmanaged]; ok && value != "true" && value != "false" {
		v.at(path+".annotations."+object.AnnotationUnmanaged, `expected "true" or "false", got %q`, value)
	}
}

// ParseAddresses reads the annotation for fixed addresses: at most one of each family.
func ParseAddresses(value string) ([]netip.Addr, error) {
	var addresses []netip.Addr
	for _, part := range strings.Split(value, ",") {
		address, err := netip.ParseAddr(strings.TrimSpace(part))
		if err != nil || address.Is4In6() || address.Zone() != "" {
			return nil, fmt.Errorf("expected one IPv4 and one IPv6 address, or one of them, with a comma between; got %q", value)
		}
		if slices.ContainsFunc(addresses, func(a netip.Addr) bool { return a.Is4() == address.Is4() }) {
			return nil, fmt.Errorf("expected at most one address of each family; got %q", value)
		}
		addresses = append(addresses, address)
	}
	return addresses, nil
}

func (v *validator) deployment(deployment *appsv1.Deployment) {
	spec := &deployment.Spec
	if spec.Replicas == nil {
		one := int32(1)
		spec.Replicas = &one
	}
	if *spec.Replicas < 0 || *spec.Replicas > 1000 {
		v.at("spec.replicas", "expected 0 to 1000, got %d", *spec.Replicas)
	}
	v.labels("spec.template.metadata.labels", spec.Template.Labels)
	if spec.Selector == nil || len(spec.Selector.MatchLabels)+len(spec.Selector.MatchExpressions) == 0 {
		v.at("spec.selector", "required: the labels that the pods have")
	} else if selector, err := metav1.LabelSelectorAsSelector(spec.Selector); err != nil {
		v.at("spec.selector", "%v", err)
	} else if !selector.Matches(labels.Set(spec.Template.Labels)) {
		v.at("spec.template.metadata.labels", "expected labels that spec.selector matches (%s), got %s", selector, labels.Set(spec.Template.Labels))
	}
	if spec.Paused {
		v.at("spec.paused", "not supported")
	}
	if spec.Template.Spec.RestartPolicy != "" && spec.Template.Spec.RestartPolicy != corev1.RestartPolicyAlways {
		v.at("spec.template.spec.restartPolicy", "expected Always in a Deployment, got %s", spec.Template.Spec.RestartPolicy)
	}
	v.podMeta("spec.template.metadata", spec.Template.ObjectMeta, spec.Template.Spec.HostNetwork)
	if spec.Template.Annotations[object.AnnotationAddresses] != "" && *spec.Replicas > 1 {
		v.at("spec.template.metadata.annotations."+object.AnnotationAddresses, "%d replicas cannot have the same addresses", *spec.Replicas)
	}
	v.podSpec("spec.template.spec", &spec.Template.Spec)
}

func (v *validator) node(node *corev1.Node) {
	for i, address := range node.Status.Addresses {
		path := fmt.Sprintf("status.addresses[%d]", i)
		if address.Type != corev1.NodeInternalIP && address.Type != corev1.NodeHostName {
			v.at(path+".type", "expected InternalIP or Hostname, got %q", address.Type)
		}
		if _, err := netip.ParseAddr(address.Address); address.Type == corev1.NodeInternalIP && err != nil {
			v.at(path+".address", "expected an address, got %q", address.Address)
		}
	}
	for i, cidr := range node.Spec.PodCIDRs {
		if prefix, err := netip.ParsePrefix(cidr); err != nil || prefix != prefix.Masked() {
			v.at(fmt.Sprintf("spec.podCIDRs[%d]", i), "expected a prefix such as 10.244.7.0/24, got %q", cidr)
		}
	}
}

func (v *validator) host(host *object.Host) {
	if len(host.Spec.Addresses) == 0 {
		v.at("spec.addresses", "required: at least one address")
	}
	for i, text := range host.Spec.Addresses {
		if _, err := ParseHostAddress(text); err != nil {
			v.at(fmt.Sprintf("spec.addresses[%d]", i), "%v", err)
		}
	}
	v.containers("spec.containers", host.Spec.Containers)
}

// ParseHostAddress reads an address with or without a prefix length.
func ParseHostAddress(text string) (netip.Prefix, error) {
	if prefix, err := netip.ParsePrefix(text); err == nil && !prefix.Addr().Is4In6() {
		return prefix, nil
	}
	address, err := netip.ParseAddr(text)
	if err != nil || address.Zone() != "" || address.Is4In6() {
		return netip.Prefix{}, fmt.Errorf("expected an address such as 203.0.113.10 or 2001:db8::10/64, got %q", text)
	}
	return netip.PrefixFrom(address, address.BitLen()), nil
}

func (v *validator) portNumber(path string, port int32, required bool) {
	if (port != 0 || required) && (port < 1 || port > 65535) {
		v.at(path, "expected 1 to 65535, got %d", port)
	}
}

func (v *validator) protocol(path string, protocol corev1.Protocol) {
	switch protocol {
	case corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP:
	default:
		v.at(path, "expected TCP, UDP or SCTP, got %q", protocol)
	}
}
