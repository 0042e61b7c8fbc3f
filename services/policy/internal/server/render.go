// SPDX-License-Identifier: Apache-2.0

package server

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/policy/internal/hub"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// Bounds of what a report names.
const (
	maxName     = 600
	maxRevision = 64
)

// Render implements RenderService.
type Render struct {
	policyv1.UnimplementedRenderServiceServer

	hub      *hub.Hub
	log      *slog.Logger
	draining <-chan struct{}
	refused  *status.Loss
	unkept   *status.Loss
}

// NewRender makes the server; draining, when closed, ends all streams.
func NewRender(h *hub.Hub, log *slog.Logger, report *status.Reporter, draining <-chan struct{}) *Render {
	return &Render{
		hub: h, log: log.With("component", "xds servers"), draining: draining,
		refused: report.Loss("proxy", "a resource is refused"),
		unkept:  report.Loss("xds stream", "more reports than are kept"),
	}
}

// Watch is one xDS server's stream.
func (s *Render) Watch(stream grpc.BidiStreamingServer[policyv1.WatchRequest, policyv1.WatchResponse]) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	hellos := make(chan *policyv1.RenderHello, 1)
	watchers := make(chan *hub.Watcher, 1)
	ended := make(chan error, 2)
	go func() { ended <- s.read(ctx, stream, hellos, watchers) }()
	var hello *policyv1.RenderHello
	select {
	case hello = <-hellos:
	case err := <-ended:
		return toStatus(err)
	case <-time.After(helloTimeout):
		return grpcstatus.Error(codes.DeadlineExceeded, "no hello within 10 s")
	case <-s.draining:
		return errDraining()
	}
	w, err := s.hub.WatchRender(clip(hello.GetVersion(), maxName), clip(hello.GetInstance(), maxName))
	if err != nil {
		return grpcstatus.Error(codes.ResourceExhausted, err.Error())
	}
	defer w.Close()
	watchers <- w
	id, _ := spiffe.PeerID(stream.Context())
	log := s.log.With("peer", id.String(), "instance", clip(hello.GetInstance(), maxName))
	log.Info("xds server connected", "version", hello.GetVersion())
	go func() { ended <- s.write(ctx, stream, w) }()
	select {
	case err = <-ended:
	case <-s.draining:
		err = errDraining()
	}
	log.Info("xds server disconnected", "reason", err)
	return toStatus(err)
}

// read takes the messages of an xDS server: hello, and then what proxies made of it.
func (s *Render) read(ctx context.Context, stream grpc.BidiStreamingServer[policyv1.WatchRequest, policyv1.WatchResponse],
	hellos chan<- *policyv1.RenderHello, watchers <-chan *hub.Watcher,
) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if first.GetHello() == nil {
		return grpcstatus.Error(codes.InvalidArgument, "the first message is not hello")
	}
	hellos <- first.GetHello()
	var w *hub.Watcher
	select {
	case w = <-watchers:
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		message, err := stream.Recv()
		if err != nil {
			return err
		}
		r := message.GetReport()
		if r == nil || r.GetNode() == "" || len(r.GetNode()) > maxName || len(r.GetResource()) > maxName || len(r.GetRevision()) > maxRevision {
			return grpcstatus.Errorf(codes.InvalidArgument, "unexpected message %T", message.GetMessage())
		}
		s.take(w, r)
	}
}

// take notes a report.
func (s *Render) take(w *hub.Watcher, r *policyv1.ProxyReport) {
	if r.GetResource() == "" {
		if !w.Connected(r.GetNode(), r.GetConnected()) {
			s.unkept.Add(1)
		}
		return
	}
	reason := clip(r.GetError(), maxReason)
	kept, fresh := w.Report(r.GetNode(), r.GetResource(), reason)
	if reason != "" && fresh {
		s.refused.Add(1)
		s.log.Warn("a resource of a proxy is refused", "node", r.GetNode(), "resource", r.GetResource(), "reason", reason)
	}
	if !w.Taken(r.GetNode(), r.GetResource(), r.GetRevision()) || !kept {
		s.unkept.Add(1)
	}
}

