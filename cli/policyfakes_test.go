// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

const (
	allow       = policyv1.Verdict_VERDICT_ALLOW
	defaultDeny = policyv1.Verdict_VERDICT_DEFAULT_DENY
	deny        = policyv1.Verdict_VERDICT_DENY
	ingress     = policyv1.Direction_DIRECTION_INGRESS
	egress      = policyv1.Direction_DIRECTION_EGRESS
)

// fakePolicy is a policy service with fixed answers.
type fakePolicy struct {
	policyv1.UnimplementedPolicyQueryServiceServer

	mu sync.Mutex
	// lists are the answers to ListPolicies, one after the other; the last one stays.
	lists     [][]*policyv1.PolicyObject
	listed    *policyv1.ListPoliciesRequest
	validated *policyv1.ValidatePoliciesRequest
	documents []*policyv1.Validated
	// explain and effective answer by "source destination" and by endpoint; what is not there is not found.
	explain   map[string]*policyv1.ExplainConnectionResponse
	explained *policyv1.ExplainConnectionRequest
	effective map[string]*policyv1.GetEffectivePolicyResponse
	// err fails every call.
	err error
}

func (f *fakePolicy) ListPolicies(_ context.Context, r *policyv1.ListPoliciesRequest) (*policyv1.ListPoliciesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.listed = r
	if f.err != nil || len(f.lists) == 0 {
		return &policyv1.ListPoliciesResponse{}, f.err
	}
	list := f.lists[0]
	if len(f.lists) > 1 {
		f.lists = f.lists[1:]
	}
	return &policyv1.ListPoliciesResponse{Policies: slices.DeleteFunc(slices.Clone(list), func(p *policyv1.PolicyObject) bool {
		return r.GetNamespace() != "" && r.GetNamespace() != p.GetNamespace() || r.GetName() != "" && r.GetName() != p.GetName() ||
			r.GetKind() != "" && r.GetKind() != p.GetKind()
	})}, nil
}

func (f *fakePolicy) ValidatePolicies(_ context.Context, r *policyv1.ValidatePoliciesRequest) (*policyv1.ValidatePoliciesResponse, error) {
	f.validated = r
	return &policyv1.ValidatePoliciesResponse{Documents: f.documents}, f.err
}

func (f *fakePolicy) ExplainConnection(_ context.Context, r *policyv1.ExplainConnectionRequest) (*policyv1.ExplainConnectionResponse, error) {
	f.explained = r
	for key, answer := range f.explain {
		source, destination, _ := strings.Cut(key, " ")
		if source == r.GetSource() && destination == r.GetDestination() {
			return answer, f.err
		}
	}
	for key := range f.explain {
		if source, _, _ := strings.Cut(key, " "); source == r.GetSource() {
			return nil, status.Errorf(codes.NotFound, "destination: there is no pod %s", r.GetDestination())
		}
	}
	return nil, status.Errorf(codes.NotFound, "source: there is no pod %s", r.GetSource())
}

func (f *fakePolicy) GetEffectivePolicy(_ context.Context, r *policyv1.GetEffectivePolicyRequest) (*policyv1.GetEffectivePolicyResponse, error) {
	if answer := f.effective[r.GetEndpoint()]; answer != nil {
		return answer, nil
	}
	return nil, status.Errorf(codes.NotFound, "endpoint: there is no pod %s", r.GetEndpoint())
}

// policyAgent is the agent of a node with policies.
type policyAgent struct {
	agentv1.UnimplementedAgentServiceServer
	pods []*agentv1.LocalEndpoint
	// entries are the kernel's, by "endpoint direction peer"; an address as peer is another entry.
	entries map[string]*agentv1.LookupPolicyResponse
	rows    []*agentv1.DumpPolicyResponse

	mu      sync.Mutex
	dumped  []string
	paused  []*agentv1.PausePolicyRequest
	resumed []string
}

func (f *policyAgent) ListEndpoints(context.Context, *agentv1.ListEndpointsRequest) (*agentv1.ListEndpointsResponse, error) {
	return &agentv1.ListEndpointsResponse{Endpoints: f.pods}, nil
}

func (f *policyAgent) LookupPolicy(_ context.Context, r *agentv1.LookupPolicyRequest) (*agentv1.LookupPolicyResponse, error) {
	direction := "egress"
	if r.GetDirection() == ingress {
		direction = "ingress"
	}
	if e := f.entries[r.GetEndpoint()+" "+direction+" "+r.GetPeer()]; e != nil {
		return e, nil
	}
	return nil, status.Errorf(codes.NotFound, "peer %q: not known", r.GetPeer())
}

func (f *policyAgent) DumpPolicy(r *agentv1.DumpPolicyRequest, s grpc.ServerStreamingServer[agentv1.DumpPolicyResponse]) error {
	f.mu.Lock()
	f.dumped = append(f.dumped, r.GetEndpoint())
	f.mu.Unlock()
	for _, row := range f.rows {
		if err := s.Send(row); err != nil {
			return err
		}
	}
	return nil
}

