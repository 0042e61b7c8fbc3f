// SPDX-License-Identifier: Apache-2.0

// Package flow turns the kernel's records into Hubble's flow messages.
//
// Encoding is by hand, on the wire format: an endpoint's part of a flow hardly ever changes, so it is encoded once and copied from then on. The
// straightforward way, through the generated messages, is the oracle in the tests.
package flow

import (
	"crypto/rand"
	"encoding/binary"
	"net/netip"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/weirmesh/weir/bpf/datapath"
	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/services/agent/internal/batch"
)

// Hubble's event types (flow.CiliumEventType.type).
const (
	eventDrop      = 1
	eventTrace     = 4
	eventVerdict   = 5
	eventTraceSock = 7
)

// Node is what all flows of a node have in common.
type Node struct {
	// Cluster and Name make node_name, `cluster/name`.
	Cluster, Name string
	// Labels are `key=value`, sorted.
	Labels []string
	// Version of this agent, for the emitter.
	Version string
	// IPv4 and IPv6 replace a masqueraded source; invalid = none.
	IPv4, IPv6 netip.Addr
}

// Clock turns the kernel's monotonic nanoseconds into Unix nanoseconds.
type Clock interface{ Unix(monotonic uint64) int64 }

// Encoder encodes flows of one node. Not safe for concurrent use; its Directory is.
type Encoder struct {
	dir    *Directory
	clock  Clock
	uuids  uuids
	static []byte // emitter, node name and labels
	xlated [2]string

	tcpSummary [256][]byte // fields Summary, encoded
	tcpFlags   [256][]byte // messages TCPFlags
	icmp       map[uint32][]byte

	proxied      proxied
	requestRules map[ruleList]*encodedRules

	body, stats []byte
	meta        batch.Meta
	out         Flow
}

// NewEncoder makes an encoder.
func NewEncoder(dir *Directory, clock Clock, node Node) *Encoder {
	e := &Encoder{dir: dir, clock: clock, icmp: map[uint32][]byte{}, requestRules: map[ruleList]*encodedRules{}, body: make([]byte, 0, 2048), stats: make([]byte, 0, 256)}
	var random [8]byte
	_, _ = rand.Read(random[:]) // never fails (crypto/rand)
	e.uuids = newUUIDs(random)
	for i := range 256 {
		e.tcpSummary[i] = appendStringField(nil, tagSummary, tcpSummary(byte(i)))
		e.tcpFlags[i] = tcpFlags(byte(i))
	}
	e.SetNode(node)
	return e
}

// SetNode changes what all flows have in common.
func (e *Encoder) SetNode(n Node) {
	var emitter []byte
	emitter = appendStringField(emitter, 1<<3|2, "Weir")
	emitter = appendStringField(emitter, 2<<3|2, n.Version)
	b := appendBytesField(nil, tagEmitter, emitter)
	b = appendStringField(b, tagNodeName, n.Cluster+"/"+n.Name)
	for _, l := range n.Labels {
		b = appendBytesField(b, tagNodeLabels, []byte(l))
	}
	e.static = b
	e.xlated = [2]string{}
	if n.IPv4.IsValid() {
		e.xlated[0] = n.IPv4.String()
	}
	if n.IPv6.IsValid() {
		e.xlated[1] = n.IPv6.String()
	}
}

// Flow is an encoded flow. Its slices are valid until the encoder's next call.
type Flow struct {
	// Time in Unix nanoseconds.
	Time int64
	// Body is a flow.Flow, Stats a weir.observer.v1.FlowStats (nil = none).
	Body, Stats []byte
	Meta        *batch.Meta
}

// Encode gives each flow of a record to emit: one, or two for a socket's translation (before and after). False: the record makes no sense.
func (e *Encoder) Encode(r *datapath.Record, emit func(*Flow)) bool {
	switch r.Type {
	case datapath.RecordTrace, datapath.RecordDrop, datapath.RecordFinal, datapath.RecordVerdict:
		if r.IpVersion != 4 && r.IpVersion != 6 {
			return false
		}
		e.out = e.packet(r)
		emit(&e.out)
	case datapath.RecordTranslation:
		if r.IpVersion != 4 && r.IpVersion != 6 {
			return false
		}
		for _, post := range []bool{false, true} {
			e.out = e.translation(r, post)
			emit(&e.out)
		}
	default:
		return false
	}
	return true
}

