// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/bpf/datapath"
	flowpb "github.com/weirmesh/weir/gen/flow"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// oracle builds flows the straightforward way, from a world of plain maps.
type oracle struct {
	node       Node
	shift      int64
	peers      map[netip.Addr]Peer
	labels     map[uint32][]string
	services   map[uint32]ServiceName
	frontends  map[Frontend]ServiceName
	interfaces map[uint32]string
	rules      map[uint32]told
	names      map[netip.Addr][]string
}

// told is what flows say of a rule number.
type told struct {
	match    uint32
	policies []*flowpb.Policy
	logs     []string
}

func (o *oracle) time(monotonic uint64) *timestamppb.Timestamp {
	return timestamppb.New(time.Unix(0, int64(monotonic)+o.shift))
}

func (o *oracle) endpoint(a netip.Addr, identity uint32) *flowpb.Endpoint {
	p, ok := o.peers[a]
	if !ok || identity != 0 && p.Identity != identity {
		p = Peer{Identity: identity}
	}
	e := &flowpb.Endpoint{ID: p.EndpointID, Identity: p.Identity, Namespace: p.Namespace, PodName: p.Pod, Labels: o.labels[p.Identity]}
	if p.Identity != 0 && p.Identity != 2 && p.Identity != 9 && p.Identity != 10 {
		e.ClusterName = o.node.Cluster
	}
	if p.WorkloadName != "" {
		e.Workloads = []*flowpb.Workload{{Name: p.WorkloadName, Kind: p.WorkloadKind}}
	}
	return e
}

func (o *oracle) service(id uint32, a netip.Addr, port uint16, proto uint8) *flowpb.Service {
	name, ok := o.services[id]
	if !ok {
		name, ok = o.frontends[Frontend{a, port, proto}]
	}
	if !ok {
		for f, n := range o.frontends {
			if f.Addr == a {
				name, ok = n, true
			}
		}
	}
	if !ok {
		return nil
	}
	return &flowpb.Service{Name: name.Name, Namespace: name.Namespace}
}

func (o *oracle) common(r *datapath.Record) *flowpb.Flow {
	return &flowpb.Flow{
		Time: o.time(r.Time), Emitter: &flowpb.Emitter{Name: "Weir", Version: o.node.Version},
		NodeName: o.node.Cluster + "/" + o.node.Name, NodeLabels: o.node.Labels,
	}
}

func version(v uint8) flowpb.IPVersion {
	if v == 6 {
		return flowpb.IPVersion_IPv6
	}
	return flowpb.IPVersion_IPv4
}

func (o *oracle) packet(r *datapath.Record) *flowpb.Flow {
	f := o.common(r)
	f.Type = flowpb.FlowType_L3_L4
	f.TrafficDirection = flowpb.TrafficDirection(r.Direction)
	reply := r.IsReply() && r.Type == datapath.RecordTrace && r.Reason != datapath.TraceUnknown
	switch r.Type {
	case datapath.RecordDrop:
		f.Verdict, f.DropReason, f.DropReasonDesc = flowpb.Verdict_DROPPED, uint32(r.Reason), flowpb.DropReason(r.Reason) //nolint:staticcheck // oracle
		f.EventType = &flowpb.CiliumEventType{Type: 1, SubType: int32(r.Reason)}
	case datapath.RecordVerdict:
		f.EventType = &flowpb.CiliumEventType{Type: 5}
		reason := flowpb.DropReason_POLICY_DENIED
		if datapath.PolicyVerdict(r.Verdict) == datapath.PolicyDeny {
			reason = flowpb.DropReason_POLICY_DENY
		}
		switch {
		case allows(r) && r.Slot() != 0:
			f.Verdict, f.IsReply = flowpb.Verdict_REDIRECTED, wrapperspb.Bool(false)
		case allows(r):
			f.Verdict, f.IsReply = flowpb.Verdict_FORWARDED, wrapperspb.Bool(false)
		case r.Flags&datapath.FlagAudited != 0:
			f.Verdict, f.IsReply = flowpb.Verdict_AUDIT, wrapperspb.Bool(false)
		default:
			f.Verdict, f.DropReason, f.DropReasonDesc = flowpb.Verdict_DROPPED, uint32(reason), reason //nolint:staticcheck // oracle
		}
	default:
		f.Verdict = flowpb.Verdict_FORWARDED
		f.EventType = &flowpb.CiliumEventType{Type: 4, SubType: int32(r.Point)}
		f.TraceObservationPoint = flowpb.TraceObservationPoint(r.Point)
		if r.Point == 0 {
			f.TraceObservationPoint = flowpb.TraceObservationPoint_TO_ENDPOINT
		}
		f.TraceReason = flowpb.TraceReason([]int{1, 2, 3, 4, 5, 0}[r.Reason])
		if r.Reason != datapath.TraceUnknown || r.Type == datapath.RecordFinal {
			f.IsReply = wrapperspb.Bool(reply)
			f.Reply = reply //nolint:staticcheck // oracle
		}
	}
	if r.SrcMac != [6]byte{} || r.DstMac != [6]byte{} {
		f.Ethernet = &flowpb.Ethernet{Source: mac(r.SrcMac), Destination: mac(r.DstMac)}
	}
	f.IP = &flowpb.IP{Source: r.SrcAddr().String(), Destination: r.DstAddr().String(), IpVersion: version(r.IpVersion)}
	if r.Flags&datapath.FlagMasqueraded != 0 && !reply {
		f.IP.SourceXlated = o.node.IPv4.String()
		if r.IpVersion == 6 {
			f.IP.SourceXlated = o.node.IPv6.String()
		}
	}
	f.Source, f.Destination = o.endpoint(r.SrcAddr(), r.SrcIdentity), o.endpoint(r.DstAddr(), r.DstIdentity)
	f.SourceNames, f.DestinationNames = o.names[r.SrcAddr()], o.names[r.DstAddr()]
	if reply {
		f.SourceService = o.service(r.Service, r.SrcAddr(), r.Sport, r.Proto)
	} else {
		f.DestinationService = o.service(r.Service, r.DstAddr(), r.Dport, r.Proto)
	}
	if r.Ifindex != 0 {
		f.Interface = &flowpb.NetworkInterface{Index: r.Ifindex, Name: o.interfaces[r.Ifindex]}
	}
	if r.Type == datapath.RecordDrop || r.Type == datapath.RecordVerdict {
		o.decided(f, r)
	}
	o.layer4(f, r)
	return f
}

