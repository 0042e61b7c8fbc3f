// SPDX-License-Identifier: Apache-2.0

package web

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/test/e2e/netns"
)

// Client makes requests from inside a network namespace, always to one address, whatever the URL says.
type Client struct {
	http *http.Client
	from netip.Addr
}

// Options of a client.
type Options struct {
	// HTTP2 with prior knowledge.
	HTTP2 bool
	// Fresh makes a connection for each request.
	Fresh bool
	// Timeout of a request; default a minute: on a busy machine an answer may take long, one that is lost never comes.
	Timeout time.Duration
}

// NewClient makes a client in the namespace at path. from is its own address, which it tells the server; invalid = it does not.
func NewClient(path string, from netip.Addr, to netip.AddrPort, o Options) *Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!o.HTTP2)
	protocols.SetUnencryptedHTTP2(o.HTTP2)
	if o.Timeout == 0 {
		o.Timeout = time.Minute
	}
	transport := &http.Transport{
		Protocols: protocols, DisableKeepAlives: o.Fresh, DisableCompression: true, MaxIdleConnsPerHost: 16,
		DialContext: func(ctx context.Context, _, _ string) (conn net.Conn, err error) {
			err = netns.Do(path, func() error {
				var d net.Dialer
				conn, err = d.DialContext(ctx, "tcp", to.String())
				return err
			})
			return conn, err
		},
	}
	return &Client{
		http: &http.Client{
			Transport: transport, Timeout: o.Timeout,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		from: from,
	}
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Answer is what came back.
type Answer struct {
	Status int
	Body   string
	Header http.Header
	// Echo is what the server saw; nil = the answer is not the server's.
	Echo *Echo
	Took time.Duration
}

// Do makes one request. url is such as http://host/path; headers are "Name: value".
func (c *Client) Do(ctx context.Context, method, url string, headers ...string) (Answer, error) {
	begun := time.Now()
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return Answer{}, fmt.Errorf("request: %w", err)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ":")
		req.Header.Add(name, strings.TrimSpace(value))
	}
	if c.from.IsValid() {
		req.Header.Set(FromHeader, c.from.String())
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return Answer{}, fmt.Errorf("%s %s: %w", method, url, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return Answer{}, fmt.Errorf("%s %s: read answer: %w", method, url, err)
	}
	a := Answer{Status: resp.StatusCode, Body: string(b), Header: resp.Header, Took: time.Since(begun)}
	var echo Echo
	if resp.Header.Get("X-Server") != "" {
		if err := json.Unmarshal(b, &echo); err != nil {
			return a, fmt.Errorf("%s %s: answer %q: %w", method, url, b, err)
		}
		a.Echo = &echo
		if echo.Shared != "" {
			return a, errors.New(echo.Shared)
		}
	}
	return a, nil
}

// ServerName begins TLS with a server name ("" = none) and returns whether a handshake came about.
func ServerName(ctx context.Context, path string, to netip.AddrPort, name string) error {
	var conn net.Conn
	err := netns.Do(path, func() (err error) {
		var d net.Dialer
		conn, err = d.DialContext(ctx, "tcp", to.String())
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline) // a closed connection says so below
	}
	// Whose certificate it is does not matter here.
	return tls.Client(conn, &tls.Config{ServerName: name, InsecureSkipVerify: true}).HandshakeContext(ctx) //nolint:gosec // see above
}

// Request is one kind of request of a load, and the status that it must get; Status 0 = it must fail.
type Request struct {
	Method, URL string
	Headers     []string
	Status      int
}

// Load makes requests until it is stopped.
type Load struct {
	Client   *Client
	Requests []Request
	Every    time.Duration
	// Workers at a time; default 1.
	Workers int
}

// Result of a load.
type Result struct {
	// Right answers, by status.
	Right map[int]int
	// Wrong answers: another status than expected, by text.
	Wrong map[string]int
	// Failed requests, which got no answer, by text; Times says when the first few failed.
	Failed  map[string]int
	Times   []time.Time
	Servers map[string]int
}

// Total counts requests.
func (r Result) Total() int {
	n := r.Failures()
	for _, k := range r.Right {
		n += k
	}
	for _, k := range r.Wrong {
		n += k
	}
	return n
}

// Failures counts requests without an answer.
func (r Result) Failures() int {
	n := 0
	for _, k := range r.Failed {
		n += k
	}
	return n
}

// String is for messages.
func (r Result) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d requests, right %v", r.Total(), r.Right)
	for _, part := range []struct {
		name string
		m    map[string]int
	}{{"wrong", r.Wrong}, {"failed", r.Failed}} {
		for _, text := range slices.Sorted(maps.Keys(part.m)) {
			fmt.Fprintf(&b, "; %s %d times: %s", part.name, part.m[text], text)
		}
	}
	return b.String()
}

// Running is a load under way.
type Running struct {
	client *Client
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	result Result
}

// Start makes the requests in turn until Stop.
func (l Load) Start(ctx context.Context) *Running {
	ctx, cancel := context.WithCancel(ctx)
	r := &Running{client: l.Client, cancel: cancel, result: Result{Right: map[int]int{}, Wrong: map[string]int{}, Failed: map[string]int{}, Servers: map[string]int{}}}
	for worker := range max(l.Workers, 1) {
		r.wg.Go(func() {
			tick := time.NewTicker(l.Every)
			defer tick.Stop()
			for i := worker; ; i++ {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				q := l.Requests[i%len(l.Requests)]
				// A request that has begun ends.
				a, err := l.Client.Do(context.WithoutCancel(ctx), q.Method, q.URL, q.Headers...)
				r.mu.Lock()
				r.result.count(q, a, err)
				r.mu.Unlock()
			}
		})
	}
	return r
}

// Right counts the right answers so far.
func (r *Running) Right() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, k := range r.result.Right {
		n += k
	}
	return n
}

// Stop ends the load and returns what became of it.
func (r *Running) Stop() Result {
	r.cancel()
	r.wg.Wait()
	r.client.Close()
	return r.result
}

func (r *Result) count(q Request, a Answer, err error) {
	if a.Echo != nil {
		r.Servers[a.Echo.Server]++
	}
	switch {
	case err != nil && q.Status == 0:
		r.Right[0]++
	case err != nil:
		r.Failed[words(err)]++
		if len(r.Times) < 64 {
			r.Times = append(r.Times, time.Now())
		}
	case a.Status != q.Status:
		r.Wrong[fmt.Sprintf("%s %s: %d instead of %d", q.Method, q.URL, a.Status, q.Status)]++
	default:
		r.Right[a.Status]++
	}
}

// words is an error without the ports that make every one another.
func words(err error) string {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Op + ": " + op.Err.Error()
	}
	text := err.Error()
	if i := strings.LastIndex(text, ": "); i >= 0 {
		text = text[i+2:]
	}
	return text
}
