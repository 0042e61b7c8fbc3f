// SPDX-License-Identifier: Apache-2.0

package api

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/gen/flow"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	"github.com/weirmesh/weir/services/observer/internal/event"
)

// timeOf returns nil for an unknown time.
func timeOf(nanos int64) *timestamppb.Timestamp {
	if nanos == 0 {
		return nil
	}
	return timestamppb.New(time.Unix(0, nanos))
}

// lostEvent says a gap in Hubble's language.
func lostEvent(gap *event.Gap) *flow.LostEvent {
	lost := &flow.LostEvent{
		Source:        flow.LostEventSource_OBSERVER_EVENTS_QUEUE,
		NumEventsLost: gap.Count,
		First:         timeOf(gap.FirstTime),
		Last:          timeOf(gap.LastTime),
	}
	switch gap.Place {
	case flowv1.Place_PLACE_KERNEL:
		lost.Source = flow.LostEventSource_PERF_EVENT_RING_BUFFER
	case flowv1.Place_PLACE_OBSERVER:
		lost.Source = flow.LostEventSource_HUBBLE_RING_BUFFER
	}
	if gap.CPU >= 0 {
		lost.Cpu = wrapperspb.Int32(gap.CPU)
	}
	return lost
}

// weirGap says a gap in our own.
func weirGap(gap *event.Gap) *observerv1.Gap {
	return &observerv1.Gap{
		NodeName:  gap.NodeName,
		Place:     gap.Place,
		Cause:     gap.Cause,
		Epoch:     gap.Epoch,
		First:     gap.First,
		Last:      gap.Last,
		Count:     gap.Count,
		FirstTime: timeOf(gap.FirstTime),
		LastTime:  timeOf(gap.LastTime),
		Withdrawn: gap.Withdrawn,
	}
}

// slowReader counts what a reader missed, at this observer, and returns it as a gap.
func (a *API) slowReader(count uint64, first, last time.Time) *event.Gap {
	gap := &event.Gap{
		NodeName: a.config.Name, Place: flowv1.Place_PLACE_OBSERVER, Cause: flowv1.Cause_CAUSE_SLOW_READER, CPU: -1,
		Count: count, FirstTime: first.UnixNano(), LastTime: last.UnixNano(),
	}
	a.config.OnGap(gap)
	return gap
}
