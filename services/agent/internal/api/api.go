// SPDX-License-Identifier: Apache-2.0

// Package api serves AgentService on the node's unix socket: what the command line shows of one node.
package api

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/endpoint"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/mirror"
	"github.com/weirmesh/weir/services/agent/internal/monitor"
	"github.com/weirmesh/weir/services/agent/internal/policymap"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

// Config is where the answers come from.
type Config struct {
	Endpoints interface{ List() []endpoint.Endpoint }
	Directory *flow.Directory
	Services  interface{ ServiceRows() []mirror.ServiceRow }
	Conntrack interface {
		List(func(datapath.Conn) bool) error
	}
	IPCache interface {
		List() ([]datapath.IPCacheRow, error)
	}
	ServiceMaps interface {
		List() ([]datapath.Service, error)
	}
	Policies Policies
	Peers    interface {
		// PeerAt is the number by which policies know an address.
		PeerAt(netip.Addr) uint32
	}
	Slots interface{ Rows() ([]slot.Row, error) }
	// SlotUsers lists what uses a filter.
	SlotUsers func(key string) []string

	Now      func() time.Time
	Monitor  *monitor.Hub
	Clock    flow.Clock
	Draining <-chan struct{}
}

// Policies answers what is in force, and pauses it (policymap.Engine).
type Policies interface {
	Lookup(id uint16, d desired.Direction, peer uint32, proto uint8, port uint16) (policymap.Answer, error)
	Peer(name string) (uint32, error)
	Enforced(id uint16) datapath.EndpointPolicy
	Dump(id uint16) ([]policymap.DumpRow, error)
	Rules(number uint32) []desired.PolicyRule
	Through(slot uint16) policymap.Through
	Pause(subject string, p policymap.Pause) error
	Resume(subject string) (bool, error)
	PausedUntil(subject string) time.Time
}

// Server implements agentv1.AgentServiceServer.
type Server struct {
	agentv1.UnimplementedAgentServiceServer
	cfg Config
}

// New makes a server.
func New(cfg Config) *Server { return &Server{cfg: cfg} }

// ListEndpoints implements AgentService.
func (s *Server) ListEndpoints(context.Context, *agentv1.ListEndpointsRequest) (*agentv1.ListEndpointsResponse, error) {
	response := &agentv1.ListEndpointsResponse{}
	for _, e := range s.cfg.Endpoints.List() {
		local := &agentv1.LocalEndpoint{
			Id: uint32(e.ID), Identity: e.Identity, Labels: s.cfg.Directory.Labels(e.Identity), Namespace: e.Namespace, PodName: e.Name,
			Uid: e.UID, Interface: e.HostIfName, State: string(e.Phase), ContainerId: e.ContainerID, Created: timestamppb.New(e.Created),
		}
		for _, a := range e.Addresses {
			local.Addresses = append(local.Addresses, a.String())
		}
		if !e.Unmanaged {
			f := s.cfg.Policies.Enforced(e.ID)
			local.IngressEnforced, local.EgressEnforced, local.Audit = f.Ingress != 0, f.Egress != 0, f.IngressAudit || f.EgressAudit
			if until := s.cfg.Policies.PausedUntil(e.UID); !until.IsZero() {
				local.PausedUntil = timestamppb.New(until)
			}
		}
		response.Endpoints = append(response.Endpoints, local)
	}
	return response, nil
}

// ListIdentities implements AgentService.
func (s *Server) ListIdentities(context.Context, *agentv1.ListIdentitiesRequest) (*agentv1.ListIdentitiesResponse, error) {
	response := &agentv1.ListIdentitiesResponse{}
	for number, labels := range s.cfg.Directory.Identities() {
		response.Identities = append(response.Identities, &agentv1.IdentityEntry{Number: number, Labels: labels})
	}
	slices.SortFunc(response.Identities, func(a, b *agentv1.IdentityEntry) int { return int(a.Number) - int(b.Number) })
	return response, nil
}

// ListServices implements AgentService.
func (s *Server) ListServices(context.Context, *agentv1.ListServicesRequest) (*agentv1.ListServicesResponse, error) {
	response := &agentv1.ListServicesResponse{}
	for _, r := range s.cfg.Services.ServiceRows() {
		e := &agentv1.ServiceEntry{Id: r.ID, Namespace: r.Namespace, Name: r.Name, Type: r.Type,
			Frontend: netip.AddrPortFrom(r.Frontend.Addr, r.Frontend.Port).String(), Protocol: protoName(r.Frontend.Proto)}
		for _, b := range r.Backends {
			e.Backends = append(e.Backends, b.String())
		}
		response.Services = append(response.Services, e)
	}
	return response, nil
}

func protoName(p uint8) string { return strings.ToUpper(monitor.Proto(p)) }

