// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/weirmesh/weir/internal/policy"
)

func sortedKeys[K comparable, V any](m map[K]V, compare func(a, b K) int) []K {
	return slices.SortedFunc(maps.Keys(m), compare)
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

func comparePorts(a, b policy.NamedPort) int {
	return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Port, b.Port))
}

func compareServices(a, b policy.Service) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

func equalServices(a, b policy.Service) bool {
	return a.Namespace == b.Namespace && a.Name == b.Name && slices.Equal(a.Labels, b.Labels) &&
		(a.Selector == nil) == (b.Selector == nil) && maps.Equal(a.Selector, b.Selector) && slices.Equal(a.Addresses, b.Addresses)
}

func equalPeers(a, b *policy.Peer) bool {
	return a.Key == b.Key && a.Prefix == b.Prefix && slices.Equal(a.Labels, b.Labels) && slices.Equal(a.Networks, b.Networks) &&
		slices.Equal(a.NamedPorts, b.NamedPorts)
}
