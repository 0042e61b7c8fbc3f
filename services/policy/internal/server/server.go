// SPDX-License-Identifier: Apache-2.0

// Package server is the gRPC edge of the policy service: it checks who calls, turns messages into
// calls of the hub, and the hub's changes into messages.
package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/policy/internal/hub"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// Authorize says who may call what of this service.
func Authorize() server.Table {
	return server.Table{
		// Each agent for its own node, which Sync checks.
		policyv1.PolicyService_Sync_FullMethodName:  {"agent"},
		policyv1.RenderService_Watch_FullMethodName: {"xds"},
		// The command line, as root on this machine.
		"/" + policyv1.PolicyQueryService_ServiceDesc.ServiceName + "/": {server.Local},
		"/" + statusv1.StatusService_ServiceDesc.ServiceName + "/":      {server.Local},
	}
}

// helloTimeout is how long an agent may take to introduce itself.
const helloTimeout = 10 * time.Second

// spreadWait is how long the answer to a registration waits for the other nodes.
const spreadWait = time.Second

// maxReason bounds what an agent says of its troubles.
const maxReason = 1000

// maxWaits is how many registrations of one agent may wait for their answer; more wait to be read.
const maxWaits = 256

// Server implements PolicyService.
type Server struct {
	policyv1.UnimplementedPolicyServiceServer

	hub      *hub.Hub
	log      *slog.Logger
	draining <-chan struct{}
	refused  *status.Loss
	hostile  *status.Loss
	late     *status.Loss
	// unenforced counts refusals.
	unenforced *status.Loss
}

// New makes the server; draining, when closed, ends all streams.
func New(h *hub.Hub, log *slog.Logger, report *status.Reporter, draining <-chan struct{}) *Server {
	return &Server{
		hub:      h,
		log:      log.With("component", "agents"),
		draining: draining,
		refused:  report.Loss("registration", "endpoint refused"),
		hostile:  report.Loss("agent stream", "refused: another node's name or pod"),
		late:     report.Loss("registration", "a node acknowledged an address late"),

		unenforced: report.Loss("agent", "something is not enforced"),
	}
}

// Sync is one agent's stream. Callers: agents, each for its own node.
func (s *Server) Sync(stream grpc.BidiStreamingServer[policyv1.SyncRequest, policyv1.SyncResponse]) error {
	id, ok := spiffe.PeerID(stream.Context())
	if !ok || id.Node == "" {
		s.hostile.Add(1)
		return grpcstatus.Error(codes.PermissionDenied, "the certificate names no node: it must be spiffe://<trust domain>/weir/agent/<node>")
	}
	// Cancelling ctx ends all that this call started but the reader, which ends with the call itself.
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()

	hellos := make(chan *policyv1.Hello, 1)
	ended := make(chan error, 3)
	sessions := make(chan *hub.Session, 1)
	go func() { ended <- s.read(ctx, stream, id.Node, hellos, sessions) }()

	var hello *policyv1.Hello
	select {
	case hello = <-hellos:
	case err := <-ended:
		return err
	case <-time.After(helloTimeout):
		return grpcstatus.Error(codes.DeadlineExceeded, "no hello within 10 s")
	case <-s.draining:
		return errDraining()
	}
	session, err := s.hub.Connect(ctx, id.Node, hello.GetVersion(), hello.GetInstance())
	if err != nil {
		return toStatus(err)
	}
	defer session.Close()
	sessions <- session
	log := s.log.With("node", id.Node)
	log.Info("agent connected", "version", hello.GetVersion(), "instance", hello.GetInstance())

	go func() { ended <- s.write(ctx, stream, session, id.Node) }()
	go func() { ended <- session.Watch(ctx) }()
	select {
	case err = <-ended:
	case <-s.draining:
		err = errDraining()
	}
	log.Info("agent disconnected", "reason", err)
	return toStatus(err)
}

func errDraining() error {
	return grpcstatus.Error(codes.Unavailable, "the policy service is stopping")
}

// read takes the agent's messages: hello first, and when the session exists, the others.
func (s *Server) read(ctx context.Context, stream grpc.BidiStreamingServer[policyv1.SyncRequest, policyv1.SyncResponse],
	node string, hellos chan<- *policyv1.Hello, sessions <-chan *hub.Session,
) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	hello := first.GetHello()
	if hello == nil {
		return grpcstatus.Error(codes.InvalidArgument, "the first message is not hello")
	}
	if hello.GetNode() != node {
		s.hostile.Add(1)
		return grpcstatus.Errorf(codes.PermissionDenied, "the certificate is of node %s, not %.80q", node, hello.GetNode())
	}
	hellos <- hello
	var session *hub.Session
	select {
	case session = <-sessions:
	case <-ctx.Done():
		return ctx.Err()
	}
	waits := make(chan struct{}, maxWaits)
	for {
		message, err := stream.Recv()
		if err != nil {
			return err
		}
		switch m := message.GetMessage().(type) {
		case *policyv1.SyncRequest_Register:
			err = s.register(ctx, session, node, m.Register, waits)
		case *policyv1.SyncRequest_Unregister:
			err = s.hub.Post(ctx, func(st *state.State) { st.Unregister(node, m.Unregister) })
		case *policyv1.SyncRequest_Ack:
			err = session.Ack(ctx, m.Ack)
		case *policyv1.SyncRequest_Refusal:
			s.refuse(session, node, m.Refusal)
		case *policyv1.SyncRequest_Slots:
			err = s.slots(ctx, node, m.Slots)
		default:
			err = grpcstatus.Errorf(codes.InvalidArgument, "unexpected message %T", m)
		}
		if err != nil {
			return err
		}
	}
}

