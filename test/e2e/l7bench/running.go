// SPDX-License-Identifier: Apache-2.0

package l7bench

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Running is a process that somebody else has started.
type Running struct{ pid int }

// Find returns the one process whose program and arguments contain all of these texts.
func Find(program string, texts ...string) (Running, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return Running{}, fmt.Errorf("read /proc: %w", err)
	}
	var found []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			continue // it has ended
		}
		name, rest, _ := strings.Cut(string(line), "\x00")
		if name[strings.LastIndexByte(name, '/')+1:] != program {
			continue
		}
		all := true
		for _, text := range texts {
			all = all && strings.Contains(rest, text)
		}
		if all {
			found = append(found, pid)
		}
	}
	if len(found) != 1 {
		return Running{}, fmt.Errorf("%s %s: %d such processes, want one", program, strings.Join(texts, " "), len(found))
	}
	return Running{found[0]}, nil
}

// Pin has it, with all threads that it starts from now on, run on one CPU.
func (r Running) Pin(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	return allow(strconv.Itoa(r.pid), &set)
}

// CPU is the time that it used so far.
func (r Running) CPU() (time.Duration, error) {
	const allThreads = 2 // CPUCLOCK_SCHED of MAKE_PROCESS_CPUCLOCK
	var ts unix.Timespec
	if err := unix.ClockGettime(^int32(r.pid)<<3|allThreads, &ts); err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", r.pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// allow lets all threads of a process ("self" or a number) run on some CPUs.
func allow(process string, set *unix.CPUSet) error {
	tasks, err := os.ReadDir("/proc/" + process + "/task")
	if err != nil {
		return fmt.Errorf("pin: %w", err)
	}
	for _, t := range tasks {
		id, err := strconv.Atoi(t.Name())
		if err != nil {
			continue
		}
		if err := unix.SchedSetaffinity(id, set); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("pin: %w", err)
		}
	}
	return nil
}
