// SPDX-License-Identifier: Apache-2.0

// Package netdev makes the network devices, addresses, routes, neighbours and sysctls of a node and of its pods. Every function states
// what must hold and may be called again: what is already right stays as it is.
package netdev

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ErrNoNamespace says that a path holds no network namespace, or none any more.
var ErrNoNamespace = errors.New("no network namespace")

// Namespace is an open network namespace. Close it soon: the handle keeps the namespace and its devices alive.
type Namespace struct {
	path string
	file *os.File
}

// OpenNamespace opens the network namespace that is mounted or linked at path.
func OpenNamespace(path string) (*Namespace, error) {
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("open %s: %w", path, ErrNoNamespace)
		}
		return nil, fmt.Errorf("open namespace: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Type != unix.NSFS_MAGIC {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, ErrNoNamespace), err, f.Close())
	}
	// NS_GET_NSTYPE tells a network namespace from the six other kinds.
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, ErrNoNamespace), err, f.Close())
	}
	return &Namespace{path: path, file: f}, nil
}

// NewNamespace makes a network namespace that lives as long as the handle, or a device's use of it.
func NewNamespace() (*Namespace, error) {
	type result struct {
		ns  *Namespace
		err error
	}
	done := make(chan result, 1)
	go func() {
		// Not unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- result{err: fmt.Errorf("make a network namespace: %w", err)}
			return
		}
		ns, err := OpenNamespace("/proc/thread-self/ns/net")
		done <- result{ns, err}
	}()
	r := <-done
	return r.ns, r.err
}

// Close releases the handle.
func (n *Namespace) Close() error { return n.file.Close() }

// Inode tells namespaces apart while one of them is alive.
func (n *Namespace) Inode() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(n.file.Fd()), &st); err != nil {
		return 0, fmt.Errorf("stat %s: %w", n.path, err)
	}
	return st.Ino, nil
}

// Netlink opens a netlink socket in the namespace. The caller closes it.
func (n *Namespace) Netlink() (*netlink.Handle, error) {
	h, err := netlink.NewHandleAt(netns.NsHandle(n.file.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink in %s: %w", n.path, err)
	}
	return h, nil
}

// Do runs f on a thread that is in the namespace. f must not start goroutines that rely on it.
func (n *Namespace) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		// The thread is never unlocked: it ends with this goroutine, so no other one can find itself in a foreign namespace.
		runtime.LockOSThread()
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter %s: %w", n.path, err)
			return
		}
		done <- f()
	}()
	return <-done
}
