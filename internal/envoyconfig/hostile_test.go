// SPDX-License-Identifier: Apache-2.0

package envoyconfig

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// A hostile configuration is a benign one with one change.
const benign = `
kind: CiliumEnvoyConfig
metadata: {namespace: tenant, name: config}
spec:
  services: [{name: web}]
  backendServices: [{name: api}]
  resources:
  - '@type': type.googleapis.com/envoy.config.listener.v3.Listener
    name: l
    #listener
    filter_chains:
    - filters:
      #network
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: web
          #manager
          rds: {route_config_name: r}
          http_filters:
          #http
          - name: envoy.filters.http.router
            typed_config:
              '@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
              #router
  - '@type': type.googleapis.com/envoy.config.route.v3.RouteConfiguration
    name: r
    #routes
    virtual_hosts:
    - name: v
      domains: ['*']
      #host
      routes:
      - match: {prefix: /first}
        redirect: {path_redirect: /}
      #before
      - match:
          prefix: /
          #match
        #more
        route:
          cluster: tenant/web
          #action
  - '@type': type.googleapis.com/envoy.config.cluster.v3.Cluster
    name: c
    type: EDS
    eds_cluster_config: {service_name: tenant/api}
    connect_timeout: 1s
    #cluster
  #resource
`

// edit puts text in the place of a mark, as deep as the mark is, or of other text.
func edit(t *testing.T, old, with string) string {
	t.Helper()
	if strings.Count(benign, old) != 1 {
		t.Fatalf("%q is %d times in the benign configuration", old, strings.Count(benign, old))
	}
	if strings.HasPrefix(old, "#") {
		line := benign[:strings.Index(benign, old)]
		indent := line[strings.LastIndexByte(line, '\n'):]
		with = strings.ReplaceAll(with, "\n", indent)
	}
	return strings.Replace(benign, old, with, 1)
}

const prefix = "type.googleapis.com/"

func httpFilter(kind, body string) string {
	return fmt.Sprintf("- name: x\n  typed_config: {'@type': %s%s%s}", prefix, kind, body)
}

func TestBenign(t *testing.T) {
	c, err := parseYAML(t, benign)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Resources.Listeners) != 1 || len(c.Resources.Routes) != 1 || len(c.Resources.Clusters) != 1 {
		t.Errorf("resources %+v", c.Resources)
	}
}

