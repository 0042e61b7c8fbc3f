// SPDX-License-Identifier: Apache-2.0

// Package server is the gRPC edge of the identity broker.
package server

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	identityv1 "github.com/weirmesh/weir/gen/weir/identity/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/internal/reserved"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/services/identity/internal/allocator"
)

// Authorize says who may call what of this service. Only the policy service asks for numbers.
func Authorize() server.Table {
	return server.Table{
		identityv1.IdentityService_Allocate_FullMethodName: {"policy"},
		identityv1.IdentityService_Release_FullMethodName:  {"policy"},
		// Reading is for the command line too, as root on this machine.
		identityv1.IdentityService_Get_FullMethodName:              {"policy", server.Local},
		identityv1.IdentityService_List_FullMethodName:             {"policy", server.Local},
		"/" + statusv1.StatusService_ServiceDesc.ServiceName + "/": {server.Local},
	}
}

// callTimeout bounds a call whose caller set no deadline.
const callTimeout = 10 * time.Second

// Allocator is the work, as far as the edge needs it.
type Allocator interface {
	Allocate(ctx context.Context, set labelset.Set) (uint32, error)
	Release(ctx context.Context, set labelset.Set) error
	Get(ctx context.Context, number uint32) (labelset.Set, error)
	List(ctx context.Context) ([]allocator.Identity, error)
}

// Server implements IdentityService.
type Server struct {
	identityv1.UnimplementedIdentityServiceServer
	allocator Allocator
	cluster   string
}

// New makes the server of a cluster.
func New(a Allocator, cluster string) *Server { return &Server{allocator: a, cluster: cluster} }

// Allocate returns the number of a label set. Caller: policy.
func (s *Server) Allocate(ctx context.Context, request *identityv1.AllocateRequest) (*identityv1.AllocateResponse, error) {
	set, err := checked(request.GetLabels())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	number, err := s.allocator.Allocate(ctx, set)
	if err != nil {
		return nil, toStatus(err)
	}
	return &identityv1.AllocateResponse{Identity: &identityv1.Identity{Number: number, Labels: set}}, nil
}

// Release says that a label set is out of use. Caller: policy.
func (s *Server) Release(ctx context.Context, request *identityv1.ReleaseRequest) (*identityv1.ReleaseResponse, error) {
	set, err := checked(request.GetLabels())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := s.allocator.Release(ctx, set); err != nil {
		return nil, toStatus(err)
	}
	return &identityv1.ReleaseResponse{}, nil
}

// Get returns the label set of a number. Callers: policy, the command line.
func (s *Server) Get(ctx context.Context, request *identityv1.GetRequest) (*identityv1.GetResponse, error) {
	for _, r := range reserved.All(s.cluster) {
		if r.Number == request.GetNumber() {
			return &identityv1.GetResponse{Identity: message(r)}, nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	set, err := s.allocator.Get(ctx, request.GetNumber())
	if err != nil {
		return nil, toStatus(err)
	}
	return &identityv1.GetResponse{Identity: &identityv1.Identity{Number: request.GetNumber(), Labels: set}}, nil
}

// List returns all identities by number, reserved and fixed ones first. Callers: policy, the command line.
func (s *Server) List(ctx context.Context, _ *identityv1.ListRequest) (*identityv1.ListResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	all, err := s.allocator.List(ctx)
	if err != nil {
		return nil, toStatus(err)
	}
	response := &identityv1.ListResponse{}
	for _, r := range reserved.All(s.cluster) {
		response.Identities = append(response.Identities, message(r))
	}
	for _, i := range all {
		response.Identities = append(response.Identities, &identityv1.Identity{Number: i.Number, Labels: i.Labels})
	}
	return response, nil
}

func message(r reserved.Identity) *identityv1.Identity {
	return &identityv1.Identity{Number: r.Number, Labels: r.Labels}
}

func checked(labels []string) (labelset.Set, error) {
	set := labelset.Set(labels)
	if err := set.Check(); err != nil {
		return nil, grpcstatus.Error(codes.InvalidArgument, err.Error())
	}
	return set, nil
}

func toStatus(err error) error {
	switch {
	case errors.Is(err, allocator.ErrExhausted):
		return grpcstatus.Error(codes.ResourceExhausted, err.Error())
	case errors.Is(err, allocator.ErrNotFound):
		return grpcstatus.Error(codes.NotFound, err.Error())
	case errors.Is(err, context.Canceled):
		return grpcstatus.Error(codes.Canceled, err.Error())
	}
	// Whatever else fails is NATS: away, slow, or short of a quorum. Try again.
	return grpcstatus.Error(codes.Unavailable, err.Error())
}
