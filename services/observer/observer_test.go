// SPDX-License-Identifier: Apache-2.0

package observer_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/weirmesh/weir/gen/flow"
	hubble "github.com/weirmesh/weir/gen/observer"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/services/observer"
	"github.com/weirmesh/weir/services/observer/internal/testflow"
)

// configType is short for what tests change.
type configType = observer.Config

// cluster is a NATS server with mutual TLS, and whatever was started beside it.
type cluster struct {
	t     testing.TB
	ca    *spiffe.CA
	dir   string
	store string
	nats  *bus.Server
	url   string
	js    jetstream.JetStream
	conn  *nats.Conn
}

func newCluster(t testing.TB) *cluster {
	t.Helper()
	ca, err := spiffe.NewCA("test.local")
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, ca: ca, dir: t.TempDir(), store: t.TempDir()}
	c.startNATS("127.0.0.1:0")
	t.Cleanup(func() { c.nats.Shutdown() })
	c.conn, err = bus.Connect(c.url, c.source("relay").ClientTLS(bus.Service), testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.conn.Close)
	c.js, err = jetstream.New(c.conn)
	if err != nil {
		t.Fatal(err)
	}
	c.ensureStream()
	return c
}

func (c *cluster) startNATS(listen string) {
	c.t.Helper()
	var err error
	c.nats, err = bus.NewServer(bus.ServerConfig{Listen: listen, StoreDir: c.store, TLS: c.source("nats")})
	if err != nil {
		c.t.Fatal(err)
	}
	c.url = c.nats.URL()
}

func (c *cluster) ensureStream() {
	c.t.Helper()
	eventually(c.t, "the stream", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err := bus.EnsureFlowStream(ctx, c.js, bus.StreamConfig{MaxBytes: 1 << 30})
		return err == nil
	})
}

func (c *cluster) files(service string) spiffe.Files {
	c.t.Helper()
	cert, key, err := c.ca.Issue(spiffe.ID{TrustDomain: "test.local", Service: service}, time.Hour)
	if err != nil {
		c.t.Fatal(err)
	}
	f := spiffe.Files{
		Cert: filepath.Join(c.dir, service+".crt"), Key: filepath.Join(c.dir, service+".key"), CA: filepath.Join(c.dir, "ca.crt"),
	}
	for path, data := range map[string][]byte{f.Cert: cert, f.Key: key, f.CA: c.ca.CertPEM()} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
	return f
}

func (c *cluster) source(service string) *spiffe.Source {
	c.t.Helper()
	s, err := spiffe.Load(c.files(service))
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

// publish stores a batch as a relay does.
func (c *cluster) publish(b *flowv1.Batch) {
	c.t.Helper()
	c.publishRaw(b.GetHeader().GetNode(), testflow.Encode(b))
}

func (c *cluster) publishRaw(node string, data []byte) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := c.js.Publish(ctx, bus.FlowSubject(node), data); err != nil {
		c.t.Fatal(err)
	}
}

// observer starts an observer and waits until it serves.
func (c *cluster) observer(change func(*observer.Config)) *client {
	c.t.Helper()
	config := observer.DefaultConfig()
	config.Listen = "127.0.0.1:0"
	config.NATS = c.url
	config.Instance = "test"
	config.TLS = c.files("observer")
	config.Window, config.Settle = 50*time.Millisecond, 0
	config.Patience = 200 * time.Millisecond
	if change != nil {
		change(&config)
	}
	service, err := observer.New(config, testLog(c.t))
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- service.Run(ctx) }()
	stop := func() {
		cancel()
		if err := <-done; err != nil {
			c.t.Errorf("observer: %v", err)
		}
		done <- nil
	}
	c.t.Cleanup(stop)
	conn, err := grpc.NewClient(service.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = conn.Close() })
	eventually(c.t, "the observer to be ready", service.Ready)
	return &client{
		t: c.t, addr: service.Addr().String(), conn: conn, stop: stop,
		hubble: hubble.NewObserverClient(conn), weir: observerv1.NewObserverServiceClient(conn),
	}
}

// client asks an observer.
type client struct {
	t      testing.TB
	addr   string
	conn   *grpc.ClientConn
	stop   func()
	hubble hubble.ObserverClient
	weir   observerv1.ObserverServiceClient
}

// answer is what a call returned.
type answer struct {
	flows []*flow.Flow
	lost  []*hubble.GetFlowsResponse
	nodes []*hubble.GetFlowsResponse
	gaps  []*observerv1.Gap
	all   []*hubble.GetFlowsResponse
}

func (a *answer) add(r *hubble.GetFlowsResponse) {
	a.all = append(a.all, r)
	switch {
	case r.GetFlow() != nil:
		a.flows = append(a.flows, r.GetFlow())
	case r.GetLostEvents() != nil:
		a.lost = append(a.lost, r)
	case r.GetNodeStatus() != nil:
		a.nodes = append(a.nodes, r)
	}
}

func (a *answer) uuids() []string {
	var out []string
	for _, f := range a.flows {
		out = append(out, f.GetUuid())
	}
	return out
}

func (c *client) flows(request *hubble.GetFlowsRequest) (*answer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	stream, err := c.hubble.GetFlows(ctx, request)
	if err != nil {
		return nil, err
	}
	a := &answer{}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return a, nil
		}
		if err != nil {
			return a, err
		}
		a.add(r)
	}
}

func (c *client) weirFlows(request *hubble.GetFlowsRequest) (*answer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	stream, err := c.weir.GetFlows(ctx, &observerv1.GetFlowsRequest{Request: request})
	if err != nil {
		return nil, err
	}
	a := &answer{}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return a, nil
		}
		if err != nil {
			return a, err
		}
		if r.GetGap() != nil {
			a.gaps = append(a.gaps, r.GetGap())
			continue
		}
		a.add(r.GetResponse())
	}
}

// await asks until the answer is as wanted.
func (c *client) await(what string, request *hubble.GetFlowsRequest, ok func(*answer) bool) *answer {
	c.t.Helper()
	var last *answer
	eventually(c.t, what, func() bool {
		a, err := c.weirFlows(request)
		if err != nil {
			c.t.Logf("get flows: %v", err)
			return false
		}
		last = a
		return ok(a)
	})
	return last
}

// eventually polls a condition that another goroutine will make true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("gave up waiting for %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func testLog(t testing.TB) *slog.Logger {
	t.Helper()
	level := slog.LevelWarn
	if testing.Verbose() {
		level = slog.LevelInfo
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: level}))
}
