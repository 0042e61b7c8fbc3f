// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/weirmesh/weir/cli/internal/eventname"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
)

func (a *app) endpointCommand() *cobra.Command {
	f := &nodeFlags{}
	list := &cobra.Command{
		Use: "list", Short: "List the endpoints of the nodes", Args: noArgs,
		Example: `  weir endpoint list
  weir endpoint list --node node1 -o json | jq '.[] | select(.state != "ready")'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			items, err := ask(cmd.Context(), a, f, func(ctx context.Context, c agentv1.AgentServiceClient) ([]*agentv1.LocalEndpoint, error) {
				r, err := c.ListEndpoints(ctx, &agentv1.ListEndpointsRequest{})
				return r.GetEndpoints(), err
			})
			return errors.Join(show(a, f, items, err,
				[]string{"NODE", "ENDPOINT", "POD", "IDENTITY", "ADDRESSES", "STATE", "POLICY", "INTERFACE", "LABELS"},
				func(e *agentv1.LocalEndpoint) []string {
					return []string{
						number(e.GetId()), podName(e), identityNumber(e.GetIdentity()), strings.Join(e.GetAddresses(), ","),
						e.GetState(), policyState(e, a.Now()), e.GetInterface(), strings.Join(e.GetLabels(), ","),
					}
				}), err)
		},
	}
	f.register(list)
	return group("endpoint", "See the pods of the mesh as their nodes have them", list)
}

// policyState says in which directions policy is in force, and whether what it would drop passes.
func policyState(e *agentv1.LocalEndpoint, now time.Time) string {
	var words []string
	if e.GetIngressEnforced() {
		words = append(words, "ingress")
	}
	if e.GetEgressEnforced() {
		words = append(words, "egress")
	}
	text := cmp.Or(strings.Join(words, ","), "-")
	switch until := e.GetPausedUntil(); {
	case until != nil:
		text += fmt.Sprintf(" (paused for %s)", until.AsTime().Sub(now).Round(time.Second))
	case e.GetAudit():
		text += " (audit)"
	}
	return text
}

func podName(e *agentv1.LocalEndpoint) string {
	if e.GetPodName() == "" {
		return "-"
	}
	return e.GetNamespace() + "/" + e.GetPodName()
}

// identityNumber shows a number with its name when it is reserved.
func identityNumber(n uint32) string {
	if name := eventname.Identity(n); !strings.HasPrefix(name, "ID:") {
		return number(n) + " (" + name + ")"
	}
	return number(n)
}

func number[T uint32 | uint64](n T) string { return strconv.FormatUint(uint64(n), 10) }
