// SPDX-License-Identifier: Apache-2.0

package listener

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/services/proxy/internal/limit"
	"github.com/weirmesh/weir/services/proxy/internal/model"
)

type silent struct{}

func (silent) Log(*model.Entry) {}

// fakeHTTP answers each byte with its prefix until it is drained; a connection's first byte it waits for, as the real one does.
type fakeHTTP struct {
	prefix, routes string
	next           atomic.Pointer[fakeHTTP]
}

func (f *fakeHTTP) RouteName() string  { return f.routes }
func (f *fakeHTTP) Clusters() []string { return nil }
func (f *fakeHTTP) Adopt(next HTTP) {
	if n, ok := next.(*fakeHTTP); ok {
		f.next.Store(n)
	}
}

func (f *fakeHTTP) Serve(ctx context.Context, conn net.Conn, _ *model.Conn) {
	defer conn.Close()
	b := make([]byte, 1)
	for i := 0; ; i++ {
		if i == 1 {
			stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Now()) }) // ends the read below
			defer stop()
		}
		if _, err := conn.Read(b); err != nil {
			return
		}
		now := f
		if n := f.next.Load(); n != nil {
			now = n
		}
		if _, err := io.WriteString(conn, now.prefix); err != nil {
			return
		}
	}
}

func builder() Builder {
	return Builder{
		HTTP: func(hcm *hcmv3.HttpConnectionManager, _ model.Logger) (HTTP, error) {
			if hcm.GetStatPrefix() == "bad" {
				return nil, errors.New("stat_prefix is bad")
			}
			return &fakeHTTP{prefix: hcm.GetStatPrefix(), routes: hcm.GetRds().GetRouteConfigName()}, nil
		},
		AccessLog: func(string, []*accesslogv3.AccessLog) (model.Logger, error) { return silent{}, nil },
	}
}

const hcmFilter = `{"name":"h","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager","stat_prefix":%q}}`

func parse(t testing.TB, text string) *listenerv3.Listener {
	t.Helper()
	var in listenerv3.Listener
	if err := protojson.Unmarshal([]byte(text), &in); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return &in
}

// simple makes a listener of one HTTP chain.
func simple(t testing.TB, name string, addr netip.AddrPort, prefix string) *listenerv3.Listener {
	t.Helper()
	return parse(t, fmt.Sprintf(`{"name":%q,"address":{"socket_address":{"address":%q,"port_value":%d}},"metadata":{"filter_metadata":{"weir":{"namespace":"shop"}}},
		"filter_chains":[{"filters":[`+hcmFilter+`]}]}`, name, addr.Addr(), addr.Port(), prefix))
}

func newSet(t testing.TB, c Config, limits limit.Config) (*Set, *prometheus.Registry) {
	t.Helper()
	registry := prometheus.NewRegistry()
	c.Builder, c.Limits, c.Log = builder(), limit.New(limits, registry), slog.New(slog.DiscardHandler)
	if c.RoutesKnown == nil {
		c.RoutesKnown = func(string) bool { return true }
	}
	c.Reachable = func(string) bool { return true }
	s := NewSet(c)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Drain(ctx); err != nil {
			t.Error(err)
		}
	})
	return s, registry
}

func free(t testing.TB) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// exchange sends a byte and reads the answer.
func exchange(conn net.Conn) string {
	if _, err := conn.Write([]byte("?")); err != nil {
		return ""
	}
	b := make([]byte, 16)
	n, err := conn.Read(b)
	if err != nil {
		return ""
	}
	return string(b[:n])
}

func dial(t testing.TB, addr netip.AddrPort) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func TestUpdateInPlace(t *testing.T) {
	s, _ := newSet(t, Config{DrainTime: time.Minute}, limit.Config{})
	addr, other := free(t), free(t)
	put := func(in *listenerv3.Listener) {
		t.Helper()
		if err := s.Put(in); err != nil {
			t.Fatal(err)
		}
	}
	put(simple(t, "a", addr, "one"))
	conn := dial(t, addr)
	if got := exchange(conn); got != "one" {
		t.Fatalf("got %q", got)
	}
	put(simple(t, "a", addr, "two"))
	if got := exchange(conn); got != "two" {
		t.Fatalf("after the filter changed, got %q on the live connection", got)
	}
	if err := s.Put(simple(t, "a", addr, "bad")); err == nil {
		t.Fatal("a bad filter was taken")
	}
	if got := exchange(conn) + exchange(dial(t, addr)); got != "twotwo" {
		t.Fatalf("after a refused change, got %q", got)
	}
	put(simple(t, "a", other, "two"))
	if got := exchange(conn) + exchange(dial(t, other)); got != "twotwo" {
		t.Fatalf("after the address changed, got %q", got)
	}
	for range 1000 {
		c, err := net.Dial("tcp", addr.String())
		if err != nil {
			break
		}
		_ = c.Close() // not yet
		time.Sleep(time.Millisecond)
	}
	if _, err := net.Dial("tcp", addr.String()); err == nil {
		t.Fatal("the old address is still open")
	}
	s.Remove("a")
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("a removed listener's connection was not drained: %v", err)
	}
}

