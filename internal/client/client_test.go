// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

func serve(t *testing.T, addr string) (*grpc.Server, string) {
	t.Helper()
	s, _, at := serveHealth(t, addr)
	return s, at
}

func serveHealth(t *testing.T, addr string) (*grpc.Server, *health.Server, string) {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	h := health.NewServer()
	healthpb.RegisterHealthServer(s, h)
	go func() { _ = s.Serve(ln) }() // ends with Stop
	t.Cleanup(s.Stop)
	return s, h, ln.Addr().String()
}

// With Balance, a replica that says it does not serve gets no calls.
func TestBalanceMindsHealth(t *testing.T) {
	_, well, a := serveHealth(t, "127.0.0.1:0")
	_, ill, b := serveHealth(t, "127.0.0.1:0")
	well.SetServingStatus("who", healthpb.HealthCheckResponse_SERVING)
	ill.SetServingStatus("who", healthpb.HealthCheckResponse_NOT_SERVING)
	ill.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	conn, err := New(Config{Addresses: []string{b, a}, Service: "identity", Balance: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	who := func() healthpb.HealthCheckResponse_ServingStatus {
		r, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: "who"}, grpc.WaitForReady(true))
		if err != nil {
			t.Fatal(err)
		}
		return r.GetStatus()
	}
	for range 20 {
		if who() != healthpb.HealthCheckResponse_SERVING {
			t.Fatal("a call went to the replica that does not serve")
		}
	}
	// When it serves again, it gets its share.
	ill.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
	for who() == healthpb.HealthCheckResponse_SERVING {
	}
}

func TestFailover(t *testing.T) {
	first, a := serve(t, "127.0.0.1:0")
	_, b := serve(t, "127.0.0.1:0")
	conn, err := New(Config{Addresses: []string{a, b}, Service: "policy"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	check := func() error {
		_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true))
		return err
	}
	if err := check(); err != nil {
		t.Fatal(err)
	}
	first.Stop()
	// The call that meets the dying connection may fail; the next one must reach the second replica.
	for err = check(); err != nil && ctx.Err() == nil; err = check() {
	}
	if err != nil {
		t.Errorf("no failover: %v", err)
	}
}

func TestCheckAddresses(t *testing.T) {
	tests := []struct {
		addresses []string
		ok        bool
	}{
		{nil, false}, {[]string{"a:1"}, true}, {[]string{"[fd00::1]:1", "127.0.0.1:2"}, true}, {[]string{"a"}, false}, {[]string{"a:1", ":"}, false},
	}
	for _, tt := range tests {
		if err := CheckAddresses("policy", tt.addresses); (err == nil) != tt.ok {
			t.Errorf("CheckAddresses(%q) = %v", tt.addresses, err)
		}
	}
}
