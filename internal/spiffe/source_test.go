// SPDX-License-Identifier: Apache-2.0

package spiffe

import (
	"crypto/tls"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// files writes a certificate of ca for id, which trusts trust, to a new folder.
func files(t *testing.T, ca, trust *CA, id ID) Files {
	t.Helper()
	f := Files{}
	dir := t.TempDir()
	f.Cert, f.Key, f.CA = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "ca.pem")
	rewrite(t, f, ca, trust, id)
	return f
}

func rewrite(t *testing.T, f Files, ca, trust *CA, id ID) {
	t.Helper()
	cert, key, err := ca.Issue(id, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for path, data := range map[string][]byte{f.Cert: cert, f.Key: key, f.CA: trust.CertPEM()} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func newCA(t *testing.T, domain string) *CA {
	t.Helper()
	ca, err := NewCA(domain)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func newSource(t *testing.T, ca, trust *CA, id ID) *Source {
	t.Helper()
	s, err := Load(files(t, ca, trust, id))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// handshake returns the errors of both ends of a TLS connection over loopback.
func handshake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	done := make(chan error, 1)
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			done <- err
			return
		}
		defer conn.Close()
		tc := tls.Server(conn, server)
		if err := tc.Handshake(); err != nil {
			done <- err
			return
		}
		_, err = tc.Write([]byte("x"))
		done <- err
	}()
	raw, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	tc := tls.Client(raw, client)
	clientErr = tc.Handshake()
	if clientErr == nil {
		// TLS 1.3: the server's verdict on the client's certificate comes after the client's handshake.
		_, clientErr = tc.Read(make([]byte, 1))
	}
	raw.Close()
	return <-done, clientErr
}

func TestMutualTLS(t *testing.T) {
	ca, foreign := newCA(t, "weir.test"), newCA(t, "weir.test")
	other := newCA(t, "other.test")
	server := newSource(t, ca, ca, ID{Service: "policy"})
	good := newSource(t, ca, ca, ID{Service: "agent", Node: "n1"})

	tests := []struct {
		name         string
		server       *tls.Config
		client       *tls.Config
		serverRefuse bool
		clientRefuse bool
	}{
		{name: "good", server: server.ServerTLS(), client: good.ClientTLS("policy")},
		{
			name: "client without certificate", server: server.ServerTLS(),
			client:       &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}},
			serverRefuse: true, clientRefuse: true,
		},
		{
			name: "client of a foreign ca with the same trust domain", server: server.ServerTLS(),
			client:       newSource(t, foreign, ca, ID{Service: "agent", Node: "n1"}).ClientTLS("policy"),
			serverRefuse: true, clientRefuse: true,
		},
		{
			// The server trusts the other CA too, so that only the name can be what refuses it.
			name: "client of another trust domain", server: bothTrusted(t, ca, other).ServerTLS(),
			client:       newSource(t, other, ca, ID{Service: "agent", Node: "n1"}).ClientTLS("policy"),
			serverRefuse: true, clientRefuse: true,
		},
		{
			name: "server of a foreign ca", server: newSource(t, foreign, ca, ID{Service: "policy"}).ServerTLS(),
			client: good.ClientTLS("policy"), serverRefuse: true, clientRefuse: true,
		},
		{
			name: "server is another service", server: server.ServerTLS(),
			client: good.ClientTLS("identity"), serverRefuse: true, clientRefuse: true,
		},
		{
			name: "tls 1.2", server: server.ServerTLS(),
			client:       &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12},
			serverRefuse: true, clientRefuse: true,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			serverErr, clientErr := handshake(t, tt.server, tt.client)
			if (serverErr != nil) != tt.serverRefuse || (clientErr != nil) != tt.clientRefuse {
				t.Errorf("server: %v, client: %v; want refused by server %t, by client %t",
					serverErr, clientErr, tt.serverRefuse, tt.clientRefuse)
			}
		})
	}
}

func bothTrusted(t *testing.T, ca, other *CA) *Source {
	t.Helper()
	f := files(t, ca, ca, ID{Service: "policy"})
	if err := os.WriteFile(f.CA, append(ca.CertPEM(), other.CertPEM()...), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Load(f)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestReload(t *testing.T) {
	ca, next := newCA(t, "weir.test"), newCA(t, "weir.test")
	id := ID{Service: "policy"}
	f := files(t, ca, ca, id)
	now := time.Now()
	s, err := load(f, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	first := s.current().cert

	rewrite(t, f, next, next, id)
	if s.current().cert != first {
		t.Error("files were read again within a minute")
	}
	now = now.Add(recheck)
	second := s.current().cert
	if second == first {
		t.Error("changed files were not read after a minute")
	}

	// A half-written file: the last good certificate stays, and the reason is told.
	if err := os.WriteFile(f.Key, []byte("-----BEGIN"), 0o600); err != nil {
		t.Fatal(err)
	}
	now = now.Add(recheck)
	if s.current().cert != second || s.ReloadError() == nil {
		t.Errorf("after a broken key: same certificate %t, error %v", s.current().cert == second, s.ReloadError())
	}

	// Another identity is never taken on.
	rewrite(t, f, next, next, ID{Service: "identity"})
	now = now.Add(recheck)
	if s.current().cert != second || s.ReloadError() == nil || s.ID().Service != "policy" {
		t.Errorf("after another identity: id %v, error %v", s.ID(), s.ReloadError())
	}

	rewrite(t, f, next, next, id)
	now = now.Add(recheck)
	if s.current().cert == second || s.ReloadError() != nil {
		t.Errorf("good files were not taken after bad ones: %v", s.ReloadError())
	}
}

func TestIssueRefuses(t *testing.T) {
	ca := newCA(t, "weir.test")
	for _, id := range []ID{
		{TrustDomain: "other.test", Service: "agent"},
		{Service: "local"},
		{Service: ""},
		{Service: "agent", Node: "a/b"},
	} {
		if _, _, err := ca.Issue(id, time.Hour); err == nil {
			t.Errorf("Issue(%v) succeeded", id)
		}
	}
	if _, err := NewCA("Not Valid"); err == nil {
		t.Error("NewCA with a bad trust domain succeeded")
	}
}
