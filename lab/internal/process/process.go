// SPDX-License-Identifier: Apache-2.0

// Package process starts programs inside the lab and watches over them.
package process

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/weirmesh/weir/lab/internal/launch"
)

// Command is a program to start.
type Command struct {
	// Self is the path of weir-lab.
	Self string
	// Launch says where it runs and what it is; its Cgroup is entered at birth, so that no process is ever outside.
	Launch launch.Spec
	// Files are inherited from descriptor 4 on.
	Files []*os.File
	// Output gets what the program writes to its standard output and error.
	Output io.Writer
}

// Process is a running program.
type Process struct {
	// Pid is the process id; the process keeps it from birth to death.
	Pid int
	// Started is when it began.
	Started time.Time

	done chan struct{}
	exit Exit
}

// Exit is how a program ended.
type Exit struct {
	Code   int
	Signal syscall.Signal
	Time   time.Time
}

// String says it in words.
func (e Exit) String() string {
	if e.Signal != 0 {
		return "killed by signal " + e.Signal.String()
	}
	return fmt.Sprintf("exit code %d", e.Code)
}

// Start starts the program. It runs in a session of its own: signals of the lab's terminal do not reach it.
func Start(c Command) (*Process, error) {
	spec := c.Launch
	group := spec.Cgroup
	spec.Cgroup = ""
	command, release, err := launch.Command(c.Self, spec)
	if err != nil {
		return nil, err
	}
	defer release()
	command.ExtraFiles = append(command.ExtraFiles, c.Files...)
	command.Stdout, command.Stderr = c.Output, c.Output
	// A grandchild that keeps the pipe open does not keep the exit from being seen.
	command.WaitDelay = time.Second
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if group != "" {
		dir, err := os.Open(group)
		if err != nil {
			return nil, fmt.Errorf("start %s: open control group: %w", spec.Args[0], err)
		}
		defer dir.Close()
		command.SysProcAttr.UseCgroupFD = true
		command.SysProcAttr.CgroupFD = int(dir.Fd())
	}
	if err := command.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Args[0], err)
	}
	p := &Process{Pid: command.Process.Pid, Started: time.Now(), done: make(chan struct{})}
	go p.wait(command)
	return p, nil
}

func (p *Process) wait(command *exec.Cmd) {
	defer close(p.done)
	err := command.Wait()
	p.exit = Exit{Time: time.Now()}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		p.exit.Code = exit.ExitCode()
	}
	if status, ok := command.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		p.exit.Signal = status.Signal()
		p.exit.Code = 128 + int(status.Signal())
	}
}

// Done is closed when the program has ended and all its output is written.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit returns how the program ended. It is valid after Done is closed.
func (p *Process) Exit() Exit {
	<-p.done
	return p.exit
}

// Signal sends a signal; a program that has ended is no error.
func (p *Process) Signal(signal syscall.Signal) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	// Between death and Wait the pid is a zombie's, so it cannot have become somebody else's.
	if err := syscall.Kill(p.Pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("signal %d: %w", p.Pid, err)
	}
	return nil
}

// Stop asks the program to end, and kills it after grace.
func (p *Process) Stop(grace time.Duration) error { return p.StopUntil(grace, nil) }

// StopUntil is Stop that kills the program as soon as hurry is closed.
func (p *Process) StopUntil(grace time.Duration, hurry <-chan struct{}) error {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(grace):
	case <-hurry:
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-p.done
	return nil
}
