// SPDX-License-Identifier: Apache-2.0

package server

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	identityv1 "github.com/weirmesh/weir/gen/weir/identity/v1"
	sourcev1 "github.com/weirmesh/weir/gen/weir/source/v1"
	"github.com/weirmesh/weir/internal/spiffe"
)

// fake serves one unary and one streaming service, and tells who called.
type fake struct {
	identityv1.UnimplementedIdentityServiceServer
	sourcev1.UnimplementedSourceServiceServer
	unary  func(context.Context) error
	stream func(context.Context) error
}

func (f *fake) Get(ctx context.Context, _ *identityv1.GetRequest) (*identityv1.GetResponse, error) {
	return &identityv1.GetResponse{}, f.unary(ctx)
}

func (f *fake) Watch(_ *sourcev1.WatchRequest, s grpc.ServerStreamingServer[sourcev1.WatchResponse]) error {
	return f.stream(s.Context())
}

type fixture struct {
	t      *testing.T
	ca     *spiffe.CA
	addr   string
	socket string
	logs   *syncBuffer
	server *Server
	stop   context.CancelFunc
	done   chan error
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func source(t *testing.T, ca *spiffe.CA, id spiffe.ID) *spiffe.Source {
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
	s, err := spiffe.Load(f)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// start serves f with the table on a TLS (or, with plain, a plain) port and a unix socket.
func start(t *testing.T, table Table, f *fake, plain bool, drain time.Duration) *fixture {
	t.Helper()
	ca, err := spiffe.NewCA("weir.test")
	if err != nil {
		t.Fatal(err)
	}
	fx := &fixture{t: t, ca: ca, logs: &syncBuffer{}, socket: filepath.Join(t.TempDir(), "s.sock"), done: make(chan error, 1)}
	config := Config{
		Name: "test", Log: slog.New(slog.NewTextHandler(fx.logs, nil)), Authorize: table,
		Metrics: prometheus.NewRegistry(), Drain: drain,
	}
	if !plain {
		config.TLS = source(t, ca, spiffe.ID{Service: "policy"})
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	local, err := ListenUnix(fx.socket)
	if err != nil {
		t.Fatal(err)
	}
	fx.addr = tcp.Addr().String()
	fx.server = New(config)
	identityv1.RegisterIdentityServiceServer(fx.server.GRPC(), f)
	sourcev1.RegisterSourceServiceServer(fx.server.GRPC(), f)
	ctx, cancel := context.WithCancel(context.Background())
	fx.stop = cancel
	go func() { fx.done <- fx.server.Serve(ctx, tcp, local) }()
	t.Cleanup(func() { cancel() })
	return fx
}

func (fx *fixture) dial(target string, creds credentials.TransportCredentials) *grpc.ClientConn {
	fx.t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		fx.t.Fatal(err)
	}
	fx.t.Cleanup(func() { conn.Close() })
	return conn
}

func callUnary(conn *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err := identityv1.NewIdentityServiceClient(conn).Get(ctx, &identityv1.GetRequest{})
	return err
}

func callStream(conn *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	stream, err := sourcev1.NewSourceServiceClient(conn).Watch(ctx, &sourcev1.WatchRequest{})
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

var errReached = status.Error(codes.AlreadyExists, "the handler ran")

func reached(context.Context) error { return errReached }

func TestAuthorization(t *testing.T) {
	const unary, stream = "/weir.identity.v1.IdentityService/Get", "/weir.source.v1.SourceService/Watch"
	const service = "/weir.identity.v1.IdentityService/"
	agent := spiffe.ID{Service: "agent", Node: "n1"}
	local := spiffe.ID{Service: spiffe.Local}
	var nobody spiffe.ID

	tests := []struct {
		name   string
		table  Table
		caller spiffe.ID
		plain  bool
		unary  codes.Code
		stream codes.Code
	}{
		{"no table denies all", nil, agent, false, codes.PermissionDenied, codes.PermissionDenied},
		{"method row", Table{unary: {"agent"}}, agent, false, codes.AlreadyExists, codes.PermissionDenied},
		{"stream row", Table{stream: {"agent"}}, agent, false, codes.PermissionDenied, codes.AlreadyExists},
		{"service row", Table{service: {"agent"}}, agent, false, codes.AlreadyExists, codes.PermissionDenied},
		{"method row beats service row", Table{service: {"agent"}, unary: {"policy"}}, agent, false, codes.PermissionDenied, codes.PermissionDenied},
		{"another service", Table{unary: {"policy"}, stream: {"relay"}}, agent, false, codes.PermissionDenied, codes.PermissionDenied},
		{"any", Table{unary: {Any}, stream: {Any}}, agent, false, codes.AlreadyExists, codes.AlreadyExists},
		{"local", Table{unary: {Local}, stream: {Local}}, local, false, codes.AlreadyExists, codes.AlreadyExists},
		{"local is not an agent", Table{unary: {"agent"}, stream: {"agent"}}, local, false, codes.PermissionDenied, codes.PermissionDenied},
		{"an agent is not local", Table{unary: {Local}, stream: {Local}}, agent, false, codes.PermissionDenied, codes.PermissionDenied},
		{"plain is nobody", Table{unary: {Any}, stream: {Any}}, nobody, true, codes.Unauthenticated, codes.Unauthenticated},
		{"plain allowed", Table{unary: {Plain}, stream: {Plain}}, nobody, true, codes.AlreadyExists, codes.AlreadyExists},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			fx := start(t, tt.table, &fake{unary: reached, stream: reached}, tt.plain, 0)
			var conn *grpc.ClientConn
			switch tt.caller {
			case local:
				conn = fx.dial("unix://"+fx.socket, insecure.NewCredentials())
			case nobody:
				conn = fx.dial(fx.addr, insecure.NewCredentials())
			default:
				conn = fx.dial(fx.addr, source(t, fx.ca, tt.caller).ClientCredentials("policy"))
			}
			if got := status.Code(callUnary(conn)); got != tt.unary {
				t.Errorf("unary: %v, want %v", got, tt.unary)
			}
			if got := status.Code(callStream(conn)); got != tt.stream {
				t.Errorf("stream: %v, want %v", got, tt.stream)
			}
		})
	}
}

func TestRefusedConnections(t *testing.T) {
	table := Table{"/weir.identity.v1.IdentityService/": {Any, Plain}, "/weir.source.v1.SourceService/": {Any, Plain}}
	fx := start(t, table, &fake{unary: reached, stream: reached}, false, 0)
	foreign, err := spiffe.NewCA("weir.test")
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name  string
		creds credentials.TransportCredentials
	}{
		{"plain text on the tls port", insecure.NewCredentials()},
		{"foreign ca", source(t, foreign, spiffe.ID{Service: "agent", Node: "n1"}).ClientCredentials("policy")},
		{"wrong service expected", source(t, fx.ca, spiffe.ID{Service: "agent", Node: "n1"}).ClientCredentials("identity")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			conn := fx.dial(fx.addr, tt.creds)
			if err := callUnary(conn); status.Code(err) != codes.Unavailable {
				t.Errorf("unary: %v, want Unavailable", err)
			}
			if err := callStream(conn); status.Code(err) != codes.Unavailable {
				t.Errorf("stream: %v, want Unavailable", err)
			}
		})
	}
}

