// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/cli/internal/policytext"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
)

func (a *app) bpfCommand() *cobra.Command {
	return group("bpf", "Look into the kernel's maps",
		group("policy", "Policies", a.bpfPolicyCommand()),
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
		group("slots", "Listeners of the nodes' proxies", a.bpfSlotsCommand()),
	)
}

// bpfSlotsCommand lists which listener a slot stands for, and who needs it.
func (a *app) bpfSlotsCommand() *cobra.Command {
	f := &nodeFlags{}
	cmd := &cobra.Command{
		Use: "list", Short: "List the slots that policies and services lead to", Args: noArgs,
		Example: `  weir bpf slots list --node node1
  weir bpf slots list -o json | jq '.[] | select(.listening | not)'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			items, err := ask(cmd.Context(), a, f, func(ctx context.Context, c agentv1.AgentServiceClient) ([]*agentv1.SlotEntry, error) {
				r, err := c.ListSlots(ctx, &agentv1.ListSlotsRequest{})
				return r.GetSlots(), err
			})
			return errors.Join(show(a, f, items, err, []string{"NODE", "SLOT", "FILTER", "KIND", "DIRECTION", "PORT", "LISTENER", "KERNEL", "USED BY"}, slotRow), err)
		},
	}
	f.register(cmd)
	return cmd
}

func slotRow(e *agentv1.SlotEntry) []string {
	kind := strings.ToLower(strings.TrimPrefix(e.GetKind().String(), "FILTER_KIND_"))
	if e.GetVisibility() {
		kind += ", to be seen"
	}
	listener := "listens"
	if !e.GetListening() {
		listener = "none"
	}
	users := cmp.Or(strings.Join(e.GetUsers(), ", "), "-")
	if e.GetRestingSince() != nil {
		users = "nobody since " + e.GetRestingSince().AsTime().UTC().Format("2006-01-02 15:04:05")
	}
	kernel := "-"
	if e.GetKernelPort() != 0 {
		kernel = number(e.GetKernelPort())
	}
	return []string{number(e.GetNumber()), cmp.Or(e.GetKey(), "-"), kind, policytext.Direction(e.GetDirection()), number(e.GetPort()), listener, kernel, users}
}

// bpfPolicyCommand lists policies' rows, of all endpoints or of one.
func (a *app) bpfPolicyCommand() *cobra.Command {
	var endpoint string
	cmd := dumpCommand(a, "List what policies decide for which peers and ports", `  weir bpf policy list --endpoint shop/backend
  weir bpf policy list --node node1 -o json | jq '.[] | select(.verdict == "VERDICT_DENY")'`,
		func(ctx context.Context, c agentv1.AgentServiceClient) (grpc.ServerStreamingClient[agentv1.DumpPolicyResponse], error) {
			return c.DumpPolicy(ctx, &agentv1.DumpPolicyRequest{Endpoint: endpoint})
		},
		[]string{"POLICY", "DIRECTION", "ENDPOINTS", "PEER", "PROTOCOL", "PORTS", "VERDICT", "THROUGH", "RULES"}, policyRow)
	cmd.Flags().StringVar(&endpoint, "endpoint", "", `Only policies of this endpoint: a pod, its number, "host" or "health"; a pod's node is found`)
	withoutVariable(cmd, "endpoint")
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if strings.Contains(endpoint, "/") && !cmd.Flags().Changed("node") {
			pod, node, err := a.podOf(cmd.Context(), endpoint)
			if err == nil && node == "" {
				err = fmt.Errorf("there is no pod %s", endpoint)
			}
			if err == nil {
				endpoint = pod
				err = cmd.Flags().Set("node", node)
			}
			if err != nil {
				return err
			}
		}
		return run(cmd, args)
	}
	return cmd
}

func policyRow(e *agentv1.DumpPolicyResponse) []string {
	var endpoints []string
	for _, id := range e.GetEndpoints() {
		name := number(id)
		if id == policytext.HostEndpoint {
			name = "host"
		}
		endpoints = append(endpoints, name)
	}
	peer := "any other"
	if e.GetPeer() != 0 {
		peer = cmp.Or(e.GetPeerKey(), number(e.GetPeer()))
		if n, err := strconv.ParseUint(peer, 10, 32); err == nil {
			peer = identityNumber(uint32(n))
		}
	}
	return []string{
		number(e.GetPolicy()), policytext.Direction(e.GetDirection()), cmp.Or(strings.Join(endpoints, ","), "-"), peer,
		policytext.Protocol(e.GetProtocol()), policytext.Ports(e.GetProtocol(), e.GetFirst(), e.GetLast()), policytext.Verdict(e.GetVerdict()),
		cmp.Or(policytext.Through(e.GetSlot(), e.GetListenerPort(), e.GetVisibility()), "-"), cmp.Or(policytext.Rules(e.GetRules()), "-"),
	}
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
