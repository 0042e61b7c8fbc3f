// SPDX-License-Identifier: Apache-2.0

package envoyconfig

import (
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
)

// operators are what a header's value may be filled with: things of the request itself. ENVIRONMENT, FILE_CONTENT, FILTER_STATE, DYNAMIC_METADATA and the
// like read the proxy, or other tenants.
const operators = " REQ RESP TRAILER PROTOCOL START_TIME REQUEST_DURATION RESPONSE_DURATION DURATION BYTES_RECEIVED BYTES_SENT RESPONSE_CODE " +
	"RESPONSE_FLAGS DOWNSTREAM_REMOTE_ADDRESS DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT DOWNSTREAM_REMOTE_PORT DOWNSTREAM_LOCAL_ADDRESS " +
	"DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT DOWNSTREAM_LOCAL_PORT UPSTREAM_HOST UPSTREAM_REMOTE_ADDRESS UPSTREAM_CLUSTER ROUTE_NAME " +
	"REQUESTED_SERVER_NAME STREAM_ID VIRTUAL_CLUSTER_NAME "

// checkHeader checks a header that is added.
func checkHeader(path string, h *corev3.HeaderValue) error {
	if key := strings.ToLower(h.GetKey()); strings.HasPrefix(key, ":") || key == "host" {
		return fail(path+".key", "%q may not be changed this way", h.GetKey())
	}
	if len(h.GetValue()) > MaxBody {
		return fail(path+".value", "has %d characters, more than %d", len(h.GetValue()), MaxBody)
	}
	for rest := h.GetValue(); ; {
		_, after, found := strings.Cut(rest, "%")
		if !found {
			return nil
		}
		if strings.HasPrefix(after, "%") {
			rest = after[1:]
			continue
		}
		end, err := operator(path, after)
		if err != nil {
			return err
		}
		rest = after[end+1:]
	}
}

// operator checks what follows a percent sign, NAME, NAME(argument) or NAME(argument):length, and returns where the closing sign is.
func operator(path, s string) (int, error) {
	name := firstWord(s)
	if name == "" || !strings.Contains(operators, " "+name+" ") {
		return 0, fail(path+".value", "%%%s is not allowed", name)
	}
	end := len(name)
	if strings.HasPrefix(s[end:], "(") {
		closing := strings.IndexByte(s[end:], ')')
		if closing < 0 || name != "START_TIME" && strings.Contains(s[end:end+closing], "%") {
			return 0, fail(path+".value", "the argument of %%%s does not end", name)
		}
		end += closing + 1
	}
	if strings.HasPrefix(s[end:], ":") {
		end += 1 + len(s[end+1:]) - len(strings.TrimLeft(s[end+1:], "0123456789"))
	}
	if !strings.HasPrefix(s[end:], "%") {
		return 0, fail(path+".value", "%%%s does not end", name)
	}
	return end, nil
}

func firstWord(s string) string {
	if i := strings.IndexFunc(s, func(r rune) bool { return (r < 'A' || r > 'Z') && r != '_' }); i >= 0 {
		return s[:i]
	}
	return s
}
