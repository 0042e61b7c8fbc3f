// SPDX-License-Identifier: Apache-2.0

package api

import (
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/filter"
	"github.com/weirmesh/weir/services/observer/internal/mask"
	"github.com/weirmesh/weir/services/observer/internal/query"
	"github.com/weirmesh/weir/services/observer/internal/wire"
)

// selector is what all selecting requests have in common.
type selector interface {
	GetNumber() uint64
	GetFirst() bool
	GetFollow() bool
	GetSince() *timestamppb.Timestamp
	GetUntil() *timestamppb.Timestamp
}

func selectionOf(request selector) (query.Selection, error) {
	sel := query.Selection{Number: request.GetNumber(), First: request.GetFirst(), Follow: request.GetFollow()}
	for _, bound := range []struct {
		name string
		at   *timestamppb.Timestamp
		to   **int64
	}{{"since", request.GetSince(), &sel.Since}, {"until", request.GetUntil(), &sel.Until}} {
		if bound.at == nil {
			continue
		}
		if err := bound.at.CheckValid(); err != nil {
			return sel, fmt.Errorf("%s: %w", bound.name, err)
		}
		nanos := unixNano(bound.at.AsTime())
		*bound.to = &nanos
	}
	return sel, sel.Validate()
}

// unixNano bounds times that have no such number.
func unixNano(t time.Time) int64 {
	const limit = 1 << 62
	switch s := t.Unix(); {
	case s > limit/int64(time.Second):
		return limit
	case s < -limit/int64(time.Second):
		return -limit
	}
	return t.UnixNano()
}

// compiled is a GetFlows request, checked.
type compiled struct {
	sel    query.Selection
	filter *filter.Filter
	mask   *mask.Mask
}

func compile(request *observer.GetFlowsRequest) (compiled, error) {
	var c compiled
	var err error
	if c.sel, err = selectionOf(request); err != nil {
		return c, err
	}
	if c.filter, err = filter.Compile(request.GetWhitelist(), request.GetBlacklist()); err != nil {
		return c, err
	}
	c.mask, err = mask.New(request.GetFieldMask())
	return c, err
}

// matcher decides on records, decoding as little as the filter needs. It serves one request.
type matcher struct {
	filter *filter.Filter
	all    bool
	flow   flow.Flow
	buf    []byte
}

func newMatcher(f *filter.Filter) *matcher { return &matcher{filter: f, all: f.Everything()} }

// MayMatch implements query.Filter.
func (m *matcher) MayMatch(h *batch.Header) bool { return m.all || m.filter.MayMatch(h) }

// Match implements query.Filter. What can not be decoded is no match.
func (m *matcher) Match(source *event.Source, i int) bool {
	if m.all {
		return true
	}
	item := source.Item(i)
	if fields := m.filter.Fields(); fields != nil {
		m.buf = fields.Append(m.buf[:0], item)
		item = m.buf
	}
	return proto.Unmarshal(item, &m.flow) == nil && m.filter.Match(&m.flow)
}

// everyRecord is the filter of requests that have none.
type everyRecord struct{}

// MayMatch implements query.Filter.
func (everyRecord) MayMatch(*batch.Header) bool { return true }

// Match implements query.Filter.
func (everyRecord) Match(*event.Source, int) bool { return true }

// masker cuts flows down and says what is left for the envelope.
type masker struct {
	mask                 *mask.Mask
	name, seconds, nanos bool
	buf                  []byte
	stats                bool
}

func newMasker(m *mask.Mask) masker {
	return masker{
		mask: m, name: m.Keeps("node_name"),
		seconds: m.Keeps("time", "seconds"), nanos: m.Keeps("time", "nanos"),
		stats: m.Keeps("extensions"),
	}
}

// apply returns the flow's bytes, valid until the next call, and its envelope: as Hubble does it,
// the time and node name are those that the mask leaves.
func (m *masker) apply(source *event.Source, i int) ([]byte, wire.Envelope) {
	item := source.Item(i)
	var envelope wire.Envelope
	if m.name {
		envelope.NodeName = source.NodeName
	}
	t := source.Time(i)
	switch {
	case m.seconds && m.nanos:
		envelope.Time = t
	case m.seconds:
		envelope.Time = t - t%int64(time.Second)
	case m.nanos:
		envelope.Time = t % int64(time.Second)
	}
	if m.mask != nil {
		m.buf = m.mask.Append(m.buf[:0], item)
		item = m.buf
	}
	return item, envelope
}

// envelopeRoom is enough for everything around a flow: lengths, tags, time and the name's frame.
const envelopeRoom = 64

// hubbleSink answers observer.Observer/GetFlows.
type hubbleSink struct {
	api    *API
	stream grpc.ServerStream
	masker masker
	arena  wire.Arena
	raw    wire.Raw
}

// Start implements query.Sink.
func (s *hubbleSink) Start() error {
	for _, event := range s.api.nodeStatus() {
		if err := s.stream.SendMsg(event); err != nil {
			return err
		}
	}
	return nil
}

// Event implements query.Sink.
func (s *hubbleSink) Event(source *event.Source, i int) error {
	item, envelope := s.masker.apply(source, i)
	room := s.arena.Room(len(item) + len(envelope.NodeName) + envelopeRoom)
	s.raw = s.arena.Take(wire.AppendFlowResponse(room, item, envelope))
	return s.stream.SendMsg(&s.raw)
}

// Gap implements query.Sink. Like Hubble's, lost events pass all filters and count for nothing.
// A withdrawn gap has no word in Hubble's language.
func (s *hubbleSink) Gap(gap *event.Gap) error {
	if gap.Withdrawn {
		return nil
	}
	return s.stream.SendMsg(&observer.GetFlowsResponse{
		ResponseTypes: &observer.GetFlowsResponse_LostEvents{LostEvents: lostEvent(gap)},
		NodeName:      gap.NodeName,
		Time:          timeOf(gap.LastTime),
	})
}

// Lost implements query.Sink.
func (s *hubbleSink) Lost(count uint64, first, last time.Time) error {
	gap := s.api.slowReader(count, first, last)
	return s.stream.SendMsg(&observer.GetFlowsResponse{
		ResponseTypes: &observer.GetFlowsResponse_LostEvents{LostEvents: lostEvent(gap)},
		NodeName:      gap.NodeName,
		Time:          timestamppb.New(last),
	})
}
