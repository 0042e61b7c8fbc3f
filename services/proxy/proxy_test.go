// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/services/proxy"
	"github.com/weirmesh/weir/services/proxy/internal/fakexds"
	"github.com/weirmesh/weir/services/proxy/internal/xds"
)

// patience bounds waits that end early when what they wait for is there.
const patience = time.Minute

// until waits for a condition.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(5 * time.Millisecond) // the pause of a poll, not what makes it pass
	}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// bench is an xDS server and what a proxy needs to reach it.
type bench struct {
	t      testing.TB
	dir    string
	ca     *spiffe.CA
	xds    *fakexds.Server
	addr   string
	stop   func() // the xDS server
	logs   *logServer
	config proxy.Config
}

func newBench(t testing.TB) *bench {
	t.Helper()
	ca, err := spiffe.NewCA("test.example")
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, dir: t.TempDir(), ca: ca, xds: fakexds.New()}
	b.serveXDS("127.0.0.1:0")
	b.logs = newLogServer(t, filepath.Join(b.dir, "log.sock"))
	c := proxy.DefaultConfig()
	c.Node, c.XDS, c.TLS = "node1", []string{b.addr}, b.files(spiffe.ID{Service: "proxy", Node: "node1"})
	c.AdminListen, c.AccessLog = free(t), b.logs.path
	c.Socket, c.Drain, c.ListenerDrain = filepath.Join(b.dir, "proxy.sock"), 2*time.Second, 2*time.Second
	b.config = c
	return b
}

func (b *bench) serveXDS(addr string) {
	b.t.Helper()
	source, err := spiffe.Load(b.files(spiffe.ID{Service: "xds"}))
	if err != nil {
		b.t.Fatal(err)
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		b.t.Fatal(err)
	}
	b.addr = ln.Addr().String()
	b.stop = b.xds.Serve(b.t, ln, grpc.Creds(source.ServerCredentials()))
}

func (b *bench) files(id spiffe.ID) spiffe.Files {
	b.t.Helper()
	cert, key, err := b.ca.Issue(id, time.Hour)
	if err != nil {
		b.t.Fatal(err)
	}
	name := filepath.Join(b.dir, id.Service)
	f := spiffe.Files{Cert: name + ".crt", Key: name + ".key", CA: name + ".ca"}
	for path, data := range map[string][]byte{f.Cert: cert, f.Key: key, f.CA: b.ca.CertPEM()} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			b.t.Fatal(err)
		}
	}
	return f
}

// free returns an address that was free just now.
func free(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// run runs a proxy in the process until the test ends.
func (b *bench) run() *proxy.Service {
	b.t.Helper()
	s, err := proxy.New(b.config, slog.New(slog.NewTextHandler(testWriter{b.t}, nil)))
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.t.Context())
	var group sync.WaitGroup
	group.Go(func() {
		if err := s.Run(ctx); err != nil {
			b.t.Errorf("proxy: %v", err)
		}
	})
	b.t.Cleanup(func() {
		cancel()
		group.Wait()
	})
	return s
}

// set gives the xDS server resources as JSON.
func (b *bench) set(name string, m proto.Message, json string, args ...any) {
	b.t.Helper()
	if err := protojson.Unmarshal([]byte(fmt.Sprintf(json, args...)), m); err != nil {
		b.t.Fatal(err)
	}
	if v, ok := m.(interface{ ValidateAll() error }); ok {
		if err := v.ValidateAll(); err != nil {
			b.t.Fatalf("%s: the test's own resource is not valid: %v", name, err)
		}
	}
	b.xds.Set(b.t, name, m)
}

func (b *bench) staticCluster(name, addr string) {
	b.t.Helper()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		b.t.Fatal(err)
	}
	b.set(name, &clusterv3.Cluster{}, `{"name":%q,"type":"STATIC","connect_timeout":"2s","load_assignment":{"cluster_name":%q,"endpoints":[{"lb_endpoints":[
		{"endpoint":{"address":{"socket_address":{"address":%q,"port_value":%s}}}}]}]}}`, name, name, host, port)
}

func (b *bench) logCluster() {
	b.set("weir-access-log", &clusterv3.Cluster{}, `{"name":"weir-access-log","type":"STATIC",
		"typed_extension_protocol_options":{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions":{
			"@type":"type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions","explicit_http_config":{"http2_protocol_options":{}}}},
		"load_assignment":{"cluster_name":"weir-access-log","endpoints":[{"lb_endpoints":[{"endpoint":{"address":{"pipe":{"path":%q}}}}]}]}}`, b.logs.path)
}

