// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"bytes"
	"net/http"
	"net/netip"
	"strings"
	"time"
	"unicode/utf8"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/weirmesh/weir/services/proxy/internal/model"
)

// Entries are encoded as they come, by hand: made as messages and encoded by the library they took twice the processor time, in a path that each request
// passes twice (BenchmarkLog against BenchmarkLibrary). The library is the test's oracle.

// Numbers of fields.
const (
	commonRemote, commonLocal, commonTLS, commonStart, commonLastTx protowire.Number = 2, 3, 4, 5, 12
	commonUpstream, commonCluster, commonFlags, commonMetadata      protowire.Number = 13, 15, 16, 17
	commonRoute, commonDirect, commonTags, commonDuration           protowire.Number = 19, 20, 22, 23
	commonAttempts, commonDetails                                   protowire.Number = 24, 25
	commonSent, commonReceived, commonType                          protowire.Number = 29, 30, 33

	entryCommon, entryProtocol, entryRequest, entryResponse, entryConnection protowire.Number = 1, 2, 3, 4, 2

	requestMethod, requestScheme, requestAuthority, requestPath, requestAgent, requestReferer protowire.Number = 1, 2, 3, 5, 6, 7
	requestForwarded, requestID, requestOriginal                                              protowire.Number = 8, 9, 10
	requestHeaderBytes, requestBodyBytes, requestHeaders                                      protowire.Number = 11, 12, 13

	responseCode, responseHeaderBytes, responseBodyBytes, responseHeaders protowire.Number = 1, 2, 3, 4
	responseTrailers, responseDetails                                     protowire.Number = 5, 6

	tlsServerName protowire.Number = 3
)

// encoder appends fields; zero values are left out, as the library does.
type encoder struct{ b []byte }

// open begins a message in a field; close writes its length, and returns where its content begins now.
func (w *encoder) open(field protowire.Number) (at int) {
	w.b = append(protowire.AppendTag(w.b, field, protowire.BytesType), 0)
	return len(w.b)
}

func (w *encoder) close(at int) (start int) {
	n := len(w.b) - at
	if n < 0x80 {
		w.b[at-1] = byte(n)
		return at
	}
	more := protowire.SizeVarint(uint64(n)) - 1
	w.b = append(w.b, make([]byte, more)...)
	copy(w.b[at+more:], w.b[at:at+n])
	protowire.AppendVarint(w.b[:at-1], uint64(n))
	return at + more
}

// text appends a string. What clients send need not be UTF-8, which strings of messages must be.
func (w *encoder) text(field protowire.Number, s string) {
	if s == "" {
		return
	}
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, string(utf8.RuneError))
	}
	w.b = protowire.AppendString(protowire.AppendTag(w.b, field, protowire.BytesType), s)
}

func (w *encoder) number(field protowire.Number, n uint64) {
	if n != 0 {
		w.b = protowire.AppendVarint(protowire.AppendTag(w.b, field, protowire.VarintType), n)
	}
}

func (w *encoder) raw(field protowire.Number, message []byte) {
	w.b = protowire.AppendBytes(protowire.AppendTag(w.b, field, protowire.BytesType), message)
}

func (w *encoder) pair(field protowire.Number, key, value string) {
	at := w.open(field)
	w.text(1, key)
	w.text(2, value)
	w.close(at)
}

// seconds appends a Timestamp or a Duration.
func (w *encoder) seconds(field protowire.Number, seconds int64, nanos int) {
	at := w.open(field)
	w.number(1, uint64(seconds)) //nolint:gosec // as the wire has negative numbers
	w.number(2, uint64(nanos))   //nolint:gosec // not negative
	w.close(at)
}

func (w *encoder) address(field protowire.Number, a netip.AddrPort) {
	if !a.IsValid() {
		return
	}
	outer := w.open(field)
	inner := w.open(1)
	w.b = append(protowire.AppendTag(w.b, 2, protowire.BytesType), 0)
	at := len(w.b)
	w.b = a.Addr().Unmap().WithZone("").AppendTo(w.b)
	w.b[at-1] = byte(len(w.b) - at) // below 46
	// The port is a choice of the message, so that 0 is written too.
	w.b = protowire.AppendVarint(protowire.AppendTag(w.b, 3, protowire.VarintType), uint64(a.Port()))
	w.close(inner)
	w.close(outer)
}

// encode appends an entry.
func (l *logger) encode(b []byte, e *model.Entry) []byte {
	x := encoded{encoder: encoder{b: b}}
	l.encodeTo(&x, e)
	return x.b
}

// encoded is an entry, and where in it the beginning of a request and its end say the same, if nothing has changed in between.
type encoded struct {
	encoder
	// who is of the connection, the route and the verdict, asked of the request.
	who, asked span
}

// span is a part of an entry.
type span struct{ from, to int }

// emptied is an entry with nothing in it that uses the room of x.
func (x *encoded) emptied() encoded { return encoded{encoder: encoder{b: x.b[:0]}} }

// repeats reports whether an entry says all that its request's beginning said.
func (x *encoded) repeats(begin *encoded) bool {
	return bytes.Equal(x.b[x.who.from:x.who.to], begin.b[begin.who.from:begin.who.to]) &&
		bytes.Equal(x.b[x.asked.from:x.asked.to], begin.b[begin.asked.from:begin.asked.to])
}

