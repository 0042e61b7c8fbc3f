// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"context"
	"encoding/json"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	grpcxds "google.golang.org/grpc/xds"
	"google.golang.org/grpc/xds/bootstrap"

	"github.com/weirmesh/weir/internal/spiffe"
)

// meshCredentials are the mesh's own certificates, under a name that a bootstrap can say. Their files are the channel's configuration.
type meshCredentials struct{}

func (meshCredentials) Name() string { return "weir-test" }

func (meshCredentials) Build(config json.RawMessage) (credentials.Bundle, func(), error) {
	var files spiffe.Files
	if err := json.Unmarshal(config, &files); err != nil {
		return nil, nil, err
	}
	source, err := spiffe.Load(files)
	if err != nil {
		return nil, nil, err
	}
	return bundle{source.ClientCredentials("xds")}, func() {}, nil
}

type bundle struct {
	transport credentials.TransportCredentials
}

func (b bundle) TransportCredentials() credentials.TransportCredentials { return b.transport }
func (bundle) PerRPCCredentials() credentials.PerRPCCredentials         { return nil }
func (b bundle) NewWithMode(string) (credentials.Bundle, error)         { return b, nil }

// stockClient is grpc-go's own xDS client on a node.
func (c *cluster) stockClient(target string, servers ...string) *grpc.ClientConn {
	c.t.Helper()
	bootstrap.RegisterChannelCredentials(meshCredentials{})
	files := c.files(spiffe.ID{Service: "proxy", Node: "n1"})
	var list []any
	for _, server := range servers {
		list = append(list, map[string]any{
			"server_uri": server, "server_features": []string{"xds_v3"},
			"channel_creds": []any{map[string]any{"type": "weir-test", "config": files}},
		})
	}
	config, err := json.Marshal(map[string]any{"xds_servers": list, "node": map[string]any{"id": "n1"}})
	if err != nil {
		c.t.Fatal(err)
	}
	resolver, err := grpcxds.NewXDSResolverWithConfigForTesting(config)
	if err != nil {
		c.t.Fatal(err)
	}
	conn, err := grpc.NewClient("xds:///"+target, grpc.WithResolvers(resolver), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// backend is a gRPC server that says its name in a header.
func backend(t *testing.T, name string) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		if err := grpc.SetHeader(ctx, metadata.Pairs("backend", name)); err != nil {
			return nil, err
		}
		return next(ctx, req)
	}))
	healthpb.RegisterHealthServer(s, health.NewServer())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().String()
}

// call returns the name of the backend that answered.
func call(t *testing.T, conn *grpc.ClientConn, headers ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(context.Background(), headers...), deadline)
	defer cancel()
	var header metadata.MD
	if _, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.Header(&header), grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	if got := header.Get("backend"); len(got) == 1 {
		return got[0]
	}
	t.Fatalf("headers %v", header)
	return ""
}

// TestStockGRPCClient: grpc-go's xDS client balances and routes by our resources, as they stand in the article.
func TestStockGRPCClient(t *testing.T) {
	v1a, v1b, v2 := backend(t, "v1a"), backend(t, "v1b"), backend(t, "v2")
	resources := append(published(t, nil),
		serviceOf(t, "api-service", v1a), serviceOf(t, "api-service-v1", v1a, v1b), serviceOf(t, "api-service-v2", v2), slotsOf("n1", "route-1"))
	c := newCluster(t, resources...)
	addr, _ := c.xds(nil)
	conn := c.stockClient("production.api-service:80", addr)

	for range 50 {
		if got := call(t, conn, "x-canary", "true"); got != "v2" {
			t.Fatalf("x-canary: true went to %s", got)
		}
	}
	const calls = 1000
	count := map[string]int{}
	for range calls {
		count[call(t, conn)]++
	}
	// 10 % of 1,000 differ from 100 by more than 50 once in a million runs.
	if n := count["v2"]; n < 50 || n > 150 {
		t.Errorf("%d of %d calls went to v2, not about a tenth: %v", n, calls, count)
	}
	if d := count["v1a"] - count["v1b"]; d < -1 || d > 1 {
		t.Errorf("calls were not balanced: %v", count)
	}

	// All traffic follows a new configuration.
	c.policy.set(published(t, func(spec string) string {
		return replaceOnce(t, replaceOnce(t, spec, "weight: 90", "weight: 0"), "weight: 10", "weight: 100")
	})...)
	follow(t, func() bool { return call(t, conn) == "v2" }, 30)
	// And new endpoints.
	v3 := backend(t, "v3")
	c.policy.set(serviceOf(t, "api-service-v2", v3))
	follow(t, func() bool { return call(t, conn) == "v3" }, 30)
}

// follow waits until something is true many times in a row.
func follow(t *testing.T, f func() bool, times int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	for n := 0; n < times; {
		if ctx.Err() != nil {
			t.Fatal("it did not come true")
		}
		n++
		if !f() {
			n = 0
		}
	}
}
