// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"strings"

	"github.com/spf13/cobra"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
)

func (a *app) serviceCommand() *cobra.Command {
	f := &nodeFlags{}
	list := &cobra.Command{
		Use: "list", Short: "List the services as the nodes have them", Args: noArgs,
		Example: "  weir service list --node node1",
		RunE: func(cmd *cobra.Command, _ []string) error {
			items, err := ask(cmd.Context(), a, f, func(ctx context.Context, c agentv1.AgentServiceClient) ([]*agentv1.ServiceEntry, error) {
				r, err := c.ListServices(ctx, &agentv1.ListServicesRequest{})
				return r.GetServices(), err
			})
			return errors.Join(show(a, f, items, err,
				[]string{"NODE", "ID", "SERVICE", "TYPE", "FRONTEND", "PROTOCOL", "BACKENDS"},
				func(s *agentv1.ServiceEntry) []string {
					return []string{number(s.GetId()), s.GetNamespace() + "/" + s.GetName(), s.GetType(), s.GetFrontend(), s.GetProtocol(), strings.Join(s.GetBackends(), ",")}
				}), err)
		},
	}
	f.register(list)
	return group("service", "See the services and their backends", list)
}
