// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

func processEntry(name string, pid int) (Entry, error) {
	start, err := startTime(pid)
	if err != nil {
		return Entry{}, fmt.Errorf("note process %d: %w", pid, err)
	}
	return Entry{Kind: Process, Name: name, Pid: pid, StartTime: start}, nil
}

// Alive reports whether the process of this entry runs: the same pid, started at the same moment, not a zombie.
func (e Entry) Alive() bool {
	if e.Pid <= 0 {
		return false
	}
	start, err := startTime(e.Pid)
	return err == nil && start == e.StartTime
}

// kill kills the process, by a handle that cannot come to mean another one between the check and the signal.
func (e Entry) kill() error {
	fd, err := unix.PidfdOpen(e.Pid, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("kill %s (pid %d): %w", e.Name, e.Pid, err)
	}
	defer unix.Close(fd)
	if !e.Alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill %s (pid %d): %w", e.Name, e.Pid, err)
	}
	return nil
}

// startTime returns field 22 of /proc/PID/stat. A zombie counts as gone.
func startTime(pid int) (uint64, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, unix.ESRCH) {
		return 0, os.ErrNotExist
	}
	if err != nil {
		return 0, err
	}
	// The second field is the name in parentheses, which may itself hold parentheses and blanks.
	end := bytes.LastIndexByte(data, ')')
	fields := bytes.Fields(data[end+1:])
	if end < 0 || len(fields) < 20 {
		return 0, fmt.Errorf("read /proc/%d/stat: %q", pid, data)
	}
	if state := fields[0][0]; state == 'Z' || state == 'X' {
		return 0, os.ErrNotExist
	}
	start, err := strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read /proc/%d/stat: %w", pid, err)
	}
	return start, nil
}
