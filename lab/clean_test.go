// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weirmesh/weir/lab/internal/cgroup"
	"github.com/weirmesh/weir/lab/internal/launch"
	"github.com/weirmesh/weir/lab/internal/netns"
)

// binaries is the folder of what a lab needs: that of the repository.
var binaries = sync.OnceValues(func() (string, error) {
	dir, err := filepath.Abs("../bin")
	if err != nil {
		return "", err
	}
	for _, name := range []string{"weir-lab", "weir-agent", "weir-cni", "weir-dns", "weir-proxy", "weir-xds", "weir-policy", "weir-identity", "weir-relay", "weir-observer", "todo"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return "", fmt.Errorf("%s is missing: run make build: %w", name, err)
		}
	}
	return dir, nil
})

// machine stands for the machine of a lab: a network namespace in the place of the machine's own, so that the test sees every trace there,
// and no trace of anybody else.
type machine struct {
	*testing.T
	lab  string
	bin  string
	host string // namespace
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes network namespaces and loads eBPF")
	}
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4)
	rand.Read(b)
	m := &machine{T: t, lab: "c" + hex.EncodeToString(b), bin: bin}
	m.host = "weirt-host-" + m.lab
	if err := netns.Create(m.host); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Delete(m.host); err != nil {
			t.Error(err)
		}
	})
	return m
}

// command prepares a command of weir-lab on the machine.
func (m *machine) command(args ...string) (*exec.Cmd, *bytes.Buffer) {
	m.Helper()
	self := filepath.Join(m.bin, "weir-lab")
	command, done, err := launch.Command(self, launch.Spec{
		Netns: netns.Path(m.host), Args: append([]string{self}, args...), Env: append(os.Environ(), "WEIR_LAB="+m.lab),
	})
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(done)
	var out bytes.Buffer
	command.Stdout, command.Stderr = &out, &out
	return command, &out
}

func (m *machine) run(args ...string) string {
	m.Helper()
	command, out := m.command(args...)
	if err := command.Run(); err != nil {
		m.Fatalf("weir-lab %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out.String()
}

// traces lists everything on the machine that belongs to the lab, or that is in the machine's own namespace.
func (m *machine) traces() []string {
	m.Helper()
	var found []string
	add := func(kind string, names ...string) {
		for _, name := range names {
			found = append(found, kind+" "+name)
		}
	}
	entries, err := os.ReadDir(netns.Dir)
	if err != nil {
		m.Fatal(err)
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), "weir-"+m.lab+"-") {
			add("namespace", entry.Name())
		}
	}
	root, err := cgroup.Root()
	if err != nil {
		m.Fatal(err)
	}
	group := filepath.Join(root, "weir", m.lab)
	for kind, dir := range map[string]string{
		"cgroup": group, "bpffs": "/sys/fs/bpf/weir/" + m.lab, "file": "/run/weir/" + m.lab, "state": "/var/lib/weir/" + m.lab,
	} {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && (entry.IsDir() || kind != "cgroup") {
				add(kind, path)
			}
			return nil
		})
		if err != nil {
			m.Fatal(err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		m.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, "weir-"+m.lab+"-") || strings.Contains(line, "/weir/"+m.lab) {
			add("mount", line)
		}
	}
	add("process", m.processes()...)
	err = netns.Do(netns.Path(m.host), func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, link := range links {
			add("link", link.Attrs().Name+" "+link.Attrs().OperState.String())
		}
		routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, route := range routes {
			add("route", route.String())
		}
		for _, table := range []string{"tcp", "tcp6", "udp", "udp6", "unix"} {
			data, err := os.ReadFile("/proc/thread-self/net/" + table)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(data)) {
				// TIME-WAIT (06) is the kernel's memory of a connection, not a socket.
				if fields := strings.Fields(line); table == "unix" || len(fields) > 3 && fields[3] != "06" {
					add("socket", table+" "+line)
				}
			}
		}
		return nil
	})
	if err != nil {
		m.Fatal(err)
	}
	slices.Sort(found)
	return found
}

