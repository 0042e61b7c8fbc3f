// SPDX-License-Identifier: Apache-2.0

// Package control serves a lab's own API on its unix socket.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/launch"
	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/object"
	"github.com/weirmesh/weir/lab/internal/part"
	"github.com/weirmesh/weir/lab/internal/pod"
)

// Server is weir.lab.v1.LabService.
type Server struct {
	labv1.UnimplementedLabServiceServer
	Cluster *cluster.Cluster
	Runner  *pod.Runner
	Parts   *part.Manager
	// Describe returns what does not change: name, version, nodes and the like. The answer gets the rest.
	Describe func() *labv1.GetLabResponse
	// Policies asks the policy service where policies are in force.
	Policies func(context.Context) ([]*policyv1.PolicyObject, error)
	// AwaitPods waits until all pods and hosts run, or for limit, and returns those that do not.
	AwaitPods func(ctx context.Context, limit time.Duration) []string
	// End ends the lab. It returns at once.
	End func()

	resetting sync.Mutex
}

// GetLab implements LabService.
func (s *Server) GetLab(ctx context.Context, _ *labv1.GetLabRequest) (*labv1.GetLabResponse, error) {
	response := s.Describe()
	describe(response, s.Cluster, s.Parts)
	var enforced []*policyv1.PolicyObject
	if len(cluster.List[*object.Raw](s.Cluster)) > 0 {
		// A policy service that is down is seen among the parts.
		asked, cancel := context.WithTimeout(ctx, policiesTimeout)
		enforced, _ = s.Policies(asked)
		cancel()
	}
	response.Policies = policyMessages(s.Cluster, enforced)
	return response, nil
}

// policiesTimeout bounds how long a status waits for the policy service.
const policiesTimeout = time.Second

// Apply implements LabService.
func (s *Server) Apply(_ context.Context, request *labv1.ApplyRequest) (*labv1.ApplyResponse, error) {
	items, err := parse(request.GetFiles())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	results, err := s.Cluster.Apply(items)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &labv1.ApplyResponse{Results: append(results, notes(items)...)}, nil
}

// Delete implements LabService.
func (s *Server) Delete(_ context.Context, request *labv1.DeleteRequest) (*labv1.DeleteResponse, error) {
	var keys []object.Key
	var errs []error
	for _, file := range request.GetFiles() {
		parsed, err := manifest.ParseKeys(file.GetName(), file.GetData())
		keys, errs = append(keys, parsed...), append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &labv1.DeleteResponse{Results: s.Cluster.Delete(keys)}, nil
}

// LocatePod implements LabService.
func (s *Server) LocatePod(_ context.Context, request *labv1.LocatePodRequest) (*labv1.LocatePodResponse, error) {
	var spec launch.Spec
	var err error
	if node := request.GetNode(); node != "" {
		spec, err = s.Runner.LocateNode(node)
	} else {
		spec, err = s.Runner.Locate(request.GetNamespace(), request.GetName(), request.GetContainer())
	}
	if err != nil {
		return nil, podError(err)
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &labv1.LocatePodResponse{Launch: data}, nil
}

func podError(err error) error {
	switch {
	case errors.Is(err, pod.ErrNoPod):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, pod.ErrNotRunning):
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	return status.Error(codes.Internal, err.Error())
}

// ReadLogs implements LabService.
func (s *Server) ReadLogs(request *labv1.ReadLogsRequest, stream grpc.ServerStreamingServer[labv1.ReadLogsResponse]) error {
	log, err := s.Runner.Log(request.GetNamespace(), request.GetName(), request.GetContainer())
	if err != nil {
		return podError(err)
	}
	tail := -1
	if request.Tail != nil {
		tail = int(max(request.GetTail(), 0))
	}
	return log.Copy(stream.Context(), sender{stream}, tail, request.GetFollow())
}

// sender turns writes into messages of a size that gRPC takes.
type sender struct {
	stream grpc.ServerStreamingServer[labv1.ReadLogsResponse]
}

const chunk = 256 << 10

func (s sender) Write(data []byte) (int, error) {
	sent := 0
	for sent < len(data) {
		n := min(len(data)-sent, chunk)
		if err := s.stream.Send(&labv1.ReadLogsResponse{Data: data[sent : sent+n]}); err != nil {
			return sent, err
		}
		sent += n
	}
	return sent, nil
}

// ControlPart implements LabService.
func (s *Server) ControlPart(ctx context.Context, request *labv1.ControlPartRequest) (*labv1.ControlPartResponse, error) {
	actions := map[labv1.ControlPartRequest_Action]func(context.Context, string) error{
		labv1.ControlPartRequest_ACTION_KILL:    s.Parts.Kill,
		labv1.ControlPartRequest_ACTION_CRASH:   s.Parts.Crash,
		labv1.ControlPartRequest_ACTION_STOP:    s.Parts.StopPart,
		labv1.ControlPartRequest_ACTION_START:   s.Parts.StartPart,
		labv1.ControlPartRequest_ACTION_REPLACE: s.Parts.Replace,
	}
	action, ok := actions[request.GetAction()]
	if !ok {
		return nil, status.Errorf(codes.InvalidArgument, "action: expected kill, crash, stop or start, got %v", request.GetAction())
	}
	if err := action(ctx, request.GetPart()); err != nil {
		if errors.Is(err, part.ErrUnknown) {
			return nil, status.Error(codes.NotFound, fmt.Sprintf("%v; there are %v", err, s.partNames()))
		}
		return nil, status.Error(codes.Internal, err.Error())
	}
	for _, p := range s.Parts.List() {
		if p.Name == request.GetPart() {
			return &labv1.ControlPartResponse{Part: partMessage(p)}, nil
		}
	}
	return nil, status.Error(codes.NotFound, "the part is gone")
}

func (s *Server) partNames() []string {
	var names []string
	for _, p := range s.Parts.List() {
		names = append(names, p.Name)
	}
	return names
}

// Shutdown implements LabService.
func (s *Server) Shutdown(context.Context, *labv1.ShutdownRequest) (*labv1.ShutdownResponse, error) {
	s.End()
	return &labv1.ShutdownResponse{}, nil
}
