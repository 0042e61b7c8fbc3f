// SPDX-License-Identifier: Apache-2.0

// Package flowsource reads flows and losses from a server or from a file, as
// one kind of stream.
package flowsource

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/cli/internal/stage"
	"github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// stream is what both servers' calls return.
type stream interface {
	Recv() (*observerv1.GetFlowsResponse, error)
}

// Server calls GetFlows: Weir's, which tells losses in full and carries
// statistics, or Hubble's where the server has no other. The context ends the stream.
func Server(ctx context.Context, conn grpc.ClientConnInterface, req *observer.GetFlowsRequest) (stage.Recv[*observerv1.GetFlowsResponse], error) {
	weir, err := observerv1.NewObserverServiceClient(conn).GetFlows(ctx, &observerv1.GetFlowsRequest{Request: req})
	if err != nil {
		return nil, err
	}
	return (&server{stream: weir, hubble: func() (stream, error) {
		stream, err := observer.NewObserverClient(conn).GetFlows(ctx, req)
		if err != nil {
			return nil, err
		}
		return hubble{stream}, nil
	}}).Recv, nil
}

// server falls back to Hubble's call when the first answer is that Weir's is unknown.
type server struct {
	stream
	hubble func() (stream, error)
}

func (s *server) Recv() (*observerv1.GetFlowsResponse, error) {
	r, err := s.stream.Recv()
	if s.hubble == nil {
		return r, err
	}
	fallback := s.hubble
	s.hubble = nil
	if status.Code(err) != codes.Unimplemented {
		return r, err
	}
	if s.stream, err = fallback(); err != nil {
		return nil, err
	}
	return s.stream.Recv()
}

// hubble wraps the answers of observer.Observer.
type hubble struct {
	calls grpc.ServerStreamingClient[observer.GetFlowsResponse]
}

func (h hubble) Recv() (*observerv1.GetFlowsResponse, error) {
	r, err := h.calls.Recv()
	if err != nil {
		return nil, err
	}
	return wrap(r), nil
}

func wrap(r *observer.GetFlowsResponse) *observerv1.GetFlowsResponse {
	return &observerv1.GetFlowsResponse{Item: &observerv1.GetFlowsResponse_Response{Response: r}}
}

// FlowTime is what counts in a stream of flows: flows, with their times.
func FlowTime(r *observerv1.GetFlowsResponse) (time.Time, bool) {
	f := r.GetResponse().GetFlow()
	return f.GetTime().AsTime(), f != nil
}
