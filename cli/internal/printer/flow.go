// SPDX-License-Identifier: Apache-2.0

package printer

import (
	"fmt"
	"net"
	"path"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/cli/internal/eventname"
	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

var flowHead = []string{"TIMESTAMP", "SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY"}

func (p *Printer) flow(r *observer.GetFlowsResponse) error {
	f := r.GetFlow()
	var err error
	switch p.opts.Format {
	case JSON:
		return p.json(p.opts.Out, r)
	case Flat:
		return p.flat(f)
	case Compact:
		err = write(p.opts.Out, p.compactFlow(f))
	case Dict:
		err = write(p.opts.Out, p.dictFlow(f))
	case Table:
		source, destination := p.hosts(f)
		err = p.row(p.withNode("NODE", flowHead...), p.withNode(Safe(f.GetNodeName()), p.time(f.GetTime()),
			source, destination, p.flowType(f), p.verdict(f), p.summary(f)))
	}
	p.records++
	return err
}

func (p *Printer) compactFlow(f *flow.Flow) string {
	source, destination := p.hosts(f)
	sourceID, destinationID := p.identity(f.GetSource()), p.identity(f.GetDestination())
	arrow := "->"
	if f.GetIsReply() == nil {
		arrow = "<>"
	} else if f.GetIsReply().GetValue() {
		// The originator stays on the left.
		arrow = "<-"
		source, destination = destination, source
		sourceID, destinationID = destinationID, sourceID
	}
	var node string
	if p.opts.NodeName {
		node = " [" + Safe(f.GetNodeName()) + "]"
	}
	return fmt.Sprintf("%s%s: %s %s %s %s %s %s %s (%s)\n", p.time(f.GetTime()), node,
		source, sourceID, arrow, destination, destinationID, p.flowType(f), p.verdict(f), p.summary(f))
}

func (p *Printer) dictFlow(f *flow.Flow) string {
	source, destination := p.hosts(f)
	var b strings.Builder
	p.separate(&b)
	b.WriteString("  TIMESTAMP: " + p.time(f.GetTime()) + "\n")
	if p.opts.NodeName {
		b.WriteString("       NODE: " + Safe(f.GetNodeName()) + "\n")
	}
	b.WriteString("     SOURCE: " + source + "\n")
	b.WriteString("DESTINATION: " + destination + "\n")
	b.WriteString("       TYPE: " + p.flowType(f) + "\n")
	b.WriteString("    VERDICT: " + p.verdict(f) + "\n")
	b.WriteString("    SUMMARY: " + p.summary(f) + "\n")
	return b.String()
}

// hosts returns source and destination as names or addresses with ports.
func (p *Printer) hosts(f *flow.Flow) (source, destination string) {
	if f.GetIP() == nil {
		eth := f.GetEthernet()
		if eth == nil {
			return "", ""
		}
		return p.paint.color(cyan, Safe(eth.GetSource())), p.paint.color(cyan, Safe(eth.GetDestination()))
	}
	sourcePort, destinationPort := ports(f.GetL4())
	return p.host(f.GetIP().GetSource(), sourcePort, f.GetSource(), f.GetSourceService(), f.GetSourceNames()),
		p.host(f.GetIP().GetDestination(), destinationPort, f.GetDestination(), f.GetDestinationService(), f.GetDestinationNames())
}

func (p *Printer) host(ip string, port uint32, e *flow.Endpoint, service *flow.Service, names []string) string {
	host := ip
	if !p.opts.Numeric {
		namespace := e.GetNamespace()
		if service != nil {
			namespace = service.GetNamespace()
		}
		switch {
		case e.GetPodName() != "":
			host = path.Join(namespace, e.GetPodName())
		case service.GetName() != "":
			host = path.Join(namespace, service.GetName())
		case len(names) > 0:
			host = strings.Join(names, ",")
		}
	}
	host = Safe(host)
	if port != 0 {
		host = net.JoinHostPort(host, p.paint.color(yellow, strconv.FormatUint(uint64(port), 10)))
	}
	return p.paint.color(cyan, host)
}

func ports(l4 *flow.Layer4) (source, destination uint32) {
	switch l := l4.GetProtocol().(type) {
	case *flow.Layer4_TCP:
		return l.TCP.GetSourcePort(), l.TCP.GetDestinationPort()
	case *flow.Layer4_UDP:
		return l.UDP.GetSourcePort(), l.UDP.GetDestinationPort()
	case *flow.Layer4_SCTP:
		return l.SCTP.GetSourcePort(), l.SCTP.GetDestinationPort()
	}
	return 0, 0
}

func (p *Printer) identity(e *flow.Endpoint) string {
	return p.paint.color(magenta, "("+eventname.Identity(e.GetIdentity())+")")
}

// flowType names the event, as in the TYPE column.
func (p *Printer) flowType(f *flow.Flow) string {
	if l7 := f.GetL7(); l7 != nil {
		protocol, suffix := "l7", ""
		switch r := l7.GetRecord().(type) {
		case *flow.Layer7_Http:
			protocol = "http"
		case *flow.Layer7_Dns:
			protocol, suffix = "dns", " "+Safe(r.Dns.GetObservationSource())
		case *flow.Layer7_Kafka:
			protocol = "kafka"
		}
		return protocol + "-" + strings.ToLower(l7.GetType().String()) + suffix
	}
	switch subType := f.GetEventType().GetSubType(); f.GetEventType().GetType() {
	case eventname.TypeTrace:
		return eventname.TracePoint(subType)
	case eventname.TypeDrop:
		return eventname.DropLabel(subType)
	case eventname.TypePolicyVerdict:
		return "policy-verdict:" + eventname.PolicyMatch(f.GetPolicyMatchType()) + " " + f.GetTrafficDirection().String()
	case eventname.TypeCapture:
		return f.GetDebugCapturePoint().String()
	case eventname.TypeTraceSock:
		return translationPoint(f.GetSockXlatePoint())
	}
	return "UNKNOWN"
}

func translationPoint(point flow.SocketTranslationPoint) string {
	switch point {
	case flow.SocketTranslationPoint_SOCK_XLATE_POINT_PRE_DIRECTION_FWD:
		return "pre-xlate-fwd"
	case flow.SocketTranslationPoint_SOCK_XLATE_POINT_POST_DIRECTION_FWD:
		return "post-xlate-fwd"
	case flow.SocketTranslationPoint_SOCK_XLATE_POINT_PRE_DIRECTION_REV:
		return "pre-xlate-rev"
	case flow.SocketTranslationPoint_SOCK_XLATE_POINT_POST_DIRECTION_REV:
		return "post-xlate-rev"
	}
	return point.String()
}

func (p *Printer) verdict(f *flow.Flow) string {
	v := f.GetVerdict()
	text := v.String()
	if f.GetEventType().GetType() == eventname.TypePolicyVerdict {
		var egress, ingress []*flow.Policy
		switch v {
		case flow.Verdict_FORWARDED, flow.Verdict_REDIRECTED:
			text, egress, ingress = "ALLOWED", f.GetEgressAllowedBy(), f.GetIngressAllowedBy()
		case flow.Verdict_DROPPED, flow.Verdict_ERROR:
			text, egress, ingress = "DENIED", f.GetEgressDeniedBy(), f.GetIngressDeniedBy()
		case flow.Verdict_AUDIT:
			text = "AUDITED"
		}
		if p.opts.PolicyNames {
			switch f.GetTrafficDirection() {
			case flow.TrafficDirection_EGRESS:
				text += policyNames(egress)
			case flow.TrafficDirection_INGRESS:
				text += policyNames(ingress)
			}
		}
	}
	return p.paint.verdict(v, text)
}

func policyNames(policies []*flow.Policy) string {
	var names []string
	for _, policy := range policies {
		if policy.GetName() != "" && policy.GetKind() != "" {
			names = append(names, Safe(policy.GetName())+" ("+Safe(policy.GetKind())+")")
		}
	}
	if len(names) == 0 {
		return ""
	}
	return " BY " + strings.Join(names, ", ")
}

func (p *Printer) summary(f *flow.Flow) string {
	var b strings.Builder
	if id := f.GetIpTraceId().GetTraceId(); id > 0 {
		fmt.Fprintf(&b, "IP Trace ID: %d; ", id)
	}
	b.WriteString(Safe(f.GetSummary()))
	if auth := f.GetAuthType(); auth != flow.AuthType_DISABLED {
		b.WriteString("; Auth: " + p.paint.auth(auth, auth.String()))
	}
	if p.opts.Stats {
		b.WriteString(stats(f))
	}
	return b.String()
}

// stats is the connection's account so far: packets/bytes there and back, round trips.
func stats(f *flow.Flow) string {
	var s observerv1.FlowStats
	if f.GetExtensions() == nil || f.GetExtensions().UnmarshalTo(&s) != nil {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "; > %d/%dB < %d/%dB", s.GetForward().GetPackets(), s.GetForward().GetBytes(),
		s.GetReverse().GetPackets(), s.GetReverse().GetBytes())
	if s.HandshakeRttUs != nil {
		fmt.Fprintf(&b, " handshake %dus", s.GetHandshakeRttUs())
	}
	if s.SrttUs != nil {
		fmt.Fprintf(&b, " srtt %dus", s.GetSrttUs())
	}
	if s.Retransmissions != nil {
		fmt.Fprintf(&b, " retrans %d", s.GetRetransmissions())
	}
	if s.GetFinal() {
		b.WriteString(" final")
	}
	return b.String()
}
