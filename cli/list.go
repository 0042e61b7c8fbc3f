// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/cli/internal/listing"
	"github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/gen/relay"
)

const notAvailable = "N/A"

func (a *app) listCommand() *cobra.Command {
	nodes := a.listOne("nodes", "List the nodes that flows come from", "  weir list nodes -o wide", a.listNodes)
	nodes.Aliases = []string{"node"}
	return group("list", "List what the observer knows", nodes,
		a.listOne("namespaces", "List the namespaces seen in flows lately", "  weir list namespaces -o json", a.listNamespaces))
}

func (a *app) listOne(use, short, example string, run func(ctx context.Context, conn *grpc.ClientConn, output string) error) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: use, Short: short, Example: example, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains([]string{"json", "table", "wide"}, output) {
				return fmt.Errorf("unknown output format: %s", output)
			}
			conn, err := a.dialObserver(cmd.Context())
			if err != nil {
				return err
			}
			defer conn.Close()
			ctx, cancel := context.WithTimeout(cmd.Context(), a.server.RequestTimeout)
			defer cancel()
			return run(ctx, conn, output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "Output format: table, wide, json")
	complete(cmd, map[string][]string{"output": {"table", "wide", "json"}})
	return cmd
}

func (a *app) listNodes(ctx context.Context, conn *grpc.ClientConn, output string) error {
	r, err := observer.NewObserverClient(conn).GetNodes(ctx, &observer.GetNodesRequest{})
	if err != nil {
		return a.server.Explain("GetNodes", err)
	}
	nodes := slices.SortedFunc(slices.Values(r.GetNodes()), func(x, y *observer.Node) int { return cmp.Compare(x.GetName(), y.GetName()) })
	if output == "json" {
		return a.protoArray(len(nodes), func(i int) proto.Message { return nodes[i] })
	}
	head := []string{"NAME", "STATUS", "AGE", "FLOWS/S", "CURRENT/MAX-FLOWS"}
	if output == "wide" {
		head = append(head, "VERSION", "ADDRESS", "TLS")
	}
	var rows [][]string
	for _, n := range nodes {
		row := nodeRow(n)
		rows = append(rows, row[:len(head)])
	}
	return listing.Table(a.Out, head, rows)
}

// nodeRow is a node in the wide table.
func nodeRow(n *observer.Node) []string {
	age, rate, ratio := notAvailable, notAvailable, notAvailable
	if uptime := time.Duration(n.GetUptimeNs()).Round(time.Second); uptime > 0 {
		age = uptime.String()
		rate = fmt.Sprintf("%.2f", float64(n.GetSeenFlows())/uptime.Seconds())
	}
	if most := n.GetMaxFlows(); most > 0 {
		ratio = fmt.Sprintf("%d/%d (%6.2f%%)", n.GetNumFlows(), most, 100*float64(n.GetNumFlows())/float64(most))
	}
	secure := notAvailable
	if n.GetTls() != nil {
		secure = "Disabled"
		if n.GetTls().GetEnabled() {
			secure = "Enabled"
		}
	}
	return []string{n.GetName(), nodeState(n.GetState()), age, rate, ratio, cmp.Or(n.GetVersion(), notAvailable), n.GetAddress(), secure}
}

func nodeState(s relay.NodeState) string {
	switch s {
	case relay.NodeState_NODE_CONNECTED:
		return "Connected"
	case relay.NodeState_NODE_UNAVAILABLE:
		return "Unavailable"
	case relay.NodeState_NODE_GONE:
		return "Gone"
	case relay.NodeState_NODE_ERROR:
		return "Error"
	}
	return "Unknown"
}

func (a *app) listNamespaces(ctx context.Context, conn *grpc.ClientConn, output string) error {
	r, err := observer.NewObserverClient(conn).GetNamespaces(ctx, &observer.GetNamespacesRequest{})
	if err != nil {
		return a.server.Explain("GetNamespaces", err)
	}
	list := r.GetNamespaces()
	if output == "json" {
		return a.protoArray(len(list), func(i int) proto.Message { return list[i] })
	}
	head := []string{"NAMESPACE"}
	if output == "wide" {
		head = append(head, "CLUSTER")
	}
	var rows [][]string
	for _, n := range list {
		row := []string{n.GetNamespace()}
		if output == "wide" && n.GetCluster() != "" {
			row = append(row, n.GetCluster())
		}
		rows = append(rows, row)
	}
	return listing.Table(a.Out, head, rows)
}

// protoArray writes messages as an array by proto's JSON mapping, as Hubble's command does.
func (a *app) protoArray(n int, message func(int) proto.Message) error {
	if n == 0 {
		return listing.Indent(a.Out, []byte("[]"))
	}
	var items []string
	for i := range n {
		text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(message(i))
		if err != nil {
			return fmt.Errorf("encode list: %w", err)
		}
		items = append(items, string(bytes.TrimSpace(text)))
	}
	return listing.Indent(a.Out, []byte("["+strings.Join(items, ",")+"]"))
}
