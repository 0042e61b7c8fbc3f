// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/cni"
	"github.com/weirmesh/weir/lab/internal/fabric"
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

// joinCentral plugs the central services in: an address for each possible replica, and a link that nodes' own processes alone take.
func (l *Lab) joinCentral() error {
	name := l.config.centralNetns()
	if err := fabric.Prepare(name, false); err != nil {
		return err
	}
	var addresses []netip.Prefix
	for n := range maxReplicas {
		addresses = append(addresses, netip.PrefixFrom(centralAddress(n+1), fabricV4.Bits()), netip.PrefixFrom(centralAddress6(n+1), fabricV6.Bits()))
	}
	return errors.Join(
		l.fabric.Join(name, addresses),
		l.fabric.JoinManagement(name, managementAddresses(0)),
		fabric.SetRoutes(name, fabric.Uplink, append(byDefault(), l.toNodes(cluster.NodeConfig{}, nil)...)),
	)
}

// managementTable is the routing table that a node's own processes look at first.
const managementTable = 77

// joinNode plugs node i in. What pods need on it is the agent's. Its agent reaches the central services by a link of its own: a policy for
// the node's uplink must not cut off who brings the policy.
func (l *Lab) joinNode(i int) error {
	node := l.nodes[i]
	name := l.config.nodeNetns(node.Name)
	if err := fabric.Prepare(name, true); err != nil {
		return err
	}
	var addresses []netip.Prefix
	for _, address := range node.Addresses {
		addresses = append(addresses, onFabric(address))
	}
	if err := errors.Join(l.fabric.Join(name, addresses), l.fabric.JoinManagement(name, managementAddresses(i+1))); err != nil {
		return err
	}
	routes := append(byDefault(), l.toNodes(node, addresses)...)
	var central []fabric.Route
	own, there := managementAddresses(i+1), managementAddresses(0)
	for n := range maxReplicas {
		central = append(central,
			fabric.Route{To: single(centralAddress(n + 1)), Via: []netip.Addr{there[0].Addr()}, Source: own[0].Addr(), Table: managementTable},
			fabric.Route{To: single(centralAddress6(n + 1)), Via: []netip.Addr{there[1].Addr()}, Source: own[1].Addr(), Table: managementTable})
	}
	return errors.Join(
		fabric.SetRoutes(name, fabric.Uplink, ofFamilies(routes, addresses)),
		fabric.SetRoutes(name, fabric.Management, central),
		fabric.OwnTraffic(name, managementTable),
	)
}

// managementAddresses are those of node n (from 1) on the management link, or of the central services (0).
func managementAddresses(n int) []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{169, 254, 77, byte(1 + n)}), 24),
		netip.PrefixFrom(netip.MustParseAddr(fmt.Sprintf("fd4d:474d::%x", 1+n)), 64),
	}
}

// onFabric gives an address the length of the fabric's subnet, when it is of that, else none.
func onFabric(address netip.Addr) netip.Prefix {
	for _, subnet := range []netip.Prefix{fabricV4, fabricV6} {
		if subnet.Masked().Contains(address) {
			return netip.PrefixFrom(address, subnet.Bits())
		}
	}
	return single(address)
}

func single(address netip.Addr) netip.Prefix { return netip.PrefixFrom(address, address.BitLen()) }

// toNodes are the ways of a member to what is on the link without being of a subnet that it has itself: nodes with addresses of their own,
// and, for such a node, the fabric. own are the member's addresses.
func (l *Lab) toNodes(member cluster.NodeConfig, own []netip.Prefix) []fabric.Route {
	var routes []fabric.Route
	for _, subnet := range []netip.Prefix{fabricV4, fabricV6} {
		source, has := netip.Addr{}, false
		for _, prefix := range own {
			if prefix.Addr().Is4() == subnet.Addr().Is4() {
				has = has || prefix.Bits() == subnet.Bits()
				if !source.IsValid() {
					source = prefix.Addr()
				}
			}
		}
		if source.IsValid() && !has {
			routes = append(routes, fabric.Route{To: subnet.Masked(), Source: source})
		}
	}
	for _, node := range l.nodes {
		if node.Name == member.Name {
			continue
		}
		for _, address := range node.Addresses {
			if onFabric(address).IsSingleIP() {
				routes = append(routes, fabric.Route{To: single(address)})
			}
		}
	}
	return routes
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
	routes := append([]fabric.Route{{To: fabricV4.Masked()}, {To: fabricV6.Masked()}}, o.lab.toNodes(cluster.NodeConfig{}, nil)...)
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
		routes = append(routes, fabric.Route{To: single(prefix.Addr())})
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
