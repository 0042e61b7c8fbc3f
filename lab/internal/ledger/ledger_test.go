// SPDX-License-Identifier: Apache-2.0

package ledger_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/lab/internal/cgroup"
	"github.com/weirmesh/weir/lab/internal/ledger"
	"github.com/weirmesh/weir/lab/internal/netns"
)

func randomName() string {
	b := make([]byte, 4)
	rand.Read(b)
	return "weirt" + hex.EncodeToString(b)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// TestClean: what a ledger lists is removed by another reader of the file, also when it was never made or is gone already.
func TestClean(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes namespaces and control groups")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	l, err := ledger.Create(path, "test")
	if err != nil {
		t.Fatal(err)
	}
	root, err := cgroup.Root()
	if err != nil {
		t.Fatal(err)
	}
	name := randomName()
	group := filepath.Join(root, name)
	shared, empty, tree := filepath.Join(dir, "shared"), filepath.Join(dir, "empty"), filepath.Join(dir, "tree")
	for _, entry := range []struct {
		kind ledger.Kind
		name string
	}{
		{ledger.Parent, shared}, {ledger.Parent, empty}, {ledger.Tree, tree}, {ledger.Cgroup, group}, {ledger.Namespace, name},
		{ledger.Namespace, name + "never"}, {ledger.Cgroup, group + "never"}, {ledger.Tree, tree + "never"}, {ledger.Parent, empty + "never"},
	} {
		if err := l.Add(entry.kind, entry.name); err != nil {
			t.Fatal(err)
		}
	}
	if err := netns.Create(name); err != nil {
		t.Fatal(err)
	}
	for _, folder := range []string{filepath.Join(shared, "of another lab"), empty, filepath.Join(tree, "deep"), filepath.Join(group, "below")} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	inGroup := start(t, filepath.Join(group, "below"))
	alone := start(t, "")
	if err := l.AddProcess("sleeper", alone.Process.Pid); err != nil {
		t.Fatal(err)
	}

	// Another process reads what this one wrote.
	again, err := ledger.Read(path)
	if err != nil {
		t.Fatal(err)
	}
	if s := again.State(); s.Lab != "test" || !s.Supervisor.Alive() || s.Supervisor.Pid != os.Getpid() {
		t.Errorf("state %+v", s)
	}
	if err := again.Clean(ctx); err != nil {
		t.Fatal(err)
	}
	for _, gone := range []string{empty, tree, group, netns.Path(name)} {
		if exists(gone) {
			t.Errorf("%s is left", gone)
		}
	}
	if !exists(shared) {
		t.Error("a folder that is not empty was removed")
	}
	for what, command := range map[string]*exec.Cmd{"in the group": inGroup, "alone": alone} {
		var exit *exec.ExitError
		if err := command.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("process %s: %v, want killed", what, err)
		}
	}
	if err := again.Clean(ctx); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func start(t *testing.T, group string) *exec.Cmd {
	t.Helper()
	command := exec.Command("sleep", "1000")
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if group != "" {
		dir, err := os.Open(group)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		command.SysProcAttr.UseCgroupFD, command.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = command.Process.Kill() })
	return command
}

// TestAnotherProcess: a pid that has come to mean another process is left alone.
func TestAnotherProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	l, err := ledger.Create(path, "test")
	if err != nil {
		t.Fatal(err)
	}
	command := start(t, "")
	if err := l.AddProcess("sleeper", command.Process.Pid); err != nil {
		t.Fatal(err)
	}
	entry := l.State().Entries[0]
	if !entry.Alive() {
		t.Error("a running process counts as gone")
	}
	entry.StartTime++
	if entry.Alive() {
		t.Error("a process that started at another time counts as the same")
	}
	if err := command.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = command.Wait() // it was killed
	entry.StartTime--
	if entry.Alive() {
		t.Error("a process that ended counts as running")
	}
	if err := l.ForgetProcess(entry.Pid); err != nil || len(l.State().Entries) != 0 {
		t.Errorf("%v, %v", err, l.State().Entries)
	}
}

func TestReadFaults(t *testing.T) {
	dir := t.TempDir()
	if _, err := ledger.Read(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	path := filepath.Join(dir, "broken")
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Read(path); err == nil {
		t.Error("a broken file was read")
	}
}
