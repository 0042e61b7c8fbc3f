// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"net/netip"
	"net/textproto"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

// oracle makes requests of one decoded message, in the plain way.
type oracle struct {
	*fixture
	slot  slot.Slot
	begun map[string]*flow.Request // nil = told
	held  []string
}

// take returns whether the message may begin a stream.
func (o *oracle) take(m *accesslogv3.StreamAccessLogsMessage) bool {
	name := m.GetIdentifier().GetLogName()
	if name == "" {
		return false
	}
	o.slot, _ = o.cfg.Slot(numberOf(cut(name, maxName)))
	o.begun = map[string]*flow.Request{}
	for _, e := range m.GetHttpLogs().GetLogEntry() {
		if !o.http(e) {
			o.cfg.Malformed()
		}
	}
	for _, e := range m.GetTcpLogs().GetLogEntry() {
		if !o.tcp(e) {
			o.cfg.Malformed()
		}
	}
	return true
}

func (o *oracle) release() {
	for _, key := range o.held {
		if r := o.begun[key]; r != nil {
			o.cfg.Put(r)
			o.begun[key] = nil
		}
	}
}

func (o *oracle) http(e *datav3.HTTPAccessLogEntry) bool {
	common := e.GetCommonProperties()
	r, ok := o.request(common)
	if !ok || e.GetRequest() == nil {
		return false
	}
	kind := common.GetAccessLogType()
	begins := kind == datav3.AccessLogType_DownstreamStart
	if !begins && kind != datav3.AccessLogType_DownstreamEnd && kind != datav3.AccessLogType_NotSet {
		return true
	}
	o.describe(r, e)
	rbac := common.GetMetadata().GetFilterMetadata()[httpRBAC]
	o.allowed(r, rbac.GetFields())
	key := common.GetStreamId()
	if key == "" {
		key = r.Client.String() + " " + time.Unix(0, r.Time).UTC().Format(time.RFC3339Nano)
	} else {
		key = "id " + cut(key, maxName)
	}
	if !begins {
		o.end(key, r, e)
		return true
	}
	if len(o.begun) >= maxBegun {
		return true
	}
	if rbac != nil || o.slot.Visibility {
		o.begun[key] = nil
		o.cfg.Put(r)
		return true
	}
	o.begun[key] = r
	o.held = append(o.held, key)
	return true
}

func (o *oracle) end(key string, r *flow.Request, e *datav3.HTTPAccessLogEntry) {
	response := e.GetResponse()
	waits, known := o.begun[key]
	delete(o.begun, key)
	if strings.HasPrefix(response.GetResponseCodeDetails(), deniedWord) {
		r.Denied, r.Rules = true, nil
		o.cfg.Put(r)
		return
	}
	if !known || waits != nil {
		o.cfg.Put(r)
	}
	if response.GetResponseCode().GetValue() == 0 {
		return
	}
	answer, h := *r, *r.HTTP
	answer.Response, answer.HTTP = true, &h
	answer.Latency = latencyFrom(e.GetCommonProperties())
	answer.Time += int64(answer.Latency)
	h.Code = response.GetResponseCode().GetValue()
	h.Headers = o.headers(allHeaders(e.GetRequest()), response.GetResponseHeaders(), response.GetResponseTrailers())
	o.cfg.Put(&answer)
}

func (o *oracle) request(c *datav3.AccessLogCommon) (*flow.Request, bool) {
	client, ok1 := addressFrom(c.GetDownstreamRemoteAddress())
	server, ok2 := addressFrom(c.GetDownstreamLocalAddress())
	if !ok1 || !ok2 || client.Addr().Is4() != server.Addr().Is4() {
		return nil, false
	}
	at := o.now
	if t := c.GetStartTime(); t.IsValid() && !t.AsTime().After(o.now) {
		at = t.AsTime()
	}
	r := &flow.Request{Time: at.Add(o.cfg.Shift).UnixNano(), Client: client, Server: server, Proto: protoTCP, Direction: uint8(o.slot.Direction)}
	r.ClientIdentity, r.ServerIdentity = o.cfg.Identity(client.Addr()), o.cfg.Identity(server.Addr())
	if o.slot.Number != 0 {
		r.ProxyPort = slot.PortBase + o.slot.Number
	}
	return r, true
}

func (o *oracle) describe(r *flow.Request, e *datav3.HTTPAccessLogEntry) {
	q := e.GetRequest()
	headers := allHeaders(q)
	r.TraceID = traceOf(headers["traceparent"])
	scheme, path := q.GetScheme(), q.GetPath()
	if scheme == "" {
		scheme = "http"
	}
	if i := strings.IndexAny(path, "?#"); i >= 0 && !o.cfg.Query {
		path = path[:i]
	}
	method := q.GetRequestHeaders()[":method"]
	if q.GetRequestMethod() != corev3.RequestMethod_METHOD_UNSPECIFIED {
		method = q.GetRequestMethod().String()
	}
	host := q.GetAuthority()
	host = host[strings.LastIndexByte(host, '@')+1:]
	r.HTTP = &flow.HTTP{Method: cut(method, maxName), URL: cut(scheme+"://"+host+path, maxURL), Protocol: protocolOf(e.GetProtocolVersion())}
	r.HTTP.Headers = o.headers(headers)
}

