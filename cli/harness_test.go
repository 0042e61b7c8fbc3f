// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// now is the time of every command in these tests.
var now = time.Date(2024, 5, 6, 7, 10, 0, 0, time.UTC)

// fakeObserver answers with what it holds and remembers what it was asked.
type fakeObserver struct {
	observer.UnimplementedObserverServer

	mu       sync.Mutex
	requests []*observer.GetFlowsRequest

	// flows is sent for GetFlows of either service; gaps go out on Weir's only.
	flows []*observerv1.GetFlowsResponse
	// err ends the stream after flows; nil = its end, or waiting when the request follows.
	err error
	// events is asked with the request of either event call.
	events func(number uint64, first, follow bool, since, until *timestamppb.Timestamp)
	nodes  []*observer.Node
	status *observer.ServerStatusResponse
}

func (f *fakeObserver) ask(req *observer.GetFlowsRequest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests = append(f.requests, proto.CloneOf(req))
}

func (f *fakeObserver) asked(t *testing.T) *observer.GetFlowsRequest {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.requests) == 0 {
		t.Fatal("the server was not asked")
	}
	return f.requests[len(f.requests)-1]
}

func (f *fakeObserver) finish(ctx context.Context, follow bool) error {
	if f.err != nil || !follow {
		return f.err
	}
	<-ctx.Done()
	return ctx.Err()
}

func (f *fakeObserver) GetFlows(req *observer.GetFlowsRequest, s grpc.ServerStreamingServer[observer.GetFlowsResponse]) error {
	f.ask(req)
	for _, r := range f.flows {
		if r.GetResponse() == nil {
			continue
		}
		if err := s.Send(r.GetResponse()); err != nil {
			return err
		}
	}
	return f.finish(s.Context(), req.GetFollow())
}

func (f *fakeObserver) GetAgentEvents(req *observer.GetAgentEventsRequest, s grpc.ServerStreamingServer[observer.GetAgentEventsResponse]) error {
	if f.events == nil {
		return f.UnimplementedObserverServer.GetAgentEvents(req, s)
	}
	f.events(req.GetNumber(), req.GetFirst(), req.GetFollow(), req.GetSince(), req.GetUntil())
	return s.Send(&observer.GetAgentEventsResponse{AgentEvent: &flow.AgentEvent{Type: flow.AgentEventType_AGENT_STARTED}, Time: second(1)})
}

func (f *fakeObserver) GetDebugEvents(req *observer.GetDebugEventsRequest, s grpc.ServerStreamingServer[observer.GetDebugEventsResponse]) error {
	if f.events == nil {
		return f.UnimplementedObserverServer.GetDebugEvents(req, s)
	}
	f.events(req.GetNumber(), req.GetFirst(), req.GetFollow(), req.GetSince(), req.GetUntil())
	return s.Send(&observer.GetDebugEventsResponse{DebugEvent: &flow.DebugEvent{Message: "m"}, Time: second(1)})
}

func (f *fakeObserver) GetNodes(context.Context, *observer.GetNodesRequest) (*observer.GetNodesResponse, error) {
	return &observer.GetNodesResponse{Nodes: f.nodes}, nil
}

func (f *fakeObserver) GetNamespaces(context.Context, *observer.GetNamespacesRequest) (*observer.GetNamespacesResponse, error) {
	return &observer.GetNamespacesResponse{Namespaces: []*observer.Namespace{{Namespace: "kube-system", Cluster: "default"}, {Namespace: "x"}}}, nil
}

func (f *fakeObserver) ServerStatus(context.Context, *observer.ServerStatusRequest) (*observer.ServerStatusResponse, error) {
	return f.status, nil
}

// fakeWeir is the same server with Weir's own service.
type fakeWeir struct {
	observerv1.UnimplementedObserverServiceServer
	*fakeObserver
	losses *observerv1.GetLossesResponse
}

func (f *fakeWeir) GetFlows(req *observerv1.GetFlowsRequest, s grpc.ServerStreamingServer[observerv1.GetFlowsResponse]) error {
	f.ask(req.GetRequest())
	for _, r := range f.flows {
		if err := s.Send(r); err != nil {
			return err
		}
	}
	return f.finish(s.Context(), req.GetRequest().GetFollow())
}

func (f *fakeWeir) GetLosses(context.Context, *observerv1.GetLossesRequest) (*observerv1.GetLossesResponse, error) {
	return f.losses, nil
}

// command runs weir against a server in memory.
type command struct {
	env      map[string]string
	in       io.Reader
	terminal bool
	dial     grpc.DialOption
	lab      []string

	// started are the programs that were run; output is what each writes, and those with startFails among their arguments fail.
	started            []string
	output, startFails string
}