// packet encodes a trace, drop, verdict or final record.
func (e *Encoder) packet(r *datapath.Record) Flow {
	if r.Slot() != 0 {
		e.proxied.note(r)
	}
	drop := r.Type == datapath.RecordDrop
	final := r.Type == datapath.RecordFinal
	time := e.clock.Unix(r.Time)

	b := e.begin(time)
	k := kindOf(r)
	if k.dropReason != 0 {
		b = appendVarintField(b, tagDropReason, uint64(k.dropReason))
		b = appendVarintField(b, tagDropDesc, uint64(k.dropReason))
	}
	if k.event == eventTrace {
		b = appendVarintField(b, tagPoint, pointEnum(r.Point))
		b = appendVarintField(b, tagTraceReason, reasonEnum(r.Reason))
	}
	verdict, replyKnown, reply, event := k.verdict, k.replyKnown, k.reply, k.event
	b = append(b, tagVerdict, byte(verdict), tagType, byte(flowpb.FlowType_L3_L4))
	b = appendEvent(b, event, k.sub)
	if r.SrcMac != [6]byte{} || r.DstMac != [6]byte{} {
		var start int
		b, start = begin(b, tagEthernet)
		b = appendMAC(b, 1<<3|2, &r.SrcMac)
		b = appendMAC(b, 2<<3|2, &r.DstMac)
		b = end(b, start)
	}
	if r.Direction != 0 {
		b = appendVarintField(b, tagDirection, uint64(r.Direction))
	}
	if replyKnown {
		b = appendReply(b, reply)
	}
	src, dst := bytesOf(r.Src.Hi, r.Src.Lo), bytesOf(r.Dst.Hi, r.Dst.Lo)
	sport, dport := r.Sport, r.Dport
	xlated := ""
	if r.Flags&datapath.FlagMasqueraded != 0 && !reply {
		xlated = e.xlated[0]
		if r.IpVersion == 6 {
			xlated = e.xlated[1]
		}
	}

	e.dir.mu.Lock()
	source, destination := e.dir.end(src, r.SrcIdentity), e.dir.end(dst, r.DstIdentity)
	if reply {
		if s := e.dir.service(r.Service, src, sport, r.Proto); s != nil {
			b = appendBytesField(b, tagSourceService, s)
		}
	} else if s := e.dir.service(r.Service, dst, dport, r.Proto); s != nil {
		b = appendBytesField(b, tagDestService, s)
	}
	if r.Ifindex != 0 {
		b = appendBytesField(b, tagInterface, e.dir.link(r.Ifindex))
	}
	if drop || event == eventVerdict {
		b = e.dir.decided(b, r)
	}
	e.dir.mu.Unlock()

	b = e.ends(b, source, destination, r.IpVersion, xlated)
	b, name := e.layer4(b, sport, dport, r)
	if final {
		b = appendEnded(b, name, r)
	} else {
		b = e.summary(b, name, r)
	}
	e.body = b
	e.stats = e.encodeStats(e.stats[:0], r, final)
	e.meta = batch.Meta{SourceNamespace: source.namespace, DestinationNamespace: destination.namespace, Verdict: int32(verdict), EventType: int32(event)}
	return Flow{Time: time, Body: e.body, Stats: e.stats, Meta: &e.meta}
}

// kind is what a record's type and outcome make of a flow.
type kind struct {
	verdict           flowpb.Verdict
	event, sub        uint64
	dropReason        uint8
	replyKnown, reply bool
}

