// SPDX-License-Identifier: Apache-2.0

// Package source serves the cluster's objects as list-and-watch to Weir's services.
package source

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/types"

	sourcev1 "github.com/weirmesh/weir/gen/weir/source/v1"
	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/object"
)

// Server is weir.source.v1.SourceService over a cluster.
type Server struct {
	sourcev1.UnimplementedSourceServiceServer
	cluster  *cluster.Cluster
	draining <-chan struct{}
}

// New serves c. Watches end when draining is closed.
func New(c *cluster.Cluster, draining <-chan struct{}) *Server {
	return &Server{cluster: c, draining: draining}
}

// Watch sends what exists, then what changes, until the client goes or falls behind.
func (s *Server) Watch(request *sourcev1.WatchRequest, stream grpc.ServerStreamingServer[sourcev1.WatchResponse]) error {
	for _, kind := range request.GetKinds() {
		if _, ok := object.ByName(kind); !ok {
			return status.Errorf(codes.InvalidArgument, "kind %q is not one of the lab's", kind)
		}
	}
	watch := s.cluster.Watch(request.GetKinds()...)
	defer watch.Close()
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	go func() {
		select {
		case <-s.draining:
			cancel()
		case <-ctx.Done():
		}
	}()
	for {
		events, err := watch.Next(ctx)
		if errors.Is(err, cluster.ErrBehind) {
			return status.Error(codes.Unavailable, "the watch fell behind: watch again, from the start")
		}
		if err != nil && stream.Context().Err() == nil {
			return status.Error(codes.Unavailable, "the source ends")
		}
		if err != nil {
			return status.FromContextError(err).Err()
		}
		for _, event := range events {
			response, err := message(event)
			if err != nil {
				return status.Error(codes.Internal, err.Error())
			}
			if err := stream.Send(response); err != nil {
				return err
			}
		}
	}
}

// UpdateStatus merges into an object's status.
func (s *Server) UpdateStatus(_ context.Context, request *sourcev1.UpdateStatusRequest) (*sourcev1.UpdateStatusResponse, error) {
	kind, ok := object.ByName(request.GetKind())
	if !ok {
		return nil, status.Errorf(codes.InvalidArgument, "kind %q is not one of the lab's", request.GetKind())
	}
	key := object.Key{Kind: kind.Name, Namespace: request.GetNamespace(), Name: request.GetName()}
	err := s.cluster.UpdateStatus(key, types.UID(request.GetUid()), request.GetStatus())
	switch {
	case errors.Is(err, cluster.ErrNotFound):
		return nil, status.Error(codes.NotFound, err.Error())
	case err != nil:
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &sourcev1.UpdateStatusResponse{}, nil
}

// AcquireLease takes or renews a lease.
func (s *Server) AcquireLease(_ context.Context, request *sourcev1.AcquireLeaseRequest) (*sourcev1.AcquireLeaseResponse, error) {
	holder, err := s.cluster.AcquireLease(request.GetName(), request.GetHolder(), time.Duration(request.GetSeconds())*time.Second)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &sourcev1.AcquireLeaseResponse{Holder: holder, Acquired: holder == request.GetHolder()}, nil
}

func message(event cluster.Event) (*sourcev1.WatchResponse, error) {
	if event.Type == cluster.Synced {
		return &sourcev1.WatchResponse{Type: sourcev1.WatchResponse_TYPE_SYNCED}, nil
	}
	names := map[cluster.EventType]sourcev1.WatchResponse_Type{
		cluster.Added:    sourcev1.WatchResponse_TYPE_ADDED,
		cluster.Modified: sourcev1.WatchResponse_TYPE_MODIFIED,
		cluster.Deleted:  sourcev1.WatchResponse_TYPE_DELETED,
	}
	data, err := object.JSON(event.Object)
	if err != nil {
		return nil, fmt.Errorf("watch: %w", err)
	}
	return &sourcev1.WatchResponse{Type: names[event.Type], Kind: object.KindOf(event.Object), Object: data}, nil
}
