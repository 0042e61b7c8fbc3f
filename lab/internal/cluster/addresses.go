// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/lab/internal/object"
)

// allocator gives ClusterIPs to services. Both families of a service have the same place in their ranges: 10.96.1.4 and fd00:10:96::104.
type allocator struct {
	v4, v6   netip.Prefix
	families []corev1.IPFamily
	// reserved addresses are given to their service alone, unless another one asks for them first.
	reserved map[netip.Addr]object.Key
	taken    map[netip.Addr]object.Key
	next     uint16

	// balancers are the pools of load balancers' addresses, balanced those that are given.
	balancers [2]netip.Prefix
	balanced  map[netip.Addr]object.Key
	ports     map[nodePort]object.Key
	nextPort  int32
}

// firstPlace leaves the beginning of the range to fixed addresses (the API server's, DNS).
const firstPlace = 0x100

func newAllocator(config Config) *allocator {
	dns := object.Key{Kind: "Service", Namespace: SystemNamespace, Name: DNSService}
	return &allocator{
		v4: config.ServiceV4, v6: config.ServiceV6, families: config.Families, next: firstPlace,
		reserved:  map[netip.Addr]object.Key{config.DNSV4: dns, config.DNSV6: dns},
		taken:     map[netip.Addr]object.Key{},
		balancers: [2]netip.Prefix{config.BalancerV4, config.BalancerV6},
		balanced:  map[netip.Addr]object.Key{},
		ports:     map[nodePort]object.Key{}, nextPort: firstNodePort,
	}
}

func (a *allocator) clone() *allocator {
	c := *a
	c.taken, c.balanced, c.ports = maps.Clone(a.taken), maps.Clone(a.balanced), maps.Clone(a.ports)
	return &c
}

// place returns an address of a range by its number.
func place(prefix netip.Prefix, n uint16) netip.Addr {
	b := prefix.Addr().AsSlice()
	tail := b[len(b)-2:]
	binary.BigEndian.PutUint16(tail, binary.BigEndian.Uint16(tail)|n)
	address, _ := netip.AddrFromSlice(b)
	return address
}

// wanted returns the addresses that a service asks for.
func wanted(service *corev1.Service) []netip.Addr {
	texts := slices.Clone(service.Spec.ClusterIPs)
	if service.Spec.ClusterIP != "" && !slices.Contains(texts, service.Spec.ClusterIP) {
		texts = append([]string{service.Spec.ClusterIP}, texts...)
	}
	var addresses []netip.Addr
	for _, text := range texts {
		if address, err := netip.ParseAddr(text); err == nil {
			addresses = append(addresses, address)
		}
	}
	return addresses
}

// admit checks the addresses and ports a service asks for, and takes them. An error comes with the field that it is about. ClusterIPs may be
// outside of the ranges, unlike in Kubernetes: a test may have to stand in for another cluster's.
func (a *allocator) admit(service, current *corev1.Service) (field string, err error) {
	key := object.KeyOf(service)
	for _, address := range wanted(service) {
		switch owner, taken := a.taken[address]; {
		case !a.has(address):
			return "spec.clusterIP", fmt.Errorf("%s is not of a family that this lab has", address)
		case taken && owner != key || a.balanced[address] != object.Key{}:
			return "spec.clusterIP", fmt.Errorf("%s belongs to %s", address, owner)
		case current != nil && !slices.Contains(wanted(current), address):
			return "spec.clusterIP", fmt.Errorf("a service keeps its address, %s: delete it first", current.Spec.ClusterIP)
		}
		a.taken[address] = key
	}
	for i, family := range service.Spec.IPFamilies {
		if !slices.Contains(a.families, family) {
			return fmt.Sprintf("spec.ipFamilies[%d]", i), fmt.Errorf("this lab has no %s", family)
		}
	}
	return a.admitOutside(service)
}

// has reports whether the cluster has an address's family.
func (a *allocator) has(address netip.Addr) bool {
	family := corev1.IPv6Protocol
	if address.Is4() {
		family = corev1.IPv4Protocol
	}
	return slices.Contains(a.families, family)
}

