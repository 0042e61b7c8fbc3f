// SPDX-License-Identifier: Apache-2.0

// Package cgroup makes, empties and removes control groups of the version 2 tree.
package cgroup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoMount says that the machine has no version 2 tree.
var ErrNoMount = errors.New("no cgroup2 file system is mounted")

// Root returns where the version 2 tree is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on a hybrid machine.
func Root() (string, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		left, right, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(left)
		// Field 4 is the root of the mount inside its file system: a bind mount of a part of the tree is not what is asked for.
		if ok && strings.HasPrefix(right, "cgroup2 ") && len(fields) > 4 && fields[3] == "/" {
			return fields[4], nil
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	return "", ErrNoMount
}

// Kill kills every process in the group and below it, and waits until none is left. A group that does not exist is no error.
func Kill(ctx context.Context, dir string) error {
	for {
		populated, err := isPopulated(dir)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("kill %s: %w", dir, err)
		}
		if !populated {
			return nil
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0o644); err != nil {
			// Kernels before 5.14 have no cgroup.kill.
			if err := killEach(dir); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("kill %s: processes are left: %w", dir, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Signal sends a signal to every process in the group and below it.
func Signal(dir string, signal unix.Signal) error {
	pids, err := Processes(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, pid := range pids {
		if err := unix.Kill(pid, signal); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("signal %d: %w", pid, err))
		}
	}
	return errors.Join(errs...)
}

func killEach(dir string) error { return Signal(dir, unix.SIGKILL) }

// Processes returns the processes in the group and below it. A group that does not exist has none.
func Processes(dir string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		if err != nil || !entry.IsDir() {
			return err
		}
		data, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		for _, field := range strings.Fields(string(data)) {
			if pid, err := strconv.Atoi(field); err == nil {
				pids = append(pids, pid)
			}
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list processes of %s: %w", dir, err)
	}
	return pids, nil
}

func isPopulated(dir string) (bool, error) {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
	if err != nil {
		return false, err
	}
	return strings.Contains(string(data), "populated 1"), nil
}

// Remove removes the group and those below it, which must be empty. A group that does not exist is no error.
func Remove(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	var errs []error
	for _, entry := range entries {
		if entry.IsDir() {
			errs = append(errs, Remove(filepath.Join(dir, entry.Name())))
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		errs = append(errs, fmt.Errorf("remove %s: %w", dir, err))
	}
	return errors.Join(errs...)
}
