// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

// fixture is a server and what it made of entries.
type fixture struct {
	*Server
	now       time.Time
	mu        sync.Mutex
	got       []*flow.Request
	lost      uint64
	malformed int
}

func start(change func(*Config)) *fixture {
	f := &fixture{now: time.Unix(1_700_000_000, 0)}
	cfg := Config{
		Slot: func(n uint16) (slot.Slot, bool) {
			s := slot.Slot{Number: n, Filter: slot.Filter{Key: "http-x", Direction: desired.Ingress, Visibility: n == 9}}
			return s, n != 0
		},
		Rules: func(string) []desired.PolicyRule {
			return []desired.PolicyRule{{Kind: "CiliumNetworkPolicy", Namespace: "shop", Name: "api", List: "ingress", Index: 1},
				{Kind: "CiliumClusterwideNetworkPolicy", Name: "all", Spec: 2, List: "egress"}, {Implicit: "allow-localhost"}}
		},
		Identity: func(a netip.Addr) uint32 { return map[bool]uint32{true: 300, false: 301}[a.As16()[15] == 1] },
		Put: func(r *flow.Request) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.got = append(f.got, r)
		},
		Lost: func(n uint64) { f.lost += n }, Malformed: func() { f.malformed++ },
		Headers: NewHeaders([]string{"*"}, DefaultRedacted()), Now: func() time.Time { return f.now }, Log: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&cfg)
	}
	f.Server = New(cfg)
	return f
}

// testStream takes messages that are not encoded yet.
type testStream struct{ *stream }

func (f *fixture) stream() testStream { return testStream{f.newStream()} }

func (s testStream) take(m *accesslogv3.StreamAccessLogsMessage) error {
	b, err := proto.Marshal(m)
	return errors.Join(err, s.stream.take(b))
}

// take returns lines of what was told.
func (f *fixture) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var lines []string
	for _, r := range f.got {
		line := "request"
		if r.Response {
			line = fmt.Sprintf("response %d %s", r.HTTP.Code, time.Duration(r.Latency))
		}
		if r.Denied {
			line += " denied"
		}
		if r.HTTP != nil {
			line += " " + r.HTTP.Method + " " + r.HTTP.URL
		} else {
			line += " tls " + r.TLS.ServerName
		}
		for _, p := range r.Rules {
			line += " by " + p.Name + p.Implicit
		}
		lines = append(lines, line)
	}
	f.got = nil
	return lines
}

func address(text string) *corev3.Address {
	a := netip.MustParseAddrPort(text)
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{Address: a.Addr().String(),
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(a.Port())}}}}
}

func (f *fixture) common(kind datav3.AccessLogType, policy string) *datav3.AccessLogCommon {
	c := &datav3.AccessLogCommon{DownstreamRemoteAddress: address("10.0.0.1:41000"), DownstreamLocalAddress: address("10.0.0.2:8080"), AccessLogType: kind,
		StartTime: timestamppb.New(f.now.Add(-time.Second)), StreamId: "s1", TimeToLastDownstreamTxByte: durationpb.New(12 * time.Millisecond)}
	if policy != "" {
		c.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{httpRBAC: {Fields: map[string]*structpb.Value{
			"shadow_effective_policy_id": structpb.NewStringValue(policy), "shadow_engine_result": structpb.NewStringValue("allowed")}}}}
	}
	return c
}

func (f *fixture) entry(kind datav3.AccessLogType, code uint32, policy string) *datav3.HTTPAccessLogEntry {
	e := &datav3.HTTPAccessLogEntry{CommonProperties: f.common(kind, policy), ProtocolVersion: datav3.HTTPAccessLogEntry_HTTP2,
		Request: &datav3.HTTPRequestProperties{RequestMethod: corev3.RequestMethod_GET, Authority: "me:secret@web", Path: "/a?key=secret", UserAgent: "curl",
			RequestHeaders: map[string]string{"authorization": "Bearer x", "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", ":method": "GET"}}}
	if kind != datav3.AccessLogType_DownstreamStart {
		e.Response = &datav3.HTTPResponseProperties{ResponseCode: wrapperspb.UInt32(code), ResponseHeaders: map[string]string{"content-length": "5"},
			ResponseTrailers: map[string]string{"grpc-status": "0"}}
		if code == 403 {
			e.Response.ResponseCodeDetails = "rbac_access_denied_matched_policy[none]"
		}
	}
	return e
}

