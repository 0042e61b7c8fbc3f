// SPDX-License-Identifier: Apache-2.0

// Package cluster starts a lab for a test the way a user does, through the binaries in bin/, and asks its observer.
package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	observerpb "github.com/weirmesh/weir/gen/observer"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// Lab is a running lab.
type Lab struct {
	t testing.TB
	// Name of the lab, random.
	Name string
	// Server is the observer's address on the host's loopback.
	Server string
	conn   *grpc.ClientConn
	lab    labv1.LabServiceClient
}

// Root is the folder of the repository.
func Root(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "buf.yaml")); err == nil {
			return dir
		}
	}
	t.Fatal("no buf.yaml above the working folder: run the tests inside the repository")
	return ""
}

// Bin is the path of a binary; the test fails when it was not built.
func Bin(t testing.TB, name string) string {
	t.Helper()
	p := filepath.Join(Root(t), "bin", name)
	if _, err := os.Stat(p); err != nil {
		t.Fatalf("%s is missing: run make build", p)
	}
	return p
}

// Up starts a lab with the manifests (YAML text) and further flags of `weir lab up`, and takes it down at the test's end.
func Up(t testing.TB, manifests string, flags ...string) *Lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test needs root: it makes network namespaces and loads eBPF")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "pods.yaml"), []byte(manifests), 0o600); err != nil {
		t.Fatal(err)
	}
	l := &Lab{t: t, Name: fmt.Sprintf("t%06x", rand.Uint32()&0xffffff), Server: FreePort(t)}
	args := append([]string{"up", "-d", "--name", l.Name, "--manifests", dir, "--observer-listen", l.Server}, flags...)
	if envoy := os.Getenv("WEIR_ENVOY"); envoy != "" { // make envoy-check
		args = append(args, "--proxy-binary", envoy)
	}
	t.Cleanup(func() {
		if t.Failed() {
			l.keepLogs()
		}
		if out, err := exec.Command(Bin(t, "weir-lab"), "down", "--name", l.Name).CombinedOutput(); err != nil {
			t.Errorf("weir lab down: %v\n%s", err, out)
		}
	})
	if out, err := exec.Command(Bin(t, "weir-lab"), args...).CombinedOutput(); err != nil {
		t.Fatalf("weir lab %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	conn, err := grpc.NewClient(l.Server, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	control, err := grpc.NewClient("unix:///run/weir/"+l.Name+"/lab.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	l.conn, l.lab = conn, labv1.NewLabServiceClient(control)
	t.Cleanup(func() { conn.Close(); control.Close() })
	return l
}

func (l *Lab) keepLogs() {
	logs, _ := filepath.Glob(filepath.Join("/run/weir", l.Name, "logs", "*"))
	for _, f := range logs {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		if len(b) > 3000 {
			b = b[len(b)-3000:]
		}
		l.t.Logf("--- %s\n%s", filepath.Base(f), b)
	}
}

// Output is what the containers of a pod have printed.
func (l *Lab) Output(namespace, pod string) string {
	out, err := exec.Command(Bin(l.t, "weir-lab"), "logs", "--name", l.Name, namespace+"/"+pod).CombinedOutput()
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(out))
}

// FreePort is an address on loopback that was free a moment ago.
func FreePort(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// State is what the lab says of itself.
func (l *Lab) State(ctx context.Context) *labv1.GetLabResponse {
	l.t.Helper()
	s, err := l.lab.GetLab(ctx, &labv1.GetLabRequest{})
	if err != nil {
		l.t.Fatalf("state of the lab: %v", err)
	}
	return s
}

// Netns is the path of a pod's network namespace.
func (l *Lab) Netns(ctx context.Context, namespace, pod string) string {
	l.t.Helper()
	for _, p := range l.State(ctx).Pods {
		if p.Namespace == namespace && p.Name == pod {
			return p.Netns
		}
	}
	l.t.Fatalf("the lab has no pod %s/%s", namespace, pod)
	return ""
}

// Control kills (SIGKILL), stops or starts one of Weir's own parts, such as "relay" or "agent/node1".
func (l *Lab) Control(ctx context.Context, part string, action labv1.ControlPartRequest_Action) {
	l.t.Helper()
	if _, err := l.lab.ControlPart(ctx, &labv1.ControlPartRequest{Part: part, Action: action}); err != nil {
		l.t.Fatalf("%s of %s: %v", action, part, err)
	}
}

// Conn is a connection to the observer.
func (l *Lab) Conn() *grpc.ClientConn { return l.conn }

// Weir runs the weir command against the lab and returns its standard output.
func (l *Lab) Weir(args ...string) (string, error) {
	cmd := exec.Command(Bin(l.t, "weir"), args...)
	cmd.Env = append(os.Environ(), "WEIR_SERVER="+l.Server, "WEIR_LAB="+l.Name)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("weir %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String(), nil
}

// Exec runs a command in a pod and returns its standard output.
func (l *Lab) Exec(ctx context.Context, pod string, cmd ...string) (string, error) {
	c := exec.CommandContext(ctx, Bin(l.t, "weir-lab"), append([]string{"exec", "--name", l.Name, pod, "--"}, cmd...)...)
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	if err := c.Run(); err != nil {
		return stdout.String(), fmt.Errorf("exec in %s: %s: %w: %s", pod, strings.Join(cmd, " "), err, stderr.String())
	}
	return stdout.String(), nil
}

// Answer is what the observer said.
type Answer struct {
	Flows []*observerpb.GetFlowsResponse
	Gaps  []*observerv1.Gap
}

// Flows asks Weir's own API, statistics and gaps included.
func (l *Lab) Flows(ctx context.Context, req *observerpb.GetFlowsRequest) (Answer, error) {
	stream, err := observerv1.NewObserverServiceClient(l.conn).GetFlows(ctx, &observerv1.GetFlowsRequest{Request: req})
	if err != nil {
		return Answer{}, err
	}
	var a Answer
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return a, nil
		}
		if err != nil {
			return a, err
		}
		switch item := m.Item.(type) {
		case *observerv1.GetFlowsResponse_Response:
			if item.Response.GetFlow() != nil {
				a.Flows = append(a.Flows, item.Response)
			}
		case *observerv1.GetFlowsResponse_Gap:
			a.Gaps = append(a.Gaps, item.Gap)
		}
	}
}

// patience is how long a test waits for what must come: much longer than it takes on a busy machine, since how fast a thing is belongs into benchmarks.
const patience = time.Minute

// Eventually calls check until it returns nil, and fails with its last error after a minute.
func Eventually(t testing.TB, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still not after %s: %v", patience, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
