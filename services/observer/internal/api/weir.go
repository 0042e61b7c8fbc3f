// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/filter"
	"github.com/weirmesh/weir/services/observer/internal/wire"
)

// Weir implements weir.observer.v1.ObserverService.
type Weir struct {
	observerv1.UnimplementedObserverServiceServer
	api *API
}

// NewWeir makes the handlers.
func NewWeir(a *API) *Weir { return &Weir{api: a} }

// GetFlows implements ObserverService. It selects as Hubble's does, except that `since` with `number`
// and without `first` or `follow` means the newest ones.
func (w *Weir) GetFlows(request *observerv1.GetFlowsRequest, stream grpc.ServerStreamingServer[observerv1.GetFlowsResponse]) error {
	inner := request.GetRequest()
	if inner == nil {
		inner = &observer.GetFlowsRequest{}
	}
	c, err := compile(inner)
	var faulty *filter.Error
	switch {
	case errors.As(err, &faulty):
		return status.Errorf(codes.InvalidArgument, "filter field %s: %v", faulty.Field, err)
	case err != nil:
		return status.Error(codes.InvalidArgument, err.Error())
	}
	c.sel.Newest = true
	ctx, cancel := w.api.streamContext(stream.Context())
	defer cancel()
	sink := &weirSink{api: w.api, stream: stream, compiled: c, masker: newMasker(c.mask)}
	return w.api.finish(stream.Context(), w.api.config.Flows.Run(ctx, c.sel, batch.Flow, newMatcher(c.filter), sink))
}

// weirSink answers ObserverService/GetFlows.
type weirSink struct {
	api      *API
	stream   grpc.ServerStream
	compiled compiled
	masker   masker
	arena    wire.Arena
	raw      wire.Raw
}

// statsRoom is enough for the frame of the statistics.
const statsRoom = 96

// Start implements query.Sink.
func (s *weirSink) Start() error {
	for _, event := range s.api.nodeStatus() {
		if err := s.stream.SendMsg(&observerv1.GetFlowsResponse{Item: &observerv1.GetFlowsResponse_Response{Response: event}}); err != nil {
			return err
		}
	}
	return nil
}

// Event implements query.Sink.
func (s *weirSink) Event(source *event.Source, i int) error {
	item, envelope := s.masker.apply(source, i)
	var stats []byte
	if s.masker.stats {
		stats = source.Stats(i)
	}
	room := s.arena.Room(len(item) + len(stats) + len(envelope.NodeName) + envelopeRoom + statsRoom)
	s.raw = s.arena.Take(wire.AppendWeirResponse(room, item, stats, envelope))
	return s.stream.SendMsg(&s.raw)
}

// Gap implements query.Sink: a reader is told whom a lost flow could have concerned.
func (s *weirSink) Gap(gap *event.Gap) error {
	sel := s.compiled.sel
	switch {
	case !s.compiled.filter.MayConcern(gap.NodeName),
		sel.Since != nil && gap.LastTime != 0 && gap.LastTime < *sel.Since,
		sel.Until != nil && gap.FirstTime != 0 && gap.FirstTime > *sel.Until:
		return nil
	}
	return s.send(gap)
}

func (s *weirSink) send(gap *event.Gap) error {
	return s.stream.SendMsg(&observerv1.GetFlowsResponse{Item: &observerv1.GetFlowsResponse_Gap{Gap: weirGap(gap)}})
}

// Lost implements query.Sink.
func (s *weirSink) Lost(count uint64, first, last time.Time) error {
	return s.send(s.api.slowReader(count, first, last))
}

// GetLosses implements ObserverService.
func (w *Weir) GetLosses(context.Context, *observerv1.GetLossesRequest) (*observerv1.GetLossesResponse, error) {
	response := &observerv1.GetLossesResponse{}
	for _, l := range w.api.config.Nodes.Losses() {
		response.Losses = append(response.Losses, &observerv1.LossCount{NodeName: l.NodeName, Place: l.Place, Cause: l.Cause, Count: l.Count})
	}
	for _, n := range w.api.config.Nodes.Nodes() {
		epochs := make([]*observerv1.EpochCount, 0, len(n.Epochs))
		for _, e := range n.Epochs {
			epochs = append(epochs, &observerv1.EpochCount{Epoch: e.Number, Received: e.Received, Lost: e.Lost, LastSequence: e.Last})
		}
		response.Nodes = append(response.Nodes, &observerv1.NodeCount{
			NodeName: n.Name, Epoch: n.Epoch, Received: n.Records, LastSequence: n.LastSeq,
			FlowsPerSecond: n.FlowsPerSecond, LastTime: timeOf(n.LastTime), Epochs: epochs,
		})
	}
	return response, nil
}
