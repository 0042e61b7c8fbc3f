// SPDX-License-Identifier: Apache-2.0

// Package ledger keeps a list, on disk, of everything that a lab has made on the machine, so that a later process can remove it whatever
// became of the one that made it. An entry is written before the thing is made: an entry without its thing is normal, a thing without
// its entry must not happen.
package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/lab/internal/cgroup"
	"github.com/weirmesh/weir/lab/internal/netns"
)

// Kind says what an entry names, and so how it is removed.
type Kind string

// Kinds, in the order in which they are removed.
const (
	Cgroup    Kind = "cgroup"    // a group: its processes are killed, then it and all below is removed
	Process   Kind = "process"   // a process outside of every group; the name is what it is
	Namespace Kind = "namespace" // a named network namespace
	Tree      Kind = "tree"      // a folder and all in it (files, sockets, bpffs pins)
	Parent    Kind = "parent"    // a folder that several labs share: removed when it is empty
	Mount     Kind = "mount"     // a file system that was mounted: unmounted when it is empty
)

var order = []Kind{Cgroup, Process, Namespace, Tree, Parent, Mount}

// Entry is one thing.
type Entry struct {
	Kind Kind   `json:"kind"`
	Name string `json:"name"`
	// Pid and StartTime (clock ticks since boot) tell a process from a later one with the same pid.
	Pid       int    `json:"pid,omitempty"`
	StartTime uint64 `json:"startTime,omitempty"`
}

// State is the file's content.
type State struct {
	// Lab is the lab's name.
	Lab string `json:"lab"`
	// Supervisor is the process that owns the lab.
	Supervisor Entry   `json:"supervisor"`
	Entries    []Entry `json:"entries"`
}

// Ledger is the list of one lab. Safe for concurrent use.
type Ledger struct {
	path string

	mu    sync.Mutex
	state State
}

// Create starts an empty ledger for this process at path.
func Create(path, lab string) (*Ledger, error) {
	own, err := processEntry("supervisor", os.Getpid())
	if err != nil {
		return nil, err
	}
	l := &Ledger{path: path, state: State{Lab: lab, Supervisor: own}}
	return l, l.write()
}

// Read reads the ledger at path; one that does not exist is an error that wraps os.ErrNotExist.
func Read(path string) (*Ledger, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read ledger: %w", err)
	}
	l := &Ledger{path: path}
	if err := json.Unmarshal(data, &l.state); err != nil {
		return nil, fmt.Errorf("read ledger %s: %w", path, err)
	}
	return l, nil
}

// State returns a copy of what the ledger holds.
func (l *Ledger) State() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	state := l.state
	state.Entries = slices.Clone(state.Entries)
	return state
}

// Add writes down a thing that is about to be made. Adding it again is no error.
func (l *Ledger) Add(kind Kind, name string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	entry := Entry{Kind: kind, Name: name}
	if slices.Contains(l.state.Entries, entry) {
		return nil
	}
	l.state.Entries = append(l.state.Entries, entry)
	return l.write()
}

// AddProcess writes down a running process.
func (l *Ledger) AddProcess(name string, pid int) error {
	entry, err := processEntry(name, pid)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state.Entries = append(l.state.Entries, entry)
	return l.write()
}

// Forget takes a thing off the list after it was removed.
func (l *Ledger) Forget(kind Kind, name string) error {
	return l.forget(func(e Entry) bool { return e.Kind == kind && e.Name == name })
}

// ForgetProcess takes a process off the list after it has ended.
func (l *Ledger) ForgetProcess(pid int) error {
	return l.forget(func(e Entry) bool { return e.Kind == Process && e.Pid == pid })
}

func (l *Ledger) forget(gone func(Entry) bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state.Entries = slices.DeleteFunc(l.state.Entries, gone)
	return l.write()
}

// write replaces the file, so that a reader never sees half of it.
func (l *Ledger) write() error {
	data, err := json.MarshalIndent(l.state, "", " ")
	if err != nil {
		return fmt.Errorf("write ledger: %w", err)
	}
	if err := os.WriteFile(l.path+".new", append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write ledger: %w", err)
	}
	if err := os.Rename(l.path+".new", l.path); err != nil {
		return fmt.Errorf("write ledger: %w", err)
	}
	return nil
}

// Clean removes everything on the list, in an order that works, and returns what could not be removed. Repeatable.
func (l *Ledger) Clean(ctx context.Context) error {
	state := l.State()
	var errs []error
	for _, kind := range order {
		// Last made, first removed: folders before those that hold them.
		for _, entry := range slices.Backward(state.Entries) {
			if entry.Kind != kind {
				continue
			}
			if err := entry.remove(ctx); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

func (e Entry) remove(ctx context.Context) error {
	switch e.Kind {
	case Cgroup:
		if err := cgroup.Kill(ctx, e.Name); err != nil {
			return err
		}
		return cgroup.Remove(e.Name)
	case Process:
		return e.kill()
	case Namespace:
		return netns.Delete(e.Name)
	case Tree:
		if err := os.RemoveAll(e.Name); err != nil {
			return fmt.Errorf("remove tree: %w", err)
		}
	case Parent:
		// Another lab may still use it.
		if err := os.Remove(e.Name); err != nil && !errors.Is(err, os.ErrNotExist) && !isNotEmpty(err) {
			return fmt.Errorf("remove: %w", err)
		}
	case Mount:
		return unmountEmpty(e.Name)
	default:
		return fmt.Errorf("remove %s: unknown kind %q", e.Name, e.Kind)
	}
	return nil
}

func isNotEmpty(err error) bool {
	return errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST)
}

func unmountEmpty(path string) error {
	entries, err := os.ReadDir(path)
	if err != nil || slices.ContainsFunc(entries, func(e os.DirEntry) bool { return !kernelsOwn(e.Name()) }) {
		return nil
	}
	if err := unix.Unmount(path, 0); err != nil && !isNotEmpty(err) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", filepath.Clean(path), err)
	}
	return nil
}

// kernelsOwn reports whether a name in a fresh BPF file system is one that the kernel put there.
func kernelsOwn(name string) bool { return name == "maps.debug" || name == "progs.debug" }
