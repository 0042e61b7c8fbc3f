// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/lab/internal/cgroup"
	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/launch"
	"github.com/weirmesh/weir/lab/internal/ledger"
	"github.com/weirmesh/weir/lab/internal/logfile"
	"github.com/weirmesh/weir/lab/internal/netns"
	"github.com/weirmesh/weir/lab/internal/object"
	"github.com/weirmesh/weir/lab/internal/process"
)

// run is the life of one workload.
type run struct {
	config   Config
	workload *workload
	slots    chan struct{}
	ended    chan struct{}
	stop     chan struct{}
	stopOnce sync.Once
	// hurry is closed when the programs get no more grace.
	hurry     chan struct{}
	hurryOnce sync.Once
	binds     []launch.Bind

	mu         sync.Mutex
	state      report
	containers []*container
	// version orders reports, which are sent without the lock.
	reporting sync.Mutex
}

func newRun(config Config, w *workload, slots chan struct{}) *run {
	r := &run{config: config, workload: w, slots: slots, ended: make(chan struct{}), stop: make(chan struct{}), hurry: make(chan struct{})}
	for i := range w.containers {
		r.containers = append(r.containers, newContainer(r, i))
		r.state.containers = append(r.state.containers, corev1.ContainerStatus{
			Name: w.containers[i].Name, Image: w.containers[i].Image, ImageID: "host",
			State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ContainerCreating"}},
		})
	}
	return r
}

// end asks the workload to stop; live returns when nothing is left.
func (r *run) end() { r.stopOnce.Do(func() { close(r.stop) }) }

// endNow is end without grace.
func (r *run) endNow() {
	r.hurryOnce.Do(func() { close(r.hurry) })
	r.end()
}

// change changes the state and reports it.
func (r *run) change(f func(*report)) {
	r.reporting.Lock()
	defer r.reporting.Unlock()
	r.mu.Lock()
	f(&r.state)
	state := r.state
	state.containers = nil
	for i := range r.state.containers {
		state.containers = append(state.containers, *r.state.containers[i].DeepCopy())
	}
	state.addresses = slices.Clone(r.state.addresses)
	r.mu.Unlock()
	r.workload.report(state)
}

// live makes the workload's place, runs its containers, and takes everything away again after end. When ctx ends, the lab does: then only
// the programs are ended.
func (r *run) live(ctx context.Context) {
	life, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-r.stop:
			cancel()
		case <-life.Done():
		}
	}()
	if r.create(life) {
		var all sync.WaitGroup
		for _, c := range r.containers {
			all.Go(func() { c.live(life) })
		}
		all.Wait()
		// Containers that have ended for good leave the pod in place.
		<-life.Done()
	}
	if ctx.Err() != nil {
		return
	}
	r.remove(ctx)
	for _, c := range r.containers {
		c.close()
	}
}

// retry is the wait between attempts to make a sandbox, or to take it away.
var retry = process.Backoff{First: 500 * time.Millisecond, Max: 10 * time.Second, Forget: time.Hour}

// create makes the sandbox, again and again until it works; false = the workload was ended before.
func (r *run) create(ctx context.Context) bool {
	backoff := retry
	for {
		err := r.attempt(ctx)
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		r.config.Log.Warn("pod could not be set up, will try again", "pod", r.workload.id, "error", err)
		r.change(func(s *report) { s.message = err.Error() })
		if !wait(ctx, backoff.Next(0)) {
			return false
		}
	}
}

// attempt makes the sandbox once. It may find what an earlier attempt left.
func (r *run) attempt(ctx context.Context) error {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	w := r.workload
	if err := r.config.Ledger.Add(ledger.Cgroup, w.cgroup); err != nil {
		return err
	}
	for _, dir := range r.groups() {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make control group: %w", err)
		}
	}
	if err := w.files.write(); err != nil {
		return err
	}
	binds, err := w.files.binds()
	if err != nil {
		return err
	}
	r.binds = binds
	if w.netns != "" {
		if err := r.createNamespace(ctx); err != nil {
			return err
		}
	}
	addresses, err := w.plug(ctx)
	if err != nil {
		return errors.Join(err, w.unplug(context.WithoutCancel(ctx)))
	}
	w.files.addresses = addresses
	if err := w.files.write(); err != nil {
		return err
	}
	r.setAddresses(addresses)
	return nil
}

// groups are the control groups of the containers, which exec and restarts use each on its own.
func (r *run) groups() []string {
	var dirs []string
	for _, container := range r.workload.containers {
		dirs = append(dirs, filepath.Join(r.workload.cgroup, container.Name))
	}
	return append(dirs, r.workload.cgroup)
}

