// SPDX-License-Identifier: Apache-2.0

package observer_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	hubble "github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/gen/relay"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/services/observer"
	"github.com/weirmesh/weir/services/observer/internal/testflow"
)

func TestHealthAndReflection(t *testing.T) {
	o := newCluster(t).observer(nil)
	for _, name := range []string{"", "observer.Observer", "hubble.server.Observer", "weir.observer.v1.ObserverService"} {
		r, err := healthpb.NewHealthClient(o.conn).Check(t.Context(), &healthpb.HealthCheckRequest{Service: name})
		if err != nil || r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("health of %q = %v, %v", name, r, err)
		}
	}
	want := []string{"grpc.health.v1.Health", "observer.Observer", "weir.observer.v1.ObserverService"}
	v1, err := reflectionpb.NewServerReflectionClient(o.conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := v1.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	r1, err := v1.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range r1.GetListServicesResponse().GetService() {
		got = append(got, s.GetName())
	}
	// The older version has the same messages under another name.
	alpha, err := o.conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true},
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
	if err != nil {
		t.Fatal(err)
	}
	if err := alpha.SendMsg(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_FileByFilename{FileByFilename: "observer/observer.proto"},
	}); err != nil {
		t.Fatal(err)
	}
	var file reflectionpb.ServerReflectionResponse
	if err := alpha.RecvMsg(&file); err != nil || len(file.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
		t.Errorf("v1alpha reflection = %v, %v", &file, err)
	}
	for _, name := range want {
		if !slices.Contains(got, name) {
			t.Errorf("reflection does not list %s: %v", name, got)
		}
	}
}

// TestNotReady: before the stream is there an observer says so, and answers what it can.
func TestNotReady(t *testing.T) {
	c := newCluster(t)
	c.nats.Shutdown()
	config := observer.DefaultConfig()
	config.Listen, config.NATS, config.TLS = "127.0.0.1:0", c.url, c.files("observer")
	service, err := observer.New(config, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- service.Run(ctx) }()
	conn, err := grpc.NewClient(service.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	r, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{Service: "hubble.server.Observer"}, grpc.WaitForReady(true))
	if err != nil || r.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health = %v, %v", r, err)
	}
	if s, err := hubble.NewObserverClient(conn).ServerStatus(t.Context(), &hubble.ServerStatusRequest{}); err != nil || s.GetNumFlows() != 0 {
		t.Errorf("status = %v, %v", s, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("run: %v", err)
	}
}