func allows(r *datapath.Record) bool {
	v := datapath.PolicyVerdict(r.Verdict)
	return v == datapath.PolicyAllow || v == datapath.PolicyRedirect || v == datapath.PolicyVisible
}

func (o *oracle) decided(f *flowpb.Flow, r *datapath.Record) {
	x, ok := o.rules[r.Rule]
	if !ok {
		return
	}
	f.PolicyLog = x.logs
	egress := r.Direction == datapath.DirectionEgress
	allowed := r.Type == datapath.RecordVerdict && allows(r)
	switch {
	case allowed && egress:
		f.EgressAllowedBy = x.policies
	case allowed:
		f.IngressAllowedBy = x.policies
	case egress:
		f.EgressDeniedBy = x.policies
	default:
		f.IngressDeniedBy = x.policies
	}
	if r.Type == datapath.RecordVerdict {
		f.PolicyMatchType = x.match
	}
}

func mac(m [6]byte) string {
	if m == [6]byte{} {
		return ""
	}
	const digits = "0123456789abcdef"
	var parts []string
	for _, b := range m {
		parts = append(parts, string([]byte{digits[b>>4], digits[b&15]}))
	}
	return strings.Join(parts, ":")
}

func (o *oracle) layer4(f *flowpb.Flow, r *datapath.Record) {
	s, d := uint32(r.Sport), uint32(r.Dport)
	var summary string
	switch r.Proto {
	case 6:
		t := &flowpb.TCP{SourcePort: s, DestinationPort: d, Flags: &flowpb.TCPFlags{
			FIN: r.TcpFlags&1 != 0, SYN: r.TcpFlags&2 != 0, RST: r.TcpFlags&4 != 0, PSH: r.TcpFlags&8 != 0,
			ACK: r.TcpFlags&16 != 0, URG: r.TcpFlags&32 != 0, ECE: r.TcpFlags&64 != 0, CWR: r.TcpFlags&128 != 0}}
		f.L4 = &flowpb.Layer4{Protocol: &flowpb.Layer4_TCP{TCP: t}}
		var names []string
		for _, n := range []struct {
			set  bool
			name string
		}{{t.Flags.SYN, "SYN"}, {t.Flags.ACK, "ACK"}, {t.Flags.RST, "RST"}, {t.Flags.FIN, "FIN"}, {t.Flags.PSH, "PSH"},
			{t.Flags.URG, "URG"}, {t.Flags.ECE, "ECE"}, {t.Flags.CWR, "CWR"}} {
			if n.set {
				names = append(names, n.name)
			}
		}
		summary = "TCP Flags: " + strings.Join(names, ", ")
	case 17:
		f.L4 = &flowpb.Layer4{Protocol: &flowpb.Layer4_UDP{UDP: &flowpb.UDP{SourcePort: s, DestinationPort: d}}}
		summary = "UDP"
	case 132:
		f.L4 = &flowpb.Layer4{Protocol: &flowpb.Layer4_SCTP{SCTP: &flowpb.SCTP{SourcePort: s, DestinationPort: d}}}
		summary = "SCTP"
	case 1:
		f.L4 = &flowpb.Layer4{Protocol: &flowpb.Layer4_ICMPv4{ICMPv4: &flowpb.ICMPv4{Type: uint32(r.IcmpType), Code: uint32(r.IcmpCode)}}}
		summary = icmpSummary(false, r.IcmpType, r.IcmpCode)
	case 58:
		f.L4 = &flowpb.Layer4{Protocol: &flowpb.Layer4_ICMPv6{ICMPv6: &flowpb.ICMPv6{Type: uint32(r.IcmpType), Code: uint32(r.IcmpCode)}}}
		summary = icmpSummary(true, r.IcmpType, r.IcmpCode)
	default:
		summary = version(r.IpVersion).String()
	}
	if r.Type == datapath.RecordFinal {
		name, _, _ := strings.Cut(summary, " ")
		summary = fmt.Sprintf("%s ended: %d packets %d B, back %d packets %d B", name, r.Forward.Packets, r.Forward.Bytes, r.Reverse.Packets, r.Reverse.Bytes)
	}
	f.Summary = summary //nolint:staticcheck // oracle
}

