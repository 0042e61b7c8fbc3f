// SPDX-License-Identifier: Apache-2.0

package control

import (
	"fmt"
	"net"

	"google.golang.org/protobuf/types/known/timestamppb"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/netns"
	"github.com/weirmesh/weir/lab/internal/object"
	"github.com/weirmesh/weir/lab/internal/part"
)

// describe adds the objects and the parts.
func describe(response *labv1.GetLabResponse, c *cluster.Cluster, parts *part.Manager) {
	nodes := map[string]*labv1.Node{}
	for _, node := range response.GetNodes() {
		nodes[node.GetName()] = node
	}
	for _, node := range cluster.List[*corev1.Node](c) {
		if known := nodes[node.Name]; known != nil {
			known.Labels = node.Labels
		}
	}
	for _, p := range parts.List() {
		response.Parts = append(response.Parts, partMessage(p))
	}
	for _, pod := range cluster.List[*corev1.Pod](c) {
		message := podMessage(pod)
		message.Netns = netns.Path("weir-" + response.GetName() + "-" + pod.Namespace + "." + pod.Name)
		if pod.Spec.HostNetwork {
			message.Netns = nodes[pod.Spec.NodeName].GetNetns()
		}
		response.Pods = append(response.Pods, message)
	}
	slices := cluster.List[*discoveryv1.EndpointSlice](c)
	for _, service := range cluster.List[*corev1.Service](c) {
		response.Services = append(response.Services, serviceMessage(service, slices))
	}
	for _, host := range cluster.List[*object.Host](c) {
		message := hostMessage(host)
		message.Netns = netns.Path("weir-" + response.GetName() + "-" + host.Name)
		response.Hosts = append(response.Hosts, message)
	}
}

func partMessage(p part.Status) *labv1.Part {
	message := &labv1.Part{
		Name: p.Name, Pid: int32(p.Pid), State: string(p.State), Restarts: int32(p.Restarts),
		Log: p.Log, Netns: p.Launch.Netns, LastExit: p.LastExit,
	}
	if !p.Started.IsZero() {
		message.Started = timestamppb.New(p.Started)
	}
	return message
}

func podMessage(pod *corev1.Pod) *labv1.Pod {
	state, why := PodStatus(pod)
	ready, restarts := counts(pod.Status.ContainerStatuses)
	message := &labv1.Pod{
		Namespace: pod.Namespace, Name: pod.Name, Uid: string(pod.UID), Node: pod.Spec.NodeName,
		Status: state, Message: why, Ready: ready, Containers: int32(len(pod.Spec.Containers)), Restarts: restarts,
		Created: timestamppb.New(pod.CreationTimestamp.Time), Labels: pod.Labels,
	}
	for _, ip := range pod.Status.PodIPs {
		message.Addresses = append(message.Addresses, ip.IP)
	}
	return message
}

func counts(containers []corev1.ContainerStatus) (ready, restarts int32) {
	for _, container := range containers {
		if container.Ready {
			ready++
		}
		restarts += container.RestartCount
	}
	return ready, restarts
}

// PodStatus is what kubectl shows in the column STATUS, and why.
func PodStatus(pod *corev1.Pod) (state, why string) {
	state, why = string(pod.Status.Phase), pod.Status.Message
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodScheduled && condition.Status == corev1.ConditionFalse {
			return state, condition.Message
		}
	}
	if s, w := containersStatus(pod.Status.ContainerStatuses); s != "" {
		state = s
		if w != "" {
			why = w
		}
	}
	if pod.DeletionTimestamp != nil {
		state = "Terminating"
	}
	return state, why
}

// containersStatus is the state of the first container that is not running; empty = all are.
func containersStatus(containers []corev1.ContainerStatus) (state, why string) {
	for _, container := range containers {
		switch s := container.State; {
		case s.Waiting != nil:
			return s.Waiting.Reason, s.Waiting.Message
		case s.Terminated != nil:
			return s.Terminated.Reason, fmt.Sprintf("exit code %d", s.Terminated.ExitCode)
		}
	}
	return "", ""
}

func serviceMessage(service *corev1.Service, slices []*discoveryv1.EndpointSlice) *labv1.Service {
	message := &labv1.Service{Namespace: service.Namespace, Name: service.Name, Type: string(service.Spec.Type), ClusterIps: service.Spec.ClusterIPs}
	for _, port := range service.Spec.Ports {
		text := fmt.Sprintf("%d/%s", port.Port, port.Protocol)
		if port.NodePort != 0 {
			text = fmt.Sprintf("%d:%d/%s", port.Port, port.NodePort, port.Protocol)
		}
		message.Ports = append(message.Ports, text)
	}
	for _, ingress := range service.Status.LoadBalancer.Ingress {
		message.ExternalIps = append(message.ExternalIps, ingress.IP)
	}
	message.ExternalIps = append(message.ExternalIps, service.Spec.ExternalIPs...)
	for _, slice := range slices {
		if slice.Namespace != service.Namespace || slice.Labels[discoveryv1.LabelServiceName] != service.Name {
			continue
		}
		for _, endpoint := range slice.Endpoints {
			if endpoint.Conditions.Ready != nil && !*endpoint.Conditions.Ready {
				continue
			}
			for _, port := range slice.Ports {
				if port.Port == nil {
					continue
				}
				message.Endpoints = append(message.Endpoints, net.JoinHostPort(endpoint.Addresses[0], fmt.Sprint(*port.Port)))
			}
		}
	}
	return message
}

func hostMessage(host *object.Host) *labv1.Host {
	ready, restarts := counts(host.Status.ContainerStatuses)
	message := &labv1.Host{
		Name: host.Name, Addresses: host.Spec.Addresses, Status: "Running", Message: host.Status.Message,
		Ready: ready, Containers: int32(len(host.Spec.Containers)), Restarts: restarts, Created: timestamppb.New(host.CreationTimestamp.Time),
	}
	if state, why := containersStatus(host.Status.ContainerStatuses); state != "" {
		message.Status, message.Message = state, why
	}
	return message
}
