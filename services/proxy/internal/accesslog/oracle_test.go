// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"maps"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/services/proxy/internal/model"
)

// address is an address and what it is made of, in one piece of memory.
type address struct {
	outer  corev3.Address
	kind   corev3.Address_SocketAddress
	socket corev3.SocketAddress
	port   corev3.SocketAddress_PortValue
}

func (a *address) set(from netip.AddrPort) *corev3.Address {
	if !from.IsValid() {
		return nil
	}
	a.port.PortValue = uint32(from.Port())
	a.socket.Address, a.socket.PortSpecifier = from.Addr().Unmap().WithZone("").String(), &a.port
	a.kind.SocketAddress = &a.socket
	a.outer.Address = &a.kind
	return &a.outer
}

// commonParts is what each entry has.
type commonParts struct {
	common                     datav3.AccessLogCommon
	remote, direct, local, far address
	start                      timestamppb.Timestamp
	duration                   durationpb.Duration
	flags                      datav3.ResponseFlags
	tls                        datav3.TLSProperties
	request                    datav3.HTTPRequestProperties
	response                   datav3.HTTPResponseProperties
	code                       wrapperspb.UInt32Value
	http                       datav3.HTTPAccessLogEntry
	tcp                        datav3.TCPAccessLogEntry
	connection                 datav3.ConnectionProperties
}

// build makes the message of an entry by the library: what the encoder must come to.
func (l *logger) build(e *model.Entry) (*commonParts, int) {
	p := &commonParts{}
	c := &p.common
	c.DownstreamRemoteAddress = p.remote.set(e.Conn.Remote)
	c.DownstreamDirectRemoteAddress = p.direct.set(e.Conn.Remote)
	c.DownstreamLocalAddress = p.local.set(e.Conn.Local)
	c.UpstreamRemoteAddress = p.far.set(e.Upstream)
	p.start.Seconds, p.start.Nanos = e.Start.Unix(), int32(e.Start.Nanosecond()) //nolint:gosec // below 1e9
	c.StartTime = &p.start
	if !e.Begin {
		p.duration.Seconds, p.duration.Nanos = int64(e.Duration/1e9), int32(e.Duration%1e9) //nolint:gosec // below 1e9
		c.Duration, c.TimeToLastDownstreamTxByte = &p.duration, &p.duration
	}
	if e.Conn.ServerName != "" || e.Conn.TLS {
		p.tls.TlsSniHostname = e.Conn.ServerName
		c.TlsProperties = &p.tls
	}
	c.UpstreamCluster, c.RouteName, c.UpstreamRequestAttemptCount = e.Cluster, e.Route, e.Attempts
	if len(e.Flags) > 0 {
		setFlags(&p.flags, e.Flags)
		c.ResponseFlags = &p.flags
	}
	c.CustomTags = maps.Clone(l.tags)
	if e.Policy != "" || e.Denied {
		c.Metadata = verdict{policy: e.Policy, denied: e.Denied, tcp: e.Stream}.metadata()
	}
	size := 320 + len(e.Cluster) + len(e.Route) + len(e.Details) + 2*len(e.Policy)
	if e.Stream {
		l.tcpEntry(p, e)
		return p, size
	}
	return p, size + l.httpEntry(p, e)
}

func (l *logger) tcpEntry(p *commonParts, e *model.Entry) {
	c := &p.common
	c.AccessLogType = datav3.AccessLogType_TcpConnectionEnd
	if e.Begin {
		c.AccessLogType = datav3.AccessLogType_TcpConnectionStart
		if e.Upstream.IsValid() {
			c.AccessLogType = datav3.AccessLogType_TcpUpstreamConnected
		}
	}
	c.ConnectionTerminationDetails = e.Details
	c.DownstreamWireBytesReceived, c.DownstreamWireBytesSent = e.RequestBytes, e.ResponseBytes
	p.connection.ReceivedBytes, p.connection.SentBytes = e.RequestBytes, e.ResponseBytes
	p.tcp.CommonProperties, p.tcp.ConnectionProperties = c, &p.connection
}

