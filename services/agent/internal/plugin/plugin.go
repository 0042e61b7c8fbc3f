// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
)

// addTimeout leaves the agent its 30 s to wait for the pod's policy, and some time to do the work.
const addTimeout = 40 * time.Second

// otherTimeout is for what only touches this node.
const otherTimeout = 20 * time.Second

// Funcs are the plugin's commands, for skel.PluginMainFuncs.
func Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{Add: add, Del: del, Check: check, Status: ready, GC: collect}
}

// call opens the agent's socket for one call.
func call(socket string, timeout time.Duration, f func(context.Context, agentv1.CNIServiceClient) error) error {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("field socket %q cannot be used", socket), err.Error())
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return cniError(f(ctx, agentv1.NewCNIServiceClient(conn)))
}

// cniError turns what the agent said into CNI's codes: 11 makes the runtime try again, 50 keeps it from scheduling pods here.
func cniError(err error) error {
	if err == nil {
		return nil
	}
	var already *types.Error
	if errors.As(err, &already) {
		return err
	}
	s := status.Convert(err)
	code := types.ErrInternal
	switch s.Code() {
	case codes.InvalidArgument:
		code = types.ErrInvalidNetworkConfig
	case codes.NotFound:
		code = types.ErrUnknownContainer
	case codes.DeadlineExceeded, codes.ResourceExhausted, codes.Aborted, codes.Canceled:
		code = types.ErrTryAgainLater
	case codes.Unavailable:
		return types.NewError(types.ErrTryAgainLater, "the node's agent is not available", s.Message())
	}
	return types.NewError(code, s.Message(), "")
}

func add(args *skel.CmdArgs) error {
	config, err := ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	pod, err := ParseArgs(args.Args)
	if err != nil {
		return err
	}
	var r *agentv1.AddResponse
	err = call(config.Socket, addTimeout, func(ctx context.Context, client agentv1.CNIServiceClient) error {
		r, err = client.Add(ctx, &agentv1.AddRequest{
			ContainerId: args.ContainerID, Netns: args.Netns, Ifname: args.IfName,
			PodNamespace: pod.Namespace, PodName: pod.Name, PodUid: pod.UID,
		}, grpc.WaitForReady(true))
		return err
	})
	if err != nil {
		return err
	}
	result, err := resultOf(r, args)
	if err != nil {
		return types.NewError(types.ErrInternal, "the agent's answer cannot be used", err.Error())
	}
	return types.PrintResult(result, config.CNIVersion)
}

// resultOf describes what the agent made.
func resultOf(r *agentv1.AddResponse, args *skel.CmdArgs) (*current.Result, error) {
	result := &current.Result{
		CNIVersion: current.ImplementedSpecVersion,
		Interfaces: []*current.Interface{
			{Name: r.HostIfname, Mac: r.HostMac, Mtu: int(r.Mtu)},
			{Name: args.IfName, Mac: r.Mac, Mtu: int(r.Mtu), Sandbox: args.Netns},
		},
	}
	inPod := 1
	for _, text := range r.Addresses {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, fmt.Errorf("address %q: %w", text, err)
		}
		ip := &current.IPConfig{Interface: &inPod, Address: *ipNet(prefix)}
		for _, g := range r.Gateways {
			gateway, err := netip.ParseAddr(g)
			if err != nil {
				return nil, fmt.Errorf("gateway %q: %w", g, err)
			}
			if gateway.Is4() == prefix.Addr().Is4() {
				ip.Gateway = gateway.AsSlice()
				everything := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
				if gateway.Is6() {
					everything = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
				}
				result.Routes = append(result.Routes, &types.Route{Dst: *ipNet(everything), GW: gateway.AsSlice()})
			}
		}
		result.IPs = append(result.IPs, ip)
	}
	return result, nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func del(args *skel.CmdArgs) error {
	config, err := ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	return call(config.Socket, otherTimeout, func(ctx context.Context, client agentv1.CNIServiceClient) error {
		_, err := client.Delete(ctx, &agentv1.DeleteRequest{ContainerId: args.ContainerID, Netns: args.Netns, Ifname: args.IfName}, grpc.WaitForReady(true))
		return err
	})
}

func check(args *skel.CmdArgs) error {
	config, err := ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	if config.result == nil {
		return invalid("prevResult", "is missing: CHECK needs it")
	}
	return call(config.Socket, otherTimeout, func(ctx context.Context, client agentv1.CNIServiceClient) error {
		_, err := client.Check(ctx, &agentv1.CheckRequest{ContainerId: args.ContainerID, Netns: args.Netns, Ifname: args.IfName})
		return err
	})
}

func ready(args *skel.CmdArgs) error {
	config, err := ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	err = call(config.Socket, otherTimeout, func(ctx context.Context, client agentv1.CNIServiceClient) error {
		_, err := client.Ready(ctx, &agentv1.ReadyRequest{})
		return err
	})
	var e *types.Error
	if errors.As(err, &e) && e.Code == types.ErrTryAgainLater {
		// STATUS has codes of its own.
		return types.NewError(types.ErrPluginNotAvailable, e.Msg, e.Details)
	}
	return err
}

func collect(args *skel.CmdArgs) error {
	config, err := ParseConfig(args.StdinData)
	if err != nil {
		return err
	}
	request := &agentv1.CollectGarbageRequest{}
	for _, a := range config.ValidAttachments {
		request.Valid = append(request.Valid, &agentv1.Attachment{ContainerId: a.ContainerID, Ifname: a.IfName})
	}
	return call(config.Socket, otherTimeout, func(ctx context.Context, client agentv1.CNIServiceClient) error {
		_, err := client.CollectGarbage(ctx, request)
		return err
	})
}
