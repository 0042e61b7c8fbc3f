// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

const rbacFilter = `{"name":"rbac","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC"}}`

// get sends a request on a connection of its own.
func (b *bench) get(request string) (*http.Response, string) {
	b.t.Helper()
	c := b.dial()
	defer c.Close()
	c.send(request)
	return c.response(strings.Fields(request)[0])
}

// allow makes a route configuration that allows what a permission says.
func allow(permission string) string {
	policies := `{"policies":{"ns/p/ingress[0]":{"permissions":[` + permission + `],"principals":[{"any":true}]}}}`
	return `{"name":"r","virtual_hosts":[{"name":"v","domains":["*"],"routes":[{"match":{"prefix":"/"},"route":{"cluster":"b","timeout":"0s"}}],
	"typed_per_filter_config":{"rbac":{"@type":"type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBACPerRoute","rbac":{
	"rules":` + policies + `,"shadow_rules":` + policies + `}}}}]}`
}

func TestPermissions(t *testing.T) {
	path := func(re string) string {
		return `{"header":{"name":":path","string_match":{"safe_regex":{"regex":"` + re + `"}}}}`
	}
	tests := []struct {
		permission, request string
		want                int
	}{
		{path("/public/.*"), "GET /public/x", 200},
		{path("/public/.*"), "GET /public/../admin", 403},
		{path("/public/.*"), "GET /public/%2e%2e/admin", 403},
		{path("/public/.*"), "GET /public/%2E%2E%2Fadmin", 307},
		{path("/public/.*"), "GET //public/x", 200},
		{path("/public"), "GET /public", 200},
		{path("/public"), "GET /public/", 403},
		{path("/public"), "GET /public?x=1", 403},
		{path("/"), "GET /", 200},
		{path("/"), "GET /x", 403},
		{path("^/a$"), "GET /a", 200},
		{path("/a|/b"), "GET /bc", 403},
		{path("/a|/b"), "GET /b", 200},
		{`{"header":{"name":":method","string_match":{"safe_regex":{"regex":"GET|HEAD"}}}}`, "GET /", 200},
		{`{"header":{"name":":method","string_match":{"safe_regex":{"regex":"GET|HEAD"}}}}`, "GETX /", 403},
		{`{"header":{"name":":authority","string_match":{"exact":"h"}}}`, "GET /", 200},
		{`{"header":{"name":"host","string_match":{"exact":"x"}}}`, "GET /", 403},
		{`{"header":{"name":"X-A","string_match":{"exact":"1"}}}`, "GET / x-a: 1", 200},
		{`{"header":{"name":"X-A","string_match":{"exact":"1"}}}`, "GET / x-a: 12", 403},
		{`{"header":{"name":"x-a","string_match":{"exact":"1,2"}}}`, "GET / X-A: 1\r\nX-a: 2", 200},
		{`{"header":{"name":"x-a","exact_match":"1"}}`, "GET / X-A: 1", 200},
		{`{"header":{"name":"x-a","prefix_match":"ab"}}`, "GET / X-A: abc", 200},
		{`{"header":{"name":"x-a","suffix_match":"bc"}}`, "GET / X-A: abc", 200},
		{`{"header":{"name":"x-a","contains_match":"b"}}`, "GET / X-A: abc", 200},
		{`{"header":{"name":"x-a","safe_regex_match":{"regex":"a.c"}}}`, "GET / X-A: abcd", 403},
		{`{"header":{"name":"x-a","present_match":true}}`, "GET / X-A:", 200},
		{`{"header":{"name":"x-a","present_match":true}}`, "GET /", 403},
		{`{"header":{"name":"x-a","present_match":false}}`, "GET /", 200},
		{`{"header":{"name":"x-a","present_match":true,"invert_match":true}}`, "GET /", 200},
		{`{"header":{"name":"x-a","range_match":{"start":"1","end":"10"}}}`, "GET / X-A: 9", 200},
		{`{"header":{"name":"x-a","range_match":{"start":"1","end":"10"}}}`, "GET / X-A: 10", 403},
		{`{"header":{"name":"x-a","string_match":{"exact":"1"},"invert_match":true}}`, "GET / X-A: 2", 200},
		{`{"header":{"name":"x-a","string_match":{"exact":"1"},"invert_match":true}}`, "GET /", 403},
		{`{"header":{"name":"x-a","string_match":{"exact":"1"},"invert_match":true,"treat_missing_header_as_empty":true}}`, "GET /", 200},
		{`{"header":{"name":"x-a","string_match":{"exact":"AbC","ignore_case":true}}}`, "GET / x-a: aBc", 200},
		{`{"url_path":{"path":{"exact":"/a"}}}`, "GET /a?b", 200},
		{`{"and_rules":{"rules":[{"any":true},{"not_rule":{"any":true}}]}}`, "GET /", 403},
		{`{"or_rules":{"rules":[{"not_rule":{"any":true}},{"any":true}]}}`, "GET /", 200},
		{`{"destination_port":1}`, "GET /", 403},
		{`{"destination_ip":{"address_prefix":"127.0.0.0","prefix_len":8}}`, "GET /", 200},
		{`{"requested_server_name":{"exact":""}}`, "GET /", 200},
		// A header that is said to concern the connection is not there for the rule either.
		{`{"header":{"name":"x-a","string_match":{"exact":"1"}}}`, "GET / X-A: 1\r\nConnection: x-a", 403},
	}
	b := newBench(t, plainManager(rbacFilter), toBackend, backend(t, "b", echo))
	for _, tt := range tests {
		b.setRoutes(allow(tt.permission))
		f := strings.SplitN(tt.request, " ", 3)
		request := f[0] + " " + f[1] + " HTTP/1.1\r\nHost: h\r\n"
		if len(f) == 3 {
			request += f[2] + "\r\n"
		}
		resp, body := b.get(request + "\r\n")
		if resp.StatusCode != tt.want {
			t.Errorf("%s: %q: got %d, want %d", tt.permission, tt.request, resp.StatusCode, tt.want)
		}
		e := b.log.next(t)
		switch tt.want {
		case 403:
			if body != "Access denied\r\n" || resp.Header.Get("Content-Type") != "text/plain" || !e.Denied || e.Policy != "" {
				t.Errorf("%s: %q: body %q, entry %+v", tt.permission, tt.request, body, e)
			}
		case 200:
			if e.Denied || e.Policy != "ns/p/ingress[0]" || e.Attempts != 1 || !e.Upstream.IsValid() {
				t.Errorf("%s: %q: entry %+v", tt.permission, tt.request, e)
			}
		}
	}
}

