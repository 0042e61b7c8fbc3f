// SPDX-License-Identifier: Apache-2.0

// Package query answers what people ask about policies: which there are and where they are in force, what a document would change, what happens to a
// connection and why, and what may reach an endpoint. It reads snapshots; nothing here decides, that is internal/policy's.
package query

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	semantics "github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/hub"
	"github.com/weirmesh/weir/services/policy/internal/progress"
	"github.com/weirmesh/weir/services/policy/internal/state"
)

// Service implements PolicyQueryService.
type Service struct {
	policyv1.UnimplementedPolicyQueryServiceServer

	hub *hub.Hub
}

// New answers from a hub.
func New(h *hub.Hub) *Service { return &Service{hub: h} }

// cluster is what questions are answered from: one consistent state.
type cluster struct {
	frozen   *engine.Frozen
	snapshot *state.Snapshot
	// routes of services, by the key of their filter.
	routes map[string]state.Route
}

func (s *Service) cluster(ctx context.Context) (*cluster, error) {
	c := &cluster{}
	err := s.hub.Read(ctx, func(st *state.State) { c.frozen, c.snapshot, c.routes = st.Freeze(), st.Snapshot(), st.Routes() })
	if err != nil {
		return nil, toStatus(err)
	}
	return c, nil
}

// ListPolicies lists policy objects.
func (s *Service) ListPolicies(ctx context.Context, r *policyv1.ListPoliciesRequest) (*policyv1.ListPoliciesResponse, error) {
	all, err := progress.Of(ctx, s.hub)
	if err != nil {
		return nil, toStatus(err)
	}
	response := &policyv1.ListPoliciesResponse{}
	for i := range all {
		o := all[i].Object
		if r.GetNamespace() != "" && r.GetNamespace() != o.Namespace || r.GetName() != "" && r.GetName() != o.Name ||
			r.GetKind() != "" && r.GetKind() != o.Kind {
			continue
		}
		response.Policies = append(response.Policies, objectProto(&all[i]))
	}
	return response, nil
}

func objectProto(o *progress.Object) *policyv1.PolicyObject {
	m := &policyv1.PolicyObject{
		Kind: o.Object.Kind, Namespace: o.Object.Namespace, Name: o.Object.Name, Uid: o.Object.UID, Generation: o.Object.Generation,
		Valid: o.Fault == nil, NotYet: o.NotYet, EnforcedGeneration: o.Enforced, EnforcingNodes: uint32(o.Enforcing), Nodes: uint32(o.Nodes),
		Endpoints: uint32(o.Selected), Conflicts: o.Conflicts, Object: o.Object.Raw,
		Services: o.Routes, Notes: o.Warnings,
	}
	if o.Fault != nil {
		m.Error = o.Fault.Error()
	}
	for _, l := range o.Lagging {
		m.Lagging = append(m.Lagging, &policyv1.NodeLag{Node: l.Node, Reason: l.Reason})
	}
	return m
}

// toStatus chooses the code of an error.
func toStatus(err error) error {
	switch {
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

var directions = [2]semantics.Direction{semantics.Ingress, semantics.Egress}

func verdictProto(v semantics.Verdict) policyv1.Verdict { return policyv1.Verdict(v) }
