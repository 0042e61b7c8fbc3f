// SPDX-License-Identifier: Apache-2.0

package pod_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/lab/internal/cgroup"
	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/cni"
	"github.com/weirmesh/weir/lab/internal/control"
	"github.com/weirmesh/weir/lab/internal/launch"
	"github.com/weirmesh/weir/lab/internal/ledger"
	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/netns"
	"github.com/weirmesh/weir/lab/internal/object"
	"github.com/weirmesh/weir/lab/internal/pod"
	"github.com/weirmesh/weir/lab/internal/process"
)

// TestMain lets the test binary stand in for weir-lab, and for a web server in a pod.
func TestMain(m *testing.M) {
	launch.Intercept()
	if len(os.Args) == 3 && os.Args[1] == "serve" {
		http.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) {
			if _, err := os.Stat(os.Args[2]); err != nil {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		})
		fmt.Fprintln(os.Stderr, http.ListenAndServe("127.0.0.1:8080", nil))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// fakePlugin gives each pod the next address and remembers what it was asked.
type fakePlugin struct {
	mu       sync.Mutex
	failures int
	last     netip.Addr
	plugged  map[string]string // container id -> pod
}

func (p *fakePlugin) Add(_ context.Context, target cni.Pod) ([]netip.Addr, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failures > 0 {
		p.failures--
		return nil, errors.New("the agent is not there")
	}
	if _, err := os.Stat(target.Netns); err != nil {
		return nil, err
	}
	p.last = p.last.Next()
	p.plugged[target.ContainerID] = target.Namespace + "/" + target.Name
	return []netip.Addr{p.last, netip.MustParseAddr("fd00:10:244:1::5")}, nil
}

func (p *fakePlugin) Delete(_ context.Context, target cni.Pod) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.plugged, target.ContainerID)
	return nil
}

type fixture struct {
	*testing.T
	cluster *cluster.Cluster
	runner  *pod.Runner
	plugin  *fakePlugin
	ledger  *ledger.Ledger
	lab     string
	dir     string
	group   string
	node    string
	cancel  context.CancelFunc
	done    chan error
}

// newFixture has a runner that holds nothing back.
func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := newHoldingFixture(t)
	f.runner.Release()
	return f
}

func newHoldingFixture(t *testing.T) *fixture {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes namespaces and control groups")
	}
	b := make([]byte, 4)
	rand.Read(b)
	f := &fixture{T: t, lab: "t" + hex.EncodeToString(b), dir: t.TempDir(), done: make(chan error, 1)}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	root, err := cgroup.Root()
	if err != nil {
		t.Fatal(err)
	}
	f.group = filepath.Join(root, "weir-test-"+f.lab)
	f.node = "weir-" + f.lab + "-node1"
	if f.ledger, err = ledger.Create(filepath.Join(f.dir, "state.json"), f.lab); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.ledger.Add(ledger.Cgroup, f.group), f.ledger.Add(ledger.Namespace, f.node), netns.Create(f.node)); err != nil {
		t.Fatal(err)
	}
	f.plugin = &fakePlugin{last: netip.MustParseAddr("10.244.1.4"), plugged: map[string]string{}}
	f.cluster = cluster.New(cluster.Config{
		Nodes:     []cluster.NodeConfig{{Name: "node1", Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}},
		ServiceV4: netip.MustParsePrefix("10.96.0.0/16"), ServiceV6: netip.MustParsePrefix("fd00:10:96::/112"),
		DNSV4: netip.MustParseAddr("10.96.0.10"), DNSV6: netip.MustParseAddr("fd00:10:96::a"), Now: time.Now,
	})
	f.runner = pod.NewRunner(pod.Config{
		Lab: f.lab, Self: self, Path: "/usr/bin:/bin", Env: []string{"WEIR_LAB=" + f.lab}, Dir: f.dir, Cgroup: f.group,
		DNS:     netip.MustParseAddr("10.96.0.10"),
		Nodes:   map[string]pod.Node{"node1": {Netns: netns.Path(f.node), Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Plugin: f.plugin}},
		Cluster: f.cluster, Ledger: f.ledger, Log: slog.New(slog.DiscardHandler),
	})
	ctx, cancel := context.WithCancel(context.Background())
	f.cancel = cancel
	go func() { f.done <- f.runner.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-f.done; err != nil {
			t.Error(err)
		}
		clean, cancelClean := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancelClean()
		if err := f.ledger.Clean(clean); err != nil {
			t.Error(err)
		}
	})
	return f
}

