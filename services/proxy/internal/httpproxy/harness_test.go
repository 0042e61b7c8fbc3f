// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"bufio"
	"context"
	"flag"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/encoding/protojson"

	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/local_ratelimit/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"

	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/upstream"
)

// library: this run is the library's, which is the oracle of package h1.
var library bool

// TestMain runs all tests over both.
func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if f := flag.Lookup("test.bench"); f.Value.String() == "" {
		library = true
		code = max(code, m.Run())
	}
	os.Exit(code)
}

// cluster is a fake of model.Cluster with fixed endpoints, taken in turn.
type cluster struct {
	name      string
	protocol  model.Protocol
	endpoints []netip.AddrPort
	turn      atomic.Uint64
	budget    atomic.Int64
	active    atomic.Int64
	dials     atomic.Int64
	timeout   time.Duration
}

func (c *cluster) Name() string                  { return c.name }
func (c *cluster) Protocol() model.Protocol      { return c.protocol }
func (c *cluster) ConnectTimeout() time.Duration { return c.timeout }

func (c *cluster) Acquire(_ *model.Conn, avoid []netip.AddrPort) (model.Endpoint, func(bool), error) {
	if len(c.endpoints) == 0 {
		return model.Endpoint{}, nil, model.ErrNoEndpoint
	}
	e := c.endpoints[int(c.turn.Add(1)-1)%len(c.endpoints)]
	for range c.endpoints {
		bad := false
		for _, a := range avoid {
			bad = bad || a == e
		}
		if !bad {
			break
		}
		e = c.endpoints[int(c.turn.Add(1)-1)%len(c.endpoints)]
	}
	c.active.Add(1)
	return model.Endpoint{Address: e, Healthy: true}, func(bool) { c.active.Add(-1) }, nil
}

func (c *cluster) Retry() (func(), bool) {
	if c.budget.Add(-1) < 0 {
		c.budget.Add(1)
		return nil, false
	}
	return func() { c.budget.Add(1) }, true
}

func (c *cluster) Dial(ctx context.Context, _ *model.Conn, e model.Endpoint) (net.Conn, error) {
	c.dials.Add(1)
	var d net.Dialer
	return d.DialContext(ctx, "tcp", e.Address.String())
}

type clusters struct {
	mu sync.Mutex
	m  map[string]*cluster
}

func (c *clusters) Cluster(name string) model.Cluster {
	c.mu.Lock()
	defer c.mu.Unlock()
	if x, ok := c.m[name]; ok {
		return x
	}
	return nil
}

// limits counts, and refuses what it is told to.
type limits struct {
	mu       sync.Mutex
	refused  map[string]int
	inFlight int
	buffered int
	full     bool
}

func (l *limits) Connection(string) (func(), bool) { return func() {}, true }

func (l *limits) Request(string) (func(), bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.full {
		return nil, false
	}
	l.inFlight++
	return func() { l.mu.Lock(); l.inFlight--; l.mu.Unlock() }, true
}

func (l *limits) Buffer(_ string, n int) (func(), bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buffered += n
	return func() { l.mu.Lock(); l.buffered -= n; l.mu.Unlock() }, true
}

func (l *limits) Refused(_, cause string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refused[cause]++
}

func (l *limits) causes() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.refused)
}

// entries is a logger that keeps what it is told, and tells of ends.
type entries struct {
	mu   sync.Mutex
	list []model.Entry
	ends chan model.Entry
}

func (l *entries) Log(e *model.Entry) {
	c := *e
	c.RequestHeaders, c.ResponseHeaders = e.RequestHeaders.Clone(), e.ResponseHeaders.Clone()
	l.mu.Lock()
	l.list = append(l.list, c)
	l.mu.Unlock()
	if !e.Begin {
		select {
		case l.ends <- c:
		default:
		}
	}
}

// next is the entry of the next request that has ended.
func (l *entries) next(t *testing.T) model.Entry {
	t.Helper()
	select {
	case e := <-l.ends:
		return e
	case <-time.After(10 * time.Second):
		t.Fatal("no entry in the access log")
		return model.Entry{}
	}
}

// bench is a proxy on a loopback listener.
type bench struct {
	t        testing.TB
	addr     string
	m        *Manager
	clusters *clusters
	limits   *limits
	log      *entries
	pool     *upstream.Pool
	routes   atomic.Pointer[Routes]
	drain    context.CancelFunc
	served   sync.WaitGroup
}

const routerFilter = `{"name":"router","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}`

