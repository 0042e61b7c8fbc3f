// SPDX-License-Identifier: Apache-2.0

package object

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/services/policy/internal/label"
)

// Decode reads one object from Kubernetes JSON. The key is returned even with an error, as far as
// the object's name could be read, for the message.
func Decode(kind string, data []byte) (Object, Key, error) {
	key, err := DecodeKey(kind, data)
	if err != nil {
		return nil, key, err
	}
	object, err := decode(kind, data)
	if err != nil {
		return nil, key, fmt.Errorf("%s: %w", key, err)
	}
	return object, key, nil
}

// DecodeKey reads an object's name only.
func DecodeKey(kind string, data []byte) (Key, error) {
	key := Key{Kind: kind}
	var meta metav1.PartialObjectMetadata
	if err := json.Unmarshal(data, &meta); err != nil {
		return key, fmt.Errorf("%s: read metadata: %w", kind, err)
	}
	key.Namespace, key.Name = meta.Namespace, meta.Name
	if key.Name == "" {
		return key, fmt.Errorf("%s: metadata.name is empty", kind)
	}
	if err := checkName("metadata.name", key.Name); err != nil {
		return key, fmt.Errorf("%s: %w", kind, err)
	}
	if err := checkName("metadata.namespace", key.Namespace); err != nil {
		return key, fmt.Errorf("%s: %w", kind, err)
	}
	if namespaced(kind) == (key.Namespace == "") {
		return key, fmt.Errorf("%s: metadata.namespace is %q", key, key.Namespace)
	}
	return key, nil
}

func namespaced(kind string) bool {
	switch kind {
	case KindNode, KindNamespace, KindCiliumClusterwide, KindCiliumClusterwideEnvoyConfig, KindCiliumCIDRGroup, KindClusterNetworkPolicy, KindAdminNetworkPolicy, KindBaselineAdminNetworkPolicy:
		return false
	}
	return true
}

func decode(kind string, data []byte) (Object, error) {
	switch kind {
	case KindNode:
		return decodeAs(data, FromNode)
	case KindNamespace:
		return decodeAs(data, FromNamespace)
	case KindPod:
		return decodeAs(data, FromPod)
	case KindService:
		return decodeAs(data, FromService)
	case KindEndpointSlice:
		return decodeAs(data, FromEndpointSlice)
	}
	if slices.Contains(PolicyKinds(), kind) || IsEnvoy(kind) {
		return fromPolicy(kind, data)
	}
	return nil, errors.New("kind is not known")
}

func decodeAs[K any, O Object](data []byte, from func(*K) (O, error)) (Object, error) {
	var k K
	if err := json.Unmarshal(data, &k); err != nil {
		return nil, err
	}
	o, err := from(&k)
	if err != nil {
		return nil, err // not o: a nil pointer in an interface is not nil
	}
	return o, nil
}

// FromNode checks a node.
func FromNode(n *corev1.Node) (*Node, error) {
	node := &Node{Name: n.Name, Labels: n.Labels}
	errs := []error{label.Check(n.Labels)}
	for i, a := range n.Status.Addresses {
		if a.Type != corev1.NodeInternalIP && a.Type != corev1.NodeExternalIP {
			continue
		}
		addr, err := parseAddr(fmt.Sprintf("status.addresses[%d]", i), a.Address)
		errs = append(errs, err)
		node.Addresses = append(node.Addresses, addr)
	}
	cidrs := n.Spec.PodCIDRs
	if len(cidrs) == 0 && n.Spec.PodCIDR != "" {
		cidrs = []string{n.Spec.PodCIDR}
	}
	for i, c := range cidrs {
		prefix, err := netip.ParsePrefix(c)
		if err != nil {
			errs = append(errs, fmt.Errorf("spec.podCIDRs[%d]: %q is not a prefix", i, c))
			continue
		}
		node.PodCIDRs = append(node.PodCIDRs, prefix.Masked())
	}
	return node, errors.Join(errs...)
}

// FromNamespace checks a namespace.
func FromNamespace(n *corev1.Namespace) (*Namespace, error) {
	return &Namespace{Name: n.Name, Labels: n.Labels, Visibility: visibility(n.Annotations, AnnotationVisibility)}, label.Check(n.Labels)
}

