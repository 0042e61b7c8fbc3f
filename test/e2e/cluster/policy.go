// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// Policies are the policy objects as the policy service has them.
func (l *Lab) Policies(ctx context.Context) ([]*policyv1.PolicyObject, error) {
	conn, err := grpc.NewClient("unix:///run/weir/"+l.Name+"/policy.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r, err := policyv1.NewPolicyQueryServiceClient(conn).ListPolicies(ctx, &policyv1.ListPoliciesRequest{})
	if err != nil {
		return nil, err
	}
	return r.Policies, nil
}

// InForce waits until exactly the named policies ("namespace/name", or "name") exist, and their last generations are in force on every node.
func (l *Lab) InForce(ctx context.Context, names ...string) {
	l.t.Helper()
	Eventually(l.t, func() error {
		have, err := l.Policies(ctx)
		if err != nil {
			return err
		}
		missing := map[string]bool{}
		for _, n := range names {
			missing[n] = true
		}
		for _, p := range have {
			name := strings.TrimPrefix(p.Namespace+"/"+p.Name, "/")
			if !missing[name] && strings.HasSuffix(p.Kind, "EnvoyConfig") {
				continue // it routes, and forbids nothing
			}
			if !missing[name] {
				return fmt.Errorf("policy %s is there and should not be", name)
			}
			delete(missing, name)
			switch {
			case !p.Valid:
				return fmt.Errorf("policy %s is not valid: %s", name, p.Error)
			case p.EnforcedGeneration != p.Generation || p.EnforcingNodes != p.Nodes || p.Nodes == 0:
				return fmt.Errorf("policy %s: generation %d in force on %d of %d nodes, last is %d: %v", name, p.EnforcedGeneration, p.EnforcingNodes, p.Nodes, p.Generation, p.Lagging)
			}
		}
		if len(missing) > 0 {
			return fmt.Errorf("policies are not there: %v", missing)
		}
		return nil
	})
}
