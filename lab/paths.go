// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/preflight"
)

// Roots of what a lab makes outside of its own folders.
const (
	runRoot   = "/run/weir"
	stateRoot = "/var/lib/weir"
	bpfRoot   = preflight.BPFFS + "/weir"
)

// RunDir is where a lab's sockets, certificates, logs and ledger are.
func RunDir(name string) string { return filepath.Join(runRoot, name) }

// Socket is where a lab's supervisor listens.
func Socket(name string) string { return filepath.Join(RunDir(name), "lab.sock") }

func ledgerPath(name string) string { return filepath.Join(RunDir(name), "state.json") }

// Addresses of every lab: each has a fabric of its own, so they may be the same.
var (
	fabricV4  = netip.MustParsePrefix("172.30.0.1/24")
	fabricV6  = netip.MustParsePrefix("fd30::1/64")
	serviceV4 = netip.MustParsePrefix("10.96.0.0/16")
	serviceV6 = netip.MustParsePrefix("fd00:10:96::/112")
	// Where addresses of LoadBalancer services come from.
	balancerV4 = netip.MustParsePrefix("198.18.0.0/24")
	balancerV6 = netip.MustParsePrefix("fd00:198:18::/112")
	dnsV4      = netip.MustParseAddr("10.96.0.10")
	dnsV6      = netip.MustParseAddr("fd00:10:96::a")
)

// Ports of the central services.
const (
	natsPort     = 4222
	identityPort = 18002
	policyPort   = 18001
	relayPort    = 4244
	sourcePort   = 18003
	xdsPort      = 18000
)

// centralAddress is where the n-th replica (from 1) of every central service listens: .2, .3 and so on.
func centralAddress(n int) netip.Addr { return netip.AddrFrom4([4]byte{172, 30, 0, byte(1 + n)}) }

func centralAddress6(n int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("fd30::%d", 1+n)) }

func hostPort(address netip.Addr, port int) string {
	return netip.AddrPortFrom(address, uint16(port)).String()
}

// nodeConfig is node n (from 1). Its number shows in all of its addresses.
func (c *Config) nodeConfig(n int, name string) cluster.NodeConfig {
	node := cluster.NodeConfig{Name: name}
	for _, family := range c.Families {
		if family == corev1.IPv4Protocol {
			node.Addresses = append(node.Addresses, netip.AddrFrom4([4]byte{172, 30, 0, byte(10 + n)}))
			node.PodCIDRs = append(node.PodCIDRs, netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", n)))
			continue
		}
		node.Addresses = append(node.Addresses, netip.MustParseAddr(fmt.Sprintf("fd30::%d", 10+n)))
		node.PodCIDRs = append(node.PodCIDRs, netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%d::/64", n)))
	}
	return node
}

// hasFamily reports whether the lab has an address's family.
func (c *Config) hasFamily(address netip.Addr) bool {
	return slices.ContainsFunc(c.Families, func(f corev1.IPFamily) bool { return (f == corev1.IPv4Protocol) == address.Is4() })
}

// central is the address of the n-th replica (from 1) of every central service, of a family that all nodes have.
func (c *Config) central(n int) netip.Addr {
	if slices.Contains(c.Families, corev1.IPv4Protocol) {
		return centralAddress(n)
	}
	return centralAddress6(n)
}

// dns is the address of the cluster's DNS that pods are told.
func (c *Config) dns() netip.Addr {
	if slices.Contains(c.Families, corev1.IPv4Protocol) {
		return dnsV4
	}
	return dnsV6
}

// Namespaces of a lab.
func (c *Config) fabricNetns() string          { return "weir-" + c.Name + "-fabric" }
func (c *Config) centralNetns() string         { return "weir-" + c.Name + "-central" }
func (c *Config) nodeNetns(node string) string { return "weir-" + c.Name + "-" + node }

// reservedNames are what a node or host cannot be called, since the lab's own namespaces are.
var reservedNames = []string{"fabric", "central"}
