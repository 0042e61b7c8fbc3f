// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"net/textproto"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/weirmesh/weir/services/agent/internal/flow"
)

// redacted stands for values that nobody is to read.
const redacted = "HUBBLE_REDACTED"

// Bounds of what a flow carries of a request.
const (
	maxHeaders = 64
	maxName    = 256
	maxValue   = 1024
	maxURL     = 2048
)

// DefaultRedacted are headers that carry credentials.
func DefaultRedacted() []string {
	return []string{"authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "x-auth-token", "x-csrf-token", "x-xsrf-token",
		"x-amz-security-token", "x-vault-token", "x-goog-iap-jwt-assertion", "x-forwarded-client-cert"}
}

// Headers says which headers flows show.
type Headers struct {
	all          bool
	shown, hides map[string]struct{}
}

// NewHeaders shows these ("*" = all that proxies tell), the values of those in redact not.
func NewHeaders(show, redact []string) Headers {
	h := Headers{shown: map[string]struct{}{}, hides: map[string]struct{}{}}
	for _, name := range show {
		h.all = h.all || name == "*"
		h.shown[strings.ToLower(name)] = struct{}{}
	}
	for _, name := range redact {
		h.hides[strings.ToLower(name)] = struct{}{}
	}
	return h
}

// maxNames bounds the names of headers that a stream remembers.
const maxNames = 1024

// picker picks headers, and remembers what becomes of the names that it met.
type picker struct {
	*Headers
	names map[string]headerName
	room  []flow.Header
}

// headerName is what flows call a header, and whether they show it and its value.
type headerName struct {
	canonical     string
	shown, hidden bool
}

func (p *picker) name(raw []byte) headerName {
	if n, known := p.names[string(raw)]; known {
		return n
	}
	lower := strings.ToLower(string(raw))
	_, listed := p.shown[lower]
	_, hidden := p.hides[lower]
	n := headerName{shown: (p.all || listed) && !strings.HasPrefix(lower, ":"), hidden: hidden}
	if n.shown {
		n.canonical = text([]byte(textproto.CanonicalMIMEHeaderKey(lower)), maxName)
	}
	if len(p.names) >= maxNames {
		clear(p.names)
	}
	p.names[string(raw)] = n
	return n
}

// pick makes a flow's headers of several lists; of equal names the last counts.
func (p *picker) pick(lists ...[]pair) []flow.Header {
	if !p.all && len(p.shown) == 0 {
		return nil
	}
	list := p.room[:0]
	for _, l := range lists {
		for _, x := range l {
			switch n := p.name(x.key); {
			case n.hidden && n.shown:
				list = append(list, flow.Header{Key: n.canonical, Value: redacted})
			case n.shown:
				list = append(list, flow.Header{Key: n.canonical, Value: text(x.value, maxValue)})
			}
		}
	}
	if len(list) == 0 {
		return nil
	}
	p.room = list
	slices.SortStableFunc(list, func(a, b flow.Header) int { return strings.Compare(a.Key, b.Key) })
	kept := list[:0]
	for i, h := range list {
		if i+1 == len(list) || list[i+1].Key != h.Key {
			kept = append(kept, h)
		}
	}
	return slices.Clone(kept[:min(len(kept), maxHeaders)])
}

// text cuts a text, and makes what is left of it valid UTF-8.
func text(b []byte, limit int) string {
	s := string(b[:min(len(b), limit)])
	if utf8.ValidString(s) { // eight bytes at a time, where the other looks at each rune
		return s
	}
	return strings.ToValidUTF8(s, "")
}

const traceHeader = "traceparent"

// traceIn reads the trace's id in headers; "" = none.
func traceIn(headers []pair) string {
	for i := len(headers) - 1; i >= 0; i-- {
		// No other letters than ASCII's fold to these, so that the length tells most names apart.
		if k := headers[i].key; len(k) == len(traceHeader) && strings.EqualFold(string(k), traceHeader) {
			return traceOf(string(headers[i].value))
		}
	}
	return ""
}

// traceOf reads the trace's id of a traceparent header (W3C trace context); "" = none.
func traceOf(parent string) string {
	parts := strings.Split(parent, "-")
	if len(parts) < 4 || len(parts[0]) != 2 || parts[0] == "ff" || len(parts[1]) != 32 || strings.Trim(parts[1], "0") == "" {
		return ""
	}
	for _, c := range parts[1] {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return ""
		}
	}
	return parts[1]
}
