// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	relayv1 "github.com/weirmesh/weir/gen/weir/relay/v1"
	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/services/relay"
)

const trustDomain = "test.local"

// cluster is a NATS server and relays.
type cluster struct {
	t     *testing.T
	ca    *spiffe.CA
	dir   string
	store string
	nats  *bus.Server
	url   string
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	ca, err := spiffe.NewCA(trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, ca: ca, dir: t.TempDir(), store: t.TempDir()}
	c.startNATS("127.0.0.1:0")
	t.Cleanup(func() { c.nats.Shutdown() })
	return c
}

func (c *cluster) startNATS(listen string) {
	c.t.Helper()
	var err error
	c.nats, err = bus.NewServer(bus.ServerConfig{Listen: listen, StoreDir: c.store, TLS: c.source(c.ca, spiffe.ID{Service: "nats"})})
	if err != nil {
		c.t.Fatal(err)
	}
	c.url = c.nats.URL()
}

func (c *cluster) files(ca *spiffe.CA, id spiffe.ID) spiffe.Files {
	c.t.Helper()
	id.TrustDomain = trustDomain
	cert, key, err := ca.Issue(id, time.Hour)
	if err != nil {
		c.t.Fatal(err)
	}
	name := filepath.Join(c.dir, id.Service+"-"+id.Node)
	f := spiffe.Files{Cert: name + ".crt", Key: name + ".key", CA: name + ".ca"}
	for path, data := range map[string][]byte{f.Cert: cert, f.Key: key, f.CA: c.ca.CertPEM()} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
	return f
}

func (c *cluster) source(ca *spiffe.CA, id spiffe.ID) *spiffe.Source {
	c.t.Helper()
	s, err := spiffe.Load(c.files(ca, id))
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

// relay starts a relay and returns its address and how to stop it.
func (c *cluster) relay(change func(*relay.Config)) (string, func()) {
	c.t.Helper()
	config := relay.DefaultConfig()
	config.Listen = "127.0.0.1:0"
	config.NATS = c.url
	config.TLS = c.files(c.ca, spiffe.ID{Service: "relay"})
	config.Hold = 100 * time.Millisecond
	config.AckTimeout = 2 * time.Second
	if change != nil {
		change(&config)
	}
	service, err := relay.New(config, testLog(c.t))
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- service.Run(ctx) }()
	stop := func() {
		cancel()
		if err := <-done; err != nil {
			c.t.Errorf("relay: %v", err)
		}
		done <- nil
	}
	c.t.Cleanup(stop)
	eventually(c.t, "the relay to be ready", service.Ready)
	return service.Addr().String(), stop
}

// dial opens a connection as some part.
func (c *cluster) dial(address string, creds credentials.TransportCredentials) *grpc.ClientConn {
	c.t.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(creds))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

type publishStream = grpc.BidiStreamingClient[relayv1.PublishRequest, relayv1.PublishResponse]

// agent opens the publish stream of a node's agent.
func (c *cluster) agent(address, node string) publishStream {
	c.t.Helper()
	creds := c.source(c.ca, spiffe.ID{Service: "agent", Node: node}).ClientCredentials("relay")
	return c.publish(c.dial(address, creds))
}

func (c *cluster) publish(conn *grpc.ClientConn) publishStream {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	c.t.Cleanup(cancel)
	stream, err := relayv1.NewRelayServiceClient(conn).Publish(ctx)
	if err != nil {
		c.t.Fatal(err)
	}
	return stream
}