// clip shortens what somebody else wrote.
func clip(text string, most int) string {
	if len(text) > most {
		text = text[:most]
	}
	return strings.ToValidUTF8(text, "?")
}

func (s *Render) write(ctx context.Context, stream grpc.BidiStreamingServer[policyv1.WatchRequest, policyv1.WatchResponse], w *hub.Watcher) error {
	for {
		update, err := w.Next(ctx)
		if err != nil {
			return err
		}
		if err := stream.Send(renderProto(update)); err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
}

func renderProto(u hub.RenderUpdate) *policyv1.WatchResponse {
	m := &policyv1.WatchResponse{Revision: u.Revision, Synced: u.Synced}
	for _, r := range u.Change.Upserts {
		m.Upserts = append(m.Upserts, renderResourceProto(r))
	}
	for _, k := range u.Change.Removals {
		m.Removals = append(m.Removals, renderKeyProto(k))
	}
	return m
}

func renderKeyProto(k state.RenderKey) *policyv1.RenderKey {
	switch k.Kind {
	case state.RenderNode:
		return &policyv1.RenderKey{Key: &policyv1.RenderKey_Node{Node: k.Name}}
	case state.RenderFilter:
		return &policyv1.RenderKey{Key: &policyv1.RenderKey_Filter{Filter: k.Name}}
	case state.RenderService:
		return &policyv1.RenderKey{Key: &policyv1.RenderKey_Service{Service: k.Name}}
	case state.RenderConfig:
		return &policyv1.RenderKey{Key: &policyv1.RenderKey_Config{Config: k.Name}}
	}
	panic(fmt.Sprintf("render key of kind %d has no message", k.Kind))
}

func renderResourceProto(resource state.RenderResource) *policyv1.RenderResource {
	switch r := resource.(type) {
	case state.NodeSlots:
		m := &policyv1.NodeSlots{Node: r.Node, Unknown: r.Unknown}
		for _, s := range r.Slots {
			m.Slots = append(m.Slots, &policyv1.Slot{Number: uint32(s.Number), Key: s.Key, Port: uint32(s.Port)})
		}
		return &policyv1.RenderResource{Resource: &policyv1.RenderResource_Node{Node: m}}
	case state.ProxyFilter:
		m := &policyv1.Filter{Key: r.Key, Kind: policyv1.FilterKind_FILTER_KIND_ROUTE}
		if r.Of != nil {
			m = FilterProto(r.Of)
		} else {
			m.Namespace, m.Route = r.Route.Namespace, RouteProto(*r.Route)
		}
		m.Revision = r.Revision
		return &policyv1.RenderResource{Resource: &policyv1.RenderResource_Filter{Filter: m}}
	case state.RoutedService:
		return &policyv1.RenderResource{Resource: &policyv1.RenderResource_Service{Service: serviceProto(r.Service)}}
	case state.Config:
		return &policyv1.RenderResource{Resource: &policyv1.RenderResource_Config{Config: &policyv1.EnvoyConfig{
			Kind: r.Kind, Namespace: r.Namespace, Name: r.Name, Uid: r.UID, Generation: r.Generation, Spec: r.Spec,
		}}}
	}
	panic(fmt.Sprintf("render resource of type %T has no message", resource))
}

// slotsOf reads a report of slots.
func slotsOf(r *policyv1.SlotReport) ([]state.Slot, error) {
	if n := len(r.GetSlots()); n > state.MaxSlot {
		return nil, fmt.Errorf("%w: %d slots, more than %d", state.ErrSlots, n, state.MaxSlot)
	}
	var all []state.Slot
	for _, s := range r.GetSlots() {
		if s.GetNumber() > state.MaxSlot || s.GetPort() > 65535 {
			return nil, fmt.Errorf("%w: slot %d at port %d", state.ErrSlots, s.GetNumber(), s.GetPort())
		}
		all = append(all, state.Slot{Number: uint16(s.GetNumber()), Key: s.GetKey(), Port: uint16(s.GetPort())})
	}
	return all, nil
}
