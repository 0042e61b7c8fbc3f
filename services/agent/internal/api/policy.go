// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/policymap"
)

// maxPause bounds a pause: what is meant to stay is written as a policy.
const maxPause = 24 * time.Hour

// endpointID finds the number of an endpoint by "namespace/pod", uid, number, "host" or "health".
func (s *Server) endpointID(name string) (uint16, error) {
	if name == policymap.HostKey {
		return datapath.HostEndpoint, nil
	}
	number, err := strconv.ParseUint(name, 10, 16)
	isNumber := err == nil
	if isNumber && uint16(number) == datapath.HostEndpoint {
		return datapath.HostEndpoint, nil
	}
	var found uint16
	for _, e := range s.cfg.Endpoints.List() {
		if e.Unmanaged {
			continue
		}
		if isNumber && e.ID == uint16(number) || e.UID == name || e.Name != "" && e.Namespace+"/"+e.Name == name {
			// A new sandbox of the same pod has the higher number, as a rule; both have the same policy.
			found = e.ID
		}
	}
	if found == 0 {
		return 0, status.Errorf(codes.NotFound, "endpoint %q is not on this node", name)
	}
	return found, nil
}

// peerNumber finds a peer by its name or address.
func (s *Server) peerNumber(name string) (uint32, error) {
	if a, err := netip.ParseAddr(name); err == nil {
		return s.cfg.Peers.PeerAt(a.Unmap()), nil
	}
	n, err := s.cfg.Policies.Peer(name)
	switch {
	case errors.Is(err, policymap.ErrUnknown):
		return 0, status.Error(codes.NotFound, err.Error())
	case err != nil:
		return 0, status.Errorf(codes.InvalidArgument, "peer: %v", err)
	}
	return n, nil
}

// LookupPolicy implements AgentService.
func (s *Server) LookupPolicy(_ context.Context, r *agentv1.LookupPolicyRequest) (*agentv1.LookupPolicyResponse, error) {
	if r.GetDirection() != policyv1.Direction_DIRECTION_INGRESS && r.GetDirection() != policyv1.Direction_DIRECTION_EGRESS {
		return nil, status.Errorf(codes.InvalidArgument, "direction %d: want ingress or egress", r.GetDirection())
	}
	if r.GetProtocol() > 255 {
		return nil, status.Errorf(codes.InvalidArgument, "protocol %d is none", r.GetProtocol())
	}
	if r.GetPort() > 65535 {
		return nil, status.Errorf(codes.InvalidArgument, "port %d is none", r.GetPort())
	}
	id, err := s.endpointID(r.GetEndpoint())
	if err != nil {
		return nil, err
	}
	peer, err := s.peerNumber(r.GetPeer())
	if err != nil {
		return nil, err
	}
	a, err := s.cfg.Policies.Lookup(id, desired.Direction(r.GetDirection()), peer, uint8(r.GetProtocol()), uint16(r.GetPort()))
	if err != nil {
		return nil, internal(err)
	}
	return &agentv1.LookupPolicyResponse{EndpointId: uint32(id), Policy: a.Policy, PolicyKey: a.Key, Audit: a.Audit, Peer: a.Peer, PeerRow: a.PeerRow,
		Verdict: verdictOf(a.Verdict), Rule: a.Rule, Rules: rulesOf(a.Rules), Slot: uint32(a.Slot), Filter: a.Filter, ListenerPort: uint32(a.Listener),
		Visibility: a.Verdict == datapath.PolicyVisible}, nil
}

// verdictOf: what is allowed through a slot is allowed.
func verdictOf(v datapath.PolicyVerdict) policyv1.Verdict {
	if v == datapath.PolicyRedirect || v == datapath.PolicyVisible {
		return policyv1.Verdict_VERDICT_ALLOW
	}
	return policyv1.Verdict(v)
}

