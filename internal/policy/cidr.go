// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
)

// cidrItem is a prefix with holes.
type cidrItem struct {
	prefix netip.Prefix
	except []netip.Prefix
}

func (c cidrItem) String() string {
	if len(c.except) == 0 {
		return c.prefix.String()
	}
	texts := make([]string, len(c.except))
	for i, e := range c.except {
		texts[i] = e.String()
	}
	return c.prefix.String() + "-(" + strings.Join(texts, ",") + ")"
}

func (c cidrItem) contains(p netip.Prefix) bool {
	return covers(c.prefix, p) && !slices.ContainsFunc(c.except, func(e netip.Prefix) bool { return covers(e, p) })
}

func covers(outer, inner netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}

// cidrItems are a union of prefixes, canonical.
type cidrItems []cidrItem

func newCIDRItems(items []cidrItem) cidrItems {
	items = slices.Clone(items)
	for i := range items {
		except := slices.Clone(items[i].except)
		slices.SortFunc(except, comparePrefixes)
		items[i].except = slices.Compact(except)
	}
	slices.SortFunc(items, func(a, b cidrItem) int {
		if c := comparePrefixes(a.prefix, b.prefix); c != 0 {
			return c
		}
		return slices.CompareFunc(a.except, b.except, comparePrefixes)
	})
	return slices.CompactFunc(items, func(a, b cidrItem) bool { return a.prefix == b.prefix && slices.Equal(a.except, b.except) })
}

func comparePrefixes(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

// contains looks up every prefix that may contain p: lists may be long.
func (c cidrItems) contains(p netip.Prefix) bool {
	if len(c) < 8 {
		return slices.ContainsFunc(c, func(i cidrItem) bool { return i.contains(p) })
	}
	for bits := p.Bits(); bits >= 0; bits-- {
		outer := netip.PrefixFrom(p.Addr(), bits).Masked()
		i, _ := slices.BinarySearchFunc(c, outer, func(i cidrItem, p netip.Prefix) int { return comparePrefixes(i.prefix, p) })
		for ; i < len(c) && c[i].prefix == outer; i++ {
			if c[i].contains(p) {
				return true
			}
		}
	}
	return false
}

// within reports whether an address that lies in these networks, and in no other that was asked for, is in the union.
func (c cidrItems) within(networks []netip.Prefix) bool {
	return slices.ContainsFunc(c, func(i cidrItem) bool {
		return slices.Contains(networks, i.prefix) && !slices.ContainsFunc(i.except, func(e netip.Prefix) bool { return slices.Contains(networks, e) })
	})
}

func (c cidrItems) appendPrefixes(to []netip.Prefix) []netip.Prefix {
	for _, i := range c {
		to = append(append(to, i.prefix), i.except...)
	}
	return to
}

// parsePrefix reads a prefix; a bare address may be one of full length.
func parsePrefix(text string, bare bool) (netip.Prefix, error) {
	address, mask, slash := strings.Cut(text, "/")
	addr, err := netip.ParseAddr(address)
	switch {
	case err != nil || addr.Zone() != "":
		return netip.Prefix{}, errors.New("invalid CIDR address: " + text)
	case !slash && !bare:
		return netip.Prefix{}, errors.New("invalid CIDR address: " + text + ": no '/'")
	case !slash:
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	if m, err := netip.ParseAddr(mask); err == nil && m.Is4() {
		b := m.As4()
		if ones, bits := net.IPMask(b[:]).Size(); bits == 0 && ones == 0 {
			return netip.Prefix{}, errNonContiguous
		}
	}
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return netip.Prefix{}, errors.New("invalid CIDR address: " + text)
	}
	if p.Addr().Is4In6() {
		if p.Bits() < 96 {
			return netip.Prefix{}, errors.New("invalid CIDR address: " + text)
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

var errNonContiguous = errors.New("mask is not contiguous")

// cidr reads an item of fromCIDR.
func (r *reader) cidr(n node) netip.Prefix {
	text := r.str(n)
	if text == "" {
		r.fail(n, "IP must be specified")
		return netip.Prefix{}
	}
	p, err := parsePrefix(text, true)
	switch {
	case errors.Is(err, errNonContiguous):
		r.fail(n, "CIDR cannot specify non-contiguous mask %s", text)
	case err != nil:
		r.fail(n, "unable to parse CIDR: %v", err)
	}
	return p
}

// cidrRule reads a prefix of fromCIDRSet, which needs its slash.
func (r *reader) cidrRule(n node) netip.Prefix {
	text := r.str(n)
	p, err := parsePrefix(text, false)
	if err != nil {
		r.fail(n, "unable to parse CIDRRule %q: %v", text, err)
	}
	return p
}

// cidrList reads a list of prefixes, each as one item.
func (r *reader) cidrList(n node) []cidrItem {
	items, _ := r.list(n)
	var all []cidrItem
	for _, item := range items {
		all = append(all, cidrItem{prefix: r.cidr(item)})
	}
	return all
}

// cidrSet reads fromCIDRSet.
func (r *reader) cidrSet(n node) (static []cidrItem, groups []groupRef) {
	items, _ := r.items(n, "cidr", "cidrGroupRef", "cidrGroupSelector", "except")
	for _, item := range items {
		count := 0
		for _, k := range []string{"cidr", "cidrGroupRef", "cidrGroupSelector"} {
			// An empty text says nothing; an empty selector selects all groups.
			if v := item.child(k); !v.absent() && v.v != "" {
				count++
			}
		}
		switch {
		case count == 0:
			r.fail(item, "one of cidr, cidrGroupRef, or cidrGroupSelector is required")
		case count > 1:
			r.fail(item, "more than one of cidr, cidrGroupRef, or cidrGroupSelector may not be set")
		}
		if r.err != nil {
			return nil, nil
		}
		holes, _ := r.list(item.child("except"))
		var except []netip.Prefix
		for _, h := range holes {
			except = append(except, r.cidrRule(h))
		}
		if text := r.str(item.child("cidr")); text != "" {
			p := r.cidrRule(item.child("cidr"))
			r.holes(holes, p, except)
			static = append(static, cidrItem{p, except})
			continue
		}
		groups = append(groups, groupRef{r.str(item.child("cidrGroupRef")), r.selector(item.child("cidrGroupSelector"), sourced), except})
	}
	return static, groups
}

// holes checks that each hole lies within the prefix.
func (r *reader) holes(nodes []node, p netip.Prefix, except []netip.Prefix) {
	for i, e := range except {
		if r.err == nil && !covers(p, e) {
			r.fail(nodes[i], "allow CIDR prefix %s does not contain exclude CIDR prefix %s", p, e)
		}
	}
}