func TestPeerID(t *testing.T) {
	ids := make(chan spiffe.ID, 2)
	tell := func(ctx context.Context) error {
		id, _ := spiffe.PeerID(ctx)
		ids <- id
		return errReached
	}
	fx := start(t, Table{"/weir.identity.v1.IdentityService/": {Any}}, &fake{unary: tell, stream: tell}, false, 0)
	want := spiffe.ID{TrustDomain: "weir.test", Service: "agent", Node: "n1"}
	if err := callUnary(fx.dial(fx.addr, source(t, fx.ca, want).ClientCredentials("policy"))); status.Code(err) != codes.AlreadyExists {
		t.Fatal(err)
	}
	if got := <-ids; got != want {
		t.Errorf("tls peer is %+v, want %+v", got, want)
	}
	if err := callUnary(fx.dial("unix://"+fx.socket, insecure.NewCredentials())); status.Code(err) != codes.AlreadyExists {
		t.Fatal(err)
	}
	if got := <-ids; got != (spiffe.ID{Service: spiffe.Local}) {
		t.Errorf("unix peer is %+v", got)
	}
}

func TestRecovery(t *testing.T) {
	boom := func(context.Context) error { panic("boom") }
	fx := start(t, Table{"/weir.identity.v1.IdentityService/": {Any}, "/weir.source.v1.SourceService/": {Any}}, &fake{unary: boom, stream: boom}, false, 0)
	conn := fx.dial("unix://"+fx.socket, insecure.NewCredentials())
	if err := callUnary(conn); status.Code(err) != codes.Internal || strings.Contains(err.Error(), "boom") {
		t.Errorf("unary: %v, want Internal without the panic's text", err)
	}
	if err := callStream(conn); status.Code(err) != codes.Internal {
		t.Errorf("stream: %v, want Internal", err)
	}
	if logs := fx.logs.String(); strings.Count(logs, `msg="handler panicked"`) != 2 || !strings.Contains(logs, "boom") {
		t.Errorf("log does not hold both panics:\n%s", logs)
	}
}