func rulesOf(list []desired.PolicyRule) []*policyv1.PolicyRule {
	var out []*policyv1.PolicyRule
	for _, r := range list {
		out = append(out, &policyv1.PolicyRule{Kind: r.Kind, Namespace: r.Namespace, Name: r.Name, Uid: r.UID, Spec: r.Spec, List: r.List, Index: r.Index,
			Log: r.Log, Labels: r.Labels, Implicit: r.Implicit})
	}
	return out
}

// DumpPolicy implements AgentService.
func (s *Server) DumpPolicy(r *agentv1.DumpPolicyRequest, stream grpc.ServerStreamingServer[agentv1.DumpPolicyResponse]) error {
	var id uint16
	if r.GetEndpoint() != "" {
		var err error
		if id, err = s.endpointID(r.GetEndpoint()); err != nil {
			return err
		}
	}
	rows, err := s.cfg.Policies.Dump(id)
	if err != nil {
		return internal(err)
	}
	for _, row := range rows {
		m := &agentv1.DumpPolicyResponse{Policy: row.Policy, PolicyKey: row.Key, Direction: policyv1.Direction(row.Direction), Peer: row.Peer, PeerKey: row.PeerName}
		for _, id := range row.Endpoints {
			m.Endpoints = append(m.Endpoints, uint32(id))
		}
		ranges := row.Ranges
		if len(ranges) == 0 {
			ranges = []datapath.PolicyRange{{Last: 65535, Verdict: datapath.PolicyDefaultDeny}}
		}
		for _, x := range ranges {
			m.Protocol, m.First, m.Last = uint32(x.Proto), uint32(x.First), uint32(x.Last)
			m.Verdict, m.Rule, m.Rules = verdictOf(x.Verdict), x.Rule, rulesOf(s.cfg.Policies.Rules(x.Rule))
			through := s.cfg.Policies.Through(x.Slot)
			m.Slot, m.Filter, m.ListenerPort, m.Visibility = uint32(x.Slot), through.Filter, uint32(through.Listener), x.Verdict == datapath.PolicyVisible
			if err := stream.Send(m); err != nil {
				return err
			}
		}
	}
	return nil
}

// pausable finds the subject of a pod, or of the node ("").
func (s *Server) pausable(pod string) (string, error) {
	if pod == "" {
		return "", nil
	}
	namespace, name, ok := strings.Cut(pod, "/")
	if !ok || namespace == "" || name == "" {
		return "", status.Errorf(codes.InvalidArgument, "pod %q: want namespace/name", pod)
	}
	for _, e := range s.cfg.Endpoints.List() {
		if e.Namespace == namespace && e.Name == name && !e.Unmanaged {
			return e.UID, nil
		}
	}
	return "", status.Errorf(codes.NotFound, "pod %s is not on this node", pod)
}

// PausePolicy implements AgentService.
func (s *Server) PausePolicy(_ context.Context, r *agentv1.PausePolicyRequest) (*agentv1.PausePolicyResponse, error) {
	length := time.Duration(r.GetSeconds()) * time.Second
	if length <= 0 || length > maxPause {
		return nil, status.Errorf(codes.InvalidArgument, "seconds %d: want 1 to %d", r.GetSeconds(), int(maxPause.Seconds()))
	}
	subject, err := s.pausable(r.GetPod())
	if err != nil {
		return nil, err
	}
	now := s.cfg.Now()
	p := policymap.Pause{Pod: r.GetPod(), Since: now, Until: now.Add(length), Reason: r.GetReason()}
	if err := s.cfg.Policies.Pause(subject, p); err != nil {
		return nil, internal(err)
	}
	return &agentv1.PausePolicyResponse{Until: timestamppb.New(p.Until)}, nil
}

// ResumePolicy implements AgentService.
func (s *Server) ResumePolicy(_ context.Context, r *agentv1.ResumePolicyRequest) (*agentv1.ResumePolicyResponse, error) {
	subject, err := s.pausable(r.GetPod())
	if err != nil {
		return nil, err
	}
	resumed, err := s.cfg.Policies.Resume(subject)
	if err != nil {
		return nil, internal(err)
	}
	return &agentv1.ResumePolicyResponse{Resumed: resumed}, nil
}
