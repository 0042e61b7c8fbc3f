// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// tokenHeader carries a request's token.
const tokenHeader = "X-Weir-Case"

// maxBody bounds what is read of an answer.
const maxBody = 1 << 20

// Request is one HTTP request, written as it is given.
type Request struct {
	Method, Target, Host string
	// Headers in their order, "Name: value".
	Headers []string
	// TLS begins TLS first, with ServerName ("" = none).
	TLS        bool
	ServerName string
}

// Exchange is what became of a request.
type Exchange struct {
	// Connected: the connection stood (TCP), whoever accepted it.
	Connected bool
	// Arrived at a server of ours; Source is the client as that saw it, Header what came.
	Arrived bool
	Source  netip.AddrPort
	Header  http.Header
	// Status and Body of the answer; Status 0 = none came, Err says why.
	Status int
	Body   string
	Err    error
}

// visit is a request that came to a server.
type visit struct {
	source netip.AddrPort
	header http.Header
}

// visits are those that came, by token.
type visits struct {
	mu sync.Mutex
	m  map[string]visit
}

func (v *visits) put(token string, came visit) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.m[token] = came
}

func (v *visits) get(token string) (visit, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	came, ok := v.m[token]
	return came, ok
}

// speak serves whatever a connection that carries no tokens speaks: HTTP, TLS with HTTP in it, or DNS.
func (n *Network) speak(c net.Conn, r *bufio.Reader) {
	first, err := r.Peek(1)
	if err != nil {
		return
	}
	if first[0] < 0x0a { // the length of a short message: no text begins so
		n.names.serveStream(c, r)
		return
	}
	if first[0] == 0x16 { // a TLS handshake record
		certificate, err := n.certificate()
		if err != nil {
			return
		}
		t := tls.Server(peeked{c, r}, &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12})
		defer t.Close()
		n.serveHTTP(t, bufio.NewReader(t), c.RemoteAddr())
		return
	}
	n.serveHTTP(c, r, c.RemoteAddr())
}

// peeked is a connection of which some was read ahead.
type peeked struct {
	net.Conn
	r *bufio.Reader
}

func (p peeked) Read(b []byte) (int, error) { return p.r.Read(b) }

func (n *Network) serveHTTP(w io.Writer, r *bufio.Reader, remote net.Addr) {
	source, _ := netip.ParseAddrPort(remote.String())
	for {
		request, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		if _, err := io.Copy(io.Discard, request.Body); err != nil {
			return
		}
		n.visits.put(request.Header.Get(tokenHeader), visit{netip.AddrPortFrom(source.Addr().Unmap(), source.Port()), request.Header})
		n.mail.notify()
		body := "served\n"
		if request.Method == http.MethodHead {
			body = ""
		}
		if _, err := fmt.Fprintf(w, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len("served\n"), body); err != nil {
			return
		}
	}
}

func (n *Network) certificate() (tls.Certificate, error) {
	n.certificateOnce.Do(func() {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			n.certificateErr = err
			return
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "weir-cases"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
		n.certificateValue, n.certificateErr = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
	})
	return n.certificateValue, n.certificateErr
}

// Connect opens the connection of a spec for requests, without saying anything. An error when it does not stand before ctx ends.
func (c *Connection) Connect(ctx context.Context) (net.Conn, error) {
	fd, err := bound(c.spec.From, unix.SOCK_STREAM, 0, c.local)
	if err != nil {
		return nil, err
	}
	err = unix.Connect(fd, sockaddr(c.spec.To))
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return nil, fmt.Errorf("connect %s to %s: %w", c.local, c.spec.To, err)
	}
	file := os.NewFile(uintptr(fd), "connection")
	defer file.Close()
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(time.Minute)
	}
	if err := file.SetWriteDeadline(deadline); err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = file.SetWriteDeadline(time.Now()) }) // ends the wait
	err = awaitConnected(file)
	stop()
	if err != nil {
		return nil, fmt.Errorf("connect %s to %s: %w", c.local, c.spec.To, err)
	}
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	c.closers = append(c.closers, conn)
	return conn, nil
}

// awaitConnected waits until a socket that connects is writable, or its deadline.
func awaitConnected(file *os.File) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var connectErr error
	first := true
	err = raw.Write(func(fd uintptr) bool {
		if first {
			// Not yet: come back when it can be written.
			first = false
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
			if ready, _ := unix.Poll(p, 0); ready == 0 {
				return false
			}
		}
		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = unix.Errno(code)
		}
		connectErr = err
		return true
	})
	return errors.Join(err, connectErr)
}

// Secure begins TLS on a connection that Connect opened.
func Secure(ctx context.Context, conn net.Conn, serverName string) (net.Conn, error) {
	// Whose certificate it is does not matter here.
	secure := tls.Client(conn, &tls.Config{ServerName: serverName, InsecureSkipVerify: true}) //nolint:gosec // see above
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("TLS: %w", err)
	}
	return secure, nil
}

// Ask makes a request on a connection that Connect opened, or Secure.
func (c *Connection) Ask(ctx context.Context, conn net.Conn, q Request) Exchange {
	x := Exchange{Connected: true}
	if deadline, ok := ctx.Deadline(); ok {
		if x.Err = conn.SetDeadline(deadline); x.Err != nil {
			return x
		}
	}
	t := newToken(request, 0, c.number)
	name := hex.EncodeToString(t[:])
	if _, secure := conn.(*tls.Conn); q.TLS && !secure {
		if conn, x.Err = Secure(ctx, conn, q.ServerName); x.Err != nil {
			return x
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n%s: %s\r\n", q.Method, q.Target, q.Host, tokenHeader, name)
	for _, h := range q.Headers {
		b.WriteString(h + "\r\n")
	}
	b.WriteString("\r\n")
	if _, x.Err = io.WriteString(conn, b.String()); x.Err != nil {
		return x
	}
	var response *http.Response
	if response, x.Err = http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: q.Method}); x.Err == nil {
		defer response.Body.Close()
		x.Status = response.StatusCode
		var body []byte
		body, x.Err = io.ReadAll(io.LimitReader(response.Body, maxBody))
		x.Body = string(body)
	}
	if came, ok := c.net.visits.get(name); ok {
		x.Arrived, x.Source, x.Header = true, came.source, came.header
	}
	return x
}

// Local is the client's address.
func (c *Connection) Local() netip.AddrPort { return c.local }