// DumpConntrack implements AgentService.
func (s *Server) DumpConntrack(_ *agentv1.DumpConntrackRequest, stream grpc.ServerStreamingServer[agentv1.DumpConntrackResponse]) error {
	var sendErr error
	now := datapath.Now()
	err := s.cfg.Conntrack.List(func(c datapath.Conn) bool {
		r := &agentv1.DumpConntrackResponse{
			Protocol: protoName(c.Proto), Source: c.Source.String(), Destination: c.Destination.String(), EndpointId: uint32(c.Endpoint),
			Direction: "ingress", State: c.State.String(), PeerIdentity: c.PeerIdentity,
			ForwardPackets: c.Forward.Packets, ForwardBytes: c.Forward.Bytes, ReversePackets: c.Reverse.Packets, ReverseBytes: c.Reverse.Bytes,
			ExpiresIn: time.Duration(int64(c.Expires - now)).Seconds(), Slot: uint32(c.Slot),
		}
		if c.Direction == datapath.DirectionEgress {
			r.Direction = "egress"
		}
		if c.Known&datapath.KnownHandshake != 0 {
			r.HandshakeRttUs = proto.Uint32(c.HandshakeUs)
		}
		if c.Known&datapath.KnownSRTT != 0 {
			r.SrttUs = proto.Uint32(c.SRTTUs)
		}
		if c.Known&datapath.KnownRetransmissions != 0 {
			r.Retransmissions = proto.Uint32(c.Retransmissions)
		}
		sendErr = stream.Send(r)
		return sendErr == nil
	})
	return internal(err, sendErr)
}

func internal(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return status.Error(codes.Internal, err.Error())
		}
	}
	return nil
}

// DumpIPCache implements AgentService.
func (s *Server) DumpIPCache(_ *agentv1.DumpIPCacheRequest, stream grpc.ServerStreamingServer[agentv1.DumpIPCacheResponse]) error {
	rows, err := s.cfg.IPCache.List()
	if err != nil {
		return internal(err)
	}
	slices.SortFunc(rows, func(a, b datapath.IPCacheRow) int {
		if c := a.Prefix.Addr().Compare(b.Prefix.Addr()); c != 0 {
			return c
		}
		return a.Prefix.Bits() - b.Prefix.Bits()
	})
	for _, r := range rows {
		m := &agentv1.DumpIPCacheResponse{Prefix: r.Prefix.String(), Identity: r.Identity}
		if r.NodeAddr.IsValid() {
			m.NodeAddress = r.NodeAddr.String()
		}
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	return nil
}

// DumpServices implements AgentService.
func (s *Server) DumpServices(_ *agentv1.DumpServicesRequest, stream grpc.ServerStreamingServer[agentv1.DumpServicesResponse]) error {
	rows, err := s.cfg.ServiceMaps.List()
	if err != nil {
		return internal(err)
	}
	slices.SortFunc(rows, func(a, b datapath.Service) int { return int(a.ID) - int(b.ID) })
	for _, r := range rows {
		m := &agentv1.DumpServicesResponse{Id: r.ID, Frontend: netip.AddrPortFrom(r.Frontend.Addr, r.Frontend.Port).String(), Protocol: protoName(r.Frontend.Proto)}
		if len(r.Backends) == 0 {
			if err := stream.Send(m); err != nil {
				return err
			}
		}
		for i, b := range r.Backends {
			m.Slot, m.Backend = uint32(i), b.String()
			if err := stream.Send(m); err != nil {
				return err
			}
		}
	}
	return nil
}

// ListSlots implements AgentService.
func (s *Server) ListSlots(context.Context, *agentv1.ListSlotsRequest) (*agentv1.ListSlotsResponse, error) {
	rows, err := s.cfg.Slots.Rows()
	if err != nil {
		return nil, internal(err)
	}
	response := &agentv1.ListSlotsResponse{}
	for _, r := range rows {
		e := &agentv1.SlotEntry{Number: uint32(r.Number), Key: r.Key, Kind: policyv1.FilterKind(r.Kind), Direction: policyv1.Direction(r.Direction),
			Visibility: r.Visibility, Port: uint32(r.Port), Listening: r.Listening, KernelPort: uint32(r.Kernel)}
		if r.Since.IsZero() {
			e.Users = s.cfg.SlotUsers(r.Key)
		} else {
			e.RestingSince = timestamppb.New(r.Since)
		}
		response.Slots = append(response.Slots, e)
	}
	return response, nil
}

// Monitor implements AgentService.
func (s *Server) Monitor(_ *agentv1.MonitorRequest, stream grpc.ServerStreamingServer[agentv1.MonitorResponse]) error {
	w := s.cfg.Monitor.Watch()
	defer w.Close()
	for {
		select {
		case <-stream.Context().Done():
			return nil
		case <-s.cfg.Draining:
			return status.Error(codes.Unavailable, "the agent is stopping")
		case item := <-w.C:
			t := s.cfg.Clock.Unix(item.Record.Time)
			err := stream.Send(&agentv1.MonitorResponse{Time: timestamppb.New(time.Unix(0, t)), Cpu: uint32(item.CPU),
				Text: monitor.Text(&item.Record), Lost: w.TakeLost()})
			if err != nil {
				return err
			}
		}
	}
}
