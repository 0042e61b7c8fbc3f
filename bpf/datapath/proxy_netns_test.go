// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Between two pods of one node a connection passes the client's slot, the server's, or both, and the server sees the client's address.
func TestProxyOnOneNode(t *testing.T) {
	w := newWorld(t, nil)
	a := w.plug("a", epA, idA, podA4, podA6)
	b := w.plug("b", epB, idB, podB4, podB6)
	p := newProxy(w)
	p.listen(5, MarkEgressPassed)
	p.listen(6, MarkIngressPassed)
	tcpTo := func(slot uint16) rows {
		return rows{0: {redirectPort(unix.IPPROTO_TCP, 8080, slot, 1), allowPort(unix.IPPROTO_UDP, 8080, 2)}}
	}
	w.setPolicy(5, tcpTo(5))
	w.setPolicy(6, tcpTo(6))
	for _, f := range families {
		to := at(f.podB, 8080)
		seen := server(w, in(b), to)
		for _, c := range []struct {
			name            string
			egress, ingress uint32
			slots           []uint16
		}{
			{"plain", 0, 0, nil}, {"egress", 5, 0, []uint16{5}}, {"ingress", 0, 6, []uint16{6}}, {"both", 5, 6, []uint16{5, 6}},
		} {
			t.Run(f.name+" "+c.name, func(t *testing.T) {
				w.settled()
				w.do(w.Policies().SetEndpoint(epA, EndpointPolicy{Egress: c.egress}), w.Policies().SetEndpoint(epB, EndpointPolicy{Ingress: c.ingress}))
				w.do(w.Policies().Bump())
				local, err := talk(in(a), "tcp", to)
				if err != nil {
					w.rejectDrops(c.name)
					t.Fatalf("%v", err)
				}
				got := <-seen
				if got.Addr() != f.podA || (got == local) != (len(c.slots) == 0) {
					t.Errorf("the server sees %v, the client is %v", got, local)
				}
				if upstream := got.Port() >= UpstreamPortMin && got.Port() <= UpstreamPortMax; len(c.slots) > 0 && !upstream {
					t.Errorf("upstream port %d", got.Port())
				}
				p.expectSeen(c.name, f.podA, to, c.slots...)
				w.rejectDrops(c.name)
			})
		}
	}
}
