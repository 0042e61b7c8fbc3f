// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
)

// entity reads one name of fromEntities. No term and false = nobody; no term and true = everybody (spec 6.2).
func (r *reader) entity(n node) (t *Term, everybody bool) {
	switch name := r.str(n); name {
	case "all":
		return nil, true
	case "none":
		return nil, false
	case "world":
		return entityTerm("world"), false // a selector on it matches either family's world
	case "world-ipv4":
		return worldTerm(name, netip.IPv4Unspecified()), false
	case "world-ipv6":
		return worldTerm(name, netip.IPv6Unspecified()), false
	case "host", "remote-node", "kube-apiserver", "ingress", "health", "init", "unmanaged":
		return entityTerm(name), false
	case "cluster":
		return labelsTerm("entity:cluster("+r.o.cluster()+")", clusterSelectors(r.inLocalCluster())...), false
	case "cluster-mesh":
		q := r.inLocalCluster()
		return labelsTerm("entity:cluster-mesh", clusterSelectors(requirement{source: q.source, key: q.key, op: opExists})...), false
	default:
		r.fail(n, "unsupported entity: %s", name)
		return nil, false
	}
}

func reservedSelector(name string) *Selector {
	return newSelector([]requirement{{source: reservedSource, key: name, op: opExists}})
}

func entityTerm(name string) *Term { return labelsTerm("entity:"+name, reservedSelector(name)) }

const entityWorld = "entity:world"

// worldTerm is the world of one family. In a cluster of one family the world's label does not say which; the peer's prefix does.
func worldTerm(name string, zero netip.Addr) *Term {
	return &Term{
		Key: "entity:" + name, kind: termWorld,
		selectors: []*Selector{reservedSelector("world")},
		items:     cidrItems{{prefix: netip.PrefixFrom(zero, 0)}},
	}
}

func clusterSelectors(pods requirement) []*Selector {
	all := []*Selector{newSelector([]requirement{pods})}
	for _, name := range []string{"host", "remote-node", "init", "ingress", "health", "unmanaged", "kube-apiserver"} {
		all = append(all, reservedSelector(name))
	}
	return all
}
