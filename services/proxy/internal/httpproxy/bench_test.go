// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"bufio"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	benchRequest = "GET /api/v1/products?page=2 HTTP/1.1\r\nHost: shop.example:8080\r\nUser-Agent: bench/1\r\nAccept: */*\r\nAccept-Encoding: gzip\r\n" +
		"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n\r\n"
	benchBody = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	benchResp = "HTTP/1.1 200 OK\r\nDate: Mon, 01 Jan 2026 00:00:00 GMT\r\nContent-Type: text/plain\r\nContent-Length: 64\r\n\r\n" + benchBody
)

// staticBackend answers each head with the same bytes, as cheaply as can be.
func staticBackend(t testing.TB) *cluster {
	return rawBackend(t, "b", func(nc net.Conn, r *bufio.Reader) {
		for {
			for {
				line, err := r.ReadSlice('\n')
				if err != nil {
					return
				}
				if len(line) == 2 {
					break
				}
			}
			if _, err := io.WriteString(nc, benchResp); err != nil {
				return
			}
		}
	})
}

// exchangeBytes sends a request and reads an answer of known end.
func exchangeBytes(nc net.Conn, r *bufio.Reader) error {
	if _, err := io.WriteString(nc, benchRequest); err != nil {
		return err
	}
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(line) == 2 {
			break
		}
	}
	_, err := r.Discard(len(benchBody))
	return err
}

// cpuTime of the whole process, clients and server included: what a busy machine does not falsify.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// drive sends b.N requests over some connections and reports the rate and latencies.
func drive(b *testing.B, addr string) {
	const conns = 8
	var wg sync.WaitGroup
	took := make([][]time.Duration, conns)
	b.ReportAllocs()
	before := cpuTime(b)
	b.ResetTimer()
	for i := range conns {
		wg.Add(1)
		go func() {
			defer wg.Done()
			nc, err := net.Dial("tcp", addr)
			if err != nil {
				b.Error(err)
				return
			}
			defer nc.Close()
			r := bufio.NewReader(nc)
			for range b.N/conns + 1 {
				begin := time.Now()
				if err := exchangeBytes(nc, r); err != nil {
					b.Error(err)
					return
				}
				took[i] = append(took[i], time.Since(begin))
			}
		}()
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/float64(b.N), "cpu-µs/op")
	all := slices.Concat(took...)
	slices.Sort(all)
	b.ReportMetric(float64(len(all))/b.Elapsed().Seconds(), "requests/s")
	b.ReportMetric(float64(all[len(all)/2].Microseconds()), "µs-median")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "µs-p99")
}

func BenchmarkProxy(b *testing.B) {
	rule := allow(`{"header":{"name":":path","string_match":{"safe_regex":{"regex":"/api/v1/.*"}}}}`)
	c := staticBackend(b)
	b.Run("direct", func(b *testing.B) { drive(b, c.endpoints[0].String()) })
	b.Run("relay", func(b *testing.B) { drive(b, relay(b, c.endpoints[0].String())) })
	proxied := func(lib bool) func(*testing.B) {
		return func(b *testing.B) {
			library = lib
			defer func() { library = false }()
			p := newBench(b, strings.Replace(plainManager(rbacFilter), `"flush_access_log_on_new_request":true`, "", 1), rule, c)
			p.m.env.Logger = nil
			drive(b, p.addr)
		}
	}
	b.Run("library", proxied(true))
	b.Run("proxy", proxied(false))
}

// relay copies bytes, as the cheapest proxy there is.
func relay(b *testing.B, to string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	var wg sync.WaitGroup
	b.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", to)
			if err != nil {
				nc.Close()
				return
			}
			wg.Add(2)
			one := func(to, from net.Conn) {
				defer wg.Done()
				defer to.Close()
				buf := make([]byte, 32<<10)
				for {
					n, err := from.Read(buf)
					if err != nil {
						return
					}
					if _, err := to.Write(buf[:n]); err != nil {
						return
					}
				}
			}
			go one(nc, up)
			go one(up, nc)
		}
	}()
	return l.Addr().String()
}
