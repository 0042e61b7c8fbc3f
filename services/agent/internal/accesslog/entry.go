// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"bytes"
	"net/netip"
	"strconv"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/slot"
)

const protoTCP = 6

// exchange is a request and its HTTP part in one allocation.
type exchange struct {
	request flow.Request
	http    flow.HTTP
}

// copied is an exchange like x in the place of another one.
func (x *exchange) copied(to *exchange) *exchange {
	*to = *x
	to.request.HTTP = &to.http
	return to
}

// roomFor is for how many exchanges memory is taken at once: a page. One that waits keeps all of them.
const roomFor = 16

// exchange makes an empty one.
func (st *stream) exchange() *exchange {
	if len(st.room) == 0 {
		st.room = make([]exchange, roomFor)
	}
	x := &st.room[0]
	st.room = st.room[1:]
	return x
}

// http tells what an entry says; false = it makes no sense.
func (st *stream) http(e *entry) bool {
	st.made = exchange{}
	x := &st.made
	r := &x.request
	if !st.fill(r, &e.common) || !e.request.set {
		return false
	}
	kind := datav3.AccessLogType(e.common.kind)
	begins := kind == datav3.AccessLogType_DownstreamStart
	if !begins && kind != datav3.AccessLogType_DownstreamEnd && kind != datav3.AccessLogType_NotSet {
		return true // in between: nothing that a flow would say
	}
	rbac, ok := st.verdicts(&e.common)
	if !ok {
		return false
	}
	st.describe(x, e)
	if rbac.http.policy != "" {
		r.Rules = st.rule(st.slot.Key, rbac.http.policy)
	}
	k := keyOf(&e.common, r)
	if begins {
		st.begin(k, x, rbac.http.set || st.slot.Visibility)
		return true
	}
	st.end(k, x, e)
	return true
}

// put tells what x says now.
func (st *stream) put(x *exchange) { st.cfg.Put(&x.copied(st.exchange()).request) }

// begin tells a request, or keeps it for a moment when it is not decided yet.
func (st *stream) begin(k key, x *exchange, decided bool) {
	if len(st.begun) >= maxBegun {
		return
	}
	if decided {
		st.begun[k] = begun{}
		st.put(x)
		return
	}
	st.begun[k] = begun{&x.copied(&exchange{}).request} // it waits long, so that its memory is its own
	st.held = append(st.held, held{k, st.now.Add(hold)})
}

// end tells a response, and its request if that was not told.
func (st *stream) end(k key, x *exchange, e *entry) {
	r := &x.request
	b, known := st.begun[k]
	delete(st.begun, k)
	if bytes.HasPrefix(e.response.details, []byte(deniedWord)) {
		r.Denied, r.Rules = true, nil
		st.put(x)
		return
	}
	if !known || b.request != nil {
		st.put(x)
	}
	if e.response.code == 0 {
		return // the client went away
	}
	r.Response = true
	r.Latency = latencyOf(&e.common)
	r.Time += int64(r.Latency) //nolint:gosec // a duration
	x.http.Code = e.response.code
	x.http.Headers = st.picker.pick(e.all, e.response.headers, e.response.trailers)
	st.put(x)
}

// fill fills in what HTTP and TCP entries have in common; false = it makes no sense.
func (st *stream) fill(r *flow.Request, c *common) bool {
	client, clientIs, ok1 := st.address(c.remote.raw)
	server, serverIs, ok2 := st.address(c.local.raw)
	if !ok1 || !ok2 || client.Addr().Is4() != server.Addr().Is4() {
		return false
	}
	at := st.now
	if c.start.set {
		t := timestamppb.Timestamp{Seconds: c.start.seconds, Nanos: c.start.nanos}
		if begun := t.AsTime(); t.IsValid() && !begun.After(st.now) {
			at = begun
		}
	}
	r.Time, r.Client, r.Server, r.Proto = at.Add(st.cfg.Shift).UnixNano(), client, server, protoTCP
	r.Direction, r.ClientIdentity, r.ServerIdentity = uint8(st.slot.Direction), clientIs, serverIs
	if st.slot.Number != 0 {
		r.ProxyPort = slot.PortBase + st.slot.Number
	}
	return true
}

// describe fills in what speaks HTTP.
func (st *stream) describe(x *exchange, e *entry) {
	q := &e.request
	all := e.headers()
	x.request.TraceID = traceIn(all)
	scheme, path, authority := q.scheme, q.path, q.authority
	if len(scheme) == 0 {
		scheme = []byte("http")
	}
	if i := bytes.IndexAny(path, "?#"); i >= 0 && !st.cfg.Query {
		path = path[:i]
	}
	authority = authority[bytes.LastIndexByte(authority, '@')+1:] // without user and password
	st.url = append(append(append(append(st.url[:0], scheme...), "://"...), authority...), path...)
	x.http = flow.HTTP{
		Method: methodOf(q), URL: text(st.url, maxURL), Headers: st.picker.pick(all),
		Protocol: protocolOf(datav3.HTTPAccessLogEntry_HTTPVersion(e.protocol)),
	}
	x.request.HTTP = &x.http
}

