// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/weirmesh/weir/cli/internal/listing"
	"github.com/weirmesh/weir/cli/internal/policytext"
	"github.com/weirmesh/weir/cli/internal/printer"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

func (a *app) policyListCommand() *cobra.Command {
	var namespace, kind, output string
	cmd := &cobra.Command{
		Use: "list", Short: "List the policies, and where each is in force", Args: noArgs,
		Long: `List the policies, and where each is in force. What is wrong with one (it is not valid, nodes lag behind,
it contradicts another) stands below the table.`,
		Example: `  weir policy list -n shop
  weir policy list -o json | jq -r '.[] | select(.valid | not) | .error'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := oneOf(output, "table", "wide", "json"); err != nil {
				return err
			}
			list, err := a.listPolicies(cmd.Context(), namespace, "", kind)
			if err != nil {
				return err
			}
			return a.showPolicies(output, list)
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "Only policies of this namespace")
	cmd.Flags().StringVar(&kind, "kind", "", "Only policies of this kind")
	cmd.Flags().StringVarP(&output, "output", "o", "table", "Output format: table, wide, json")
	complete(cmd, map[string][]string{"output": {"table", "wide", "json"}, "kind": policyKinds})
	return cmd
}

// policyKinds are the kinds that have policies, for completion.
var policyKinds = []string{
	"NetworkPolicy", "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy", "CiliumCIDRGroup", "ClusterNetworkPolicy", "AdminNetworkPolicy",
	"BaselineAdminNetworkPolicy", "CiliumEnvoyConfig", "CiliumClusterwideEnvoyConfig",
}

func (a *app) showPolicies(output string, list []*policyv1.PolicyObject) error {
	if output == "json" {
		items := make([]listing.Item, 0, len(list))
		for _, p := range list {
			items = append(items, listing.Item{Message: p})
		}
		return listing.JSON(a.Out, items)
	}
	if len(list) == 0 {
		fmt.Fprintln(a.Err, "there are no policies: everything passes")
		return nil
	}
	head := []string{"NAMESPACE", "NAME", "KIND", "GENERATION", "VALID", "IN FORCE", "ENDPOINTS", "AGE"}
	if output == "wide" {
		head = append(head, "LAGGING", "CONFLICTS", "UID")
	}
	var rows [][]string
	var remarks []string
	for _, p := range list {
		row := []string{
			cmp.Or(p.GetNamespace(), "-"), p.GetName(), p.GetKind(), strconv.FormatInt(p.GetGeneration(), 10), policytext.Validity(p),
			policytext.InForce(p), endpoints(p), policytext.Age(a.Now(), policytext.Created(p)),
			cmp.Or(laggardNames(p), "-"), strconv.Itoa(len(p.GetConflicts())), p.GetUid(),
		}
		rows = append(rows, row[:len(head)])
		remarks = append(remarks, policytext.Remarks(p)...)
	}
	if err := listing.Table(a.Out, head, rows); err != nil {
		return err
	}
	if len(remarks) > 0 {
		fmt.Fprintln(a.Out)
	}
	for _, r := range remarks {
		fmt.Fprintln(a.Out, printer.Safe(r))
	}
	return nil
}

// endpoints is how many endpoints a policy selects; an Envoy configuration selects none.
func endpoints(p *policyv1.PolicyObject) string {
	if policytext.Routes(p) {
		return "-"
	}
	return number(p.GetEndpoints())
}

func laggardNames(p *policyv1.PolicyObject) string {
	var names []string
	for _, l := range p.GetLagging() {
		names = append(names, l.GetNode())
	}
	return strings.Join(names, ",")
}
