// SPDX-License-Identifier: Apache-2.0

package httpload

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Flooded is what a flood came to.
type Flooded struct {
	// Requests that were answered, Bodies that were taken whole and answered, Connections that were opened and left with half a request.
	Requests, Bodies, Connections int
}

// How many of each kind a flood uses at a time.
const (
	floodRequests = 16
	floodBodies   = 8
	floodOpeners  = 8
	// openerKeeps is how many connections an opener leaves open.
	openerKeeps = 200
	floodBody   = 4 << 20
)

// Flood does to a proxy what a tenant can who means ill: requests as fast as they are answered, large bodies, and connections with half a request on each,
// as many as are let in. Being refused is what it is for.
func Flood(ctx context.Context, address string, over time.Duration) Flooded {
	ctx, cancel := context.WithTimeout(ctx, over)
	defer cancel()
	var wg sync.WaitGroup
	var f Flooded
	var bodies, connections atomic.Int64
	wg.Go(func() {
		r, _ := Load(ctx, address, floodRequests, 0, over, "/") // it may have got no answer at all
		f.Requests = r.Requests
	})
	for range floodBodies {
		wg.Go(func() { sendBodies(ctx, address, &bodies) })
	}
	for range floodOpeners {
		wg.Go(func() { openConnections(ctx, address, &connections) })
	}
	wg.Wait()
	f.Bodies, f.Connections = int(bodies.Load()), int(connections.Load())
	return f
}

// dial opens a connection that ends with ctx. Who is refused waits a little: a flood of refusals is the client's own business.
func dial(ctx context.Context, address string) net.Conn {
	var d net.Dialer
	for ctx.Err() == nil {
		conn, err := d.DialContext(ctx, "tcp", address)
		if err == nil {
			return conn
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Millisecond):
		}
	}
	return nil
}

func sendBodies(ctx context.Context, address string, count *atomic.Int64) {
	head := fmt.Sprintf("POST / HTTP/1.1\r\nHost: server.example\r\nContent-Length: %d\r\n\r\n", floodBody)
	body := strings.Repeat("x", floodBody)
	for {
		conn := dial(ctx, address)
		if conn == nil {
			return
		}
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		for answers := bufio.NewReader(conn); ; count.Add(1) {
			if _, err := io.WriteString(conn, head+body); err != nil {
				break
			}
			response, err := http.ReadResponse(answers, nil)
			if err != nil {
				break
			}
			_, err = io.Copy(io.Discard, response.Body)
			response.Body.Close()
			if err != nil {
				break
			}
		}
		stop()
		conn.Close()
	}
}

func openConnections(ctx context.Context, address string, count *atomic.Int64) {
	head := "GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + strings.Repeat("a", 8000)
	open := make([]net.Conn, 0, openerKeeps+1)
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for {
		conn := dial(ctx, address)
		if conn == nil {
			return
		}
		count.Add(1)
		_ = conn.SetDeadline(time.Now().Add(time.Second)) // the write fails then as it does when refused
		_, _ = io.WriteString(conn, head)
		if open = append(open, conn); len(open) > openerKeeps {
			open[0].Close()
			open = append(open[:0], open[1:]...)
		}
	}
}

// ServeSink serves requests with bodies, of which it keeps nothing.
func ServeSink(ctx context.Context, address string) error {
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("serve sink: %w", err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err == nil {
			_, _ = io.WriteString(w, body) // who is gone needs none
		}
	})}
	context.AfterFunc(ctx, func() { server.Close() })
	if err := server.Serve(listener); ctx.Err() == nil {
		return fmt.Errorf("serve sink: %w", err)
	}
	return nil
}
