// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"unsafe"
)

// Record is one record of the kernel, as the C struct has it (lib/record.h says what each field means). Ports and counters are in
// host order; Src, Dst and Xlated are read by SrcAddr, DstAddr and XlatedAddr. A record from Rings.Read points into the ring: copy
// what is to be kept.
type Record = tcRecord

// Traffic counts one direction of a connection; times are CLOCK_MONOTONIC nanoseconds, 0 = no packet went.
type Traffic = tcTraffic

// RecordSize is the length of a record in bytes.
const RecordSize = int(unsafe.Sizeof(Record{}))

// Record types.
const (
	RecordTrace       = uint8(tcRecordTypeRECORD_TRACE)
	RecordDrop        = uint8(tcRecordTypeRECORD_DROP)
	RecordTranslation = uint8(tcRecordTypeRECORD_TRANSLATION)
	RecordFinal       = uint8(tcRecordTypeRECORD_FINAL)
	// RecordVerdict tells what policy decided: Verdict, Rule, Direction (of the policy) and FlagAudited. It has no totals.
	RecordVerdict = uint8(tcRecordTypeRECORD_VERDICT)
)

// Trace points, in Hubble's numbers (event_type.sub_type).
const (
	PointToEndpoint   = uint8(tcTracePointPOINT_TO_ENDPOINT)
	PointToHost       = uint8(tcTracePointPOINT_TO_HOST)
	PointToOverlay    = uint8(tcTracePointPOINT_TO_OVERLAY)
	PointFromEndpoint = uint8(tcTracePointPOINT_FROM_ENDPOINT)
	PointToNetwork    = uint8(tcTracePointPOINT_TO_NETWORK)
)

// Trace reasons, in the datapath's numbers (flow.TraceReason is one more; unknown is 0 there).
const (
	TraceNew         = uint8(tcTraceReasonTRACE_NEW)
	TraceEstablished = uint8(tcTraceReasonTRACE_ESTABLISHED)
	TraceReply       = uint8(tcTraceReasonTRACE_REPLY)
	TraceRelated     = uint8(tcTraceReasonTRACE_RELATED)
	TraceUnknown     = uint8(tcTraceReasonTRACE_UNKNOWN)
)

// Directions of a connection seen from the endpoint, in Hubble's numbers.
const (
	DirectionIngress = uint8(tcDirectionDIRECTION_INGRESS)
	DirectionEgress  = uint8(tcDirectionDIRECTION_EGRESS)
)

// Bits of Record.Known: which optional values are set.
const (
	KnownHandshake       = uint8(tcKnownBitsKNOWN_HANDSHAKE)
	KnownSRTT            = uint8(tcKnownBitsKNOWN_SRTT)
	KnownRetransmissions = uint8(tcKnownBitsKNOWN_RETRANSMISSIONS)
)

// Bits of Record.Flags.
const (
	// FlagIsReply: the packet goes from responder to originator.
	FlagIsReply = uint8(tcRecordFlagsRECORD_IS_REPLY)
	// FlagFragment: the packet is a fragment.
	FlagFragment = uint8(tcRecordFlagsRECORD_FRAGMENT)
	// FlagPickedUp: the connection's start was not seen; who began it is a guess.
	FlagPickedUp = uint8(tcRecordFlagsRECORD_PICKED_UP)
	// FlagSocketReverse: a translation of an answer.
	FlagSocketReverse = uint8(tcRecordFlagsRECORD_SOCK_REVERSE)
	// FlagMasqueraded: the connection leaves the node with the node's address.
	FlagMasqueraded = uint8(tcRecordFlagsRECORD_MASQUERADED)
	// FlagAudited: policy would have dropped it (Verdict says how), and audit let it pass.
	FlagAudited = uint8(tcRecordFlagsRECORD_AUDITED)
)

