// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/bpf/datapath"
)

// What leads packets to the node's proxy, and packets of its upstream sockets to the node's own pair, so that a program sees every one of them.
const (
	proxyTable    = 200
	proxyPref     = 9
	upstreamTable = 201
	upstreamPref  = 8
	// upstreamBit is in the marks of all upstream sockets, and in no other of ours.
	upstreamBit = datapath.MarkRoutePassed
)

var families = []int{netlink.FAMILY_V4, netlink.FAMILY_V6}

// proxyRules are the rules of a family.
func proxyRules(family int) []*netlink.Rule {
	rule := func(pref, table int, mark, mask uint32) *netlink.Rule {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table, r.Mark, r.Mask = family, pref, table, mark, &mask
		return r
	}
	return []*netlink.Rule{
		rule(upstreamPref, upstreamTable, upstreamBit, upstreamBit),
		rule(proxyPref, proxyTable, datapath.MarkProxy, datapath.MarkMask),
	}
}

// SetupProxy makes the rules and routes that redirection to the node's proxy needs. The node's pair must be there.
func SetupProxy() error {
	lo, ok := LinkIndex("lo")
	if !ok {
		return errors.New("find lo: no such interface")
	}
	if err := SetUp("lo"); err != nil {
		return err
	}
	host, ok := LinkIndex(HostLink)
	if !ok {
		return fmt.Errorf("find %s: no such interface", HostLink)
	}
	for _, family := range families {
		everything := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		if family == netlink.FAMILY_V4 {
			everything = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		routes := []*netlink.Route{
			{Family: family, Table: proxyTable, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, LinkIndex: lo, Dst: prefixNet(everything), Protocol: routeProtocol},
			{Family: family, Table: upstreamTable, Scope: linkScope(family), LinkIndex: host, Dst: prefixNet(everything), Protocol: routeProtocol},
		}
		for _, r := range routes {
			if err := netlink.RouteReplace(r); err != nil {
				return fmt.Errorf("set default route of table %d: %w", r.Table, err)
			}
		}
		if err := syncRules(family, proxyRules(family)); err != nil {
			return err
		}
	}
	return nil
}

// syncRules makes the rules to our tables exactly these.
func syncRules(family int, want []*netlink.Rule) error {
	present, err := netlink.RuleList(family)
	if err != nil {
		return fmt.Errorf("list rules: %w", err)
	}
	for i := range present {
		have := &present[i]
		if have.Table != proxyTable && have.Table != upstreamTable {
			continue
		}
		if at := slices.IndexFunc(want, func(r *netlink.Rule) bool { return sameRule(have, r) }); at >= 0 {
			want = slices.Delete(slices.Clone(want), at, at+1)
			continue
		}
		have.Family = family
		if err := netlink.RuleDel(have); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove rule to table %d: %w", have.Table, err)
		}
	}
	for _, r := range want {
		if err := netlink.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add rule to table %d: %w", r.Table, err)
		}
	}
	return nil
}

func sameRule(a, b *netlink.Rule) bool {
	return a.Priority == b.Priority && a.Table == b.Table && a.Mark == b.Mark && a.Mask != nil && *a.Mask == *b.Mask && a.Src == nil && a.Dst == nil &&
		a.IifName == "" && a.OifName == "" && !a.Invert
}

// RemoveProxy undoes SetupProxy.
func RemoveProxy() error {
	var errs []error
	for _, family := range families {
		errs = append(errs, syncRules(family, nil))
		for _, table := range []int{proxyTable, upstreamTable} {
			routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
			if err != nil {
				errs = append(errs, fmt.Errorf("list routes of table %d: %w", table, err))
			}
			for i := range routes {
				if err := netlink.RouteDel(&routes[i]); err != nil && !errors.Is(err, unix.ESRCH) {
					errs = append(errs, fmt.Errorf("remove default route of table %d: %w", table, err))
				}
			}
		}
	}
	return errors.Join(errs...)
}

const (
	reservedPorts = "/proc/sys/net/ipv4/ip_local_reserved_ports"
	portRange     = "/proc/sys/net/ipv4/ip_local_port_range"
)

// ReservePorts keeps a pod's sockets from taking the source ports of the proxy's upstream sockets, which have the pod's address. Ports that the pod has
// reserved itself stay so.
func ReservePorts(ns *Namespace) error {
	return ns.Do(func() error {
		old, err := os.ReadFile(reservedPorts)
		if err != nil {
			return fmt.Errorf("read reserved ports: %w", err)
		}
		if want := addPorts(strings.TrimSpace(string(old)), datapath.UpstreamPortMin, datapath.UpstreamPortMax); want != "" {
			if err := os.WriteFile(reservedPorts, []byte(want), 0); err != nil {
				return fmt.Errorf("reserve ports %s: %w", want, err)
			}
		}
		return shortenRange()
	})
}

// shortenRange takes the reserved ports off the end of the range that ports are chosen from, where they are by default. Left in it, they are stepped over, and
// the first port after them is chosen each time: a TCP client that binds an address before it connects had port 32769 in every third case.
func shortenRange() error {
	text, err := os.ReadFile(portRange)
	if err != nil {
		return fmt.Errorf("read port range: %w", err)
	}
	var first, last int
	if _, err := fmt.Sscan(string(text), &first, &last); err != nil {
		return fmt.Errorf("port range %q: %w", strings.TrimSpace(string(text)), err)
	}
	if first >= datapath.UpstreamPortMin || last < datapath.UpstreamPortMin || last > datapath.UpstreamPortMax {
		return nil
	}
	want := fmt.Sprintf("%d %d", first, datapath.UpstreamPortMin-1)
	if err := os.WriteFile(portRange, []byte(want), 0); err != nil {
		return fmt.Errorf("choose ports from %s: %w", want, err)
	}
	return nil
}

// addPorts adds a range to a list of ranges as the kernel writes it; "" = it is there.
func addPorts(list string, first, last int) string {
	for r := range strings.SplitSeq(list, ",") {
		a, b, ok := strings.Cut(r, "-")
		if !ok {
			b = a
		}
		from, err1 := strconv.Atoi(a)
		to, err2 := strconv.Atoi(b)
		if err1 == nil && err2 == nil && from <= first && last <= to {
			return ""
		}
	}
	text := fmt.Sprintf("%d-%d", first, last)
	if list == "" {
		return text
	}
	return list + "," + text
}
