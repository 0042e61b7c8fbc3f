// SPDX-License-Identifier: Apache-2.0

// Package strict reads HTTP/1 as RFC 9112 writes it and refuses everything about which two readers could disagree: what one takes for a body is a request that
// somebody else smuggled in.
package strict

import (
	"bytes"
	"net/http"
	"strings"
)

// Limits of a message's head and of trailers.
type Limits struct {
	// Bytes of the head, request line included; Count of fields.
	Bytes, Count int
}

// Error is why a message was refused: the status to answer and the cause to count.
type Error struct {
	Status int
	Cause  string
}

// Error implements error.
func (e *Error) Error() string { return "http/1: " + e.Cause }

func refuse(cause string) *Error { return &Error{Status: http.StatusBadRequest, Cause: cause} }

// Errors of size.
var (
	errHeadSize  = &Error{Status: http.StatusRequestHeaderFieldsTooLarge, Cause: "header-size"}
	errHeadCount = &Error{Status: http.StatusRequestHeaderFieldsTooLarge, Cause: "header-count"}
	errTarget    = &Error{Status: http.StatusRequestURITooLong, Cause: "target-size"}
)

// Request is the head of a request.
type Request struct {
	Method, Target string
	// Absolute form: what stood before the path, which is the Host too.
	Scheme string
	Host   string
	Minor  int
	// Header has canonical names and is without Host and whatever concerns this connection alone; Upgrade is still there.
	Header http.Header
	// Length of the body; -1 = chunked.
	Length int64
	// Close: the connection ends with this request. Expect: the client waits for 100.
	Close, Expect bool
	// Upgrade is the protocol that the client offers to switch to, in lower case; "" = none.
	Upgrade string
	// Bytes of the head.
	Bytes int
	// values is the array that the header's values stand in.
	values []string
}

// Message is a request, or why it was refused.
type Message struct {
	*Request
	Err *Error
}

// MaxBlank is the number of bytes of empty lines that may stand before a request: some old clients send one after a body.
const MaxBlank = 4

// Blank returns the number of bytes of empty lines at b's begin, at most what is allowed.
func Blank(b []byte, allowed int) int {
	n := 0
	for n < allowed && len(b)-n >= 2 && b[n] == '\r' && b[n+1] == '\n' {
		n += 2
	}
	return n
}

// End looks for the end of a head: the length of it with its empty line, 0 when more is needed. from is what an earlier call has seen. What can be refused before
// the end has come is refused.
func End(b []byte, from int, l Limits) (int, error) {
	if len(b) > 0 && !token[b[0]] && b[0] != '\r' {
		return 0, refuse("not-http")
	}
	for i := from; ; {
		n := bytes.IndexByte(b[i:], '\n')
		if n < 0 {
			break
		}
		i += n + 1
		if i < 2 || b[i-2] != '\r' {
			return 0, refuse("bare-lf")
		}
		if i >= 4 && b[i-3] == '\n' || i == 2 {
			if i > l.Bytes {
				return 0, errHeadSize
			}
			return i, nil
		}
	}
	if len(b) > l.Bytes {
		if bytes.IndexByte(b, '\n') < 0 {
			return 0, errTarget
		}
		return 0, errHeadSize
	}
	// A stream that is not HTTP may never send an empty line.
	if n := bytes.IndexByte(b, '\n'); n >= 0 && from <= n {
		if _, _, _, err := requestLine(string(b[:n-1])); err != nil {
			return 0, err
		}
	}
	return 0, nil
}

// Parse reads a complete head, as End has measured it.
func Parse(head []byte, l Limits) (*Request, error) {
	r := &Request{}
	if err := r.Parse(head, l); err != nil {
		return nil, err
	}
	return r, nil
}

// Parse reads a complete head into r, whose former content is lost: a connection reads all of its requests into one, and they share a header's map and array.
func (r *Request) Parse(head []byte, l Limits) error {
	f := fields{count: l.Count, header: r.Header, values: r.values}
	*r = Request{Bytes: len(head)}
	text := string(head)
	line, rest, ok := strings.Cut(text, "\r\n")
	if !ok {
		return refuse("request-line")
	}
	var err error
	if r.Method, r.Target, r.Minor, err = requestLine(line); err != nil {
		return err
	}
	if err := f.parse(rest); err != nil {
		return err
	}
	r.Header, r.values = f.header, f.values
	if err := r.form(&f); err != nil {
		return err
	}
	r.Close = r.Minor == 0
	if f.framed {
		if err := r.frame(); err != nil {
			return err
		}
	}
	if f.hop {
		return r.connection()
	}
	return nil
}

func requestLine(line string) (method, target string, minor int, err error) {
	method, rest, ok := strings.Cut(line, " ")
	if !ok || method == "" || !validToken(method) {
		return "", "", 0, refuse("request-line")
	}
	target, version, ok := strings.Cut(rest, " ")
	if !ok || target == "" {
		return "", "", 0, refuse("request-line")
	}
	switch version {
	case "HTTP/1.1":
		minor = 1
	case "HTTP/1.0":
	default:
		if len(version) == len("HTTP/1.1") && strings.HasPrefix(version, "HTTP/") && digit(version[5]) && version[6] == '.' && digit(version[7]) {
			return "", "", 0, &Error{Status: http.StatusHTTPVersionNotSupported, Cause: "version"}
		}
		return "", "", 0, refuse("request-line")
	}
	if !ValidTarget(target) {
		return "", "", 0, refuse("target")
	}
	return method, target, minor, nil
}

