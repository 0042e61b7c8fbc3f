// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/weirmesh/weir/cli/internal/eventname"
	"github.com/weirmesh/weir/cli/internal/listing"
	"github.com/weirmesh/weir/cli/internal/rundir"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	identityv1 "github.com/weirmesh/weir/gen/weir/identity/v1"
)

func (a *app) identityCommand() *cobra.Command {
	f := &nodeFlags{}
	list := &cobra.Command{
		Use: "list", Short: "List identities and their labels", Args: noArgs,
		Long: `List identities and their labels, as the identity broker has them; with --node, or where no broker
runs on this machine, as the nodes know them.`,
		Example: `  weir identity list
  weir identity list --node node1 -o json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ids, err := a.identities(cmd.Context(), f)
			if len(ids) == 0 && err != nil {
				return err
			}
			return errors.Join(a.showIdentities(f, ids), err)
		},
	}
	f.register(list)

	g := &nodeFlags{}
	get := &cobra.Command{
		Use: "get NUMBER|NAME", Short: "Show the labels of an identity",
		Example: `  weir identity get 12345
  weir identity get world`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("%s takes one identity, a number or a reserved name, got %d", cmd.CommandPath(), len(args))
			}
			return nil
		},
		ValidArgs: eventname.Identities(),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := eventname.ParseIdentity(args[0])
			if err != nil {
				return err
			}
			ids, err := a.identities(cmd.Context(), g)
			i := slices.IndexFunc(ids, func(id *identityv1.Identity) bool { return id.GetNumber() == n })
			if i < 0 {
				return cmp.Or(err, fmt.Errorf("no identity %s", args[0]))
			}
			return a.showIdentities(g, ids[i:i+1])
		},
	}
	g.register(get)
	return group("identity", "See the numbers that label sets have", list, get)
}

// identities returns the identities by number: from the broker when it is on this machine and no node is named, else from the agents.
func (a *app) identities(ctx context.Context, f *nodeFlags) ([]*identityv1.Identity, error) {
	if err := f.check(); err != nil {
		return nil, err
	}
	if len(f.nodes) == 0 {
		place, err := rundir.Find(a.runDir, a.lab)
		if err != nil {
			return nil, err
		}
		if ids, err := a.askBroker(ctx, place.Central("identity")); err == nil {
			return ids, nil
		} else {
			a.log().Debug("the identity broker does not answer, asking the agents", "error", err)
		}
	}
	entries, err := ask(ctx, a, f, func(ctx context.Context, c agentv1.AgentServiceClient) ([]*agentv1.IdentityEntry, error) {
		r, err := c.ListIdentities(ctx, &agentv1.ListIdentitiesRequest{})
		return r.GetIdentities(), err
	})
	seen := map[uint32]*identityv1.Identity{}
	for _, e := range entries {
		seen[e.value.GetNumber()] = &identityv1.Identity{Number: e.value.GetNumber(), Labels: e.value.GetLabels()}
	}
	ids := make([]*identityv1.Identity, 0, len(seen))
	for _, id := range seen {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(x, y *identityv1.Identity) int { return cmp.Compare(x.GetNumber(), y.GetNumber()) })
	return ids, err
}

func (a *app) askBroker(ctx context.Context, s rundir.Socket) ([]*identityv1.Identity, error) {
	conn, err := s.Dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, a.server.RequestTimeout)
	defer cancel()
	r, err := identityv1.NewIdentityServiceClient(conn).List(ctx, &identityv1.ListRequest{})
	if err != nil {
		return nil, explainSocket(s, err)
	}
	return r.GetIdentities(), nil
}

func (a *app) showIdentities(f *nodeFlags, ids []*identityv1.Identity) error {
	if f.output == "json" {
		items := make([]listing.Item, 0, len(ids))
		for _, id := range ids {
			items = append(items, listing.Item{Message: id})
		}
		return listing.JSON(a.Out, items)
	}
	rows := make([][]string, 0, len(ids))
	for _, id := range ids {
		rows = append(rows, []string{number(id.GetNumber()), strings.Join(id.GetLabels(), ",")})
	}
	return listing.Table(a.Out, []string{"IDENTITY", "LABELS"}, rows)
}