func TestHealth(t *testing.T) {
	fx := start(t, nil, &fake{}, false, 0)
	client := healthpb.NewHealthClient(fx.dial(fx.addr, source(t, fx.ca, spiffe.ID{Service: "agent"}).ClientCredentials("policy")))
	for _, serving := range []bool{false, true, false} {
		fx.server.SetServing("", serving)
		response, err := client.Check(context.Background(), &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if got := response.GetStatus() == healthpb.HealthCheckResponse_SERVING; got != serving {
			t.Errorf("serving %t, want %t", got, serving)
		}
	}
}

func TestDrain(t *testing.T) {
	t.Run("a stream that minds Draining ends well", func(t *testing.T) {
		started := make(chan struct{})
		f := &fake{}
		fx := start(t, Table{"/weir.source.v1.SourceService/": {Any}}, f, false, time.Hour)
		f.stream = func(context.Context) error {
			close(started)
			<-fx.server.Draining()
			return status.Error(codes.Unavailable, "draining")
		}
		conn := fx.dial("unix://"+fx.socket, insecure.NewCredentials())
		result := make(chan error, 1)
		go func() { result <- callStream(conn) }()
		<-started
		fx.stop()
		if err := <-result; status.Convert(err).Message() != "draining" {
			t.Errorf("stream ended with %v", err)
		}
		if err := <-fx.done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Run("one that does not is cut off", func(t *testing.T) {
		started := make(chan struct{})
		f := &fake{stream: func(ctx context.Context) error {
			close(started)
			<-ctx.Done()
			return ctx.Err()
		}}
		fx := start(t, Table{"/weir.source.v1.SourceService/": {Any}}, f, false, time.Millisecond)
		conn := fx.dial("unix://"+fx.socket, insecure.NewCredentials())
		result := make(chan error, 1)
		go func() { result <- callStream(conn) }()
		<-started
		fx.stop()
		if err := <-fx.done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if err := <-result; err == nil {
			t.Error("the stream ended without an error")
		}
	})
}

func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.sock")
	ln, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode().Perm(); got != 0o600 {
		t.Errorf("mode is %o", got)
	}
	if _, err := ListenUnix(path); err == nil {
		t.Error("a socket in use was taken over")
	}
	// As a killed process leaves it: the file stays.
	ln.(*unixListener).Listener.(*net.UnixListener).SetUnlinkOnClose(false)
	ln.Close()
	again, err := ListenUnix(path)
	if err != nil {
		t.Fatalf("a stale socket was not removed: %v", err)
	}
	again.Close()

	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(file); err == nil {
		t.Error("a plain file was replaced by a socket")
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "keep" {
		t.Errorf("the plain file is %q, %v", data, err)
	}
}

func TestAllowedUser(t *testing.T) {
	tests := []struct {
		uid  uint32
		own  int
		want bool
	}{{0, 0, true}, {0, 1000, true}, {1000, 1000, true}, {1000, 0, false}, {1001, 1000, false}}
	for _, tt := range tests {
		if got := allowedUser(tt.uid, tt.own); got != tt.want {
			t.Errorf("allowedUser(%d, %d) = %t", tt.uid, tt.own, got)
		}
	}
}

func TestServeNeedsListener(t *testing.T) {
	if err := New(Config{}).Serve(context.Background()); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("Serve without listeners: %v", err)
	}
}

func TestListen(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "a.sock")
	listeners, err := Listen(context.Background(), "127.0.0.1:0", socket)
	if err != nil || len(listeners) != 2 {
		t.Fatalf("Listen: %d listeners, %v", len(listeners), err)
	}
	for _, ln := range listeners {
		defer ln.Close()
	}
	own, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	// The socket is in use: what was opened or brought must be closed again.
	if _, err := Listen(context.Background(), "127.0.0.1:0", socket, own); err == nil {
		t.Fatal("a socket in use was taken")
	}
	if _, err := own.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener that was brought is not closed: %v", err)
	}
	if _, err := Listen(context.Background(), "", ""); err == nil {
		t.Error("nothing to listen on was accepted")
	}
}