// Drop reasons, in Hubble's numbers.
const (
	DropInvalidSourceIP  = uint8(tcDropReasonDROP_INVALID_SOURCE_IP)
	DropPolicy           = uint8(tcDropReasonDROP_POLICY)
	DropPolicyDeny       = uint8(tcDropReasonDROP_POLICY_DENY)
	DropInvalidPacket    = uint8(tcDropReasonDROP_INVALID_PACKET)
	DropTruncated        = uint8(tcDropReasonDROP_TRUNCATED)
	DropUnknownL4        = uint8(tcDropReasonDROP_UNKNOWN_L4)
	DropUnsupportedL3    = uint8(tcDropReasonDROP_UNSUPPORTED_L3)
	DropWriteError       = uint8(tcDropReasonDROP_WRITE_ERROR)
	DropUnknownTarget    = uint8(tcDropReasonDROP_UNKNOWN_TARGET)
	DropUnroutable       = uint8(tcDropReasonDROP_UNROUTABLE)
	DropConntrackFull    = uint8(tcDropReasonDROP_CT_FULL)
	DropInvalidExtension = uint8(tcDropReasonDROP_INVALID_EXTENSION)
	DropNoBackend        = uint8(tcDropReasonDROP_NO_BACKEND)
	DropNoTunnelEndpoint = uint8(tcDropReasonDROP_NO_TUNNEL_ENDPOINT)
	DropNoNATPort        = uint8(tcDropReasonDROP_NO_NAT_PORT)
	DropNATProtocol      = uint8(tcDropReasonDROP_NAT_PROTOCOL)
	// DropProxyFragment: a fragment of a flow that goes through the proxy.
	DropProxyFragment = uint8(tcDropReasonDROP_PROXY_FRAGMENT)
	// DropNoListener: the proxy has no listener for the slot, or has lost the connection.
	DropNoListener = uint8(tcDropReasonDROP_NO_LISTENER)
	// DropProxyAssign: the kernel would not give the packet to the proxy's socket.
	DropProxyAssign = uint8(tcDropReasonDROP_PROXY_ASSIGN)
	// DropProxyProtocol: a protocol that no proxy takes.
	DropProxyProtocol = uint8(tcDropReasonDROP_PROXY_PROTOCOL)
	// DropSlotChanged: policy has moved the connection to another slot, or to one; it is reset.
	DropSlotChanged     = uint8(tcDropReasonDROP_SLOT_CHANGED)
	DropIsClusterIP     = uint8(tcDropReasonDROP_IS_CLUSTER_IP)
	DropSourceRange     = uint8(tcDropReasonDROP_SOURCE_RANGE)
	DropNoRoute         = uint8(tcDropReasonDROP_NO_ROUTE)
	DropUnknownFragment = uint8(tcDropReasonDROP_UNKNOWN_FRAGMENT)
	DropForbiddenICMPv6 = uint8(tcDropReasonDROP_FORBIDDEN_ICMP6)
	DropTTLExceeded     = uint8(tcDropReasonDROP_TTL_EXCEEDED)
)

// Reserved identities that programs know.
const (
	IdentityHost          = uint32(tcIdentityIDENTITY_HOST)
	IdentityWorld         = uint32(tcIdentityIDENTITY_WORLD)
	IdentityRemoteNode    = uint32(tcIdentityIDENTITY_REMOTE_NODE)
	IdentityKubeAPIServer = uint32(tcIdentityIDENTITY_KUBE_APISERVER)
	IdentityWorldIPv4     = uint32(tcIdentityIDENTITY_WORLD_V4)
	IdentityWorldIPv6     = uint32(tcIdentityIDENTITY_WORLD_V6)
)

// SrcAddr returns the source; of a final record, the originator. IPv4 is returned as IPv4.
func (r *tcRecord) SrcAddr() netip.Addr { return r.Src.netip() }

// DstAddr returns the destination; of a final record, the responder; of a translation, the service address.
func (r *tcRecord) DstAddr() netip.Addr { return r.Dst.netip() }

// XlatedAddr returns the backend of a translation.
func (r *tcRecord) XlatedAddr() netip.Addr { return r.Xlated.netip() }

// Slot is the slot of the proxy that the connection goes through; 0 = none.
func (r *tcRecord) Slot() uint16 {
	if r.Type == RecordTranslation {
		return 0
	}
	return r.XlatedPort
}

// IsReply says whether the packet goes from responder to originator.
func (r *tcRecord) IsReply() bool { return r.Flags&FlagIsReply != 0 }

// DecodeRecord copies a record out of bytes, which must be RecordSize long and name a known type.
func DecodeRecord(b []byte) (Record, error) {
	var r Record
	if len(b) != RecordSize {
		return r, fmt.Errorf("record of %d bytes: want %d", len(b), RecordSize)
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&r)), RecordSize), b)
	if err := r.check(); err != nil {
		return Record{}, err
	}
	return r, nil
}

func (r *tcRecord) check() error {
	if r.Type < RecordTrace || r.Type > RecordVerdict {
		return fmt.Errorf("record type %d: unknown", r.Type)
	}
	return nil
}

func (a tcAddr) bytes() [16]byte {
	var b [16]byte
	binary.NativeEndian.PutUint64(b[:8], a.Hi)
	binary.NativeEndian.PutUint64(b[8:], a.Lo)
	return b
}

func (a tcAddr) netip() netip.Addr { return netip.AddrFrom16(a.bytes()).Unmap() }

func addrOf(a netip.Addr) tcAddr {
	b := a.As16()
	return tcAddr{Hi: binary.NativeEndian.Uint64(b[:8]), Lo: binary.NativeEndian.Uint64(b[8:])}
}

// port16 turns a port between host and network order.
func port16(p uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], p)
	return binary.NativeEndian.Uint16(b[:])
}
