// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	observerpb "github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/test/e2e/cluster"
)

// TestClients asks one lab's observer the way strangers do: the stock hubble CLI, and a client made at run time from the descriptors
// that the server publishes.
func TestClients(t *testing.T) {
	lab := cluster.Up(t, truthPods, shortTimeouts)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	if _, err := lab.Exec(ctx, "default/a", "e2e-traffic", "run", "--count=40", "--targets=10.244.1.102,10.244.2.103,fd00:10:244:2::103"); err != nil {
		t.Fatal(err)
	}
	cluster.Eventually(t, func() error {
		a, err := lab.Flows(ctx, &observerpb.GetFlowsRequest{Number: 1 << 40})
		if err == nil && len(a.Flows) < 100 {
			err = fmt.Errorf("%d flows so far", len(a.Flows))
		}
		return err
	})
	t.Run("published-descriptors", func(t *testing.T) { publishedDescriptors(ctx, t, lab.Conn()) })
	t.Run("stock-hubble", func(t *testing.T) {
		hubble := os.Getenv("HUBBLE")
		if hubble == "" {
			t.Log("NOT RUN: set HUBBLE to the stock hubble binary (CONTRIBUTING.md says how to get one)")
			return
		}
		stockHubble(ctx, t, lab, hubble)
	})
}

// publishedDescriptors calls observer.Observer/GetFlows knowing nothing but what reflection tells.
func publishedDescriptors(ctx context.Context, t *testing.T, conn *grpc.ClientConn) {
	stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	set := &descriptorpb.FileDescriptorSet{}
	have := map[string]bool{}
	var want []string
	ask := func(req *reflectionv1.ServerReflectionRequest) {
		if err := stream.Send(req); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		files := resp.GetFileDescriptorResponse()
		if files == nil {
			t.Fatalf("reflection: %v", resp.GetErrorResponse())
		}
		for _, raw := range files.FileDescriptorProto {
			fd := new(descriptorpb.FileDescriptorProto)
			if err := proto.Unmarshal(raw, fd); err != nil {
				t.Fatal(err)
			}
			if !have[fd.GetName()] {
				have[fd.GetName()] = true
				set.File = append(set.File, fd)
				want = append(want, fd.Dependency...)
			}
		}
	}
	ask(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "observer.Observer"}})
	for len(want) > 0 {
		name := want[0]
		want = want[1:]
		if !have[name] {
			ask(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_FileByFilename{FileByFilename: name}})
		}
	}
	if !have["observer/observer.proto"] || !have["flow/flow.proto"] {
		t.Fatalf("published files %v: want Hubble's paths", have)
	}
	files, err := protodesc.NewFiles(set)
	if err != nil {
		t.Fatal(err)
	}
	method := descriptor(t, files, "observer.Observer").(protoreflect.ServiceDescriptor).Methods().ByName("GetFlows")
	req := dynamicpb.NewMessage(method.Input())
	req.Set(method.Input().Fields().ByName("number"), protoreflect.ValueOfUint64(30))
	call, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/observer.Observer/GetFlows")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(call.SendMsg(req), call.CloseSend()); err != nil {
		t.Fatal(err)
	}
	flows := 0
	for {
		resp := dynamicpb.NewMessage(method.Output())
		err := call.RecvMsg(resp)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		fd := method.Output().Fields().ByName("flow")
		if !resp.Has(fd) {
			continue
		}
		flows++
		f := resp.Get(fd).Message()
		if len(f.GetUnknown()) > 0 || f.Has(f.Descriptor().Fields().ByName("extensions")) {
			t.Errorf("a flow on Hubble's RPC carries more than Hubble's fields: %v", f)
		}
	}
	if flows != 30 {
		t.Errorf("%d flows, want the 30 asked for", flows)
	}
}

func descriptor(t *testing.T, files *protoregistry.Files, name protoreflect.FullName) protoreflect.Descriptor {
	t.Helper()
	d, err := files.FindDescriptorByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func stockHubble(ctx context.Context, t *testing.T, lab *cluster.Lab, hubble string) {
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(ctx, hubble, append(args, "--server", lab.Server)...)
		out, err := cmd.Output()
		if err != nil {
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				t.Fatalf("hubble %v: %v: %s", args, err, exit.Stderr)
			}
			t.Fatalf("hubble %v: %v", args, err)
		}
		return string(out)
	}
	if out := run("status"); !strings.Contains(out, "Healthcheck (via "+lab.Server+"): Ok") || !strings.Contains(out, "Connected Nodes: 2/2") {
		t.Errorf("hubble status:\n%s", out)
	}
	if out := run("list", "nodes"); !strings.Contains(out, "default/node1") || !strings.Contains(out, "Connected") {
		t.Errorf("hubble list nodes:\n%s", out)
	}
	if out := run("list", "namespaces"); !strings.Contains(out, "default") {
		t.Errorf("hubble list namespaces:\n%s", out)
	}
	out := run("observe", "--pod", "default/a", "--protocol", "tcp", "--last", "200")
	for _, want := range []string{"default/a:", "default/c:7000", "(TCP Flags: SYN)", "(TCP Flags: SYN, ACK)", "to-endpoint FORWARDED"} {
		if !strings.Contains(out, want) {
			t.Errorf("hubble observe: no %q in\n%s", want, out)
		}
	}
	lines := strings.Split(strings.TrimSpace(run("observe", "-o", "jsonpb", "--last", "25")), "\n")
	if len(lines) != 25 {
		t.Errorf("hubble observe -o jsonpb --last 25: %d lines", len(lines))
	}
	for _, l := range lines {
		var m struct {
			Flow struct {
				UUID     string `json:"uuid"`
				NodeName string `json:"node_name"`
			} `json:"flow"`
		}
		if err := json.Unmarshal([]byte(l), &m); err != nil || m.Flow.UUID == "" || !strings.HasPrefix(m.Flow.NodeName, "default/node") {
			t.Errorf("line %s: %v", l, err)
		}
	}
	if out := run("observe", "--to-port", "7000", "--tcp-flags", "SYN", "--not", "--verdict", "DROPPED", "-6", "--last", "5"); !strings.Contains(out, "]:7000") && !strings.Contains(out, "default/c:7000") {
		t.Errorf("hubble observe with filters:\n%s", out)
	}
}
