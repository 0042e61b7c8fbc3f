// SPDX-License-Identifier: Apache-2.0

// Package pod runs pods and outside hosts, as a kubelet does: it makes the namespaces, has the network plugged in by the real CNI plugin,
// starts the containers' programs, watches over them, and reports what became of them.
package pod

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/cni"
	"github.com/weirmesh/weir/lab/internal/launch"
	"github.com/weirmesh/weir/lab/internal/ledger"
	"github.com/weirmesh/weir/lab/internal/logfile"
	"github.com/weirmesh/weir/lab/internal/object"
)

// Config is what a runner needs. All fields are required.
type Config struct {
	// Lab is the lab's name.
	Lab string
	// Self is the path of weir-lab.
	Self string
	// Path is the PATH of containers: Weir's bin folder first.
	Path string
	// Env is what every container gets beside PATH and the like.
	Env []string
	// Dir is where pods' files and logs go.
	Dir string
	// Cgroup is the lab's control group.
	Cgroup string
	// DNS is the name server of pods.
	DNS netip.Addr
	// Nodes by name.
	Nodes map[string]Node
	// Outside plugs hosts outside of the cluster into the fabric.
	Outside Outside
	Cluster *cluster.Cluster
	Ledger  *ledger.Ledger
	Log     *slog.Logger
}

// Node is where pods run.
type Node struct {
	Netns string // path
	// Cgroup is the control group of the node's own processes, of which the lab starts none but by exec.
	Cgroup    string
	Addresses []netip.Addr
	Plugin    Plugin
}

// Plugin plugs pods in; it is the real CNI plugin, and another one in tests.
type Plugin interface {
	Add(context.Context, cni.Pod) ([]netip.Addr, error)
	Delete(context.Context, cni.Pod) error
}

// Outside joins a host's namespace to the fabric, and takes it out of the others' routes.
type Outside interface {
	Join(namespace string, addresses []netip.Prefix) error
	Leave(addresses []netip.Prefix) error
}

// startsAtOnce bounds how many sandboxes are made at a time.
const startsAtOnce = 8

// Runner runs the pods of all nodes, and the outside hosts.
type Runner struct {
	config Config
	slots  chan struct{}

	mu   sync.Mutex
	runs map[types.UID]*run
	wait sync.WaitGroup
	// begin is what waits for Release: functions by the uid of what they start. Nil after Release.
	begin map[types.UID]func()
}

// NewRunner makes a runner.
func NewRunner(config Config) *Runner {
	return &Runner{config: config, slots: make(chan struct{}, startsAtOnce), runs: map[types.UID]*run{}, begin: map[types.UID]func(){}}
}

// Release starts everything that is not of the system namespace. Until then it waits: what a cluster has always had, such as DNS, runs
// before its first application does.
func (r *Runner) Release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, begin := range r.begin {
		begin()
	}
	r.begin = nil
}

// startOrHold starts a workload now or at Release. The caller holds r.mu.
func (r *Runner) startOrHold(ctx context.Context, uid types.UID, w *workload) {
	if r.begin == nil || w.namespace == cluster.SystemNamespace {
		r.start(ctx, uid, w)
		return
	}
	r.begin[uid] = func() { r.start(ctx, uid, w) }
}

// Run follows the cluster's pods and hosts until ctx ends. Then it returns, and what runs is left to the ledger.
func (r *Runner) Run(ctx context.Context) error {
	defer r.wait.Wait()
	for ctx.Err() == nil {
		if err := r.follow(ctx); err != nil && !errors.Is(err, cluster.ErrBehind) {
			return nil
		}
	}
	return nil
}

func (r *Runner) follow(ctx context.Context) error {
	watch := r.config.Cluster.Watch("Pod", "Host")
	defer watch.Close()
	for {
		events, err := watch.Next(ctx)
		if err != nil {
			return err
		}
		for _, event := range events {
			if event.Type == cluster.Synced {
				continue
			}
			switch o := event.Object.(type) {
			case *corev1.Pod:
				r.pod(ctx, o, event.Type == cluster.Deleted)
			case *object.Host:
				r.host(ctx, o, event.Type == cluster.Deleted)
			}
		}
	}
}