func TestHostile(t *testing.T) {
	const (
		listener = "spec.resources[0]"
		filter   = "spec.resources[0].filter_chains[0].filters[0]"
		manager  = filter + ".typed_config"
		first    = manager + ".http_filters[0].typed_config"
		routes   = "spec.resources[1]"
		host     = routes + ".virtual_hosts[0]"
		route    = host + ".routes[1]"
		cluster  = "spec.resources[2]"
		extra    = "spec.resources[3]"
	)
	many := func(n int, item string) string { return strings.Repeat(item, n) }
	for _, test := range []struct{ name, old, with, field, message string }{
		// Where the proxy listens, and where it connects to.
		{"address of another port", "#listener", "address: {socket_address: {address: 0.0.0.0, port_value: 15001}}", listener + ".address", "not allowed"},
		{"address in camel case", "#listener", "additionalAddresses: [{address: {pipe: {path: /run/x}}}]", listener + ".additional_addresses", "not allowed"},
		{"listener on a pipe", "#listener", "address: {pipe: {path: /run/weir/agent.sock}}", listener + ".address", "not allowed"},
		{"internal listener", "#listener", "internal_listener: {}", listener + ".internal_listener", "not allowed"},
		{"API listener", "#listener", "api_listener: {}", listener + ".api_listener", "not allowed"},
		{"transparent", "#listener", "transparent: true", listener + ".transparent", "not allowed"},
		{"takes other listeners' connections", "#listener", "use_original_dst: true", listener + ".use_original_dst", "not allowed"},
		{"socket options", "#listener", "socket_options: [{level: 1, name: 36, int_value: 1}]", listener + ".socket_options", "not allowed"},
		{"UDP listener", "#listener", "udp_listener_config: {}", listener + ".udp_listener_config", "not allowed"},
		{"metadata of another namespace", "#listener", "metadata: {filter_metadata: {weir: {namespace: kube-system}}}", listener + ".metadata", "not allowed"},
		{"past the connection limit", "#listener", "ignore_global_conn_limit: true", listener + ".ignore_global_conn_limit", "not allowed"},
		{"huge buffers", "#listener", "per_connection_buffer_limit_bytes: 1000000000", listener + ".per_connection_buffer_limit_bytes", "more than"},
		{"static cluster", "type: EDS\n    eds_cluster_config: {service_name: tenant/api}", "type: STATIC", cluster + ".type", "STATIC is not allowed"},
		{"DNS cluster", "type: EDS", "type: STRICT_DNS", cluster + ".type", "STRICT_DNS is not allowed"},
		{"original destination", "type: EDS", "type: ORIGINAL_DST", cluster + ".type", "ORIGINAL_DST is not allowed"},
		{"default type", "type: EDS", "dns_lookup_family: V4_ONLY", cluster + ".dns_lookup_family", "not allowed"},
		{"static endpoints", "#cluster", "load_assignment: {cluster_name: c, endpoints: []}", cluster + ".load_assignment", "not allowed"},
		{"custom cluster type", "#cluster", "cluster_type: {name: envoy.clusters.dynamic_forward_proxy}", cluster + ".cluster_type", "not allowed"},
		{"own source address", "#cluster", "upstream_bind_config: {source_address: {address: 10.0.0.1, port_value: 0}}", cluster + ".upstream_bind_config", "not allowed"},
		{"service of another namespace", "{service_name: tenant/api}", "{service_name: kube-system/kube-dns}", cluster + ".eds_cluster_config.service_name", "no service of"},
		{"service that is not listed", "{service_name: tenant/api}", "{service_name: tenant/db}", cluster + ".eds_cluster_config.service_name", "no service of"},
		{"endpoints from elsewhere", "{service_name: tenant/api}", "{service_name: tenant/api, eds_config: {path_config_source: {path: /etc/x}}}", cluster + ".eds_cluster_config.eds_config.path_config_source", "not allowed"},
		{"endpoints as a resource", "#resource", "- {'@type': " + prefix + "envoy.config.endpoint.v3.ClusterLoadAssignment, cluster_name: tenant/web}", extra, "type envoy.config.endpoint.v3.ClusterLoadAssignment is not allowed"},
		{"active health checks", "#cluster", "health_checks: [{timeout: 1s, interval: 1s, tcp_health_check: {}}]", cluster + ".health_checks", "not allowed"},
		{"TLS to upstream with files", "#cluster", "transport_socket: {name: tls}", cluster + ".transport_socket", "not allowed"},
		{"route to the agent", "cluster: tenant/web", "cluster: weir-access-log", route + ".route.cluster", "neither a cluster"},
		{"route past policy", "cluster: tenant/web", "cluster: original-dst", route + ".route.cluster", "neither a cluster"},
		{"route to another namespace", "cluster: tenant/web", "cluster: kube-system/kube-dns", route + ".route.cluster", "neither a cluster"},
		{"route to another object's cluster", "cluster: tenant/web", "cluster: other/config/c", route + ".route.cluster", "neither a cluster"},
		{"cluster by header", "cluster: tenant/web", "cluster_header: x-to", route + ".route.cluster_header", "not allowed"},
		{"weighted cluster by header", "cluster: tenant/web", "weighted_clusters: {clusters: [{cluster_header: x-to, weight: 1}]}", route + ".route.weighted_clusters.clusters[0].cluster_header", "not allowed"},
		{"weighted cluster elsewhere", "cluster: tenant/web", "weighted_clusters: {clusters: [{name: a/b, weight: 1}]}", route + ".route.weighted_clusters.clusters[0].name", "neither a cluster"},
		{"cluster by plug-in", "cluster: tenant/web", "cluster_specifier_plugin: x", route + ".route.cluster_specifier_plugin", "not allowed"},
		{"mirror", "#action", "request_mirror_policies: [{cluster: original-dst}]", route + ".route.request_mirror_policies", "not allowed"},
		{"internal redirects", "#action", "internal_redirect_policy: {max_internal_redirects: 10}", route + ".route.internal_redirect_policy", "not allowed"},
		{"tunnel", "#action", "upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]", route + ".route.upgrade_configs[0].connect_config", "not allowed"},
		{"TCP proxy elsewhere", "#network", "- name: t\n  typed_config: {'@type': " + prefix + "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: x, cluster: original-dst}", filter + ".typed_config.cluster", "neither a cluster"},
		{"TCP tunnel", "#network", "- name: t\n  typed_config: {'@type': " + prefix + "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: x, cluster: tenant/web, tunneling_config: {hostname: x}}", filter + ".typed_config.tunneling_config", "not allowed"},
		// Code, calls, and the node's files.
		{"Lua", "#http", httpFilter("envoy.extensions.filters.http.lua.v3.Lua", ", inline_code: 'os.execute()'"), first, "lua.v3.Lua is not allowed"},
		{"Wasm", "#http", httpFilter("envoy.extensions.filters.http.wasm.v3.Wasm", ""), first, "wasm.v3.Wasm is not allowed"},
		{"network Wasm", "#network", httpFilter("envoy.extensions.filters.network.wasm.v3.Wasm", ""), filter + ".typed_config", "wasm.v3.Wasm is not allowed"},
		{"dynamic module", "#http", httpFilter("envoy.extensions.filters.http.dynamic_modules.v3.DynamicModuleFilter", ""), first, "DynamicModuleFilter is not allowed"},
		{"Go plug-in", "#http", httpFilter("envoy.extensions.filters.http.golang.v3alpha.Config", ", library_path: /tmp/x.so"), first, "golang.v3alpha.Config is not allowed"},
		{"external authorization", "#http", httpFilter("envoy.extensions.filters.http.ext_authz.v3.ExtAuthz", ""), first, "ExtAuthz is not allowed"},
		{"external processing", "#http", httpFilter("envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor", ""), first, "ExternalProcessor is not allowed"},
		{"global rate limit", "#http", httpFilter("envoy.extensions.filters.http.ratelimit.v3.RateLimit", ""), first, "RateLimit is not allowed"},
		{"dynamic forward proxy", "#http", httpFilter("envoy.extensions.filters.http.dynamic_forward_proxy.v3.FilterConfig", ""), first, "FilterConfig is not allowed"},
		{"JWT keys by URL", "#http", httpFilter("envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication", ""), first, "JwtAuthentication is not allowed"},
		{"OAuth", "#http", httpFilter("envoy.extensions.filters.http.oauth2.v3.OAuth2", ""), first, "OAuth2 is not allowed"},
		{"tap", "#http", httpFilter("envoy.extensions.filters.http.tap.v3.Tap", ""), first, "tap.v3.Tap is not allowed"},
		{"on demand", "#http", httpFilter("envoy.extensions.filters.http.on_demand.v3.OnDemand", ""), first, "OnDemand is not allowed"},
		{"health check that fails the node", "#http", httpFilter("envoy.extensions.filters.http.health_check.v3.HealthCheck", ""), first, "HealthCheck is not allowed"},
		{"file system buffer", "#http", httpFilter("envoy.extensions.filters.http.file_system_buffer.v3.FileSystemBufferFilterConfig", ""), first, "FileSystemBufferFilterConfig is not allowed"},
		{"type without descriptor", "#http", httpFilter("udpa.type.v1.TypedStruct", ", type_url: x"), first, "TypedStruct is not allowed"},
		{"type of another place", "#http", httpFilter("envoy.config.cluster.v3.Cluster", ", name: x"), first, "Cluster is not allowed"},
		{"filter by discovery", "#http", "- name: x\n  config_discovery: {type_urls: [x]}", manager + ".http_filters[0].config_discovery", "not allowed"},
		{"unknown resource", "#resource", "- {'@type': " + prefix + "envoy.config.bootstrap.v3.Bootstrap}", extra, "Bootstrap is not allowed"},
		{"admin", "#resource", "- {'@type': " + prefix + "envoy.config.bootstrap.v3.Admin}", extra, "Admin is not allowed"},
		{"bootstrap extension", "#resource", "- {'@type': " + prefix + "envoy.extensions.bootstrap.internal_listener.v3.InternalListener}", extra, "InternalListener is not allowed"},
		{"secret", "#resource", "- {'@type': " + prefix + "envoy.extensions.transport_sockets.tls.v3.Secret, name: x}", extra, "Secret is not allowed"},
		{"runtime layer", "#resource", "- {'@type': " + prefix + "envoy.service.runtime.v3.Runtime, name: x}", extra, "Runtime is not allowed"},
		{"file as a body", "        redirect: {path_redirect: /}", "        direct_response: {status: 200, body: {filename: /etc/shadow}}", host + ".routes[0].direct_response.body.filename", "not allowed"},
		{"environment as a body", "        redirect: {path_redirect: /}", "        direct_response: {status: 200, body: {environment_variable: HOME}}", host + ".routes[0].direct_response.body.environment_variable", "not allowed"},
		{"environment in a header", "#more", "request_headers_to_add: [{header: {key: x, value: '%ENVIRONMENT(HOME)%'}}]", route + ".request_headers_to_add[0].header.value", "%ENVIRONMENT is not allowed"},
		{"environment behind another operator", "#more", "request_headers_to_add: [{header: {key: x, value: '%REQ(a%ENVIRONMENT(HOME)%'}}]", route + ".request_headers_to_add[0].header.value", "does not end"},
		{"file in a header", "#more", "response_headers_to_add: [{header: {key: x, value: 'a%FILE_CONTENT(/etc/shadow)%'}}]", route + ".response_headers_to_add[0].header.value", "%FILE_CONTENT is not allowed"},
		{"other filters' state in a header", "#host", "request_headers_to_add: [{header: {key: x, value: '%FILTER_STATE(x)%'}}]", host + ".request_headers_to_add[0].header.value", "%FILTER_STATE is not allowed"},
		{"header of the connection", "#more", "request_headers_to_add: [{header: {key: ':authority', value: x}}]", route + ".request_headers_to_add[0].header.key", "may not be changed"},
		{"file logger", "#manager", "access_log: [{name: x, typed_config: {'@type': " + prefix + "envoy.extensions.access_loggers.file.v3.FileAccessLog, path: /etc/x}}]", manager + ".access_log", "not allowed"},
		{"logger of the listener", "#listener", "access_log: [{name: x}]", listener + ".access_log", "not allowed"},
		{"logger of upstreams", "#router", "upstream_log: [{name: x}]", manager + ".http_filters[0].typed_config.upstream_log", "not allowed"},
		{"tracing to anywhere", "#manager", "tracing: {}", manager + ".tracing", "not allowed"},
		{"replies from files", "#manager", "local_reply_config: {body_format: {text_format_source: {filename: /etc/shadow}}}", manager + ".local_reply_config", "not allowed"},
		{"routes from a file", "rds: {route_config_name: r}", "rds: {route_config_name: r, config_source: {path: /etc/x}}", manager + ".rds.config_source.path", "not allowed"},
		{"routes from another server", "rds: {route_config_name: r}", "rds: {route_config_name: r, config_source: {api_config_source: {api_type: GRPC}}}", manager + ".rds.config_source.api_config_source", "not allowed"},
		{"routes of another object", "rds: {route_config_name: r}", "rds: {route_config_name: other/config/r}", manager + ".rds.route_config_name", "no route configuration of the object"},
		{"scoped routes", "rds: {route_config_name: r}", "scoped_routes: {name: x}", manager + ".scoped_routes", "not allowed"},
		{"certificate by file", "- filters:", "- transport_socket: {name: tls}\n      filters:", listener + ".filter_chains[0].transport_socket", "not allowed"},
		{"virtual hosts on demand", "#routes", "vhds: {config_source: {ads: {}}}", routes + ".vhds", "not allowed"},
		{"runtime override", "#match", "runtime_fraction: {default_value: {numerator: 1}, runtime_key: x}", route + ".match.runtime_fraction", "not allowed"},
		{"runtime prefix", "cluster: tenant/web", "weighted_clusters: {runtime_key_prefix: x, clusters: [{name: tenant/web, weight: 1}]}", route + ".route.weighted_clusters.runtime_key_prefix", "not allowed"},
		{"audit logger", "#http", httpFilter("envoy.extensions.filters.http.rbac.v3.RBAC", ", rules: {audit_logging_options: {logger_configs: []}}"), first + ".rules.audit_logging_options", "not allowed"},
		{"expression in rules", "#http", httpFilter("envoy.extensions.filters.http.rbac.v3.RBAC", ", rules: {policies: {p: {permissions: [{any: true}], principals: [{any: true}], condition: {}}}}"), first + `.rules.policies["p"].condition`, "not allowed"},
		{"any type per route", "#more", "typed_per_filter_config: {x: {'@type': " + prefix + "envoy.extensions.filters.http.lua.v3.LuaPerRoute, disabled: true}}", route + `.typed_per_filter_config["x"]`, "LuaPerRoute is not allowed"},
		{"custom matcher", "#match", "headers: [{name: x, string_match: {custom: {name: x}}}]", route + ".match.headers[0].string_match.custom", "not allowed"},
		// Too much of it.
		{"regular expression without end", "#match", "headers: [{name: x, string_match: {safe_regex: {regex: '" + many(1100, "a") + "'}}}]", route + ".match.headers[0].string_match.safe_regex.regex", "1100 characters"},
		{"regular expression that explodes", "#match", "headers: [{name: x, string_match: {safe_regex: {regex: '((a{100}){100}){100}'}}}]", route + ".match.headers[0].string_match.safe_regex.regex", "invalid repeat count"},
		{"regular expression that looks back", "#match", "headers: [{name: x, safe_regex_match: {regex: '(?<=a)b'}}]", route + ".match.headers[0].safe_regex_match.regex", "?<"},
		{"too many routes", "#before", many(10_001, "- {match: {prefix: /x}, redirect: {path_redirect: /}}\n"), host + ".routes", "more than 10000"},
		{"too many domains", "domains: ['*']", "domains: [" + domains(5_001) + "]", host + ".domains", "more than 5000"},
		{"too many matchers", "#match", "headers: [" + many(65, "{name: x, present_match: true},") + "]", route + ".match.headers", "65 is more than 64"},
		{"too many filters", "#http", many(20, httpFilter("envoy.extensions.filters.http.rbac.v3.RBAC", "")+"\n"), manager + ".http_filters", "21 is more than 16"},
		{"too many retries", "#action", "retry_policy: {num_retries: 1000}", route + ".route.retry_policy.num_retries", "1000 is more than 10"},
		{"large body", "        redirect: {path_redirect: /}", "        direct_response: {status: 200, body: {inline_string: '" + many(5000, "x") + "'}}", host + ".routes[0].direct_response.body", "5000 is more than 4096"},
		{"deep nesting", "#http", httpFilter("envoy.extensions.filters.http.rbac.v3.RBAC", ", rules: {policies: {p: {principals: [{any: true}], permissions: ["+many(80, "{not_rule: ")+"{any: true}"+many(80, "}")+"]}}}"), first, "nested deeper"},
		{"one megabyte", "#more", "name: '" + many(1<<20, "x") + "'", "spec", "more than 1048576"},
		// Whose it is.
		{"another namespace's service", "services: [{name: web}]", "services: [{name: kubernetes, namespace: default}]", "spec.services[0].namespace", "its own namespace only"},
		{"another namespace's backend", "backendServices: [{name: api}]", "backendServices: [{name: api, namespace: other}]", "spec.backendServices[0].namespace", "its own namespace only"},
		{"name that leaves its prefix", "name: api}", "name: ../other/api}", "spec.backendServices[0].name", "not a name"},
		{"listener of another object", "services: [{name: web}]", "services: [{name: web, listener: other/config/l}]", "spec.services[0].listener", "no listener of the object"},
		{"field of the object", "  services:", "  nodeSelector: {}\n  services:", "spec.nodeSelector", "not supported"},
		{"one name twice", "    name: c\n", "    name: c\n    Name: d\n", cluster + ".Name", "no such field"},
		{"one field by both names", "connect_timeout: 1s", "connect_timeout: 1s\n    connectTimeout: 2s", cluster + ".connect_timeout", "there twice"},
		{"two clusters of a name", "#resource", "- {'@type': " + prefix + "envoy.config.cluster.v3.Cluster, name: c, type: EDS}", extra + ".name", "two resources"},
		{"a domain twice", "domains: ['*']", "domains: [a.example, A.example]", host + ".domains[1]", "twice"},
		{"the same chain twice", "    - filters:", "    - {}\n    - filters:", listener + ".filter_chains[1].filter_chain_match", "same"},
		// What the resources' own rules refuse.
		{"no domains", "domains: ['*']", "domains: []", host + ".domains", "at least 1"},
		{"no stat prefix", "stat_prefix: web", "stat_prefix: ''", manager + ".stat_prefix", "at least 1"},
		{"wrong type of value", "connect_timeout: 1s", "connect_timeout: soon", cluster + ".connect_timeout", "soon"},
		{"wrong enumeration", "#manager", "codec_type: SPDY", manager + ".codec_type", "SPDY"},
		{"HTTP/3", "#manager", "codec_type: HTTP3", manager + ".codec_type", "not supported"},
		{"no router", "envoy.extensions.filters.http.router.v3.Router", "envoy.extensions.filters.http.rbac.v3.RBAC", manager + ".http_filters", "not envoy.filters.http.router"},
		{"hash balancing", "#cluster", "lb_policy: RING_HASH", cluster + ".lb_policy", "RING_HASH is not supported"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := parseYAML(t, edit(t, test.old, test.with))
			var refused *Error
			if !errors.As(err, &refused) {
				t.Fatalf("accepted: %v", err)
			}
			if refused.Field != test.field && !(test.name == "deep nesting" && strings.HasPrefix(refused.Field, test.field)) {
				t.Errorf("field %q, want %q (%v)", refused.Field, test.field, err)
			}
			if !strings.Contains(refused.Message, test.message) {
				t.Errorf("message %q, want %q in it", refused.Message, test.message)
			}
			// The kind for the whole cluster has the same list.
			clusterwide := strings.NewReplacer("kind: CiliumEnvoyConfig", "kind: CiliumClusterwideEnvoyConfig", "namespace: tenant, ", "",
				"services: [{name: web}]", "services: [{name: web, namespace: tenant}]",
				"backendServices: [{name: api}]", "backendServices: [{name: api, namespace: tenant}]").Replace(edit(t, test.old, test.with))
			_, err = parseYAML(t, clusterwide)
			if strings.Contains(test.message, "its own namespace only") {
				if errors.As(err, &refused) && refused.Field == test.field {
					t.Errorf("the clusterwide kind may not name it either: %v", err)
				}
			} else if err == nil {
				t.Error("the clusterwide kind accepts it")
			}
		})
	}
}

func domains(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "d%d.example,", i)
	}
	return b.String()
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"kind":"CiliumEnvoyConfig","metadata":{"namespace":"a","name":"b"},"spec":{"resources":[{"@type":"type.googleapis.com/envoy.config.cluster.v3.Cluster","name":"a/b","type":"EDS"}],"backendServices":[{"name":"b"}]}}`))
	f.Add([]byte(`{"kind":"CiliumClusterwideEnvoyConfig","metadata":{"name":"b"},"spec":{"resources":[{"@type":"type.googleapis.com/envoy.config.listener.v3.Listener","name":"l","filter_chains":[{"filters":[{"name":"x","typed_config":{"@type":"x"}}]}]}]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := Parse(raw)
		if err != nil {
			var refused *Error
			if !errors.As(err, &refused) {
				t.Fatalf("%T is no *Error: %v", err, err)
			}
			return
		}
		again, err := ParseSpec(c.Meta, c.Spec)
		if err != nil || again.Key() != c.Key() {
			t.Fatalf("its own spec: %v", err)
		}
	})
}