// TestLastCall: who connected before a listener was removed is served, and a listener that comes back has its address.
func TestLastCall(t *testing.T) {
	s, _ := newSet(t, Config{DrainTime: time.Minute}, limit.Config{})
	addr := free(t)
	for i := range 3 {
		if err := s.Put(simple(t, "a", addr, "one")); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		var conns []net.Conn
		for range 50 {
			conns = append(conns, dial(t, addr))
		}
		s.Remove("a")
		for j, conn := range conns {
			if got := exchange(conn); got != "one" {
				t.Fatalf("round %d: connection %d got %q", i, j, got)
			}
		}
	}
}

// TestQueueIsTaken: at the end of a process, too.
func TestQueueIsTaken(t *testing.T) {
	s, _ := newSet(t, Config{}, limit.Config{})
	addr := free(t)
	if err := s.Put(simple(t, "a", addr, "one")); err != nil {
		t.Fatal(err)
	}
	var conns []net.Conn
	for range 200 {
		conns = append(conns, dial(t, addr))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	drained := make(chan error, 1)
	go func() { drained <- s.Drain(ctx) }()
	for i, conn := range conns {
		// A connection that nobody took is reset.
		if got := exchange(conn); got != "one" {
			t.Fatalf("connection %d: %q", i, got)
		}
		_ = conn.Close() // of the test
	}
	if err := <-drained; err != nil {
		t.Fatal(err)
	}
}

func TestAddressTaken(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().(*net.TCPAddr).AddrPort()
	s, _ := newSet(t, Config{}, limit.Config{})
	if err := s.Put(simple(t, "a", addr, "one")); err == nil {
		t.Fatal("an address that is taken was had")
	}
	if s.Pending() != 0 {
		t.Error("a taken address counts as configuration that is missing")
	}
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	s.Arrived()
	if got := exchange(dial(t, addr)); got != "one" {
		t.Fatalf("got %q after the address was free", got)
	}
}

func TestWaitsForRoutes(t *testing.T) {
	var known atomic.Bool
	s, _ := newSet(t, Config{RoutesKnown: func(string) bool { return known.Load() }}, limit.Config{})
	addr := free(t)
	in := simple(t, "a", addr, "one")
	routed := parse(t, strings.Replace(protojson.Format(in), `"stat`, `"rds":{"route_config_name":"key"},"stat`, 1))
	if err := s.Put(routed); err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("tcp", addr.String()); err == nil {
		_ = c.Close() // of the test
		t.Fatal("it is open without its routes")
	}
	if got := s.RouteNames(); len(got) != 1 || got[0] != "key" || s.Pending() != 1 {
		t.Fatalf("it waits for %v", got)
	}
	known.Store(true)
	s.Arrived()
	if got := exchange(dial(t, addr)); got != "one" {
		t.Fatalf("got %q", got)
	}
}

func TestLimits(t *testing.T) {
	s, registry := newSet(t, Config{MaxConnections: 2}, limit.Config{Connections: 3})
	a, b := free(t), free(t)
	for name, addr := range map[string]netip.AddrPort{"a": a, "b": b} {
		if err := s.Put(simple(t, name, addr, "one")); err != nil {
			t.Fatal(err)
		}
	}
	open := func(addr netip.AddrPort) string {
		conn, err := net.Dial("tcp", addr.String())
		if err != nil {
			return "" // the reset came while it connected
		}
		t.Cleanup(func() { _ = conn.Close() })
		return exchange(conn)
	}
	if got := open(a) + open(a); got != "oneone" {
		t.Fatalf("got %q", got)
	}
	if got := open(a); got != "" {
		t.Fatalf("the listener's bound was passed: %q", got)
	}
	if got := open(b) + open(b); got != "one" {
		t.Fatalf("the tenant's bound of 3: %q", got)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	causes := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "weir_proxy_refused_total" {
				causes[m.GetLabel()[0].GetValue()+"/"+m.GetLabel()[1].GetValue()] = m.GetCounter().GetValue()
			}
		}
	}
	if causes[CauseListener+"/shop"] != 1 || causes[limit.CauseConnections+"/shop"] != 1 {
		t.Errorf("refused %v", causes)
	}
}

