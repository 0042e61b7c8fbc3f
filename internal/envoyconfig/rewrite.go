// SPDX-License-Identifier: Apache-2.0

package envoyconfig

import (
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	httpoptionsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// httpOptions is the key of a cluster's HTTP options.
const httpOptions = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

// modernize puts today's fields in the place of old ones: manifests in use still have them, newer proxies do not read them.
func modernize(path string, m proto.Message) error {
	switch m := m.(type) {
	case *routev3.HeaderMatcher:
		modernizeHeader(m)
	case *matcherv3.RegexMatcher:
		m.EngineType = nil
	case *corev3.HeaderValueOption:
		modernizeAppend(m)
	case *routev3.WeightedCluster:
		m.TotalWeight = nil //nolint:staticcheck // the sum of the weights counts since long
	case *clusterv3.Cluster:
		return modernizeCluster(path, m)
	case *hcmv3.Rds:
		m.ConfigSource = ADS()
	case *clusterv3.Cluster_EdsClusterConfig:
		m.EdsConfig = ADS()
	}
	return nil
}

// ADS returns the source of everything that is not inline.
func ADS() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
	}
}

//nolint:staticcheck // reading the deprecated fields is what this is for
func modernizeHeader(m *routev3.HeaderMatcher) {
	var s *matcherv3.StringMatcher
	switch old := m.GetHeaderMatchSpecifier().(type) {
	case *routev3.HeaderMatcher_ExactMatch:
		s = &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: old.ExactMatch}}
	case *routev3.HeaderMatcher_PrefixMatch:
		s = &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: old.PrefixMatch}}
	case *routev3.HeaderMatcher_SuffixMatch:
		s = &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Suffix{Suffix: old.SuffixMatch}}
	case *routev3.HeaderMatcher_ContainsMatch:
		s = &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Contains{Contains: old.ContainsMatch}}
	case *routev3.HeaderMatcher_SafeRegexMatch:
		s = &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: old.SafeRegexMatch}}
	default:
		return
	}
	m.HeaderMatchSpecifier = &routev3.HeaderMatcher_StringMatch{StringMatch: s}
}

//nolint:staticcheck // reading the deprecated field is what this is for
func modernizeAppend(m *corev3.HeaderValueOption) {
	if m.Append == nil {
		return
	}
	m.AppendAction = corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD
	if !m.Append.GetValue() {
		m.AppendAction = corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD
	}
	m.Append = nil
}

//nolint:staticcheck // reading the deprecated fields is what this is for
func modernizeCluster(path string, m *clusterv3.Cluster) error {
	http2, common, requests := m.Http2ProtocolOptions, m.CommonHttpProtocolOptions, m.MaxRequestsPerConnection
	if http2 == nil && common == nil && requests == nil {
		return nil
	}
	if len(m.TypedExtensionProtocolOptions) > 0 {
		return fail(path+".typed_extension_protocol_options", "is there beside the old fields that it replaces")
	}
	if requests != nil {
		if common == nil {
			common = &corev3.HttpProtocolOptions{}
		}
		common.MaxRequestsPerConnection = requests
	}
	explicit := &httpoptionsv3.HttpProtocolOptions_ExplicitHttpConfig{
		ProtocolConfig: &httpoptionsv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{HttpProtocolOptions: &corev3.Http1ProtocolOptions{}},
	}
	if http2 != nil {
		explicit.ProtocolConfig = &httpoptionsv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: http2}
	}
	packed := &anypb.Any{}
	options := &httpoptionsv3.HttpProtocolOptions{
		CommonHttpProtocolOptions: common,
		UpstreamProtocolOptions:   &httpoptionsv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: explicit},
	}
	if err := anypb.MarshalFrom(packed, options, proto.MarshalOptions{Deterministic: true}); err != nil {
		return fail(path, "%v", err)
	}
	m.Http2ProtocolOptions, m.CommonHttpProtocolOptions, m.MaxRequestsPerConnection = nil, nil, nil
	m.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpOptions: packed}
	return nil
}
