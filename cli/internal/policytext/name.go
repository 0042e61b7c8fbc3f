// SPDX-License-Identifier: Apache-2.0

// Package policytext says in words what the policy service and the agents
// answer about policies: names of objects and rules, where a policy is in force,
// why a connection passes or not, and whether the kernel has the same.
package policytext

import (
	"fmt"
	"strconv"
	"strings"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// NamePrefix begins an end of a connection that is known by the name that DNS gave it.
const NamePrefix = "name:"

// Object names a policy object: "CiliumNetworkPolicy default/api"; without a namespace it is of the whole cluster.
func Object(kind, namespace, name string) string {
	if namespace != "" {
		name = namespace + "/" + name
	}
	return strings.TrimSpace(kind + " " + name)
}

// Rule names a rule: "CiliumNetworkPolicy default/api ingress[0]", and "rule 2 ingress[0]" in the third rule object of an object with several.
func Rule(r *policyv1.PolicyRule) string {
	if r.GetImplicit() != "" {
		return r.GetImplicit()
	}
	return Object(r.GetKind(), r.GetNamespace(), r.GetName()) + " " + Place(r)
}

// Place is where a rule stands in its object: "ingress[0]".
func Place(r *policyv1.PolicyRule) string {
	list := r.GetList()
	if r.GetSpec() > 0 {
		list = fmt.Sprintf("rule %d %s", r.GetSpec(), list)
	}
	return fmt.Sprintf("%s[%d]", list, r.GetIndex())
}

// Rules names several rules.
func Rules(list []*policyv1.PolicyRule) string {
	words := make([]string, len(list))
	for i, r := range list {
		words[i] = Rule(r)
	}
	return strings.Join(words, ", ")
}

// Verdict in words.
func Verdict(v policyv1.Verdict) string {
	switch v {
	case policyv1.Verdict_VERDICT_ALLOW:
		return "allow"
	case policyv1.Verdict_VERDICT_DEFAULT_DENY:
		return "default deny"
	case policyv1.Verdict_VERDICT_DENY:
		return "deny"
	}
	return "unknown"
}

// Direction in words.
func Direction(d policyv1.Direction) string {
	switch d {
	case policyv1.Direction_DIRECTION_INGRESS:
		return "ingress"
	case policyv1.Direction_DIRECTION_EGRESS:
		return "egress"
	}
	return "-"
}

// IP protocols that have a name here.
const (
	icmp   = 1
	tcp    = 6
	udp    = 17
	icmpv6 = 58
	sctp   = 132
)

// Protocol names an IP protocol; 0 is any.
func Protocol(n uint32) string {
	switch n {
	case 0:
		return "any"
	case icmp:
		return "ICMP"
	case tcp:
		return "TCP"
	case udp:
		return "UDP"
	case icmpv6:
		return "ICMPv6"
	case sctp:
		return "SCTP"
	}
	return strconv.FormatUint(uint64(n), 10)
}

// Port is such as "8080/TCP", "ICMP type 8".
func Port(protocol, port uint32) string {
	if protocol == icmp || protocol == icmpv6 {
		return fmt.Sprintf("%s type %d", Protocol(protocol), port)
	}
	return fmt.Sprintf("%d/%s", port, Protocol(protocol))
}

// Ports is a range as the kernel has it: "80", "8000-8080", "all", "type 8".
func Ports(protocol, first, last uint32) string {
	whole := uint32(65535)
	prefix := ""
	if protocol == icmp || protocol == icmpv6 {
		whole, prefix = 255, "type "
	}
	switch {
	case protocol == 0, first == 0 && last >= whole:
		return "all"
	case first == last:
		return fmt.Sprintf("%s%d", prefix, first)
	}
	return fmt.Sprintf("%s%d-%d", prefix, first, last)
}

// What Weir adds to the labels of a pod.
const (
	namespaceLabel      = "k8s:io.kubernetes.pod.namespace="
	serviceAccountLabel = "k8s:io.cilium.k8s.policy.serviceaccount="
	clusterLabel        = "k8s:io.cilium.k8s.policy.cluster="
	ofNamespaceLabel    = "k8s:io.cilium.k8s.namespace.labels."
	nameOfNamespace     = ofNamespaceLabel + "kubernetes.io/metadata.name="
)

// Labels says the labels of an identity shortly: its own ones first, then the namespace and what else is not as everywhere.
func Labels(list []string) []string {
	var own, added []string
	for _, l := range list {
		switch {
		case strings.HasPrefix(l, namespaceLabel):
			added = append([]string{"(namespace " + l[len(namespaceLabel):] + ")"}, added...)
		case l == serviceAccountLabel+"default", l == clusterLabel+"default", strings.HasPrefix(l, nameOfNamespace):
		case strings.HasPrefix(l, serviceAccountLabel):
			added = append(added, "(service account "+l[len(serviceAccountLabel):]+")")
		case strings.HasPrefix(l, clusterLabel):
			added = append(added, "(cluster "+l[len(clusterLabel):]+")")
		case strings.HasPrefix(l, ofNamespaceLabel):
			added = append(added, "(namespace has "+l[len(ofNamespaceLabel):]+")")
		default:
			own = append(own, l)
		}
	}
	return append(own, added...)
}
