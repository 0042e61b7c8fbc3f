// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/services/agent/internal/batch"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// eventL7 is Hubble's event type of what proxies tell.
const eventL7 = 129

// Request is what a proxy or weir-dns saw: a request, or the response to one. Exactly one of HTTP, DNS and TLS is set. All text is valid UTF-8.
type Request struct {
	// Time in Unix nanoseconds.
	Time int64
	// Response: it goes from Server to Client.
	Response bool
	// Denied by policy.
	Denied bool
	// Latency of a response.
	Latency uint64
	// Client and Server as the client knows them. Both are of one family.
	Client, Server netip.AddrPort
	Proto          uint8
	// Identities; 0 = what the directory says of the address.
	ClientIdentity, ServerIdentity uint32
	// Direction of the connection seen from the endpoint whose policy it is (datapath.Direction...); 0 = not known.
	Direction uint8
	// ProxyPort is where the proxy listens; 0 = not known.
	ProxyPort uint16
	// Rules that let it pass.
	Rules []desired.PolicyRule
	// TraceID of the trace that it is part of.
	TraceID string

	HTTP *HTTP
	DNS  *DNS
	TLS  *TLS
}

// HTTP is the part of a request that speaks HTTP.
type HTTP struct {
	// Code of a response.
	Code uint32
	// Protocol such as HTTP/1.1.
	Method, URL, Protocol string
	// Headers by name.
	Headers []Header
}

// Header is a header of a request or a response.
type Header struct{ Key, Value string }

// DNS is the part of a query or an answer.
type DNS struct {
	Query  string
	QTypes []string
	// Of an answer.
	IPs, CNames, RRTypes []string
	TTL, RCode           uint32
}

// TLS is a connection of which only the server name is read; it may have none.
type TLS struct{ ServerName string }

// EncodeRequest encodes what a proxy saw. The result is valid until the encoder's next call. False: it makes no sense.
func (e *Encoder) EncodeRequest(r *Request) (*Flow, bool) {
	client, server := r.Client.Addr(), r.Server.Addr()
	if !client.IsValid() || !server.IsValid() || client.Is4() != server.Is4() || r.HTTP == nil && r.DNS == nil && r.TLS == nil {
		return nil, false
	}
	conn, known := e.proxied.of(r)
	if !known {
		conn = connection{client: r.ClientIdentity, server: r.ServerIdentity}
	}
	verdict := flowpb.Verdict_FORWARDED
	if r.Denied {
		verdict = flowpb.Verdict_DROPPED
	}
	b := e.begin(r.Time)
	b = append(b, tagVerdict, byte(verdict), tagType, byte(flowpb.FlowType_L7))
	b = appendEvent(b, eventL7, 0)
	b = appendVarintField(b, tagDirection, uint64(r.Direction))
	b = appendReply(b, r.Response)
	b = appendVarintField(b, tagProxyPort, uint64(r.ProxyPort))
	if r.TraceID != "" {
		var start, inner int
		b, start = begin(b, tagTraceContext)
		b, inner = begin(b, 1<<3|2)
		b = appendStringField(b, 1<<3|2, r.TraceID)
		b = end(end(b, inner), start)
	}

	e.dir.mu.Lock()
	near, far := e.dir.end(client.As16(), conn.client), e.dir.end(server.As16(), conn.server)
	if s := e.dir.service(conn.service, server.As16(), r.Server.Port(), r.Proto); s != nil {
		tag := uint32(tagDestService)
		if r.Response {
			tag = tagSourceService
		}
		b = appendBytesField(b, tag, s)
	}
	e.dir.mu.Unlock()

	b = e.appendRules(b, r)
	source, destination, sport, dport := near, far, r.Client.Port(), r.Server.Port()
	if r.Response {
		source, destination, sport, dport = far, near, dport, sport
	}
	version := uint8(6)
	if client.Is4() {
		version = 4
	}
	b = e.ends(b, source, destination, version, "")
	switch r.Proto {
	case protoTCP:
		b = appendPorts(b, 1<<3|2, sport, dport, nil)
	case protoUDP:
		b = appendPorts(b, 2<<3|2, sport, dport, nil)
	}
	b = appendLayer7(b, r)
	b, start := begin(b, tagSummary)
	b = end(appendSummary(b, r), start)
	e.body = b
	e.meta = batch.Meta{SourceNamespace: source.namespace, DestinationNamespace: destination.namespace, Verdict: int32(verdict), EventType: eventL7}
	e.out = Flow{Time: r.Time, Body: e.body, Meta: &e.meta}
	return &e.out, true
}

// maxRequestRules bounds how many lists of rules are kept encoded.
const maxRequestRules = 256

// ruleList is a list of rules that requests share: nobody changes it, and while it is a key nothing else has its place.
type ruleList struct {
	first *desired.PolicyRule
	count int
}

