// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// soakRequests is how many requests the soak sends; the environment may say more.
func soakRequests(t *testing.T) int {
	v := os.Getenv("WEIR_SOAK_REQUESTS")
	if v == "" {
		return 5_000
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("WEIR_SOAK_REQUESTS: %v", err)
	}
	return n
}

// usage of the process when nothing is in flight.
type usage struct {
	goroutines, descriptors int
	heap                    uint64
}

func measure(t *testing.T) usage {
	t.Helper()
	var u usage
	var m runtime.MemStats
	for range 3 {
		debug.FreeOSMemory()
	}
	runtime.ReadMemStats(&m)
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	u.goroutines, u.descriptors, u.heap = runtime.NumGoroutine(), len(fds), m.HeapAlloc
	return u
}

// settle waits until connections that were closed have gone, at both of their ends.
func settle(b *bench) {
	deadline := time.Now().Add(20 * time.Second)
	for prev := -1; time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		b.pool.CloseIdle()
		if n := runtime.NumGoroutine(); n == prev {
			return
		} else {
			prev = n
		}
	}
}

// TestSoak: requests of all kinds on connections that come and go leave nothing behind, and each gets its own answer.
func TestSoak(t *testing.T) {
	c := backend(t, "b", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.Header.Get("X-Chunked") != "" {
			w.(http.Flusher).Flush()
		}
		fmt.Fprintf(w, "%s %s", r.RequestURI, body)
	})
	b := newBench(t, plainManager(rbacFilter), allow(`{"not_rule":{"url_path":{"path":{"prefix":"/denied"}}}}`), c)
	b.log.ends = nil
	b.m.env.Logger = nil
	total := soakRequests(t)
	var at [5]usage
	load(t, b, total/10)
	settle(b)
	for i := range at {
		if i > 0 {
			load(t, b, total/4)
			settle(b)
		}
		at[i] = measure(t)
	}
	for i, u := range at[1:] {
		t.Logf("%3d %%: %d goroutines, %d descriptors, heap of %d KiB", (i+1)*25, u.goroutines, u.descriptors, u.heap>>10)
		differs := func(what string, a, b float64) {
			if b > a*1.05+2 {
				t.Errorf("%s at %d %%: %.0f, at 25 %%: %.0f", what, (i+1)*25, b, a)
			}
		}
		differs("goroutines", float64(at[1].goroutines), float64(u.goroutines))
		differs("descriptors", float64(at[1].descriptors), float64(u.descriptors))
		differs("heap (KiB)", float64(at[1].heap>>10), float64(u.heap>>10))
	}
	b.limits.mu.Lock()
	defer b.limits.mu.Unlock()
	if b.limits.inFlight != 0 || b.limits.buffered != 0 || c.active.Load() != 0 {
		t.Errorf("not given back: %d requests, %d bytes, %d of the cluster", b.limits.inFlight, b.limits.buffered, c.active.Load())
	}
}

const soakClients = 16

func load(t *testing.T, b *bench, n int) {
	t.Helper()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range soakClients {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for next.Load() < int64(n) {
				if err := session1(b, &next); err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	wg.Wait()
}

// session1 is one client connection of up to 50 requests; some end in the middle of one.
func session1(b *bench, next *atomic.Int64) error {
	nc, err := net.Dial("tcp", b.addr)
	if err != nil {
		return err
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(time.Minute))
	r := bufio.NewReader(nc)
	for range 1 + rand.IntN(50) {
		i := next.Add(1)
		uri, status := fmt.Sprintf("/r/%d?x", i), 200
		request := "GET " + uri + " HTTP/1.1\r\nHost: h\r\n\r\n"
		want := uri + " "
		switch i % 8 {
		case 1:
			request = "POST " + uri + " HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"
			want += "hello"
		case 2:
			request = "POST " + uri + " HTTP/1.1\r\nHost: h\r\nX-Chunked: 1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
			want += "hello"
		case 3:
			request, want, status = "GET /denied HTTP/1.1\r\nHost: h\r\n\r\n", "Access denied\r\n", 403
		case 4:
			if i%64 == 4 {
				io.WriteString(nc, request[:len(request)-3])
				return nil
			}
		}
		if _, err := io.WriteString(nc, request); err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return fmt.Errorf("request %d: %d %q: %w", i, resp.StatusCode, body, err)
		}
		if string(body) != want || resp.StatusCode != status {
			return fmt.Errorf("request %d: %d %q; want %d %q", i, resp.StatusCode, body, status, want)
		}
	}
	return nil
}