// The connection lives on after a denial and after an edit, and each request meets the newest rules.
func TestEditReachesNextRequest(t *testing.T) {
	c := backend(t, "b", echo)
	b := newBench(t, plainManager(rbacFilter), allow(`{"any":true}`), c)
	cl := b.dial()
	want := func(status int, request string) {
		t.Helper()
		cl.send(request)
		if resp, _ := cl.response("POST"); resp.StatusCode != status {
			t.Fatalf("got %d, want %d", resp.StatusCode, status)
		}
	}
	post := "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody"
	want(200, post)
	b.setRoutes(allow(`{"not_rule":{"any":true}}`))
	want(403, post)
	want(403, "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n")
	b.setRoutes(allow(`{"any":true}`))
	want(200, post)
	if n := c.dials.Load(); n != 1 {
		t.Errorf("%d upstream connections", n)
	}
	// A newer manager judges the next request of a live connection too.
	next := b.compile(plainManager(strings.Replace(rbacFilter, `v3.RBAC"`, `v3.RBAC","rules":{"action":"DENY","policies":{"x":{"permissions":[{"any":true}],
		"principals":[{"any":true}]}}}`, 1)))
	b.setRoutes(toBackend)
	b.m.Adopt(next)
	want(403, post)
}

func TestRouting(t *testing.T) {
	routes := `{"name":"r","virtual_hosts":[
	{"name":"exact","domains":["exact.example","exact.example:81"],"routes":[
		{"match":{"path":"/p","headers":[{"name":"x-canary","exact_match":"true"}]},"route":{"cluster":"v2"}},
		{"match":{"path":"/p"},"route":{"cluster":"v1"}},
		{"match":{"path_separated_prefix":"/sep"},"route":{"cluster":"v1","prefix_rewrite":"/new"}},
		{"match":{"safe_regex":{"regex":"/re/(\\d+)"}},"route":{"cluster":"v1","regex_rewrite":{"pattern":{"regex":"^/re/(\\d+)$"},"substitution":"/num/\\1"}}},
		{"match":{"prefix":"/q","query_parameters":[{"name":"a","string_match":{"exact":"b c"}}]},"route":{"cluster":"v2"}},
		{"match":{"prefix":"/q"},"route":{"cluster":"v1"}},
		{"match":{"prefix":"/CASE","case_sensitive":false},"route":{"cluster":"v1","prefix_rewrite":"/"}},
		{"match":{"prefix":"/host","headers":[{"name":":method","exact_match":"PUT"}]},"route":{"cluster":"v1","host_rewrite_literal":"other"}},
		{"match":{"prefix":"/host"},"route":{"cluster":"v1","host_rewrite_header":"x-a"}},
		{"match":{"prefix":"/grpc","grpc":{}},"route":{"cluster":"v2"}},
		{"match":{"prefix":"/moved"},"redirect":{"https_redirect":true,"host_redirect":"new.example","prefix_rewrite":"/there","response_code":"FOUND"}},
		{"match":{"prefix":"/port"},"redirect":{"port_redirect":8443,"path_redirect":"/x","strip_query":true}},
		{"match":{"prefix":"/direct"},"direct_response":{"status":418,"body":{"inline_string":"teapot"}}},
		{"match":{"prefix":"/none"},"route":{"cluster":"absent"}},
		{"match":{"prefix":"/empty"},"route":{"cluster":"empty"}}]},
	{"name":"suffix","domains":["*.example"],"routes":[{"match":{"prefix":"/"},"direct_response":{"status":200,"body":{"inline_string":"suffix"}}}]},
	{"name":"longer","domains":["*.long.example"],"routes":[{"match":{"prefix":"/"},"direct_response":{"status":200,"body":{"inline_string":"longer"}}}]},
	{"name":"prefix","domains":["www.*"],"routes":[{"match":{"prefix":"/"},"direct_response":{"status":200,"body":{"inline_string":"prefix"}}}]}]}`
	which := func(v string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%s %s %s", v, r.RequestURI, r.Host) }
	}
	b := newBench(t, plainManager(""), routes, backend(t, "v1", which("v1")), backend(t, "v2", which("v2")), &cluster{name: "empty"})
	tests := []struct {
		host, line, header string
		status             int
		want               string // body, or Location
		flag               string
	}{
		{"exact.example", "GET /p", "", 200, "v1 /p exact.example", ""},
		{"EXACT.example", "GET /p?x", "X-Canary: true", 200, "v2 /p?x EXACT.example", ""},
		{"exact.example:81", "GET /p", "X-Canary: no", 200, "v1 /p exact.example:81", ""},
		{"exact.example", "GET /sep/a?b", "", 200, "v1 /new/a?b exact.example", ""},
		{"exact.example", "GET /sepa", "", 404, "", "NR"},
		{"exact.example", "GET /re/12?z", "", 200, "v1 /num/12?z exact.example", ""},
		{"exact.example", "GET /re/12x", "", 404, "", "NR"},
		{"exact.example", "GET /q?x=1&a=b%20c", "", 200, "v2 /q?x=1&a=b%20c exact.example", ""},
		{"exact.example", "GET /q?a=b", "", 200, "v1 /q?a=b exact.example", ""},
		{"exact.example", "GET /case/x", "", 200, "v1 //x exact.example", ""},
		{"exact.example", "PUT /host", "", 200, "v1 /host other", ""},
		{"exact.example", "GET /host", "X-A: from-header", 200, "v1 /host from-header", ""},
		{"exact.example", "POST /grpc", "Content-Type: application/grpc+proto", 200, "v2 /grpc exact.example", ""},
		{"exact.example", "POST /grpc", "Content-Type: application/grpcx", 404, "", "NR"},
		{"exact.example", "GET /moved/a?b", "", 302, "https://new.example/there/a?b", ""},
		{"exact.example", "GET /port?b", "", 301, "http://exact.example:8443/x", ""},
		{"exact.example", "GET /direct", "", 418, "teapot", ""},
		{"exact.example", "GET /none", "", 503, "", "NC"},
		{"exact.example", "GET /empty", "", 503, "no healthy upstream", "UH"},
		{"a.example", "GET /", "", 200, "suffix", ""},
		{"a.long.example", "GET /", "", 200, "longer", ""},
		{"www.other", "GET /", "", 200, "prefix", ""},
		{"nobody", "GET /", "", 404, "", "NR"},
	}
	for _, tt := range tests {
		request := tt.line + " HTTP/1.1\r\nHost: " + tt.host + "\r\n"
		if tt.header != "" {
			request += tt.header + "\r\n"
		}
		resp, body := b.get(request + "\r\n")
		if l := resp.Header.Get("Location"); l != "" {
			body = l
		}
		if resp.StatusCode != tt.status || body != tt.want {
			t.Errorf("%s %s %s: got %d %q, want %d %q", tt.host, tt.line, tt.header, resp.StatusCode, body, tt.status, tt.want)
		}
		if e := b.log.next(t); strings.Join(e.Flags, ",") != tt.flag {
			t.Errorf("%s %s: flags %v, want %q", tt.host, tt.line, e.Flags, tt.flag)
		}
	}
}

