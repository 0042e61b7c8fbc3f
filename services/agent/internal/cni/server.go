// SPDX-License-Identifier: Apache-2.0

// Package cni serves CNIService on the node's unix socket: it checks the requests, calls the endpoint manager and chooses the codes.
package cni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	"github.com/weirmesh/weir/services/agent/internal/address"
	"github.com/weirmesh/weir/services/agent/internal/endpoint"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
)

// Endpoints plugs pods in and out (endpoint.Manager).
type Endpoints interface {
	Add(context.Context, endpoint.AddRequest) (*endpoint.Added, error)
	Delete(ctx context.Context, containerID, ifname string) error
	Check(containerID, ifname, netns string) error
	CollectGarbage(ctx context.Context, valid []endpoint.Attachment) error
}

// Server implements agentv1.CNIServiceServer.
type Server struct {
	agentv1.UnimplementedCNIServiceServer
	endpoints Endpoints
	ready     func() error
}

// New makes a server; ready says why Add would not be served.
func New(e Endpoints, ready func() error) *Server { return &Server{endpoints: e, ready: ready} }

var (
	// CNI spec 1.1, section 2: container id and interface name.
	containerPattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.\-]{0,252}$`)
	// A Kubernetes object name is a DNS subdomain.
	namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9.\-]{0,251}[a-z0-9])?$`)
)

func checkAttachment(container, ifname string) error {
	if !containerPattern.MatchString(container) {
		return status.Errorf(codes.InvalidArgument, "container_id %q is not a container id", container)
	}
	if ifname == "" || len(ifname) > 15 || ifname == "." || ifname == ".." {
		return status.Errorf(codes.InvalidArgument, "ifname %q is not an interface name", ifname)
	}
	for _, c := range ifname {
		if c <= ' ' || c == '/' || c == ':' || c > '~' {
			return status.Errorf(codes.InvalidArgument, "ifname %q is not an interface name", ifname)
		}
	}
	return nil
}

// Add implements CNIService.
func (s *Server) Add(ctx context.Context, r *agentv1.AddRequest) (*agentv1.AddResponse, error) {
	if err := checkAttachment(r.GetContainerId(), r.GetIfname()); err != nil {
		return nil, err
	}
	if !filepath.IsAbs(r.GetNetns()) {
		return nil, status.Errorf(codes.InvalidArgument, "netns %q is not an absolute path", r.GetNetns())
	}
	if !namePattern.MatchString(r.GetPodNamespace()) {
		return nil, status.Errorf(codes.InvalidArgument, "pod_namespace %q is not a name", r.GetPodNamespace())
	}
	if !namePattern.MatchString(r.GetPodName()) {
		return nil, status.Errorf(codes.InvalidArgument, "pod_name %q is not a name", r.GetPodName())
	}
	e, err := s.endpoints.Add(ctx, endpoint.AddRequest{ContainerID: r.GetContainerId(), Netns: r.GetNetns(), IfName: r.GetIfname(),
		Namespace: r.GetPodNamespace(), Name: r.GetPodName(), UID: r.GetPodUid()})
	if err != nil {
		return nil, toStatus(err)
	}
	response := &agentv1.AddResponse{Mac: e.MAC, HostIfname: e.HostIfName, HostMac: e.HostMAC, Mtu: uint32(e.MTU), LateNodes: e.LateNodes}
	for _, a := range e.Addresses {
		response.Addresses = append(response.Addresses, netip.PrefixFrom(a, a.BitLen()).String())
		gateway := netdev.GatewayIPv4
		if a.Is6() {
			gateway = netdev.GatewayIPv6
		}
		response.Gateways = append(response.Gateways, gateway.String())
	}
	return response, nil
}

// Delete implements CNIService.
func (s *Server) Delete(ctx context.Context, r *agentv1.DeleteRequest) (*agentv1.DeleteResponse, error) {
	if err := checkAttachment(r.GetContainerId(), r.GetIfname()); err != nil {
		return nil, err
	}
	if err := s.endpoints.Delete(ctx, r.GetContainerId(), r.GetIfname()); err != nil {
		return nil, toStatus(err)
	}
	return &agentv1.DeleteResponse{}, nil
}

// Check implements CNIService.
func (s *Server) Check(_ context.Context, r *agentv1.CheckRequest) (*agentv1.CheckResponse, error) {
	if err := checkAttachment(r.GetContainerId(), r.GetIfname()); err != nil {
		return nil, err
	}
	err := s.endpoints.Check(r.GetContainerId(), r.GetIfname(), r.GetNetns())
	switch {
	case errors.Is(err, endpoint.ErrUnknown):
		return nil, status.Error(codes.NotFound, err.Error())
	case err != nil:
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return &agentv1.CheckResponse{}, nil
}

// Ready implements CNIService.
func (s *Server) Ready(context.Context, *agentv1.ReadyRequest) (*agentv1.ReadyResponse, error) {
	if err := s.ready(); err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &agentv1.ReadyResponse{}, nil
}

// CollectGarbage implements CNIService.
func (s *Server) CollectGarbage(ctx context.Context, r *agentv1.CollectGarbageRequest) (*agentv1.CollectGarbageResponse, error) {
	var valid []endpoint.Attachment
	for i, a := range r.GetValid() {
		if err := checkAttachment(a.GetContainerId(), a.GetIfname()); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "valid[%d]: %s", i, status.Convert(err).Message())
		}
		valid = append(valid, endpoint.Attachment{ContainerID: a.GetContainerId(), IfName: a.GetIfname()})
	}
	if err := s.endpoints.CollectGarbage(ctx, valid); err != nil {
		return nil, toStatus(err)
	}
	return &agentv1.CollectGarbageResponse{}, nil
}

// toStatus chooses the code of a manager's error.
func toStatus(err error) error {
	code := codes.Internal
	switch {
	case errors.Is(err, endpoint.ErrNoPolicy), errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.Is(err, endpoint.ErrBusy):
		code = codes.Aborted
	case errors.Is(err, address.ErrExhausted), errors.Is(err, address.ErrTaken):
		code = codes.ResourceExhausted
	case errors.Is(err, address.ErrOutside):
		code = codes.InvalidArgument
	case errors.Is(err, netdev.ErrNoNamespace):
		return status.Error(codes.InvalidArgument, fmt.Sprintf("netns: %v", err))
	}
	return status.Error(code, err.Error())
}