func logs(name string, entries ...*datav3.HTTPAccessLogEntry) *accesslogv3.StreamAccessLogsMessage {
	return &accesslogv3.StreamAccessLogsMessage{Identifier: &accesslogv3.StreamAccessLogsMessage_Identifier{LogName: name},
		LogEntries: &accesslogv3.StreamAccessLogsMessage_HttpLogs{HttpLogs: &accesslogv3.StreamAccessLogsMessage_HTTPAccessLogEntries{LogEntry: entries}}}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestWhatIsTold(t *testing.T) {
	const (
		begins = datav3.AccessLogType_DownstreamStart
		ends   = datav3.AccessLogType_DownstreamEnd
	)
	const request, response = "request GET http://web/a", "response 200 12ms GET http://web/a"
	tests := []struct {
		name    string
		slot    string
		entries func(f *fixture) []*datav3.HTTPAccessLogEntry
		now     []string // told at once
		later   []string // told when the hold is over
	}{
		{"only the end", "slot-1", func(f *fixture) []*datav3.HTTPAccessLogEntry {
			return []*datav3.HTTPAccessLogEntry{f.entry(ends, 200, "shop/api/ingress[1]#0")}
		},
			[]string{request + " by api", response + " by api"}, nil},
		{"no type", "slot-1", func(f *fixture) []*datav3.HTTPAccessLogEntry {
			return []*datav3.HTTPAccessLogEntry{f.entry(datav3.AccessLogType_NotSet, 200, "")}
		},
			[]string{request, response}, nil},
		{"denied", "slot-1", func(f *fixture) []*datav3.HTTPAccessLogEntry {
			return []*datav3.HTTPAccessLogEntry{f.entry(begins, 0, ""), f.entry(ends, 403, "shop/api/ingress[1]#0")}
		},
			[]string{"request denied GET http://web/a"}, nil},
		{"begun and decided", "slot-1", func(f *fixture) []*datav3.HTTPAccessLogEntry {
			return []*datav3.HTTPAccessLogEntry{f.entry(begins, 0, "/all/specs[2]/egress[0]#3")}
		},
			[]string{request + " by all"}, nil},
		{"begun to be seen", "slot-9", func(f *fixture) []*datav3.HTTPAccessLogEntry {
			return []*datav3.HTTPAccessLogEntry{f.entry(begins, 0, "")}
		}, []string{request}, nil},
		{"begun, decided and ended", "slot-1", func(f *fixture) []*datav3.HTTPAccessLogEntry {
			return []*datav3.HTTPAccessLogEntry{f.entry(begins, 0, "/allow-localhost/[0]#0"), f.entry(ends, 200, "")}
		}, []string{request + " by allow-localhost", response}, nil},
		{"begun, not decided", "slot-1", func(f *fixture) []*datav3.HTTPAccessLogEntry {
			return []*datav3.HTTPAccessLogEntry{f.entry(begins, 0, "")}
		}, nil, []string{request}},
		{"begun, not decided, and ended", "slot-1", func(f *fixture) []*datav3.HTTPAccessLogEntry {
			return []*datav3.HTTPAccessLogEntry{f.entry(begins, 0, ""), f.entry(ends, 200, "")}
		}, []string{request, response}, nil},
		{"the client went away", "slot-1", func(f *fixture) []*datav3.HTTPAccessLogEntry {
			return []*datav3.HTTPAccessLogEntry{f.entry(ends, 0, "")}
		}, []string{request}, nil},
		{"in between", "slot-1", func(f *fixture) []*datav3.HTTPAccessLogEntry {
			return []*datav3.HTTPAccessLogEntry{f.entry(datav3.AccessLogType_DownstreamPeriodic, 0, ""), f.entry(datav3.AccessLogType_UpstreamEnd, 200, "")}
		}, nil, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := start(nil)
			st := f.stream()
			must(t, st.take(logs(tt.slot, tt.entries(f)...)))
			st.release(false)
			if got := f.take(); !slices.Equal(got, tt.now) {
				t.Errorf("at once %q, want %q", got, tt.now)
			}
			f.now = f.now.Add(hold)
			st.release(false)
			if got := f.take(); !slices.Equal(got, tt.later) {
				t.Errorf("later %q, want %q", got, tt.later)
			}
			if f.malformed != 0 || len(st.held) != 0 {
				t.Errorf("%d malformed, %d held", f.malformed, len(st.held))
			}
		})
	}
}

