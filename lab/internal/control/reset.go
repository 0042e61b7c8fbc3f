// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/object"
)

// Reset implements LabService.
func (s *Server) Reset(ctx context.Context, request *labv1.ResetRequest) (*labv1.ResetResponse, error) {
	items, err := parse(request.GetFiles())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	// One at a time: what one makes, the next would delete half.
	s.resetting.Lock()
	defer s.resetting.Unlock()
	if err := s.Cluster.CheckAlone(items); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	s.Cluster.Clear()
	if err := s.Runner.AwaitGone(ctx); err != nil {
		return nil, status.Error(codes.DeadlineExceeded, err.Error())
	}
	results, err := s.Cluster.Apply(items)
	if err != nil {
		// Somebody applied something in between.
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	response := &labv1.ResetResponse{Results: append(results, notes(items)...)}
	if limit := request.GetWaitSeconds(); limit > 0 {
		response.Waiting = s.AwaitPods(ctx, time.Duration(limit)*time.Second)
	}
	return response, nil
}

// ListObjects implements LabService.
func (s *Server) ListObjects(_ context.Context, request *labv1.ListObjectsRequest) (*labv1.ListObjectsResponse, error) {
	kind, ok := object.ByName(request.GetKind())
	if !ok {
		return nil, status.Errorf(codes.InvalidArgument, "kind %q is not one of the lab's", request.GetKind())
	}
	response := &labv1.ListObjectsResponse{}
	for _, o := range s.Cluster.Objects(kind.Name, request.GetNamespace(), request.GetName()) {
		data, err := object.JSON(o)
		if err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
		response.Objects = append(response.Objects, data)
	}
	return response, nil
}

// parse reads all files; the error joins all faults.
func parse(files []*labv1.ManifestFile) ([]manifest.Item, error) {
	var items []manifest.Item
	var errs []error
	for _, file := range files {
		parsed, err := manifest.Parse(file.GetName(), file.GetData())
		items, errs = append(items, parsed...), append(errs, err)
	}
	return items, errors.Join(errs...)
}

func notes(items []manifest.Item) []string {
	var all []string
	for _, item := range items {
		all = append(all, item.Notes...)
	}
	return all
}
