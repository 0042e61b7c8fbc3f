// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Filters of kernels without tcx. One handle and priority a side: replacing one is atomic.
const (
	filterHandle   = 1
	filterPriority = 1
)

func clsactParent(ingress bool) uint32 {
	if ingress {
		return netlink.HANDLE_MIN_INGRESS
	}
	return netlink.HANDLE_MIN_EGRESS
}

// replaceFilter makes or replaces a clsact filter.
func replaceFilter(name string, ifindex int, prog *ebpf.Program, ingress bool) error {
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("clsact qdisc: %w", err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex,
			Parent:    clsactParent(ingress),
			Handle:    filterHandle,
			Priority:  filterPriority,
			Protocol:  unix.ETH_P_ALL,
		},
		Fd:           prog.FD(),
		Name:         name,
		DirectAction: true,
	}
	if err := netlink.FilterReplace(filter); err != nil {
		return fmt.Errorf("clsact filter: %w", err)
	}
	return nil
}

// removeFilter removes our filter of one side, if it is there.
func removeFilter(prefix string, ifindex int, ingress bool) error {
	l := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	filters, err := netlink.FilterList(l, clsactParent(ingress))
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return nil // no clsact qdisc, or no interface any more
	}
	if err != nil {
		return fmt.Errorf("clsact filters: %w", err)
	}
	for _, f := range filters {
		if bf, ok := f.(*netlink.BpfFilter); ok && strings.HasPrefix(bf.Name, prefix) {
			if err := netlink.FilterDel(bf); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("clsact filter %s: %w", bf.Name, err)
			}
		}
	}
	return nil
}

// removeFilters removes our filters of an interface, or of all of the network namespace when ifname is empty.
func removeFilters(prefix, ifname string) error {
	var links []netlink.Link
	if ifname == "" {
		all, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("list interfaces: %w", err)
		}
		links = all
	} else {
		l, err := netlink.LinkByName(ifname)
		var gone netlink.LinkNotFoundError
		if errors.As(err, &gone) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("interface %s: %w", ifname, err)
		}
		links = append(links, l)
	}
	var errs []error
	for _, l := range links {
		errs = append(errs, removeFilter(prefix, l.Attrs().Index, true), removeFilter(prefix, l.Attrs().Index, false))
	}
	return errors.Join(errs...)
}
