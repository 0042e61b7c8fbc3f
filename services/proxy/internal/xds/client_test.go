// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weirmesh/weir/services/proxy/internal/fakexds"
	"github.com/weirmesh/weir/services/proxy/internal/xds"
)

// fake takes everything but what is called bad.
type fake struct {
	mu    sync.Mutex
	have  map[string]string // type and name -> version
	names []string
}

func (f *fake) Apply(typeURL string, changed []xds.Resource, removed []string) map[string]error {
	f.mu.Lock()
	defer f.mu.Unlock()
	refused := map[string]error{}
	for _, r := range changed {
		if strings.HasPrefix(r.Name, "bad") {
			refused[r.Name] = errors.New("it is bad")
			continue
		}
		f.have[typeURL+" "+r.Name] = r.Version
	}
	for _, name := range removed {
		delete(f.have, typeURL+" "+name)
	}
	return refused
}

func (f *fake) Names(typeURL string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if typeURL == xds.Endpoint {
		return slices.Clone(f.names)
	}
	return nil
}

func (f *fake) want(names ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.names = names
}

func (f *fake) has(key string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, ok := f.have[key]
	return ok
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(2 * time.Millisecond) // the pause of a poll
	}
}

func start(t *testing.T) (*fakexds.Server, *fake, *xds.Client) {
	t.Helper()
	server, f := fakexds.New(), &fake{have: map[string]string{}}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server.Serve(t, ln)
	conn, err := grpc.NewClient(ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	client := xds.New(xds.Config{Conn: conn, Node: &corev3.Node{Id: "n"}, Handler: f, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() {
		if err := client.Run(ctx); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); group.Wait() })
	return server, f, client
}

func TestServerMisbehaves(t *testing.T) {
	server, f, client := start(t)
	server.Set(t, "good", &clusterv3.Cluster{Name: "good"})
	server.Set(t, "bad one", &clusterv3.Cluster{Name: "bad one"})
	server.SetAny("other type", xds.Cluster, &anypb.Any{TypeUrl: xds.Listener})
	server.SetAny("huge", xds.Cluster, &anypb.Any{TypeUrl: xds.Cluster, Value: make([]byte, 17<<20)})
	until(t, "what is good", func() bool { return f.has(xds.Cluster+" good") && client.Configured() })
	until(t, "what is refused, by name", func() bool {
		all := strings.Join(server.Nacks(), "\n")
		return strings.Contains(all, `"bad one": it is bad`) && strings.Contains(all, `"other type": it is a `+xds.Listener) && strings.Contains(all, `"huge": `)
	})
	// On another stream it says what it has, and gets what it refused again.
	before := len(server.Requests())
	server.Cut()
	until(t, "the refusals of a new stream", func() bool { return len(server.Nacks()) > 1 && server.Streams() > 1 })
	for _, r := range server.Requests()[before:] {
		if v := r.GetInitialResourceVersions(); r.GetTypeUrl() == xds.Cluster && r.GetResponseNonce() == "" && (len(v) != 1 || v["good"] == "") {
			t.Errorf("it says that it has %v", v)
		}
	}
	server.Delete(xds.Cluster, "good")
	until(t, "the removal", func() bool { return !f.has(xds.Cluster + " good") })
}

func TestNamesFollow(t *testing.T) {
	server, f, client := start(t)
	for _, name := range []string{"a", "b"} {
		server.Set(t, name, &endpointv3.ClusterLoadAssignment{ClusterName: name})
	}
	f.want("a")
	client.Kick()
	until(t, "the first name", func() bool { return f.has(xds.Endpoint + " a") })
	if f.has(xds.Endpoint + " b") {
		t.Error("what was not asked for came")
	}
	f.want("b")
	client.Kick()
	until(t, "the other name, without the first", func() bool { return f.has(xds.Endpoint+" b") && !f.has(xds.Endpoint+" a") })
	for _, r := range server.Requests() {
		if slices.Equal(r.GetResourceNamesUnsubscribe(), []string{"a"}) {
			return
		}
	}
	t.Error("the first name was never given up")
}

func TestLongReasonsAreCut(t *testing.T) {
	server, _, _ := start(t)
	for range 3 {
		server.Set(t, "bad "+strings.Repeat("x", 9000), &clusterv3.Cluster{})
	}
	until(t, "a refusal", func() bool { return len(server.Nacks()) > 0 })
	if n := len(server.Nacks()[0]); n > 9000 {
		t.Errorf("a reason of %d bytes", n)
	}
}