func kindOf(r *datapath.Record) kind {
	switch r.Type {
	case datapath.RecordDrop:
		return kind{verdict: flowpb.Verdict_DROPPED, event: eventDrop, sub: uint64(r.Reason), dropReason: r.Reason}
	case datapath.RecordVerdict:
		k := kind{event: eventVerdict}
		switch v := datapath.PolicyVerdict(r.Verdict); {
		case v == datapath.PolicyAllow, v == datapath.PolicyVisible && r.Slot() == 0: // the latter found no proxy
			k.verdict, k.replyKnown = flowpb.Verdict_FORWARDED, true
		case v == datapath.PolicyRedirect, v == datapath.PolicyVisible:
			k.verdict, k.replyKnown = flowpb.Verdict_REDIRECTED, true
		case r.Flags&datapath.FlagAudited != 0:
			k.verdict, k.replyKnown = flowpb.Verdict_AUDIT, true
		default:
			k.verdict, k.dropReason = flowpb.Verdict_DROPPED, datapath.DropPolicy
			if v == datapath.PolicyDeny {
				k.dropReason = datapath.DropPolicyDeny
			}
		}
		return k
	case datapath.RecordFinal:
		return kind{verdict: flowpb.Verdict_FORWARDED, event: eventTrace, sub: uint64(r.Point), replyKnown: true}
	}
	known := r.Reason != reasonUnknown
	return kind{verdict: flowpb.Verdict_FORWARDED, event: eventTrace, sub: uint64(r.Point), replyKnown: known, reply: known && r.Flags&datapath.FlagIsReply != 0}
}

// translation encodes one half of what a socket saw of a service: the service address, or the backend behind it.
func (e *Encoder) translation(r *datapath.Record, post bool) Flow {
	time := e.clock.Unix(r.Time)
	reverse := r.Flags&datapath.FlagSocketReverse != 0
	verdict, point := flowpb.Verdict_TRACED, flowpb.SocketTranslationPoint_SOCK_XLATE_POINT_PRE_DIRECTION_FWD
	if post {
		verdict = flowpb.Verdict_TRANSLATED
		point++
	}
	if reverse {
		point += 2
	}
	// An answer is seen from the backend first, and from the service afterwards.
	other, port, identity := bytesOf(r.Dst.Hi, r.Dst.Lo), r.Dport, uint32(0)
	if post != reverse {
		other, port, identity = bytesOf(r.Xlated.Hi, r.Xlated.Lo), r.XlatedPort, r.DstIdentity
	}
	b := e.begin(time)
	b = append(b, tagVerdict, byte(verdict), tagType, byte(flowpb.FlowType_SOCK))
	b = appendEvent(b, eventTraceSock, uint64(point))
	b = appendVarintField(b, tagSockPoint, uint64(point))
	b = appendVarintField(b, tagCookie, r.SocketCookie)
	b = appendVarintField(b, tagCgroup, r.CgroupId)
	b = appendReply(b, reverse)
	self := bytesOf(r.Src.Hi, r.Src.Lo)

	e.dir.mu.Lock()
	local, remote := e.dir.end(self, r.SrcIdentity), e.dir.end(other, identity)
	tag := uint32(tagDestService)
	if reverse {
		tag = tagSourceService
	}
	if s := e.dir.service(r.Service, bytesOf(r.Dst.Hi, r.Dst.Lo), r.Dport, r.Proto); s != nil {
		b = appendBytesField(b, tag, s)
	}
	e.dir.mu.Unlock()

	source, destination, sport, dport := local, remote, r.Sport, port
	if reverse {
		source, destination, sport, dport = remote, local, port, r.Sport
	}
	b = e.ends(b, source, destination, r.IpVersion, "")
	switch r.Proto {
	case protoTCP:
		b = appendPorts(b, 1<<3|2, sport, dport, nil)
		b = appendStringField(b, tagSummary, "TCP")
	case protoUDP:
		b = appendPorts(b, 2<<3|2, sport, dport, nil)
		b = appendStringField(b, tagSummary, "UDP")
	default:
		b = appendStringField(b, tagSummary, "Unknown")
	}
	e.body = b
	e.meta = batch.Meta{SourceNamespace: source.namespace, DestinationNamespace: destination.namespace, Verdict: int32(verdict), EventType: eventTraceSock}
	return Flow{Time: time, Body: e.body, Meta: &e.meta}
}

