// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/model"
)

func retrying(policy string) string {
	return `{"name":"r","virtual_hosts":[{"name":"v","domains":["*"],"routes":[{"match":{"prefix":"/"},"route":{"cluster":"b","timeout":"0s",
	"retry_policy":{"retry_back_off":{"base_interval":"0.001s"},` + policy + `}}}]}]}`
}

func TestRetries(t *testing.T) {
	type answer = func(nc net.Conn)
	status := func(code int) answer {
		return func(nc net.Conn) { fmt.Fprintf(nc, "HTTP/1.1 %d X\r\nContent-Length: 1\r\n\r\nx", code) }
	}
	reset := func(nc net.Conn) { nc.(*net.TCPConn).SetLinger(0); nc.Close() }
	tests := []struct {
		name, policy, request string
		answers               []answer
		budget                int64
		want                  int
		attempts              uint32
		flags                 string
	}{
		{"5xx", `"retry_on":"5xx","num_retries":2`, "GET", []answer{status(500), status(503), status(200)}, 9, 200, 3, ""},
		{"5xx, no more", `"retry_on":"5xx","num_retries":1`, "GET", []answer{status(500), status(503), status(200)}, 9, 503, 2, "URX"},
		{"gateway error is no 500", `"retry_on":"gateway-error"`, "GET", []answer{status(500), status(200)}, 9, 500, 1, ""},
		{"gateway error", `"retry_on":"gateway-error"`, "GET", []answer{status(502), status(200)}, 9, 200, 2, ""},
		{"status codes", `"retry_on":"retriable-status-codes","retriable_status_codes":[418]`, "GET", []answer{status(418), status(200)}, 9, 200, 2, ""},
		{"409", `"retry_on":"retriable-4xx"`, "GET", []answer{status(409), status(200)}, 9, 200, 2, ""},
		{"reset", `"retry_on":"reset"`, "GET", []answer{reset, status(200)}, 9, 200, 2, ""},
		{"reset is no connect failure", `"retry_on":"connect-failure"`, "GET", []answer{reset, status(200)}, 9, 503, 1, "UC"},
		{"no budget", `"retry_on":"5xx"`, "GET", []answer{status(500), status(200)}, 0, 500, 1, "URX"},
		{"body is sent again", `"retry_on":"5xx"`, "POST", []answer{status(500), status(200)}, 9, 200, 2, ""},
		{"large body is not", `"retry_on":"5xx"`, "LARGE", []answer{status(500), status(200)}, 9, 500, 1, "URX"},
		{"other requests", `"retry_on":"5xx","retriable_request_headers":[{"name":":method","exact_match":"PUT"}]`, "GET", []answer{status(500)}, 9, 500, 1, ""},
		{"time of an attempt", `"retry_on":"5xx","per_try_timeout":"0.05s"`, "GET", []answer{func(nc net.Conn) { io.Copy(io.Discard, nc) }, status(200)}, 9, 200, 2, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var turn atomic.Int64
			var mu sync.Mutex
			var bodies []string
			c := rawBackend(t, "b", func(nc net.Conn, r *bufio.Reader) {
				for {
					req, err := http.ReadRequest(r)
					if err != nil {
						return
					}
					body, _ := io.ReadAll(req.Body)
					mu.Lock()
					bodies = append(bodies, string(body))
					mu.Unlock()
					tt.answers[int(turn.Add(1))-1](nc)
				}
			})
			c.budget.Store(tt.budget)
			b := newBench(t, plainManager(""), retrying(tt.policy), c)
			request := tt.request + " / HTTP/1.1\r\nHost: h\r\n"
			body := ""
			switch tt.request {
			case "POST":
				body = strings.Repeat("b", 60000)
			case "LARGE":
				body = strings.Repeat("b", 70000)
			}
			if body != "" {
				request += fmt.Sprintf("Content-Length: %d\r\n", len(body))
			}
			resp, _ := b.get(request + "\r\n" + body)
			e := b.log.next(t)
			if resp.StatusCode != tt.want || e.Attempts != tt.attempts || strings.Join(e.Flags, ",") != tt.flags {
				t.Errorf("got %d, %d attempts, flags %v", resp.StatusCode, e.Attempts, e.Flags)
			}
			mu.Lock()
			defer mu.Unlock()
			for _, got := range bodies {
				if got != body {
					t.Errorf("the server got a body of %d bytes, want %d", len(got), len(body))
				}
			}
			if c.budget.Load() != tt.budget || c.active.Load() != 0 || b.limits.buffered != 0 {
				t.Errorf("not given back: budget %d, active %d, buffered %d", c.budget.Load(), c.active.Load(), b.limits.buffered)
			}
		})
	}
}

