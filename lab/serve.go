// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/timestamppb"
	corev1 "k8s.io/api/core/v1"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	sourcev1 "github.com/weirmesh/weir/gen/weir/source/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/internal/version"
	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/control"
	"github.com/weirmesh/weir/lab/internal/netns"
	"github.com/weirmesh/weir/lab/internal/object"
	"github.com/weirmesh/weir/lab/internal/source"
)

// maxMessage is for the manifests and the objects of large clusters.
const maxMessage = 64 << 20

// servers opens the lab's own ports: its unix socket, and the source of objects in the central namespace. The functions serve them.
func (l *Lab) servers(end func()) ([]func(context.Context) error, error) {
	socket, err := server.ListenUnix(Socket(l.config.Name))
	if err != nil {
		return nil, err
	}
	reporter := status.New("lab", l.config.Name)
	reporter.Details(func() []status.Detail {
		return []status.Detail{
			{Name: "nodes", Value: strconv.Itoa(len(l.nodes))},
			{Name: "pods", Value: strconv.Itoa(len(cluster.List[*corev1.Pod](l.cluster)))},
			{Name: "services", Value: strconv.Itoa(len(cluster.List[*corev1.Service](l.cluster)))},
		}
	})
	own := server.New(server.Config{
		Name: "lab", Log: l.log, Drain: 500 * time.Millisecond, Options: []grpc.ServerOption{grpc.MaxRecvMsgSize(maxMessage)},
		Authorize: server.Table{
			"/" + labv1.LabService_ServiceDesc.ServiceName + "/":       {server.Local},
			"/" + statusv1.StatusService_ServiceDesc.ServiceName + "/": {server.Local},
		},
	})
	labv1.RegisterLabServiceServer(own.GRPC(), &control.Server{
		Cluster: l.cluster, Runner: l.runner, Parts: l.parts, Describe: l.describe, Policies: l.policies, End: end,
		AwaitPods: func(ctx context.Context, limit time.Duration) []string { return l.awaitPods(ctx, limit, everything) },
	})
	reporter.Register(own.GRPC())
	own.SetServing("", true)

	files, err := l.certs.issue("source", "")
	if err != nil {
		return nil, errors.Join(err, socket.Close())
	}
	tls, err := spiffe.Load(files)
	if err != nil {
		return nil, errors.Join(err, socket.Close())
	}
	objects := server.New(server.Config{
		Name: "source", Log: l.log, TLS: tls, Drain: 500 * time.Millisecond,
		Authorize: server.Table{
			sourcev1.SourceService_Watch_FullMethodName:        {"policy", "identity", "operator"},
			sourcev1.SourceService_UpdateStatus_FullMethodName: {"policy", "operator"},
			sourcev1.SourceService_AcquireLease_FullMethodName: {"policy", "operator"},
		},
	})
	sourcev1.RegisterSourceServiceServer(objects.GRPC(), source.New(l.cluster, objects.Draining()))
	objects.SetServing("", true)
	var listener net.Listener
	err = netns.Do(netns.Path(l.config.centralNetns()), func() (err error) {
		listener, err = net.Listen("tcp", l.config.sourceAddress())
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the source's port: %w", err), socket.Close())
	}
	return []func(context.Context) error{
		func(ctx context.Context) error { return own.Serve(ctx, socket) },
		func(ctx context.Context) error { return objects.Serve(ctx, listener) },
	}, nil
}

// policies asks the policy service, on its unix socket, where the policy objects are in force.
func (l *Lab) policies(ctx context.Context) ([]*policyv1.PolicyObject, error) {
	conn, err := grpc.NewClient("unix:"+l.runPath("policy.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return nil, fmt.Errorf("ask the policy service: %w", err)
	}
	defer conn.Close()
	response, err := policyv1.NewPolicyQueryServiceClient(conn).ListPolicies(ctx, &policyv1.ListPoliciesRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask the policy service: %w", err)
	}
	return response.GetPolicies(), nil
}

// describe is the part of GetLab that is the supervisor's own.
func (l *Lab) describe() *labv1.GetLabResponse {
	response := &labv1.GetLabResponse{
		Name: l.config.Name, Version: version.Version, Pid: int32(os.Getpid()), Started: timestamppb.New(l.started),
		Observer: l.config.ObserverListen, ManifestErrors: l.files.Faults(), Notes: l.notes(),
	}
	for _, node := range l.nodes {
		message := &labv1.Node{Name: node.Name, Netns: netns.Path(l.config.nodeNetns(node.Name))}
		for _, address := range node.Addresses {
			message.Addresses = append(message.Addresses, address.String())
		}
		for _, cidr := range node.PodCIDRs {
			message.PodCidrs = append(message.PodCidrs, cidr.String())
		}
		response.Nodes = append(response.Nodes, message)
	}
	return response
}

// systemHead is how long the pods of the system namespace may take before the others start as well.
const systemHead = 5 * time.Second

func systemPod(o object.Object) bool { return o.GetNamespace() == cluster.SystemNamespace }

func everything(object.Object) bool { return true }

// awaitPods waits until the pods and hosts that are wanted run, or for limit, and returns those that do not. A pod that does not start is
// the manifest's affair: the lab stays up.
func (l *Lab) awaitPods(ctx context.Context, limit time.Duration, wanted func(object.Object) bool) []string {
	deadline, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	watch := l.cluster.Watch("Pod", "Host")
	defer watch.Close()
	for {
		waiting := l.waiting(wanted)
		if len(waiting) == 0 {
			return nil
		}
		if _, err := watch.Next(deadline); err != nil {
			return waiting
		}
	}
}

// waiting names the pods and hosts that are not ready, and why.
func (l *Lab) waiting(wanted func(object.Object) bool) []string {
	var names []string
	for _, pod := range cluster.List[*corev1.Pod](l.cluster) {
		if ready(pod) || !wanted(pod) {
			continue
		}
		state, why := control.PodStatus(pod)
		names = append(names, fmt.Sprintf("pod %s/%s: %s %s", pod.Namespace, pod.Name, state, why))
	}
	for _, host := range cluster.List[*object.Host](l.cluster) {
		started := 0
		for _, container := range host.Status.ContainerStatuses {
			if container.State.Running != nil {
				started++
			}
		}
		if (started < len(host.Spec.Containers) || !host.Status.Plugged) && wanted(host) {
			names = append(names, fmt.Sprintf("host %s: %s", host.Name, host.Status.Message))
		}
	}
	return names
}

// ready reports whether there is nothing to wait for in a pod.
func ready(pod *corev1.Pod) bool {
	if pod.Status.Phase == corev1.PodSucceeded {
		return true
	}
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodReady {
			return condition.Status == corev1.ConditionTrue
		}
	}
	return false
}