func (f *policyAgent) PausePolicy(_ context.Context, r *agentv1.PausePolicyRequest) (*agentv1.PausePolicyResponse, error) {
	f.paused = append(f.paused, r)
	return &agentv1.PausePolicyResponse{Until: timestamppb.New(now.Add(time.Duration(r.GetSeconds()) * time.Second))}, nil
}

func (f *policyAgent) ResumePolicy(_ context.Context, r *agentv1.ResumePolicyRequest) (*agentv1.ResumePolicyResponse, error) {
	f.resumed = append(f.resumed, r.GetPod())
	return &agentv1.ResumePolicyResponse{Resumed: len(f.resumed) == 1}, nil
}

// policyLab is the supervisor of a lab: it has an object, and stops agents.
type policyLab struct {
	labv1.UnimplementedLabServiceServer
	object  string
	stopped []string
}

func (l *policyLab) ListObjects(context.Context, *labv1.ListObjectsRequest) (*labv1.ListObjectsResponse, error) {
	if l.object == "" {
		return nil, status.Error(codes.InvalidArgument, "no such kind")
	}
	return &labv1.ListObjectsResponse{Objects: [][]byte{[]byte(l.object)}}, nil
}

func (l *policyLab) ControlPart(_ context.Context, r *labv1.ControlPartRequest) (*labv1.ControlPartResponse, error) {
	if r.GetAction() != labv1.ControlPartRequest_ACTION_STOP {
		return nil, status.Error(codes.InvalidArgument, "not to be stopped")
	}
	l.stopped = append(l.stopped, r.GetPart())
	return &labv1.ControlPartResponse{}, nil
}

// mesh is a lab of two nodes with policies: web on n1, api (of a Deployment) on n2.
type mesh struct {
	*command
	policy *fakePolicy
	n1, n2 *policyAgent
	lab    *policyLab
	stop   map[string]func()
}

func pod(namespace, name, address string, id uint32) *agentv1.LocalEndpoint {
	return &agentv1.LocalEndpoint{Id: id, Namespace: namespace, PodName: name, Addresses: []string{address, "fd00::" + address[len(address)-1:]}}
}

func newMesh(t *testing.T) *mesh {
	t.Helper()
	m := &mesh{
		policy: &fakePolicy{}, lab: &policyLab{},
		n1:   &policyAgent{pods: []*agentv1.LocalEndpoint{{Id: 3}, pod("default", "web", "10.0.1.5", 7)}},
		n2:   &policyAgent{pods: []*agentv1.LocalEndpoint{pod("default", "api-6974d65d7d-s6mpb", "10.0.2.6", 9)}},
		stop: map[string]func(){},
	}
	dir := shortDir(t)
	m.command = &command{env: map[string]string{"WEIR_RUN_DIR": dir, "WEIR_REQUEST_TIMEOUT": "10s"}}
	serveOn := func(name string, register func(*grpc.Server)) {
		m.stop[name] = serveSocket(t, filepath.Join(dir, "l", name+".sock"), register)
	}
	serveOn("lab", func(s *grpc.Server) { labv1.RegisterLabServiceServer(s, m.lab) })
	serveOn("policy", func(s *grpc.Server) { policyv1.RegisterPolicyQueryServiceServer(s, m.policy) })
	serveOn("nodes/n1/agent", func(s *grpc.Server) { agentv1.RegisterAgentServiceServer(s, m.n1) })
	serveOn("nodes/n2/agent", func(s *grpc.Server) { agentv1.RegisterAgentServiceServer(s, m.n2) })
	return m
}

// object is a policy that is in force on both nodes.
func object(change ...func(*policyv1.PolicyObject)) *policyv1.PolicyObject {
	p := &policyv1.PolicyObject{
		Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "api", Uid: "u1", Generation: 12, Valid: true, EnforcedGeneration: 12,
		EnforcingNodes: 2, Nodes: 2, Endpoints: 1,
		Object: []byte(`{"apiVersion":"cilium.io/v2","kind":"CiliumNetworkPolicy","metadata":{"name":"api","creationTimestamp":"2024-05-06T06:40:00Z"},"spec":{"ingress":[{}]}}`),
	}
	for _, c := range change {
		c(p)
	}
	return p
}

func named(kind, namespace, name string) func(*policyv1.PolicyObject) {
	return func(p *policyv1.PolicyObject) { p.Kind, p.Namespace, p.Name = kind, namespace, name }
}

func invalid(p *policyv1.PolicyObject) {
	p.Valid, p.Generation = false, 13
	p.Error = "CiliumNetworkPolicy default/api: spec.ingress[0].fromEntities[0]: unsupported entity: nobody"
}

func lagging(p *policyv1.PolicyObject) {
	p.EnforcingNodes = 1
	p.Lagging = []*policyv1.NodeLag{{Node: "n2", Reason: "holds revision 4"}}
}

func rule(list string, index uint32) *policyv1.PolicyRule {
	return &policyv1.PolicyRule{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "api", List: list, Index: index}
}

func clone[M proto.Message](m M, change func(M)) M {
	c := proto.CloneOf(m)
	change(c)
	return c
}
