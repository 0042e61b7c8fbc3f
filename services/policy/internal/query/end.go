// SPDX-License-Identifier: Apache-2.0

package query

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/internal/reserved"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// end is one end of a connection.
type end struct {
	// name is what people call it.
	name      string
	addresses []netip.Addr
	// node where it is; empty = outside of the cluster.
	node string
	// pod, if it is one with an address of its own.
	pod *state.Endpoint
	// subject of policies; empty = nothing of policies here.
	subject string
	service *state.Service
	// dns is the name that DNS gave the end; its address is not known then.
	dns string
}

// maxDNSName is the length of the longest name of DNS.
const maxDNSName = 255

// find returns the end that a person named.
func (c *cluster) find(field, text string) (*end, error) {
	if name, ok := strings.CutPrefix(text, "svc:"); ok {
		r, ok := c.snapshot.Get(state.Key{Kind: state.KindService, Name: name})
		if !ok {
			return nil, grpcstatus.Errorf(codes.NotFound, "%s: there is no service %s", field, name)
		}
		s := r.(state.Service)
		return &end{name: text, service: &s}, nil
	}
	if name, ok := strings.CutPrefix(text, "node:"); ok {
		r, ok := c.snapshot.Get(state.Key{Kind: state.KindNode, Name: name})
		if !ok {
			return nil, grpcstatus.Errorf(codes.NotFound, "%s: there is no node %s", field, name)
		}
		return nodeEnd(r.(state.Node)), nil
	}
	if name, ok := strings.CutPrefix(text, "name:"); ok {
		if name == "" || len(name) > maxDNSName {
			return nil, grpcstatus.Errorf(codes.InvalidArgument, "%s: %.80q is not a name", field, name)
		}
		return &end{name: text, addresses: []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, dns: name}, nil
	}
	if addr, err := netip.ParseAddr(text); err == nil {
		return c.at(addr.Unmap()), nil
	}
	namespace, name, ok := strings.Cut(text, "/")
	if !ok {
		return nil, grpcstatus.Errorf(codes.InvalidArgument, `%s: %.80q is neither "namespace/pod", an address, "node:NAME", "svc:namespace/name" nor "name:NAME"`, field, text)
	}
	for r := range c.snapshot.All(state.KindEndpoint) {
		if e := r.(state.Endpoint); e.Namespace == namespace && e.Name == name {
			return c.podEnd(e), nil
		}
	}
	for r := range c.snapshot.All(state.KindPod) {
		if p := r.(state.Pod); p.Namespace == namespace && p.Name == name {
			return nil, grpcstatus.Errorf(codes.FailedPrecondition, "%s: pod %s has no address yet", field, text)
		}
	}
	return nil, grpcstatus.Errorf(codes.NotFound, "%s: there is no pod %s", field, text)
}

func nodeEnd(n state.Node) *end {
	return &end{name: "node:" + n.Name, addresses: n.Addresses, node: n.Name, subject: state.SubjectHost}
}

func (c *cluster) podEnd(e state.Endpoint) *end {
	if e.HostNetwork {
		return &end{name: e.Namespace + "/" + e.Name, addresses: e.Addresses, node: e.Node, subject: state.SubjectHost}
	}
	found := &end{name: e.Namespace + "/" + e.Name, addresses: e.Addresses, node: e.Node, pod: &e}
	if e.Identity != reserved.Unmanaged {
		found.subject = e.UID
	}
	return found
}

// at returns who has an address.
func (c *cluster) at(addr netip.Addr) *end {
	for r := range c.snapshot.All(state.KindEndpoint) {
		if e := r.(state.Endpoint); !e.HostNetwork && slices.Contains(e.Addresses, addr) {
			found := c.podEnd(e)
			found.addresses = []netip.Addr{addr}
			return found
		}
	}
	for r := range c.snapshot.All(state.KindNode) {
		n := r.(state.Node)
		switch {
		case slices.Contains(n.Addresses, addr):
			found := nodeEnd(n)
			found.addresses = []netip.Addr{addr}
			return found
		case slices.Contains(n.HealthAddresses, addr):
			return &end{name: "health of " + n.Name, addresses: []netip.Addr{addr}, node: n.Name, subject: state.SubjectHealth}
		}
	}
	for r := range c.snapshot.All(state.KindService) {
		s := r.(state.Service)
		if slices.Contains(s.ClusterIPs, addr) || slices.Contains(s.LoadBalancerIPs, addr) || slices.Contains(s.ExternalIPs, addr) {
			return &end{name: "svc:" + s.Namespace + "/" + s.Name, service: &s}
		}
	}
	return &end{name: addr.String(), addresses: []netip.Addr{addr}}
}

// peer returns who an end is, seen from a node.
func (c *cluster) peer(e *end, addr netip.Addr, viewer string) *policy.Peer {
	key := c.peerKey(e, addr, viewer)
	p := c.frozen.Peers[key]
	if p == nil {
		p = &policy.Peer{Key: key}
	}
	if e.dns != "" {
		named := *p
		named.Names = []string{e.dns}
		p = &named
	}
	return p
}

func (c *cluster) peerKey(e *end, addr netip.Addr, viewer string) string {
	switch {
	case e.pod != nil:
		key := strconv.FormatUint(uint64(e.pod.Identity), 10)
		if i := slices.Index(e.pod.Addresses, addr); i >= 0 && i < len(e.pod.Variants) && e.pod.Variants[i] != "" {
			key += "/" + e.pod.Variants[i]
		}
		return key
	case e.node == "":
		return c.outside(addr, viewer)
	}
	plain := strconv.Itoa(reserved.RemoteNode)
	switch {
	case e.subject == state.SubjectHealth:
		plain = strconv.Itoa(reserved.Health)
	case e.node == viewer:
		plain = strconv.Itoa(reserved.Host)
	}
	single := netip.PrefixFrom(addr, addr.BitLen())
	for r := range c.snapshot.All(state.KindPeer) {
		if p := r.(state.Peer); p.Own == (e.node == viewer && e.subject != state.SubjectHealth) && slices.Contains(p.On(viewer), single) {
			return p.Name
		}
	}
	return plain
}

// outside returns the peer of an address outside of the cluster: the longest prefix that the node knows.
func (c *cluster) outside(addr netip.Addr, viewer string) string {
	best := -1
	key := strconv.Itoa(reserved.World)
	if c.frozen.Options.DualStack {
		key = strconv.Itoa(reserved.WorldIPv6)
		if addr.Is4() {
			key = strconv.Itoa(reserved.WorldIPv4)
		}
	}
	view := c.snapshot.Policy()
	n := view.Nodes[viewer]
	if n == nil {
		return key
	}
	for k := range n.CIDRs {
		if p := view.CIDRs[k]; p != nil && p.Prefix.Contains(addr) && p.Prefix.Bits() > best {
			best, key = p.Prefix.Bits(), k
		}
	}
	return key
}

// resolved returns what policies say of an end in a direction; the subject is nil if none can say anything.
func (c *cluster) resolved(e *end, d policy.Direction) (*engine.FrozenSubject, *policy.Resolved) {
	if e.subject == "" {
		return nil, nil
	}
	s, ok := c.frozen.Subjects[engine.SubjectID{Node: e.node, Key: e.subject}]
	if !ok {
		return nil, nil
	}
	return &s, s.Resolved[d-1]
}

// identityOf returns the number in a peer's key; 0 = it has none that holds on all nodes.
func identityOf(key string) uint32 {
	number, _, _ := strings.Cut(key, "/")
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil {
		return 0
	}
	return uint32(n)
}
