// SPDX-License-Identifier: Apache-2.0

package live

import (
	"context"
	"fmt"
	"net/netip"
	"sync"

	flowpb "github.com/weirmesh/weir/gen/flow"
	observerpb "github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/test/cases/probe"
	"google.golang.org/grpc"
)

// Flows follows a lab's flows and keeps them all. Safe for concurrent use.
type Flows struct {
	conn   *grpc.ClientConn
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	byTuple map[probe.Tuple][]*flowpb.Flow
	err     error
	changed chan struct{}
}

// Follow begins to follow the flows of the observer at an address. Close it.
func Follow(ctx context.Context, observer string) (*Flows, error) {
	conn, err := dial(observer)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := observerpb.NewObserverClient(conn).GetFlows(ctx, &observerpb.GetFlowsRequest{Number: 1 << 40, Follow: true})
	if err != nil {
		cancel()
		conn.Close()
		return nil, fmt.Errorf("follow flows: %w", err)
	}
	f := &Flows{conn: conn, cancel: cancel, done: make(chan struct{}), byTuple: map[probe.Tuple][]*flowpb.Flow{}, changed: make(chan struct{})}
	go f.read(stream)
	return f, nil
}

// Close ends the stream.
func (f *Flows) Close() {
	f.cancel()
	<-f.done
	f.conn.Close()
}

func (f *Flows) read(stream observerpb.Observer_GetFlowsClient) {
	defer close(f.done)
	for {
		r, err := stream.Recv()
		f.mu.Lock()
		if err != nil {
			f.err = err
		} else if flow := r.GetFlow(); flow != nil {
			if t, ok := tupleOf(flow); ok {
				f.byTuple[t] = append(f.byTuple[t], flow)
				if p := anyPort(t); p != t && !probe.IsClientPort(t.Src.Port()) {
					f.byTuple[p] = append(f.byTuple[p], flow)
				}
			}
		}
		close(f.changed)
		f.changed = make(chan struct{})
		f.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// anyPort is a tuple without the client's port: a node that takes a client's place gives it one that no client of ours has.
func anyPort(t probe.Tuple) probe.Tuple {
	t.Src = netip.AddrPortFrom(t.Src.Addr(), 0)
	return t
}

// Changed is closed at the next flow.
func (f *Flows) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// Mark is a point in the order of flows of some tuples.
type Mark map[probe.Tuple]int

// Mark remembers how many flows of the tuples there are, so that Since returns later ones only.
func (f *Flows) Mark(tuples []probe.Tuple) Mark {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := Mark{}
	for _, t := range tuples {
		m[t] = len(f.byTuple[t])
	}
	return m
}

// Since returns the flows of tuples that came after a mark.
func (f *Flows) Since(m Mark) []*flowpb.Flow {
	f.mu.Lock()
	defer f.mu.Unlock()
	var found []*flowpb.Flow
	for t, n := range m {
		found = append(found, f.byTuple[t][n:]...)
	}
	return found
}

// Err is why the stream ended; nil while it runs.
func (f *Flows) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// Numbers of protocols, as tuples have them.
const (
	tcp, udp, sctp = 6, 17, 132
	icmp4, icmp6   = 1, 58
)

func tupleOf(f *flowpb.Flow) (t probe.Tuple, ok bool) {
	src, err := netip.ParseAddr(f.GetIP().GetSource())
	if err != nil {
		return t, false
	}
	dst, err := netip.ParseAddr(f.GetIP().GetDestination())
	if err != nil {
		return t, false
	}
	var sport, dport uint32
	switch l4 := f.GetL4().GetProtocol().(type) {
	case *flowpb.Layer4_TCP:
		t.Protocol, sport, dport = tcp, l4.TCP.SourcePort, l4.TCP.DestinationPort
	case *flowpb.Layer4_UDP:
		t.Protocol, sport, dport = udp, l4.UDP.SourcePort, l4.UDP.DestinationPort
	case *flowpb.Layer4_SCTP:
		t.Protocol, sport, dport = sctp, l4.SCTP.SourcePort, l4.SCTP.DestinationPort
	case *flowpb.Layer4_ICMPv4:
		t.Protocol, t.ICMPType, t.ICMPCode = icmp4, int(l4.ICMPv4.Type), int(l4.ICMPv4.Code)
	case *flowpb.Layer4_ICMPv6:
		t.Protocol, t.ICMPType, t.ICMPCode = icmp6, int(l4.ICMPv6.Type), int(l4.ICMPv6.Code)
	default:
		return t, false
	}
	t.Src, t.Dst = netip.AddrPortFrom(src.Unmap(), uint16(sport)), netip.AddrPortFrom(dst.Unmap(), uint16(dport))
	return t, true
}