// serve starts a gRPC server in memory with the services that register adds.
func serve(t *testing.T, register func(*grpc.Server)) *command {
	t.Helper()
	ln := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	register(server)
	done := make(chan error, 1)
	go func() { done <- server.Serve(ln) }()
	t.Cleanup(func() { server.Stop(); <-done })
	return &command{
		env:  map[string]string{"WEIR_SERVER": "passthrough:///memory"},
		dial: grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return ln.DialContext(ctx) }),
	}
}

func serveWeir(t *testing.T, f *fakeObserver) *command {
	return serve(t, func(s *grpc.Server) {
		observer.RegisterObserverServer(s, f)
		observerv1.RegisterObserverServiceServer(s, &fakeWeir{fakeObserver: f, losses: &observerv1.GetLossesResponse{}})
	})
}

func serveHubble(t *testing.T, f *fakeObserver) *command {
	return serve(t, func(s *grpc.Server) { observer.RegisterObserverServer(s, f) })
}

func (c *command) environment(out, errOut io.Writer) Env {
	env := Env{
		In: c.in, Out: out, Err: errOut, Terminal: c.terminal, Version: "v1.2.3",
		Lookup:  func(name string) (string, bool) { v, ok := c.env[name]; return v, ok },
		Now:     func() time.Time { return now },
		Exec:    func(args []string) error { c.lab = args; return nil },
		Program: func(name string) (string, error) { return "/bin/" + name, nil },
		Start: func(_ context.Context, path string, args []string, out, _ io.Writer) error {
			c.started = append(c.started, path+" "+strings.Join(args, " "))
			if c.startFails != "" && slices.Contains(args, c.startFails) {
				return errors.New("exit status 1")
			}
			_, err := io.WriteString(out, c.output)
			return err
		},
	}
	if env.In == nil {
		env.In = strings.NewReader("")
	}
	if c.dial != nil {
		env.DialOptions = []grpc.DialOption{c.dial}
	}
	return env
}

// run executes a command line, given in words, and returns what it wrote and its exit code.
func (c *command) run(t *testing.T, args ...string) (out, errOut string, code int) {
	t.Helper()
	var o, e bytes.Buffer
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	code = Run(ctx, c.environment(&o, &e), args)
	if ctx.Err() != nil {
		t.Fatalf("weir %s did not end", strings.Join(args, " "))
	}
	return o.String(), e.String(), code
}

// must is run for a command that has to succeed without a word on stderr.
func (c *command) must(t *testing.T, args ...string) string {
	t.Helper()
	out, errOut, code := c.run(t, args...)
	if code != 0 || errOut != "" {
		t.Fatalf("weir %s: exit code %d, stderr %q", strings.Join(args, " "), code, errOut)
	}
	return out
}

// fails is run for a command that has to fail with these words, exit code 1 and no output.
func (c *command) fails(t *testing.T, want string, args ...string) {
	t.Helper()
	out, errOut, code := c.run(t, args...)
	if code != 1 || out != "" || errOut != want+"\n" {
		t.Errorf("weir %s: exit code %d, stdout %q\nstderr %swant   %s", strings.Join(args, " "), code, out, errOut, want)
	}
}

func second(n int64) *timestamppb.Timestamp { return &timestamppb.Timestamp{Seconds: n} }

// flowAt is a small flow of second n.
func flowAt(n int64, change ...func(*flow.Flow)) *observerv1.GetFlowsResponse {
	f := &flow.Flow{Time: second(n), Verdict: flow.Verdict_FORWARDED, NodeName: "default/n1", Summary: "s"}
	for _, c := range change {
		c(f)
	}
	return envelope(&observer.GetFlowsResponse{ResponseTypes: &observer.GetFlowsResponse_Flow{Flow: f}, Time: f.GetTime(), NodeName: f.GetNodeName()})
}

func envelope(r *observer.GetFlowsResponse) *observerv1.GetFlowsResponse {
	return &observerv1.GetFlowsResponse{Item: &observerv1.GetFlowsResponse_Response{Response: r}}
}

func gapOf(g *observerv1.Gap) *observerv1.GetFlowsResponse {
	return &observerv1.GetFlowsResponse{Item: &observerv1.GetFlowsResponse_Gap{Gap: g}}
}

// serveSocket serves on a unix socket and returns what ends it.
func serveSocket(t *testing.T, path string, register func(*grpc.Server)) (stop func()) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	register(server)
	done := make(chan error, 1)
	go func() { done <- server.Serve(ln) }()
	stop = sync.OnceFunc(func() { server.Stop(); <-done })
	t.Cleanup(stop)
	return stop
}

// shortDir is a folder whose name leaves room for the path of a unix socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "weir")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