func sealed(t *testing.T, node string, epoch, first uint64, count int) []byte {
	t.Helper()
	b := &flowv1.Batch{Header: &flowv1.BatchHeader{Node: node, Epoch: epoch, First: first, Count: uint32(count), MinTime: 1, MaxTime: 2}}
	for range count {
		b.Records = append(b.Records, &flowv1.Record{Time: 1, Item: &flowv1.Record_Flow{Flow: []byte("not looked at")}})
	}
	data, err := proto.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func send(t *testing.T, stream publishStream, data []byte) *relayv1.PublishResponse {
	t.Helper()
	if err := stream.Send(&relayv1.PublishRequest{Batch: data}); err != nil {
		t.Fatalf("send: %v", err)
	}
	response, err := stream.Recv()
	if err != nil {
		t.Fatalf("answer: %v", err)
	}
	return response
}

// stored returns what JetStream holds.
func (c *cluster) stored() []*jetstream.RawStreamMsg {
	c.t.Helper()
	conn, err := bus.Connect(c.url, c.source(c.ca, spiffe.ID{Service: "observer"}).ClientTLS(bus.Service), testLog(c.t))
	if err != nil {
		c.t.Fatal(err)
	}
	defer conn.Close()
	js, err := jetstream.New(conn)
	if err != nil {
		c.t.Fatal(err)
	}
	var out []*jetstream.RawStreamMsg
	eventually(c.t, "the stream's content", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		stream, err := js.Stream(ctx, bus.FlowStream)
		if err != nil {
			return false
		}
		out = nil
		for seq := uint64(1); seq <= stream.CachedInfo().State.LastSeq; seq++ {
			msg, err := stream.GetMsg(ctx, seq)
			if err != nil {
				return false
			}
			out = append(out, msg)
		}
		return true
	})
	return out
}

func TestPublishStoresUnchangedAndAcknowledges(t *testing.T) {
	c := newCluster(t)
	address, _ := c.relay(nil)
	stream := c.agent(address, "node-1")
	data := sealed(t, "node-1", 7, 11, 3)
	if got := send(t, stream, data); got.GetEpoch() != 7 || got.GetFirst() != 11 || got.GetError() != "" {
		t.Errorf("answer = %v, want 7/11 without an error", got)
	}
	got := c.stored()
	if len(got) != 1 {
		t.Fatalf("%d messages stored, want 1", len(got))
	}
	if string(got[0].Data) != string(data) || got[0].Subject != "weir.flows.node-1" || got[0].Header.Get(nats.MsgIdHdr) != "node-1/7/11" {
		t.Errorf("stored %q on %s with id %q", got[0].Data, got[0].Subject, got[0].Header.Get(nats.MsgIdHdr))
	}
}

// TestResend: the acknowledgement of a batch is lost, and the agent sends it again, to another relay.
func TestResend(t *testing.T) {
	c := newCluster(t)
	one, _ := c.relay(nil)
	two, _ := c.relay(nil)
	data := sealed(t, "node-1", 1, 1, 2)
	first := c.agent(one, "node-1")
	if err := first.Send(&relayv1.PublishRequest{Batch: data}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the batch to be stored", func() bool { return len(c.stored()) == 1 })
	if err := first.CloseSend(); err != nil { // the answer is never read
		t.Fatal(err)
	}
	if got := send(t, c.agent(two, "node-1"), data); got.GetError() != "" {
		t.Errorf("the second relay answered %q", got.GetError())
	}
	if n := len(c.stored()); n != 1 {
		t.Errorf("%d messages stored, want 1", n)
	}
}

func TestRefusals(t *testing.T) {
	c := newCluster(t)
	address, _ := c.relay(nil)
	agent := func() credentials.TransportCredentials {
		return c.source(c.ca, spiffe.ID{Service: "agent", Node: "node-1"}).ClientCredentials("relay")
	}
	foreign, err := spiffe.NewCA(trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	good := sealed(t, "node-1", 1, 1, 1)
	lying := sealed(t, "node-1", 1, 1, 2)
	lying = lying[:len(lying)-len("not looked at")-6] // half a record is missing
	tests := []struct {
		name  string
		creds credentials.TransportCredentials
		data  []byte
		want  codes.Code
	}{
		{"another node's batch", agent(), sealed(t, "node-2", 1, 1, 1), codes.PermissionDenied},
		{"a service that is no agent", c.source(c.ca, spiffe.ID{Service: "observer"}).ClientCredentials("relay"), good, codes.PermissionDenied},
		{"an agent without a node", c.source(c.ca, spiffe.ID{Service: "agent"}).ClientCredentials("relay"), good, codes.PermissionDenied},
		{"a foreign certificate", c.source(foreign, spiffe.ID{Service: "agent", Node: "node-1"}).ClientCredentials("relay"), good, codes.Unavailable},
		{"no certificate", insecure.NewCredentials(), good, codes.Unavailable},
		{"garbage", agent(), []byte("garbage"), codes.InvalidArgument},
		{"nothing", agent(), nil, codes.InvalidArgument},
		{"a broken batch", agent(), lying, codes.InvalidArgument},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			stream, err := relayv1.NewRelayServiceClient(c.dial(address, tt.creds)).Publish(ctx)
			if err == nil {
				_ = stream.Send(&relayv1.PublishRequest{Batch: tt.data}) // Recv says why it failed
				_, err = stream.Recv()
			}
			if status.Code(err) != tt.want {
				t.Errorf("answer %v, want code %s", err, tt.want)
			}
		})
	}
	if n := len(c.stored()); n != 0 {
		t.Errorf("%d messages stored, want none", n)
	}
}