// createNamespace makes a fresh namespace: one that an attempt left has half a network in it.
func (r *run) createNamespace(ctx context.Context) error {
	w := r.workload
	if err := r.config.Ledger.Add(ledger.Namespace, w.netns); err != nil {
		return err
	}
	err := netns.Create(w.netns)
	if errors.Is(err, os.ErrExist) {
		if err := w.unplug(ctx); err != nil {
			return err
		}
		if err := netns.Delete(w.netns); err != nil {
			return err
		}
		err = netns.Create(w.netns)
	}
	return err
}

func (r *run) setAddresses(addresses []netip.Addr) {
	// The downward API shows the addresses; a pod in the cluster's store is never changed, so this is a copy.
	pod := r.workload.pod.DeepCopy()
	for _, address := range addresses {
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: address.String()})
	}
	if len(addresses) > 0 {
		pod.Status.PodIP = addresses[0].String()
	}
	for _, address := range r.config.Nodes[pod.Spec.NodeName].Addresses {
		pod.Status.HostIPs = append(pod.Status.HostIPs, corev1.HostIP{IP: address.String()})
	}
	if len(pod.Status.HostIPs) > 0 {
		pod.Status.HostIP = pod.Status.HostIPs[0].IP
	}
	r.workload.pod = pod
	r.change(func(s *report) { s.addresses, s.message = addresses, "" })
}

// labGrace is how long programs may take to end when the whole lab does.
const labGrace = time.Second

// grace is how long programs may take to end.
func (r *run) grace() time.Duration {
	select {
	case <-r.stop:
		return r.workload.grace
	default:
		return min(r.workload.grace, labGrace)
	}
}

// stopDeadline bounds the wait for processes that do not die of SIGKILL.
const stopDeadline = 10 * time.Second

// remove takes everything away, again and again until it works or the lab ends.
func (r *run) remove(ctx context.Context) {
	backoff := retry
	for {
		err := r.removeOnce(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		r.config.Log.Warn("pod could not be removed, will try again", "pod", r.workload.id, "error", err)
		if !wait(ctx, backoff.Next(0)) {
			return
		}
	}
}

func (r *run) removeOnce(ctx context.Context) error {
	w := r.workload
	// The containers' own programs have ended; what those started and left behind has not.
	killCtx, cancel := context.WithTimeout(ctx, stopDeadline)
	defer cancel()
	if err := cgroup.Kill(killCtx, w.cgroup); err != nil {
		return err
	}
	if err := w.unplug(ctx); err != nil {
		return err
	}
	if w.netns != "" {
		if err := netns.Delete(w.netns); err != nil {
			return err
		}
		if err := r.config.Ledger.Forget(ledger.Namespace, w.netns); err != nil {
			return err
		}
	}
	if err := cgroup.Remove(w.cgroup); err != nil {
		return err
	}
	if err := r.config.Ledger.Forget(ledger.Cgroup, w.cgroup); err != nil {
		return err
	}
	if err := os.RemoveAll(w.files.dir); err != nil {
		return fmt.Errorf("remove pod folder: %w", err)
	}
	return nil
}

func (r *run) locate(name string) (launch.Spec, error) {
	if name == "" && len(r.containers) == 0 {
		return r.bare()
	}
	i, err := pickContainer(r.workload.containers, name)
	if err != nil {
		return launch.Spec{}, err
	}
	r.mu.Lock()
	running := r.state.containers[i].State.Running != nil
	r.mu.Unlock()
	if !running {
		return launch.Spec{}, fmt.Errorf("container %s of %s: %w", r.workload.containers[i].Name, r.workload.id, ErrNotRunning)
	}
	return r.containers[i].spec()
}

// bare is the place of a workload without containers.
func (r *run) bare() (launch.Spec, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.state.addresses) == 0 {
		return launch.Spec{}, fmt.Errorf("%s: %w", r.workload.id, ErrNotRunning)
	}
	w := r.workload
	env := append([]string{"PATH=" + r.config.Path, "HOME=/root", "HOSTNAME=" + w.files.hostname}, r.config.Env...)
	return launch.Spec{Netns: w.netnsPath, Cgroup: w.cgroup, Hostname: w.files.hostname, Binds: r.binds, Env: env}, nil
}

func (r *run) log(name string) (*logfile.File, error) {
	i, err := pickContainer(r.workload.containers, name)
	if err != nil {
		return nil, err
	}
	return r.containers[i].openLog()
}

func (r *run) configMap(namespace, name string) (*corev1.ConfigMap, bool) {
	return cluster.Get[*corev1.ConfigMap](r.config.Cluster, object.Key{Kind: "ConfigMap", Namespace: namespace, Name: name})
}
