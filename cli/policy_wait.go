// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/weirmesh/weir/cli/internal/policytext"
	"github.com/weirmesh/weir/cli/internal/printer"
	"github.com/weirmesh/weir/cli/internal/rundir"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// policyInterval is how often `policy wait` looks.
const policyInterval = 100 * time.Millisecond

type policyWaitFlags struct {
	kind       string
	limit      time.Duration
	generation int64
}

func (a *app) policyWaitCommand() *cobra.Command {
	f := &policyWaitFlags{}
	cmd := &cobra.Command{
		Use: "wait NAMESPACE/NAME|NAME", Short: "Wait until a policy is in force on every node", Args: oneArgument("a policy"),
		Long: `Wait until the last generation of a policy is in force on every node. When the time is up, the nodes that lag are named and
the exit code is 1; a policy that is not valid is not waited for. In the lab the last generation is the one that the lab has;
in a cluster it is the newest that the policy service has seen, or --generation if that is newer.`,
		Example: `  weir lab apply -f policy.yaml && weir policy wait shop/backend
  weir policy wait shop/backend --generation "$(kubectl get cnp -n shop backend -o jsonpath='{.metadata.generation}')"`,
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := parseReference(args[0], f.kind)
			if err != nil {
				return err
			}
			return a.waitPolicy(cmd.Context(), r, f)
		},
	}
	cmd.Flags().DurationVar(&f.limit, "timeout", 30*time.Second, "How long to wait")
	withoutVariable(cmd, "timeout") // WEIR_TIMEOUT is the time to connect
	cmd.Flags().Int64Var(&f.generation, "generation", 0, "Generation that must be in force at least")
	cmd.Flags().StringVar(&f.kind, "kind", "", "Kind, where several have this name")
	complete(cmd, map[string][]string{"kind": policyKinds})
	return cmd
}

// waitPolicy asks until the policy is in force everywhere, cannot be any more, or the time is up.
func (a *app) waitPolicy(ctx context.Context, r reference, f *policyWaitFlags) error {
	deadline := time.NewTimer(f.limit)
	defer deadline.Stop()
	tick := time.NewTicker(policyInterval)
	defer tick.Stop()
	begun := a.Now()
	for {
		p, err := a.findPolicy(ctx, r)
		generation := f.generation
		if p != nil {
			generation = max(generation, a.labGeneration(ctx, p))
		}
		switch {
		case p == nil:
		case policytext.Everywhere(p, generation):
			fmt.Fprintf(a.Out, "%s: %s, after %s\n", printer.Safe(policytext.Object(p.GetKind(), p.GetNamespace(), p.GetName())), policytext.InForce(p),
				a.Now().Sub(begun).Round(10*time.Millisecond))
			return nil
		case !p.GetValid() && p.GetGeneration() >= generation:
			return fmt.Errorf("%s: %s", policytext.Object(p.GetKind(), p.GetNamespace(), p.GetName()), policytext.Fault(p))
		}
		select {
		case <-ctx.Done():
			return errors.New("interrupted while waiting")
		case <-deadline.C:
			return waitedTooLong(r, p, generation, f.limit, err)
		case <-tick.C:
		}
	}
}

func waitedTooLong(r reference, p *policyv1.PolicyObject, generation int64, limit time.Duration, err error) error {
	switch {
	case err != nil:
		return fmt.Errorf("after %s: %w", limit, err)
	case p == nil:
		return fmt.Errorf("after %s there is no policy %s", limit, r)
	}
	text := fmt.Sprintf("%s: after %s: %s", policytext.Object(p.GetKind(), p.GetNamespace(), p.GetName()), limit, policytext.InForce(p))
	if p.GetGeneration() < generation {
		return fmt.Errorf("%s; the policy service has not seen generation %d yet, only %d", text, generation, p.GetGeneration())
	}
	if l := policytext.Laggards(p); l != "" {
		text += "; lagging: " + l
	}
	return errors.New(text)
}

// labGeneration is the generation that the lab has of an object; 0 = this is no lab, or it does not say.
func (a *app) labGeneration(ctx context.Context, p *policyv1.PolicyObject) int64 {
	place, err := rundir.Find(a.runDir, a.lab)
	if err != nil || place.Lab == "" {
		return 0
	}
	conn, err := place.Central("lab").Dial()
	if err != nil {
		return 0
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, a.server.RequestTimeout)
	defer cancel()
	list, err := labv1.NewLabServiceClient(conn).ListObjects(ctx, &labv1.ListObjectsRequest{Kind: p.GetKind(), Namespace: p.GetNamespace(), Name: p.GetName()})
	if err != nil || len(list.GetObjects()) != 1 {
		a.log().Debug("the lab does not name the generation", "error", err)
		return 0
	}
	var o struct {
		Metadata struct {
			Generation int64 `json:"generation"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(list.GetObjects()[0], &o); err != nil {
		return 0
	}
	return o.Metadata.Generation
}