func (l *logger) httpEntry(p *commonParts, e *model.Entry) (size int) {
	c := &p.common
	c.AccessLogType = datav3.AccessLogType_DownstreamEnd
	if e.Begin {
		c.AccessLogType = datav3.AccessLogType_DownstreamStart
	}
	h := &p.http
	h.CommonProperties, h.Request, h.Response = c, &p.request, &p.response
	switch e.Protocol {
	case "HTTP/1.0":
		h.ProtocolVersion = datav3.HTTPAccessLogEntry_HTTP10
	case "HTTP/1.1":
		h.ProtocolVersion = datav3.HTTPAccessLogEntry_HTTP11
	case "HTTP/2", "HTTP/2.0":
		h.ProtocolVersion = datav3.HTTPAccessLogEntry_HTTP2
	}
	r := &p.request
	r.RequestMethod = corev3.RequestMethod(corev3.RequestMethod_value[e.Method])
	r.Scheme, r.Authority, r.Path = strings.Clone(e.Scheme), strings.Clone(e.Authority), strings.Clone(e.Path)
	r.UserAgent, r.Referer = cloneFirst(e.RequestHeaders, "User-Agent"), cloneFirst(e.RequestHeaders, "Referer")
	r.ForwardedFor, r.RequestId = cloneFirst(e.RequestHeaders, "X-Forwarded-For"), cloneFirst(e.RequestHeaders, "X-Request-Id")
	r.OriginalPath = cloneFirst(e.RequestHeaders, "X-Envoy-Original-Path")
	r.RequestHeadersBytes, r.RequestBodyBytes = e.RequestHeaderBytes, e.RequestBytes
	var n int
	r.RequestHeaders, n = pick(e.RequestHeaders, l.requestHeaders)
	size += n + len(e.Authority) + len(e.Path) + len(r.GetUserAgent()) + len(r.GetReferer()) + len(r.GetForwardedFor()) + len(r.GetRequestId())
	a := &p.response
	if e.Status != 0 {
		p.code.Value = uint32(e.Status) //nolint:gosec // a status has three digits
		a.ResponseCode = &p.code
	}
	a.ResponseHeadersBytes, a.ResponseBodyBytes, a.ResponseCodeDetails = e.ResponseHdrBytes, e.ResponseBytes, e.Details
	a.ResponseHeaders, n = pick(e.ResponseHeaders, l.responseHeaders)
	size += n
	a.ResponseTrailers, n = pick(e.Trailers, l.trailers)
	return size + n + 120
}

func cloneFirst(h http.Header, canonical string) string {
	if v := h[canonical]; len(v) > 0 {
		return strings.Clone(v[0])
	}
	return ""
}

// pick copies the headers asked for; several values are joined as one line would have them.
func pick(h http.Header, names []header) (out map[string]string, size int) {
	for _, n := range names {
		values := h[n.canonical]
		if len(values) == 0 {
			continue
		}
		if out == nil {
			out = make(map[string]string, len(names))
		}
		text := strings.Join(values, ",")
		if len(values) == 1 {
			text = strings.Clone(text)
		}
		out[n.lower] = text
		size += len(n.lower) + len(text) + 8
	}
	return out, size
}

