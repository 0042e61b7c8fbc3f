// SPDX-License-Identifier: Apache-2.0

// Package flowsource reads flows and losses from a server or from a file, as
// one kind of stream.
package flowsource

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// Stream gives records in order; io.EOF ends it. Not safe for concurrent use.
type Stream interface {
	Recv() (*observerv1.GetFlowsResponse, error)
}

// Server calls GetFlows: Weir's, which tells losses in full and carries
// statistics, or Hubble's where the server has no other. The context ends the stream.
func Server(ctx context.Context, conn grpc.ClientConnInterface, req *observer.GetFlowsRequest) (Stream, error) {
	stream, err := observerv1.NewObserverServiceClient(conn).GetFlows(ctx, &observerv1.GetFlowsRequest{Request: req})
	if err != nil {
		return nil, err
	}
	return &server{Stream: stream, hubble: func() (Stream, error) {
		stream, err := observer.NewObserverClient(conn).GetFlows(ctx, req)
		if err != nil {
			return nil, err
		}
		return hubble{stream}, nil
	}}, nil
}

// server falls back to Hubble's call when the first answer is that Weir's is unknown.
type server struct {
	Stream
	hubble func() (Stream, error)
}

func (s *server) Recv() (*observerv1.GetFlowsResponse, error) {
	r, err := s.Stream.Recv()
	if s.hubble == nil {
		return r, err
	}
	fallback := s.hubble
	s.hubble = nil
	if status.Code(err) != codes.Unimplemented {
		return r, err
	}
	if s.Stream, err = fallback(); err != nil {
		return nil, err
	}
	return s.Stream.Recv()
}

// hubble wraps the answers of observer.Observer.
type hubble struct {
	stream grpc.ServerStreamingClient[observer.GetFlowsResponse]
}

func (h hubble) Recv() (*observerv1.GetFlowsResponse, error) {
	r, err := h.stream.Recv()
	if err != nil {
		return nil, err
	}
	return wrap(r), nil
}

func wrap(r *observer.GetFlowsResponse) *observerv1.GetFlowsResponse {
	return &observerv1.GetFlowsResponse{Item: &observerv1.GetFlowsResponse_Response{Response: r}}
}

func isFlow(r *observerv1.GetFlowsResponse) bool { return r.GetResponse().GetFlow() != nil }

// NotBefore drops the flows of s that are older than t.
func NotBefore(s Stream, t time.Time) Stream { return &notBefore{s, t} }

type notBefore struct {
	Stream
	t time.Time
}

func (s *notBefore) Recv() (*observerv1.GetFlowsResponse, error) {
	for {
		r, err := s.Stream.Recv()
		if err != nil || !isFlow(r) || !r.GetResponse().GetFlow().GetTime().AsTime().Before(s.t) {
			return r, err
		}
	}
}

// Tail gives the newest n flows of s, and the losses among them, once s has ended.
func Tail(s Stream, n uint64) Stream { return &tail{s: s, n: n} }

type tail struct {
	s     Stream
	n     uint64
	ready bool
	kept  []*observerv1.GetFlowsResponse
}

func (t *tail) Recv() (*observerv1.GetFlowsResponse, error) {
	if !t.ready {
		if err := t.fill(); err != nil {
			return nil, err
		}
		t.ready = true
	}
	if len(t.kept) == 0 {
		return nil, io.EOF
	}
	r := t.kept[0]
	t.kept[0] = nil
	t.kept = t.kept[1:]
	return r, nil
}

// maxOthers bounds what is kept beside flows: losses and node states.
const maxOthers = 4096

func (t *tail) fill() error {
	var flows uint64
	others := 0
	for {
		r, err := t.s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		t.kept = append(t.kept, r)
		if isFlow(r) {
			flows++
		} else {
			others++
		}
		for flows > t.n || others > maxOthers {
			if isFlow(t.kept[0]) {
				flows--
			} else {
				others--
			}
			t.kept[0] = nil
			t.kept = t.kept[1:]
		}
	}
}

// Head ends s after n flows.
func Head(s Stream, n uint64) Stream { return &head{s, n} }

type head struct {
	Stream
	left uint64
}

func (h *head) Recv() (*observerv1.GetFlowsResponse, error) {
	if h.left == 0 {
		return nil, io.EOF
	}
	r, err := h.Stream.Recv()
	if err == nil && isFlow(r) {
		h.left--
	}
	return r, err
}
