// SPDX-License-Identifier: Apache-2.0

package h1

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/guard"
	"github.com/weirmesh/weir/services/proxy/internal/strict"
)

var limits = strict.Limits{Bytes: 4 << 10, Count: 20}

// pieces is a connection that is read in pieces of one size, and whose other end reads everything.
type pieces struct {
	net.Conn
	r    io.Reader
	size int
	out  bytes.Buffer
}

func (p *pieces) Read(b []byte) (int, error)       { return p.r.Read(b[:min(len(b), p.size)]) }
func (p *pieces) Write(b []byte) (int, error)      { return p.out.Write(b) }
func (p *pieces) SetDeadline(time.Time) error      { return nil }
func (p *pieces) SetReadDeadline(time.Time) error  { return nil }
func (p *pieces) SetWriteDeadline(time.Time) error { return nil }
func (p *pieces) Close() error                     { return nil }

// message is what a server's handler got.
type message struct {
	method, target, body string
	refused, broken      bool
}

// own reads by this package.
func own(in []byte, size int) (out []message, answers []byte) {
	nc := &pieces{r: bytes.NewReader(in), size: size}
	c := NewConn(nc, nil, Config{Limits: limits, Upgrades: func(string) bool { return false }, Refused: func(string) {}})
	c.Serve(context.Background(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m := c.Next()
		if m.Err != nil {
			out = append(out, message{refused: true})
			w.Header().Set("Connection", "close")
			w.WriteHeader(m.Err.Status)
			return
		}
		body, err := io.ReadAll(r.Body)
		out = append(out, message{method: m.Method, target: m.Target, body: string(body), broken: err != nil})
		if m.Close || err != nil {
			w.Header().Set("Connection", "close")
		}
		w.Header()["Date"] = nil
		w.Write(body)
		c.Reuse() // strings are all that is kept
	}))
	return out, nc.out.Bytes()
}

// library reads by the library's server behind the guard.
func library(in []byte) (out []message) {
	c := guard.New(&pieces{r: bytes.NewReader(in), size: 1 << 20}, nil,
		guard.Config{Limits: limits, Upgrades: func(string) bool { return false }, Refused: func(string) {}})
	r := bufio.NewReader(c)
	for {
		req, err := http.ReadRequest(r)
		if err != nil {
			return out
		}
		m := c.Next()
		c.Done()
		if m.Err != nil {
			return append(out, message{refused: true})
		}
		body, err := io.ReadAll(req.Body)
		out = append(out, message{method: m.Method, target: m.Target, body: string(body), broken: err != nil})
		if err != nil || m.Close {
			return out
		}
	}
}

// FuzzServer: the same messages reach the handler as through the library, in whichever pieces they come, and there are as many answers.
func FuzzServer(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: h\r\n\r\nGET /2 HTTP/1.1\r\nHost: h\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabcHEAD /2 HTTP/1.1\r\nHost: h\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;a\r\nabc\r\n0\r\nX: y\r\n\r\nGET /2 HTTP/1.0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx\r\n\r\nGET / HTTP/1.1\r\n\r\n",
	} {
		f.Add([]byte(s), 1)
		f.Add([]byte(s), 5000)
	}
	f.Fuzz(func(t *testing.T, in []byte, size int) {
		got, answers := own(in, 1+max(0, size)%8192)
		want := library(in)
		if len(got) != len(want) {
			t.Fatalf("%q: %d messages, the library %d", in, len(got), len(want))
		}
		for i, g := range got {
			if w := want[i]; g.broken != w.broken || g.refused != w.refused || g.target != w.target || !g.broken && g.body != w.body {
				t.Fatalf("%q: %+v, the library %+v", in, g, w)
			}
		}
		r := bufio.NewReader(bytes.NewReader(answers))
		for _, g := range got {
			resp, err := readAnswer(r, g.method)
			if err != nil || !g.broken && !g.refused && g.method != http.MethodHead && resp != g.body {
				t.Fatalf("%q was answered %q: %v", in, answers, err)
			}
		}
		if _, err := r.Peek(1); err != io.EOF {
			t.Fatalf("%q: more than %d answers: %q", in, len(got), answers)
		}
	})
}

// readAnswer reads an answer's body, after what informs.
func readAnswer(r *bufio.Reader, method string) (string, error) {
	for {
		resp, err := http.ReadResponse(r, &http.Request{Method: method})
		if err != nil {
			return "", err
		}
		if resp.StatusCode == http.StatusContinue {
			continue
		}
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}
}

// FuzzClient: an answer that both read is the same answer.
func FuzzClient(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "HTTP/1.1 200 OK\nContent-Length: 3\n\nabc",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n3 \r\nabc\r\n0\r\nX: y\r\n\r\n", "HTTP/1.0 200\r\n\r\nuntil the end",
		"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 304 Not\r\nContent-Length: 5\r\n\r\n", "HTTP/1.1 200 OK\r\nX: y\r\n z\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
	} {
		f.Add([]byte(s), 3)
	}
	f.Fuzz(func(t *testing.T, in []byte, size int) {
		c := NewClientConn(&pieces{r: bytes.NewReader(in), size: 1 + max(0, size)%8192}, limits)
		req, err := http.NewRequest(http.MethodGet, "http://h/", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.RoundTrip(req)
		if err != nil || resp.StatusCode == http.StatusSwitchingProtocols {
			return
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return
		}
		r := bufio.NewReader(bytes.NewReader(in))
		for {
			lib, err := http.ReadResponse(r, req)
			if err != nil {
				// The library wants a text after the status, and knows fewer lengths.
				return
			}
			if lib.StatusCode < 200 {
				continue
			}
			want, err := io.ReadAll(lib.Body)
			if err == nil && (lib.StatusCode != resp.StatusCode || !bytes.Equal(body, want)) {
				t.Fatalf("%q: %d %q, the library %d %q", in, resp.StatusCode, body, lib.StatusCode, want)
			}
			return
		}
	})
}

// A client that goes away ends the request's context; what it had sent before is read no further.
func TestClientGoesAway(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	io.WriteString(nc, "GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	c := NewConn(server, nil, Config{Limits: limits, Upgrades: func(string) bool { return false }})
	c.Serve(t.Context(), http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		nc.Close()
		select {
		case <-r.Context().Done():
		case <-time.After(20 * time.Second):
			t.Error("the context lives on")
		}
	}))
}
