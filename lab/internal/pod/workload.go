// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/cni"
	"github.com/weirmesh/weir/lab/internal/fabric"
	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/netns"
	"github.com/weirmesh/weir/lab/internal/object"
	"github.com/weirmesh/weir/lab/internal/zone"
)

// workload is what pods and outside hosts have in common for whoever runs them.
type workload struct {
	namespace, name string
	// id names the workload's folder, namespaces and control group.
	id         string
	pod        *corev1.Pod // what the downward API shows; for a host a pod without a node
	containers []corev1.Container
	restart    corev1.RestartPolicy
	grace      time.Duration
	files      files
	cgroup     string
	// netns is the namespace's name when it is the workload's own, else empty, and netnsPath that of another.
	netns     string
	netnsPath string
	// probeFrom is the path of the namespace from which readiness is asked.
	probeFrom string
	// plug gives the namespace its network and returns the addresses; unplug takes it away again.
	plug   func(ctx context.Context) ([]netip.Addr, error)
	unplug func(ctx context.Context) error
	// report stores what is to be seen of the workload; gone tells that nothing is left of it.
	report func(report)
	gone   func()
}

// report is the state of a workload.
type report struct {
	addresses  []netip.Addr
	containers []corev1.ContainerStatus
	// message says why nothing runs yet.
	message string
}

// defaultGrace is how long programs may take to end when a manifest says nothing. Kubernetes gives 30 s.
const defaultGrace = 2 * time.Second

func podWorkload(config Config, pod *corev1.Pod) *workload {
	node := config.Nodes[pod.Spec.NodeName]
	id := pod.Namespace + "." + pod.Name
	w := &workload{
		namespace: pod.Namespace, name: pod.Name, id: id, pod: pod,
		containers: pod.Spec.Containers,
		restart:    pod.Spec.RestartPolicy,
		grace:      defaultGrace,
		cgroup:     filepath.Join(config.Cgroup, pod.Spec.NodeName, id),
		probeFrom:  node.Netns,
		report:     func(state report) { setPodStatus(config.Cluster, pod, node, state) },
		gone:       func() { config.Cluster.PodGone(pod.UID) },
		files: files{
			dir: filepath.Join(config.Dir, "pods", id), namespace: pod.Namespace, dns: config.DNS,
			hostname: hostname(pod), aliases: pod.Spec.HostAliases,
		},
	}
	if seconds := pod.Spec.TerminationGracePeriodSeconds; seconds != nil {
		w.grace = time.Duration(*seconds) * time.Second
	}
	if pod.Spec.Hostname != "" && pod.Spec.Subdomain != "" {
		w.files.fqdn = fmt.Sprintf("%s.%s.%s.svc.%s", pod.Spec.Hostname, pod.Spec.Subdomain, pod.Namespace, zone.Domain)
	}
	if pod.Spec.HostNetwork {
		w.netnsPath = node.Netns
		w.files.hostname = pod.Spec.NodeName
		w.plug = func(context.Context) ([]netip.Addr, error) { return firstOfEach(node.Addresses), nil }
		w.unplug = func(context.Context) error { return nil }
		return w
	}
	w.netns = "weir-" + config.Lab + "-" + id
	w.netnsPath = netns.Path(w.netns)
	attachment := cni.Pod{
		ContainerID: newContainerID(), Netns: w.netnsPath,
		Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID),
	}
	w.plug = func(ctx context.Context) ([]netip.Addr, error) { return node.Plugin.Add(ctx, attachment) }
	w.unplug = func(ctx context.Context) error { return node.Plugin.Delete(ctx, attachment) }
	return w
}

// firstOfEach returns the first address of each family, which is what a pod on the host's network is known by.
func firstOfEach(addresses []netip.Addr) []netip.Addr {
	var firsts []netip.Addr
	for _, address := range addresses {
		if !slices.ContainsFunc(firsts, func(f netip.Addr) bool { return f.Is4() == address.Is4() }) {
			firsts = append(firsts, address)
		}
	}
	return firsts
}

// hostname is the pod's name, as Kubernetes cuts it to fit.
func hostname(pod *corev1.Pod) string {
	if pod.Spec.Hostname != "" {
		return pod.Spec.Hostname
	}
	if len(pod.Name) > 63 {
		return strings.TrimRight(pod.Name[:63], "-.")
	}
	return pod.Name
}

