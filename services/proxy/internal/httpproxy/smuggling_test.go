// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// smuggled is what no server may ever see: each case that tries to hide a request hides this one.
const smuggled = "GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"

// smuggling are messages of which somebody once read something else than somebody else, and the answer that each gets here. RFC 9112, sections 2.2, 3, 5, 6, 7
// and 11, and what public collections of such messages have.
var smuggling = []struct {
	name, in string
	want     int
	cause    string
}{
	{"length and coding", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, 400, "length-and-coding"},
	{"coding and length", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 40\r\n\r\n0\r\n\r\n" + smuggled, 400, "length-and-coding"},
	{"two lengths", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\nContent-Length: 36\r\n\r\n" + smuggled, 400, "content-length"},
	{"same length twice", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n" + smuggled, 400, "content-length"},
	{"list of lengths", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0, 36\r\n\r\n" + smuggled, 400, "content-length"},
	{"list of same lengths", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0, 0\r\n\r\n" + smuggled, 400, "content-length"},
	{"length with sign", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +0\r\n\r\n" + smuggled, 400, "content-length"},
	{"negative length", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n" + smuggled, 400, "content-length"},
	{"hexadecimal length", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0x0\r\n\r\n" + smuggled, 400, "content-length"},
	{"empty length", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length:\r\n\r\n" + smuggled, 400, "content-length"},
	{"length with space", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0 0\r\n\r\n" + smuggled, 400, "content-length"},
	{"length with underscore", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1_0\r\n\r\n" + smuggled, 400, "content-length"},
	{"length beyond all numbers", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 18446744073709551616\r\n\r\n" + smuggled, 400, "content-length"},
	{"length with a dot", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0.0\r\n\r\n" + smuggled, 400, "content-length"},
	{"coding with a space before the colon", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400, "header-name"},
	{"coding with a tab before the colon", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n", 400, "header-name"},
	{"length with a space before the colon", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length : 36\r\n\r\n" + smuggled, 400, "header-name"},
	{"folded coding", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400, "obs-fold"},
	{"folded name", "POST / HTTP/1.1\r\nHost: h\r\nX: y\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "obs-fold"},
	{"fold at the begin", "POST / HTTP/1.1\r\n Host: h\r\n\r\n", 400, "obs-fold"},
	{"coding with a vertical tab", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n", 400, "header-value"},
	{"coding in quotes", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n", 501, "transfer-encoding"},
	{"unknown coding", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501, "transfer-encoding"},
	{"coding identity", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: identity\r\n\r\n", 501, "transfer-encoding"},
	{"coding twice in a list", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 501, "transfer-encoding"},
	{"coding and identity", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 501, "transfer-encoding"},
	{"gzip and chunked", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, "transfer-encoding"},
	{"coding with parameter", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n", 501, "transfer-encoding"},
	{"two codings", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", 400, "transfer-encoding"},
	{"empty coding", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding:\r\n\r\n0\r\n\r\n", 501, "transfer-encoding"},
	{"coding in HTTP/1.0", "POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "transfer-encoding"},
	{"coding with a nul", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\x00\r\n\r\n0\r\n\r\n", 400, "header-value"},
	{"coding's name with a nul", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding\x00: chunked\r\n\r\n0\r\n\r\n", 400, "header-name"},
	{"name with a high byte", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding\xa0: chunked\r\n\r\n0\r\n\r\n", 400, "header-name"},
	{"empty name", "GET / HTTP/1.1\r\nHost: h\r\n: x\r\n\r\n", 400, "header-name"},
	{"no colon", "GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding chunked\r\n\r\n", 400, "header-name"},
	{"name in parentheses", "GET / HTTP/1.1\r\nHost: h\r\nX(y): z\r\n\r\n", 400, "header-name"},
	{"bare line feeds", "GET / HTTP/1.1\nHost: h\n\n", 400, "bare-lf"},
	{"one bare line feed", "POST / HTTP/1.1\r\nHost: h\r\nX: y\nContent-Length: 36\r\n\r\n" + smuggled, 400, "bare-lf"},
	{"bare line feed as the end", "GET / HTTP/1.1\r\nHost: h\r\n\n" + smuggled, 400, "bare-lf"},
	{"bare carriage return in a value", "GET / HTTP/1.1\r\nHost: h\r\nX: y\rTransfer-Encoding: chunked\r\n\r\n", 400, "header-value"},
	{"bare carriage return in the request line", "GET / HTTP/1.1\rHost: h\r\n\r\n", 400, "request-line"},
	{"carriage return twice", "GET / HTTP/1.1\r\r\nHost: h\r\n\r\n", 400, "request-line"},
	{"nul in a value", "GET / HTTP/1.1\r\nHost: h\r\nX: a\x00b\r\n\r\n", 400, "header-value"},
	{"delete in a value", "GET / HTTP/1.1\r\nHost: h\r\nX: a\x7fb\r\n\r\n", 400, "header-value"},

	{"no host", "GET / HTTP/1.1\r\n\r\n", 400, "host"},
	{"empty host", "GET / HTTP/1.1\r\nHost:\r\n\r\n", 400, "host"},
	{"two hosts", "GET / HTTP/1.1\r\nHost: h\r\nHost: other\r\n\r\n", 400, "host"},
	{"same host twice", "GET / HTTP/1.1\r\nHost: h\r\nhost: h\r\n\r\n", 400, "host"},
	{"host with a user", "GET / HTTP/1.1\r\nHost: a@h\r\n\r\n", 400, "host"},
	{"host with a path", "GET / HTTP/1.1\r\nHost: h/x\r\n\r\n", 400, "host"},
	{"host with a space", "GET / HTTP/1.1\r\nHost: h other\r\n\r\n", 400, "host"},
	{"host with a query", "GET / HTTP/1.1\r\nHost: h?x\r\n\r\n", 400, "host"},
	{"absolute form and another host", "GET http://other/x HTTP/1.1\r\nHost: h\r\n\r\n", 400, "host-mismatch"},
	{"absolute form with a user", "GET http://a@h/x HTTP/1.1\r\nHost: h\r\n\r\n", 400, "host-mismatch"},
	{"absolute form without host", "GET http:///x HTTP/1.1\r\nHost: h\r\n\r\n", 400, "host-mismatch"},
	{"absolute form of another scheme", "GET ftp://h/x HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"},
	{"absolute form, same host", "GET http://H/ok?q HTTP/1.1\r\nHost: h\r\n\r\n", 200, ""},
	{"absolute form without path", "GET http://h?q HTTP/1.1\r\nHost: h\r\n\r\n", 200, ""},
	{"neither slash nor scheme", "GET x HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"},
	{"star for GET", "GET * HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"},
	{"fragment", "GET /a#b HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"},
	{"control character in the target", "GET /a\x01 HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"},
	{"connect", "CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\n\r\n", 405, ""},
	{"connect to another host", "CONNECT other:80 HTTP/1.1\r\nHost: h:80\r\n\r\n", 400, "target"},
	{"connect with a path", "CONNECT /x HTTP/1.1\r\nHost: h\r\n\r\n", 400, "target"},

	{"HTTP/0.9", "GET /\r\n\r\n", 400, "request-line"},
	{"two spaces", "GET  / HTTP/1.1\r\nHost: h\r\n\r\n", 400, "request-line"},
	{"tab in the request line", "GET\t/ HTTP/1.1\r\nHost: h\r\n\r\n", 400, "request-line"},
	{"space at the end", "GET / HTTP/1.1 \r\nHost: h\r\n\r\n", 400, "request-line"},
	{"space in the target", "GET /a b HTTP/1.1\r\nHost: h\r\n\r\n", 400, "request-line"},
	{"space before the method", " GET / HTTP/1.1\r\nHost: h\r\n\r\n", 400, "not-http"},
	{"no method", "/ HTTP/1.1\r\nHost: h\r\n\r\n", 400, "not-http"},
	{"method with a colon", "GE:T / HTTP/1.1\r\nHost: h\r\n\r\n", 400, "request-line"},
	{"lower-case version", "GET / http/1.1\r\nHost: h\r\n\r\n", 400, "request-line"},
	{"version 1.2", "GET / HTTP/1.2\r\nHost: h\r\n\r\n", 505, "version"},
	{"version 2.0", "GET / HTTP/2.0\r\nHost: h\r\n\r\n", 505, "version"},
	{"version with more digits", "GET / HTTP/1.10\r\nHost: h\r\n\r\n", 400, "request-line"},
	{"version with zero", "GET / HTTP/01.1\r\nHost: h\r\n\r\n", 400, "request-line"},
	{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "not-http"},
	{"SSH", "SSH-2.0-OpenSSH_9.6\r\n", 400, "request-line"},
	{"a mail server's client", "EHLO mail.example\r\n", 400, "request-line"},
	{"a database's client", "\x00\x00\x00\x08\x04\xd2\x16\x2f", 400, "not-http"},
	{"too many empty lines", "\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n", 400, "request-line"},
	{"an empty line before", "\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n", 200, ""},

	{"chunk size is no number", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n" + smuggled, 400, "chunk-size"},
	{"empty chunk size", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n\r\n" + smuggled, 400, "chunk-size"},
	{"chunk size with sign", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n+1\r\na\r\n0\r\n\r\n", 400, "chunk-size"},
	{"chunk size with prefix", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n", 400, "chunk-size"},
	{"chunk size with space", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1 \r\na\r\n0\r\n\r\n", 400, "chunk-size"},
	{"space before the chunk size", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n 1\r\na\r\n0\r\n\r\n", 400, "chunk-size"},
	{"chunk size with underscore", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1_0\r\na\r\n0\r\n\r\n", 400, "chunk-size"},
	{"huge chunk size", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff0\r\na\r\n0\r\n\r\n", 400, "chunk-size"},
	{"chunk size that wraps", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000001\r\na\r\n0\r\n\r\n", 400, "chunk-size"},
	{"chunk line with bare line feed", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n", 400, "bare-lf"},
	{"extension with bare line feed", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1;\na\r\n0\r\n\r\n", 400, "bare-lf"},
	{"extension with bare carriage return", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1;a\rb\r\na\r\n0\r\n\r\n", 400, "chunk-extension"},
	{"chunk longer than said", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n", 400, "chunk-end|bare-lf"},
	{"chunk that ends with two letters", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\naXX0\r\n\r\n", 400, "chunk-end"},
	{"chunk that ends with a bare line feed", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\n0\r\n\r\n", 400, "bare-lf"},
	{"endless extension", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1;" + strings.Repeat("x", 10000) + "\r\na\r\n0\r\n\r\n", 400, "chunk-line"},
	{"trailer that frames", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 5\r\n\r\n", 400, "trailer"},
	{"trailer that routes", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nHost: x\r\n\r\n", 400, "trailer"},
	{"trailer with a fold", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n z\r\n\r\n", 400, "obs-fold"},
	{"trailer with bare line feed", "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\nZ: z\r\n\r\n", 400, "header-value"},

	{"length as an option of the connection", "POST / HTTP/1.1\r\nHost: h\r\nConnection: Content-Length\r\nContent-Length: 36\r\n\r\n" + smuggled, 400, "connection"},
	{"host as an option of the connection", "GET / HTTP/1.1\r\nHost: h\r\nConnection: host\r\n\r\n", 400, "connection"},
	{"unknown expectation", "POST / HTTP/1.1\r\nHost: h\r\nExpect: 200-ok\r\nContent-Length: 1\r\n\r\na", 417, "expect"},

	{"many headers", "GET / HTTP/1.1\r\nHost: h\r\n" + strings.Repeat("X: y\r\n", 101) + "\r\n", 431, "header-count"},
	{"large header", "GET / HTTP/1.1\r\nHost: h\r\nX: " + strings.Repeat("y", 70<<10) + "\r\n\r\n", 431, "header-size"},
	{"header without end", "GET / HTTP/1.1\r\nHost: h\r\nX: " + strings.Repeat("y", 70<<10), 431, "header-size"},
	{"large target", "GET /" + strings.Repeat("y", 70<<10), 414, "target-size"},
}

// newWitness is a server that never sees what was smuggled, and reads as simply as can be.
func newWitness(t testing.TB) (*cluster, chan string) {
	seen := make(chan string, 1000)
	c := rawBackend(t, "b", func(nc net.Conn, r *bufio.Reader) {
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			body, err := io.ReadAll(req.Body)
			if err != nil {
				return
			}
			seen <- req.RequestURI
			fmt.Fprintf(nc, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		}
	})
	return c, seen
}

func TestSmuggling(t *testing.T) {
	c, seen := newWitness(t)
	for _, tt := range smuggling {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, plainManager(""), toBackend, c)
			cl := b.dial()
			go io.WriteString(cl, tt.in)
			resp, err := http.ReadResponse(cl.r, nil)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			if resp.StatusCode != tt.want || err != nil {
				t.Errorf("got %d %q, %v; want %d", resp.StatusCode, body, err, tt.want)
			}
			if tt.want != 200 {
				cl.closed()
			}
			for cause, n := range b.limits.causes() {
				if n != 1 || !strings.Contains("|"+tt.cause+"|", "|"+cause+"|") {
					t.Errorf("cause %s %d times, want %s", cause, n, tt.cause)
				}
			}
			if tt.cause != "" && len(b.limits.causes()) == 0 {
				t.Error("nothing was counted")
			}
			for len(seen) > 0 {
				if uri := <-seen; uri == "/smuggled" {
					t.Error("the server saw what was smuggled")
				}
			}
		})
	}
}

// What is sent on of a message that was accepted reads as one message, however the client wrote it.
func TestWhatIsSentOn(t *testing.T) {
	got := make(chan []byte, 1)
	c := rawBackend(t, "b", func(nc net.Conn, r *bufio.Reader) {
		var all bytes.Buffer
		req, err := http.ReadRequest(bufio.NewReader(io.TeeReader(r, &all)))
		if err != nil {
			return
		}
		io.Copy(io.Discard, req.Body)
		got <- all.Bytes()
		io.WriteString(nc, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
	})
	b := newBench(t, plainManager(""), toBackend, c)
	tests := []struct{ in, want string }{
		{"GET http://h/%7Ea/../b?x=%2f HTTP/1.1\r\nHost: h\r\nTE: gzip, trailers\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nProxy-Connection: x\r\nKeep-Alive: 5\r\n\r\n",
			"GET /b?x=%2f HTTP/1.1\r\nHost: h\r\nTe: trailers\r\n\r\n"},
		{"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nX: a\tb  \r\n\r\nabc", "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nX: a\tb\r\n\r\nabc"},
		{"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: CHUNKED\r\n\r\n003;ext=\"v\"\r\nabc\r\n000\r\nX-T: 1\r\n\r\n",
			"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n"},
		{"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n"},
		{"GET /\xc3\xa9?\xff HTTP/1.1\r\nHost: h\r\n\r\n", "GET /\xc3\xa9?\xff HTTP/1.1\r\nHost: h\r\n\r\n"},
		{"GET /a?b[]={}|\"<>^` HTTP/1.1\r\nHost: h\r\n\r\n", "GET /a?b[]={}|\"<>^` HTTP/1.1\r\nHost: h\r\n\r\n"},
		{"GET /a? HTTP/1.1\r\nHost: h\r\n\r\n", "GET /a? HTTP/1.1\r\nHost: h\r\n\r\n"},
	}
	for _, tt := range tests {
		routes := toBackend
		if strings.HasPrefix(tt.in, "OPTIONS *") {
			routes = strings.Replace(toBackend, `"prefix":"/"`, `"path":"*"`, 1)
		}
		b.setRoutes(routes)
		cl := b.dial()
		cl.send(tt.in)
		cl.response("GET")
		select {
		case raw := <-got:
			if string(raw) != tt.want {
				t.Errorf("%q was sent on as\n%q, want\n%q", tt.in, raw, tt.want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%q did not arrive", tt.in)
		}
	}
}
