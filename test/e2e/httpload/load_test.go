// SPDX-License-Identifier: Apache-2.0

package httpload

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"
)

// serve runs a server on a free port.
func serve(t *testing.T, server func(ctx context.Context, address string) error) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address = listener.Addr().String()
	listener.Close()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server(ctx, address) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	for end := time.Now().Add(10 * time.Second); ; {
		closeAll, err := Idle(ctx, address, 20)
		closeAll()
		if err == nil {
			return address
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// TestLoad: the load and the origin agree on what a request is, and a rate is kept.
func TestLoad(t *testing.T) {
	address := serve(t, ServeOrigin)
	r, err := Load(t.Context(), address, 4, 0, 200*time.Millisecond, "/")
	if err != nil || r.Requests < 10 || r.Failed > 0 {
		t.Errorf("as fast as may be: %+v, %v", r, err)
	}
	r, err = Load(t.Context(), address, 4, 200, 500*time.Millisecond, "/")
	if err != nil || r.Failed > 0 || r.Requests != 100 || r.Median <= 0 || r.P99 < r.Median || r.Max < r.P99 {
		t.Errorf("200 a second: %+v, %v", r, err)
	}
}

// scripted is a server of one connection after the other, each led by a function.
func scripted(t *testing.T, lead func(conn net.Conn, r *bufio.Reader)) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				lead(conn, bufio.NewReader(conn))
			}()
		}
	}()
	return listener.Addr().String()
}

const emptyAnswer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

func readRequest(r *bufio.Reader) bool {
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return false
		}
		if line == "\r\n" {
			return true
		}
	}
}

// TestStall: a server that stands still is charged with all requests that were due meanwhile, not only with the one that it holds.
func TestStall(t *testing.T) {
	const rate, pause = 100.0, 500 * time.Millisecond
	var stalled atomic.Bool
	address := scripted(t, func(conn net.Conn, r *bufio.Reader) {
		for readRequest(r) {
			if !stalled.Swap(true) {
				<-time.After(pause) // what is measured
			}
			if _, err := io.WriteString(conn, emptyAnswer); err != nil {
				return
			}
		}
	})
	r, err := Load(t.Context(), address, 1, rate, time.Second, "/")
	if err != nil || r.Failed > 0 || r.Requests != 100 {
		t.Fatalf("%+v, %v", r, err)
	}
	// Requests 0 to 49 were due while the server stood still: half of all, with latencies from the whole pause down to nothing.
	if r.Max < pause || r.P99 < pause*9/10 {
		t.Errorf("max %s, p99 %s of a server that stood still for %s", r.Max, r.P99, pause)
	}
}

// TestFailures: each request that is refused, cut off or answered wrongly is counted, and the others go on.
func TestFailures(t *testing.T) {
	for _, tt := range []struct {
		name, answer string
		want         error
	}{
		{"refused", "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", errStatus},
		{"cut off", "", errClosed},
		{"cut off within", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", errClosed},
		{"two answers", emptyAnswer + emptyAnswer, errAnswer},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var n atomic.Int32
			address := scripted(t, func(conn net.Conn, r *bufio.Reader) {
				for readRequest(r) {
					answer, third := emptyAnswer, n.Add(1) == 3
					if third {
						answer = tt.answer
					}
					if _, err := io.WriteString(conn, answer); err != nil || third {
						return
					}
				}
			})
			r, err := Load(t.Context(), address, 1, 200, 100*time.Millisecond, "/")
			if err != nil || r.Failed != 1 || r.Requests != 19 || r.First != tt.want.Error() {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}

// TestAllocations: nothing is allocated for a request.
func TestAllocations(t *testing.T) {
	address := serve(t, ServeOrigin)
	l, err := newLoop(t.Context(), address, 1, "/")
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	one := func() {
		l.send(0)
		for before := l.answered; l.answered == before && l.failed == 0; {
			l.read(0)
		}
	}
	l.every, l.begun, l.latencies = time.Millisecond, time.Now(), make([]time.Duration, 0, 1000)
	one()
	if n := testing.AllocsPerRun(100, one); n >= 1 || l.failed > 0 {
		t.Errorf("%.1f allocations a request, %d failed", n, l.failed)
	}
}

// TestFlood: each kind of the flood reaches a server that refuses nothing.
func TestFlood(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var requests, bodies, connections atomic.Int64
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n, err := io.Copy(io.Discard, r.Body); r.Method == "POST" && err == nil && n == floodBody {
			bodies.Add(1)
		} else if r.Method == "GET" {
			requests.Add(1)
		}
		if requests.Load() > 0 && bodies.Load() > 0 && connections.Load() > floodRequests+floodBodies {
			cancel()
		}
	}))
	server.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			connections.Add(1)
		}
	}
	server.Start()
	defer server.Close()
	Flood(ctx, server.Listener.Addr().String(), time.Minute)
	if requests.Load() == 0 || bodies.Load() == 0 || connections.Load() <= floodRequests+floodBodies {
		t.Errorf("%d requests, %d bodies, %d connections", requests.Load(), bodies.Load(), connections.Load())
	}
}
