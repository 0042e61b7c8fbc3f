// SPDX-License-Identifier: Apache-2.0

// Package web is an HTTP server that tells what it saw, and a client that counts what became of its requests: the ends of the tests of L7.
package web

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"time"
)

// FromHeader is set by clients to their own address: the server sees whether a connection carries requests of another one.
const FromHeader = "X-From"

// TLSPort serves HTTP over TLS beside the plain ports.
const TLSPort = 8443

// Echo is what the server says of a request.
type Echo struct {
	// Server is the host name of the one that answered.
	Server string         `json:"server"`
	Client netip.AddrPort `json:"client"`
	Method string         `json:"method"`
	// Target is the request's target as it came.
	Target  string      `json:"target"`
	Host    string      `json:"host"`
	Proto   string      `json:"proto"`
	Headers http.Header `json:"headers"`
	Body    int64       `json:"body"`
	// Shared says that a request of another client came by the same connection, or one whose client is not the connection's source.
	Shared string `json:"shared,omitempty"`
}

type connKey struct{}

// connection remembers who used it.
type connection struct {
	mu     sync.Mutex
	remote netip.Addr
	from   string
}

func (c *connection) shared(from string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if from == "" {
		return ""
	}
	if c.from == "" {
		c.from = from
	}
	if a, err := netip.ParseAddr(from); c.from != from || err == nil && a != c.remote {
		return fmt.Sprintf("connection from %s, first used by %s, has a request of %s", c.remote, c.from, from)
	}
	return ""
}

// Handler answers every request with an Echo. /slow/MS waits before it answers, /status/CODE answers with that code.
func Handler(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			return // the client is gone
		}
		client, _ := netip.ParseAddrPort(r.RemoteAddr)
		echo := Echo{
			Server: name, Client: netip.AddrPortFrom(client.Addr().Unmap(), client.Port()), Method: r.Method, Target: r.RequestURI, Host: r.Host,
			Proto: r.Proto, Headers: r.Header, Body: n,
		}
		if c, ok := r.Context().Value(connKey{}).(*connection); ok {
			echo.Shared = c.shared(r.Header.Get(FromHeader))
		}
		code := http.StatusOK
		var ms int
		if _, err := fmt.Sscanf(r.URL.Path, "/slow/%d", &ms); err == nil {
			select {
			case <-time.After(time.Duration(ms) * time.Millisecond):
			case <-r.Context().Done():
				return
			}
		}
		if _, err := fmt.Sscanf(r.URL.Path, "/status/%d", &ms); err == nil && ms >= 200 && ms < 600 {
			code = ms
		}
		b, err := json.Marshal(echo)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Server", name)
		w.WriteHeader(code)
		_, _ = w.Write(b) // the client is gone: nobody to tell
	})
}

// Serve serves HTTP/1.1 and HTTP/2 (prior knowledge) on the ports, and HTTP over TLS on TLSPort, until ctx ends.
func Serve(ctx context.Context, ports ...string) error {
	name, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("serve http: %w", err)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Handler: Handler(name), Protocols: protocols, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			remote, _ := netip.ParseAddrPort(c.RemoteAddr().String())
			return context.WithValue(ctx, connKey{}, &connection{remote: remote.Addr().Unmap()})
		},
	}
	certificate, err := selfSigned(name)
	if err != nil {
		return err
	}
	server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12}
	ended := make(chan error, len(ports)+1)
	var lc net.ListenConfig
	for _, port := range append(ports, strconv.Itoa(TLSPort)) {
		listener, err := lc.Listen(ctx, "tcp", ":"+port)
		if err != nil {
			return errors.Join(fmt.Errorf("serve http: %w", err), server.Close())
		}
		go func() {
			if port == strconv.Itoa(TLSPort) {
				ended <- server.ServeTLS(listener, "", "")
				return
			}
			ended <- server.Serve(listener)
		}()
	}
	select {
	case <-ctx.Done():
		return server.Close()
	case err := <-ended:
		return errors.Join(err, server.Close())
	}
}

func selfSigned(name string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make key: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(240 * time.Hour),
		DNSNames: []string{name},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
