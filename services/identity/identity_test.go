// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"

	identityv1 "github.com/weirmesh/weir/gen/weir/identity/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/internal/client"
	"github.com/weirmesh/weir/internal/spiffe"
)

const deadline = 30 * time.Second

func files(t *testing.T, ca *spiffe.CA, id spiffe.ID) spiffe.Files {
	t.Helper()
	cert, key, err := ca.Issue(id, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	f := spiffe.Files{Cert: filepath.Join(dir, "c"), Key: filepath.Join(dir, "k"), CA: filepath.Join(dir, "ca")}
	for path, data := range map[string][]byte{f.Cert: cert, f.Key: key, f.CA: ca.CertPEM()} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func source(t *testing.T, ca *spiffe.CA, id spiffe.ID) *spiffe.Source {
	t.Helper()
	s, err := spiffe.Load(files(t, ca, id))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func startService(t *testing.T, ca *spiffe.CA, url string) (addr, socket string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	config := DefaultConfig()
	config.TLS = files(t, ca, spiffe.ID{Service: "identity"})
	config.Listeners = []net.Listener{ln}
	config.Socket = filepath.Join(t.TempDir(), "identity.sock")
	config.NATS = url
	service, err := New(config, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- service.Run(ctx) }()
	t.Cleanup(sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("identity broker: %v", err)
		}
	}))
	return ln.Addr().String(), config.Socket
}

// TestService runs the broker as it runs in a cluster: NATS with mutual TLS and the permissions of
// package bus, calls over mutual TLS and the unix socket.
func TestService(t *testing.T) {
	ca, err := spiffe.NewCA("weir.test")
	if err != nil {
		t.Fatal(err)
	}
	nats, err := bus.NewServer(bus.ServerConfig{
		Listen: "127.0.0.1:0", StoreDir: t.TempDir(), TLS: source(t, ca, spiffe.ID{Service: bus.Service}), SyncAlways: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nats.Shutdown)
	addr, socket := startService(t, ca, nats.URL())
	as := func(service string) identityv1.IdentityServiceClient {
		conn, err := client.New(client.Config{
			Addresses: []string{addr}, TLS: source(t, ca, spiffe.ID{Service: service}), Service: "identity",
			Options: []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.WaitForReady(true))},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return identityv1.NewIdentityServiceClient(conn)
	}
	local, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { local.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	policy, command := as("policy"), identityv1.NewIdentityServiceClient(local)

	labels := []string{"k8s:app=todoui", "k8s:io.kubernetes.pod.namespace=default"}
	var allocated *identityv1.AllocateResponse
	for { // the broker may not have reached NATS yet
		allocated, err = policy.Allocate(ctx, &identityv1.AllocateRequest{Labels: labels})
		if grpcstatus.Code(err) != codes.Unavailable {
			break
		}
	}
	if err != nil || allocated.GetIdentity().GetNumber() != 256 {
		t.Fatalf("Allocate: %v, %v", allocated, err)
	}
	for name, c := range map[string]identityv1.IdentityServiceClient{"policy": policy, "command line": command} {
		got, err := c.Get(ctx, &identityv1.GetRequest{Number: 256})
		if err != nil || strings.Join(got.GetIdentity().GetLabels(), " ") != strings.Join(labels, " ") {
			t.Errorf("%s: Get: %v, %v", name, got, err)
		}
		list, err := c.List(ctx, &identityv1.ListRequest{})
		if err != nil || len(list.GetIdentities()) != 13 || list.GetIdentities()[0].GetNumber() != 1 || list.GetIdentities()[12].GetNumber() != 256 {
			t.Errorf("%s: List: %v, %v", name, list, err)
		}
	}
	if got, err := command.Get(ctx, &identityv1.GetRequest{Number: 9}); err != nil || got.GetIdentity().GetLabels()[0] != "reserved:world-ipv4" {
		t.Errorf("Get of a reserved number: %v, %v", got, err)
	}

	codesOf := []struct {
		name string
		call func() error
		want codes.Code
	}{
		{"allocate on the unix socket", func() error {
			_, err := command.Allocate(ctx, &identityv1.AllocateRequest{Labels: labels})
			return err
		}, codes.PermissionDenied},
		{"allocate by an agent", func() error {
			_, err := as("agent").Allocate(ctx, &identityv1.AllocateRequest{Labels: labels})
			return err
		}, codes.PermissionDenied},
		{"list by a relay", func() error {
			_, err := as("relay").List(ctx, &identityv1.ListRequest{})
			return err
		}, codes.PermissionDenied},
		{"release on the unix socket", func() error {
			_, err := command.Release(ctx, &identityv1.ReleaseRequest{Labels: labels})
			return err
		}, codes.PermissionDenied},
		{"no labels", func() error {
			_, err := policy.Allocate(ctx, &identityv1.AllocateRequest{})
			return err
		}, codes.InvalidArgument},
		{"labels out of order", func() error {
			_, err := policy.Allocate(ctx, &identityv1.AllocateRequest{Labels: []string{labels[1], labels[0]}})
			return err
		}, codes.InvalidArgument},
		{"release of labels without source", func() error {
			_, err := policy.Release(ctx, &identityv1.ReleaseRequest{Labels: []string{"app=x"}})
			return err
		}, codes.InvalidArgument},
		{"no such number", func() error {
			_, err := policy.Get(ctx, &identityv1.GetRequest{Number: 5000})
			return err
		}, codes.NotFound},
		{"release of a set without number", func() error {
			_, err := policy.Release(ctx, &identityv1.ReleaseRequest{Labels: []string{"k8s:app=never"}})
			return err
		}, codes.OK},
	}
	for _, tt := range codesOf {
		if got := grpcstatus.Code(tt.call()); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}

	status, err := statusv1.NewStatusServiceClient(local).GetStatus(ctx, &statusv1.GetStatusRequest{})
	if err != nil || !status.GetReady() || status.GetPart() != "identity" || status.GetDetails()[0].GetValue() != "1" {
		t.Errorf("status: %v, %v", status, err)
	}
}

// TestWithoutNATS: the broker runs, says what it waits for, and answers Unavailable.
func TestWithoutNATS(t *testing.T) {
	ca, err := spiffe.NewCA("weir.test")
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	away := ln.Addr().String()
	ln.Close()
	addr, socket := startService(t, ca, "tls://"+away)
	conn, err := client.New(client.Config{Addresses: []string{addr}, TLS: source(t, ca, spiffe.ID{Service: "policy"}), Service: "identity"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	_, err = identityv1.NewIdentityServiceClient(conn).Allocate(ctx, &identityv1.AllocateRequest{Labels: []string{"k8s:a=1"}}, grpc.WaitForReady(true))
	if grpcstatus.Code(err) != codes.Unavailable {
		t.Errorf("Allocate: %v", err)
	}
	local, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { local.Close() })
	status, err := statusv1.NewStatusServiceClient(local).GetStatus(ctx, &statusv1.GetStatusRequest{})
	if err != nil || status.GetReady() || len(status.GetWaitingFor()) != 1 || status.GetWaitingFor()[0] != "nats" {
		t.Errorf("status: %v, %v", status, err)
	}
}

func TestValidate(t *testing.T) {
	c := DefaultConfig()
	c.Listen, c.Replicas, c.Allocator.Rest = "", 0, -1
	err := c.Validate()
	if err == nil {
		t.Fatal("a faulty configuration is valid")
	}
	for _, want := range []string{"nats is empty", "listen", "nats-replicas", "rest", "tls-key"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("fault %q is not reported: %v", want, err)
		}
	}
}