// FromPod checks a pod.
func FromPod(p *corev1.Pod) (*Pod, error) {
	pod := &Pod{
		UID:            string(p.UID),
		Namespace:      p.Namespace,
		Name:           p.Name,
		Labels:         p.Labels,
		ServiceAccount: p.Spec.ServiceAccountName,
		Node:           p.Spec.NodeName,
		HostNetwork:    p.Spec.HostNetwork,
		Unmanaged:      p.Annotations[AnnotationUnmanaged] == "true",
		Cluster:        p.Annotations[AnnotationCluster],
		Reserved:       p.Annotations[AnnotationReserved],
		Finished:       p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
		Workload:       workload(p),
		Visibility:     visibility(p.Annotations, AnnotationVisibility, AnnotationVisibilityPolicy, AnnotationVisibilityOld),
	}
	errs := []error{label.Check(p.Labels)}
	errs = append(errs, checkName("spec.serviceAccountName", pod.ServiceAccount), checkName("metadata.annotations["+AnnotationCluster+"]", pod.Cluster))
	if pod.UID == "" {
		errs = append(errs, errors.New("metadata.uid is empty"))
	}
	for _, s := range strings.Split(p.Annotations[AnnotationAddresses], ",") {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		addr, err := parseAddr("metadata.annotations["+AnnotationAddresses+"]", s)
		errs = append(errs, err)
		pod.FixedAddresses = append(pod.FixedAddresses, addr)
	}
	status := p.Status.PodIPs
	if len(status) == 0 && p.Status.PodIP != "" {
		status = []corev1.PodIP{{IP: p.Status.PodIP}}
	}
	for i, ip := range status {
		addr, err := parseAddr(fmt.Sprintf("status.podIPs[%d]", i), ip.IP)
		errs = append(errs, err)
		pod.StatusAddresses = append(pod.StatusAddresses, addr)
	}
	for _, c := range p.Spec.Containers {
		for _, port := range c.Ports {
			number, err := parsePort("spec.containers["+c.Name+"].ports", port.ContainerPort)
			errs = append(errs, err)
			if port.Name == "" {
				continue
			}
			if pod.NamedPorts == nil {
				pod.NamedPorts = map[string]uint16{}
			}
			if _, taken := pod.NamedPorts[port.Name]; !taken {
				pod.NamedPorts[port.Name] = number
			}
			protocol, err := parseProtocol("spec.containers["+c.Name+"].ports", port.Protocol)
			errs = append(errs, err)
			pod.Ports = append(pod.Ports, NamedPort{Name: strings.ToLower(port.Name), Protocol: protocol, Port: number})
		}
	}
	slices.SortStableFunc(pod.Ports, func(a, b NamedPort) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Protocol, b.Protocol))
	})
	pod.Ports = slices.CompactFunc(pod.Ports, func(a, b NamedPort) bool { return a.Name == b.Name && a.Protocol == b.Protocol })
	return pod, errors.Join(errs...)
}

// visibility returns the first annotation that is given.
func visibility(annotations map[string]string, names ...string) Visibility {
	for _, name := range names {
		if text, ok := annotations[name]; ok {
			return Visibility{name, text}
		}
	}
	return Visibility{}
}

// workload names what a person would say owns the pod: the Deployment rather than its ReplicaSet,
// the CronJob rather than its Job. Both follow from how the API server's controllers make names.
func workload(p *corev1.Pod) Workload {
	owner := metav1.GetControllerOf(p)
	if owner == nil {
		if len(p.OwnerReferences) == 0 {
			return Workload{}
		}
		owner = &p.OwnerReferences[0]
	}
	switch owner.Kind {
	case "ReplicaSet":
		if hash := p.Labels["pod-template-hash"]; hash != "" {
			if name, ok := strings.CutSuffix(owner.Name, "-"+hash); ok && name != "" {
				return Workload{Kind: "Deployment", Name: name}
			}
		}
	case "Job":
		if i := strings.LastIndexByte(owner.Name, '-'); i > 0 && len(owner.Name)-i-1 >= 8 && digits(owner.Name[i+1:]) {
			return Workload{Kind: "CronJob", Name: owner.Name[:i]}
		}
	}
	return Workload{Kind: owner.Kind, Name: owner.Name}
}

// checkName refuses what no API server would have stored. Empty is fine here.
func checkName(field, s string) error {
	if len(s) > 253 || strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-.") != "" {
		return fmt.Errorf("%s: %.80q is not a name", field, s)
	}
	return nil
}

func digits(s string) bool { return strings.Trim(s, "0123456789") == "" }

func parsePort(field string, port int32) (uint16, error) {
	if port < 1 || port > 65535 {
		return 0, fmt.Errorf("%s: %d is not a port", field, port)
	}
	return uint16(port), nil
}

func parseProtocol(field string, protocol corev1.Protocol) (Protocol, error) {
	switch protocol {
	case "", corev1.ProtocolTCP:
		return TCP, nil
	case corev1.ProtocolUDP:
		return UDP, nil
	case corev1.ProtocolSCTP:
		return SCTP, nil
	}
	return "", fmt.Errorf("%s: protocol %q is not TCP, UDP or SCTP", field, protocol)
}