const httpAccessLog = `{"name":"envoy.access_loggers.http_grpc","typed_config":{
	"@type":"type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
	"additional_request_headers_to_log":["x-canary"],
	"common_config":{"log_name":%q,"transport_api_version":"V3","buffer_flush_interval":"0.05s","grpc_service":{"envoy_grpc":{"cluster_name":"weir-access-log"}}}}}`

const tcpAccessLog = `{"name":"envoy.access_loggers.tcp_grpc","typed_config":{
	"@type":"type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig",
	"common_config":{"log_name":%q,"transport_api_version":"V3","buffer_flush_interval":"0.05s","grpc_service":{"envoy_grpc":{"cluster_name":"weir-access-log"}}}}}`

// httpListener makes a listener as slots have.
func (b *bench) httpListener(name, addr, routes string) {
	b.t.Helper()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		b.t.Fatal(err)
	}
	b.set(name, &listenerv3.Listener{}, `{"name":%q,"address":{"socket_address":{"address":%q,"port_value":%s}},
		"metadata":{"filter_metadata":{"weir":{"namespace":"shop","filter":"key"}}},
		"filter_chains":[{"filters":[{"name":"envoy.filters.network.http_connection_manager","typed_config":{
			"@type":"type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
			"stat_prefix":"x","codec_type":"AUTO","rds":{"config_source":{"ads":{},"resource_api_version":"V3"},"route_config_name":%q},
			"generate_request_id":false,"access_log_options":{"flush_access_log_on_new_request":true},"access_log":[`+fmt.Sprintf(httpAccessLog, name)+`],
			"http_filters":[{"name":"envoy.filters.http.router","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]}}]}]}`,
		name, host, port, routes)
}

func (b *bench) routes(name, cluster string) {
	b.t.Helper()
	b.set(name, &routev3.RouteConfiguration{}, `{"name":%q,"virtual_hosts":[{"name":"all","domains":["*"],"routes":[
		{"match":{"prefix":"/"},"route":{"cluster":%q,"timeout":"0s"}}]}]}`, name, cluster)
}

// tcpListener makes a listener that passes bytes on, behind an RBAC on server names if names are given.
func (b *bench) tcpListener(name, addr, cluster, allow string) {
	b.t.Helper()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		b.t.Fatal(err)
	}
	filters, inspector := "", ""
	if allow != "" {
		inspector = `"listener_filters":[{"name":"envoy.filters.listener.tls_inspector","typed_config":{
			"@type":"type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"}}],`
		filters = fmt.Sprintf(`{"name":"envoy.filters.network.rbac","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC",
			"stat_prefix":"x","rules":{"policies":{"shop/names/egress[0]":{"principals":[{"any":true}],
				"permissions":[{"requested_server_name":{"safe_regex":{"regex":%q}}}]}}}}},`, allow)
	}
	b.set(name, &listenerv3.Listener{}, `{"name":%q,"address":{"socket_address":{"address":%q,"port_value":%s}},`+inspector+`
		"metadata":{"filter_metadata":{"weir":{"namespace":"shop"}}},
		"filter_chains":[{"filters":[`+filters+`{"name":"envoy.filters.network.tcp_proxy","typed_config":{
			"@type":"type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy","stat_prefix":"x","cluster":%q,
			"access_log":[`+fmt.Sprintf(tcpAccessLog, name)+`]}}]}]}`, name, host, port, cluster)
}

// logServer takes access logs.
type logServer struct {
	alsv3.UnimplementedAccessLogServiceServer

	path string
	mu   sync.Mutex
	http []*datav3.HTTPAccessLogEntry
	tcp  []*datav3.TCPAccessLogEntry
	ids  []*alsv3.StreamAccessLogsMessage_Identifier
}

func newLogServer(t testing.TB, path string) *logServer {
	t.Helper()
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &logServer{path: path}
	server := grpc.NewServer()
	alsv3.RegisterAccessLogServiceServer(server, s)
	var group sync.WaitGroup
	group.Go(func() {
		if err := server.Serve(ln); err != nil {
			t.Errorf("log server: %v", err)
		}
	})
	t.Cleanup(func() {
		server.Stop()
		group.Wait()
	})
	return s
}