// TestListeners: plain text on loopback only, mutual TLS elsewhere; an inherited listener; the
// socket; metrics.
func TestListeners(t *testing.T) {
	c := newCluster(t)
	c.publish(testflow.Flows("node-1", 1, 1, 3, time.Now()))
	call := func(conn *grpc.ClientConn) error {
		_, err := hubble.NewObserverClient(conn).ServerStatus(t.Context(), &hubble.ServerStatusRequest{})
		return err
	}
	dial := func(address string, options ...grpc.DialOption) *grpc.ClientConn {
		conn, err := grpc.NewClient(address, options...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	t.Run("not loopback", func(t *testing.T) {
		o := c.observer(func(config *configType) { config.Listen = "0.0.0.0:0" })
		_, port, err := net.SplitHostPort(o.addr)
		if err != nil {
			t.Fatal(err)
		}
		address := net.JoinHostPort("127.0.0.1", port)
		if err := call(dial(address, grpc.WithTransportCredentials(insecure.NewCredentials()))); status.Code(err) != codes.Unavailable {
			t.Errorf("in plain text: %v", err)
		}
		creds := c.source("policy").ClientCredentials("observer")
		if err := call(dial(address, grpc.WithTransportCredentials(creds))); err != nil {
			t.Errorf("with a certificate: %v", err)
		}
	})
	t.Run("inherited", func(t *testing.T) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		file, err := ln.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		fd, err := syscall.Dup(int(file.Fd())) // the observer closes what it is given
		if err != nil {
			t.Fatal(err)
		}
		_ = file.Close()
		o := c.observer(func(config *configType) { config.ListenFD = fd })
		if o.addr != ln.Addr().String() {
			t.Errorf("serves on %s, not on %s", o.addr, ln.Addr())
		}
		_ = ln.Close()
		if err := call(o.conn); err != nil {
			t.Error(err)
		}
	})
	t.Run("socket and metrics", func(t *testing.T) {
		free, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		metrics := free.Addr().String()
		_ = free.Close()
		socket := filepath.Join(t.TempDir(), "observer.sock")
		o := c.observer(func(config *configType) { config.Socket, config.MetricsListen = socket, metrics })
		o.await("three flows", &hubble.GetFlowsRequest{}, func(a *answer) bool { return len(a.flows) == 3 })
		r, err := statusv1.NewStatusServiceClient(dial("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))).
			GetStatus(t.Context(), &statusv1.GetStatusRequest{})
		if err != nil || r.GetPart() != "observer" || !r.GetReady() || len(r.GetDetails()) == 0 {
			t.Errorf("status = %v, %v", r, err)
		}
		if _, err := statusv1.NewStatusServiceClient(o.conn).GetStatus(t.Context(), &statusv1.GetStatusRequest{}); status.Code(err) != codes.Unauthenticated {
			t.Errorf("status over TCP: %v", err)
		}
		var body string
		eventually(t, "the metrics", func() bool {
			response, err := http.Get("http://" + metrics + "/metrics")
			if err != nil {
				return false
			}
			defer func() { _ = response.Body.Close() }()
			data, err := io.ReadAll(response.Body)
			body = string(data)
			return err == nil
		})
		for _, want := range []string{`weir_observer_flows_total{node="default/node-1"} 3`, "weir_observer_memory_events 3", `weir_observer_batches_total{kind="readable"} 1`} {
			if !strings.Contains(body, want) {
				t.Errorf("metrics lack %s", want)
			}
		}
	})
}

// TestPresence: an idle node is connected while a relay says so, and unavailable when it has gone.
func TestPresence(t *testing.T) {
	c := newCluster(t)
	o := c.observer(func(config *configType) { config.Silence = time.Nanosecond })
	say := func(connected bool) {
		data, err := bus.Presence{Cluster: "default", Node: "node-1", Relay: "r", Address: "10.0.0.1:1", ServerName: "s", Connected: connected}.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.conn.Publish(bus.NodeSubject("node-1"), data); err != nil {
			t.Fatal(err)
		}
	}
	state := func() relay.NodeState {
		r, err := o.hubble.GetNodes(t.Context(), &hubble.GetNodesRequest{})
		if err != nil || len(r.GetNodes()) == 0 {
			return relay.NodeState_UNKNOWN_NODE_STATE
		}
		return r.GetNodes()[0].GetState()
	}
	eventually(t, "the node to be connected", func() bool { say(true); return state() == relay.NodeState_NODE_CONNECTED })
	say(false)
	eventually(t, "the node to be unavailable", func() bool { return state() == relay.NodeState_NODE_UNAVAILABLE })
	a, err := o.flows(&hubble.GetFlowsRequest{})
	if err != nil || len(a.nodes) != 1 || a.nodes[0].GetNodeStatus().GetStateChange() != relay.NodeState_NODE_UNAVAILABLE {
		t.Errorf("node status = %v, %v", a.nodes, err)
	}
	s, err := o.hubble.ServerStatus(t.Context(), &hubble.ServerStatusRequest{})
	if err != nil || s.GetNumUnavailableNodes().GetValue() != 1 || !slices.Equal(s.GetUnavailableNodes(), []string{"default/node-1"}) {
		t.Errorf("status = %v, %v", s, err)
	}
}

// TestDrain: streams that follow end when the observer stops.
func TestDrain(t *testing.T) {
	c := newCluster(t)
	c.publish(testflow.Flows("node-1", 1, 1, 1, time.Now()))
	o := c.observer(nil)
	o.await("a flow", &hubble.GetFlowsRequest{}, func(a *answer) bool { return len(a.flows) == 1 })
	stream, err := o.hubble.GetFlows(t.Context(), &hubble.GetFlowsRequest{Follow: true, Number: 1})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // node status and a flow
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	o.stop()
	if r, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("after the stop: %v, %v", r, err)
	}
}

func TestConfigValidate(t *testing.T) {
	config := observer.DefaultConfig()
	config.Listen, config.MemoryBytes, config.ReplayBytes, config.Settle, config.Patience, config.Silence = "", 5, 0, time.Hour, 0, 0
	err := config.Validate()
	if err == nil {
		t.Fatal("a bad configuration is valid")
	}
	for _, want := range []string{"listen is empty", "nats is empty", "memory-bytes", "replay-bytes", "settle", "patience", "silence", "tls-cert"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %q", want, err)
		}
	}
	config = observer.DefaultConfig()
	config.NATS, config.TLS = "tls://127.0.0.1:1", newCluster(t).files("observer")
	config.ListenFD = int(os.Stdin.Fd()) + 999
	if _, err := observer.New(config, testLog(t)); err == nil || !strings.Contains(err.Error(), "listen-fd") {
		t.Errorf("a bad listen-fd: %v", err)
	}
}