// refusedAddr is an address where nobody listens.
func refusedAddr(t *testing.T) netip.AddrPort {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String())
}

func TestConnectFailure(t *testing.T) {
	c := backend(t, "b", echo)
	c.endpoints = append([]netip.AddrPort{refusedAddr(t)}, c.endpoints...)
	b := newBench(t, plainManager(""), retrying(`"retry_on":"connect-failure","retry_host_predicate":[{"name":"envoy.retry_host_predicates.previous_hosts",
		"typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]`), c)
	for range 4 {
		if resp, body := b.get("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nok"); resp.StatusCode != 200 || !strings.Contains(body, "body=ok") {
			t.Errorf("got %d %q", resp.StatusCode, body)
		}
	}
	b.setRoutes(toBackend)
	c.endpoints = c.endpoints[:1]
	resp, _ := b.get("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	for range 4 {
		b.log.next(t)
	}
	if e := b.log.next(t); resp.StatusCode != 503 || strings.Join(e.Flags, ",") != "UF" {
		t.Errorf("got %d, %v", resp.StatusCode, e.Flags)
	}
}

func TestTimeouts(t *testing.T) {
	tests := []struct {
		name, route, manager, send string
		want                       int
		flag                       string
	}{
		{"route", `"timeout":"0.05s"`, "", "GET /never HTTP/1.1\r\nHost: h\r\n\r\n", 504, "UT"},
		{"stream is idle", `"timeout":"0s","idle_timeout":"0.05s"`, "", "GET /never HTTP/1.1\r\nHost: h\r\n\r\n", 408, "SI"},
		{"stream is idle, by the manager", `"timeout":"0s"`, `"stream_idle_timeout":"0.05s",`, "GET /never HTTP/1.1\r\nHost: h\r\n\r\n", 408, "SI"},
		{"longest stream", `"timeout":"0s","max_stream_duration":{"max_stream_duration":"0.05s"}`, "", "GET /never HTTP/1.1\r\nHost: h\r\n\r\n", 504, "UMSDR"},
		{"slow head", `"timeout":"0s"`, `"request_headers_timeout":"0.05s",`, "GET / HTTP/1.1\r\nHost:", 408, "DPE"},
		{"slow body", `"timeout":"0s","idle_timeout":"0.05s"`, "", "POST /never HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nab", 408, "SI"},
		{"slow body, by the request's time", `"timeout":"0s"`, `"request_timeout":"0.05s",`, "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nab", 408, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := backend(t, "b", func(_ http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				<-r.Context().Done()
			})
			routes := strings.Replace(toBackend, `"timeout":"0s"`, tt.route, 1)
			b := newBench(t, strings.Replace(plainManager(""), `{`, `{`+tt.manager, 1), routes, c)
			cl := b.dial()
			cl.send(tt.send)
			resp, _ := cl.response("GET")
			if e := b.log.next(t); resp.StatusCode != tt.want || strings.Join(e.Flags, ",") != tt.flag {
				t.Errorf("got %d, flags %v (%s)", resp.StatusCode, e.Flags, e.Details)
			}
		})
	}
}

// An answer that breaks off reaches the client as one that breaks off.
func TestBrokenAnswer(t *testing.T) {
	c := rawBackend(t, "b", func(nc net.Conn, r *bufio.Reader) {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		if req.URL.Path == "/chunked" {
			io.WriteString(nc, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
			return
		}
		io.WriteString(nc, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
	})
	b := newBench(t, plainManager(""), toBackend, c)
	for _, path := range []string{"/chunked", "/length"} {
		cl := b.dial()
		cl.send("GET " + path + " HTTP/1.1\r\nHost: h\r\n\r\n")
		resp, err := http.ReadResponse(cl.r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("%s: whole answer %q", path, body)
		}
		if e := b.log.next(t); strings.Join(e.Flags, ",") != "UC" || e.Status != 200 {
			t.Errorf("%s: entry %v %d", path, e.Flags, e.Status)
		}
	}
}

// No upstream connection serves two client addresses, nor two marks, whatever their order.
func TestNoSharing(t *testing.T) {
	c := rawBackend(t, "b", func(nc net.Conn, r *bufio.Reader) {
		first := ""
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			who := req.Header.Get("X-A")
			if first == "" {
				first = who
			}
			fmt.Fprintf(nc, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(first), first)
		}
	})
	b := newBench(t, plainManager(""), toBackend, c)
	ask := func(addr string, mark uint32) {
		t.Helper()
		client, server := net.Pipe()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			b.m.Serve(t.Context(), server, &model.Conn{Namespace: "x", Remote: netip.MustParseAddrPort(addr), Local: netip.MustParseAddrPort("10.9.9.9:80"),
				Source: &model.Source{Mark: mark}})
		}()
		who := fmt.Sprint(netip.MustParseAddrPort(addr).Addr(), "/", mark)
		for range 3 {
			go fmt.Fprintf(client, "GET / HTTP/1.1\r\nHost: h\r\nX-A: %s\r\n\r\n", who)
			resp, err := http.ReadResponse(bufio.NewReader(client), nil)
			if err != nil {
				t.Fatal(err)
			}
			if body, _ := io.ReadAll(resp.Body); string(body) != who {
				t.Errorf("%s was served on the connection of %s", who, body)
			}
		}
		client.Close()
		<-ended
	}
	for _, addr := range []string{"10.0.0.1:1000", "10.0.0.2:1000", "10.0.0.1:2000", "[fd00::1]:1", "10.0.0.2:3000"} {
		ask(addr, 0x300)
		ask(addr, 0x500)
	}
	if n := c.dials.Load(); n != 6 {
		t.Errorf("%d connections for 6 pairs of address and mark", n)
	}
}

