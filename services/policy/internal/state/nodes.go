// SPDX-License-Identifier: Apache-2.0

package state

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/internal/reserved"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/label"
)

// Keys of subjects that are no pods.
const (
	SubjectHost   = "host"
	SubjectHealth = HealthUID
)

// Reserved labels.
const (
	labelHost       = "reserved:host"
	labelHealth     = "reserved:health"
	labelRemoteNode = "reserved:remote-node"
	labelAPIServer  = "reserved:kube-apiserver"
)

// variantAPIServer tells a node with an API server from others, as seen from itself.
const variantAPIServer = "kube-apiserver"

// setReserved tells the engine of the peers that are always there.
func (s *State) setReserved() {
	for _, r := range reserved.All(s.cluster) {
		if r.Number > reserved.WorldIPv6 {
			continue // pods have them, or nobody
		}
		p := &policy.Peer{Key: peerKey(r.Number, ""), Labels: r.Labels}
		switch r.Number {
		case reserved.KubeAPIServer:
			p.Labels = label.Set{labelAPIServer, labelRemoteNode}
		case reserved.WorldIPv6:
			p.Prefix = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		case reserved.World, reserved.WorldIPv4:
			p.Prefix = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		s.engine.SetPeer(p)
	}
}

// tellNodes tells the engine of nodes as subjects and peers, and of the API servers.
func (s *State) tellNodes() {
	apiServers := map[string]bool{}
	var outside []netip.Addr
	owner := map[netip.Addr]string{}
	v4, v6 := false, false
	for name, n := range s.nodes {
		for _, a := range n.Addresses {
			owner[a] = name
			v4, v6 = v4 || a.Is4(), v6 || a.Is6()
		}
	}
	for _, a := range s.addressesBehind(apiService) {
		if node, ok := owner[a]; ok {
			apiServers[node] = true
		} else {
			outside = append(outside, a)
		}
	}
	s.engine.SetDualStack(v4 && v6)
	world := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if v6 && !v4 {
		world = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	s.engine.SetPeer(&policy.Peer{Key: peerKey(reserved.World, ""), Labels: label.Set{"reserved:world"}, Prefix: world})
	s.engine.SetAPIServers(outside)
	if !maps.Equal(s.apiServers, apiServers) {
		s.apiServers = apiServers
		s.touch(KindIdentity)
	}
	for name, n := range s.nodes {
		more := []string{labelHost}
		if apiServers[name] {
			more = append(more, labelAPIServer)
		}
		s.engine.SetSubject(engine.SubjectID{Node: name, Key: SubjectHost}, &policy.Subject{
			Host: true, Labels: labelsWith("k8s", n.Labels, more...), Node: s.nodeLabels(name),
		})
		s.engine.SetSubject(engine.SubjectID{Node: name, Key: SubjectHealth}, &policy.Subject{Labels: label.Set{labelHealth}, Node: s.nodeLabels(name)})
	}
	if len(s.subjectNodes) != len(s.nodes) {
		s.touch(KindIdentity)
	}
	for name := range s.subjectNodes {
		if s.nodes[name] == nil {
			s.touch(KindIdentity)
			s.engine.DeleteSubject(engine.SubjectID{Node: name, Key: SubjectHost})
			s.engine.DeleteSubject(engine.SubjectID{Node: name, Key: SubjectHealth})
			delete(s.subjectNodes, name)
		}
	}
	for name := range s.nodes {
		s.subjectNodes[name] = true
	}
	s.touch(KindPeer)
}

// buildPeers returns the peers that nodes' own addresses are, where these differ from plain identities, and tells the engine.
func (s *State) buildPeers() map[string]Resource {
	peers := map[string]*Peer{}
	told := map[string]bool{}
	add := func(number uint32, base, variant string, labels label.Set, addr netip.Addr, networks []netip.Prefix, node string) {
		key := base
		if variant != "" {
			key += "/" + variant
		}
		if key == strconv.FormatUint(uint64(number), 10) && number != reserved.KubeAPIServer {
			return // the node's plain identity
		}
		p := peers[key]
		if p == nil {
			p = &Peer{Name: key, Labels: labels, Own: number == reserved.Host}
			peers[key] = p
		}
		p.At = append(p.At, PeerPrefix{netip.PrefixFrom(addr, addr.BitLen()), node})
		if base != "7" || variant != "" { // "7" is always there
			told[key] = true
			s.engine.SetPeer(&policy.Peer{Key: key, Labels: labels, Networks: networks})
		}
	}
	byLabels := s.options.NodeSelectorLabels || s.nodePolicies > 0
	for name, n := range s.nodes {
		api := s.apiServers[name]
		remote, number, own, ownVariant := label.Set{labelRemoteNode}, uint32(reserved.RemoteNode), label.Set{labelHost}, ""
		if api {
			remote, number = label.Set{labelAPIServer, labelRemoteNode}, reserved.KubeAPIServer
			own, ownVariant = label.Set{labelHost, labelAPIServer}, variantAPIServer
		}
		base := strconv.Itoa(int(number))
		if byLabels {
			base = "node:" + name
			remote = labelsWith("node", n.Labels, append(slices.Clone(remote), reserved.Source+":"+reserved.ClusterKey+"="+s.cluster)...)
		}
		for _, a := range n.Addresses {
			networks := s.variants.networksOf(a)
			variant := variantText(nil, networks)
			add(number, base, variant, remote, a, networks, name)
			add(reserved.Host, "1", strings.Trim(ownVariant+";"+variant, ";"), own, a, networks, name)
		}
		if agent := s.agents[name]; agent != nil {
			for _, a := range agent.health {
				networks := s.variants.networksOf(a)
				add(reserved.Health, "4", variantText(nil, networks), label.Set{labelHealth}, a, networks, "")
			}
		}
	}
	for key := range s.nodePeers {
		if !told[key] {
			s.engine.DeletePeer(key)
		}
	}
	s.nodePeers = told
	all := make(map[string]Resource, len(peers))
	for key, p := range peers {
		slices.SortFunc(p.At, func(a, b PeerPrefix) int {
			return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Node, b.Node))
		})
		all[key] = *p
	}
	return all
}