func (f *fixture) apply(text string) {
	f.Helper()
	items, err := manifest.Parse("f.yaml", []byte(text))
	if err != nil {
		f.Fatal(err)
	}
	if _, err := f.cluster.Apply(items); err != nil {
		f.Fatal(err)
	}
}

// pod makes a manifest; script is a shell's.
func podYAML(name, script, more string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, labels: {app: shop}}\nspec:\n%s  containers:\n  - name: main\n    command: [sh, -c, %q]\n", name, more, script)
}

func (f *fixture) get(name string) (*corev1.Pod, bool) {
	return cluster.Get[*corev1.Pod](f.cluster, object.Key{Kind: "Pod", Namespace: "default", Name: name})
}

// await waits until a pod is as wanted.
func (f *fixture) await(name, what string, ok func(*corev1.Pod) bool) *corev1.Pod {
	f.Helper()
	ctx, cancel := context.WithTimeout(f.Context(), 30*time.Second)
	defer cancel()
	watch := f.cluster.Watch("Pod")
	defer watch.Close()
	for {
		now, exists := f.get(name)
		if exists && ok(now) {
			return now
		}
		if _, err := watch.Next(ctx); err != nil {
			f.Fatalf("pod %s was never %s: %+v", name, what, now)
		}
	}
}

func (f *fixture) awaitStatus(name, want string) *corev1.Pod {
	f.Helper()
	return f.await(name, want, func(p *corev1.Pod) bool { state, _ := control.PodStatus(p); return state == want })
}

func ready(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func (f *fixture) log(name string) string {
	f.Helper()
	log, err := f.runner.Log("default", name, "")
	if err != nil {
		f.Fatal(err)
	}
	var out bytes.Buffer
	if err := log.Copy(f.Context(), &out, -1, false); err != nil {
		f.Fatal(err)
	}
	return out.String()
}

func TestLife(t *testing.T) {
	f := newFixture(t)
	f.plugin.failures = 1
	f.apply(podYAML("web", "echo begun; cat /etc/resolv.conf /etc/hosts; hostname; exec sleep 1000", ""))
	p := f.await("web", "ready", ready)
	if p.Status.PodIP != "10.244.1.5" || len(p.Status.PodIPs) != 2 || p.Status.HostIP != "127.0.0.1" || p.Status.Phase != corev1.PodRunning {
		t.Errorf("status %+v", p.Status)
	}
	wantLog := "begun\nnameserver 10.96.0.10\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n" +
		"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n10.244.1.5\tweb\nfd00:10:244:1::5\tweb\nweb\n"
	deadline := time.Now().Add(20 * time.Second)
	for f.log("web") != wantLog && time.Now().Before(deadline) {
		time.Sleep(5 * time.Millisecond)
	}
	if got := f.log("web"); got != wantLog {
		t.Errorf("log\n%s\nwant\n%s", got, wantLog)
	}

	// Entering it.
	spec, err := f.runner.Locate("default", "web", "")
	if err != nil {
		t.Fatal(err)
	}
	spec.Args = []string{"sh", "-c", "hostname; cat /proc/self/cgroup | grep -c " + f.lab + "/node1/default.web/main; echo $WEIR_LAB"}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	started, err := process.Start(process.Command{Self: self, Launch: spec, Output: &out})
	if err != nil {
		t.Fatal(err)
	}
	if exit := started.Exit(); exit.Code != 0 || out.String() != "web\n1\n"+f.lab+"\n" {
		t.Errorf("exec: %s, %q", exit, out.String())
	}

	netnsName := "weir-" + f.lab + "-default.web"
	if _, err := os.Stat(netns.Path(netnsName)); err != nil {
		t.Error(err)
	}
	f.cluster.Delete([]object.Key{object.KeyOf(p)})
	f.awaitGone("web")
	for _, left := range []string{netns.Path(netnsName), filepath.Join(f.group, "node1", "default.web"), filepath.Join(f.dir, "pods", "default.web")} {
		if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", left, err)
		}
	}
	if len(f.plugin.plugged) != 0 || len(f.ledger.State().Entries) != 2 {
		t.Errorf("left: %v, %v", f.plugin.plugged, f.ledger.State().Entries)
	}
	if _, err := f.runner.Locate("default", "web", ""); !errors.Is(err, pod.ErrNoPod) {
		t.Errorf("a pod that is gone: %v", err)
	}
}