// TestEncoder: what the encoder makes is what the library makes.
func TestEncoder(t *testing.T) {
	l := &logger{
		service: &Service{}, tags: map[string]string{"a": "b"},
		requestHeaders: headers([]string{"x-canary", "Cookie", "none"}), responseHeaders: headers([]string{"server"}), trailers: headers([]string{"grpc-status"}),
	}
	random := rand.New(rand.NewPCG(3, 4))
	text := func() string {
		return strings.Repeat(string(rune('a'+random.IntN(26))), random.IntN(4)*random.IntN(100))
	}
	addr := func() netip.AddrPort {
		return []netip.AddrPort{{}, netip.MustParseAddrPort("10.0.0.1:0"), netip.MustParseAddrPort("[fd00::1]:65535"),
			netip.MustParseAddrPort("[::ffff:10.0.0.1]:80")}[random.IntN(4)]
	}
	number := func() uint64 { return random.Uint64() >> random.IntN(65) }
	header := func() http.Header {
		return http.Header{"X-Canary": {text(), text()}, "Cookie": {text()}, "Server": nil, "Grpc-Status": {"0"}, "User-Agent": {text()}, "X-Request-Id": {text()}}
	}
	for i := range 3000 {
		e := &model.Entry{
			Conn:  &model.Conn{Remote: addr(), Local: addr(), ServerName: text(), TLS: i%3 == 0},
			Begin: random.IntN(2) == 0, Stream: random.IntN(2) == 0, Start: time.Unix(random.Int64N(1<<33), random.Int64N(1e9)), Duration: time.Duration(random.Int64N(1 << 40)),
			Protocol: []string{"", "HTTP/1.0", "HTTP/1.1", "HTTP/2"}[random.IntN(4)], Method: []string{"", "GET", "PATCH", "ODD"}[random.IntN(4)],
			Scheme: text(), Authority: text(), Path: text(), RequestHeaders: header(), ResponseHeaders: header(), Trailers: header(), Status: random.IntN(600),
			RequestBytes: number(), ResponseBytes: number(), RequestHeaderBytes: number(), ResponseHdrBytes: number(), Denied: random.IntN(2) == 0, Policy: text(),
			Flags: [][]string{nil, {"UH", "URX"}, {"DPE"}, {"unknown"}}[random.IntN(4)], Details: text(), Upstream: addr(), Cluster: text(), Route: text(), Attempts: random.Uint32(),
		}
		parts, _ := l.build(e)
		var want, got proto.Message = &parts.http, &datav3.HTTPAccessLogEntry{}
		if e.Stream {
			want, got = &parts.tcp, &datav3.TCPAccessLogEntry{}
		}
		if err := proto.Unmarshal(l.encode(nil, e), got); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(got, want) {
			t.Fatalf("got  %v\nwant %v", got, want)
		}
	}
}

// FuzzEncoder: whatever a client sends can be told.
func FuzzEncoder(f *testing.F) {
	f.Add("/a\xff", "example\x00", "curl")
	f.Fuzz(func(t *testing.T, path, authority, agent string) {
		l := &logger{service: &Service{}, requestHeaders: headers([]string{"user-agent"})}
		e := &model.Entry{Conn: &model.Conn{ServerName: authority}, Path: path, Authority: authority, RequestHeaders: http.Header{"User-Agent": {agent, agent}}}
		var got datav3.HTTPAccessLogEntry
		if err := proto.Unmarshal(l.encode(nil, e), &got); err != nil {
			t.Fatal(err)
		}
		if got.GetRequest().GetPath() != strings.ToValidUTF8(path, "\uFFFD") {
			t.Fatalf("path %q, want %q", got.GetRequest().GetPath(), path)
		}
	})
}

// BenchmarkLibrary is what the encoder is measured against.
func BenchmarkLibrary(b *testing.B) {
	benchmark(b, func(l *logger, e *model.Entry) {
		parts, _ := l.build(e)
		if _, err := proto.Marshal(&parts.http); err != nil {
			b.Fatal(err)
		}
	})
}

func BenchmarkEncoder(b *testing.B) {
	benchmark(b, func(l *logger, e *model.Entry) { l.encode(make([]byte, 0, typicalEntry), e) })
}

func benchmark(b *testing.B, one func(*logger, *model.Entry)) {
	l := &logger{service: &Service{}, requestHeaders: headers([]string{"x-canary"})}
	e := &model.Entry{
		Conn:  &model.Conn{Remote: netip.MustParseAddrPort("10.0.0.1:1234"), Local: netip.MustParseAddrPort("10.0.0.2:80")},
		Start: time.Unix(100, 5), Duration: time.Second, Protocol: "HTTP/1.1", Method: "GET", Scheme: "http", Authority: "web.shop.svc", Path: "/cart?id=1",
		RequestHeaders: http.Header{"X-Canary": {"true"}, "User-Agent": {"curl/8"}}, Status: 200, Policy: "shop/web/ingress[0]", Cluster: "original-dst",
		Upstream: netip.MustParseAddrPort("10.0.0.2:80"), ResponseBytes: 100, Attempts: 1,
	}
	b.ReportAllocs()
	for b.Loop() {
		one(l, e)
	}
}