func (l *logger) encodeTo(x *encoded, e *model.Entry) {
	w := &x.encoder
	at := w.open(entryCommon)
	l.who(w, e)
	n := len(w.b) - at
	l.common(w, e)
	from := w.close(at)
	x.who = span{from, from + n}
	if e.Stream {
		at = w.open(entryConnection)
		w.number(1, e.RequestBytes)
		w.number(2, e.ResponseBytes)
		w.close(at)
		return
	}
	w.number(entryProtocol, uint64(protocolOf(e.Protocol))) //nolint:gosec // an enumeration
	at = w.open(entryRequest)
	l.request(w, e)
	n = len(w.b) - at
	w.number(requestBodyBytes, e.RequestBytes)
	from = w.close(at)
	x.asked = span{from, from + n}
	at = w.open(entryResponse)
	l.response(w, e)
	w.close(at)
}

// who appends what of the common part does not change while a request is under way.
func (l *logger) who(w *encoder, e *model.Entry) {
	w.address(commonRemote, e.Conn.Remote)
	w.address(commonLocal, e.Conn.Local)
	if e.Conn.ServerName != "" || e.Conn.TLS {
		at := w.open(commonTLS)
		w.text(tlsServerName, e.Conn.ServerName)
		w.close(at)
	}
	w.seconds(commonStart, e.Start.Unix(), e.Start.Nanosecond())
	w.text(commonCluster, e.Cluster)
	if e.Policy != "" || e.Denied {
		w.raw(commonMetadata, l.service.verdicts.get(verdict{policy: e.Policy, denied: e.Denied, tcp: e.Stream}))
	}
	w.text(commonRoute, e.Route)
	w.address(commonDirect, e.Conn.Remote)
}

// common appends the rest of the common part.
func (l *logger) common(w *encoder, e *model.Entry) {
	if !e.Begin {
		seconds, nanos := int64(e.Duration/time.Second), int(e.Duration%time.Second)
		w.seconds(commonLastTx, seconds, nanos)
		w.seconds(commonDuration, seconds, nanos)
	}
	w.address(commonUpstream, e.Upstream)
	if len(e.Flags) > 0 {
		w.raw(commonFlags, flagBytes(e.Flags))
	}
	for k, v := range l.tags {
		w.pair(commonTags, k, v)
	}
	w.number(commonAttempts, uint64(e.Attempts))
	if e.Stream {
		w.text(commonDetails, e.Details)
		w.number(commonSent, e.ResponseBytes)
		w.number(commonReceived, e.RequestBytes)
	}
	w.number(commonType, uint64(typeOf(e))) //nolint:gosec // an enumeration
}

// request appends what was asked, but for how long the body was.
func (l *logger) request(w *encoder, e *model.Entry) {
	w.number(requestMethod, uint64(corev3.RequestMethod_value[e.Method])) //nolint:gosec // an enumeration
	w.text(requestScheme, e.Scheme)
	w.text(requestAuthority, e.Authority)
	w.text(requestPath, e.Path)
	w.text(requestAgent, first(e.RequestHeaders, "User-Agent"))
	w.text(requestReferer, first(e.RequestHeaders, "Referer"))
	w.text(requestForwarded, first(e.RequestHeaders, "X-Forwarded-For"))
	w.text(requestID, first(e.RequestHeaders, "X-Request-Id"))
	w.text(requestOriginal, first(e.RequestHeaders, "X-Envoy-Original-Path"))
	w.number(requestHeaderBytes, e.RequestHeaderBytes)
	w.headers(requestHeaders, e.RequestHeaders, l.requestHeaders)
}

func (l *logger) response(w *encoder, e *model.Entry) {
	if e.Status != 0 {
		at := w.open(responseCode)
		w.number(1, uint64(e.Status)) //nolint:gosec // a status has three digits
		w.close(at)
	}
	w.number(responseHeaderBytes, e.ResponseHdrBytes)
	w.number(responseBodyBytes, e.ResponseBytes)
	w.headers(responseHeaders, e.ResponseHeaders, l.responseHeaders)
	w.headers(responseTrailers, e.Trailers, l.trailers)
	w.text(responseDetails, e.Details)
}

// headers appends the headers asked for; several values are joined as one line would have them.
func (w *encoder) headers(field protowire.Number, h http.Header, names []header) {
	for _, n := range names {
		if values := h[n.canonical]; len(values) == 1 {
			w.pair(field, n.lower, values[0])
		} else if len(values) > 1 {
			w.pair(field, n.lower, strings.Join(values, ","))
		}
	}
}

func first(h http.Header, canonical string) string {
	if v := h[canonical]; len(v) > 0 {
		return v[0]
	}
	return ""
}

func protocolOf(name string) datav3.HTTPAccessLogEntry_HTTPVersion {
	switch name {
	case "HTTP/1.0":
		return datav3.HTTPAccessLogEntry_HTTP10
	case "HTTP/1.1":
		return datav3.HTTPAccessLogEntry_HTTP11
	case "HTTP/2", "HTTP/2.0":
		return datav3.HTTPAccessLogEntry_HTTP2
	}
	return datav3.HTTPAccessLogEntry_PROTOCOL_UNSPECIFIED
}

func typeOf(e *model.Entry) datav3.AccessLogType {
	switch {
	case e.Stream && e.Begin && e.Upstream.IsValid():
		return datav3.AccessLogType_TcpUpstreamConnected
	case e.Stream && e.Begin:
		return datav3.AccessLogType_TcpConnectionStart
	case e.Stream:
		return datav3.AccessLogType_TcpConnectionEnd
	case e.Begin:
		return datav3.AccessLogType_DownstreamStart
	}
	return datav3.AccessLogType_DownstreamEnd
}
