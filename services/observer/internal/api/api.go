// SPDX-License-Identifier: Apache-2.0

// Package api serves observer.Observer, as Hubble's clients know it, and weir.observer.v1.
package api

import (
	"context"
	"errors"
	"math"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/gen/relay"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/internal/version"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/nodes"
	"github.com/weirmesh/weir/services/observer/internal/query"
	"github.com/weirmesh/weir/services/observer/internal/store"
	"github.com/weirmesh/weir/services/observer/internal/wire"
)

// Config is what the handlers read from.
type Config struct {
	// Name is what this observer calls itself where Hubble's relay names itself: cluster/instance.
	Name        string
	Flows       *query.Engine
	FlowStore   *store.Store
	AgentEvents *query.Engine
	Nodes       *nodes.Registry
	// OnGap counts what a slow reader missed.
	OnGap func(*event.Gap)
	// Draining is closed when streams must end.
	Draining <-chan struct{}
	Started  time.Time
	Now      func() time.Time
}

// API implements observer.Observer.
type API struct {
	observer.UnimplementedObserverServer
	config Config
}

// New makes the handlers.
func New(config Config) *API { return &API{config: config} }

// streamContext ends when the call does or the server drains.
func (a *API) streamContext(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-a.config.Draining:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// finish turns the end of a run into the end of a call. Errors of requests stay plain, so that their
// gRPC code is Unknown: Hubble's clients print the text alone then.
func (a *API) finish(callCtx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case callCtx.Err() != nil:
		return status.FromContextError(callCtx.Err()).Err()
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Unavailable, "the observer is stopping")
	}
	return err
}