// processes are those that run one of the test's programs, or anything in the lab's control group.
func (m *machine) processes() []string {
	m.Helper()
	var found []string
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		m.Fatal(err)
	}
	for _, dir := range dirs {
		group, err := os.ReadFile(filepath.Join(dir, "cgroup"))
		if err != nil {
			continue
		}
		line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || len(line) == 0 {
			// A zombie: whoever adopted it has not looked yet.
			continue
		}
		environ, err := os.ReadFile(filepath.Join(dir, "environ"))
		if err != nil {
			continue
		}
		exe, err := os.Readlink(filepath.Join(dir, "exe"))
		if err != nil {
			continue
		}
		if strings.Contains(string(group), "/weir/"+m.lab+"/") || strings.HasPrefix(exe, m.bin) && strings.Contains(string(environ), "WEIR_LAB="+m.lab+"\x00") {
			found = append(found, strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return found
}

func (m *machine) compare(when string, before []string) {
	m.Helper()
	after := m.traces()
	for _, trace := range after {
		if !slices.Contains(before, trace) {
			m.Errorf("%s, this is left: %s", when, trace)
		}
	}
	for _, trace := range before {
		if !slices.Contains(after, trace) {
			m.Errorf("%s, this is gone: %s", when, trace)
		}
	}
}

const cleanPods = `apiVersion: v1
kind: Pod
metadata:
  name: server
  annotations: {weir.dev/ip-addresses: "10.244.1.80,fd00:10:244:1::80"}
spec:
  nodeName: node1
  containers:
  - name: main
    command: [todo, backend]
    readinessProbe: {httpGet: {path: /todos/, port: 8080}}
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  nodeName: node2
  containers:
  - name: main
    command: [todo, client]
    env: [{name: TODO_URL, value: "http://10.244.1.80:8080/todos/"}, {name: TODO_PERIOD, value: 100ms}]
---
apiVersion: v1
kind: Pod
metadata: {name: neighbour}
spec:
  hostNetwork: true
  nodeName: node2
  containers: [{name: main, command: [sleep, "1000"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: unmanaged, annotations: {weir.dev/unmanaged: "true"}}
spec:
  nodeName: node2
  containers: [{name: main, command: [sleep, "1000"]}]
---
apiVersion: lab.weir.dev/v1
kind: Host
metadata: {name: outside}
spec:
  addresses: [203.0.113.10, "2001:db8::10"]
  containers:
  - name: main
    command: [todo, client]
    env: [{name: TODO_URL, value: "http://[fd00:10:244:1::80]:8080/todos/"}, {name: TODO_PERIOD, value: 100ms}]
`

// up starts a detached lab with pods, and checks that traffic flows in it.
func (m *machine) up(flags ...string) {
	m.Helper()
	m.run(append([]string{"up", "-d", "--manifests", m.manifests()}, flags...)...)
	for _, pod := range []string{"default/client", "host/outside"} {
		deadline := time.Now().Add(20 * time.Second)
		for !strings.Contains(m.run("logs", pod), "200 OK") {
			if time.Now().After(deadline) {
				m.Fatalf("%s reached nobody:\n%s\n%s", pod, m.run("logs", pod), m.run("status"))
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

func (m *machine) manifests() string {
	m.Helper()
	path := filepath.Join(m.TempDir(), "pods.yaml")
	if err := os.WriteFile(path, []byte(cleanPods), 0o600); err != nil {
		m.Fatal(err)
	}
	return path
}

// supervisor is the pid of the lab's supervisor.
func (m *machine) supervisor() int {
	m.Helper()
	var pid int
	if _, err := fmt.Sscanf(m.run("status"), "Lab "+m.lab+", pid %d,", &pid); err != nil {
		m.Fatalf("no pid in the status: %v", err)
	}
	return pid
}

// kill kills the supervisor as nobody can defend against, and waits until it is gone.
func (m *machine) kill() {
	m.Helper()
	pid := m.supervisor()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		m.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		// A zombie has no command line.
		if line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err != nil || len(line) == 0 {
			return
		}
		if time.Now().After(deadline) {
			m.Fatalf("supervisor %d does not die", pid)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestNothingIsLeft(t *testing.T) {
	m := newMachine(t)
	t.Cleanup(func() {
		command, _ := m.command("down")
		_ = command.Run() // after a failure
	})
	before := m.traces()

	m.up()
	during := m.traces()
	for _, kind := range []string{"namespace", "cgroup", "bpffs", "file", "state", "mount", "process", "socket tcp"} {
		if !slices.ContainsFunc(during, func(s string) bool { return strings.HasPrefix(s, kind) && !slices.Contains(before, s) }) {
			t.Errorf("a running lab has no trace of the kind %s: the test would not see one that is left", kind)
		}
	}
	for _, trace := range during {
		if strings.HasPrefix(trace, "link ") && !slices.Contains(before, trace) || strings.HasPrefix(trace, "route ") && !slices.Contains(before, trace) {
			t.Errorf("a running lab changes the machine's own network: %s", trace)
		}
	}
	m.run("down")
	m.compare("after down", before)

	m.up("--separate")
	m.kill()
	m.run("down")
	m.compare("after kill -9 and down", before)

	m.up()
	m.kill()
	m.up()
	m.run("down")
	m.compare("after kill -9, up and down", before)
	if got := m.run("down"); got != "lab "+m.lab+" is not up\n" {
		t.Errorf("down of nothing: %s", got)
	}
	m.compare("after a second down", before)
}

// TestInterrupt: Ctrl-C ends a lab in the foreground.
func TestInterrupt(t *testing.T) {
	m := newMachine(t)
	before := m.traces()
	command, out := m.command("up", "--manifests", m.manifests())
	command.Stdout = nil
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = command.Process.Kill() })
	var words bytes.Buffer
	chunk := make([]byte, 4096)
	for !strings.Contains(words.String(), "Ctrl-C ends the lab") {
		n, err := stdout.Read(chunk)
		words.Write(chunk[:n])
		if err != nil {
			t.Fatalf("it ended: %v\n%s\n%s", err, words.String(), out)
		}
	}
	if err := command.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := command.Wait(); err != nil {
		t.Errorf("after Ctrl-C: %v\n%s", err, out)
	}
	m.compare("after Ctrl-C", before)
}

// TestStartFails: a lab whose agents do not start is taken away again, and says why.
func TestStartFails(t *testing.T) {
	m := newMachine(t)
	before := m.traces()
	command, out := m.command("up", "-d", "--agent-arg=--no-such-flag")
	var exit *exec.ExitError
	if err := command.Run(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("up: %v", err)
	}
	if !strings.Contains(out.String(), "agent/node1 is not ready") || !strings.Contains(out.String(), "unknown flag: --no-such-flag") {
		t.Errorf("it does not say why:\n%s", out)
	}
	m.compare("after a start that failed", before)

	broken := filepath.Join(t.TempDir(), "broken.yaml")
	if err := os.WriteFile(broken, []byte("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	command, out = m.command("up", "-d", "--manifests", broken)
	if err := command.Run(); err == nil || !strings.Contains(out.String(), broken+":4: spec.containers: required: at least one container") {
		t.Errorf("a broken manifest: %v\n%s", err, out)
	}
	m.compare("after a broken manifest", before)
}

// TestTwoLabs: two labs with the same addresses run side by side, and one ends without the other noticing.
func TestTwoLabs(t *testing.T) {
	m := newMachine(t)
	other := newMachine(t)
	// One machine for both.
	if err := netns.Delete(other.host); err != nil {
		t.Fatal(err)
	}
	other.host = m.host
	before, otherBefore := m.traces(), other.traces()
	for _, lab := range []*machine{m, other} {
		t.Cleanup(func() {
			command, _ := lab.command("down")
			_ = command.Run() // after a failure
		})
	}
	m.up()
	command, out := other.command("up", "-d")
	if err := command.Run(); err == nil || !strings.Contains(out.String(), "--observer-listen") {
		t.Errorf("a second lab on the same port: %v\n%s", err, out)
	}
	other.up("--observer-listen", "127.0.0.1:14245")
	command, out = m.command("up", "-d")
	if err := command.Run(); err == nil || !strings.Contains(out.String(), "lab is already up") {
		t.Errorf("the same lab twice: %v\n%s", err, out)
	}
	m.run("down")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	logs, _ := other.command("logs", "default/client", "--follow", "--tail=0")
	stdout, err := func() (fs.File, error) {
		logs.Stdout = nil
		pipe, err := logs.StdoutPipe()
		f, _ := pipe.(*os.File)
		return f, err
	}()
	if err != nil {
		t.Fatal(err)
	}
	if err := logs.Start(); err != nil {
		t.Fatal(err)
	}
	context.AfterFunc(ctx, func() { _ = logs.Process.Kill() })
	line := make([]byte, 200)
	if n, err := stdout.Read(line); err != nil || !strings.Contains(string(line[:n]), "200 OK") {
		t.Errorf("the other lab's client after the end of the first: %q, %v", line[:n], err)
	}
	_ = logs.Process.Kill() // it follows for ever
	_ = logs.Wait()
	other.run("down")
	m.compare("after both", before)
	other.compare("after both", otherBefore)
}