func TestContents(t *testing.T) {
	f := start(func(c *Config) { c.Shift = time.Minute })
	st := f.stream()
	must(t, st.take(logs("slot-7", f.entry(datav3.AccessLogType_DownstreamEnd, 200, ""))))
	request, response := f.got[0], f.got[1]
	begun := f.now.Add(time.Minute - time.Second).UnixNano()
	if request.Time != begun || response.Time != begun+12e6 || request.Direction != 1 || request.ProxyPort != 20007 || request.ClientIdentity != 300 || request.ServerIdentity != 301 ||
		request.Client.String() != "10.0.0.1:41000" || request.Server.String() != "10.0.0.2:8080" || request.TraceID != "4bf92f3577b34da6a3ce929d0e0e4736" {
		t.Errorf("request %+v", request)
	}
	words := func(r *flow.Request) string {
		text := r.HTTP.Protocol
		for _, h := range r.HTTP.Headers {
			text += " " + h.Key + "=" + h.Value
		}
		return text
	}
	trace := " Traceparent=00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 User-Agent=curl"
	if got, want := words(request), "HTTP/2 Authorization=HUBBLE_REDACTED"+trace; got != want {
		t.Errorf("request %s, want %s", got, want)
	}
	if got, want := words(response), "HTTP/2 Authorization=HUBBLE_REDACTED Content-Length=5 Grpc-Status=0"+trace; got != want {
		t.Errorf("response %s, want %s", got, want)
	}

	f = start(func(c *Config) { c.Query, c.Headers = true, NewHeaders([]string{"User-Agent"}, nil) })
	must(t, f.stream().take(logs("slot-7", f.entry(datav3.AccessLogType_DownstreamEnd, 200, ""))))
	if got := words(f.got[0]); got != "HTTP/2 User-Agent=curl" || f.got[0].HTTP.URL != "http://web/a?key=secret" {
		t.Errorf("%s %s: want the query and one header", got, f.got[0].HTTP.URL)
	}
}

func TestTLS(t *testing.T) {
	f := start(nil)
	entry := func(details, sni string) *datav3.TCPAccessLogEntry {
		e := &datav3.TCPAccessLogEntry{CommonProperties: f.common(datav3.AccessLogType_TcpConnectionEnd, "")}
		e.CommonProperties.ConnectionTerminationDetails = details
		e.CommonProperties.TlsProperties = &datav3.TLSProperties{TlsSniHostname: sni}
		return e
	}
	byMetadata := entry("", "c.test")
	byMetadata.CommonProperties.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{networkRBAC: {Fields: map[string]*structpb.Value{
		"enforced_engine_result": structpb.NewStringValue("denied")}}}}
	begun := entry("", "d.test")
	begun.CommonProperties.AccessLogType = datav3.AccessLogType_TcpUpstreamConnected
	must(t, f.stream().take(&accesslogv3.StreamAccessLogsMessage{Identifier: &accesslogv3.StreamAccessLogsMessage_Identifier{LogName: "slot-3"},
		LogEntries: &accesslogv3.StreamAccessLogsMessage_TcpLogs{TcpLogs: &accesslogv3.StreamAccessLogsMessage_TCPAccessLogEntries{LogEntry: []*datav3.TCPAccessLogEntry{
			entry("", "a.test"), entry("rbac_access_denied_matched_policy[none]", "b.test"), byMetadata, begun}}}}))
	if got, want := f.take(), []string{"request tls a.test", "request denied tls b.test", "request denied tls c.test"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestMalformed(t *testing.T) {
	f := start(nil)
	st := f.stream()
	good := f.entry(datav3.AccessLogType_DownstreamEnd, 200, "")
	noRequest, pipe, mixed := f.entry(0, 200, ""), f.entry(0, 200, ""), f.entry(0, 200, "")
	noRequest.Request = nil
	pipe.CommonProperties.DownstreamRemoteAddress = &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: "/x"}}}
	mixed.CommonProperties.DownstreamLocalAddress = address("[fd00::1]:80")
	must(t, st.take(logs("slot-1", nil, &datav3.HTTPAccessLogEntry{}, noRequest, pipe, mixed, good)))
	if f.malformed != 5 || len(f.take()) != 2 {
		t.Errorf("%d malformed, want 5, and the good one told", f.malformed)
	}
	if err := f.stream().take(&accesslogv3.StreamAccessLogsMessage{}); err == nil {
		t.Error("a stream without a name was taken")
	}
}