// StreamAccessLogs implements the service.
func (s *logServer) StreamAccessLogs(stream alsv3.AccessLogService_StreamAccessLogsServer) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return nil //nolint:nilerr // the stream ends as it likes
		}
		s.mu.Lock()
		if m.GetIdentifier() != nil {
			s.ids = append(s.ids, m.GetIdentifier())
		}
		s.http = append(s.http, m.GetHttpLogs().GetLogEntry()...)
		s.tcp = append(s.tcp, m.GetTcpLogs().GetLogEntry()...)
		s.mu.Unlock()
	}
}

func (s *logServer) requests() []*datav3.HTTPAccessLogEntry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*datav3.HTTPAccessLogEntry(nil), s.http...)
}

func (s *logServer) connections() []*datav3.TCPAccessLogEntry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*datav3.TCPAccessLogEntry(nil), s.tcp...)
}

// named is a server that answers with its name.
func named(t testing.TB, name string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, name) }))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// ask makes one request on a connection of its own.
func ask(addr string) (int, string, error) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	r, err := client.Get("http://" + addr + "/")
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	return r.StatusCode, string(body), err
}

func (b *bench) answers(addr, want string) {
	b.t.Helper()
	until(b.t, addr+" answers "+want, func() bool {
		_, body, err := ask(addr)
		return err == nil && body == want
	})
}

// TestRequestThroughAndLogged: a request that lasts is told when it has begun, which is before its answer, and when it has ended.
func TestRequestThroughAndLogged(t *testing.T) {
	b := newBench(t)
	b.logCluster()
	answer := make(chan struct{})
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		<-answer
		_, _ = io.WriteString(w, "one") // the client checks it
	}))
	t.Cleanup(origin.Close)
	release := sync.OnceFunc(func() { close(answer) })
	t.Cleanup(release)
	b.staticCluster("one", origin.Listener.Addr().String())
	addr := free(t)
	b.routes("key", "one")
	b.httpListener("slot-1", addr, "key")
	b.run()
	var asked sync.WaitGroup
	asked.Go(func() { b.answers(addr, "one") })
	until(t, "the beginning", func() bool { return len(b.logs.requests()) == 1 })
	release()
	asked.Wait()
	until(t, "the end", func() bool { return len(b.logs.requests()) >= 2 })
	begin, end := b.logs.requests()[0], b.logs.requests()[1]
	if begin.GetCommonProperties().GetAccessLogType() != datav3.AccessLogType_DownstreamStart ||
		end.GetCommonProperties().GetAccessLogType() != datav3.AccessLogType_DownstreamEnd {
		t.Errorf("types %v, %v", begin.GetCommonProperties().GetAccessLogType(), end.GetCommonProperties().GetAccessLogType())
	}
	if end.GetResponse().GetResponseCode().GetValue() != 200 || end.GetRequest().GetPath() != "/" || end.GetRequest().GetAuthority() != addr {
		t.Errorf("entry %v", end)
	}
	if end.GetCommonProperties().GetUpstreamCluster() != "one" || !proto.Equal(begin.GetCommonProperties().GetStartTime(), end.GetCommonProperties().GetStartTime()) {
		t.Errorf("common %v", end.GetCommonProperties())
	}
	b.logs.mu.Lock()
	defer b.logs.mu.Unlock()
	if id := b.logs.ids[0]; id.GetLogName() != "slot-1" || id.GetNode().GetId() != "node1" {
		t.Errorf("identifier %v", id)
	}
}

