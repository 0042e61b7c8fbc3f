// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
)

// agent answers as a test wants it.
type agent struct {
	agentv1.UnimplementedCNIServiceServer
	err     error
	added   *agentv1.AddRequest
	deleted *agentv1.DeleteRequest
	valid   []*agentv1.Attachment
}

func (a *agent) Add(_ context.Context, r *agentv1.AddRequest) (*agentv1.AddResponse, error) {
	a.added = r
	return &agentv1.AddResponse{Addresses: []string{"10.244.1.5/32", "fd00:10:244:1::5/128"}, Gateways: []string{"169.254.1.1", "fe80::1"},
		Mac: "02:00:00:00:00:01", HostIfname: "wr0123456789", HostMac: "02:00:00:00:00:02", Mtu: 1400}, a.err
}

func (a *agent) Delete(_ context.Context, r *agentv1.DeleteRequest) (*agentv1.DeleteResponse, error) {
	a.deleted = r
	return &agentv1.DeleteResponse{}, a.err
}

func (a *agent) Check(context.Context, *agentv1.CheckRequest) (*agentv1.CheckResponse, error) {
	return &agentv1.CheckResponse{}, a.err
}

func (a *agent) Ready(context.Context, *agentv1.ReadyRequest) (*agentv1.ReadyResponse, error) {
	return &agentv1.ReadyResponse{}, a.err
}

func (a *agent) CollectGarbage(_ context.Context, r *agentv1.CollectGarbageRequest) (*agentv1.CollectGarbageResponse, error) {
	a.valid = r.Valid
	return &agentv1.CollectGarbageResponse{}, a.err
}

func serve(t *testing.T, a *agent) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	agentv1.RegisterCNIServiceServer(s, a)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(ln) }()
	t.Cleanup(func() { s.Stop(); <-done })
	return path
}

func args(socket, extra string) *skel.CmdArgs {
	return &skel.CmdArgs{ContainerID: "c1", Netns: "/run/netns/x", IfName: "eth0",
		Args:      "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_UID=u1",
		StdinData: []byte(`{"cniVersion":"1.1.0","name":"weir","type":"weir-cni","socket":"` + socket + `"` + extra + `}`)}
}

// stdout catches what a command prints.
func stdout(t *testing.T, f func() error) (string, error) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	old := os.Stdout
	os.Stdout = w
	defer func() { os.Stdout = old }()
	callErr := f()
	w.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b), callErr
}

func TestAddPrintsAResult(t *testing.T) {
	a := &agent{}
	socket := serve(t, a)
	out, err := stdout(t, func() error { return add(args(socket, "")) })
	if err != nil {
		t.Fatal(err)
	}
	var r current.Result
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	if r.CNIVersion != "1.1.0" || len(r.IPs) != 2 || r.IPs[0].Address.String() != "10.244.1.5/32" || r.IPs[1].Gateway.String() != "fe80::1" ||
		len(r.Routes) != 2 || r.Routes[0].Dst.String() != "0.0.0.0/0" || len(r.Interfaces) != 2 || r.Interfaces[1].Sandbox != "/run/netns/x" ||
		*r.IPs[0].Interface != 1 || r.Interfaces[0].Mtu != 1400 {
		t.Errorf("result %s", out)
	}
	if a.added.PodName != "web" || a.added.PodNamespace != "default" || a.added.PodUid != "u1" || a.added.ContainerId != "c1" {
		t.Errorf("agent was asked %v", a.added)
	}
}