func TestMatch(t *testing.T) {
	p, err := (&Builder{HTTP: builder().HTTP, AccessLog: builder().AccessLog}).compile(parse(t, fmt.Sprintf(`{"name":"a",
		"address":{"socket_address":{"address":"127.0.0.1","port_value":1}},"filter_chains":[
		{"name":"exact","filter_chain_match":{"server_names":["a.example"]},"filters":[%[1]s]},
		{"name":"wild","filter_chain_match":{"server_names":["*.example"]},"filters":[%[1]s]},
		{"name":"wilder","filter_chain_match":{"server_names":["*.b.example"],"application_protocols":["h2"]},"filters":[%[1]s]},
		{"name":"port","filter_chain_match":{"destination_port":8443},"filters":[%[1]s]},
		{"name":"net","filter_chain_match":{"prefix_ranges":[{"address_prefix":"10.0.0.0","prefix_len":8}],"transport_protocol":"raw_buffer"},"filters":[%[1]s]},
		{"name":"nearer","filter_chain_match":{"prefix_ranges":[{"address_prefix":"10.1.0.0","prefix_len":16}]},"filters":[%[1]s]},
		{"name":"tls","filter_chain_match":{"transport_protocol":"tls"},"filters":[%[1]s]},
		{"name":"from","filter_chain_match":{"source_prefix_ranges":[{"address_prefix":"fd00::","prefix_len":16}]},"filters":[%[1]s]}],
		"default_filter_chain":{"filters":[%[1]s]}}`, fmt.Sprintf(hcmFilter, "x"))))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		local, remote, name string
		tls                 bool
		alpn                []string
		want                string
	}{
		{"192.0.2.1:443", "192.0.2.9:1", "a.example", true, nil, "exact"},
		{"192.0.2.1:443", "192.0.2.9:1", "c.example", true, nil, "wild"},
		{"192.0.2.1:443", "192.0.2.9:1", "x.b.example", true, []string{"h2"}, "wilder"},
		// As in Envoy: the closest name decides, and is not given up for another criterion.
		{"192.0.2.1:443", "192.0.2.9:1", "x.b.example", true, nil, "default"},
		{"192.0.2.1:443", "192.0.2.9:1", "example", true, nil, "tls"},
		{"192.0.2.1:8443", "192.0.2.9:1", "a.example", true, nil, "port"},
		{"10.2.0.1:80", "192.0.2.9:1", "", false, nil, "net"},
		{"10.2.0.1:80", "192.0.2.9:1", "", true, nil, "default"},
		{"10.1.0.1:80", "192.0.2.9:1", "", true, nil, "nearer"},
		{"[fd00::1]:80", "[fd00::2]:1", "", false, nil, "from"},
		{"[fd01::1]:80", "[fd01::2]:1", "", false, nil, "default"},
	} {
		c := p.find(&arrival{
			local: netip.MustParseAddrPort(tc.local), remote: netip.MustParseAddrPort(tc.remote), serverName: tc.name, tls: tc.tls, protocols: tc.alpn,
		})
		if c == nil || c.name != tc.want {
			t.Errorf("%+v: got %v", tc, c)
		}
	}
}

