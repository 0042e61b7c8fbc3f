// SPDX-License-Identifier: Apache-2.0

package flowmatch

import (
	"fmt"
	"slices"
	"strings"

	"github.com/weirmesh/weir/gen/flow"
)

func uuids(f *flow.FlowFilter) (predicate, error) {
	return oneOf(f.GetUuid(), (*flow.Flow).GetUuid), nil
}

func directions(f *flow.FlowFilter) (predicate, error) {
	return oneOf(f.GetTrafficDirection(), (*flow.Flow).GetTrafficDirection), nil
}

func verdicts(f *flow.FlowFilter) (predicate, error) {
	return oneOf(f.GetVerdict(), (*flow.Flow).GetVerdict), nil
}

func dropReasons(f *flow.FlowFilter) (predicate, error) {
	p := oneOf(f.GetDropReasonDesc(), (*flow.Flow).GetDropReasonDesc)
	if p == nil {
		return nil, nil
	}
	return func(f *flow.Flow) bool { return f.GetVerdict() == flow.Verdict_DROPPED && p(f) }, nil
}

func interfaces(f *flow.FlowFilter) (predicate, error) {
	return anyOf(f.GetInterface(), func(want *flow.NetworkInterface) (predicate, error) {
		return func(f *flow.Flow) bool {
			i := f.GetInterface()
			return i != nil && (want.GetIndex() == 0 || want.GetIndex() == i.GetIndex()) && (want.GetName() == "" || want.GetName() == i.GetName())
		}, nil
	})
}

func eventTypes(f *flow.FlowFilter) (predicate, error) {
	return anyOf(f.GetEventType(), func(want *flow.EventTypeFilter) (predicate, error) {
		return func(f *flow.Flow) bool {
			e := f.GetEventType()
			return e != nil && (want.GetType() == 0 || want.GetType() == e.GetType()) && (!want.GetMatchSubType() || want.GetSubType() == e.GetSubType())
		}, nil
	})
}

// protocolTests says of a flow whether it is of a protocol.
var protocolTests = map[string]predicate{
	"tcp":    func(f *flow.Flow) bool { return f.GetL4().GetTCP() != nil },
	"udp":    func(f *flow.Flow) bool { return f.GetL4().GetUDP() != nil },
	"sctp":   func(f *flow.Flow) bool { return f.GetL4().GetSCTP() != nil },
	"icmp":   func(f *flow.Flow) bool { return f.GetL4().GetICMPv4() != nil || f.GetL4().GetICMPv6() != nil },
	"icmpv4": func(f *flow.Flow) bool { return f.GetL4().GetICMPv4() != nil },
	"icmpv6": func(f *flow.Flow) bool { return f.GetL4().GetICMPv6() != nil },
	"vrrp":   func(f *flow.Flow) bool { return f.GetL4().GetVRRP() != nil },
	"igmp":   func(f *flow.Flow) bool { return f.GetL4().GetIGMP() != nil },
	"dns":    func(f *flow.Flow) bool { return f.GetL7().GetDns() != nil },
	"http":   func(f *flow.Flow) bool { return f.GetL7().GetHttp() != nil },
	"kafka":  func(f *flow.Flow) bool { return f.GetL7().GetKafka() != nil },
}

func protocols(f *flow.FlowFilter) (predicate, error) {
	return anyOf(f.GetProtocol(), func(v string) (predicate, error) {
		p, ok := protocolTests[strings.ToLower(v)]
		if !ok {
			return nil, fmt.Errorf("invalid protocol filter: unknown protocol: %q", v)
		}
		return p, nil
	})
}

// replies takes an unset is_reply for neither, except that a drop counts as no reply.
func replies(f *flow.FlowFilter) (predicate, error) {
	want := f.GetReply()
	if len(want) == 0 {
		return nil, nil
	}
	return func(f *flow.Flow) bool {
		if f.GetIsReply() == nil && f.GetVerdict() != flow.Verdict_DROPPED {
			return false
		}
		return slices.Contains(want, f.GetIsReply().GetValue())
	}, nil
}

func tcpFlags(f *flow.FlowFilter) (predicate, error) {
	return anyOf(f.GetTcpFlags(), func(want *flow.TCPFlags) (predicate, error) {
		return func(f *flow.Flow) bool {
			have := f.GetL4().GetTCP().GetFlags()
			if have == nil {
				return false
			}
			implies := func(a, b bool) bool { return !a || b }
			return implies(want.FIN, have.FIN) && implies(want.SYN, have.SYN) && implies(want.RST, have.RST) &&
				implies(want.PSH, have.PSH) && implies(want.ACK, have.ACK) && implies(want.URG, have.URG) &&
				implies(want.ECE, have.ECE) && implies(want.CWR, have.CWR) && implies(want.NS, have.NS)
		}, nil
	})
}

func ipVersions(f *flow.FlowFilter) (predicate, error) {
	return oneOf(f.GetIpVersion(), func(f *flow.Flow) flow.IPVersion { return f.GetIP().GetIpVersion() }), nil
}

func traceIDs(f *flow.FlowFilter) (predicate, error) {
	return join(
		oneOf(f.GetTraceId(), func(f *flow.Flow) string { return f.GetTraceContext().GetParent().GetTraceId() }),
		oneOf(f.GetIpTraceId(), func(f *flow.Flow) uint64 { return f.GetIpTraceId().GetTraceId() }),
	), nil
}

func encryptions(f *flow.FlowFilter) (predicate, error) {
	return oneOf(f.GetEncrypted(), func(f *flow.Flow) bool { return f.GetIP().GetEncrypted() }), nil
}
