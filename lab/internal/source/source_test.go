// SPDX-License-Identifier: Apache-2.0

package source_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"

	sourcev1 "github.com/weirmesh/weir/gen/weir/source/v1"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/object"
	"github.com/weirmesh/weir/lab/internal/source"
)

// identity writes a certificate and loads it.
func identity(t *testing.T, ca *spiffe.CA, id spiffe.ID) *spiffe.Source {
	t.Helper()
	cert, key, err := ca.Issue(id, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	files := spiffe.Files{Cert: filepath.Join(dir, "c"), Key: filepath.Join(dir, "k"), CA: filepath.Join(dir, "ca")}
	for path, data := range map[string][]byte{files.Cert: cert, files.Key: key, files.CA: ca.CertPEM()} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	source, err := spiffe.Load(files)
	if err != nil {
		t.Fatal(err)
	}
	return source
}

func newCluster(limit int) *cluster.Cluster {
	return cluster.New(cluster.Config{
		Nodes:     []cluster.NodeConfig{{Name: "node1", Addresses: []netip.Addr{netip.MustParseAddr("172.30.0.11")}}},
		ServiceV4: netip.MustParsePrefix("10.96.0.0/16"), ServiceV6: netip.MustParsePrefix("fd00:10:96::/112"),
		DNSV4: netip.MustParseAddr("10.96.0.10"), DNSV6: netip.MustParseAddr("fd00:10:96::a"),
		WatchLimit: limit, Now: time.Now,
	})
}

// fixture serves a cluster's objects as the lab does, and returns a client of the given service.
func fixture(t *testing.T, c *cluster.Cluster, service string) sourcev1.SourceServiceClient {
	t.Helper()
	ca, err := spiffe.NewCA("weir.lab")
	if err != nil {
		t.Fatal(err)
	}
	s := server.New(server.Config{
		Name: "source", Log: slog.New(slog.DiscardHandler), TLS: identity(t, ca, spiffe.ID{TrustDomain: "weir.lab", Service: "source"}),
		Authorize: server.Table{"/" + sourcev1.SourceService_ServiceDesc.ServiceName + "/": {"policy"}}, Drain: time.Millisecond,
	})
	sourcev1.RegisterSourceServiceServer(s.GRPC(), source.New(c, s.Draining()))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, listener) }()
	client := identity(t, ca, spiffe.ID{TrustDomain: "weir.lab", Service: service})
	conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(client.ClientCredentials("source")))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return sourcev1.NewSourceServiceClient(conn)
}

func apply(t *testing.T, c *cluster.Cluster, text string) {
	t.Helper()
	items, err := manifest.Parse("f.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Apply(items); err != nil {
		t.Fatal(err)
	}
}

const pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: a, command: [a]}]}\n"

func TestWatch(t *testing.T) {
	c := newCluster(0)
	apply(t, c, pod)
	client := fixture(t, c, "policy")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stream, err := client.Watch(ctx, &sourcev1.WatchRequest{Kinds: []string{"Pod", "Node"}})
	if err != nil {
		t.Fatal(err)
	}
	next := func(wantType sourcev1.WatchResponse_Type, wantKind, wantName string) []byte {
		t.Helper()
		response, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var object struct {
			APIVersion, Kind string
			Metadata         struct{ Name string }
		}
		if len(response.GetObject()) > 0 {
			if err := json.Unmarshal(response.GetObject(), &object); err != nil {
				t.Fatal(err)
			}
			if object.Kind != wantKind || object.APIVersion != "v1" {
				t.Errorf("object of %s %s, want kind %s", object.APIVersion, object.Kind, wantKind)
			}
		}
		if response.GetType() != wantType || response.GetKind() != wantKind || object.Metadata.Name != wantName {
			t.Errorf("got %v %s %s, want %v %s %s", response.GetType(), response.GetKind(), object.Metadata.Name, wantType, wantKind, wantName)
		}
		return response.GetObject()
	}
	next(sourcev1.WatchResponse_TYPE_ADDED, "Node", "node1")
	next(sourcev1.WatchResponse_TYPE_ADDED, "Pod", "web")
	next(sourcev1.WatchResponse_TYPE_SYNCED, "", "")
	web := cluster.List[*corev1.Pod](c)[0]
	c.SetPodStatus(web.UID, func(s *corev1.PodStatus) { s.PodIPs = []corev1.PodIP{{IP: "10.244.1.5"}} })
	var seen corev1.Pod
	if err := json.Unmarshal(next(sourcev1.WatchResponse_TYPE_MODIFIED, "Pod", "web"), &seen); err != nil {
		t.Fatal(err)
	}
	if len(seen.Status.PodIPs) != 1 || seen.Spec.NodeName != "node1" || seen.UID != web.UID {
		t.Errorf("pod %+v", seen)
	}
	c.Delete([]object.Key{object.KeyOf(web)})
	next(sourcev1.WatchResponse_TYPE_MODIFIED, "Pod", "web")
	c.PodGone(web.UID)
	next(sourcev1.WatchResponse_TYPE_DELETED, "Pod", "web")
}