func (o *oracle) tcp(e *datav3.TCPAccessLogEntry) bool {
	common := e.GetCommonProperties()
	r, ok := o.request(common)
	if !ok {
		return false
	}
	switch common.GetAccessLogType() {
	case datav3.AccessLogType_NotSet, datav3.AccessLogType_TcpConnectionEnd:
	default:
		return true
	}
	rbac := common.GetMetadata().GetFilterMetadata()[networkRBAC]
	r.Denied = strings.HasPrefix(common.GetConnectionTerminationDetails(), deniedWord) || rbac.GetFields()[engineResult].GetStringValue() == "denied"
	if !r.Denied {
		o.allowed(r, rbac.GetFields())
	}
	r.TLS = &flow.TLS{ServerName: cut(common.GetTlsProperties().GetTlsSniHostname(), maxName)}
	o.cfg.Put(r)
	return true
}

// allowed names the rule of the policy that decided.
func (o *oracle) allowed(r *flow.Request, values map[string]*structpb.Value) {
	for _, suffix := range []string{shadowPolicy, anyPolicy} {
		var keys []string
		for key, v := range values {
			if strings.HasSuffix(key, suffix) && v.GetStringValue() != "" {
				keys = append(keys, key)
			}
		}
		if len(keys) > 0 {
			r.Rules = o.newStream().rule(o.slot.Key, values[slices.Min(keys)].GetStringValue())
			return
		}
	}
}

func (o *oracle) headers(maps ...map[string]string) []flow.Header {
	values := map[string]string{}
	h := &o.cfg.Headers
	for _, m := range maps {
		for name, value := range m {
			name = strings.ToLower(name)
			if _, shown := h.shown[name]; !h.all && !shown || strings.HasPrefix(name, ":") {
				continue
			}
			if _, hidden := h.hides[name]; hidden {
				value = redacted
			}
			values[cut(textproto.CanonicalMIMEHeaderKey(name), maxName)] = cut(value, maxValue)
		}
	}
	list := make([]flow.Header, 0, len(values))
	for name, value := range values {
		list = append(list, flow.Header{Key: name, Value: value})
	}
	slices.SortFunc(list, func(a, b flow.Header) int { return strings.Compare(a.Key, b.Key) })
	return list[:min(len(list), maxHeaders)]
}

func allHeaders(q *datav3.HTTPRequestProperties) map[string]string {
	all := map[string]string{}
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

func latencyFrom(c *datav3.AccessLogCommon) uint64 {
	for _, d := range []*durationpb.Duration{
		c.GetTimeToLastDownstreamTxByte(), c.GetDuration(), c.GetTimeToFirstDownstreamTxByte(), c.GetTimeToLastUpstreamRxByte(),
	} {
		if d.IsValid() && d.AsDuration() > 0 {
			return uint64(d.AsDuration())
		}
	}
	return 0
}

func addressFrom(a *corev3.Address) (netip.AddrPort, bool) {
	s := a.GetSocketAddress()
	ip, err := netip.ParseAddr(s.GetAddress())
	if err != nil || s.GetPortValue() > 65535 {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(ip.Unmap().WithZone(""), uint16(s.GetPortValue())), true
}

func cut(s string, limit int) string {
	return strings.ToValidUTF8(s[:min(len(s), limit)], "")
}

// ambiguous says that names of headers differ only in what flows do not show: then it is chance which one a map gives last.
func ambiguous(m *accesslogv3.StreamAccessLogsMessage) bool {
	for _, e := range m.GetHttpLogs().GetLogEntry() {
		for _, h := range []map[string]string{e.GetRequest().GetRequestHeaders(), e.GetResponse().GetResponseHeaders(), e.GetResponse().GetResponseTrailers()} {
			seen := map[string]bool{}
			for name := range h {
				name = cut(textproto.CanonicalMIMEHeaderKey(strings.ToLower(name)), maxName)
				if seen[name] {
					return true
				}
				seen[name] = true
			}
		}
	}
	return false
}

// compare compares what two fixtures were told.
func compare(t *testing.T, got, want *fixture) {
	t.Helper()
	options := cmp.Options{cmpopts.EquateComparable(netip.AddrPort{}), cmpopts.EquateEmpty()}
	if diff := cmp.Diff(want.got, got.got, options); diff != "" || got.malformed != want.malformed {
		t.Fatalf("%d malformed, by the generated code %d; requests (-generated +ours):\n%s", got.malformed, want.malformed, diff)
	}
}
