// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/weirmesh/weir/internal/spiffe"
)

// echo answers each connection with what it says, after the end of it.
func echo(t testing.TB, wrap func(net.Conn) net.Conn) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	group.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer c.Close()
				conn := wrap(c)
				all, err := io.ReadAll(conn)
				if err != nil {
					return
				}
				_, _ = conn.Write(all)
				if h, ok := conn.(interface{ CloseWrite() error }); ok {
					_ = h.CloseWrite()
				}
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		group.Wait()
	})
	return ln.Addr().String()
}

func plain(c net.Conn) net.Conn { return c }

// say says something, ends its half, and returns the answer.
func say(conn interface {
	net.Conn
	CloseWrite() error
}, text []byte) ([]byte, error) {
	defer conn.Close()
	errs := make(chan error, 1)
	go func() {
		_, err := conn.Write(text)
		if err == nil {
			err = conn.CloseWrite()
		}
		errs <- err
	}()
	all, err := io.ReadAll(conn)
	if err == nil {
		err = <-errs
	}
	return all, err
}

func dial(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	var conn net.Conn
	until(t, addr+" listens", func() bool {
		var err error
		conn, err = net.Dial("tcp", addr)
		return err == nil
	})
	return conn.(*net.TCPConn)
}

func TestTCPHalfClose(t *testing.T) {
	b := newBench(t)
	b.logCluster()
	b.staticCluster("echo", echo(t, plain))
	addr := free(t)
	b.tcpListener("slot-3", addr, "echo", "")
	b.run()
	text := bytes.Repeat([]byte("all that was said before the end "), 40000)
	got, err := say(dial(t, addr), text)
	if err != nil || !bytes.Equal(got, text) {
		t.Fatalf("%d bytes came back of %d, %v", len(got), len(text), err)
	}
	until(t, "the connection is told", func() bool { return len(b.logs.connections()) == 1 })
	e := b.logs.connections()[0]
	if n := e.GetConnectionProperties(); n.GetReceivedBytes() != uint64(len(text)) || n.GetSentBytes() != uint64(len(text)) {
		t.Errorf("bytes %v", n)
	}
}

// TestServerNames: the TLS of client and server passes unread, but only to the names that a rule allows.
func TestServerNames(t *testing.T) {
	b := newBench(t)
	b.logCluster()
	server := b.files(spiffe.ID{Service: "policy"})
	cert, err := tls.LoadX509KeyPair(server.Cert, server.Key)
	if err != nil {
		t.Fatal(err)
	}
	b.staticCluster("tls", echo(t, func(c net.Conn) net.Conn { return tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}}) }))
	addr := free(t)
	b.tcpListener("slot-4", addr, "tls", `([a-z]+\.)?allowed\.example`)
	b.run()
	for _, tc := range []struct {
		name string
		ok   bool
	}{{"allowed.example", true}, {"WWW.allowed.example", true}, {"a.b.allowed.example", false}, {"denied.example", false}, {"", false}} {
		config := &tls.Config{ServerName: tc.name, InsecureSkipVerify: true}
		got, err := say(tls.Client(dial(t, addr), config), []byte("secret"))
		if ok := err == nil && string(got) == "secret"; ok != tc.ok {
			t.Errorf("server name %q: %q, %v, want allowed = %v", tc.name, got, err, tc.ok)
		}
	}
	got, err := say(dial(t, addr), []byte("GET / HTTP/1.1\r\n\r\n"))
	if err == nil || len(got) > 0 {
		t.Errorf("without TLS: %q, %v", got, err)
	}
	until(t, "all connections are told", func() bool { return len(b.logs.connections()) == 6 })
	denied, allowed := 0, 0
	for _, e := range b.logs.connections() {
		meta := e.GetCommonProperties().GetMetadata().GetFilterMetadata()["envoy.filters.network.rbac"].GetFields()
		switch {
		case strings.HasPrefix(e.GetCommonProperties().GetConnectionTerminationDetails(), "rbac_access_denied_matched_policy[none]"):
			denied++
			if meta["enforced_engine_result"].GetStringValue() != "denied" {
				t.Errorf("denied entry %v", e)
			}
		default:
			allowed++
			if meta["shadow_effective_policy_id"].GetStringValue() != "shop/names/egress[0]" {
				t.Errorf("allowed entry %v", e)
			}
		}
	}
	if denied != 4 || allowed != 2 {
		t.Errorf("%d denied and %d allowed were told, want 4 and 2", denied, allowed)
	}
}

// TestTermination: TLS ends in the proxy, chains are chosen by server name, and upstream is TLS again, verified.
func TestTermination(t *testing.T) {
	b := newBench(t)
	b.logCluster()
	files := b.files(spiffe.ID{Service: "policy"})
	pair, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		t.Fatal(err)
	}
	upstreamAddr := echo(t, func(c net.Conn) net.Conn { return tls.Server(c, &tls.Config{Certificates: []tls.Certificate{pair}}) })
	b.tlsCluster("good", upstreamAddr, string(b.ca.CertPEM()), "spiffe://test.example/weir/policy")
	b.tlsCluster("bad", upstreamAddr, string(b.ca.CertPEM()), "spiffe://test.example/weir/other")
	addr := free(t)
	b.terminator("tls", addr, files, map[string]string{"good.example": "good", "*.bad.example": "bad"})
	b.run()
	for name, ok := range map[string]bool{"good.example": true, "x.bad.example": false, "other.example": false} {
		conn := tls.Client(dial(t, addr), &tls.Config{ServerName: name, InsecureSkipVerify: true})
		got, err := say(conn, []byte("hello"))
		if worked := err == nil && string(got) == "hello"; worked != ok {
			t.Errorf("%s: %q, %v, want %v", name, got, err, ok)
		}
	}
	_, dump, err := ask2(b, "/config_dump")
	if err != nil || strings.Contains(dump, "PRIVATE KEY") || !strings.Contains(dump, "[redacted]") || !strings.Contains(dump, "good.example") {
		t.Errorf("the config dump shows keys, or nothing: %v", err)
	}
}
