// SPDX-License-Identifier: Apache-2.0

// Package netns makes, enters and deletes named network namespaces, in the place where `ip netns` looks for them.
package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// Dir is where named namespaces are mounted.
const Dir = "/run/netns"

// Path returns the path of a named namespace.
func Path(name string) string { return filepath.Join(Dir, name) }

// Create makes a namespace with its loopback up. A name that exists is an error that wraps os.ErrExist.
func Create(name string) error {
	if err := os.MkdirAll(Dir, 0o755); err != nil {
		return fmt.Errorf("create namespace %s: %w", name, err)
	}
	file, err := os.OpenFile(Path(name), os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("create namespace %s: %w", name, err)
	}
	file.Close()
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread is in another namespace, and ends with this goroutine.
		runtime.LockOSThread()
		done <- unshareInto(Path(name))
	}()
	if err := <-done; err != nil {
		return errors.Join(fmt.Errorf("create namespace %s: %w", name, err), Delete(name))
	}
	return nil
}

func unshareInto(path string) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	source := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
	if err := unix.Mount(source, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", path, err)
	}
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("name loopback: %w", err)
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request); err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	return nil
}

// Delete removes a namespace's name; the namespace ends with its last process. A name that does not exist is no error.
func Delete(name string) error {
	path := Path(name)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount namespace %s: %w", name, err)
	}
	// Removing the file also takes the mount out of every other mount namespace that has a copy of it.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("delete namespace %s: %w", name, err)
	}
	return nil
}

// Do runs f on a thread inside the namespace at path. What f opens (sockets, netlink) stays in that namespace; goroutines that f starts
// do not run inside it.
func Do(path string, f func() error) error {
	target, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	defer target.Close()
	runtime.LockOSThread()
	own, err := os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own namespace: %w", err)
	}
	defer own.Close()
	if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter namespace %s: %w", path, err)
	}
	result := f()
	if err := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); err != nil {
		// The thread stays locked, so that it ends with the goroutine and nobody else runs on it.
		return errors.Join(result, fmt.Errorf("leave namespace %s: %w", path, err))
	}
	runtime.UnlockOSThread()
	return result
}

// Sysctl writes kernel settings of the namespace at path: names under /proc/sys/net, such as ipv4/ip_forward.
func Sysctl(path string, values map[string]string) error {
	return Do(path, func() error {
		var errs []error
		for name, value := range values {
			if err := os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0o644); err != nil {
				errs = append(errs, fmt.Errorf("set %s to %s: %w", name, value, err))
			}
		}
		return errors.Join(errs...)
	})
}
