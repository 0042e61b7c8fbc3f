// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/weirmesh/weir/cli/internal/listing"
	"github.com/weirmesh/weir/cli/internal/policytext"
	"github.com/weirmesh/weir/cli/internal/yamltext"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

func (a *app) policyGetCommand() *cobra.Command {
	var kind, output string
	cmd := &cobra.Command{
		Use: "get NAMESPACE/NAME|NAME", Short: "Show a policy, and what becomes of it", Args: oneArgument("a policy"),
		Long: `Show a policy, and what becomes of it: whether it is valid, where it is in force, which nodes lag, what it contradicts.
A NAME alone is a policy of the whole cluster, or of any namespace. With -o yaml or json the object alone is shown.`,
		Example: `  weir policy get shop/backend
  weir policy get --kind NetworkPolicy shop/backend -o yaml`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := oneOf(output, "text", "yaml", "json"); err != nil {
				return err
			}
			r, err := parseReference(args[0], kind)
			if err != nil {
				return err
			}
			p, err := a.findPolicy(cmd.Context(), r)
			if err != nil {
				return err
			}
			if p == nil {
				return fmt.Errorf("there is no policy %s", r)
			}
			return a.showPolicy(output, p)
		},
	}
	cmd.Flags().StringVar(&kind, "kind", "", "Kind, where several have this name")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "Output format: text, yaml, json")
	complete(cmd, map[string][]string{"output": {"text", "yaml", "json"}, "kind": policyKinds})
	return cmd
}

func (a *app) showPolicy(output string, p *policyv1.PolicyObject) error {
	if output == "json" {
		if len(p.GetObject()) == 0 {
			return errors.New("the policy service does not have the object itself")
		}
		return listing.Indent(a.Out, p.GetObject())
	}
	text, err := yamltext.FromJSON(p.GetObject())
	if err != nil {
		return fmt.Errorf("read the object: %w", err)
	}
	if output == "text" {
		policytext.Status(a.Out, p, a.Now())
		fmt.Fprintln(a.Out)
	}
	if _, err := a.Out.Write(text); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}