// slots takes in which slots a node's agent has given.
func (s *Server) slots(ctx context.Context, node string, r *policyv1.SlotReport) error {
	slots, err := slotsOf(r)
	if err == nil {
		if _, doErr := s.hub.Do(ctx, func(st *state.State) { err = st.SetSlots(node, slots) }); doErr != nil {
			return doErr
		}
	}
	if err != nil {
		return grpcstatus.Error(codes.InvalidArgument, err.Error())
	}
	return nil
}

// refuse notes what an agent could not put in force.
func (s *Server) refuse(session *hub.Session, node string, r *policyv1.Refusal) {
	what := hub.Refused{Kind: kindOf(r.GetResource().GetKind()), Key: r.GetResource().GetKey()}
	reason := clip(r.GetError(), maxReason)
	if reason != "" {
		s.unenforced.Add(1)
		s.log.Warn("an agent does not enforce something", "node", node, "kind", r.GetResource().GetKind(), "key", what.Key, "reason", reason)
	}
	session.Refuse(what, reason)
}

// register takes in an endpoint and answers when it has spread. Only a claim on what belongs to
// another node ends the stream; other refusals are answered.
func (s *Server) register(ctx context.Context, session *hub.Session, node string, e *policyv1.Endpoint, waits chan struct{}) error {
	uid := e.GetUid()
	if e.GetNode() != "" && e.GetNode() != node {
		s.hostile.Add(1)
		return grpcstatus.Errorf(codes.PermissionDenied, "endpoint %.80q is of node %.80q, the certificate of %s", uid, e.GetNode(), node)
	}
	addresses, err := addressesOf(e)
	var revision uint64
	if err == nil {
		var doErr error
		revision, doErr = s.hub.Do(ctx, func(st *state.State) { err = st.Register(node, uid, addresses) })
		if doErr != nil {
			return doErr
		}
	}
	switch {
	case errors.Is(err, state.ErrNotYours):
		s.hostile.Add(1)
		return grpcstatus.Errorf(codes.PermissionDenied, "endpoint %.80q: %v", uid, err)
	case err != nil:
		s.refused.Add(1)
		s.log.Warn("endpoint not taken", "node", node, "uid", uid, "pod", e.GetNamespace()+"/"+e.GetName(), "error", err)
		session.Answer(hub.Spread{UID: uid, Error: err.Error()})
		return nil
	}
	select {
	case waits <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	go func() {
		defer func() { <-waits }()
		waitCtx, cancel := context.WithTimeout(ctx, spreadWait)
		defer cancel()
		late := s.hub.WaitSpread(waitCtx, revision, node)
		s.late.Add(uint64(len(late)))
		session.Answer(hub.Spread{UID: uid, Late: late})
	}()
	return nil
}

// write sends what the session has to say.
func (s *Server) write(ctx context.Context, stream grpc.BidiStreamingServer[policyv1.SyncRequest, policyv1.SyncResponse], session *hub.Session, node string) error {
	for {
		m, err := session.Next(ctx)
		if err != nil {
			return err
		}
		var response *policyv1.SyncResponse
		switch {
		case m.Update != nil:
			response = &policyv1.SyncResponse{Message: &policyv1.SyncResponse_Update{Update: updateProto(m.Update.Revision, m.Update.Change, node)}}
		case m.Synced != nil:
			response = &policyv1.SyncResponse{Message: &policyv1.SyncResponse_Synced{Synced: &policyv1.Synced{Revision: *m.Synced}}}
		case m.Spread != nil:
			response = &policyv1.SyncResponse{Message: &policyv1.SyncResponse_Spread{Spread: &policyv1.Spread{
				Uid: m.Spread.UID, LateNodes: m.Spread.Late, Error: m.Spread.Error,
			}}}
		}
		if err := stream.Send(response); err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
}

// toStatus chooses the code of what ended a stream.
func toStatus(err error) error {
	switch {
	case err == nil, errors.Is(err, io.EOF):
		return nil
	case errors.Is(err, hub.ErrDisplaced):
		return grpcstatus.Error(codes.Aborted, err.Error())
	case errors.Is(err, hub.ErrSlow):
		return grpcstatus.Error(codes.ResourceExhausted, err.Error())
	case errors.Is(err, hub.ErrBadAck):
		return grpcstatus.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, hub.ErrStopped):
		return grpcstatus.Error(codes.Unavailable, err.Error())
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return grpcstatus.FromContextError(err).Err()
	}
	if _, ok := grpcstatus.FromError(err); ok {
		return err
	}
	return grpcstatus.Error(codes.Internal, err.Error())
}