// form brings the target into origin form and finds the host.
func (r *Request) form(f *fields) error {
	if f.hosts > 1 || f.hosts == 0 && r.Minor > 0 {
		return refuse("host")
	}
	if f.hosts == 1 && !ValidHost(f.host) {
		return refuse("host")
	}
	r.Host = f.host
	switch {
	case r.Method == http.MethodConnect:
		if r.Target[0] == '/' || !ValidHost(r.Target) || f.hosts == 1 && !strings.EqualFold(r.Target, r.Host) {
			return refuse("target")
		}
		r.Host = r.Target
	case r.Target == "*":
		if r.Method != http.MethodOptions {
			return refuse("target")
		}
	case r.Target[0] != '/':
		return r.absolute(f.hosts == 1)
	}
	return nil
}

func (r *Request) absolute(hasHost bool) error {
	scheme, rest, ok := strings.Cut(r.Target, "://")
	if !ok || !strings.EqualFold(scheme, "http") && !strings.EqualFold(scheme, "https") {
		return refuse("target")
	}
	authority, path := rest, "/"
	if i := strings.IndexAny(rest, "/?"); i >= 0 {
		authority, path = rest[:i], rest[i:]
		if path[0] == '?' {
			path = "/" + path
		}
	}
	if !ValidHost(authority) || hasHost && !strings.EqualFold(authority, r.Host) {
		return refuse("host-mismatch")
	}
	r.Scheme, r.Host, r.Target = strings.ToLower(scheme), authority, path
	return nil
}

// frame finds out how long the body is, from what allows one reading only.
func (r *Request) frame() error {
	lengths, codings := r.Header["Content-Length"], r.Header["Transfer-Encoding"]
	switch {
	case len(lengths) > 0 && len(codings) > 0:
		return refuse("length-and-coding")
	case len(codings) > 0:
		if r.Minor == 0 || len(codings) > 1 {
			return refuse("transfer-encoding")
		}
		if !strings.EqualFold(codings[0], "chunked") {
			return &Error{Status: http.StatusNotImplemented, Cause: "transfer-encoding"}
		}
		delete(r.Header, "Transfer-Encoding")
		r.Length = -1
	case len(lengths) > 0:
		n, ok := decimal(lengths[0])
		if !ok || len(lengths) > 1 {
			return refuse("content-length")
		}
		r.Length = n
	}
	return nil
}

// connection reads what concerns this connection alone, and takes it off.
func (r *Request) connection() error {
	upgrade := false
	for _, v := range r.Header["Connection"] {
		for v != "" {
			var option string
			option, v, _ = strings.Cut(v, ",")
			option = strings.Trim(option, " \t")
			switch name := http.CanonicalHeaderKey(option); name {
			case "":
			case "Close":
				r.Close = true
			case "Keep-Alive":
				r.Close = false
			case "Upgrade":
				upgrade = true
			case "Te", "Http2-Settings":
			case "Host", "Content-Length", "Transfer-Encoding", "Trailer", "Expect", "Connection":
				return refuse("connection")
			default:
				delete(r.Header, name)
			}
		}
	}
	if r.Minor == 1 && hasOption(r.Header["Connection"], "close") {
		r.Close = true
	}
	if err := r.expect(); err != nil {
		return err
	}
	if u := r.Header["Upgrade"]; upgrade && len(u) == 1 && r.Minor == 1 {
		r.Upgrade = strings.ToLower(u[0])
	} else {
		delete(r.Header, "Upgrade")
	}
	HopByHop(r.Header)
	return nil
}

func (r *Request) expect() error {
	v := r.Header["Expect"]
	if len(v) == 0 {
		return nil
	}
	if len(v) > 1 || !strings.EqualFold(v[0], "100-continue") {
		return &Error{Status: http.StatusExpectationFailed, Cause: "expect"}
	}
	// Without a body, or with an old client, nothing waits.
	r.Expect = r.Minor == 1 && r.Length != 0
	if !r.Expect {
		delete(r.Header, "Expect")
	}
	return nil
}

// HopByHop takes off what concerns one connection, Upgrade excepted.
func HopByHop(h http.Header) {
	delete(h, "Connection")
	delete(h, "Keep-Alive")
	delete(h, "Proxy-Connection")
	delete(h, "Transfer-Encoding")
	delete(h, "Http2-Settings")
	if te, ok := h["Te"]; ok {
		delete(h, "Te")
		if hasOption(te, "trailers") {
			h["Te"] = []string{"trailers"}
		}
	}
}

func hasOption(values []string, want string) bool {
	for _, v := range values {
		for v != "" {
			var option string
			option, v, _ = strings.Cut(v, ",")
			if strings.EqualFold(strings.Trim(option, " \t"), want) {
				return true
			}
		}
	}
	return false
}
