// SPDX-License-Identifier: Apache-2.0

package accesslog_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/weirmesh/weir/services/proxy/internal/accesslog"
	"github.com/weirmesh/weir/services/proxy/internal/cluster"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/sockets"
)

const patience = time.Minute

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(2 * time.Millisecond) // the pause of a poll, not what makes it pass
	}
}

// sink is a server.
type sink struct {
	alsv3.UnimplementedAccessLogServiceServer

	mu       sync.Mutex
	entries  []*datav3.HTTPAccessLogEntry
	messages int
}

func (s *sink) StreamAccessLogs(stream alsv3.AccessLogService_StreamAccessLogsServer) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return nil //nolint:nilerr // the stream ends as it likes
		}
		s.mu.Lock()
		s.messages++
		s.entries = append(s.entries, m.GetHttpLogs().GetLogEntry()...)
		s.mu.Unlock()
	}
}

func (s *sink) all() []*datav3.HTTPAccessLogEntry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*datav3.HTTPAccessLogEntry(nil), s.entries...)
}

func (s *sink) serve(t testing.TB, path string) (stop func()) {
	t.Helper()
	return s.serveWith(t, path)
}

func (s *sink) serveWith(t testing.TB, path string, options ...grpc.ServerOption) (stop func()) {
	t.Helper()
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(options...)
	alsv3.RegisterAccessLogServiceServer(server, s)
	var group sync.WaitGroup
	group.Go(func() { _ = server.Serve(ln) }) // it ends by Stop
	stop = sync.OnceFunc(func() { server.Stop(); group.Wait() })
	t.Cleanup(stop)
	return stop
}

const config = `{"name":"x","typed_config":{"@type":"type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
	"additional_request_headers_to_log":["X-Canary"],"additional_response_headers_to_log":["server"],
	"common_config":{"log_name":"slot-1","transport_api_version":"V3","buffer_flush_interval":"0.01s","grpc_service":{"envoy_grpc":{"cluster_name":"log"}}}}}`

type rig struct {
	service *accesslog.Service
	logger  model.Logger
	lost    atomic.Uint64
	path    string
	end     func()
}

