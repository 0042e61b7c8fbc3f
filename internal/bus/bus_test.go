// SPDX-License-Identifier: Apache-2.0

package bus

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/weirmesh/weir/internal/spiffe"
)

func newCA(t *testing.T) *spiffe.CA {
	t.Helper()
	ca, err := spiffe.NewCA("test.local")
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// source makes a certificate by one CA for a part that trusts another.
func source(t *testing.T, issuer, trusted *spiffe.CA, id spiffe.ID) *spiffe.Source {
	t.Helper()
	id.TrustDomain = "test.local"
	cert, key, err := issuer.Issue(id, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	files := spiffe.Files{Cert: filepath.Join(dir, "crt"), Key: filepath.Join(dir, "key"), CA: filepath.Join(dir, "ca")}
	for path, data := range map[string][]byte{files.Cert: cert, files.Key: key, files.CA: trusted.CertPEM()} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err := spiffe.Load(files)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newServer(t *testing.T, ca *spiffe.CA, listen, store string) *Server {
	t.Helper()
	s, err := NewServer(ServerConfig{Listen: listen, StoreDir: store, TLS: source(t, ca, ca, spiffe.ID{Service: Service})})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	return s
}

func testLog(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}

func connect(t *testing.T, url string, s *spiffe.Source, options ...nats.Option) *nats.Conn {
	t.Helper()
	conn, err := Connect(url, s.ClientTLS(Service), testLog(t), options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	eventually(t, "the connection", conn.IsConnected)
	return conn
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

// TestWhoMayConnect: only the services of the table, with a certificate of our CA.
func TestWhoMayConnect(t *testing.T) {
	ca, foreign := newCA(t), newCA(t)
	server := newServer(t, ca, "127.0.0.1:0", t.TempDir())
	tests := []struct {
		name string
		try  func() (*nats.Conn, error)
		ok   bool
	}{
		{"relay", func() (*nats.Conn, error) {
			return nats.Connect(server.URL(), nats.Secure(source(t, ca, ca, spiffe.ID{Service: "relay"}).ClientTLS(Service)), nats.TLSHandshakeFirst())
		}, true},
		{"an agent", func() (*nats.Conn, error) {
			return nats.Connect(server.URL(), nats.Secure(source(t, ca, ca, spiffe.ID{Service: "agent", Node: "node-1"}).ClientTLS(Service)), nats.TLSHandshakeFirst())
		}, false},
		{"a foreign relay", func() (*nats.Conn, error) {
			return nats.Connect(server.URL(), nats.Secure(source(t, foreign, ca, spiffe.ID{Service: "relay"}).ClientTLS(Service)), nats.TLSHandshakeFirst())
		}, false},
		{"no certificate", func() (*nats.Conn, error) {
			config := source(t, ca, ca, spiffe.ID{Service: "relay"}).ClientTLS(Service)
			config.GetClientCertificate = nil
			return nats.Connect(server.URL(), nats.Secure(config), nats.TLSHandshakeFirst())
		}, false},
		{"plain", func() (*nats.Conn, error) {
			return nats.Connect("nats://"+strings.TrimPrefix(server.URL(), "tls://"), nats.Timeout(2*time.Second))
		}, false},
		{"a server that is no nats", func() (*nats.Conn, error) {
			return nats.Connect(server.URL(), nats.Secure(source(t, ca, ca, spiffe.ID{Service: "relay"}).ClientTLS("identity")), nats.TLSHandshakeFirst())
		}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			conn, err := tt.try()
			if conn != nil {
				defer conn.Close()
			}
			if (err == nil) != tt.ok {
				t.Errorf("connect: %v, want success %t", err, tt.ok)
			}
		})
	}
}

// TestPermissions: each service may do what it needs, and not what others do.
func TestPermissions(t *testing.T) {
	ca := newCA(t)
	server := newServer(t, ca, "127.0.0.1:0", t.TempDir())
	relay := connect(t, server.URL(), source(t, ca, ca, spiffe.ID{Service: "relay"}))
	js, err := jetstream.New(relay)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := EnsureFlowStream(ctx, js, StreamConfig{MaxAge: time.Hour, MaxBytes: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	stream, err := EnsureFlowStream(ctx, js, StreamConfig{MaxAge: 2 * time.Hour, MaxBytes: 2 << 20})
	if err != nil {
		t.Fatal(err)
	}
	got := stream.CachedInfo().Config
	if got.MaxAge != 2*time.Hour || got.MaxBytes != 2<<20 || got.Duplicates != DuplicateWindow || got.Storage != jetstream.FileStorage {
		t.Errorf("stream = %+v", got)
	}
	if _, err := js.Publish(ctx, FlowSubject("node-1"), []byte("x")); err != nil {
		t.Errorf("a relay may not publish flows: %v", err)
	}

	type try struct {
		service, verb, subject string
		denied                 bool
	}
	tests := []try{
		{"relay", "publish", NodeSubject("node-1"), false},
		{"relay", "publish", "$KV." + IdentityBucket + ".n.300", true},
		{"relay", "subscribe", FlowSubjects, true},
		{"relay", "publish", "$JS.API.STREAM.DELETE." + FlowStream, true},
		{"observer", "publish", FlowSubject("node-1"), true},
		{"observer", "subscribe", NodeSubjects, false},
		{"observer", "subscribe", "_INBOX_identity.>", true},
		{"observer", "publish", "$JS.API.STREAM.PURGE." + FlowStream, true},
		{"identity", "publish", "$KV." + IdentityBucket + ".n.300", false},
		{"identity", "publish", FlowSubject("node-1"), true},
		{"identity", "publish", "$JS.API.DIRECT.GET.KV_" + IdentityBucket + ".x", true},
		{"identity", "subscribe", "weir.>", true},
	}
	for _, tt := range tests {
		t.Run(tt.service+" "+tt.verb+" "+tt.subject, func(t *testing.T) {
			var mu sync.Mutex
			var refused error
			conn := connect(t, server.URL(), source(t, ca, ca, spiffe.ID{Service: tt.service}),
				nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
					mu.Lock()
					defer mu.Unlock()
					refused = err
				}))
			if tt.verb == "publish" {
				if err := conn.Publish(tt.subject, []byte("x")); err != nil {
					t.Fatal(err)
				}
			} else if _, err := conn.SubscribeSync(tt.subject); err != nil {
				t.Fatal(err)
			}
			if err := conn.Flush(); err != nil { // the refusal comes before the answer to this
				t.Fatal(err)
			}
			check := func() bool {
				mu.Lock()
				defer mu.Unlock()
				return errors.Is(refused, nats.ErrPermissionViolation)
			}
			if tt.denied {
				eventually(t, "the refusal", check)
			} else if check() {
				t.Errorf("refused: %v", refused)
			}
		})
	}
}

// TestRestart: what was stored survives, connections come back, and an id is still known.
func TestRestart(t *testing.T) {
	ca := newCA(t)
	store := t.TempDir()
	server := newServer(t, ca, "127.0.0.1:0", store)
	listen := strings.TrimPrefix(server.URL(), "tls://")
	conn := connect(t, server.URL(), source(t, ca, ca, spiffe.ID{Service: "relay"}))
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := EnsureFlowStream(ctx, js, StreamConfig{}); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(ctx, FlowSubject("node-1"), []byte("x"), jetstream.WithMsgID("node-1/1/1")); err != nil {
		t.Fatal(err)
	}
	server.Shutdown()
	eventually(t, "the loss of the connection", func() bool { return !conn.IsConnected() })
	if err := conn.Publish(FlowSubject("node-1"), []byte("y")); err == nil {
		t.Error("a message is taken while the server is away")
	}
	newServer(t, ca, listen, store)
	eventually(t, "the connection", conn.IsConnected)
	ack, err := js.Publish(ctx, FlowSubject("node-1"), []byte("x"), jetstream.WithMsgID("node-1/1/1"))
	if err != nil || !ack.Duplicate || ack.Sequence != 1 {
		t.Errorf("the same id again: %+v, %v; want a duplicate of 1", ack, err)
	}
}

// TestConnectBeforeServer: a part may start before NATS does.
func TestConnectBeforeServer(t *testing.T) {
	ca := newCA(t)
	store := t.TempDir()
	first := newServer(t, ca, "127.0.0.1:0", store)
	url := first.URL()
	first.Shutdown()
	conn, err := Connect(url, source(t, ca, ca, spiffe.ID{Service: "relay"}).ClientTLS(Service), testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	newServer(t, ca, strings.TrimPrefix(url, "tls://"), store)
	eventually(t, "the connection", conn.IsConnected)
}

func TestServerConfig(t *testing.T) {
	for _, tt := range []struct {
		name   string
		config ServerConfig
		want   string
	}{
		{"address", ServerConfig{Listen: "127.0.0.1", StoreDir: t.TempDir()}, "listen address"},
		{"port", ServerConfig{Listen: "127.0.0.1:x", StoreDir: t.TempDir()}, "port"},
		{"store", ServerConfig{Listen: "127.0.0.1:0"}, "store folder is empty"},
	} {
		if s, err := NewServer(tt.config); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
			if s != nil {
				s.Shutdown()
			}
		}
	}
}

func TestPresence(t *testing.T) {
	want := Presence{Cluster: "default", Node: "node-1", Relay: "r", Address: "a", ServerName: "s", Connected: true}
	data, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := DecodePresence(data); err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, bad := range []string{"", "{}", `{"node":"n"}`, "null", strings.Repeat("x", 5000)} {
		if got, err := DecodePresence([]byte(bad)); err == nil {
			t.Errorf("%.20q is taken: %+v", bad, got)
		}
	}
}

// FuzzPresence: whatever comes is refused or names a node and a relay.
func FuzzPresence(f *testing.F) {
	f.Add([]byte(`{"node":"n","relay":"r","connected":true}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := DecodePresence(data)
		if err == nil && (p.Node == "" || p.Relay == "") {
			t.Fatalf("taken: %+v", p)
		}
	})
}
