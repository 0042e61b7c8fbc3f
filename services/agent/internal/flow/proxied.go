// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"net/netip"

	"github.com/weirmesh/weir/bpf/datapath"
)

// maxProxied bounds each half of the connections that are remembered.
const maxProxied = 8192

// proxied remembers what the kernel said of connections that go through a proxy, for the requests on them: the service that the client asked for, and who
// both ends were. Two halves, of which the older is forgotten when the younger is full.
type proxied struct {
	young, old map[tuple]connection
	// last is what the last request was found to be on: its response and the connection's next request mostly come next.
	last  tuple
	found connection
	known bool
}

type tuple struct {
	client, server netip.AddrPort
	proto          uint8
}

type connection struct{ service, client, server uint32 }

// note takes a record of such a connection.
func (p *proxied) note(r *datapath.Record) {
	if r.IsReply() || r.Type != datapath.RecordTrace && r.Type != datapath.RecordVerdict && r.Type != datapath.RecordDrop {
		return
	}
	t := tuple{netip.AddrPortFrom(r.SrcAddr(), r.Sport), netip.AddrPortFrom(r.DstAddr(), r.Dport), r.Proto}
	if len(p.young) >= maxProxied || p.young == nil {
		p.young, p.old, p.last = map[tuple]connection{}, p.young, tuple{}
	}
	if t == p.last {
		p.last = tuple{}
	}
	p.young[t] = connection{r.Service, r.SrcIdentity, r.DstIdentity}
}

// of finds the connection of a request.
func (p *proxied) of(r *Request) (connection, bool) {
	t := tuple{r.Client, r.Server, r.Proto}
	if t == p.last {
		return p.found, p.known
	}
	c, known := p.young[t]
	if !known {
		c, known = p.old[t]
	}
	p.last, p.found, p.known = t, c, known
	return c, known
}
