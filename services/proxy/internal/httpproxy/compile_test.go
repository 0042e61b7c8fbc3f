// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"strings"
	"testing"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/encoding/protojson"
)

// What is not implemented is refused by the path of its field: nothing is ignored in silence.
func TestManagersRefused(t *testing.T) {
	base := func(extra string) string {
		return `{"stat_prefix":"x","rds":{"route_config_name":"r"},"http_filters":[` + routerFilter + `],` + extra + `}`
	}
	filters := func(list string) string {
		return `{"stat_prefix":"x","rds":{"route_config_name":"r"},"http_filters":[` + list + `]}`
	}
	rbac := func(config string) string {
		return filters(strings.Replace(rbacFilter, `v3.RBAC"`, `v3.RBAC",`+config, 1) + "," + routerFilter)
	}
	tests := []struct{ in, want string }{
		{base(`"codec_type":"HTTP3"`), "codec_type"},
		{base(`"tracing":{}`), "tracing: not supported"},
		{base(`"via":"x"`), "via: not supported"},
		{base(`"add_user_agent":true`), "add_user_agent: not supported"},
		{base(`"early_header_mutation_extensions":[{"name":"x"}]`), "early_header_mutation_extensions"},
		{base(`"upgrade_configs":[{"upgrade_type":"CONNECT"}]`), "upgrade_configs[0].upgrade_type"},
		{base(`"upgrade_configs":[{"upgrade_type":"websocket","filters":[{"name":"x"}]}]`), "upgrade_configs[0].filters"},
		{base(`"stream_idle_timeout":"-1s"`), "stream_idle_timeout"},
		{base(`"common_http_protocol_options":{"headers_with_underscores_action":"REJECT_REQUEST"}`), "headers_with_underscores_action"},
		{base(`"http2_protocol_options":{"allow_connect":true}`), "http2_protocol_options.allow_connect"},
		{base(`"local_reply_config":{"mappers":[{"filter":{"not_health_check_filter":{}}}]}`), "local_reply_config.mappers[0].filter"},
		{base(`"local_reply_config":{"mappers":[{"filter":{"status_code_filter":{}},"body":{"filename":"/etc/passwd"}}]}`), "mappers[0].body.filename"},
		{base(`"local_reply_config":{"body_format":{"text_format":"%HOSTNAME%"}}`), "local_reply_config.body_format"},
		{filters(""), "no router"},
		{filters(routerFilter + "," + rbacFilter), "the router must stand last"},
		{filters(`{"name":"lua","typed_config":{"@type":"type.googleapis.com/envoy.config.route.v3.RouteConfiguration"}},` + routerFilter), `filter "lua"`},
		{filters(`{"name":"x","config_discovery":{}},` + routerFilter), "http_filters[0].config_discovery"},
		{rbac(`"matcher":{}`), "typed_config.matcher"},
		{rbac(`"rules":{"policies":{"p":{"permissions":[{"metadata":{"filter":"x"}}],"principals":[{"any":true}]}}}`), `policies["p"].permissions[0].metadata`},
		{rbac(`"rules":{"policies":{"p":{"permissions":[{"any":true}],"principals":[{"authenticated":{}}]}}}`), `principals[0].authenticated`},
		{rbac(`"rules":{"policies":{"p":{"permissions":[{"any":true}]}}}`), `policies["p"]: permissions and principals are needed`},
		{rbac(`"rules":{"policies":{"p":{"permissions":[{"any":true}],"principals":[{"any":true}],"condition":{}}}}`), `policies["p"].condition`},
		{rbac(`"rules":{"policies":{"p":{"permissions":[{"and_rules":{"rules":[]}}],"principals":[{"any":true}]}}}`), "and_rules.rules: empty"},
		{rbac(`"rules":{"policies":{"p":{"permissions":[{"url_path":{"path":{"safe_regex":{"regex":"("}}}}],"principals":[{"any":true}]}}}`), "safe_regex.regex"},
		{rbac(`"rules":{"policies":{"p":{"permissions":[{"url_path":{"path":{"safe_regex":{"regex":"((a{100}){10}){10}b"}}}}],"principals":[{"any":true}]}}}`), "safe_regex.regex"},
	}
	for _, tt := range tests {
		var h hcmv3.HttpConnectionManager
		if err := protojson.Unmarshal([]byte(tt.in), &h); err != nil {
			t.Fatalf("%s: %v", tt.in, err)
		}
		if _, err := Compile(&h, Env{}); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s:\ngot  %v\nwant %s", tt.in, err, tt.want)
		}
	}
}

