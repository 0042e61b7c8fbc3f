// SPDX-License-Identifier: Apache-2.0

// Package testns gives tests network namespaces of their own, which end with the test. It is imported by tests alone.
package testns

import (
	"fmt"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// New makes a network namespace and returns a path that opens it. A thread holds it until the test ends.
func New(t testing.TB) string {
	t.Helper()
	requireRoot(t)
	path, stop := make(chan string, 1), make(chan struct{})
	ended := make(chan struct{})
	failed := make(chan error, 1)
	go func() {
		defer close(ended)
		// Not unlocked: the thread, and with it the namespace, ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			failed <- fmt.Errorf("unshare: %w", err)
			return
		}
		path <- fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		<-stop
	}()
	select {
	case err := <-failed:
		t.Fatal(err)
		return ""
	case p := <-path:
		t.Cleanup(func() { close(stop); <-ended })
		return p
	}
}

// Do runs f, a test's body, on a thread in a new namespace, as if it were the node's.
func Do(t testing.TB, f func()) {
	t.Helper()
	requireRoot(t)
	done := make(chan struct{})
	var failure error
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if failure = unix.Unshare(unix.CLONE_NEWNET); failure != nil {
			return
		}
		f()
	}()
	<-done
	if failure != nil {
		t.Fatalf("unshare: %v", failure)
	}
}

func requireRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test needs root: it makes network namespaces")
	}
}