// begin starts a flow with what every flow has.
func (e *Encoder) begin(time int64) []byte {
	b := appendTimestamp(e.body[:0], tagTime, time)
	b = appendTag(b, tagUUID)
	b = append(b, 36)
	b = e.uuids.append(b)
	return append(b, e.static...)
}

func (e *Encoder) ends(b []byte, source, destination *half, version uint8, xlated string) []byte {
	b, start := begin(b, tagIP)
	b = appendStringField(b, 1<<3|2, source.text)
	b = appendStringField(b, 2<<3|2, destination.text)
	if version == 6 {
		b = append(b, 3<<3, byte(flowpb.IPVersion_IPv6))
	} else {
		b = append(b, 3<<3, byte(flowpb.IPVersion_IPv4))
	}
	b = appendStringField(b, 5<<3|2, xlated)
	b = end(b, start)
	for _, n := range source.names {
		b = appendStringField(b, tagSourceNames, n)
	}
	for _, n := range destination.names {
		b = appendStringField(b, tagDestNames, n)
	}
	b = appendBytesField(b, tagSource, source.endpoint)
	return appendBytesField(b, tagDestination, destination.endpoint)
}

// IP protocol numbers.
const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
	protoSCTP   = 132
)

// layer4 appends the record's Layer4, if it has one, and returns the protocol's name.
func (e *Encoder) layer4(b []byte, sport, dport uint16, r *datapath.Record) ([]byte, string) {
	switch r.Proto {
	case protoTCP:
		return appendPorts(b, 1<<3|2, sport, dport, e.tcpFlags[r.TcpFlags]), "TCP"
	case protoUDP:
		return appendPorts(b, 2<<3|2, sport, dport, nil), "UDP"
	case protoSCTP:
		return appendPorts(b, 5<<3|2, sport, dport, nil), "SCTP"
	case protoICMP:
		return appendICMP(b, 3<<3|2, r), "ICMPv4"
	case protoICMPv6:
		return appendICMP(b, 4<<3|2, r), "ICMPv6"
	}
	if r.IpVersion == 6 {
		return b, "IPv6"
	}
	return b, "IPv4"
}

// summary appends Hubble's summary of a packet.
func (e *Encoder) summary(b []byte, name string, r *datapath.Record) []byte {
	switch r.Proto {
	case protoTCP:
		return append(b, e.tcpSummary[r.TcpFlags]...)
	case protoICMP, protoICMPv6:
		key := uint32(r.Proto)<<16 | uint32(r.IcmpType)<<8 | uint32(r.IcmpCode)
		encoded, ok := e.icmp[key]
		if !ok {
			encoded = appendStringField(nil, tagSummary, icmpSummary(r.Proto == protoICMPv6, r.IcmpType, r.IcmpCode))
			e.icmp[key] = encoded // at most 2 x 65,536
		}
		return append(b, encoded...)
	}
	return appendStringField(b, tagSummary, name)
}

// appendEnded appends the summary of a final record, which is no packet: "TCP ended: 5 packets 416 B, back 4 packets 404 B".
func appendEnded(b []byte, name string, r *datapath.Record) []byte {
	var room [96]byte
	s := append(room[:0], name...)
	s = append(s, " ended: "...)
	s = appendTotals(s, r.Forward.Packets, r.Forward.Bytes)
	s = append(s, ", back "...)
	s = appendTotals(s, r.Reverse.Packets, r.Reverse.Bytes)
	return appendBytesField(b, tagSummary, s)
}

func appendTotals(s []byte, packets, bytes uint64) []byte {
	s = strconv.AppendUint(s, packets, 10)
	s = append(s, " packets "...)
	s = strconv.AppendUint(s, bytes, 10)
	return append(s, " B"...)
}

