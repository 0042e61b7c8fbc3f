// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"net/netip"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

// What RBAC says of itself in an entry.
const (
	httpRBAC    = "envoy.filters.http.rbac"
	networkRBAC = "envoy.filters.network.rbac"
	deniedWord  = "rbac_access_denied"
)

const protoTCP = 6

// http tells what an entry says; false = it makes no sense.
func (st *stream) http(e *datav3.HTTPAccessLogEntry) bool {
	common := e.GetCommonProperties()
	r, ok := st.request(common)
	if !ok || e.GetRequest() == nil {
		return false
	}
	kind := common.GetAccessLogType()
	begins := kind == datav3.AccessLogType_DownstreamStart
	if !begins && kind != datav3.AccessLogType_DownstreamEnd && kind != datav3.AccessLogType_NotSet {
		return true // in between: nothing that a flow would say
	}
	st.describe(r, e)
	rbac := common.GetMetadata().GetFilterMetadata()[httpRBAC]
	if name := effective(rbac.GetFields()); name != "" {
		st.allowedBy(r, name)
	}
	key := keyOf(common, r)
	if begins {
		st.begin(key, r, rbac != nil || st.slot.Visibility)
		return true
	}
	st.end(key, r, e)
	return true
}

// begin tells a request, or keeps it for a moment when it is not decided yet.
func (st *stream) begin(key string, r *flow.Request, decided bool) {
	if len(st.begun) >= maxBegun {
		return
	}
	if decided {
		st.begun[key] = begun{}
		st.cfg.Put(r)
		return
	}
	st.begun[key] = begun{r}
	st.held = append(st.held, held{key, st.cfg.Now().Add(hold)})
}

// end tells a response, and its request if that was not told.
func (st *stream) end(key string, r *flow.Request, e *datav3.HTTPAccessLogEntry) {
	response := e.GetResponse()
	b, known := st.begun[key]
	delete(st.begun, key)
	if strings.HasPrefix(response.GetResponseCodeDetails(), deniedWord) {
		r.Denied, r.Rules = true, nil
		st.cfg.Put(r)
		return
	}
	if !known || b.request != nil {
		st.cfg.Put(r)
	}
	code := response.GetResponseCode().GetValue()
	if code == 0 {
		return // the client went away
	}
	answer := *r
	answer.Response = true
	answer.Latency = latencyOf(e.GetCommonProperties())
	answer.Time += int64(answer.Latency)
	h := *r.HTTP
	h.Code = code
	h.Headers = st.cfg.Headers.pick(requestHeaders(e.GetRequest()), response.GetResponseHeaders(), response.GetResponseTrailers())
	answer.HTTP = &h
	st.cfg.Put(&answer)
}

// request makes what HTTP and TCP entries have in common.
func (st *stream) request(c *datav3.AccessLogCommon) (*flow.Request, bool) {
	client, ok1 := addressOf(c.GetDownstreamRemoteAddress())
	server, ok2 := addressOf(c.GetDownstreamLocalAddress())
	if !ok1 || !ok2 || client.Addr().Is4() != server.Addr().Is4() {
		return nil, false
	}
	now := st.cfg.Now()
	at := now
	if t := c.GetStartTime(); t.IsValid() && !t.AsTime().After(now) {
		at = t.AsTime()
	}
	r := &flow.Request{Time: at.Add(st.cfg.Shift).UnixNano(), Client: client, Server: server, Proto: protoTCP, Direction: uint8(st.slot.Direction)}
	r.ClientIdentity, r.ServerIdentity = st.cfg.Identity(client.Addr()), st.cfg.Identity(server.Addr())
	if st.slot.Number != 0 {
		r.ProxyPort = slot.PortBase + st.slot.Number
	}
	return r, true
}

// describe fills in what speaks HTTP.
func (st *stream) describe(r *flow.Request, e *datav3.HTTPAccessLogEntry) {
	q := e.GetRequest()
	headers := requestHeaders(q)
	r.TraceID = traceOf(headers["traceparent"])
	scheme, path := q.GetScheme(), q.GetPath()
	if scheme == "" {
		scheme = "http"
	}
	if i := strings.IndexAny(path, "?#"); i >= 0 && !st.cfg.Query {
		path = path[:i]
	}
	method := q.GetRequestHeaders()[":method"]
	if q.GetRequestMethod() != corev3.RequestMethod_METHOD_UNSPECIFIED {
		method = q.GetRequestMethod().String()
	}
	r.HTTP = &flow.HTTP{Method: text(method, maxName), URL: text(scheme+"://"+hostOf(q.GetAuthority())+path, maxURL), Protocol: protocolOf(e.GetProtocolVersion()),
		Headers: st.cfg.Headers.pick(headers)}
}

