// SPDX-License-Identifier: Apache-2.0

// Package httpload makes HTTP requests as fast as they are answered, or at a rate, and serves them as cheaply as may be.
package httpload

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"
)

// body is what the server answers: some of what an API says.
const body = `{"id":4711,"name":"a thing","price":12.5,"tags":["one","two","three"],"stock":{"here":3,"there":14},"note":"0123456789012345678901234567890123456789"}`

// ServeOrigin serves requests as cheaply as may be, so that it is the proxy that is measured: every request on a connection gets the same answer.
func ServeOrigin(ctx context.Context, address string) error {
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("serve origin: %w", err)
	}
	context.AfterFunc(ctx, func() { listener.Close() })
	answer := []byte("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + body)
	for {
		conn, err := listener.Accept()
		if err != nil {
			return nil
		}
		go func() {
			defer conn.Close()
			r := bufio.NewReader(conn)
			for {
				for {
					line, err := r.ReadSlice('\n')
					if err != nil {
						return
					}
					if len(line) <= 2 {
						break
					}
				}
				if _, err := conn.Write(answer); err != nil {
					return
				}
			}
		}()
	}
}

// Result of a load.
type Result struct {
	Requests, Failed int
	Took             time.Duration
	latencies        []time.Duration
}

// Rate is answered requests a second.
func (r Result) Rate() float64 { return float64(r.Requests) / r.Took.Seconds() }

// Latency is a quantile, of 0 to 1.
func (r Result) Latency(q float64) time.Duration {
	if len(r.latencies) == 0 {
		return 0
	}
	return r.latencies[min(len(r.latencies)-1, int(q*float64(len(r.latencies))))]
}

// Load makes requests on connections for some time: as fast as answers come with rate 0, else that many a second over all connections, with latency
// counted from when a request was due, not from when it was sent.
func Load(ctx context.Context, address string, connections int, rate float64, over time.Duration, path string) (Result, error) {
	ctx, cancel := context.WithTimeout(ctx, over+30*time.Second)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	var total Result
	var firstErr error
	begun := time.Now()
	end := begun.Add(over)
	for i := range connections {
		wg.Go(func() {
			w := worker{address: address, path: path, end: end}
			if rate > 0 {
				w.every = time.Duration(float64(connections) / rate * float64(time.Second))
				w.due = begun.Add(w.every * time.Duration(i) / time.Duration(connections))
			}
			err := w.run(ctx)
			mu.Lock()
			defer mu.Unlock()
			total.Requests += len(w.latencies)
			total.Failed += w.failed
			total.latencies = append(total.latencies, w.latencies...)
			if err != nil && firstErr == nil {
				firstErr = err
			}
		})
	}
	wg.Wait()
	total.Took = time.Since(begun)
	slices.Sort(total.latencies)
	if total.Requests == 0 {
		return total, fmt.Errorf("load on %s: no answer: %w", address, firstErr)
	}
	return total, nil
}

type worker struct {
	address, path string
	end, due      time.Time
	every         time.Duration
	latencies     []time.Duration
	failed        int
}

func (w *worker) run(ctx context.Context) error {
	request := []byte("GET " + w.path + " HTTP/1.1\r\nHost: server.example\r\nUser-Agent: l7bench\r\nAccept: */*\r\n\r\n")
	var conn net.Conn
	var r *bufio.Reader
	var lastErr error
	for ctx.Err() == nil && time.Now().Before(w.end) {
		if conn == nil {
			var d net.Dialer
			c, err := d.DialContext(ctx, "tcp", w.address)
			if err != nil {
				w.failed++
				lastErr = err
				time.Sleep(10 * time.Millisecond)
				continue
			}
			conn, r = c, bufio.NewReader(c)
		}
		from := time.Now()
		if w.every > 0 {
			time.Sleep(time.Until(w.due))
			from = w.due
			w.due = w.due.Add(w.every)
		}
		if err := exchange(conn, r, request); err != nil {
			w.failed++
			lastErr = err
			conn.Close()
			conn = nil
			continue
		}
		w.latencies = append(w.latencies, time.Since(from))
	}
	if conn != nil {
		conn.Close()
	}
	return lastErr
}

var errStatus = errors.New("status is not 200")

func exchange(conn net.Conn, r *bufio.Reader, request []byte) error {
	if _, err := conn.Write(request); err != nil {
		return err
	}
	response, err := http.ReadResponse(r, nil)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, response.Body)
	response.Body.Close()
	if err == nil && response.StatusCode != http.StatusOK {
		err = errStatus
	}
	return err
}

// Idle opens connections, each with one request behind it, and keeps them until close.
func Idle(ctx context.Context, address string, connections int) (closeAll func(), err error) {
	var all []net.Conn
	closeAll = func() {
		for _, c := range all {
			c.Close()
		}
	}
	request := []byte("GET / HTTP/1.1\r\nHost: server.example\r\n\r\n")
	for range connections {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			return closeAll, fmt.Errorf("idle connections: %w", err)
		}
		all = append(all, conn)
		if err := exchange(conn, bufio.NewReader(conn), request); err != nil {
			return closeAll, fmt.Errorf("idle connections: %w", err)
		}
	}
	return closeAll, nil
}
