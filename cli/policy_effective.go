// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/weirmesh/weir/cli/internal/listing"
	"github.com/weirmesh/weir/cli/internal/policytext"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

func (a *app) policyEffectiveCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "effective POD|node:NAME", Short: "Show who may reach a pod, and what it may reach", Args: oneArgument("a pod or node:NAME"),
		Long: `Show who may reach a pod, and what it may reach, of all policies together. NOW names the pods that a row is about at present.
POD is NAMESPACE/NAME, or NAME in the namespace default; the name of a Deployment with one pod does as well.`,
		Example: `  weir policy effective shop/backend
  weir policy effective node:node1
  weir policy effective shop/backend -o json | jq '.[].rows[] | select(.verdict == "VERDICT_ALLOW") | .peers'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := oneOf(output, "text", "json"); err != nil {
				return err
			}
			return a.effectivePolicy(cmd.Context(), end(args[0]), output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "Output format: text, json")
	complete(cmd, map[string][]string{"output": {"text", "json"}})
	return cmd
}

func (a *app) effectivePolicy(ctx context.Context, endpoint, output string) error {
	get := func() (*policyv1.GetEffectivePolicyResponse, error) {
		return askPolicy(ctx, a, func(ctx context.Context, c policyv1.PolicyQueryServiceClient) (*policyv1.GetEffectivePolicyResponse, error) {
			return c.GetEffectivePolicy(ctx, &policyv1.GetEffectivePolicyRequest{Endpoint: endpoint})
		})
	}
	r, err := get()
	if isNotFound(err) {
		pod, resolveErr := a.resolveEnd(ctx, endpoint)
		if resolveErr != nil || pod == endpoint {
			return err
		}
		endpoint = pod
		r, err = get()
	}
	if err != nil {
		return err
	}
	if output == "json" {
		items := make([]listing.Item, 0, len(r.GetDirections()))
		for _, d := range r.GetDirections() {
			items = append(items, listing.Item{Message: d})
		}
		return listing.JSON(a.Out, items)
	}
	return policytext.Effective(a.Out, endpoint, r)
}
