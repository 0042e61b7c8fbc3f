// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"net/textproto"
	"slices"
	"strings"

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

// pick makes a flow's headers of several maps; of equal names the last counts.
func (h *Headers) pick(maps ...map[string]string) []flow.Header {
	values := map[string]string{}
	for _, m := range maps {
		for name, value := range m {
			lower := strings.ToLower(name)
			if _, shown := h.shown[lower]; !h.all && !shown || strings.HasPrefix(name, ":") {
				continue
			}
			if _, hidden := h.hides[lower]; hidden {
				value = redacted
			}
			values[text(textproto.CanonicalMIMEHeaderKey(name), maxName)] = text(value, maxValue)
		}
	}
	list := make([]flow.Header, 0, len(values))
	for name, value := range values {
		list = append(list, flow.Header{Key: name, Value: value})
	}
	slices.SortFunc(list, func(a, b flow.Header) int { return strings.Compare(a.Key, b.Key) })
	return list[:min(len(list), maxHeaders)]
}

// text cuts a text, and makes it valid UTF-8.
func text(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit]
	}
	return strings.ToValidUTF8(s, "")
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