func TestCommands(t *testing.T) {
	a := &agent{}
	socket := serve(t, a)
	prev := `,"prevResult":{"cniVersion":"1.1.0","ips":[{"address":"10.244.1.5/32"}]}`
	gc := `,"cni.dev/valid-attachments":[{"containerID":"c9","ifname":"eth0"}]`
	for _, tt := range []struct {
		name  string
		do    func(*skel.CmdArgs) error
		extra string
	}{{"DEL", del, ""}, {"CHECK", check, prev}, {"STATUS", ready, ""}, {"GC", collect, gc}} {
		if err := tt.do(args(socket, tt.extra)); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	if a.deleted.GetContainerId() != "c1" || len(a.valid) != 1 || a.valid[0].ContainerId != "c9" {
		t.Errorf("DEL %v, GC %v", a.deleted, a.valid)
	}
}

func TestErrorsAreCNIErrors(t *testing.T) {
	tests := []struct {
		name string
		do   func(*skel.CmdArgs) error
		err  error
		want uint
	}{
		{"no policy yet", add, status.Error(codes.DeadlineExceeded, "x"), types.ErrTryAgainLater},
		{"no address", add, status.Error(codes.ResourceExhausted, "x"), types.ErrTryAgainLater},
		{"faulty field", add, status.Error(codes.InvalidArgument, "netns x"), types.ErrInvalidNetworkConfig},
		{"agent is stopping", add, status.Error(codes.Unavailable, "x"), types.ErrTryAgainLater},
		{"anything else", del, status.Error(codes.Internal, "x"), types.ErrInternal},
		{"not ready", ready, status.Error(codes.Unavailable, "no state"), types.ErrPluginNotAvailable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := &agent{err: tt.err}
			err := tt.do(args(serve(t, a), ""))
			var e *types.Error
			if !errors.As(err, &e) || e.Code != tt.want {
				t.Errorf("%v, want code %d", err, tt.want)
			}
		})
	}
	// Nobody serves the socket.
	err := ready(args(filepath.Join(t.TempDir(), "none"), ""))
	var e *types.Error
	if !errors.As(err, &e) || e.Code != types.ErrPluginNotAvailable {
		t.Errorf("no agent: %v", err)
	}
}

func TestFaultsNameTheField(t *testing.T) {
	tests := []struct{ name, stdin, args, want string }{
		{"not JSON", `{`, "", "JSON"},
		{"no name", `{"socket":"/x"}`, "", "name"},
		{"no socket", `{"name":"weir"}`, "", "socket"},
		{"relative socket", `{"name":"weir","socket":"x"}`, "", "socket"},
		{"long socket", `{"name":"weir","socket":"/` + strings.Repeat("x", 200) + `"}`, "", "socket"},
		{"bad attachment", `{"name":"weir","socket":"/x","cni.dev/valid-attachments":[{"ifname":"eth0"}]}`, "", "valid-attachments[0]"},
		{"bad result", `{"name":"weir","socket":"/x","prevResult":{"ips":"no"}}`, "", "prevResult"},
		{"no pod name", `{"name":"weir","socket":"/x"}`, "K8S_POD_NAMESPACE=a", "K8S_POD_NAME"},
		{"no pod namespace", `{"name":"weir","socket":"/x"}`, "K8S_POD_NAME=a", "K8S_POD_NAMESPACE"},
		{"not a pair", `{"name":"weir","socket":"/x"}`, "K8S_POD_NAME", "KEY=VALUE"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := add(&skel.CmdArgs{StdinData: []byte(tt.stdin), Args: tt.args})
			var e *types.Error
			if !errors.As(err, &e) || !strings.Contains(e.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.1.0","name":"weir","type":"weir-cni","socket":"/run/weir/agent.sock"}`), "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b")
	f.Add([]byte(`{"name":"weir","socket":"/x","prevResult":{"cniVersion":"1.1.0","ips":[{"address":"10.0.0.1/32"}]}}`), "")
	f.Add([]byte(`{"name":"weir","socket":"/x","cni.dev/valid-attachments":[{"containerID":"a","ifname":"b"}]}`), ";;=")
	f.Fuzz(func(t *testing.T, stdin []byte, args string) {
		c, err := ParseConfig(stdin)
		var e *types.Error
		if err != nil && (!errors.As(err, &e) || bytes.ContainsRune([]byte(e.Msg), 0)) {
			t.Errorf("%v is not a CNI error", err)
		}
		if err == nil && (c.Name == "" || !filepath.IsAbs(c.Socket)) {
			t.Errorf("config %+v was taken", c)
		}
		p, err := ParseArgs(args)
		if err != nil && !errors.As(err, &e) {
			t.Errorf("%v is not a CNI error", err)
		}
		if err == nil && (p.Name == "" || p.Namespace == "") {
			t.Errorf("pod %+v was taken", p)
		}
	})
}
