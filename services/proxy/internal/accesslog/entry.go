// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"maps"
	"net/http"
	"net/netip"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
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
	size                       int64
	number                     uint64
}

// What RBAC filters leave in an entry's metadata.
const (
	rbacHTTP    = "envoy.filters.http.rbac"
	rbacNetwork = "envoy.filters.network.rbac"
)

// build makes the message of an entry, and an estimate of its size.
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
	c.Metadata = l.service.verdicts.get(verdict{policy: e.Policy, denied: e.Denied, tcp: e.Stream})
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
	r.UserAgent, r.Referer = first(e.RequestHeaders, "User-Agent"), first(e.RequestHeaders, "Referer")
	r.ForwardedFor, r.RequestId = first(e.RequestHeaders, "X-Forwarded-For"), first(e.RequestHeaders, "X-Request-Id")
	r.OriginalPath = first(e.RequestHeaders, "X-Envoy-Original-Path")
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

func first(h http.Header, canonical string) string {
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

// verdict is what an RBAC filter decided.
type verdict struct {
	policy      string
	denied, tcp bool
}

// metadata says it as Envoy's filters do: both as the shadow rules and as the enforced ones.
func (v verdict) metadata() *corev3.Metadata {
	result := "allowed"
	if v.denied {
		result = "denied"
	}
	filter := rbacHTTP
	if v.tcp {
		filter = rbacNetwork
	}
	values := map[string]*structpb.Value{
		"shadow_engine_result":   structpb.NewStringValue(result),
		"enforced_engine_result": structpb.NewStringValue(result),
	}
	if v.policy != "" {
		values["shadow_effective_policy_id"] = structpb.NewStringValue(v.policy)
		values["enforced_effective_policy_id"] = structpb.NewStringValue(v.policy)
	}
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{filter: {Fields: values}}}
}

// setFlags sets response flags by Envoy's short names.
func setFlags(to *datav3.ResponseFlags, names []string) {
	for _, n := range names {
		switch n {
		case "LH":
			to.FailedLocalHealthcheck = true
		case "UH":
			to.NoHealthyUpstream = true
		case "UT":
			to.UpstreamRequestTimeout = true
		case "LR":
			to.LocalReset = true
		case "UR":
			to.UpstreamRemoteReset = true
		case "UF":
			to.UpstreamConnectionFailure = true
		case "UC":
			to.UpstreamConnectionTermination = true
		case "UO":
			to.UpstreamOverflow = true
		case "NR":
			to.NoRouteFound = true
		case "RL":
			to.RateLimited = true
		case "DC":
			to.DownstreamConnectionTermination = true
		case "URX":
			to.UpstreamRetryLimitExceeded = true
		case "SI":
			to.StreamIdleTimeout = true
		case "DPE":
			to.DownstreamProtocolError = true
		case "UPE":
			to.UpstreamProtocolError = true
		case "UMSDR":
			to.UpstreamMaxStreamDurationReached = true
		case "DT":
			to.DurationTimeout = true
		case "NC":
			to.NoClusterFound = true
		case "OM":
			to.OverloadManager = true
		case "IH":
			to.InvalidEnvoyRequestHeaders = true
		}
	}
}