// appendPorts appends Layer4 with TCP, UDP or SCTP; flags is an encoded TCPFlags, nil for the other two.
func appendPorts(b []byte, layer uint32, sport, dport uint16, flags []byte) []byte {
	b, start := begin(b, tagL4)
	b, inner := begin(b, layer)
	b = appendVarintField(b, 1<<3, uint64(sport))
	b = appendVarintField(b, 2<<3, uint64(dport))
	if flags != nil {
		b = appendBytesField(b, 3<<3|2, flags)
	}
	return end(end(b, inner), start)
}

func appendICMP(b []byte, layer uint32, r *datapath.Record) []byte {
	b, start := begin(b, tagL4)
	b, inner := begin(b, layer)
	b = appendVarintField(b, 1<<3, uint64(r.IcmpType))
	b = appendVarintField(b, 2<<3, uint64(r.IcmpCode))
	return end(end(b, inner), start)
}

func appendEvent(b []byte, event, sub uint64) []byte {
	b, start := begin(b, tagEventType)
	b = appendVarintField(b, 1<<3, event)
	b = appendVarintField(b, 2<<3, sub)
	return end(b, start)
}

// appendReply sets is_reply, and the older field reply that says the same.
func appendReply(b []byte, reply bool) []byte {
	b = appendTag(b, tagIsReply)
	if !reply {
		return append(b, 0)
	}
	b = append(b, 2, 1<<3, 1)
	return append(appendTag(b, tagReply), 1)
}

// reasonUnknown is the datapath's trace reason when conntrack does not know.
const reasonUnknown = datapath.TraceUnknown

// reasonEnum turns the datapath's trace reason into flow.TraceReason.
func reasonEnum(reason uint8) uint64 {
	switch {
	case reason < reasonUnknown:
		return uint64(reason) + 1
	case reason == reasonUnknown:
		return 0
	}
	return uint64(reason)
}

// pointEnum turns a trace point into flow.TraceObservationPoint, where 0 means unknown.
func pointEnum(point uint8) uint64 {
	if point == 0 {
		return uint64(flowpb.TraceObservationPoint_TO_ENDPOINT)
	}
	return uint64(point)
}

func (e *Encoder) encodeStats(b []byte, r *datapath.Record, final bool) []byte {
	if r.Connection == 0 {
		return nil
	}
	b = append(b, 1<<3|1)
	b = protowire.AppendFixed64(b, r.Connection)
	b = e.appendTraffic(b, 2<<3|2, r.Forward.Packets, r.Forward.Bytes, r.Forward.First, r.Forward.Last, r.ForwardFlags)
	b = e.appendTraffic(b, 3<<3|2, r.Reverse.Packets, r.Reverse.Bytes, r.Reverse.First, r.Reverse.Last, r.ReverseFlags)
	// Optional fields: present when known, 0 included.
	if r.Known&datapath.KnownHandshake != 0 {
		b = protowire.AppendVarint(append(b, 4<<3), uint64(r.HandshakeUs))
	}
	if r.Known&datapath.KnownSRTT != 0 {
		b = protowire.AppendVarint(append(b, 5<<3), uint64(r.SrttUs))
	}
	if r.Known&datapath.KnownRetransmissions != 0 {
		b = protowire.AppendVarint(append(b, 6<<3), uint64(r.Retransmissions))
	}
	if final {
		b = append(b, 7<<3, 1)
	}
	return b
}

func (e *Encoder) appendTraffic(b []byte, tag uint32, packets, bytes, first, last uint64, flags uint8) []byte {
	if packets == 0 {
		return b
	}
	b, start := begin(b, tag)
	b = appendVarintField(b, 1<<3, packets)
	b = appendVarintField(b, 2<<3, bytes)
	b = appendTimestamp(b, 3<<3|2, e.clock.Unix(first))
	b = appendTimestamp(b, 4<<3|2, e.clock.Unix(last))
	b = appendVarintField(b, 5<<3, uint64(flags))
	return end(b, start)
}

func bytesOf(hi, lo uint64) [16]byte {
	var a [16]byte
	binary.NativeEndian.PutUint64(a[:8], hi)
	binary.NativeEndian.PutUint64(a[8:], lo)
	return a
}
