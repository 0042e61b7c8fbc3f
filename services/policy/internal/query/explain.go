// SPDX-License-Identifier: Apache-2.0

package query

import (
	"context"
	"net/netip"
	"strings"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/object"
	"github.com/weirmesh/weir/services/policy/internal/server"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// protocolOf reads a protocol's name.
func protocolOf(name string) (uint8, bool) {
	switch strings.ToUpper(name) {
	case "", "TCP":
		return policy.TCP, true
	case "UDP":
		return policy.UDP, true
	case "SCTP":
		return policy.SCTP, true
	case "ICMP", "ICMPV4":
		return policy.ICMP, true
	case "ICMPV6":
		return policy.ICMPv6, true
	}
	return 0, false
}

// ExplainConnection says step by step what happens to a connection.
func (s *Service) ExplainConnection(ctx context.Context, r *policyv1.ExplainConnectionRequest) (*policyv1.ExplainConnectionResponse, error) {
	proto, ok := protocolOf(r.GetProtocol())
	if !ok {
		return nil, grpcstatus.Errorf(codes.InvalidArgument, "protocol: %.40q is not TCP, UDP, SCTP, ICMP or ICMPv6", r.GetProtocol())
	}
	limit := uint32(65535)
	if proto == policy.ICMP || proto == policy.ICMPv6 {
		limit = 255
	}
	if r.GetPort() > limit {
		return nil, grpcstatus.Errorf(codes.InvalidArgument, "port: %d is more than %d", r.GetPort(), limit)
	}
	asked, err := askedOf(r)
	if err != nil {
		return nil, err
	}
	c, err := s.cluster(ctx)
	if err != nil {
		return nil, err
	}
	source, err := c.find("source", r.GetSource())
	if err != nil {
		return nil, err
	}
	switch {
	case source.service != nil:
		return nil, grpcstatus.Error(codes.InvalidArgument, "source: a service opens no connections")
	case source.dns != "":
		return nil, grpcstatus.Error(codes.InvalidArgument, "source: names are of destinations only")
	}
	destination, err := c.find("destination", r.GetDestination())
	if err != nil {
		return nil, err
	}
	return c.explain(source, destination, proto, uint16(r.GetPort()), asked)
}

func (c *cluster) explain(source, destination *end, proto uint8, port uint16, asked *asked) (*policyv1.ExplainConnectionResponse, error) {
	response := &policyv1.ExplainConnectionResponse{Verdict: policyv1.Verdict_VERDICT_ALLOW}
	through := destination.service != nil
	if through {
		response.Route = c.routeOf(source, destination.service, proto, port)
		backend, err := c.backend(source, destination.service, proto, port)
		if err != nil {
			return nil, err
		}
		destination, port = c.at(backend.Address), backend.Port
		destination.addresses = []netip.Addr{backend.Address}
	}
	from, to, err := pair(source, destination, proto)
	if err != nil {
		return nil, err
	}
	if source.pod != nil && destination.pod != nil && source.pod.UID == destination.pod.UID {
		return response, nil // a pod that reaches itself is not checked
	}
	add := func(d policy.Direction, subject, other *end, otherAddr netip.Addr) {
		side := c.side(d, subject, c.peer(other, otherAddr, subject.node), proto, port, asked)
		if side == nil {
			return
		}
		side.Destination = to.String()
		if destination.dns != "" {
			side.Destination = destination.name
		}
		response.Refused = response.GetRefused() || side.GetRefused()
		response.Sides = append(response.Sides, side)
		if side.GetVerdict() > response.GetVerdict() {
			response.Verdict = side.GetVerdict()
		}
	}
	add(policy.Egress, source, destination, to)
	add(policy.Ingress, destination, source, from)
	return response, nil
}

// pair chooses the addresses: of the same family, IPv4 before IPv6, and the family of an ICMP protocol.
func pair(source, destination *end, proto uint8) (from, to netip.Addr, err error) {
	for _, v4 := range []bool{true, false} {
		if v4 && proto == policy.ICMPv6 || !v4 && proto == policy.ICMP {
			continue
		}
		for _, a := range source.addresses {
			for _, b := range destination.addresses {
				if a.Is4() == v4 && b.Is4() == v4 {
					return a, b, nil
				}
			}
		}
	}
	return from, to, grpcstatus.Errorf(codes.FailedPrecondition, "destination: %s and %s have no addresses of the same family", source.name, destination.name)
}

// backend chooses as the source's node may: the first that new connections go to.
func (c *cluster) backend(source *end, s *state.Service, proto uint8, port uint16) (state.Backend, error) {
	var none state.Backend
	for _, p := range s.Ports {
		number, _ := protocolOf(string(p.Protocol))
		if number != proto || p.Port != port {
			continue
		}
		for _, b := range c.snapshot.Near(*s, source.node, p) {
			for _, a := range source.addresses {
				if a.Is4() == b.Address.Is4() {
					return b, nil
				}
			}
		}
		return none, grpcstatus.Errorf(codes.FailedPrecondition, "destination: service %s/%s has no backend for port %d/%s", s.Namespace, s.Name, port, p.Protocol)
	}
	return none, grpcstatus.Errorf(codes.InvalidArgument, "port: service %s/%s has no port %d/%s", s.Namespace, s.Name, port, protocolName(proto))
}

func protocolName(proto uint8) string {
	switch proto {
	case policy.TCP:
		return string(object.TCP)
	case policy.UDP:
		return string(object.UDP)
	case policy.SCTP:
		return string(object.SCTP)
	case policy.ICMP:
		return "ICMP"
	case policy.ICMPv6:
		return "ICMPv6"
	}
	return "any"
}

// side says what one end's policy says; nil = it has none.
func (c *cluster) side(d policy.Direction, e *end, p *policy.Peer, proto uint8, port uint16, asked *asked) *policyv1.Side {
	subject, resolved := c.resolved(e, d)
	if subject == nil {
		return nil
	}
	side := &policyv1.Side{
		Direction: policyv1.Direction(d), Endpoint: e.name, Node: e.node, Labels: subject.Labels, PeerIdentity: identityOf(p.Key), PeerLabels: p.Labels,
		PeerKey: p.Key, Audit: c.frozen.Options.Audit, Verdict: policyv1.Verdict_VERDICT_ALLOW, Protocol: uint32(proto), Port: uint32(port),
	}
	if e.pod != nil {
		side.Identity = e.pod.Identity
	} else {
		side.Identity = hostIdentity(e)
	}
	if resolved == nil {
		return side
	}
	x := resolved.Explain(p, proto, port)
	side.Enforced, side.EnforcedBy, side.Verdict, side.PolicyKey = x.Enforced, x.EnforcedBy, verdictProto(x.Verdict), resolved.Key
	for i, step := range x.Steps {
		side.Rules = append(side.Rules, &policyv1.RuleStep{
			Rule: server.RuleProto(resolved.Rules[step.Rule]), Deny: step.Action == policy.ActionDeny, PeerMatches: step.PeerMatches,
			PortMatches: step.PortMatches, Decided: step.Decided, Reason: step.Reason, Nearest: i == x.Nearest,
		})
	}
	side.Names = nameSteps(resolved, p, proto, port)
	if x.Filter != nil {
		f := &engine.Filter{Filter: x.Filter, Namespace: c.namespaceOf(e), Rules: resolved.Rules}
		side.Filter = server.FilterProto(f)
		side.Items, side.Asked, side.Refused = asked.judge(f)
	}
	return side
}

func hostIdentity(e *end) uint32 {
	if e.subject == state.SubjectHealth {
		return 4
	}
	return 1
}