func (o *oracle) translation(r *datapath.Record, post bool) *flowpb.Flow {
	f := o.common(r)
	f.Type = flowpb.FlowType_SOCK
	reverse := r.Flags&datapath.FlagSocketReverse != 0
	point := 1
	f.Verdict = flowpb.Verdict_TRACED
	if post {
		point, f.Verdict = 2, flowpb.Verdict_TRANSLATED
	}
	if reverse {
		point += 2
	}
	f.SockXlatePoint = flowpb.SocketTranslationPoint(point)
	f.EventType = &flowpb.CiliumEventType{Type: 7, SubType: int32(point)}
	f.SocketCookie, f.CgroupId = r.SocketCookie, r.CgroupId
	f.IsReply, f.Reply = wrapperspb.Bool(reverse), reverse //nolint:staticcheck // oracle
	other, port, identity := r.DstAddr(), r.Dport, uint32(0)
	if post != reverse {
		other, port, identity = r.XlatedAddr(), r.XlatedPort, r.DstIdentity
	}
	self, far := o.endpoint(r.SrcAddr(), r.SrcIdentity), o.endpoint(other, identity)
	svc := o.service(r.Service, r.DstAddr(), r.Dport, r.Proto)
	src, dst, sport, dport := r.SrcAddr(), other, uint32(r.Sport), uint32(port)
	f.Source, f.Destination, f.DestinationService = self, far, svc
	if reverse {
		src, dst, sport, dport = dst, src, dport, sport
		f.Source, f.Destination, f.SourceService, f.DestinationService = far, self, svc, nil
	}
	f.IP = &flowpb.IP{Source: src.String(), Destination: dst.String(), IpVersion: version(r.IpVersion)}
	f.SourceNames, f.DestinationNames = o.names[src], o.names[dst]
	switch r.Proto {
	case 6:
		f.L4, f.Summary = &flowpb.Layer4{Protocol: &flowpb.Layer4_TCP{TCP: &flowpb.TCP{SourcePort: sport, DestinationPort: dport}}}, "TCP" //nolint:staticcheck // oracle
	case 17:
		f.L4, f.Summary = &flowpb.Layer4{Protocol: &flowpb.Layer4_UDP{UDP: &flowpb.UDP{SourcePort: sport, DestinationPort: dport}}}, "UDP" //nolint:staticcheck // oracle
	default:
		f.Summary = "Unknown" //nolint:staticcheck // oracle
	}
	return f
}

func (o *oracle) stats(r *datapath.Record) *observerv1.FlowStats {
	s := &observerv1.FlowStats{Connection: r.Connection, Final: r.Type == datapath.RecordFinal}
	side := func(t datapath.Traffic, flags uint8) *observerv1.DirectionStats {
		if t.Packets == 0 {
			return nil
		}
		return &observerv1.DirectionStats{Packets: t.Packets, Bytes: t.Bytes, First: o.time(t.First), Last: o.time(t.Last), TcpFlags: uint32(flags)}
	}
	s.Forward, s.Reverse = side(r.Forward, r.ForwardFlags), side(r.Reverse, r.ReverseFlags)
	if r.Known&datapath.KnownHandshake != 0 {
		s.HandshakeRttUs = proto.Uint32(r.HandshakeUs)
	}
	if r.Known&datapath.KnownSRTT != 0 {
		s.SrttUs = proto.Uint32(r.SrttUs)
	}
	if r.Known&datapath.KnownRetransmissions != 0 {
		s.Retransmissions = proto.Uint32(r.Retransmissions)
	}
	return s
}
