// SPDX-License-Identifier: Apache-2.0

// Package monitor shows the kernel's records to whoever watches, as they are, without ever making the pipeline wait.
package monitor

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/weirmesh/weir/bpf/datapath"
)

// Item is a record, copied.
type Item struct {
	CPU    int
	Record datapath.Record
}

// watcherQueue bounds what one watcher may be behind.
const watcherQueue = 4096

// Watcher reads records. Close it.
type Watcher struct {
	hub  *Hub
	C    chan Item
	lost atomic.Uint64
}

// TakeLost returns how many records this watcher has missed since the last call.
func (w *Watcher) TakeLost() uint64 { return w.lost.Swap(0) }

// Close ends the watching.
func (w *Watcher) Close() {
	w.hub.mu.Lock()
	defer w.hub.mu.Unlock()
	delete(w.hub.watchers, w)
	w.hub.active.Store(int32(len(w.hub.watchers)))
}

// Hub is safe for concurrent use.
type Hub struct {
	active   atomic.Int32
	mu       sync.Mutex
	watchers map[*Watcher]struct{}
}

// New makes a hub.
func New() *Hub { return &Hub{watchers: map[*Watcher]struct{}{}} }

// Watch begins watching.
func (h *Hub) Watch() *Watcher {
	w := &Watcher{hub: h, C: make(chan Item, watcherQueue)}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watchers[w] = struct{}{}
	h.active.Store(int32(len(h.watchers)))
	return w
}

// Observe shows a record to all watchers. Without any it costs one load.
func (h *Hub) Observe(cpu int, r *datapath.Record) {
	if h.active.Load() == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for w := range h.watchers {
		select {
		case w.C <- Item{CPU: cpu, Record: *r}:
		default:
			w.lost.Add(1)
		}
	}
}

var pointNames = map[uint8]string{datapath.PointToEndpoint: "to-endpoint", datapath.PointToHost: "to-host",
	datapath.PointFromEndpoint: "from-endpoint", datapath.PointToNetwork: "to-network", datapath.PointToOverlay: "to-overlay"}

var directionNames = map[uint8]string{datapath.DirectionIngress: "ingress", datapath.DirectionEgress: "egress"}

var protoNames = map[uint8]string{1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}

// Proto names an IP protocol.
func Proto(p uint8) string {
	if n, ok := protoNames[p]; ok {
		return n
	}
	return fmt.Sprint(p)
}

// Text is one line of a record.
func Text(r *datapath.Record) string {
	var b strings.Builder
	switch r.Type {
	case datapath.RecordTrace, datapath.RecordFinal:
		name, ok := pointNames[r.Point]
		if !ok {
			name = fmt.Sprintf("point-%d", r.Point)
		}
		kind := "trace "
		if r.Type == datapath.RecordFinal {
			kind = "final "
		}
		b.WriteString(kind + name)
	case datapath.RecordDrop:
		fmt.Fprintf(&b, "drop reason %d", r.Reason)
		if r.Rule != 0 {
			fmt.Fprintf(&b, " rule %d", r.Rule)
		}
	case datapath.RecordTranslation:
		b.WriteString("translate")
	case datapath.RecordVerdict:
		fmt.Fprintf(&b, "verdict %s %s rule %d", directionNames[r.Direction], datapath.PolicyVerdict(r.Verdict), r.Rule)
		if r.Flags&datapath.FlagAudited != 0 {
			b.WriteString(" audited")
		}
	}
	if slot := r.Slot(); slot != 0 {
		fmt.Fprintf(&b, " slot %d", slot)
	}
	fmt.Fprintf(&b, " ep %d %s -> %s", r.Endpoint, end(r.SrcAddr(), r.Sport), end(r.DstAddr(), r.Dport))
	if r.Type == datapath.RecordTranslation {
		fmt.Fprintf(&b, " => %s", end(r.XlatedAddr(), r.XlatedPort))
	}
	fmt.Fprintf(&b, " %s", Proto(r.Proto))
	switch r.Proto {
	case 6:
		if f := flags(r.TcpFlags); f != "" {
			b.WriteString(" " + f)
		}
	case 1, 58:
		fmt.Fprintf(&b, " type %d code %d", r.IcmpType, r.IcmpCode)
	}
	if r.IsReply() {
		b.WriteString(" reply")
	}
	fmt.Fprintf(&b, " id %d -> %d", r.SrcIdentity, r.DstIdentity)
	if r.Type != datapath.RecordTranslation && r.Type != datapath.RecordVerdict {
		fmt.Fprintf(&b, " %d bytes, total %d/%d packets %d/%d bytes", r.Length, r.Forward.Packets, r.Reverse.Packets, r.Forward.Bytes, r.Reverse.Bytes)
	}
	return b.String()
}

func end(a netip.Addr, port uint16) string {
	if port == 0 {
		return a.String()
	}
	return netip.AddrPortFrom(a, port).String()
}

func flags(f uint8) string {
	var names []string
	for i, n := range [...]string{"FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"} {
		if f>>i&1 != 0 {
			names = append(names, n)
		}
	}
	return strings.Join(names, ",")
}
