// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/test/reference"
)

// A message that policy allows opens no way to one of another type, nor to its like in the other direction.
func TestICMPKeys(t *testing.T) {
	const world = `
config: {ip_families: [IPv4, IPv6]}
nodes: [{name: n1, ip: 172.30.0.11, ip6: "fd30::11"}, {name: n2}]
namespaces: [{name: shop}]
pods:
- {name: a, namespace: shop, node: n1, ip: 10.1.1.2, ip6: "fd00:1:1::2", labels: {app: a}}
- {name: b, namespace: shop, node: n2, ip: 10.1.2.2, ip6: "fd00:1:2::2", labels: {app: b}}
policies:
- {apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p, namespace: shop}, spec: {endpointSelector: {matchLabels: {app: a}},
    egress: [{toEndpoints: [{}], icmps: [{fields: [{type: TYPE}, {family: IPv6, type: TYPE}]}]}], ingress: [{}]}}
`
	n := newNode(t)
	for _, c := range []struct {
		protocol        uint8
		allowed, second int
		backwards       bool
		name            string
	}{
		{policy.ICMP, 8, 13, false, "timestamp after echo"},
		{policy.ICMP, 13, 8, false, "echo after timestamp"},
		{policy.ICMP, 0, 14, false, "timestamp reply after echo reply"},
		{policy.ICMP, 8, 42, false, "extended echo after echo"},
		{policy.ICMP, 42, 42, true, "the same type from the other side"},
		{policy.ICMPv6, 0, 0, true, "type 0 from the other side"},
		{policy.ICMPv6, 200, 200, true, "type 200 from the other side"},
		{policy.ICMPv6, 128, 160, false, "extended echo after echo"},
	} {
		func() { // on the thread of the node's network namespace
			var cluster reference.Cluster
			if err := yaml.Unmarshal([]byte(strings.ReplaceAll(world, "TYPE", strconv.Itoa(c.allowed))), &cluster); err != nil {
				t.Fatal(err)
			}
			compiled, err := Compile(&cluster)
			if err != nil {
				t.Fatal(err)
			}
			l := n.load(compiled, 0)
			defer l.unload()
			v6 := c.protocol == policy.ICMPv6
			message := func(from, to string, kind int) frame {
				return frame{src: l.address(from, v6), dst: l.address(to, v6), protocol: c.protocol, icmpType: uint8(kind), sport: 77}
			}
			if code := l.run("from_pod", l.iface("shop/a"), message("shop/a", "shop/b", c.allowed).bytes()); code != actOK {
				t.Fatalf("%s: the allowed message: %d", c.name, code)
			}
			var code uint32
			if c.backwards {
				code = l.run("from_network", l.uplink, message("shop/b", "shop/a", c.second).bytes())
			} else {
				code = l.run("from_pod", l.iface("shop/a"), message("shop/a", "shop/b", c.second).bytes())
			}
			if code != actShot {
				t.Errorf("%s: type %d passes with %d, want it dropped", c.name, c.second, code)
			}
		}()
	}
}
