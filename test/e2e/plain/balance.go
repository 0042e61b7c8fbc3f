// SPDX-License-Identifier: Apache-2.0

package plain

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
)

// Target is a service of the baseline's rules that leads to pod c, all its ports unchanged.
var Target = netip.MustParseAddr("10.97.128.1")

// balanced are the ports of services.
var balanced = []int{7100, 7102}

// front is the address of the i-th other service.
func front(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 97, byte(i / 250), byte(2 + i%250)}) }

// IPTables puts kube-proxy's kind of rules for a number of services into node1: a list of services that is gone through in order, a chain for each service and for
// each backend. Target stands in the middle of the list.
func (n *Network) IPTables(services int) error {
	var head, list, chains strings.Builder
	head.WriteString("*nat\n:KUBE-SERVICES - [0:0]\n")
	add := func(i int, vip netip.Addr) {
		for _, port := range balanced {
			svc, sep := fmt.Sprintf("KUBE-SVC-%d-%d", i, port), fmt.Sprintf("KUBE-SEP-%d-%d", i, port)
			fmt.Fprintf(&head, ":%s - [0:0]\n:%s - [0:0]\n", svc, sep)
			fmt.Fprintf(&list, "-A KUBE-SERVICES -d %s/32 -p tcp -m tcp --dport %d -j %s\n", vip, port, svc)
			fmt.Fprintf(&chains, "-A %s -j %s\n-A %s -p tcp -m tcp -j DNAT --to-destination %s:%d\n", svc, sep, sep, Pods["c"], port)
		}
	}
	for i := range services - 1 {
		if i == services/2 {
			add(services, Target)
		}
		add(i, front(i))
	}
	if services < 3 {
		add(services, Target)
	}
	rules := head.String() + "-A PREROUTING -j KUBE-SERVICES\n" + list.String() + chains.String() + "COMMIT\n"
	return n.feed("node1", rules, "iptables-legacy-restore")
}

// NFTables puts the same services into node1 as kube-proxy's nftables mode does: one map from address, protocol and port to the service's chain.
func (n *Network) NFTables(services int) error {
	var chains, elements strings.Builder
	add := func(i int, vip netip.Addr) {
		for _, port := range balanced {
			fmt.Fprintf(&chains, "\tchain service-%d-%d {\n\t\tmeta l4proto { tcp, udp } dnat to %s:%d\n\t}\n", i, port, Pods["c"], port)
			for _, proto := range []string{"tcp", "udp"} {
				if elements.Len() > 0 {
					elements.WriteString(",\n")
				}
				fmt.Fprintf(&elements, "\t\t\t%s . %s . %d : goto service-%d-%d", vip, proto, port, i, port)
			}
		}
	}
	for i := range services - 1 {
		add(i, front(i))
	}
	add(services, Target)
	rules := "table ip kube-proxy {\n" + chains.String() + "\tmap service-ips {\n\t\ttype ipv4_addr . inet_proto . inet_service : verdict\n\t\telements = {\n" + elements.String() + "\n\t\t}\n\t}\n" +
		"\tchain nat-prerouting {\n\t\ttype nat hook prerouting priority dstnat;\n\t\tip daddr . meta l4proto . th dport vmap @service-ips\n\t}\n}\n"
	return n.feed("node1", rules, "nft", "-f", "-")
}

// Flush removes the rules of IPTables and NFTables.
func (n *Network) Flush() error {
	if err := n.feed("node1", "*nat\nCOMMIT\n", "iptables-legacy-restore"); err != nil {
		return err
	}
	return n.feed("node1", "flush ruleset\n", "nft", "-f", "-")
}

// feed runs a command in a namespace with a text on its standard input.
func (n *Network) feed(name, input string, args ...string) error {
	return n.in(name, func() error {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stdin = strings.NewReader(input)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s in %s: %w: %.300s", args[0], name, err, out)
		}
		return nil
	})
}
