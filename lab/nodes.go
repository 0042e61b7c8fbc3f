// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/manifest"
)

// defaultNodes is how many nodes there are when nobody says.
const defaultNodes = 2

// planNodes decides which nodes the lab has: as many as it was told, or those of the manifests. Node manifests say which addresses and pod CIDRs
// they have; what one does not say has its default.
func (l *Lab) planNodes() error {
	given := l.givenNodes()
	count := l.config.Nodes
	if len(given) > maxNodes {
		return fmt.Errorf("manifests have %d nodes, a lab has at most %d", len(given), maxNodes)
	}
	if count == 0 && len(given) > 0 {
		for i, n := range nodeNumbers(given) {
			l.nodes = append(l.nodes, l.config.nodeConfig(n, given[i].Object.GetName()))
		}
	}
	if count == 0 {
		count = defaultNodes
	}
	if len(l.nodes) == 0 {
		for n := range count {
			l.nodes = append(l.nodes, l.config.nodeConfig(n+1, "node"+strconv.Itoa(n+1)))
		}
	}
	var errs []error
	for _, item := range given {
		errs = append(errs, l.adoptNode(item))
	}
	return errors.Join(append(errs, l.checkNodes())...)
}

func (l *Lab) givenNodes() []manifest.Item {
	var given []manifest.Item
	for _, item := range l.items {
		// The same node in two files is a fault that is found later.
		if item.Key().Kind == "Node" && !slices.ContainsFunc(given, func(o manifest.Item) bool { return o.Key() == item.Key() }) {
			given = append(given, item)
		}
	}
	return given
}

// nodeNumbers are what nodes' default addresses are made of: of node7 it is 7, of others the first that is free.
func nodeNumbers(nodes []manifest.Item) []int {
	numbers := make([]int, len(nodes))
	taken := map[int]bool{}
	for i, node := range nodes {
		if n, ok := ownNumber(node.Object.GetName()); ok && !taken[n] {
			numbers[i], taken[n] = n, true
		}
	}
	next := 1
	for i := range numbers {
		for numbers[i] == 0 {
			if !taken[next] {
				numbers[i], taken[next] = next, true
			}
			next++
		}
	}
	return numbers
}

func ownNumber(name string) (int, bool) {
	n, err := strconv.Atoi(strings.TrimPrefix(name, "node"))
	return n, err == nil && strings.HasPrefix(name, "node") && n >= 1 && n <= maxNodes
}

// adoptNode takes over what a manifest says of a node.
func (l *Lab) adoptNode(item manifest.Item) error {
	node := item.Object.(*corev1.Node)
	fault := func(field, format string, args ...any) error {
		return manifest.Fault{File: item.File, Line: item.Line, Field: field, Expected: fmt.Sprintf(format, args...)}
	}
	i := slices.IndexFunc(l.nodes, func(n cluster.NodeConfig) bool { return n.Name == node.Name })
	switch {
	case slices.Contains(reservedNames, node.Name):
		return fault("metadata.name", "%s is a name of the lab's own", node.Name)
	case i < 0:
		return fault("metadata.name", "%s is not a node of this lab, which has node1 to node%d", node.Name, len(l.nodes))
	}
	var addresses []netip.Addr
	for _, a := range node.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		address, err := netip.ParseAddr(a.Address)
		if err != nil || address.Zone() != "" || address.Is4In6() || address.IsUnspecified() || address.IsMulticast() || address.IsLoopback() {
			return fault("status.addresses", "expected an address that a node can have, got %s", a.Address)
		}
		if !l.config.hasFamily(address) {
			return fault("status.addresses", "%s is not of a family that this lab has (--ip-families)", a.Address)
		}
		addresses = append(addresses, address)
	}
	var cidrs []netip.Prefix
	for _, text := range node.Spec.PodCIDRs {
		cidr, err := netip.ParsePrefix(text)
		if err != nil {
			continue // the manifest was checked
		}
		if !l.config.hasFamily(cidr.Addr()) {
			return fault("spec.podCIDRs", "%s is not of a family that this lab has (--ip-families)", text)
		}
		cidrs = append(cidrs, cidr)
	}
	// A family of which the manifest says nothing has its default: a node without one could not have pods of it.
	l.nodes[i].Addresses = withDefaults(addresses, l.nodes[i].Addresses, netip.Addr.Is4)
	l.nodes[i].PodCIDRs = withDefaults(cidrs, l.nodes[i].PodCIDRs, func(p netip.Prefix) bool { return p.Addr().Is4() })
	return nil
}

// withDefaults adds those defaults of whose family nothing is given.
func withDefaults[T any](given, defaults []T, is4 func(T) bool) []T {
	all := slices.Clone(given)
	for _, d := range defaults {
		if !slices.ContainsFunc(given, func(g T) bool { return is4(g) == is4(d) }) {
			all = append(all, d)
		}
	}
	return all
}

// checkNodes reports addresses and CIDRs that two would have.
func (l *Lab) checkNodes() error {
	owners := map[netip.Addr]string{fabricV4.Addr(): "the fabric", fabricV6.Addr(): "the fabric"}
	for n := range maxReplicas {
		owners[centralAddress(n+1)], owners[centralAddress6(n+1)] = "the central services", "the central services"
	}
	var errs []error
	for i, node := range l.nodes {
		for _, address := range node.Addresses {
			if owner, taken := owners[address]; taken {
				errs = append(errs, fmt.Errorf("node %s: address %s belongs to %s", node.Name, address, owner))
			}
			owners[address] = node.Name
		}
		for _, other := range l.nodes[:i] {
			for _, cidr := range node.PodCIDRs {
				if slices.ContainsFunc(other.PodCIDRs, cidr.Overlaps) {
					errs = append(errs, fmt.Errorf("node %s: pod CIDR %s overlaps with one of %s", node.Name, cidr, other.Name))
				}
			}
		}
	}
	return errors.Join(errs...)
}