func TestRoutesRefused(t *testing.T) {
	route := func(r string) string {
		return `{"virtual_hosts":[{"name":"v","domains":["*"],"routes":[` + r + `]}]}`
	}
	action := func(a string) string { return route(`{"match":{"prefix":"/"},"route":{` + a + `}}`) }
	const at = "virtual_hosts[0].routes[0]."
	tests := []struct{ in, want string }{
		{`{"vhds":{}}`, "vhds: not supported"},
		{`{"virtual_hosts":[{"name":"v","domains":["*"]},{"name":"w","domains":["*"]}]}`, "virtual_hosts[1].domains[0]"},
		{`{"virtual_hosts":[{"name":"v","domains":["*"],"cors":{}}]}`, "virtual_hosts[0].cors"},
		{`{"virtual_hosts":[{"name":"v","domains":["*"],"require_tls":"ALL"}]}`, "virtual_hosts[0].require_tls"},
		{route(`{"match":{"connect_matcher":{}},"route":{"cluster":"c"}}`), at + "match.connect_matcher"},
		{route(`{"match":{"prefix":"/","runtime_fraction":{}},"route":{"cluster":"c"}}`), at + "match.runtime_fraction"},
		{route(`{"match":{"prefix":"/","headers":[{"name":"x","string_match":{"custom":{"name":"y"}}}]},"route":{"cluster":"c"}}`), at + "match.headers[0].string_match.custom"},
		{route(`{"match":{"prefix":"/"}}`), "no action"},
		{route(`{"match":{"prefix":"/"},"direct_response":{"status":200,"body":{"filename":"/etc/shadow"}}}`), at + "direct_response.body.filename"},
		{route(`{"match":{"prefix":"/"},"direct_response":{"status":200,"body":{"inline_string":"` + strings.Repeat("x", 5000) + `"}}}`), "5000 bytes"},
		{route(`{"match":{"prefix":"/"},"route":{"cluster":"c"},"request_headers_to_add":[{"header":{"key":"Content-Length","value":"0"}}]}`), "request_headers_to_add[0].header.key"},
		{route(`{"match":{"prefix":"/"},"route":{"cluster":"c"},"request_headers_to_add":[{"header":{"key":"x","value":"%ENVIRONMENT(PATH)%"}}]}`), "%ENVIRONMENT(PATH)%"},
		{route(`{"match":{"prefix":"/"},"route":{"cluster":"c"},"request_headers_to_remove":[":path"]}`), "request_headers_to_remove[0]"},
		{route(`{"match":{"prefix":"/"},"route":{"cluster":"c"},"request_headers_to_add":[{"header":{"key":"x","value":"a\r\nb: c"}}]}`), "not a header value"},
		{action(`"cluster_header":"x"`), at + "route.cluster_header"},
		{action(`"cluster":"c","request_mirror_policies":[{"cluster":"d"}]`), at + "route.request_mirror_policies"},
		{action(`"cluster":"c","hedge_policy":{}`), at + "route.hedge_policy"},
		{action(`"cluster":"c","hash_policy":[{}]`), at + "route.hash_policy"},
		{action(`"cluster":"c","internal_redirect_policy":{}`), at + "route.internal_redirect_policy"},
		{action(`"cluster":"c","retry_policy":{"retry_on":"envoy-ratelimited"}`), `"envoy-ratelimited" is not supported`},
		{action(`"cluster":"c","retry_policy":{"retry_on":"5xx","retry_priority":{"name":"x"}}`), "retry_policy.retry_priority"},
		{action(`"weighted_clusters":{"clusters":[{"name":"c","weight":0}]}`), "weights"},
		{action(`"cluster":"c","regex_rewrite":{"pattern":{"regex":"a"},"substitution":"\\1"}`), "has no group"},
	}
	for _, tt := range tests {
		var c routev3.RouteConfiguration
		if err := protojson.Unmarshal([]byte(tt.in), &c); err != nil {
			t.Fatalf("%s: %v", tt.in, err)
		}
		if _, err := CompileRoutes(&c, nil); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s:\ngot  %v\nwant %s", tt.in, err, tt.want)
		}
	}
}
