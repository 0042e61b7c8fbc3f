// SPDX-License-Identifier: Apache-2.0

// Package l7bench starts HTTP proxies side by side on a CPU, with equal configurations, and loads them from another.
package l7bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a proxy, or several processes of one, or a server, pinned to a CPU.
type Process struct {
	Name    string
	Address string
	cmd     *exec.Cmd
	log     string
}

// Require says which programs are missing.
func Require(programs ...string) error {
	var missing []string
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			missing = append(missing, p)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("not installed: %s (`scripts/install-deps bench` installs what Debian has)", strings.Join(missing, ", "))
	}
	return nil
}

// Pin has this process, with all threads and processes that it starts from now on, run on one CPU; the function that it returns undoes it.
func Pin(cpu int) (undo func() error, err error) {
	var before, set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return nil, fmt.Errorf("pin: %w", err)
	}
	set.Set(cpu)
	return func() error { return allow("self", &before) }, allow("self", &set)
}

// startTime bounds how long a process takes to be ready.
const startTime = 15 * time.Second

// start starts a program on a CPU, and waits until it listens.
func start(ctx context.Context, name string, cpu int, dir, address, program string, args ...string) (*Process, error) {
	p := &Process{Name: name, Address: address, log: filepath.Join(dir, name+".log")}
	output, err := os.Create(p.log)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer output.Close()
	p.cmd = exec.Command("taskset", append([]string{"-c", strconv.Itoa(cpu), program}, args...)...)
	p.cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	p.cmd.Stdout, p.cmd.Stderr = output, output
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	for deadline := time.Now().Add(startTime); ; time.Sleep(20 * time.Millisecond) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", address)
		if err == nil {
			conn.Close()
			return p, nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			text, _ := os.ReadFile(p.log)
			return nil, errors.Join(fmt.Errorf("%s does not listen on %s: %w\n%s", name, address, err, text), p.Stop())
		}
	}
}

func (p *Process) signal(s syscall.Signal) error {
	if err := syscall.Kill(p.cmd.Process.Pid, s); err != nil {
		return fmt.Errorf("signal %s: %w", p.Name, err)
	}
	return nil
}

// says waits until the process has said something so many times.
func (p *Process) says(ctx context.Context, what string, times int, limit time.Duration) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		text, err := os.ReadFile(p.log)
		if err != nil {
			return fmt.Errorf("output of %s: %w", p.Name, err)
		}
		if strings.Count(string(text), what) >= times {
			return nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("%s does not say %q %d times:\n%s", p.Name, what, times, text)
		}
	}
}

// Stop ends the processes.
func (p *Process) Stop() error {
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) // the group that start made
	_ = p.cmd.Wait()
	return nil
}

// each calls f for each process of the group.
func (p *Process) each(f func(pid int)) error {
	group := p.cmd.Process.Pid
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("read /proc: %w", err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if g, err := unix.Getpgid(pid); err == nil && g == group {
			f(pid)
		}
	}
	return nil
}

// clockTick of /proc/PID/stat: 100 on every Linux of today.
const clockTick = 10 * time.Millisecond

// CPU is the time that it used so far.
func (p *Process) CPU() (time.Duration, error) {
	var total time.Duration
	err := p.each(func(pid int) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return
		}
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		for _, i := range []int{11, 12} { // utime, stime
			n, _ := strconv.Atoi(fields[i])
			total += time.Duration(n) * clockTick
		}
	})
	return total, err
}

// Memory is the resident memory in bytes.
func (p *Process) Memory() (total int, err error) {
	err = p.each(func(pid int) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		if err != nil {
			return
		}
		if fields := strings.Fields(string(text)); len(fields) > 1 {
			n, _ := strconv.Atoi(fields[1])
			total += n * os.Getpagesize()
		}
	})
	return total, err
}
