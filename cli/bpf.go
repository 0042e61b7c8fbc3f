// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
)

func (a *app) bpfCommand() *cobra.Command {
	return group("bpf", "Look into the kernel's maps",
		group("ct", "Connection tracking", dumpCommand(a, "List the tracked connections", `  weir bpf ct list --node node1
  weir bpf ct list -o json | jq '.[] | select(.forward_bytes > 1e6) | {source, destination, forward_bytes}'`,
			func(ctx context.Context, c agentv1.AgentServiceClient) (grpc.ServerStreamingClient[agentv1.DumpConntrackResponse], error) {
				return c.DumpConntrack(ctx, &agentv1.DumpConntrackRequest{})
			},
			[]string{"PROTOCOL", "SOURCE", "DESTINATION", "ENDPOINT", "DIRECTION", "PEER", "STATE", "EXPIRES", "FORWARD", "REVERSE", "RTT"}, conntrackRow)),
		group("ipcache", "Addresses and identities", dumpCommand(a, "List which identity an address has", "  weir bpf ipcache list",
			func(ctx context.Context, c agentv1.AgentServiceClient) (grpc.ServerStreamingClient[agentv1.DumpIPCacheResponse], error) {
				return c.DumpIPCache(ctx, &agentv1.DumpIPCacheRequest{})
			},
			[]string{"PREFIX", "IDENTITY", "NODE ADDRESS"}, func(e *agentv1.DumpIPCacheResponse) []string {
				return []string{e.GetPrefix(), identityNumber(e.GetIdentity()), cmp.Or(e.GetNodeAddress(), "-")}
			})),
		group("services", "Service translation", dumpCommand(a, "List frontends and backends", "  weir bpf services list",
			func(ctx context.Context, c agentv1.AgentServiceClient) (grpc.ServerStreamingClient[agentv1.DumpServicesResponse], error) {
				return c.DumpServices(ctx, &agentv1.DumpServicesRequest{})
			},
			[]string{"ID", "FRONTEND", "PROTOCOL", "SLOT", "BACKEND"}, func(e *agentv1.DumpServicesResponse) []string {
				return []string{number(e.GetId()), e.GetFrontend(), e.GetProtocol(), number(e.GetSlot()), cmp.Or(e.GetBackend(), "-")}
			})),
	)
}

func conntrackRow(e *agentv1.DumpConntrackResponse) []string {
	rtt := "-"
	switch {
	case e.SrttUs != nil:
		rtt = fmt.Sprintf("%dus", e.GetSrttUs())
	case e.HandshakeRttUs != nil:
		rtt = fmt.Sprintf("%dus", e.GetHandshakeRttUs())
	}
	return []string{
		e.GetProtocol(), e.GetSource(), e.GetDestination(), number(e.GetEndpointId()), e.GetDirection(), identityNumber(e.GetPeerIdentity()),
		e.GetState(), fmt.Sprintf("%.0fs", e.GetExpiresIn()),
		fmt.Sprintf("%d/%dB", e.GetForwardPackets(), e.GetForwardBytes()), fmt.Sprintf("%d/%dB", e.GetReversePackets(), e.GetReverseBytes()), rtt,
	}
}

// dumpCommand lists one kernel map of the chosen nodes.
func dumpCommand[T any, M interface {
	*T
	proto.Message
}](a *app, short, example string, call func(context.Context, agentv1.AgentServiceClient) (grpc.ServerStreamingClient[T], error), head []string, row func(M) []string) *cobra.Command {
	f := &nodeFlags{}
	cmd := &cobra.Command{
		Use: "list", Short: short, Example: example, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			items, err := ask(cmd.Context(), a, f, func(ctx context.Context, c agentv1.AgentServiceClient) ([]M, error) {
				stream, err := call(ctx, c)
				if err != nil {
					return nil, err
				}
				return collect[T, M](stream)
			})
			return errors.Join(show(a, f, items, err, append([]string{"NODE"}, head...), row), err)
		},
	}
	f.register(cmd)
	return cmd
}

// collect reads a stream to its end.
func collect[T any, M interface {
	*T
	proto.Message
}](stream grpc.ServerStreamingClient[T]) ([]M, error) {
	var out []M
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		out = append(out, M(r))
	}
}