// TestRouteChangeOnALiveConnection: the next request of a live connection follows new routes, and a changed filter does not close it.
func TestChangesOnALiveConnection(t *testing.T) {
	b := newBench(t)
	b.logCluster()
	b.staticCluster("one", named(t, "one"))
	b.staticCluster("two", named(t, "two"))
	addr := free(t)
	b.routes("key", "one")
	b.routes("other", "two")
	b.httpListener("slot-1", addr, "key")
	b.run()
	b.answers(addr, "one")
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	reader := bufio.NewReader(conn)
	request := func() string {
		if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		r, err := http.ReadResponse(reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	if got := request(); got != "one" {
		t.Fatalf("got %q", got)
	}
	b.routes("key", "two")
	until(t, "the route changes on the live connection", func() bool { return request() == "two" })
	b.routes("key", "one")
	until(t, "the route changes back", func() bool { return request() == "one" })
	b.httpListener("slot-1", addr, "other")
	until(t, "the changed filter is in force on the live connection", func() bool { return request() == "two" })
}

func TestBadResourceIsRefusedAlone(t *testing.T) {
	b := newBench(t)
	b.logCluster()
	b.staticCluster("one", named(t, "one"))
	addr, other := free(t), free(t)
	b.routes("key", "one")
	b.httpListener("slot-1", addr, "key")
	b.run()
	b.answers(addr, "one")
	// A new version that is not supported, a new listener that is, and a resource that is no message at all.
	bad := &listenerv3.Listener{}
	if err := protojson.Unmarshal([]byte(`{"name":"slot-1","address":{"socket_address":{"address":"127.0.0.1","port_value":1}},"filter_chains":[{"filters":[
		{"name":"envoy.filters.network.wasm","typed_config":{"@type":"type.googleapis.com/envoy.config.listener.v3.Listener"}}]}]}`), bad); err != nil {
		t.Fatal(err)
	}
	b.xds.Set(t, "slot-1", bad)
	b.httpListener("slot-2", other, "key")
	b.answers(other, "one")
	until(t, "a NACK that names the listener and the filter", func() bool {
		for _, n := range b.xds.Nacks() {
			if strings.Contains(n, `"slot-1": `) && strings.Contains(n, "envoy.filters.network.wasm") {
				return true
			}
		}
		return false
	})
	b.answers(addr, "one")
	if _, dump, err := ask2(b, "/config_dump"); err != nil || !strings.Contains(dump, "envoy.filters.network.wasm") || !strings.Contains(dump, "slot-2") {
		t.Errorf("config dump: %v", err)
	}
}

func ask2(b *bench, path string) (int, string, error) {
	r, err := http.Get("http://" + b.config.AdminListen + path)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	return r.StatusCode, string(body), err
}

func TestServerAwayAndBack(t *testing.T) {
	b := newBench(t)
	b.logCluster()
	b.staticCluster("one", named(t, "one"))
	b.staticCluster("two", named(t, "two"))
	addr := free(t)
	b.routes("key", "one")
	b.httpListener("slot-1", addr, "key")
	b.run()
	b.answers(addr, "one")
	b.stop()
	b.answers(addr, "one")
	b.routes("key", "two")
	begun := len(b.xds.Requests())
	b.serveXDS(b.addr)
	b.answers(addr, "two")
	// What it had is told, so that it is not sent again.
	for _, r := range b.xds.Requests()[begun:] {
		if r.GetTypeUrl() == xds.Listener && len(r.GetInitialResourceVersions()) == 1 {
			return
		}
	}
	t.Error("the new stream does not tell what the proxy has")
}

func TestEndpointsAndHealth(t *testing.T) {
	b := newBench(t)
	b.logCluster()
	one, two := named(t, "one"), named(t, "two")
	b.set("shop/web", &clusterv3.Cluster{}, `{"name":"shop/web","type":"EDS","eds_cluster_config":{"eds_config":{"ads":{},"resource_api_version":"V3"}},
		"outlier_detection":{"split_external_local_origin_errors":true,"consecutive_local_origin_failure":2}}`)
	assign := func(health1, health2 string) {
		e := func(addr, health string) string {
			host, port, _ := net.SplitHostPort(addr)
			return fmt.Sprintf(`{"health_status":%q,"endpoint":{"address":{"socket_address":{"address":%q,"port_value":%s}}}}`, health, host, port)
		}
		b.set("shop/web", &endpointv3.ClusterLoadAssignment{}, `{"cluster_name":"shop/web","endpoints":[{"lb_endpoints":[%s,%s]}]}`,
			e(one, health1), e(two, health2))
	}
	assign("HEALTHY", "HEALTHY")
	addr := free(t)
	b.routes("key", "shop/web")
	b.httpListener("slot-1", addr, "key")
	b.run()
	b.answers(addr, "one")
	b.answers(addr, "two")
	assign("UNHEALTHY", "HEALTHY")
	until(t, "only the healthy one answers", func() bool {
		for range 8 {
			if _, body, err := ask(addr); err != nil || body != "two" {
				return false
			}
		}
		return true
	})
	b.xds.Delete(xds.Listener, "slot-1")
	until(t, "the removed listener is closed", func() bool {
		_, _, err := ask(addr)
		return err != nil
	})
}