func newRig(t testing.TB, streamBytes int64) *rig {
	t.Helper()
	r := &rig{path: filepath.Join(t.TempDir(), "s")}
	table := cluster.NewTable(sockets.New())
	var c clusterv3.Cluster
	if err := protojson.Unmarshal(fmt.Appendf(nil, `{"name":"log","type":"STATIC","http2_protocol_options":{},"load_assignment":{"cluster_name":"log",
		"endpoints":[{"lb_endpoints":[{"endpoint":{"address":{"pipe":{"path":%q}}}}]}]}}`, r.path), &c); err != nil {
		t.Fatal(err)
	}
	if err := table.Put(&c); err != nil {
		t.Fatal(err)
	}
	r.service = accesslog.New(accesslog.Config{
		Node: &corev3.Node{Id: "n"}, Clusters: table, StreamBytes: streamBytes, TotalBytes: 1 << 30, Lost: func(n uint64) { r.lost.Add(n) },
		Log: slog.New(slog.DiscardHandler),
	})
	var err error
	if r.logger, err = r.service.Compile("test", []*accesslogv3.AccessLog{parse(t, config)}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() {
		if err := r.service.Run(ctx); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	r.end = sync.OnceFunc(func() { cancel(); group.Wait() })
	t.Cleanup(r.end)
	return r
}

func parse(t testing.TB, text string) *accesslogv3.AccessLog {
	t.Helper()
	var in accesslogv3.AccessLog
	if err := protojson.Unmarshal([]byte(text), &in); err != nil {
		t.Fatal(err)
	}
	return &in
}

func entry() *model.Entry {
	return &model.Entry{
		Conn:  &model.Conn{Remote: netip.MustParseAddrPort("10.0.0.1:1234"), Local: netip.MustParseAddrPort("[fd00::2]:80")},
		Start: time.Unix(100, 5), Duration: 1500 * time.Millisecond, Protocol: "HTTP/2", Method: "GET", Scheme: "http", Authority: "web", Path: "/a?b",
		RequestHeaders:  http.Header{"X-Canary": {"true", "yes"}, "Cookie": {"secret"}, "User-Agent": {"curl"}},
		ResponseHeaders: http.Header{"Server": {"x"}}, Status: 403, Denied: true, Policy: "shop/web/ingress[0]", Flags: []string{"UH", "URX"},
		Details: "rbac_access_denied", Cluster: "c", Upstream: netip.MustParseAddrPort("10.0.0.9:80"), RequestBytes: 7, ResponseBytes: 8,
	}
}

func TestEntry(t *testing.T) {
	r, s := newRig(t, 1<<20), &sink{}
	s.serve(t, r.path)
	e := entry()
	r.logger.Log(e)
	// The entry is the caller's again at once.
	e.RequestHeaders["X-Canary"][0], e.Conn = "changed", nil
	until(t, "the entry", func() bool { return len(s.all()) == 1 })
	got := s.all()[0]
	c := got.GetCommonProperties()
	for _, check := range []struct {
		name      string
		got, want any
	}{
		{"remote", c.GetDownstreamRemoteAddress().GetSocketAddress().GetAddress(), "10.0.0.1"},
		{"local", c.GetDownstreamLocalAddress().GetSocketAddress().GetAddress(), "fd00::2"},
		{"upstream", c.GetUpstreamRemoteAddress().GetSocketAddress().GetAddress(), "10.0.0.9"},
		{"start", c.GetStartTime().AsTime().Equal(time.Unix(100, 5)), true},
		{"duration", c.GetDuration().AsDuration(), 1500 * time.Millisecond},
		{"UH", c.GetResponseFlags().GetNoHealthyUpstream() && c.GetResponseFlags().GetUpstreamRetryLimitExceeded(), true},
		{"UF", c.GetResponseFlags().GetUpstreamConnectionFailure(), false},
		{"policy", c.GetMetadata().GetFilterMetadata()["envoy.filters.http.rbac"].GetFields()["shadow_effective_policy_id"].GetStringValue(), "shop/web/ingress[0]"},
		{"result", c.GetMetadata().GetFilterMetadata()["envoy.filters.http.rbac"].GetFields()["enforced_engine_result"].GetStringValue(), "denied"},
		{"type", c.GetAccessLogType(), datav3.AccessLogType_DownstreamEnd},
		{"protocol", got.GetProtocolVersion(), datav3.HTTPAccessLogEntry_HTTP2},
		{"method", got.GetRequest().GetRequestMethod(), corev3.RequestMethod_GET},
		{"path", got.GetRequest().GetPath(), "/a?b"},
		{"agent", got.GetRequest().GetUserAgent(), "curl"},
		{"headers", fmt.Sprint(got.GetRequest().GetRequestHeaders()), "map[x-canary:true,yes]"},
		{"response headers", fmt.Sprint(got.GetResponse().GetResponseHeaders()), "map[server:x]"},
		{"status", got.GetResponse().GetResponseCode().GetValue(), uint32(403)},
		{"bytes", got.GetResponse().GetResponseBodyBytes(), uint64(8)},
		{"sequence", c.GetCustomTags()[accesslog.TagSequence], "1"},
	} {
		if check.got != check.want {
			t.Errorf("%s: %v, want %v", check.name, check.got, check.want)
		}
	}
}

// TestNothingIsLostUntold: without a server entries wait up to the bound; what is above is counted, and told with the next message.
func TestNothingIsLostUntold(t *testing.T) {
	r, s := newRig(t, 20000), &sink{}
	const n = 500
	for range n {
		r.logger.Log(entry())
	}
	lost := r.lost.Load()
	if lost == 0 || lost == n {
		t.Fatalf("%d of %d lost at a bound of 20 kB", lost, n)
	}
	s.serve(t, r.path)
	until(t, "what waited", func() bool { return uint64(len(s.all())) == n-lost })
	if r.service.Waiting() != 0 {
		until(t, "the room is given back", func() bool { return r.service.Waiting() == 0 })
	}
	r.logger.Log(entry())
	until(t, "one more", func() bool { return uint64(len(s.all())) == n-lost+1 })
	told := uint64(0)
	for _, e := range s.all() {
		if text := e.GetCommonProperties().GetCustomTags()[accesslog.TagLost]; text != "" {
			k, err := strconv.ParseUint(text, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			told += k
		}
	}
	if told != lost {
		t.Errorf("%d were lost, %d told", lost, told)
	}
	last := s.all()[len(s.all())-1].GetCommonProperties().GetCustomTags()[accesslog.TagSequence]
	if last != strconv.Itoa(n+1) {
		t.Errorf("the last entry has number %s, want %d", last, n+1)
	}
}

func TestServerComesBack(t *testing.T) {
	r, s := newRig(t, 1<<20), &sink{}
	stop := s.serve(t, r.path)
	r.logger.Log(entry())
	until(t, "the first entry", func() bool { return len(s.all()) == 1 })
	stop()
	again := &sink{}
	again.serve(t, r.path)
	// What is sent while the break is not noticed yet may be swallowed; its number then is missing.
	until(t, "an entry at the new server", func() bool {
		r.logger.Log(entry())
		return len(again.all()) > 0
	})
	if r.lost.Load() != 0 {
		t.Errorf("%d lost although there was room", r.lost.Load())
	}
}

func TestEndSendsTheRest(t *testing.T) {
	r, s := newRig(t, 1<<20), &sink{}
	s.serve(t, r.path)
	for range 100 {
		r.logger.Log(entry())
	}
	r.end()
	if n := len(s.all()); n != 100 {
		t.Errorf("%d of 100 arrived", n)
	}
}

func TestRefused(t *testing.T) {
	s := accesslog.New(accesslog.Config{})
	for name, text := range map[string]string{
		"envoy.access_loggers.file": `{"name":"envoy.access_loggers.file","typed_config":{"@type":"type.googleapis.com/envoy.config.core.v3.Node"}}`,
		"filter":                    strings.Replace(config, `{"name":"x"`, `{"name":"x","filter":{"traceable_filter":{}}`, 1),
		"google_grpc":               strings.Replace(config, `"envoy_grpc":{"cluster_name":"log"}`, `"google_grpc":{"target_uri":"x","stat_prefix":"x"}`, 1),
		"cluster_name":              strings.Replace(config, `"cluster_name":"log"`, `"cluster_name":""`, 1),
		"buffer_flush_interval":     strings.Replace(config, `"0.01s"`, `"0s"`, 1),
	} {
		if _, err := s.Compile("listener", []*accesslogv3.AccessLog{parse(t, text)}); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func BenchmarkLog(b *testing.B) {
	r, s := newRig(b, 1<<40), &sink{}
	s.serve(b, r.path)
	e := entry()
	e.Denied = false
	b.ReportAllocs()
	for b.Loop() {
		r.logger.Log(e)
	}
	r.end()
}
