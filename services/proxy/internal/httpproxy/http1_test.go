// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

func echo(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	fmt.Fprintf(w, "%s %s host=%s body=%s x=%s", r.Method, r.RequestURI, r.Host, body, strings.Join(r.Header["X-A"], "|"))
}

func TestKeepAliveAndPipelining(t *testing.T) {
	c := backend(t, "b", echo)
	b := newBench(t, plainManager(""), toBackend, c)
	cl := b.dial()
	cl.send("GET /1?a=%zz HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nx-a: 2\r\n\r\n" +
		"POST /2 HTTP/1.1\r\nHost: h:80\r\nContent-Length: 3\r\n\r\nabc" +
		"POST /3 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\n\r\n" +
		"GET /4 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
	for _, want := range []string{
		"GET /1?a=%zz host=h body= x=1|2", "POST /2 host=h:80 body=abc x=", "POST /3 host=h body=abcde x=", "GET /4 host=h body= x=",
	} {
		resp, body := cl.response("GET")
		if resp.StatusCode != 200 || body != want {
			t.Errorf("got %d %q, want %q", resp.StatusCode, body, want)
		}
		for _, name := range []string{"Server", "X-Forwarded-For", "Via", "X-Request-Id"} {
			if resp.Header.Get(name) != "" {
				t.Errorf("%s: %s", name, resp.Header.Get(name))
			}
		}
	}
	cl.closed()
	if n := c.dials.Load(); n != 1 {
		t.Errorf("%d upstream connections, want 1", n)
	}
}

func TestHTTP10(t *testing.T) {
	b := newBench(t, plainManager(""), toBackend, backend(t, "b", echo))
	cl := b.dial()
	cl.send("GET / HTTP/1.0\r\n\r\n")
	resp, body := cl.response("GET")
	if resp.StatusCode != 200 || !strings.HasPrefix(body, "GET / host=127.0.0.1:") {
		t.Errorf("got %d %q", resp.StatusCode, body)
	}
	cl.closed()

	cl = b.dial()
	for range 2 {
		cl.send("GET / HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\n\r\n")
		if _, body := cl.response("GET"); body != "GET / host=h body= x=" {
			t.Errorf("got %q", body)
		}
	}
}

func TestHeadTrailersAndInformational(t *testing.T) {
	b := newBench(t, plainManager(""), toBackend, backend(t, "b", func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/hints":
			w.Header().Set("Link", "</x>")
			w.WriteHeader(http.StatusEarlyHints)
			w.Header().Del("Link")
			io.WriteString(w, "done")
		case "/trailers":
			body, _ := io.ReadAll(r.Body)
			w.Header().Set("Trailer", "X-Sum")
			w.WriteHeader(200)
			w.(http.Flusher).Flush()
			w.Write(body)
			w.Header().Set("X-Sum", r.Trailer.Get("X-Client"))
			w.Header().Set(http.TrailerPrefix+"X-Other", "o")
		default:
			w.Header().Set("Content-Length", "1000")
			if r.Method != "HEAD" {
				w.Write(make([]byte, 1000))
			}
		}
	}))
	cl := b.dial()
	cl.send("HEAD / HTTP/1.1\r\nHost: h\r\n\r\n")
	if resp, body := cl.response("HEAD"); resp.ContentLength != 1000 || body != "" {
		t.Errorf("HEAD: %d, %q", resp.ContentLength, body)
	}
	cl.send("GET /hints HTTP/1.1\r\nHost: h\r\n\r\n")
	if resp, _ := cl.response("GET"); resp.StatusCode != 103 || resp.Header.Get("Link") != "</x>" {
		t.Errorf("hints: %d %v", resp.StatusCode, resp.Header)
	}
	if resp, body := cl.response("GET"); resp.StatusCode != 200 || body != "done" || resp.Header.Get("Link") != "" {
		t.Errorf("after hints: %d %q %v", resp.StatusCode, body, resp.Header)
	}
	cl.send("POST /trailers HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\n\r\n1\r\na\r\n0\r\nX-Client: c\r\n\r\n")
	if resp, body := cl.response("POST"); body != "a" || resp.Trailer.Get("X-Sum") != "c" || resp.Trailer.Get("X-Other") != "o" {
		t.Errorf("trailers: %q %v", body, resp.Trailer)
	}
}

func TestExpectContinue(t *testing.T) {
	b := newBench(t, plainManager(""), toBackend, backend(t, "b", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		echo(w, r)
	}))
	cl := b.dial()
	cl.send("POST /yes HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
	if line, _ := cl.r.ReadString('\n'); line != "HTTP/1.1 100 Continue\r\n" {
		t.Fatalf("got %q", line)
	}
	cl.r.ReadString('\n')
	cl.send("ok")
	if _, body := cl.response("POST"); !strings.Contains(body, "body=ok") {
		t.Errorf("got %q", body)
	}
	cl.send("POST /no HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
	if resp, _ := cl.response("POST"); resp.StatusCode != 403 {
		t.Errorf("got %d", resp.StatusCode)
	}
	cl.closed()
}

func TestWebSocket(t *testing.T) {
	c := rawBackend(t, "b", func(nc net.Conn, r *bufio.Reader) {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		if req.Header.Get("Upgrade") != "websocket" || !strings.EqualFold(req.Header.Get("Connection"), "upgrade") {
			io.WriteString(nc, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
			return
		}
		io.WriteString(nc, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\nhello")
		io.Copy(nc, r)
	})
	b := newBench(t, plainManager(""), toBackend, c)
	cl := b.dial()
	cl.send("GET /ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: k\r\n\r\nEARLY")
	resp, err := http.ReadResponse(cl.r, nil)
	if err != nil || resp.StatusCode != 101 || resp.Header.Get("Sec-Websocket-Accept") != "x" {
		t.Fatalf("got %v, %v", resp, err)
	}
	buf := make([]byte, 10)
	if _, err := io.ReadFull(cl.r, buf); err != nil || string(buf) != "helloEARLY" {
		t.Fatalf("got %q, %v", buf, err)
	}
	cl.send("GET / HTTP/1.1\r\n bare \n")
	buf = make([]byte, len("GET / HTTP/1.1\r\n bare \n"))
	if _, err := io.ReadFull(cl.r, buf); err != nil || string(buf) != "GET / HTTP/1.1\r\n bare \n" {
		t.Fatalf("got %q, %v", buf, err)
	}
	cl.Close()
	e := b.log.next(t)
	if e.Status != 101 || e.RequestBytes != 28 || e.ResponseBytes != 33 {
		t.Errorf("entry %+v", e)
	}
}

func TestOtherUpgradesAreNotHeard(t *testing.T) {
	b := newBench(t, plainManager(""), toBackend, backend(t, "b", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%q %q", r.Header["Upgrade"], r.Header["Http2-Settings"])
	}))
	cl := b.dial()
	for range 2 {
		cl.send("GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n")
		if _, body := cl.response("GET"); body != "[] []" {
			t.Errorf("got %q", body)
		}
	}
}