// GetFlows implements observer.Observer. Callers: anyone who reaches the port.
func (a *API) GetFlows(request *observer.GetFlowsRequest, stream grpc.ServerStreamingServer[observer.GetFlowsResponse]) error {
	c, err := compile(request)
	if errors.Is(err, query.ErrFirstFollow) {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	if err != nil {
		return err
	}
	ctx, cancel := a.streamContext(stream.Context())
	defer cancel()
	sink := &hubbleSink{api: a, stream: stream, masker: newMasker(c.mask)}
	return a.finish(stream.Context(), a.config.Flows.Run(ctx, c.sel, batch.Flow, newMatcher(c.filter), sink))
}

// nodeStatus says which nodes the answer is from, and which are silent.
func (a *API) nodeStatus() []*observer.GetFlowsResponse {
	var connected, unavailable []string
	for _, n := range a.config.Nodes.Nodes() {
		if n.Connected {
			connected = append(connected, n.Name)
		} else {
			unavailable = append(unavailable, n.Name)
		}
	}
	var out []*observer.GetFlowsResponse
	for _, s := range []struct {
		state relay.NodeState
		names []string
	}{{relay.NodeState_NODE_CONNECTED, connected}, {relay.NodeState_NODE_UNAVAILABLE, unavailable}} {
		if len(s.names) == 0 {
			continue
		}
		out = append(out, &observer.GetFlowsResponse{
			ResponseTypes: &observer.GetFlowsResponse_NodeStatus{NodeStatus: &relay.NodeStatusEvent{StateChange: s.state, NodeNames: s.names}},
			NodeName:      a.config.Name,
			Time:          timestamppb.New(a.config.Now()),
		})
	}
	return out
}

// GetAgentEvents implements observer.Observer.
func (a *API) GetAgentEvents(request *observer.GetAgentEventsRequest, stream grpc.ServerStreamingServer[observer.GetAgentEventsResponse]) error {
	sel, err := selectionOf(request)
	if errors.Is(err, query.ErrFirstFollow) {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	if err != nil {
		return err
	}
	ctx, cancel := a.streamContext(stream.Context())
	defer cancel()
	return a.finish(stream.Context(), a.config.AgentEvents.Run(ctx, sel, batch.AgentEvent, everyRecord{}, &agentSink{stream: stream}))
}

// agentSink answers GetAgentEvents, which has no way to tell of losses.
type agentSink struct{ stream grpc.ServerStream }

// Start implements query.Sink.
func (*agentSink) Start() error { return nil }

// Event implements query.Sink.
func (s *agentSink) Event(source *event.Source, i int) error {
	raw := wire.Raw(wire.AppendAgentEventResponse(nil, source.Item(i), wire.Envelope{NodeName: source.NodeName, Time: source.Time(i)}))
	return s.stream.SendMsg(&raw)
}

// Gap implements query.Sink.
func (*agentSink) Gap(*event.Gap) error { return nil }

// Lost implements query.Sink.
func (*agentSink) Lost(uint64, time.Time, time.Time) error { return nil }

// GetDebugEvents implements observer.Observer: there are none.
func (a *API) GetDebugEvents(request *observer.GetDebugEventsRequest, stream grpc.ServerStreamingServer[observer.GetDebugEventsResponse]) error {
	sel, err := selectionOf(request)
	if errors.Is(err, query.ErrFirstFollow) {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	if err != nil || !sel.Follow {
		return err
	}
	ctx, cancel := a.streamContext(stream.Context())
	defer cancel()
	<-ctx.Done()
	return a.finish(stream.Context(), ctx.Err())
}

// maxUnavailable is how many nodes ServerStatus names.
const maxUnavailable = 10

// ServerStatus implements observer.Observer.
func (a *API) ServerStatus(context.Context, *observer.ServerStatusRequest) (*observer.ServerStatusResponse, error) {
	stats := a.config.FlowStore.Stats()
	seen, rate := a.config.Nodes.Flows()
	response := &observer.ServerStatusResponse{
		NumFlows:  stats.Events,
		MaxFlows:  capacity(stats),
		SeenFlows: seen,
		UptimeNs:  uint64(a.config.Now().Sub(a.config.Started)),
		Version:   "weir-observer " + version.Version,
		FlowsRate: rate,
	}
	var connected, unavailable uint32
	for _, n := range a.config.Nodes.Nodes() {
		if n.Connected {
			connected++
			continue
		}
		unavailable++
		if len(response.UnavailableNodes) < maxUnavailable {
			response.UnavailableNodes = append(response.UnavailableNodes, n.Name)
		}
	}
	response.NumConnectedNodes, response.NumUnavailableNodes = wrapperspb.UInt32(connected), wrapperspb.UInt32(unavailable)
	return response, nil
}

// typicalFlow is what a flow takes in memory, until some have been seen.
const typicalFlow = 800

// capacity estimates how many flows memory can hold: it is bounded in bytes.
func capacity(stats store.Stats) uint64 {
	size := float64(typicalFlow)
	if stats.Events > 0 {
		size = float64(stats.Bytes) / float64(stats.Events)
	}
	return max(uint64(math.Round(float64(stats.MaxBytes)/size)), stats.Events)
}

// GetNodes implements observer.Observer.
func (a *API) GetNodes(context.Context, *observer.GetNodesRequest) (*observer.GetNodesResponse, error) {
	inMemory := a.config.FlowStore.CountByNode()
	limit := capacity(a.config.FlowStore.Stats())
	response := &observer.GetNodesResponse{}
	for _, n := range a.config.Nodes.Nodes() {
		state := relay.NodeState_NODE_UNAVAILABLE
		if n.Connected {
			state = relay.NodeState_NODE_CONNECTED
		}
		node := &observer.Node{
			Name: n.Name, Version: n.Version, Address: n.Address, State: state,
			Tls:      &observer.TLS{Enabled: true, ServerName: n.ServerName},
			NumFlows: inMemory[n.Name], MaxFlows: limit, SeenFlows: n.Flows,
		}
		if !n.Started.IsZero() {
			node.UptimeNs = uint64(max(a.config.Now().Sub(n.Started), 0))
		}
		response.Nodes = append(response.Nodes, node)
	}
	return response, nil
}

// GetNamespaces implements observer.Observer.
func (a *API) GetNamespaces(context.Context, *observer.GetNamespacesRequest) (*observer.GetNamespacesResponse, error) {
	response := &observer.GetNamespacesResponse{}
	for _, n := range a.config.Nodes.Namespaces() {
		response.Namespaces = append(response.Namespaces, &observer.Namespace{Cluster: n.Cluster, Namespace: n.Name})
	}
	return response, nil
}