func (f *fixture) awaitGone(name string) {
	f.Helper()
	ctx, cancel := context.WithTimeout(f.Context(), 30*time.Second)
	defer cancel()
	watch := f.cluster.Watch("Pod")
	defer watch.Close()
	for {
		if _, exists := f.get(name); !exists {
			return
		}
		if _, err := watch.Next(ctx); err != nil {
			f.Fatalf("pod %s is never gone", name)
		}
	}
}

func TestEnds(t *testing.T) {
	f := newFixture(t)
	f.apply(podYAML("crash", "exit 3", "") + "---\n" + podYAML("once", "exit 0", "  restartPolicy: Never\n") + "---\n" +
		podYAML("failed", "exit 1", "  restartPolicy: Never\n") + "---\n" + podYAML("until", "[ -e "+f.dir+"/go ]", "  restartPolicy: OnFailure\n") + "---\n" +
		"apiVersion: v1\nkind: Pod\nmetadata: {name: missing}\nspec: {containers: [{name: main, command: [no-such-program]}]}\n")
	p := f.await("crash", "started again", func(p *corev1.Pod) bool {
		return len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].RestartCount >= 2
	})
	if last := p.Status.ContainerStatuses[0].LastTerminationState.Terminated; last == nil || last.ExitCode != 3 {
		t.Errorf("last end: %+v", last)
	}
	if state, why := control.PodStatus(f.awaitStatus("crash", "CrashLoopBackOff")); !strings.Contains(why, "exit code 3") {
		t.Errorf("%s: %s", state, why)
	}
	f.await("once", "succeeded", func(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodSucceeded })
	f.await("failed", "failed", func(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodFailed })
	if _, why := control.PodStatus(f.awaitStatus("missing", "RunContainerError")); !strings.Contains(why, "no-such-program: no such program") {
		t.Errorf("why: %s", why)
	}
	f.awaitStatus("until", "CrashLoopBackOff")
	if err := os.WriteFile(filepath.Join(f.dir, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f.await("until", "succeeded", func(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodSucceeded })
}

func TestEnvironment(t *testing.T) {
	f := newFixture(t)
	f.apply(podYAML("web", "env | sort | grep -v ^PWD; exec sleep 1000", "") + `    envFrom: [{configMapRef: {name: settings}, prefix: S_}]
    env:
    - {name: PLAIN, value: "a $(S_COLOUR) $$(x) $(NONE)"}
    - {name: ONE, valueFrom: {configMapKeyRef: {name: settings, key: COLOUR}}}
    - {name: MAYBE, valueFrom: {configMapKeyRef: {name: settings, key: NOTHING, optional: true}}}
    - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: IPS, valueFrom: {fieldRef: {fieldPath: status.podIPs}}}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    - {name: APP, valueFrom: {fieldRef: {fieldPath: "metadata.labels['app']"}}}
`)
	if _, why := control.PodStatus(f.awaitStatus("web", "CreateContainerConfigError")); !strings.Contains(why, `configmap "settings" not found`) {
		t.Errorf("why: %s", why)
	}
	f.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {COLOUR: blue, SIZE: \"3\"}\n")
	f.await("web", "ready", ready)
	want := "APP=shop\nHOME=/root\nHOSTNAME=web\nIP=10.244.1.5\nIPS=10.244.1.5,fd00:10:244:1::5\nNODE=node1\nONE=blue\nPATH=/usr/bin:/bin\n" +
		"PLAIN=a blue $(x) $(NONE)\nS_COLOUR=blue\nS_SIZE=3\nWEIR_LAB=" + f.lab + "\n"
	deadline := time.Now().Add(20 * time.Second)
	for f.log("web") != want && time.Now().Before(deadline) {
		time.Sleep(5 * time.Millisecond)
	}
	if got := f.log("web"); got != want {
		t.Errorf("environment\n%s\nwant\n%s", got, want)
	}
}

// TestReadiness: probes run from the node's namespace, and their answers come and go.
func TestReadiness(t *testing.T) {
	f := newFixture(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	flag, asked := filepath.Join(f.dir, "ready"), filepath.Join(f.dir, "asked")
	f.apply(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  hostNetwork: true
  containers:
  - name: main
    command: [%[1]q, serve, %[2]q]
    ports: [{name: http, containerPort: 8080}]
    readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 1, failureThreshold: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: command}
spec:
  containers:
  - name: main
    command: [sleep, "1000"]
    readinessProbe: {exec: {command: [test, -e, %[2]q]}}
---
apiVersion: v1
kind: Pod
metadata: {name: port}
spec:
  hostNetwork: true
  containers:
  - name: main
    command: [sleep, "1000"]
    readinessProbe: {tcpSocket: {port: 8080}}
---
apiVersion: v1
kind: Pod
metadata: {name: failing}
spec:
  containers:
  - name: main
    command: [sleep, "1000"]
    readinessProbe: {exec: {command: [sh, -c, 'echo asked >> %[3]s; [ $(wc -l < %[3]s) = 1 ]']}, periodSeconds: 1}
`, self, flag, asked))
	f.await("port", "ready", ready)
	f.await("web", "asked", func(p *corev1.Pod) bool { return strings.Contains(p.Status.Message, "HTTP status 503") })
	if p := f.awaitStatus("command", "Running"); ready(p) {
		t.Error("pod command is ready")
	}
	if err := os.WriteFile(flag, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p := f.await("web", "ready", ready)
	if p.Status.PodIP != "127.0.0.1" {
		t.Errorf("a pod on the node's network has %s", p.Status.PodIP)
	}
	f.await("command", "ready", ready)
	if err := os.Remove(flag); err != nil {
		t.Fatal(err)
	}
	f.await("web", "not ready again", func(p *corev1.Pod) bool { return !ready(p) })
	f.await("failing", "not ready any more", func(p *corev1.Pod) bool { return strings.Contains(p.Status.Message, "probe failed") && !ready(p) })
	if answers, err := os.ReadFile(asked); err != nil || strings.Count(string(answers), "\n") < 4 {
		t.Errorf("not ready after %q, %v: want one success and three failures", answers, err)
	}
	// Its port is in the node's namespace, not in the machine's.
	if conn, err := net.DialTimeout("tcp", "127.0.0.1:8080", 200*time.Millisecond); err == nil {
		conn.Close()
		if !portInUseElsewhere() {
			t.Error("the server listens on the machine's own network")
		}
	}
}

// portInUseElsewhere: somebody else's server on this machine proves nothing.
func portInUseElsewhere() bool {
	response, err := http.Get("http://127.0.0.1:8080/ready")
	if err != nil {
		return true
	}
	response.Body.Close()
	return response.StatusCode != http.StatusServiceUnavailable
}

// TestStubborn: a program that ignores SIGTERM is killed after its grace, and what it started as well.
func TestStubborn(t *testing.T) {
	f := newFixture(t)
	f.apply(podYAML("web", "trap '' TERM; (trap '' TERM; sleep 1000) & while :; do sleep 0.1; done", "  terminationGracePeriodSeconds: 0\n"))
	p := f.await("web", "ready", ready)
	f.cluster.Delete([]object.Key{object.KeyOf(p)})
	f.awaitGone("web")
}

// TestRelease: the system's pods start first, the others when they are let go; one that is deleted before never starts.
func TestRelease(t *testing.T) {
	f := newHoldingFixture(t)
	f.apply(podYAML("web", "exec sleep 1000", "") + "---\n" + podYAML("early", "exec sleep 1000", "") + "---\n" +
		strings.Replace(podYAML("dns", "exec sleep 1000", ""), "{name: dns", "{name: dns, namespace: kube-system", 1))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	watch := f.cluster.Watch("Pod")
	defer watch.Close()
	for {
		dns, _ := cluster.Get[*corev1.Pod](f.cluster, object.Key{Kind: "Pod", Namespace: "kube-system", Name: "dns"})
		if ready(dns) {
			break
		}
		if _, err := watch.Next(ctx); err != nil {
			t.Fatalf("the system's pod does not start: %+v", dns.Status)
		}
	}
	early, _ := f.get("early")
	f.cluster.Delete([]object.Key{object.KeyOf(early)})
	f.awaitGone("early")
	if _, err := f.runner.Locate("default", "web", ""); !errors.Is(err, pod.ErrNoPod) {
		t.Errorf("a pod that is held back: %v", err)
	}
	f.runner.Release()
	f.await("web", "ready", ready)
	if len(f.plugin.plugged) != 2 {
		t.Errorf("plugged in: %v", f.plugin.plugged)
	}
}
