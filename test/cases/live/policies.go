// SPDX-License-Identifier: Apache-2.0

package live

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/status"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/test/cases/format"
)

// Object is a policy object as it was applied, and what became of it.
type Object struct {
	Ref format.Ref
	// Document is what was applied.
	Document []byte
	// Refused is why the API server's stand-in did not take it at all.
	Refused string
	// Status is what the policy service says of it; nil while it says nothing.
	Status *policyv1.PolicyObject
}

// Valid reports whether the object was accepted.
func (o *Object) Valid() bool { return o.Refused == "" && o.Status.GetValid() }

// Message is why it was not.
func (o *Object) Message() string {
	if o.Refused != "" {
		return o.Refused
	}
	return o.Status.GetError()
}

// Conflicts are what computing endpoints' policies reported about it.
func (o *Object) Conflicts() []string { return o.Status.GetConflicts() }

// ApplyPolicies applies objects, each by itself if not all are taken together, and returns them with what was refused at once.
func (l *Lab) ApplyPolicies(ctx context.Context, objects []*Object) error {
	documents := make([][]byte, len(objects))
	for i, o := range objects {
		documents[i] = o.Document
	}
	if len(objects) == 0 {
		return nil
	}
	if err := l.Apply(ctx, documents...); err == nil {
		return nil
	}
	for _, o := range objects {
		if err := l.Apply(ctx, o.Document); err != nil {
			if ctx.Err() != nil {
				return fmt.Errorf("apply policies: %w", err)
			}
			o.Refused = status.Convert(err).Message()
		}
	}
	return nil
}

// List returns all policy objects.
func (l *Lab) List(ctx context.Context) ([]*policyv1.PolicyObject, error) {
	r, err := l.queries.ListPolicies(ctx, &policyv1.ListPoliciesRequest{})
	if err != nil {
		return nil, fmt.Errorf("list policies: %w", err)
	}
	return r.Policies, nil
}

// pollEvery is how often the policy service is asked: it has no watch.
const pollEvery = 10 * time.Millisecond

// generationOf tells an object's generation; 0 = the lab does not know it.
func (l *Lab) generationOf(ctx context.Context) (map[format.Ref]int64, error) {
	state, err := l.State(ctx)
	if err != nil {
		return nil, err
	}
	generations := map[format.Ref]int64{}
	for _, p := range state.Policies {
		generations[format.Ref{Kind: p.Kind, Namespace: p.Namespace, Name: p.Name}] = p.Generation
	}
	return generations, nil
}

// AwaitPolicies waits until each object that was taken is in force on all nodes, or refused, and fills in what is said of it.
func (l *Lab) AwaitPolicies(ctx context.Context, objects []*Object) error {
	generations, err := l.generationOf(ctx)
	if err != nil {
		return err
	}
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		listed, err := l.List(ctx)
		if err != nil {
			return err
		}
		var waiting []string
		for _, o := range objects {
			if o.Refused != "" {
				continue
			}
			i := slices.IndexFunc(listed, func(p *policyv1.PolicyObject) bool { return same(o.Ref, p) })
			switch {
			case i < 0:
				waiting = append(waiting, fmt.Sprintf("%s %s is not listed", o.Ref.Kind, o.Ref))
				continue
			case listed[i].Generation < generations[ref(o.Ref)]:
				waiting = append(waiting, fmt.Sprintf("%s %s: generation %d is not read yet", o.Ref.Kind, o.Ref, generations[ref(o.Ref)]))
				continue
			}
			o.Status = listed[i]
			if why := pending(o.Status); why != "" {
				waiting = append(waiting, fmt.Sprintf("%s %s: %s", o.Ref.Kind, o.Ref, why))
			}
		}
		if len(waiting) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("policies are not in force: %s: %w", strings.Join(waiting, "; "), ctx.Err())
		case <-tick.C:
		}
	}
}

// AwaitListed waits until so many objects are left, and every agent holds that state.
func (l *Lab) AwaitListed(ctx context.Context, count int) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		listed, err := l.List(ctx)
		if err != nil {
			return err
		}
		late, err := l.late(ctx)
		if err != nil {
			return err
		}
		if len(listed) == count && late == "" {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d policies are listed, not %d, or an agent is behind (%s): %w", len(listed), count, late, ctx.Err())
		case <-tick.C:
		}
	}
}

// late names an agent that does not hold the policy service's last revision; "" = none.
func (l *Lab) late(ctx context.Context) (string, error) {
	r, err := statusv1.NewStatusServiceClient(l.policy).GetStatus(ctx, &statusv1.GetStatusRequest{})
	if err != nil {
		return "", fmt.Errorf("status of the policy service: %w", err)
	}
	for _, d := range r.Details {
		if strings.HasPrefix(d.Name, "agent ") && !strings.Contains(d.Value, "behind 0,") {
			return d.Name + ": " + d.Value, nil
		}
	}
	return "", nil
}

// pending says why an object is not in force, nor refused; "" = it is one of them.
func pending(p *policyv1.PolicyObject) string {
	switch {
	case !p.Valid:
		return ""
	case p.EnforcedGeneration != p.Generation:
		return fmt.Sprintf("generation %d of %d", p.EnforcedGeneration, p.Generation)
	case len(p.Lagging) > 0:
		return fmt.Sprintf("node %s lags: %s", p.Lagging[0].Node, p.Lagging[0].Reason)
	case p.EnforcingNodes != p.Nodes:
		return fmt.Sprintf("%d of %d nodes", p.EnforcingNodes, p.Nodes)
	}
	return ""
}

// ref is a ref as the API server has it: an object without a namespace is in "default".
func ref(r format.Ref) format.Ref {
	if r.Namespace == "" && (r.Kind == "NetworkPolicy" || r.Kind == "CiliumNetworkPolicy") {
		r.Namespace = "default"
	}
	return r
}

func same(r format.Ref, p *policyv1.PolicyObject) bool {
	r = ref(r)
	return r.Kind == p.Kind && r.Namespace == p.Namespace && r.Name == p.Name
}