func TestStatusAndLease(t *testing.T) {
	c := newCluster(0)
	apply(t, c, "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: deny}\nspec: {podSelector: {}}\n")
	client := fixture(t, c, "policy")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, tt := range []struct {
		name    string
		request *sourcev1.UpdateStatusRequest
		want    codes.Code
	}{
		{"whichever", &sourcev1.UpdateStatusRequest{Kind: "NetworkPolicy", Namespace: "default", Name: "deny", Status: []byte(`{"a": 1}`)}, codes.OK},
		{"another uid", &sourcev1.UpdateStatusRequest{Kind: "NetworkPolicy", Namespace: "default", Name: "deny", Uid: "x", Status: []byte(`{}`)}, codes.NotFound},
		{"nobody", &sourcev1.UpdateStatusRequest{Kind: "NetworkPolicy", Namespace: "default", Name: "nobody", Status: []byte(`{}`)}, codes.NotFound},
		{"unknown kind", &sourcev1.UpdateStatusRequest{Kind: "Job", Namespace: "default", Name: "deny", Status: []byte(`{}`)}, codes.InvalidArgument},
		{"no patch", &sourcev1.UpdateStatusRequest{Kind: "NetworkPolicy", Namespace: "default", Name: "deny"}, codes.InvalidArgument},
	} {
		if _, err := client.UpdateStatus(ctx, tt.request); status.Code(err) != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	if got := cluster.List[*object.Raw](c)[0].Status; string(got) != `{"a":1}` {
		t.Errorf("status %s", got)
	}
	for _, holder := range []string{"one", "two"} {
		response, err := client.AcquireLease(ctx, &sourcev1.AcquireLeaseRequest{Name: "writer", Holder: holder, Seconds: 300})
		if err != nil || response.GetHolder() != "one" || response.GetAcquired() != (holder == "one") {
			t.Errorf("%s asks: %v, %v", holder, response, err)
		}
	}
	if _, err := client.AcquireLease(ctx, &sourcev1.AcquireLeaseRequest{Name: "writer", Seconds: 300}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a lease for nobody: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	for _, tt := range []struct {
		name, service string
		kinds         []string
		want          codes.Code
	}{
		{"another service", "relay", nil, codes.PermissionDenied},
		{"unknown kind", "policy", []string{"Job"}, codes.InvalidArgument},
	} {
		t.Run(tt.name, func(t *testing.T) {
			client := fixture(t, newCluster(0), tt.service)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			stream, err := client.Watch(ctx, &sourcev1.WatchRequest{Kinds: tt.kinds})
			if err == nil {
				_, err = stream.Recv()
			}
			if status.Code(err) != tt.want {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

// TestBehind: a client that does not read is told to begin again.
func TestBehind(t *testing.T) {
	c := newCluster(10)
	apply(t, c, pod)
	client := fixture(t, c, "policy")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stream, err := client.Watch(ctx, &sourcev1.WatchRequest{Kinds: []string{"Pod"}})
	if err != nil {
		t.Fatal(err)
	}
	web := cluster.List[*corev1.Pod](c)[0]
	// Larger than what gRPC buffers for a reader that sleeps.
	filler := make([]byte, 256<<10)
	for i := range filler {
		filler[i] = 'x'
	}
	for i := range 100 {
		filler[0] = byte('a' + i%26)
		c.SetPodStatus(web.UID, func(s *corev1.PodStatus) { s.Message = string(filler) })
	}
	for {
		if _, err = stream.Recv(); err != nil {
			break
		}
	}
	if status.Code(err) != codes.Unavailable {
		t.Errorf("got %v, want UNAVAILABLE", err)
	}
}