func TestWeights(t *testing.T) {
	routes := `{"name":"r","virtual_hosts":[{"name":"v","domains":["*"],"routes":[{"match":{"prefix":"/"},"route":{"weighted_clusters":{"clusters":[
		{"name":"v1","weight":90},{"name":"v2","weight":10,"request_headers_to_add":[{"header":{"key":"x-a","value":"canary"}}]},{"name":"never","weight":0}]}}}]}]}`
	reply := func(v string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, v+r.Header.Get("X-A")) }
	}
	b := newBench(t, plainManager(""), routes, backend(t, "v1", reply("1")), backend(t, "v2", reply("2")))
	cl := b.dial()
	got := map[string]int{}
	const n = 2000
	for range n {
		cl.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		_, body := cl.response("GET")
		got[body]++
	}
	// Six standard deviations of a fair split.
	if got["1"]+got["2canary"] != n || got["2canary"] < 120 || got["2canary"] > 280 {
		t.Errorf("split of %d: %v", n, got)
	}
}

func TestHeaderMutation(t *testing.T) {
	manager := plainManager(`{"name":"hm","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation","mutations":{
		"request_mutations":[{"append":{"header":{"key":"x-filter","value":"f"}}},{"remove":"x-gone"}],
		"response_mutations":[{"append":{"header":{"key":"x-out","value":"r"},"append_action":"OVERWRITE_IF_EXISTS_OR_ADD"}}]}}}`)
	routes := `{"name":"r","request_headers_to_add":[{"header":{"key":"x-level","value":"table"}}],
	"virtual_hosts":[{"name":"v","domains":["*"],"request_headers_to_add":[{"header":{"key":"x-level","value":"host"}}],
	"response_headers_to_remove":["x-secret"],"routes":[{"match":{"prefix":"/"},"route":{"cluster":"b"},
	"request_headers_to_add":[{"header":{"key":"x-level","value":"route"}},
		{"header":{"key":"x-set","value":"%REQ(X-A)%-100%%"},"append_action":"OVERWRITE_IF_EXISTS_OR_ADD"},
		{"header":{"key":"x-absent","value":"n"},"append_action":"ADD_IF_ABSENT"},
		{"header":{"key":"x-exists","value":"n"},"append_action":"OVERWRITE_IF_EXISTS"},
		{"header":{"key":"x-old","value":"new"},"append":false}],
	"request_headers_to_remove":["x-removed"]}]}]}`
	b := newBench(t, manager, routes, backend(t, "b", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Secret", "s")
		w.Header().Set("X-Out", "server")
		for _, n := range []string{"X-Level", "X-Set", "X-Absent", "X-Exists", "X-Old", "X-Removed", "X-Gone", "X-Filter", "Traceparent"} {
			fmt.Fprintf(w, "%s=%s;", n, strings.Join(r.Header[n], "+"))
		}
	}))
	resp, body := b.get("GET / HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nX-Absent: is\r\nX-Old: old\r\nX-Removed: 1\r\nX-Gone: 1\r\nX-Set: no\r\n" +
		"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n\r\n")
	want := "X-Level=route+host+table;X-Set=1-100%;X-Absent=is;X-Exists=;X-Old=new;X-Removed=;X-Gone=;X-Filter=f;" +
		"Traceparent=00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01;"
	if body != want {
		t.Errorf("got  %s\nwant %s", body, want)
	}
	if resp.Header.Get("X-Secret") != "" || strings.Join(resp.Header["X-Out"], "+") != "r" {
		t.Errorf("response headers %v", resp.Header)
	}
}

