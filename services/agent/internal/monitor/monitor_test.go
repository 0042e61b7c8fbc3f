// SPDX-License-Identifier: Apache-2.0

package monitor_test

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/weirmesh/weir/bpf/datapath"
	"github.com/weirmesh/weir/services/agent/internal/monitor"
)

func record(change func(*datapath.Record)) *datapath.Record {
	r := &datapath.Record{Type: datapath.RecordTrace, Endpoint: 7, IpVersion: 4, Proto: 6, Sport: 41562, Dport: 8080, TcpFlags: 2, Length: 60,
		SrcIdentity: 300, DstIdentity: 301}
	r.Forward.Packets, r.Forward.Bytes = 1, 60
	for _, x := range []struct {
		hi, lo *uint64
		a      string
	}{{&r.Src.Hi, &r.Src.Lo, "10.244.1.5"}, {&r.Dst.Hi, &r.Dst.Lo, "10.244.2.7"}, {&r.Xlated.Hi, &r.Xlated.Lo, "10.244.2.9"}} {
		b := netip.MustParseAddr(x.a).As16()
		*x.hi, *x.lo = binary.NativeEndian.Uint64(b[:8]), binary.NativeEndian.Uint64(b[8:])
	}
	if change != nil {
		change(r)
	}
	return r
}

func TestText(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*datapath.Record)
		want   string
	}{
		{"trace", nil, "trace to-endpoint ep 7 10.244.1.5:41562 -> 10.244.2.7:8080 tcp SYN id 300 -> 301 60 bytes, total 1/0 packets 60/0 bytes"},
		{"reply", func(r *datapath.Record) { r.Flags, r.TcpFlags, r.Point = datapath.FlagIsReply, 18, 11 },
			"trace to-network ep 7 10.244.1.5:41562 -> 10.244.2.7:8080 tcp SYN,ACK reply id 300 -> 301 60 bytes, total 1/0 packets 60/0 bytes"},
		{"final", func(r *datapath.Record) { r.Type, r.TcpFlags = datapath.RecordFinal, 0 },
			"final to-endpoint ep 7 10.244.1.5:41562 -> 10.244.2.7:8080 tcp id 300 -> 301 60 bytes, total 1/0 packets 60/0 bytes"},
		{"drop", func(r *datapath.Record) {
			r.Type, r.Reason, r.Proto, r.Sport, r.Dport, r.IcmpType = datapath.RecordDrop, 132, 1, 0, 0, 8
		},
			"drop reason 132 ep 7 10.244.1.5 -> 10.244.2.7 icmp type 8 code 0 id 300 -> 301 60 bytes, total 1/0 packets 60/0 bytes"},
		{"verdict", func(r *datapath.Record) {
			r.Type, r.Verdict, r.Rule, r.Direction, r.Flags = datapath.RecordVerdict, uint8(datapath.PolicyDeny), 4, datapath.DirectionIngress, datapath.FlagAudited
		},
			"verdict ingress deny rule 4 audited ep 7 10.244.1.5:41562 -> 10.244.2.7:8080 tcp SYN id 300 -> 301"},
		{"translation", func(r *datapath.Record) { r.Type, r.Proto, r.XlatedPort = datapath.RecordTranslation, 17, 53 },
			"translate ep 7 10.244.1.5:41562 -> 10.244.2.7:8080 => 10.244.2.9:53 udp id 300 -> 301"},
	} {
		if got := monitor.Text(record(tt.change)); got != tt.want {
			t.Errorf("%s:\n%s\nwant\n%s", tt.name, got, tt.want)
		}
	}
}

func TestSlowWatcherLosesAndIsTold(t *testing.T) {
	h := monitor.New()
	h.Observe(0, record(nil)) // nobody watches
	fast, slow := h.Watch(), h.Watch()
	const n = 10000
	got := 0
	for range n {
		h.Observe(1, record(nil))
		if item := <-fast.C; item.CPU == 1 && item.Record.Endpoint == 7 {
			got++
		}
	}
	if got != n || fast.TakeLost() != 0 {
		t.Errorf("fast watcher got %d of %d", got, n)
	}
	if lost := slow.TakeLost(); lost == 0 || int(lost)+len(slow.C) != n || slow.TakeLost() != 0 {
		t.Errorf("slow watcher: %d lost, %d waiting, want %d in all", lost, len(slow.C), n)
	}
	fast.Close()
	slow.Close()
	before := len(slow.C)
	h.Observe(0, record(nil))
	if len(slow.C) != before {
		t.Error("a closed watcher got a record")
	}
}
