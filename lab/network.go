// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/cni"
	"github.com/weirmesh/weir/lab/internal/fabric"
	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/netns"
)

var (
	everything4 = netip.MustParsePrefix("0.0.0.0/0")
	everything6 = netip.MustParsePrefix("::/0")
)

// byDefault are the routes of a member of the fabric to what it does not know.
func byDefault() []fabric.Route {
	return []fabric.Route{
		{To: everything4, Via: []netip.Addr{fabricV4.Addr()}},
		{To: everything6, Via: []netip.Addr{fabricV6.Addr()}},
	}
}

// adoptNodes lets Node manifests say which addresses and pod CIDRs the nodes have.
func (l *Lab) adoptNodes() error {
	var errs []error
	for _, item := range l.items {
		node, ok := item.Object.(*corev1.Node)
		if !ok {
			continue
		}
		fault := func(field, format string, args ...any) {
			errs = append(errs, manifest.Fault{File: item.File, Line: item.Line, Field: field, Expected: fmt.Sprintf(format, args...)})
		}
		i := slices.IndexFunc(l.nodes, func(n cluster.NodeConfig) bool { return n.Name == node.Name })
		if i < 0 {
			fault("metadata.name", "%s is not a node of this lab, which has node1 to node%d", node.Name, len(l.nodes))
			continue
		}
		var addresses []netip.Addr
		for _, a := range node.Status.Addresses {
			if a.Type != corev1.NodeInternalIP {
				continue
			}
			address, err := netip.ParseAddr(a.Address)
			if err != nil || !fabricV4.Masked().Contains(address) && !fabricV6.Masked().Contains(address) {
				fault("status.addresses", "expected an address of the fabric, %s or %s, got %s", fabricV4.Masked(), fabricV6.Masked(), a.Address)
				continue
			}
			addresses = append(addresses, address)
		}
		if len(addresses) > 0 {
			l.nodes[i].Addresses = addresses
		}
		var cidrs []netip.Prefix
		for _, text := range node.Spec.PodCIDRs {
			if cidr, err := netip.ParsePrefix(text); err == nil {
				cidrs = append(cidrs, cidr)
			}
		}
		if len(cidrs) > 0 {
			l.nodes[i].PodCIDRs = cidrs
		}
	}
	return errors.Join(append(errs, l.checkNodes())...)
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

// joinCentral plugs the central services in: an address for each possible replica.
func (l *Lab) joinCentral() error {
	name := l.config.centralNetns()
	if err := fabric.Prepare(name, false); err != nil {
		return err
	}
	var addresses []netip.Prefix
	for n := range maxReplicas {
		addresses = append(addresses, netip.PrefixFrom(centralAddress(n+1), fabricV4.Bits()), netip.PrefixFrom(centralAddress6(n+1), fabricV6.Bits()))
	}
	if err := l.fabric.Join(name, addresses); err != nil {
		return err
	}
	return fabric.SetRoutes(name, fabric.Uplink, byDefault())
}

// joinNode plugs a node in. What pods need on it is the agent's.
func (l *Lab) joinNode(node cluster.NodeConfig) error {
	name := l.config.nodeNetns(node.Name)
	if err := fabric.Prepare(name, true); err != nil {
		return err
	}
	var addresses []netip.Prefix
	for _, address := range node.Addresses {
		bits := fabricV4.Bits()
		if address.Is6() {
			bits = fabricV6.Bits()
		}
		addresses = append(addresses, netip.PrefixFrom(address, bits))
	}
	if err := l.fabric.Join(name, addresses); err != nil {
		return err
	}
	return fabric.SetRoutes(name, fabric.Uplink, byDefault())
}

func (l *Lab) plugin(node string) cni.Plugin {
	return cni.Plugin{
		Self: l.config.Self, Path: filepath.Join(l.config.BinDir, "weir-cni"), Netns: netns.Path(l.config.nodeNetns(node)),
		Cgroup: l.partsCgroup(), Socket: l.agentSocket(node),
	}
}

// outside joins hosts that do not belong to the cluster.
type outside struct{ lab *Lab }

// Join plugs a host's namespace into the fabric: it reaches nodes directly, pods and services by way of the nodes.
func (o *outside) Join(namespace string, addresses []netip.Prefix) error {
	if err := o.lab.fabric.Join(namespace, addresses); err != nil {
		return err
	}
	routes := []fabric.Route{{To: fabricV4.Masked()}, {To: fabricV6.Masked()}}
	var via4, via6 []netip.Addr
	for _, node := range o.lab.nodes {
		gateway4, gateway6 := first(node.Addresses, netip.Addr.Is4), first(node.Addresses, netip.Addr.Is6)
		for _, cidr := range node.PodCIDRs {
			gateway := gateway4
			if cidr.Addr().Is6() {
				gateway = gateway6
			}
			if gateway.IsValid() {
				routes = append(routes, fabric.Route{To: cidr, Via: []netip.Addr{gateway}})
			}
		}
		if gateway4.IsValid() {
			via4 = append(via4, gateway4)
		}
		if gateway6.IsValid() {
			via6 = append(via6, gateway6)
		}
	}
	if len(via4) > 0 {
		routes = append(routes, fabric.Route{To: serviceV4, Via: via4})
	}
	if len(via6) > 0 {
		routes = append(routes, fabric.Route{To: serviceV6, Via: via6})
	}
	routes = append(routes, byDefault()...)
	if err := fabric.SetRoutes(namespace, fabric.Uplink, ofFamilies(routes, addresses)); err != nil {
		return err
	}
	to := onLink(addresses)
	for _, node := range o.lab.nodes {
		if err := fabric.SetRoutes(o.lab.config.nodeNetns(node.Name), fabric.Uplink, to); err != nil {
			return err
		}
	}
	return errors.Join(
		fabric.SetRoutes(o.lab.config.centralNetns(), fabric.Uplink, to),
		fabric.SetRoutes(o.lab.config.fabricNetns(), fabric.Bridge, to),
	)
}

// Leave takes the routes to a host out again.
func (o *outside) Leave(addresses []netip.Prefix) error {
	to := onLink(addresses)
	errs := []error{
		fabric.DeleteRoutes(o.lab.config.centralNetns(), fabric.Uplink, to),
		fabric.DeleteRoutes(o.lab.config.fabricNetns(), fabric.Bridge, to),
	}
	for _, node := range o.lab.nodes {
		errs = append(errs, fabric.DeleteRoutes(o.lab.config.nodeNetns(node.Name), fabric.Uplink, to))
	}
	return errors.Join(errs...)
}

// onLink are routes to the addresses themselves, which are all on the bridge.
func onLink(addresses []netip.Prefix) []fabric.Route {
	var routes []fabric.Route
	for _, prefix := range addresses {
		routes = append(routes, fabric.Route{To: netip.PrefixFrom(prefix.Addr(), prefix.Addr().BitLen())})
	}
	return routes
}

// ofFamilies leaves out the routes of a family in which a host has no address: they would lead nowhere.
func ofFamilies(routes []fabric.Route, addresses []netip.Prefix) []fabric.Route {
	return slices.DeleteFunc(routes, func(r fabric.Route) bool {
		return !slices.ContainsFunc(addresses, func(p netip.Prefix) bool { return p.Addr().Is4() == r.To.Addr().Is4() })
	})
}

func first(addresses []netip.Addr, wanted func(netip.Addr) bool) netip.Addr {
	if i := slices.IndexFunc(addresses, wanted); i >= 0 {
		return addresses[i]
	}
	return netip.Addr{}
}
