// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/lab/internal/cgroup"
	"github.com/weirmesh/weir/lab/internal/launch"
	"github.com/weirmesh/weir/lab/internal/logfile"
	"github.com/weirmesh/weir/lab/internal/process"
)

// logMax is how much of a container's output is kept, times one to two.
const logMax = 8 << 20

// container is the life of one container: its program, started again whenever it ends.
type container struct {
	run   *run
	index int
	def   *corev1.Container

	mu     sync.Mutex
	output *logfile.File
}

func newContainer(r *run, index int) *container {
	return &container{run: r, index: index, def: &r.workload.containers[index]}
}

// Restarts wait as in Kubernetes, only not that long.
func newBackoff() process.Backoff {
	return process.Backoff{First: time.Second, Max: 30 * time.Second, Forget: 10 * time.Second}
}

func (c *container) live(ctx context.Context) {
	backoff := newBackoff()
	for {
		started := time.Now()
		ended := c.once(ctx)
		if ctx.Err() != nil {
			return
		}
		policy := c.run.workload.restart
		if policy == corev1.RestartPolicyNever || policy == corev1.RestartPolicyOnFailure && ended.ExitCode == 0 {
			return
		}
		pause := backoff.Next(time.Since(started))
		c.change(func(s *corev1.ContainerStatus) {
			reason := "CrashLoopBackOff"
			if s.State.Waiting != nil {
				// It never began: what keeps it from it is better known.
				reason = s.State.Waiting.Reason
			}
			s.State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{
				Reason: reason, Message: fmt.Sprintf("back-off %s: %s", pause, endWords(ended)),
			}}
		})
		if !wait(ctx, pause) {
			return
		}
	}
}

func endWords(ended corev1.ContainerStateTerminated) string {
	if ended.Message != "" {
		return ended.Message
	}
	return fmt.Sprintf("the last run ended with exit code %d", ended.ExitCode)
}

func (c *container) change(f func(*corev1.ContainerStatus)) {
	c.run.change(func(s *report) { f(&s.containers[c.index]) })
}

// once runs the program once and returns how it ended.
func (c *container) once(ctx context.Context) corev1.ContainerStateTerminated {
	fail := func(reason string, err error) corev1.ContainerStateTerminated {
		c.change(func(s *corev1.ContainerStatus) {
			s.Ready = false
			s.State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: err.Error()}}
		})
		return corev1.ContainerStateTerminated{ExitCode: launch.ExitNotFound, Message: err.Error()}
	}
	spec, err := c.spec()
	if err != nil {
		return fail("CreateContainerConfigError", err)
	}
	spec.Args = arguments(c.def, spec.Env)
	if _, err := launch.LookPath(spec.Args[0], c.run.config.Path); err != nil {
		return fail("RunContainerError", err)
	}
	output, err := c.openLog()
	if err != nil {
		return fail("RunContainerError", err)
	}
	// What an earlier run left behind has no business in the next one.
	if err := cgroup.Kill(ctx, spec.Cgroup); err != nil {
		return fail("RunContainerError", err)
	}
	started, err := process.Start(process.Command{Self: c.run.config.Self, Launch: spec, Output: output})
	if err != nil {
		return fail("RunContainerError", err)
	}
	id := "lab://" + newContainerID()
	c.change(func(s *corev1.ContainerStatus) {
		yes := true
		s.ContainerID, s.Started = id, &yes
		s.State = corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(started.Started)}}
		s.Ready = c.def.ReadinessProbe == nil
	})
	c.whileRunning(ctx, started)
	exit := started.Exit()
	ended := corev1.ContainerStateTerminated{
		ExitCode: int32(exit.Code), Reason: "Completed", ContainerID: id,
		StartedAt: metav1.NewTime(started.Started), FinishedAt: metav1.NewTime(exit.Time),
	}
	if exit.Code != 0 {
		ended.Reason = "Error"
	}
	c.change(func(s *corev1.ContainerStatus) {
		no := false
		s.Started, s.Ready = &no, false
		s.State = corev1.ContainerState{Terminated: &ended}
		s.LastTerminationState = corev1.ContainerState{Terminated: &ended}
		if ctx.Err() == nil && c.run.workload.restart != corev1.RestartPolicyNever {
			s.RestartCount++
		}
	})
	return ended
}

// whileRunning asks for readiness until the program ends, and ends it when the workload is to end.
func (c *container) whileRunning(ctx context.Context, started *process.Process) {
	probing, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	if c.def.ReadinessProbe != nil {
		p := &prober{probe: c.def.ReadinessProbe, ports: c.def.Ports, from: c.run.workload.probeFrom, target: c.run.target(), exec: c.exec}
		all.Go(func() {
			p.run(probing, func(ready bool, why string) {
				c.run.change(func(s *report) {
					s.containers[c.index].Ready = ready
					s.message = why
				})
			})
		})
	}
	select {
	case <-started.Done():
	case <-ctx.Done():
	}
	cancel()
	all.Wait()
	if err := started.StopUntil(c.run.grace(), c.run.hurry); err != nil {
		c.run.config.Log.Warn("program could not be stopped", "pod", c.run.workload.id, "container", c.def.Name, "error", err)
	}
}

// exec runs a command in the container's place, for a probe.
func (c *container) exec(args []string) (*process.Process, error) {
	spec, err := c.spec()
	if err != nil {
		return nil, err
	}
	spec.Args = args
	return process.Start(process.Command{Self: c.run.config.Self, Launch: spec, Output: io.Discard})
}

// spec is the container's place, without arguments.
func (c *container) spec() (launch.Spec, error) {
	w := c.run.workload
	base := append([]string{"PATH=" + c.run.config.Path, "HOME=/root", "HOSTNAME=" + w.files.hostname}, c.run.config.Env...)
	env, err := environment(base, c.def, w.pod, c.run.configMap)
	if err != nil {
		return launch.Spec{}, err
	}
	return launch.Spec{
		Netns: w.netnsPath, Cgroup: filepath.Join(w.cgroup, c.def.Name),
		Hostname: w.files.hostname, Binds: c.run.binds, Dir: c.def.WorkingDir, Env: env,
	}, nil
}

func (c *container) openLog() (*logfile.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.output != nil {
		return c.output, nil
	}
	output, err := logfile.Open(logPath(c.run.config.Dir, c.run.workload.id, c.def.Name), logMax)
	if err != nil {
		return nil, err
	}
	c.output = output
	return output, nil
}

func (c *container) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.output != nil {
		c.output.Close()
	}
}

// target is the address that probes use: the first one.
func (r *run) target() netip.Addr {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.state.addresses) == 0 {
		return netip.IPv6Loopback()
	}
	return r.state.addresses[0]
}