// TestNATSAway: while NATS is away the agent is told to keep its batch; later it is taken, and what
// was stored before is still there.
func TestNATSAway(t *testing.T) {
	c := newCluster(t)
	address, _ := c.relay(nil)
	stream := c.agent(address, "node-1")
	if got := send(t, stream, sealed(t, "node-1", 1, 1, 1)); got.GetError() != "" {
		t.Fatal(got.GetError())
	}
	listen := strings.TrimPrefix(c.url, "tls://")
	c.nats.Shutdown()
	refused := send(t, stream, sealed(t, "node-1", 1, 2, 1))
	if refused.GetError() == "" || refused.GetFirst() != 2 {
		t.Errorf("answer while NATS is away = %v, want an error for 2", refused)
	}
	c.startNATS(listen)
	eventually(t, "the batch to be taken", func() bool {
		return send(t, stream, sealed(t, "node-1", 1, 2, 1)).GetError() == ""
	})
	if n := len(c.stored()); n != 2 {
		t.Errorf("%d messages stored, want 2", n)
	}
}

// TestPresence: observers learn which agents are connected, and when they go.
func TestPresence(t *testing.T) {
	c := newCluster(t)
	conn, err := bus.Connect(c.url, c.source(c.ca, spiffe.ID{Service: "observer"}).ClientTLS(bus.Service), testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	words := make(chan bus.Presence, 16)
	if _, err := conn.Subscribe(bus.NodeSubjects, func(m *nats.Msg) {
		if p, err := bus.DecodePresence(m.Data); err != nil {
			t.Errorf("presence %q: %v", m.Data, err)
		} else {
			words <- p
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	address, _ := c.relay(func(config *relay.Config) { config.Instance = "relay-7" })
	stream := c.agent(address, "node-1")
	next := func() bus.Presence {
		select {
		case w := <-words:
			return w
		case <-time.After(20 * time.Second):
			t.Fatal("no word")
			return bus.Presence{}
		}
	}
	if w := next(); w.Node != "node-1" || w.Relay != "relay-7" || !w.Connected || w.Cluster != "default" || w.Address == "" {
		t.Errorf("word = %+v", w)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	for w := next(); w.Connected; w = next() { // it may have been repeated
		if w.Node != "node-1" {
			t.Errorf("word = %+v", w)
		}
	}
}

// TestDrain: a relay that stops answers what it has read and sends its agents elsewhere.
func TestDrain(t *testing.T) {
	c := newCluster(t)
	address, stop := c.relay(nil)
	stream := c.agent(address, "node-1")
	if got := send(t, stream, sealed(t, "node-1", 1, 1, 1)); got.GetError() != "" {
		t.Fatal(got.GetError())
	}
	stop()
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ended with %v, want Unavailable", err)
	}
}

func TestConfigValidate(t *testing.T) {
	config := relay.DefaultConfig()
	config.TotalBytes, config.StreamBatches, config.AckTimeout = 1, 0, 0
	err := config.Validate()
	if err == nil {
		t.Fatal("a bad configuration is valid")
	}
	for _, want := range []string{"nats is empty", "total-bytes", "stream-batches", "ack-timeout", "tls-cert"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %q", want, err)
		}
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("gave up waiting for %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func testLog(t *testing.T) *slog.Logger {
	t.Helper()
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
}
