// SPDX-License-Identifier: Apache-2.0

package launch_test

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirmesh/weir/lab/internal/cgroup"
	"github.com/weirmesh/weir/lab/internal/launch"
	"github.com/weirmesh/weir/lab/internal/netns"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes namespaces and control groups")
	}
}

func randomName() string {
	b := make([]byte, 4)
	rand.Read(b)
	return "weirt" + hex.EncodeToString(b)
}

func run(t *testing.T, spec launch.Spec) (stdout, stderr string, code int) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	command, done, err := launch.Command(self, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	var out, errs bytes.Buffer
	command.Stdin = strings.NewReader("input")
	command.Stdout, command.Stderr = &out, &errs
	err = command.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), command.ProcessState.ExitCode()
}

func TestRun(t *testing.T) {
	env := []string{"PATH=/usr/bin:/bin", "WORD=river"}
	for _, tt := range []struct {
		name   string
		spec   launch.Spec
		stdout string
		stderr string
		code   int
	}{
		{"arguments, environment, folder, input", launch.Spec{Args: []string{"sh", "-c", `echo "$0 $WORD $PWD $(cat)"`, "a b"}, Env: env, Dir: "/usr"}, "a b river /usr input\n", "", 0},
		{"nothing of the caller's environment", launch.Spec{Args: []string{"env"}, Env: []string{"PATH=/usr/bin:/bin"}}, "PATH=/usr/bin:/bin\n", "", 0},
		{"exit code", launch.Spec{Args: []string{"sh", "-c", "exit 7"}, Env: env}, "", "", 7},
		{"no such program", launch.Spec{Args: []string{"no-such-program"}, Env: env}, "", "no-such-program: no such program in /usr/bin:/bin", launch.ExitNotFound},
		{"not a program", launch.Spec{Args: []string{"/etc"}, Env: env}, "", "/etc: not executable", launch.ExitFailed},
		{"no such folder", launch.Spec{Args: []string{"true"}, Env: env, Dir: "/no/such"}, "", "enter working folder /no/such", launch.ExitFailed},
		{"no program", launch.Spec{}, "", "launch: no program", launch.ExitFailed},
		{"no such namespace", launch.Spec{Args: []string{"true"}, Env: env, Netns: "/no/such"}, "", "open network namespace /no/such", launch.ExitFailed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, code := run(t, tt.spec)
			if stdout != tt.stdout || !strings.Contains(stderr, tt.stderr) || code != tt.code {
				t.Errorf("got %q, %q, %d; want %q, %q, %d", stdout, stderr, code, tt.stdout, tt.stderr, tt.code)
			}
		})
	}
}

// TestPlace: a program sees the network, host name and files of its place, and the machine keeps its own.
func TestPlace(t *testing.T) {
	needRoot(t)
	name := randomName()
	if err := netns.Create(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Delete(name); err != nil {
			t.Error(err)
		}
	})
	root, err := cgroup.Root()
	if err != nil {
		t.Fatal(err)
	}
	group := filepath.Join(root, name)
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cgroup.Remove(group); err != nil {
			t.Error(err)
		}
	})
	file := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(file, []byte("nameserver 192.0.2.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Fatal(err)
	}
	hostname, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	stdout, stderr, code := run(t, launch.Spec{
		Netns: netns.Path(name), Cgroup: group, Hostname: "pod-1", Binds: []launch.Bind{{Source: file, Target: "/etc/resolv.conf"}},
		Args: []string{"sh", "-c", "cat /proc/sys/kernel/hostname /etc/resolv.conf; tail -n +3 /proc/net/dev | cut -d: -f1; grep -o '" + name + "$' /proc/self/cgroup"},
		Env:  []string{"PATH=/usr/bin:/bin"},
	})
	if want := "pod-1\nnameserver 192.0.2.1\n    lo\n" + name + "\n"; stdout != want || code != 0 {
		t.Errorf("got %q, %q, %d, want %q", stdout, stderr, code, want)
	}
	if now, err := os.Hostname(); err != nil || now != hostname {
		t.Errorf("the machine is called %s now", now)
	}
	if after, err := os.ReadFile("/etc/resolv.conf"); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the machine's resolv.conf is %q now", after)
	}
}