// plainManager is a manager as the xDS server renders it, without filters before the router.
func plainManager(filters string) string {
	if filters != "" {
		filters += ","
	}
	return `{"stat_prefix":"x","rds":{"route_config_name":"r","config_source":{"ads":{}}},"http_filters":[` + filters + routerFilter + `],
	"normalize_path":true,"merge_slashes":true,"path_with_escaped_slashes_action":"UNESCAPE_AND_REDIRECT","server_header_transformation":"PASS_THROUGH",
	"generate_request_id":false,"skip_xff_append":true,"upgrade_configs":[{"upgrade_type":"websocket"}],
	"access_log_options":{"flush_access_log_on_new_request":true},
	"local_reply_config":{"mappers":[{"filter":{"status_code_filter":{"comparison":{"op":"EQ","value":{"default_value":403,"runtime_key":"x"}}}},
	"body":{"inline_string":"Access denied\r\n"}}]}}`
}

// toBackend sends everything to the cluster "b".
const toBackend = `{"name":"r","virtual_hosts":[{"name":"v","domains":["*"],"routes":[{"match":{"prefix":"/"},"route":{"cluster":"b","timeout":"0s"}}]}]}`

func newBench(t testing.TB, manager, routes string, cs ...*cluster) *bench {
	t.Helper()
	b := &bench{t: t, clusters: &clusters{m: map[string]*cluster{}}, limits: &limits{refused: map[string]int{}},
		log: &entries{ends: make(chan model.Entry, 1024)}, pool: upstream.NewPool(upstream.Config{Library: library})}
	for _, c := range cs {
		b.clusters.m[c.name] = c
	}
	b.setRoutes(routes)
	b.m = b.compile(manager)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	poolCtx, stopPool := context.WithCancel(context.Background())
	b.drain = cancel
	b.served.Add(1)
	go func() { defer b.served.Done(); b.pool.Run(poolCtx) }()
	b.served.Add(1)
	go func() {
		defer b.served.Done()
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			b.served.Add(1)
			go func() {
				defer b.served.Done()
				b.m.Serve(ctx, nc, connOf(nc))
			}()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		cancel()
		stopPool()
		b.served.Wait()
	})
	return b
}

func connOf(nc net.Conn) *model.Conn {
	return &model.Conn{Listener: "slot-1", Namespace: "tenant", Remote: netip.MustParseAddrPort(nc.RemoteAddr().String()),
		Local: netip.MustParseAddrPort(nc.LocalAddr().String())}
}

func (b *bench) compile(manager string) *Manager {
	b.t.Helper()
	var h hcmv3.HttpConnectionManager
	if err := protojson.Unmarshal([]byte(manager), &h); err != nil {
		b.t.Fatal(err)
	}
	m, err := Compile(&h, Env{Clusters: b.clusters, Logger: b.log, Limits: b.limits, Routes: func(string) *Routes { return b.routes.Load() },
		Upstreams: b.pool, Library: library, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.t.Fatal(err)
	}
	return m
}

func (b *bench) setRoutes(routes string) {
	b.t.Helper()
	var c routev3.RouteConfiguration
	if err := protojson.Unmarshal([]byte(routes), &c); err != nil {
		b.t.Fatal(err)
	}
	r, err := CompileRoutes(&c, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	b.routes.Store(r)
}

// backend is a server of the library, as a cluster's only endpoint.
func backend(t testing.TB, name string, h http.HandlerFunc) *cluster {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return clusterAt(name, s.Listener.Addr())
}

func clusterAt(name string, addrs ...net.Addr) *cluster {
	c := &cluster{name: name}
	c.budget.Store(1000)
	for _, a := range addrs {
		c.endpoints = append(c.endpoints, netip.MustParseAddrPort(a.String()))
	}
	return c
}

// rawBackend answers each connection by a function over the bare connection.
func rawBackend(t testing.TB, name string, serve func(net.Conn, *bufio.Reader)) *cluster {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer nc.Close()
				serve(nc, bufio.NewReader(nc))
			}()
		}
	}()
	return clusterAt(name, l.Addr())
}

// client is a bare connection to the proxy.
type client struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

func (b *bench) dial() *client {
	b.t.Helper()
	nc, err := net.Dial("tcp", b.addr)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(20 * time.Second))
	return &client{t: b.t, Conn: nc, r: bufio.NewReader(nc)}
}

func (c *client) send(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		c.t.Fatal(err)
	}
}

// response reads one answer and its body.
func (c *client) response(method string) (*http.Response, string) {
	c.t.Helper()
	resp, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		c.t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp, string(body)
}

// closed fails unless the proxy has closed the connection.
func (c *client) closed() {
	c.t.Helper()
	if rest, err := io.ReadAll(c.r); err != nil && !strings.Contains(err.Error(), "reset") || len(rest) > 0 {
		c.t.Fatalf("connection not closed: %q, %v", rest, err)
	}
}