func hostWorkload(config Config, host *object.Host) *workload {
	w := &workload{
		name: host.Name, id: host.Name, containers: host.Spec.Containers, restart: corev1.RestartPolicyAlways, grace: defaultGrace,
		pod:    &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: host.Name, UID: host.UID, Labels: host.Labels, Annotations: host.Annotations}},
		cgroup: filepath.Join(config.Cgroup, "_outside", host.Name),
		netns:  "weir-" + config.Lab + "-" + host.Name,
		files:  files{dir: filepath.Join(config.Dir, "hosts", host.Name), hostname: host.Name},
		gone:   func() {},
	}
	w.netnsPath = netns.Path(w.netns)
	w.probeFrom = w.netnsPath
	var prefixes []netip.Prefix
	var addresses []netip.Addr
	for _, text := range host.Spec.Addresses {
		prefix, err := manifest.ParseHostAddress(text)
		if err != nil {
			// The manifest was checked.
			continue
		}
		prefixes = append(prefixes, prefix)
		addresses = append(addresses, prefix.Addr())
	}
	w.plug = func(context.Context) ([]netip.Addr, error) {
		if err := fabric.Prepare(w.netns, false); err != nil {
			return nil, err
		}
		return addresses, config.Outside.Join(w.netns, prefixes)
	}
	w.unplug = func(context.Context) error { return config.Outside.Leave(prefixes) }
	w.report = func(state report) {
		config.Cluster.SetHostStatus(host.UID, func(status *object.HostStatus) {
			status.ContainerStatuses, status.Message, status.Plugged = state.containers, state.message, len(state.addresses) > 0
		})
	}
	return w
}

// setPodStatus turns a report into what a kubelet would write.
func setPodStatus(c *cluster.Cluster, pod *corev1.Pod, node Node, state report) {
	now := metav1.Now()
	c.SetPodStatus(pod.UID, func(status *corev1.PodStatus) {
		status.ContainerStatuses = state.containers
		status.Message = state.message
		status.HostIP, status.HostIPs = "", nil
		for _, address := range node.Addresses {
			status.HostIPs = append(status.HostIPs, corev1.HostIP{IP: address.String()})
		}
		if len(status.HostIPs) > 0 {
			status.HostIP = status.HostIPs[0].IP
		}
		status.PodIP, status.PodIPs = "", nil
		for _, address := range state.addresses {
			status.PodIPs = append(status.PodIPs, corev1.PodIP{IP: address.String()})
		}
		if len(status.PodIPs) > 0 {
			status.PodIP = status.PodIPs[0].IP
		}
		if status.StartTime == nil {
			status.StartTime = &now
		}
		status.Phase = phase(state.containers, pod.Spec.RestartPolicy)
		ready, why := allReady(state.containers)
		if status.Phase != corev1.PodRunning {
			ready = false
		}
		reason := ""
		if !ready {
			reason = "ContainersNotReady"
		}
		cluster.SetCondition(status, corev1.PodInitialized, true, "", "", now)
		cluster.SetCondition(status, corev1.ContainersReady, ready, reason, why, now)
		cluster.SetCondition(status, corev1.PodReady, ready, reason, why, now)
	})
}

func phase(containers []corev1.ContainerStatus, restart corev1.RestartPolicy) corev1.PodPhase {
	ended, failed, started := 0, 0, 0
	for _, container := range containers {
		if container.State.Terminated != nil {
			ended++
			if container.State.Terminated.ExitCode != 0 {
				failed++
			}
		}
		if container.State.Running != nil || container.State.Terminated != nil || container.RestartCount > 0 {
			started++
		}
	}
	switch {
	case started == 0:
		return corev1.PodPending
	case ended < len(containers) || restart == corev1.RestartPolicyAlways:
		return corev1.PodRunning
	case failed == 0:
		return corev1.PodSucceeded
	case restart == corev1.RestartPolicyNever:
		return corev1.PodFailed
	}
	return corev1.PodRunning
}

func allReady(containers []corev1.ContainerStatus) (bool, string) {
	var missing []string
	for _, container := range containers {
		if !container.Ready {
			missing = append(missing, container.Name)
		}
	}
	if len(missing) > 0 || len(containers) == 0 {
		return false, "containers with unready status: [" + strings.Join(missing, " ") + "]"
	}
	return true, ""
}
