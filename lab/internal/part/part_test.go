// SPDX-License-Identifier: Apache-2.0

package part_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/lab/internal/launch"
	"github.com/weirmesh/weir/lab/internal/ledger"
	"github.com/weirmesh/weir/lab/internal/part"
)

// TestMain lets the test binary stand in for weir-lab.
func TestMain(m *testing.M) {
	launch.Intercept()
	os.Exit(m.Run())
}

type fixture struct {
	t       *testing.T
	manager *part.Manager
	ledger  *ledger.Ledger
	dir     string
}

func newFixture(t *testing.T, definitions ...part.Definition) *fixture {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{t: t, dir: t.TempDir()}
	if f.ledger, err = ledger.Create(filepath.Join(f.dir, "state.json"), "test"); err != nil {
		t.Fatal(err)
	}
	f.manager = part.NewManager(self, f.ledger, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() {
		cancel()
		f.manager.Wait()
		if left := f.ledger.State().Entries; len(left) > 0 {
			t.Errorf("processes are left in the ledger: %v", left)
		}
	})
	for _, definition := range definitions {
		definition.Log = filepath.Join(f.dir, definition.Name+".log")
		definition.Launch.Env = []string{"PATH=/usr/bin:/bin"}
		if err := f.manager.Start(ctx, definition); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// await polls the state of a part, which changes by itself.
func (f *fixture) await(what string, ok func(part.Status) bool) part.Status {
	f.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		now := f.manager.List()[0]
		if ok(now) {
			return now
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("never %s: %+v", what, now)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func sleeper() part.Definition {
	return part.Definition{Name: "sleeper", Launch: launch.Spec{Args: []string{"sleep", "1000"}}}
}

func TestControl(t *testing.T) {
	f := newFixture(t, sleeper())
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	first := f.manager.List()[0]
	if first.State != part.Running || first.Pid == 0 {
		t.Fatalf("after the start: %+v", first)
	}
	for _, step := range []struct {
		name string
		do   func(context.Context, string) error
		want part.State
		exit string
	}{
		{"kill", f.manager.Kill, part.Stopped, "killed by signal killed"},
		{"kill again", f.manager.Kill, part.Stopped, "killed by signal killed"},
		{"start", f.manager.StartPart, part.Running, "killed by signal killed"},
		{"start again", f.manager.StartPart, part.Running, "killed by signal killed"},
		{"stop", f.manager.StopPart, part.Stopped, "killed by signal terminated"},
		{"start after stop", f.manager.StartPart, part.Running, "killed by signal terminated"},
	} {
		if err := step.do(ctx, "sleeper"); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		now := f.manager.List()[0]
		if now.State != step.want || (now.Pid != 0) != (step.want == part.Running) || now.LastExit != step.exit || now.Restarts != 0 {
			t.Errorf("after %s: %+v", step.name, now)
		}
	}
	before := f.manager.List()[0].Pid
	if err := f.manager.Crash(ctx, "sleeper"); err != nil {
		t.Fatal(err)
	}
	f.await("started again", func(s part.Status) bool { return s.State == part.Running && s.Pid != before && s.Restarts == 1 })
	now := f.manager.List()[0].Pid
	if err := f.manager.Replace(ctx, "sleeper"); err != nil {
		t.Fatal(err)
	}
	replaced := f.await("replaced", func(s part.Status) bool { return s.State == part.Running && s.Pid != now })
	// Both run; the old one is nobody's concern until the end.
	if err := syscall.Kill(now, 0); err != nil || len(f.ledger.State().Entries) != 2 || replaced.Restarts != 1 {
		t.Errorf("beside %+v the old process: %v; ledger %v", replaced, err, f.ledger.State().Entries)
	}
	if err := f.manager.Kill(ctx, "nobody"); !errors.Is(err, part.ErrUnknown) {
		t.Errorf("unknown part: %v", err)
	}
}

// TestRestart: a part that ends by itself is started again, with the files that are opened for each start.
func TestRestart(t *testing.T) {
	dir := t.TempDir()
	opened := 0
	definition := part.Definition{
		Name:   "short",
		Launch: launch.Spec{Args: []string{"sh", "-c", "cat <&4; exit 3"}},
		Files: func() ([]*os.File, error) {
			opened++
			path := filepath.Join(dir, "file")
			if err := os.WriteFile(path, fmt.Appendf(nil, "start %d\n", opened), 0o600); err != nil {
				return nil, err
			}
			file, err := os.Open(path)
			return []*os.File{file}, err
		},
	}
	f := newFixture(t, definition)
	status := f.await("ended a second time", func(s part.Status) bool { return s.State == part.Waiting && s.Restarts == 1 })
	if status.LastExit != "exit code 3" {
		t.Errorf("exit %q", status.LastExit)
	}
	if data, err := os.ReadFile(status.Log); err != nil || !strings.Contains(string(data), "start 1\nstart 2\n") {
		t.Errorf("log %q, %v", data, err)
	}
}