// What a proxy says that it has lost is counted, and so is a hole that a broken stream leaves.
func TestLost(t *testing.T) {
	f := start(nil)
	send := func(st testStream, sequence, lost string, n int) {
		var entries []*datav3.HTTPAccessLogEntry
		for range n {
			entries = append(entries, f.entry(datav3.AccessLogType_DownstreamEnd, 200, ""))
		}
		entries[0].CommonProperties.CustomTags = map[string]string{"weir.sequence": sequence, "weir.lost": lost}
		must(t, st.take(logs("slot-1", entries...)))
	}
	st := f.stream()
	for _, tt := range []struct {
		sequence, lost string
		n              int
		want           uint64
	}{
		{"101", "", 2, 0}, {"103", "", 1, 0}, {"110", "6", 1, 6}, {"114", "1", 1, 9}, {"1", "", 1, 9}, {"nonsense", "-1", 1, 9}, {"2", "3", 1, 12},
		{"6", "", 1, 12}, // those three, behind the message that told them
		{"7", "590", 1, 602}, {"598", "", 1, 602}, {"600", "", 1, 603}, {"605", "4", 1, 607}, {"608", "", 1, 609},
		// What waited lies before those that found no room.
		{"609", "500", 2, 1109}, {"611", "", 2, 1109}, {"613", "7", 1, 1116}, {"1114", "", 1, 1116}, {"1122", "", 1, 1116}, {"1124", "", 1, 1117},
	} {
		send(st, tt.sequence, tt.lost, tt.n)
		if f.lost != tt.want {
			t.Errorf("sequence %s, lost %q: %d in all, want %d", tt.sequence, tt.lost, f.lost, tt.want)
		}
		st = f.stream() // the numbers go on over streams
	}
}

// A proxy speaks to the real server, over a unix socket.
func TestOverASocket(t *testing.T) {
	draining := make(chan struct{})
	f := start(func(c *Config) { c.Draining, c.Now = draining, time.Now })
	f.now = time.Now()
	rpc := server.New(server.Config{Name: "access-log", Log: slog.New(slog.DiscardHandler), Authorize: server.Table{
		"/" + accesslogv3.AccessLogService_ServiceDesc.ServiceName + "/": {server.Local}}, Options: ServerOptions()})
	f.Register(rpc.GRPC())
	path := filepath.Join(t.TempDir(), "accesslog.sock")
	ln, err := server.ListenUnix(path)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- rpc.Serve(ctx, ln) }()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	g, err := accesslogv3.NewAccessLogServiceClient(conn).StreamAccessLogs(t.Context())
	must(t, err)
	must(t, g.Send(logs("slot-1", f.entry(datav3.AccessLogType_DownstreamStart, 0, ""))))
	second := logs("", f.entry(datav3.AccessLogType_DownstreamEnd, 503, ""))
	second.Identifier = nil
	must(t, g.Send(second))
	if _, err := g.CloseAndRecv(); err != nil {
		t.Errorf("stream ended: %v", err)
	}
	if got := f.take(); len(got) != 2 || !strings.HasPrefix(got[1], "response 503") {
		t.Errorf("told %q", got)
	}
	// One that stays open ends when the agent does, and a request that was held is told.
	g, err = accesslogv3.NewAccessLogServiceClient(conn).StreamAccessLogs(t.Context())
	must(t, err)
	must(t, g.Send(logs("slot-1", f.entry(datav3.AccessLogType_DownstreamStart, 0, ""))))
	for f.Stats().Entries < 3 {
		if g.Context().Err() != nil {
			t.Fatal("the stream ended")
		}
	}
	close(draining)
	cancel()
	must(t, <-served)
	if got := f.take(); len(got) != 1 {
		t.Errorf("told %q, want the request that was held", got)
	}
}

// Who has an address is asked again soon, also when the clock was set back, and not for each message.
func TestIdentityIsAskedAgain(t *testing.T) {
	identity, asked := uint32(7), 0
	f := start(func(c *Config) { c.Identity = func(netip.Addr) uint32 { asked++; return identity } })
	st := f.stream()
	for _, tt := range []struct {
		later time.Duration
		want  uint32
	}{{0, 7}, {identityFor - 1, 7}, {1, 9}, {-1, 10}} {
		f.now = f.now.Add(tt.later)
		must(t, st.take(logs("slot-1", f.entry(datav3.AccessLogType_DownstreamEnd, 403, ""))))
		if got := f.got[len(f.got)-1]; got.ClientIdentity != tt.want || got.ServerIdentity != tt.want {
			t.Errorf("%v later: %d and %d, want %d", tt.later, got.ClientIdentity, got.ServerIdentity, tt.want)
		}
		identity++
	}
	if asked != 6 {
		t.Errorf("asked %d times of two addresses, want 6", asked)
	}
}

func TestTraceOf(t *testing.T) {
	const id = "4bf92f3577b34da6a3ce929d0e0e4736"
	for parent, want := range map[string]string{
		"00-" + id + "-00f067aa0ba902b7-01": id, "01-" + id + "-00f067aa0ba902b7-01-more": id, "": "", id: "", "ff-" + id + "-00f067aa0ba902b7-01": "",
		"00-" + strings.Repeat("0", 32) + "-00f067aa0ba902b7-01": "", "00-" + strings.ToUpper(id) + "-00f067aa0ba902b7-01": "", "00-" + id[1:] + "-00f067aa0ba902b7-01": "",
	} {
		if got := traceOf(parent); got != want {
			t.Errorf("%q: %q, want %q", parent, got, want)
		}
	}
}