func methodOf(q *request) string {
	if q.method == int32(corev3.RequestMethod_METHOD_UNSPECIFIED) {
		method, _ := find(q.headers, ":method")
		return text(method, maxName)
	}
	if name, ok := corev3.RequestMethod_name[q.method]; ok {
		return name
	}
	return strconv.Itoa(int(q.method))
}

// headers lists a request's headers in all, those that have fields of their own included.
func (e *entry) headers() []pair {
	q := &e.request
	e.all = e.all[:0]
	for i, value := range [...][]byte{q.userAgent, q.referer, q.theID, q.forwarded} {
		if len(value) > 0 {
			e.all = append(e.all, pair{ownFields[i], value})
		}
	}
	e.all = append(e.all, q.headers...)
	return e.all
}

// ownFields are the names of headers that an entry has fields for. They are bytes here, as made of texts each entry would make them anew.
var ownFields = [...][]byte{[]byte("user-agent"), []byte("referer"), []byte("x-request-id"), []byte("x-forwarded-for")}

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
func latencyOf(c *common) uint64 {
	for _, m := range [...]moment{c.lastTx, c.duration, c.firstTx, c.lastRx} {
		d := durationpb.Duration{Seconds: m.seconds, Nanos: m.nanos}
		if m.set && d.IsValid() && d.AsDuration() > 0 {
			return uint64(d.AsDuration())
		}
	}
	return 0
}

// key tells requests of a stream apart: by the id that the proxy gave, or by connection and time.
type key struct {
	id     string
	client netip.AddrPort
	at     int64
}

func keyOf(c *common, r *flow.Request) key {
	if len(c.streamID) > 0 {
		return key{id: text(c.streamID, maxName)}
	}
	return key{client: r.Client, at: r.Time}
}

// tcp tells a connection of which only the server name is read.
func (st *stream) tcp(e *entry) bool {
	c := &e.common
	r := &flow.Request{}
	if !st.fill(r, c) {
		return false
	}
	switch datav3.AccessLogType(c.kind) {
	case datav3.AccessLogType_NotSet, datav3.AccessLogType_TcpConnectionEnd:
	default:
		return true
	}
	rbac, ok := st.verdicts(c)
	if !ok {
		return false
	}
	r.Denied = bytes.HasPrefix(c.details, []byte(deniedWord)) || rbac.network.denied
	if rbac.network.policy != "" && !r.Denied {
		r.Rules = st.rule(st.slot.Key, rbac.network.policy)
	}
	r.TLS = &flow.TLS{ServerName: text(c.serverName, maxName)}
	st.cfg.Put(r)
	return true
}

// Bounds of what a stream remembers.
const (
	maxAddresses = 4096
	maxVerdicts  = 1024
	longVerdict  = 4096
)

// identityFor is how long it holds who has an address. Asking takes a system call or two, and what an entry tells of is older than that anyway.
const identityFor = 50 * time.Millisecond

// peer is an address that was met, and who had it when it was asked.
type peer struct {
	ip       netip.Addr
	identity uint32
	asked    time.Time
}

// address reads an Address, which must be a socket's, IPv4 unmapped, and says who has it.
func (st *stream) address(raw []byte) (netip.AddrPort, uint32, bool) {
	text, port, ok, err := socket(raw)
	if err != nil || !ok || port > 65535 {
		return netip.AddrPort{}, 0, false
	}
	p, known := st.peers[string(text)]
	if !known {
		ip, err := netip.ParseAddr(string(text))
		if err != nil {
			return netip.AddrPort{}, 0, false
		}
		p.ip = ip.Unmap().WithZone("")
	}
	if age := st.now.Sub(p.asked); !known || age >= identityFor || age < 0 {
		p.identity, p.asked = st.cfg.Identity(p.ip), st.now
		if len(st.peers) >= maxAddresses {
			clear(st.peers)
		}
		st.peers[string(text)] = p
	}
	return netip.AddrPortFrom(p.ip, uint16(port)), p.identity, true
}

// verdicts reads what RBAC filters decided; false = it makes no sense. A proxy says the same few things over and over.
func (st *stream) verdicts(c *common) (verdicts, bool) {
	v, known := st.decided[string(c.metadata.raw)]
	if known {
		return v, true
	}
	v, err := decodeMetadata(c.metadata.raw)
	if err != nil {
		return v, false
	}
	if len(c.metadata.raw) <= longVerdict {
		if len(st.decided) >= maxVerdicts {
			clear(st.decided)
		}
		st.decided[string(c.metadata.raw)] = v
	}
	return v, true
}
