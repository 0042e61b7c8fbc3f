// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

// TestNothingIsLeftOver: what one request of a connection said is not part of the next, in whatever order simple ones, large ones, those with bodies and those
// that the proxy answers itself come.
func TestNothingIsLeftOver(t *testing.T) {
	seen := make(chan http.Header, 1)
	c := backend(t, "b", func(w http.ResponseWriter, r *http.Request) {
		seen <- r.Header
		for name := range r.Header {
			if strings.HasPrefix(name, "X-") {
				w.Header().Set(name+"-Answer", r.Header.Get(name))
			}
		}
		io.Copy(w, r.Body)
	})
	b := newBench(t, plainManager(rbacFilter), allow(`{"header":{"name":":path","string_match":{"prefix":"/ok"}}}`), c)
	cl := b.dial()
	large := strings.Repeat("x", 9<<10)
	for i := range 200 {
		name, value, body, path := fmt.Sprintf("X-%d", i), fmt.Sprint(i), "", "/ok"
		switch i % 5 {
		case 1:
			body = strings.Repeat("b", i+1)
		case 2:
			value = large
		case 3:
			path = "/no"
		}
		method, length := "GET", ""
		if body != "" {
			method, length = "POST", fmt.Sprintf("Content-Length: %d\r\n", len(body))
		}
		cl.send(fmt.Sprintf("%s %s HTTP/1.1\r\nHost: h\r\n%s: %s\r\n%s\r\n%s", method, path, name, value, length, body))
		resp, got := cl.response(method)
		if path == "/no" {
			if resp.StatusCode != http.StatusForbidden {
				t.Fatalf("request %d: %d", i, resp.StatusCode)
			}
		} else {
			onlyOf(t, <-seen, name, value)
			onlyOf(t, resp.Header, name+"-Answer", value)
			if got != body {
				t.Fatalf("request %d: body %q, want %q", i, got, body)
			}
		}
		if e := b.log.next(t); path == "/ok" {
			onlyOf(t, e.RequestHeaders, name, value)
			onlyOf(t, e.ResponseHeaders, name+"-Answer", value)
		}
	}
}

// onlyOf fails unless a header has this field and no other whose name begins with "X-".
func onlyOf(t *testing.T, h http.Header, name, value string) {
	t.Helper()
	if h.Get(name) != value {
		t.Fatalf("%s is %.20q, want %.20q", name, h.Get(name), value)
	}
	for other := range h {
		if strings.HasPrefix(other, "X-") && other != name {
			t.Fatalf("%s is left over beside %s", other, name)
		}
	}
}

// TestLaterRequestsEndToo: not only a connection's first request is ended at the server when its client goes away.
func TestLaterRequestsEndToo(t *testing.T) {
	began, ended := make(chan struct{}), make(chan struct{})
	c := backend(t, "b", func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wait" {
			close(began)
			<-r.Context().Done()
			close(ended)
		}
	})
	b := newBench(t, plainManager(""), toBackend, c)
	cl := b.dial()
	for range 3 {
		cl.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		cl.response("GET")
		b.log.next(t)
	}
	cl.send("GET /wait HTTP/1.1\r\nHost: h\r\n\r\n")
	<-began
	cl.Close()
	<-ended
	if e := b.log.next(t); len(e.Flags) != 1 || e.Flags[0] != "DC" {
		t.Errorf("flags %v", e.Flags)
	}
}