// An idle connection that the server has closed costs no request.
func TestStaleConnection(t *testing.T) {
	var conns sync.Map
	c := rawBackend(t, "b", func(nc net.Conn, r *bufio.Reader) {
		conns.Store(nc, true)
		for {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			io.WriteString(nc, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	})
	b := newBench(t, plainManager(""), toBackend, c)
	cl := b.dial()
	for range 50 {
		cl.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		if resp, _ := cl.response("GET"); resp.StatusCode != 200 {
			t.Fatalf("got %d", resp.StatusCode)
		}
		conns.Range(func(k, _ any) bool { k.(net.Conn).Close(); conns.Delete(k); return true })
	}
}

func TestDrain(t *testing.T) {
	begun, hold := make(chan struct{}, 2), make(chan struct{})
	c := backend(t, "b", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			begun <- struct{}{}
			<-hold
		}
		io.WriteString(w, "done")
	})
	b := newBench(t, plainManager(""), toBackend, c)
	idle, fresh, silent, busy := b.dial(), b.dial(), b.dial(), b.dial()
	idle.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	idle.response("GET")
	busy.send("POST /slow HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nab")
	h2 := b.frames(t)
	h2.fr.WriteHeaders(http2Headers(h2, "/slow"))
	<-begun
	<-begun
	b.drain()
	idle.closed()
	// Who has sent nothing yet could not know: the first request is answered, and is the last.
	fresh.send("GET /first HTTP/1.1\r\nHost: h\r\n\r\n")
	if resp, body := fresh.response("GET"); resp.StatusCode != 200 || body != "done" || !resp.Close {
		t.Errorf("first request of a drained connection: %d %q, close %v", resp.StatusCode, body, resp.Close)
	}
	fresh.closed()
	silent.closed()
	// The rest of a body still comes through.
	busy.send("cd")
	close(hold)
	if resp, body := busy.response("POST"); resp.StatusCode != 200 || body != "done" || !resp.Close {
		t.Errorf("in flight: %d %q, close %v", resp.StatusCode, body, resp.Close)
	}
	busy.closed()
	if got := h2.outcome(1); got != "200" {
		t.Errorf("HTTP/2: %s", got)
	}
	if got := h2.outcome(9); got != "closed" {
		t.Errorf("HTTP/2 afterwards: %s", got)
	}
}

func TestIdle(t *testing.T) {
	var reached atomic.Bool
	b := newBench(t, strings.Replace(plainManager(""), "{", `{"common_http_protocol_options":{"idle_timeout":"0.1s"},`, 1), toBackend,
		backend(t, "b", func(w http.ResponseWriter, r *http.Request) {
			reached.Store(true)
			// Longer than idle connections live: a request in flight is not idle.
			select {
			case <-r.Context().Done():
			case <-time.After(300 * time.Millisecond):
			}
			io.WriteString(w, "done")
		}))
	for range 100 {
		cl := b.dial()
		_, err := io.WriteString(cl, "GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		if err == nil {
			_, err = cl.r.Peek(1)
		}
		if err != nil && !reached.Load() {
			continue // on a busy machine the connection was idle before the request came
		}
		if _, body := cl.response("GET"); body != "done" {
			t.Errorf("got %q", body)
		}
		cl.closed()
		return
	}
	t.Error("no request reached the backend")
}