func TestRefusedByName(t *testing.T) {
	good := fmt.Sprintf(`{"name":"a","address":{"socket_address":{"address":"127.0.0.1","port_value":1}},"filter_chains":[{"filters":[`+hcmFilter+`]}]}`, "x")
	edit := func(old, with string) string { return strings.Replace(good, old, with, 1) }
	for _, tc := range []struct{ in, want string }{
		{edit(`"name":"a",`, ``), "listener.name"},
		{edit(`"name":"a"`, `"name":"a","api_listener":{}`), "api_listener"},
		{edit(`"name":"a"`, `"name":"a","udp_listener_config":{}`), "udp_listener_config"},
		{edit(`"name":"a"`, `"name":"a","bind_to_port":false`), "bind_to_port"},
		{edit(`{"socket_address":{"address":"127.0.0.1","port_value":1}}`, `{"pipe":{"path":"/x"}}`), "listener.address"},
		{edit(`"127.0.0.1"`, `"localhost"`), "localhost"},
		{edit(`"port_value":1`, `"port_value":1,"protocol":"UDP"`), "UDP"},
		{edit(`"filter_chains"`, `"listener_filters":[{"name":"envoy.filters.listener.proxy_protocol"}],"filter_chains"`), "envoy.filters.listener.proxy_protocol"},
		{edit(`"filter_chains"`, `"listener_filters":[{"name":"d","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst"}}],"filter_chains"`), "transparent"},
		{edit(`"filters":[`, `"filters":[{"name":"envoy.filters.network.ext_authz"},`), "envoy.filters.network.ext_authz"},
		{edit(`"filters":[`, `"filters":[`+fmt.Sprintf(hcmFilter, "y")+`,`), "behind"},
		{edit(`"filters":[`+fmt.Sprintf(hcmFilter, "x")+`]`, `"filters":[]`), "none of them ends"},
		{edit(`"filter_chains":[`, `"filter_chains":[],"stat_prefix":"`+`x"`+`,"additional_addresses":[`), "additional_addresses"},
		{edit(`{"filters"`, `{"filter_chain_match":{"server_names":["a*b"]},"filters"`), "server_names"},
		{edit(`{"filters"`, `{"filter_chain_match":{"address_suffix":"1"},"filters"`), "address_suffix"},
		{edit(`{"filters"`, `{"transport_socket":{"name":"t","typed_config":{"@type":"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"}},"filters"`), "no certificate"},
		{edit(`"stat_prefix":"x"`, `"stat_prefix":"bad"`), "filter_chains[0].filters[0].typed_config: stat_prefix is bad"},
	} {
		var in listenerv3.Listener
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal([]byte(tc.in), &in); err != nil {
			t.Fatalf("%v in %s", err, tc.in)
		}
		b := builder()
		if _, err := b.compile(&in); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%v, want it to name %q", err, tc.want)
		}
	}
	b := builder()
	if _, err := b.compile(parse(t, good)); err != nil {
		t.Errorf("the good one: %v", err)
	}
}

// FuzzCompile: whatever the server sends, an answer, and a chain or none for a connection.
func FuzzCompile(f *testing.F) {
	b, err := proto.Marshal(simple(f, "a", netip.MustParseAddrPort("127.0.0.1:1"), "x"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(_ *testing.T, b []byte) {
		var in listenerv3.Listener
		if proto.Unmarshal(b, &in) != nil {
			return
		}
		build := builder()
		p, err := build.compile(&in)
		if err != nil {
			return
		}
		p.find(&arrival{local: netip.MustParseAddrPort("10.0.0.1:80"), remote: netip.MustParseAddrPort("10.0.0.2:80")})
	})
}

// FuzzRecognise: the first bytes of a client lead to an answer, and the more of them the surer.
func FuzzRecognise(f *testing.F) {
	f.Add([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
	f.Add([]byte{22, 3, 1, 0, 5, 1, 0, 0, 1, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		p := &plan{inspectTLS: true, inspectHTTP: true}
		decided := false
		for i := range b {
			done, err := p.recognise(b[:i], &arrival{})
			if decided && !done && err == nil {
				t.Fatalf("undecided again at byte %d", i)
			}
			decided = decided || done
		}
	})
}

// TestManyConnectionsComeAndGo: nothing is left of them.
func TestManyConnectionsComeAndGo(t *testing.T) {
	s, _ := newSet(t, Config{}, limit.Config{})
	addr := free(t)
	if err := s.Put(simple(t, "a", addr, "one")); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 100 {
				conn, err := net.Dial("tcp", addr.String())
				if err != nil {
					t.Error(err)
					return
				}
				if got := exchange(conn); got != "one" {
					t.Errorf("got %q", got)
				}
				_ = conn.Close() // of the test
			}
		})
	}
	group.Wait()
	deadline := time.Now().Add(10 * time.Second)
	for s.Status()[0].Connections != 0 {
		if time.Now().After(deadline) {
			t.Fatalf("%d connections are left", s.Status()[0].Connections)
		}
		time.Sleep(time.Millisecond) // the pause of a poll
	}
	if s.Status()[0].Total != 800 {
		t.Errorf("%d were counted", s.Status()[0].Total)
	}
}