// hostOf is an authority without user and password.
func hostOf(authority string) string { return authority[strings.LastIndexByte(authority, '@')+1:] }

// requestHeaders are a request's headers, those that have fields of their own included.
func requestHeaders(q *datav3.HTTPRequestProperties) map[string]string {
	all := make(map[string]string, len(q.GetRequestHeaders())+4)
	for name, value := range map[string]string{
		"user-agent": q.GetUserAgent(), "referer": q.GetReferer(), "x-request-id": q.GetRequestId(), "x-forwarded-for": q.GetForwardedFor(),
	} {
		if value != "" {
			all[name] = value
		}
	}
	for name, value := range q.GetRequestHeaders() {
		all[strings.ToLower(name)] = value
	}
	return all
}

func protocolOf(v datav3.HTTPAccessLogEntry_HTTPVersion) string {
	switch v {
	case datav3.HTTPAccessLogEntry_HTTP10:
		return "HTTP/1.0"
	case datav3.HTTPAccessLogEntry_HTTP2:
		return "HTTP/2"
	case datav3.HTTPAccessLogEntry_HTTP3:
		return "HTTP/3"
	}
	return "HTTP/1.1"
}

// latencyOf is the time from a request's first byte to its response's last.
func latencyOf(c *datav3.AccessLogCommon) uint64 {
	for _, d := range []*durationpb.Duration{c.GetTimeToLastDownstreamTxByte(), c.GetDuration(), c.GetTimeToFirstDownstreamTxByte(), c.GetTimeToLastUpstreamRxByte()} {
		if d.IsValid() && d.AsDuration() > 0 {
			return uint64(d.AsDuration())
		}
	}
	return 0
}

// keyOf tells requests of a stream apart.
func keyOf(c *datav3.AccessLogCommon, r *flow.Request) string {
	if id := c.GetStreamId(); id != "" {
		return text(id, maxName)
	}
	return r.Client.String() + " " + time.Unix(0, r.Time).UTC().Format(time.RFC3339Nano)
}

// tcp tells a connection of which only the server name is read.
func (st *stream) tcp(e *datav3.TCPAccessLogEntry) bool {
	common := e.GetCommonProperties()
	r, ok := st.request(common)
	if !ok {
		return false
	}
	switch common.GetAccessLogType() {
	case datav3.AccessLogType_NotSet, datav3.AccessLogType_TcpConnectionEnd:
	default:
		return true
	}
	rbac := common.GetMetadata().GetFilterMetadata()[networkRBAC]
	r.Denied = strings.HasPrefix(common.GetConnectionTerminationDetails(), deniedWord) || rbac.GetFields()["enforced_engine_result"].GetStringValue() == "denied"
	if name := effective(rbac.GetFields()); name != "" && !r.Denied {
		st.allowedBy(r, name)
	}
	r.TLS = &flow.TLS{ServerName: text(common.GetTlsProperties().GetTlsSniHostname(), maxName)}
	st.cfg.Put(r)
	return true
}

// allowedBy names the rule that let a request pass.
func (st *stream) allowedBy(r *flow.Request, name string) {
	if rule, ok := st.rule(st.slot.Key, name); ok {
		r.Rules = []desired.PolicyRule{rule}
	}
}

// addressOf reads a socket address, IPv4 unmapped.
func addressOf(a *corev3.Address) (netip.AddrPort, bool) {
	s := a.GetSocketAddress()
	ip, err := netip.ParseAddr(s.GetAddress())
	if err != nil || s.GetPortValue() > 65535 {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(ip.Unmap().WithZone(""), uint16(s.GetPortValue())), true
}

// effective finds the RBAC policy that decided: of shadow rules first, as only those name the one that allows.
func effective(fields map[string]*structpb.Value) string {
	found := ""
	for key, v := range fields {
		if !strings.HasSuffix(key, "effective_policy_id") || v.GetStringValue() == "" {
			continue
		}
		if strings.HasSuffix(key, "shadow_effective_policy_id") {
			return v.GetStringValue()
		}
		found = v.GetStringValue()
	}
	return found
}