func TestRateLimit(t *testing.T) {
	manager := plainManager(`{"name":"rl","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
		"stat_prefix":"x","token_bucket":{"max_tokens":3,"tokens_per_fill":3,"fill_interval":"3600s"},
		"filter_enabled":{"default_value":{"numerator":100}},"filter_enforced":{"default_value":{"numerator":100}},
		"response_headers_to_add":[{"header":{"key":"x-limited","value":"yes"}}]}}`)
	b := newBench(t, manager, toBackend, backend(t, "b", echo))
	cl := b.dial()
	for i := range 5 {
		cl.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		resp, _ := cl.response("GET")
		want, header := 200, ""
		if i >= 3 {
			want, header = 429, "yes"
		}
		if resp.StatusCode != want || resp.Header.Get("X-Limited") != header {
			t.Errorf("request %d: %d %v", i, resp.StatusCode, resp.Header)
		}
	}
	if b.limits.causes()["rate-limit"] != 2 {
		t.Errorf("causes %v", b.limits.causes())
	}
}

func TestTenantIsFull(t *testing.T) {
	b := newBench(t, plainManager(""), toBackend, backend(t, "b", echo))
	b.limits.full = true
	if resp, _ := b.get("GET / HTTP/1.1\r\nHost: h\r\n\r\n"); resp.StatusCode != 503 {
		t.Errorf("got %d", resp.StatusCode)
	}
}
