// SPDX-License-Identifier: Apache-2.0

package envoyconfig

import (
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	headermutationv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/local_ratelimit/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networkrbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	httpoptionsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// place is where a type may stand: "" = as a resource, else the full name of the field that holds an Any.
type place = protoreflect.FullName

// types says which messages may stand where an Any is.
func types(at place) []proto.Message {
	switch at {
	case "":
		return []proto.Message{&listenerv3.Listener{}, &routev3.RouteConfiguration{}, &clusterv3.Cluster{}}
	case "envoy.config.listener.v3.Filter.typed_config":
		return []proto.Message{&hcmv3.HttpConnectionManager{}, &tcpproxyv3.TcpProxy{}, &networkrbacv3.RBAC{}}
	case "envoy.config.listener.v3.ListenerFilter.typed_config":
		return []proto.Message{&tlsinspectorv3.TlsInspector{}}
	case "envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter.typed_config":
		return []proto.Message{&routerv3.Router{}, &httprbacv3.RBAC{}, &ratelimitv3.LocalRateLimit{}, &headermutationv3.HeaderMutation{}}
	case "envoy.config.cluster.v3.Cluster.typed_extension_protocol_options":
		return []proto.Message{&httpoptionsv3.HttpProtocolOptions{}}
	}
	if strings.HasSuffix(string(at), ".typed_per_filter_config") {
		return []proto.Message{&httprbacv3.RBACPerRoute{}, &ratelimitv3.LocalRateLimit{}, &headermutationv3.HeaderMutationPerRoute{}}
	}
	return nil
}

// perFilter stands for all fields of that name.
const perFilter = ".typed_per_filter_config"

// places returns every place that may hold a type.
func places() []place {
	return []place{
		"", "envoy.config.listener.v3.Filter.typed_config", "envoy.config.listener.v3.ListenerFilter.typed_config",
		"envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter.typed_config",
		"envoy.config.cluster.v3.Cluster.typed_extension_protocol_options", perFilter,
	}
}

// typeAt returns an empty message of a type that may stand there.
func typeAt(at place, name string) (proto.Message, bool) {
	for _, m := range types(at) {
		if string(m.ProtoReflect().Descriptor().FullName()) == name {
			return m, true
		}
	}
	return nil, false
}

// names the headers' edits, which several messages have.
const headerEdits = " request_headers_to_add request_headers_to_remove response_headers_to_add response_headers_to_remove"

const fractional = "numerator denominator"

// fields lists what each message may have set. A message that is not here may have nothing; wellKnown ones are values.
var fields = map[protoreflect.FullName]string{
	"envoy.config.listener.v3.Listener": "name filter_chains default_filter_chain listener_filters listener_filters_timeout " +
		"per_connection_buffer_limit_bytes traffic_direction stat_prefix",
	"envoy.config.listener.v3.FilterChain":      "name filter_chain_match filters",
	"envoy.config.listener.v3.FilterChainMatch": "server_names transport_protocol application_protocols",
	"envoy.config.listener.v3.Filter":           "name typed_config",
	"envoy.config.listener.v3.ListenerFilter":   "name typed_config",

	"envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector": "",
	"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager": "codec_type stat_prefix rds route_config http_filters " +
		"common_http_protocol_options http_protocol_options http2_protocol_options server_name server_header_transformation max_request_headers_kb " +
		"stream_idle_timeout request_timeout request_headers_timeout drain_timeout delayed_close_timeout use_remote_address xff_num_trusted_hops " +
		"skip_xff_append generate_request_id preserve_external_request_id upgrade_configs normalize_path merge_slashes " +
		"path_with_escaped_slashes_action strip_matching_host_port strip_any_host_port",
	"envoy.extensions.filters.network.http_connection_manager.v3.Rds":                                 "route_config_name config_source",
	"envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter":                          "name typed_config disabled",
	"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.UpgradeConfig": "upgrade_type enabled",

	"envoy.config.core.v3.ConfigSource":           "ads resource_api_version initial_fetch_timeout",
	"envoy.config.core.v3.AggregatedConfigSource": "",
	"envoy.config.core.v3.HttpProtocolOptions": "idle_timeout max_connection_duration max_headers_count max_stream_duration " +
		"max_requests_per_connection",
	"envoy.config.core.v3.Http1ProtocolOptions": "allow_absolute_url accept_http_10 default_host_for_http_10 enable_trailers",
	"envoy.config.core.v3.Http2ProtocolOptions": "max_concurrent_streams initial_stream_window_size initial_connection_window_size",
	"envoy.config.core.v3.HeaderValueOption":    "header append append_action keep_empty_value",
	"envoy.config.core.v3.HeaderValue":          "key value",
	"envoy.config.core.v3.DataSource":           "inline_string inline_bytes",

	"envoy.config.core.v3.RuntimeFractionalPercent": "default_value",
	"envoy.type.v3.FractionalPercent":               fractional,
	"envoy.type.v3.Percent":                         "value",
	"envoy.type.v3.Int64Range":                      "start end",
	"envoy.type.v3.Int32Range":                      "start end",
	"envoy.type.v3.HttpStatus":                      "code",
	"envoy.type.v3.TokenBucket":                     "max_tokens tokens_per_fill fill_interval",
	"envoy.type.matcher.v3.StringMatcher":           "exact prefix suffix safe_regex contains ignore_case",
	"envoy.type.matcher.v3.RegexMatcher":            "google_re2 regex",
	"envoy.type.matcher.v3.RegexMatcher.GoogleRE2":  "max_program_size",
	"envoy.type.matcher.v3.RegexMatchAndSubstitute": "pattern substitution",
	"envoy.type.matcher.v3.PathMatcher":             "path",

	"envoy.config.route.v3.RouteConfiguration": "name virtual_hosts max_direct_response_body_size_bytes ignore_port_in_host_matching " +
		"most_specific_header_mutations_wins validate_clusters typed_per_filter_config" + headerEdits,
	"envoy.config.route.v3.VirtualHost": "name domains routes retry_policy typed_per_filter_config per_request_buffer_limit_bytes" + headerEdits,
	"envoy.config.route.v3.Route":       "name match route redirect direct_response typed_per_filter_config stat_prefix" + headerEdits,
	"envoy.config.route.v3.RouteMatch": "prefix path safe_regex path_separated_prefix case_sensitive headers query_parameters " +
		"grpc",
	"envoy.config.route.v3.RouteMatch.GrpcRouteMatchOptions": "",
	"envoy.config.route.v3.HeaderMatcher": "name exact_match safe_regex_match range_match present_match prefix_match suffix_match " +
		"contains_match string_match invert_match treat_missing_header_as_empty",
	"envoy.config.route.v3.QueryParameterMatcher": "name string_match present_match",
	"envoy.config.route.v3.RouteAction": "cluster weighted_clusters cluster_not_found_response_code prefix_rewrite regex_rewrite " +
		"host_rewrite_literal host_rewrite_header host_rewrite_path_regex timeout idle_timeout retry_policy upgrade_configs " +
		"max_stream_duration",
	"envoy.config.route.v3.RouteAction.UpgradeConfig":     "upgrade_type enabled",
	"envoy.config.route.v3.RouteAction.MaxStreamDuration": "max_stream_duration grpc_timeout_header_max",
	"envoy.config.route.v3.WeightedCluster":               "clusters total_weight",
	"envoy.config.route.v3.WeightedCluster.ClusterWeight": "name weight host_rewrite_literal typed_per_filter_config" + headerEdits,
	"envoy.config.route.v3.RedirectAction": "https_redirect scheme_redirect host_redirect port_redirect path_redirect prefix_rewrite " +
		"regex_rewrite response_code strip_query",
	"envoy.config.route.v3.DirectResponseAction": "status body",
	"envoy.config.route.v3.RetryPolicy": "retry_on num_retries per_try_timeout retriable_status_codes retry_back_off retriable_request_headers " +
		"host_selection_retry_max_attempts",
	"envoy.config.route.v3.RetryPolicy.RetryBackOff":     "base_interval max_interval",
	"envoy.extensions.filters.http.router.v3.Router":     "dynamic_stats suppress_envoy_headers respect_expected_rq_timeout suppress_grpc_request_failure_code_stats",
	"envoy.extensions.filters.http.rbac.v3.RBAC":         "rules shadow_rules rules_stat_prefix shadow_rules_stat_prefix",
	"envoy.extensions.filters.network.rbac.v3.RBAC":      "rules shadow_rules stat_prefix shadow_rules_stat_prefix",
	"envoy.extensions.filters.http.rbac.v3.RBACPerRoute": "rbac",
	"envoy.config.rbac.v3.RBAC":                          "action policies",
	"envoy.config.rbac.v3.Policy":                        "permissions principals",
	"envoy.config.rbac.v3.Permission": "and_rules or_rules any header url_path destination_port destination_port_range not_rule " +
		"requested_server_name",
	"envoy.config.rbac.v3.Permission.Set": "rules",
	"envoy.config.rbac.v3.Principal":      "and_ids or_ids any header url_path not_id direct_remote_ip remote_ip",
	"envoy.config.rbac.v3.Principal.Set":  "ids",
	"envoy.config.core.v3.CidrRange":      "address_prefix prefix_len",

	"envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit": "stat_prefix status token_bucket filter_enabled filter_enforced " +
		"response_headers_to_add",
	"envoy.extensions.filters.http.header_mutation.v3.HeaderMutation":         "mutations",
	"envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute": "mutations",
	"envoy.extensions.filters.http.header_mutation.v3.Mutations":              "request_mutations response_mutations",
	"envoy.config.common.mutation_rules.v3.HeaderMutation":                    "remove append",

	"envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy": "stat_prefix cluster weighted_clusters idle_timeout max_connect_attempts " +
		"max_downstream_connection_duration",
	"envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster":               "clusters",
	"envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster.ClusterWeight": "name weight",

	"envoy.config.cluster.v3.Cluster": "name type eds_cluster_config connect_timeout per_connection_buffer_limit_bytes lb_policy " +
		"circuit_breakers max_requests_per_connection common_http_protocol_options http2_protocol_options typed_extension_protocol_options " +
		"outlier_detection common_lb_config least_request_lb_config round_robin_lb_config alt_stat_name",
	"envoy.config.cluster.v3.Cluster.EdsClusterConfig":               "service_name eds_config",
	"envoy.config.cluster.v3.Cluster.CommonLbConfig":                 "healthy_panic_threshold update_merge_window close_connections_on_host_set_change",
	"envoy.config.cluster.v3.Cluster.LeastRequestLbConfig":           "choice_count",
	"envoy.config.cluster.v3.Cluster.RoundRobinLbConfig":             "",
	"envoy.config.cluster.v3.CircuitBreakers":                        "thresholds",
	"envoy.config.cluster.v3.CircuitBreakers.Thresholds":             "priority max_connections max_pending_requests max_requests max_retries retry_budget track_remaining",
	"envoy.config.cluster.v3.CircuitBreakers.Thresholds.RetryBudget": "budget_percent min_retry_concurrency",
	"envoy.config.cluster.v3.OutlierDetection": "consecutive_5xx interval base_ejection_time max_ejection_percent enforcing_consecutive_5xx consecutive_gateway_failure " +
		"enforcing_consecutive_gateway_failure split_external_local_origin_errors consecutive_local_origin_failure " +
		"enforcing_consecutive_local_origin_failure enforcing_success_rate success_rate_minimum_hosts success_rate_request_volume " +
		"success_rate_stdev_factor max_ejection_time",
	"envoy.extensions.upstreams.http.v3.HttpProtocolOptions":                         "common_http_protocol_options explicit_http_config use_downstream_protocol_config",
	"envoy.extensions.upstreams.http.v3.HttpProtocolOptions.ExplicitHttpConfig":      "http_protocol_options http2_protocol_options",
	"envoy.extensions.upstreams.http.v3.HttpProtocolOptions.UseDownstreamHttpConfig": "http_protocol_options http2_protocol_options",
}

// isValue reports whether a message is written as a plain JSON value (durations, wrappers), which protojson checks.
func isValue(m protoreflect.MessageDescriptor) bool {
	switch m.FullName() {
	case "google.protobuf.Duration", "google.protobuf.BoolValue", "google.protobuf.UInt32Value", "google.protobuf.UInt64Value",
		"google.protobuf.Int32Value", "google.protobuf.Int64Value", "google.protobuf.DoubleValue", "google.protobuf.FloatValue",
		"google.protobuf.StringValue", "google.protobuf.BytesValue":
		return true
	}
	return false
}