// appendRules names the rules that let a request pass.
func (e *Encoder) appendRules(b []byte, r *Request) []byte {
	if len(r.Rules) == 0 {
		return b
	}
	tag := uint32(tagIngressAllowed)
	if r.Direction == uint8(desired.Egress) {
		tag = tagEgressAllowed
	}
	list := ruleList{&r.Rules[0], len(r.Rules)}
	rules, known := e.requestRules[list]
	if !known {
		if len(e.requestRules) >= maxRequestRules {
			clear(e.requestRules)
		}
		rules = encodeRules(0, r.Rules)
		e.requestRules[list] = rules
	}
	for _, p := range rules.policies {
		b = appendBytesField(b, tag, p)
	}
	for _, l := range rules.logs {
		b = appendStringField(b, tagPolicyLog, l)
	}
	return b
}

func appendLayer7(b []byte, r *Request) []byte {
	b, start := begin(b, tagL7)
	kind := flowpb.L7FlowType_REQUEST
	if r.Response {
		kind = flowpb.L7FlowType_RESPONSE
	}
	b = append(b, 1<<3, byte(kind))
	if r.Response {
		b = appendVarintField(b, 2<<3, r.Latency)
	}
	switch {
	case r.DNS != nil:
		b = appendDNS(b, r.DNS, r.Response)
	case r.HTTP != nil:
		b = appendHTTP(b, r.HTTP, r.Response)
	}
	return end(b, start)
}

func appendHTTP(b []byte, h *HTTP, response bool) []byte {
	b, start := begin(b, tagHTTP)
	if response {
		b = appendVarintField(b, 1<<3, uint64(h.Code))
	}
	b = appendStringField(b, 2<<3|2, h.Method)
	b = appendStringField(b, 3<<3|2, h.URL)
	b = appendStringField(b, 4<<3|2, h.Protocol)
	for _, x := range h.Headers {
		var inner int
		b, inner = begin(b, 5<<3|2)
		b = appendStringField(b, 1<<3|2, x.Key)
		b = appendStringField(b, 2<<3|2, x.Value)
		b = end(b, inner)
	}
	return end(b, start)
}

func appendDNS(b []byte, d *DNS, response bool) []byte {
	b, start := begin(b, tagDNS)
	list := func(tag uint32, texts []string) {
		for _, t := range texts {
			b = appendBytesField(b, tag, []byte(t))
		}
	}
	b = appendStringField(b, 1<<3|2, d.Query)
	if response {
		list(2<<3|2, d.IPs)
		b = appendVarintField(b, 3<<3, uint64(d.TTL))
		list(4<<3|2, d.CNames)
	}
	b = appendStringField(b, 5<<3|2, "proxy")
	if response {
		b = appendVarintField(b, 6<<3, uint64(d.RCode))
	}
	list(7<<3|2, d.QTypes)
	if response {
		list(8<<3|2, d.RRTypes)
	}
	return end(b, start)
}

// appendSummary appends Hubble's line of an L7 flow.
func appendSummary(b []byte, r *Request) []byte {
	switch h := r.HTTP; {
	case r.DNS != nil:
		b = append(b, dnsSummary(r.DNS, r.Response)...)
	case h != nil && r.Response:
		b = append(append(b, h.Protocol...), ' ')
		b = append(strconv.AppendUint(b, uint64(h.Code), 10), ' ')
		b = append(strconv.AppendUint(b, r.Latency/1e6, 10), "ms ("...)
		b = append(append(append(append(b, h.Method...), ' '), h.URL...), ')')
	case h != nil:
		b = append(append(append(append(append(b, h.Protocol...), ' '), h.Method...), ' '), h.URL...)
	default:
		b = append(append(append(b, "tls Fields: map[server_name:"...), r.TLS.ServerName...), ']')
	}
	return b
}

func dnsSummary(d *DNS, response bool) string {
	types := strings.Join(d.QTypes, ",")
	if !response {
		return "DNS Query " + d.Query + " " + types
	}
	var answer string
	if d.RCode != 0 {
		answer = "RCode: " + rcodeName(d.RCode)
	} else {
		var parts []string
		if len(d.IPs) > 0 {
			parts = append(parts, strconv.Quote(strings.Join(d.IPs, ",")))
		}
		if len(d.CNames) > 0 {
			parts = append(parts, "CNAMEs: "+strconv.Quote(strings.Join(d.CNames, ",")))
		}
		answer = strings.Join(parts, " ")
	}
	return fmt.Sprintf("DNS Answer %s TTL: %d (Proxy %s %s)", answer, d.TTL, d.Query, types)
}

// rcodeName is gopacket's name of a DNS response code, as Hubble shows it.
func rcodeName(code uint32) string {
	names := [...]string{"No Error", "Format Error", "Server Failure", "Non-Existent Domain", "Not Implemented", "Query Refused", "Name Exists when it should not",
		"RR Set Exists when it should not", "RR Set that should exist does not", "Server Not Authoritative for zone", "Name not contained in zone"}
	if code < uint32(len(names)) {
		return names[code]
	}
	return "Unknown"
}