func (a *allocator) owner(address netip.Addr) (object.Key, bool) {
	if key, ok := a.reserved[address]; ok {
		return key, true
	}
	key, ok := a.taken[address]
	return key, ok
}

// complete fills a service's addresses, families and ports in; those of its earlier state stay.
func (a *allocator) complete(service, previous *corev1.Service) {
	a.completeCluster(service, previous)
	a.completeOutside(service, previous)
}

func (a *allocator) completeCluster(service, previous *corev1.Service) {
	spec := &service.Spec
	key := object.KeyOf(service)
	if spec.ClusterIP == corev1.ClusterIPNone || slices.Contains(spec.ClusterIPs, corev1.ClusterIPNone) {
		spec.ClusterIP, spec.ClusterIPs = corev1.ClusterIPNone, []string{corev1.ClusterIPNone}
		spec.IPFamilies = a.familiesOf(spec)
		return
	}
	if previous != nil && previous.Spec.ClusterIP != corev1.ClusterIPNone {
		spec.ClusterIP, spec.ClusterIPs = previous.Spec.ClusterIP, slices.Clone(previous.Spec.ClusterIPs)
		spec.IPFamilies, spec.IPFamilyPolicy = previous.Spec.IPFamilies, previous.Spec.IPFamilyPolicy
		return
	}
	given := wanted(service)
	spec.IPFamilies = a.familiesOf(spec)
	n, fixed := a.placeOf(given, key)
	if !fixed {
		n = a.free()
	}
	spec.ClusterIPs = nil
	for _, family := range spec.IPFamilies {
		prefix := a.v4
		if family == corev1.IPv6Protocol {
			prefix = a.v6
		}
		address := place(prefix, n)
		for _, g := range given {
			if g.Is4() == address.Is4() {
				address = g
			}
		}
		a.taken[address] = key
		spec.ClusterIPs = append(spec.ClusterIPs, address.String())
	}
	spec.ClusterIP = spec.ClusterIPs[0]
}

// placeOf returns the place that goes with addresses that are given, or that are kept for this service.
func (a *allocator) placeOf(given []netip.Addr, key object.Key) (uint16, bool) {
	for address, owner := range a.reserved {
		if owner == key && address.Is4() && len(given) == 0 {
			given = append(given, address)
		}
	}
	if len(given) == 0 {
		return 0, false
	}
	b := given[0].AsSlice()
	n := binary.BigEndian.Uint16(b[len(b)-2:])
	for _, prefix := range []netip.Prefix{a.v4, a.v6} {
		if owner, taken := a.owner(place(prefix, n)); taken && owner != key {
			return 0, false
		}
	}
	return n, true
}

// free returns the next place of which neither address is taken.
func (a *allocator) free() uint16 {
	for {
		n := a.next
		if a.next++; a.next == 0xffff {
			a.next = firstPlace
		}
		_, v4 := a.owner(place(a.v4, n))
		_, v6 := a.owner(place(a.v6, n))
		if !v4 && !v6 {
			return n
		}
	}
}

func (a *allocator) release(service *corev1.Service) {
	key := object.KeyOf(service)
	for _, address := range wanted(service) {
		delete(a.taken, address)
	}
	a.releaseOutside(key)
}

// familiesOf returns a service's families: all of the cluster's, unless it asks for less.
func (a *allocator) familiesOf(spec *corev1.ServiceSpec) []corev1.IPFamily {
	chosen := slices.Clone(spec.IPFamilies)
	if len(chosen) == 0 {
		chosen = slices.Clone(a.families)
		if address, err := netip.ParseAddr(spec.ClusterIP); err == nil && address.Is4() != (chosen[0] == corev1.IPv4Protocol) {
			slices.Reverse(chosen)
		}
	}
	if spec.IPFamilyPolicy == nil {
		policy := corev1.IPFamilyPolicyPreferDualStack
		if len(chosen) == 1 {
			policy = corev1.IPFamilyPolicySingleStack
		}
		spec.IPFamilyPolicy = &policy
	}
	if *spec.IPFamilyPolicy == corev1.IPFamilyPolicySingleStack {
		chosen = chosen[:1]
	}
	return chosen
}
