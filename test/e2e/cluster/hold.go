// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// Hold stops a process (SIGSTOP) and returns when every thread of it stands still: a busy machine lets others of them run on until one has taken the signal.
// The function that it returns lets it go on.
func Hold(t testing.TB, pid int) (release func()) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatalf("stop process %d: %v", pid, err)
	}
	Eventually(t, func() error {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil {
			return err
		}
		if len(tasks) == 0 {
			return fmt.Errorf("process %d has no threads", pid)
		}
		for _, task := range tasks {
			text, err := os.ReadFile(task)
			if err != nil {
				return err // it has ended: look again
			}
			// "pid (name) state ...": proc(5)
			if _, state, found := bytes.Cut(text, []byte(") ")); !found || state[0] != 'T' {
				return fmt.Errorf("%s is not stopped", task)
			}
		}
		return nil
	})
	return func() {
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			t.Errorf("continue process %d: %v", pid, err)
		}
	}
}
