// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

var (
	nodeHost4 = netip.MustParseAddr("172.30.0.12")
	nodeHost6 = netip.MustParseAddr("fd30::12")
)

func hostBench(t *testing.T, masquerade bool) *bench {
	b := newBench(t, func(c *Config) {
		c.Masquerade, c.NodeIPv4, c.NodeIPv6 = masquerade, node4, node6
	})
	for _, p := range []string{"172.30.0.12/32", "fd30::12/128"} {
		if err := b.IPCache().Upsert(netip.MustParsePrefix(p), IPCacheEntry{Identity: IdentityRemoteNode}); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func TestHostPolicy(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			b := hostBench(t, true)
			remote := nodeHost4
			if f.node.Is6() {
				remote = nodeHost6
			}
			in, out := DirectionIngress, DirectionEgress
			ssh, api := at(f.node, 22), at(remote, 6443)
			// Without a policy the node's own traffic is nobody's business.
			b.expect("no policy: in", passes, tcProgFromNetwork, b.uplink, tcp(t, at(f.out, 1), ssh, syn, 1, 0, 0))
			b.expect("no policy: out", passes, tcProgToNetwork, b.uplink, tcp(t, at(f.node, 1), api, syn, 1, 0, 0))
			b.expect("no policy: from a pod", passes, tcProgFromPod, b.ifA, tcp(t, at(f.podA, 1), ssh, syn, 1, 0, 0))
			b.expect("no policy: to a pod", passes, tcProgFromHost, b.uplink, tcp(t, at(f.node, 1), at(f.podA, 80), syn, 1, 0, 0))
			for _, c := range b.conns() {
				if c.Endpoint == HostEndpoint {
					t.Errorf("entry of the host without a host policy: %+v", c)
				}
			}

			b.policy(3, rows{
				0:                  nothing,
				IdentityRemoteNode: {allowPort(unix.IPPROTO_TCP, 22, 61)},
				idA:                {allowPort(unix.IPPROTO_TCP, 53, 62)},
			})
			b.policy(4, rows{
				0:                  nothing,
				IdentityRemoteNode: {allowPort(unix.IPPROTO_TCP, 6443, 63)},
				idA:                {allowPort(unix.IPPROTO_TCP, 8080, 64)},
			})
			b.enforce(HostEndpoint, EndpointPolicy{Ingress: 3, Egress: 4})

			b.expect("from world", defaultDenied(in), tcProgFromNetwork, b.uplink, tcp(t, at(f.out, 2), ssh, syn, 1, 0, 0))
			b.expect("from a node", allowed(in, 61), tcProgFromNetwork, b.uplink, tcp(t, at(remote, 2), ssh, syn, 1, 0, 0))
			b.expect("answer to it", passes, tcProgToNetwork, b.uplink, tcp(t, ssh, at(remote, 2), syn|ack, 1, 2, 0))
			b.expect("own address from outside", outcome{reason: DropInvalidSourceIP}, tcProgFromNetwork, b.uplink, tcp(t, at(f.node, 2), ssh, syn, 1, 0, 0))
			b.expect("to a node", allowed(out, 63), tcProgToNetwork, b.uplink, tcp(t, at(f.node, 3), api, syn, 1, 0, 0))
			b.expect("answer to it", passes, tcProgFromNetwork, b.uplink, tcp(t, api, at(f.node, 3), syn|ack, 1, 2, 0))
			b.expect("to world", defaultDenied(out), tcProgToNetwork, b.uplink, tcp(t, at(f.node, 4), at(f.out, 80), syn, 1, 0, 0))
			b.expect("a pod's packet on its way out", passes, tcProgToNetwork, b.uplink, tcp(t, at(f.podA, 4), at(f.far, 80), syn, 1, 0, 0))
			b.expect("a pod's packet to be masqueraded", passes, tcProgToNetwork, b.uplink,
				tcp(t, at(f.podA, 4), at(f.out, 80), syn, 1, 0, 0), withMark(0x400))

			b.expect("from a pod", allowed(in, 62), tcProgFromPod, b.ifA, tcp(t, at(f.podA, 5), at(f.node, 53), syn, 1, 0, 0))
			b.expect("answer to it", passes, tcProgFromHost, b.uplink, tcp(t, at(f.node, 53), at(f.podA, 5), syn|ack, 1, 2, 0))
			b.expect("from a pod, another port", defaultDenied(in), tcProgFromPod, b.ifA, tcp(t, at(f.podA, 6), at(f.node, 54), syn, 1, 0, 0))
			b.expect("to a pod", allowed(out, 64), tcProgFromHost, b.uplink, tcp(t, at(f.node, 7), at(f.podA, 8080), syn, 1, 0, 0))
			b.expect("answer to it", passes, tcProgFromPod, b.ifA, tcp(t, at(f.podA, 8080), at(f.node, 7), syn|ack, 1, 2, 0))
			b.expect("to another pod", defaultDenied(out), tcProgFromHost, b.uplink, tcp(t, at(f.node, 7), at(f.podB, 8080), syn, 1, 0, 0))
			b.expect("pod to pod", passes, tcProgFromPod, b.ifA, tcp(t, at(f.podA, 9), at(f.podB, 22), syn, 1, 0, 0))

			b.enforce(HostEndpoint, EndpointPolicy{Ingress: 3, Egress: 4, IngressAudit: true})
			want := outcome{verdict: PolicyDefaultDeny, direction: in, audited: true}
			b.expect("audit", want, tcProgFromNetwork, b.uplink, tcp(t, at(f.out, 10), ssh, syn, 1, 0, 0))
			b.enforce(HostEndpoint, EndpointPolicy{Ingress: 3, Egress: 4})
			b.expect("cut", defaultDenied(in), tcProgFromNetwork, b.uplink, tcp(t, at(f.out, 10), ssh, ack, 1, 1, 0))
		})
	}
}

func TestHostPolicyLeavesTheLinkAlone(t *testing.T) {
	b := hostBench(t, false)
	b.policy(3, rows{0: nothing})
	b.enforce(HostEndpoint, EndpointPolicy{Ingress: 3, Egress: 3})
	solicitation := append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, node6.AsSlice()...)
	b.expect("neighbour solicitation", passes, tcProgFromNetwork, b.uplink, rawIP6(t, nodeHost6, node6, unix.IPPROTO_ICMPV6, solicitation))
	b.expect("unknown protocol", outcome{reason: DropUnknownL4}, tcProgFromNetwork, b.uplink, rawIP(t, nodeHost4, node4, 47, make([]byte, 20), nil))
	tooBig := append([]byte{2, 0, 0, 0, 0, 0, 5, 0}, make([]byte, 48)...)
	b.expect("packet too big", passes, tcProgFromNetwork, b.uplink, rawIP6(t, nodeHost6, node6, unix.IPPROTO_ICMPV6, tooBig))
	b.expect("ping", defaultDenied(DirectionIngress), tcProgFromNetwork, b.uplink, echo(t, nodeHost4, node4, true, 1, 8))
	multicast := netip.MustParseAddr("224.0.0.1")
	b.expect("not to the node", passes, tcProgFromNetwork, b.uplink, rawIP(t, nodeHost4, multicast, 2, make([]byte, 8), nil))
}