func (r *Runner) pod(ctx context.Context, pod *corev1.Pod, gone bool) {
	if pod.Spec.NodeName == "" {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	current, running := r.runs[pod.UID]
	switch {
	case !running && !gone && pod.DeletionTimestamp == nil:
		r.startOrHold(ctx, pod.UID, podWorkload(r.config, pod))
	case !running && !gone:
		// It was deleted before it began.
		delete(r.begin, pod.UID)
		r.wait.Go(func() { r.config.Cluster.PodGone(pod.UID) })
	case running && pod.DeletionGracePeriodSeconds != nil && *pod.DeletionGracePeriodSeconds == 0:
		current.endNow()
	case running && (gone || pod.DeletionTimestamp != nil):
		current.end()
	}
}

func (r *Runner) host(ctx context.Context, host *object.Host, gone bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	current, running := r.runs[host.UID]
	switch {
	case !running && !gone:
		r.startOrHold(ctx, host.UID, hostWorkload(r.config, host))
	case !running && gone:
		delete(r.begin, host.UID)
	case running && gone:
		current.end()
	}
}

// AwaitGone waits until nothing runs of pods and hosts that were deleted.
func (r *Runner) AwaitGone(ctx context.Context) error {
	watch := r.config.Cluster.Watch("Pod", "Host")
	defer watch.Close()
	for {
		var waiting string
		for _, pod := range cluster.List[*corev1.Pod](r.config.Cluster) {
			if pod.DeletionTimestamp != nil {
				waiting = pod.Namespace + "/" + pod.Name
			}
		}
		if waiting == "" {
			break
		}
		if _, err := watch.Next(ctx); err != nil {
			return fmt.Errorf("pod %s does not end: %w", waiting, err)
		}
	}
	for _, current := range r.leftover() {
		select {
		case <-current.ended:
		case <-ctx.Done():
			return fmt.Errorf("%s does not end: %w", current.workload.id, ctx.Err())
		}
	}
	return nil
}

// leftover are the runs of which the cluster has no object any more.
func (r *Runner) leftover() []*run {
	present := map[types.UID]bool{}
	for _, pod := range cluster.List[*corev1.Pod](r.config.Cluster) {
		present[pod.UID] = true
	}
	for _, host := range cluster.List[*object.Host](r.config.Cluster) {
		present[host.UID] = true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var left []*run
	for uid, current := range r.runs {
		if !present[uid] {
			left = append(left, current)
		}
	}
	return left
}

// start begins a workload's life. The caller holds r.mu.
func (r *Runner) start(ctx context.Context, uid types.UID, w *workload) {
	// Another run of the same name may still be ending (an outside host that was deleted and applied again).
	var before <-chan struct{}
	for _, other := range r.runs {
		if other.workload.id == w.id {
			before = other.ended
		}
	}
	current := newRun(r.config, w, r.slots)
	r.runs[uid] = current
	r.wait.Go(func() {
		defer close(current.ended)
		if before != nil {
			select {
			case <-before:
			case <-ctx.Done():
				return
			}
		}
		current.live(ctx)
		if ctx.Err() != nil {
			return
		}
		r.mu.Lock()
		delete(r.runs, uid)
		r.mu.Unlock()
		w.gone()
	})
}

// ErrNoPod and ErrNotRunning are why a container cannot be entered.
var (
	ErrNoPod      = errors.New("not found")
	ErrNotRunning = errors.New("not running")
)

// find returns the run of a pod, or of a host for an empty namespace.
func (r *Runner) find(namespace, name string) (*run, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, current := range r.runs {
		if current.workload.namespace == namespace && current.workload.name == name {
			return current, nil
		}
	}
	if namespace == "" {
		return nil, fmt.Errorf("host %s: %w", name, ErrNoPod)
	}
	return nil, fmt.Errorf("pod %s/%s: %w", namespace, name, ErrNoPod)
}

// Locate returns how to enter a container ("" = the first): everything but the arguments.
func (r *Runner) Locate(namespace, name, container string) (launch.Spec, error) {
	current, err := r.find(namespace, name)
	if err != nil {
		return launch.Spec{}, err
	}
	return current.locate(container)
}

// LocateNode returns how to run something in a node's own place: everything but the arguments.
func (r *Runner) LocateNode(name string) (launch.Spec, error) {
	node, ok := r.config.Nodes[name]
	if !ok {
		return launch.Spec{}, fmt.Errorf("node %s: %w", name, ErrNoPod)
	}
	env := append([]string{"PATH=" + r.config.Path, "HOME=/root", "HOSTNAME=" + name}, r.config.Env...)
	return launch.Spec{Netns: node.Netns, Cgroup: node.Cgroup, Hostname: name, Env: env}, nil
}

// Log returns a container's log ("" = the first).
func (r *Runner) Log(namespace, name, container string) (*logfile.File, error) {
	current, err := r.find(namespace, name)
	if err != nil {
		return nil, err
	}
	return current.log(container)
}

// newContainerID makes an id as container runtimes do.
func newContainerID() string {
	b := make([]byte, 32)
	rand.Read(b)
	return hex.EncodeToString(b)
}

func containerNames(containers []corev1.Container) []string {
	var names []string
	for _, container := range containers {
		names = append(names, container.Name)
	}
	return names
}

func pickContainer(containers []corev1.Container, name string) (int, error) {
	if name == "" && len(containers) > 0 {
		return 0, nil
	}
	i := slices.IndexFunc(containers, func(c corev1.Container) bool { return c.Name == name })
	if i < 0 {
		return 0, fmt.Errorf("container %q: %w; there are %v", name, ErrNoPod, containerNames(containers))
	}
	return i, nil
}

// logPath is where a container's output goes.
func logPath(dir, id, container string) string {
	return filepath.Join(dir, "logs", "pods", id+"."+container+".log")
}
