// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"errors"
	"fmt"
	"strings"
	"time"

	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/pathnorm"
	"github.com/weirmesh/weir/services/proxy/internal/strict"
)

// config is a compiled connection manager.
type config struct {
	codec     hcmv3.HttpConnectionManager_CodecType
	routeName string
	routes    *Routes
	filters   []filter
	replies   replies
	limits    strict.Limits
	norm      pathnorm.Options
	upgrades  map[string]bool

	idle, streamIdle, headers, request, maxStream, maxConn time.Duration
	maxRequests                                            uint64
	maxStreams                                             uint32
	streamWindow, connWindow                               int32

	logBegin    bool
	xff         bool
	stripPort   func(authority string, local uint16) string
	defaultHost string
	matchers    *match.Compiler
}

// What holds where the configuration says nothing. Envoy has no limit for heads that come slowly; a proxy that many share needs one.
const (
	defaultHeadKB     = 60
	defaultHeadCount  = 100
	defaultIdle       = time.Hour
	defaultStreamIdle = 5 * time.Minute
	defaultHeaders    = 30 * time.Second
	defaultStreams    = 256
	maxHeadKB         = 8192
	defaultBuffer     = 64 << 10
)

// managerFields are those that are implemented, and those whose meaning is what is done anyway.
var managerFields = []string{
	"codec_type", "stat_prefix", "rds", "route_config", "http_filters", "common_http_protocol_options", "http_protocol_options", "http2_protocol_options",
	"server_header_transformation", "max_request_headers_kb", "stream_idle_timeout", "request_timeout", "request_headers_timeout", "drain_timeout",
	"delayed_close_timeout", "access_log", "access_log_options", "flush_access_log_on_new_request", "use_remote_address", "skip_xff_append",
	"xff_num_trusted_hops", "generate_request_id", "preserve_external_request_id", "internal_address_config", "upgrade_configs", "normalize_path",
	"merge_slashes", "path_with_escaped_slashes_action", "local_reply_config", "strip_matching_host_port", "strip_any_host_port",
	"stream_error_on_invalid_http_message", "server_name",
}

func compileConfig(h *hcmv3.HttpConnectionManager, matchers *match.Compiler) (*config, error) {
	if h == nil {
		return nil, errors.New("no connection manager")
	}
	if err := fields.Only(h, "", managerFields...); err != nil {
		return nil, err
	}
	c := &config{
		codec: h.GetCodecType(), limits: strict.Limits{Bytes: defaultHeadKB << 10, Count: defaultHeadCount},
		idle: defaultIdle, streamIdle: defaultStreamIdle, headers: defaultHeaders, maxStreams: defaultStreams,
		xff: h.GetUseRemoteAddress().GetValue() && !h.GetSkipXffAppend(),
		//nolint:staticcheck // the deprecated field is still written
		logBegin: h.GetFlushAccessLogOnNewRequest() || h.GetAccessLogOptions().GetFlushAccessLogOnNewRequest(),
		upgrades: map[string]bool{}, matchers: matchers,
	}
	if c.codec == hcmv3.HttpConnectionManager_HTTP3 {
		return nil, fields.NotSupported("codec_type")
	}
	steps := []func(*hcmv3.HttpConnectionManager) error{
		c.compileRoutes, c.compileFilters, c.compileProtocols, c.compileTimeouts, c.compileNormalization, c.compileUpgrades, c.compileHost,
		func(h *hcmv3.HttpConnectionManager) (err error) {
			c.replies, err = compiler{matchers}.replies(h.GetLocalReplyConfig(), "local_reply_config")
			return err
		},
	}
	for _, step := range steps {
		if err := step(h); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *config) compileRoutes(h *hcmv3.HttpConnectionManager) error {
	switch s := h.GetRouteSpecifier().(type) {
	case *hcmv3.HttpConnectionManager_Rds:
		if c.routeName = s.Rds.GetRouteConfigName(); c.routeName == "" {
			return errors.New("rds.route_config_name: empty")
		}
		return nil
	case *hcmv3.HttpConnectionManager_RouteConfig:
		var err error
		if c.routes, err = CompileRoutes(s.RouteConfig, c.matchers); err != nil {
			return fmt.Errorf("route_config: %w", err)
		}
		return nil
	}
	return errors.New("no routes")
}

func (c *config) compileProtocols(h *hcmv3.HttpConnectionManager) error {
	if o := h.GetCommonHttpProtocolOptions(); o != nil {
		if err := fields.Only(o, "common_http_protocol_options", "idle_timeout", "max_connection_duration", "max_headers_count", "max_stream_duration",
			"max_requests_per_connection", "headers_with_underscores_action"); err != nil {
			return err
		}
		if o.GetHeadersWithUnderscoresAction() != 0 {
			return fields.NotSupported("common_http_protocol_options.headers_with_underscores_action")
		}
		if n := o.GetMaxHeadersCount(); n != nil {
			c.limits.Count = int(min(n.GetValue(), 1<<16))
		}
		c.maxRequests = uint64(o.GetMaxRequestsPerConnection().GetValue())
		if err := errors.Join(duration(&c.idle, o.GetIdleTimeout(), "common_http_protocol_options.idle_timeout"),
			duration(&c.maxStream, o.GetMaxStreamDuration(), "common_http_protocol_options.max_stream_duration"),
			duration(&c.maxConn, o.GetMaxConnectionDuration(), "common_http_protocol_options.max_connection_duration")); err != nil {
			return err
		}
	}
	if n := h.GetMaxRequestHeadersKb(); n != nil {
		if n.GetValue() == 0 || n.GetValue() > maxHeadKB {
			return fmt.Errorf("max_request_headers_kb: %d", n.GetValue())
		}
		c.limits.Bytes = int(n.GetValue()) << 10
	}
	if o := h.GetHttpProtocolOptions(); o != nil {
		if err := fields.Only(o, "http_protocol_options", "allow_absolute_url", "accept_http_10", "default_host_for_http_10", "enable_trailers",
			"override_stream_error_on_invalid_http_message", "allow_custom_methods", "use_balsa_parser"); err != nil {
			return err
		}
		c.defaultHost = o.GetDefaultHostForHttp_10()
		if c.defaultHost != "" && !strict.ValidHost(c.defaultHost) {
			return errors.New("http_protocol_options.default_host_for_http_10: not a host")
		}
	}
	return c.compileHTTP2(h)
}

func (c *config) compileHTTP2(h *hcmv3.HttpConnectionManager) error {
	o := h.GetHttp2ProtocolOptions()
	if o == nil {
		return nil
	}
	// The limits of frames are the library's, and stricter.
	if err := fields.Only(o, "http2_protocol_options", "max_concurrent_streams", "initial_stream_window_size", "initial_connection_window_size",
		"max_outbound_frames", "max_outbound_control_frames", "max_consecutive_inbound_frames_with_empty_payload",
		"max_inbound_priority_frames_per_stream", "max_inbound_window_update_frames_per_data_frame_sent",
		"override_stream_error_on_invalid_http_message", "stream_error_on_invalid_http_messaging", "use_oghttp2_codec"); err != nil {
		return err
	}
	if n := o.GetMaxConcurrentStreams(); n != nil {
		c.maxStreams = max(1, min(n.GetValue(), 1024))
	}
	c.streamWindow = int32(min(o.GetInitialStreamWindowSize().GetValue(), 16<<20))
	c.connWindow = int32(min(o.GetInitialConnectionWindowSize().GetValue(), 16<<20))
	return nil
}

func (c *config) compileTimeouts(h *hcmv3.HttpConnectionManager) error {
	return errors.Join(
		duration(&c.streamIdle, h.GetStreamIdleTimeout(), "stream_idle_timeout"),
		duration(&c.request, h.GetRequestTimeout(), "request_timeout"),
		duration(&c.headers, h.GetRequestHeadersTimeout(), "request_headers_timeout"))
}

func duration(to *time.Duration, d *durationpb.Duration, path string) error {
	if d == nil {
		return nil
	}
	if d.CheckValid() != nil || d.AsDuration() < 0 {
		return fmt.Errorf("%s: not a duration of zero or more", path)
	}
	*to = d.AsDuration()
	return nil
}

func (c *config) compileNormalization(h *hcmv3.HttpConnectionManager) error {
	c.norm = pathnorm.Options{Dots: h.GetNormalizePath().GetValue(), Merge: h.GetMergeSlashes()}
	switch h.GetPathWithEscapedSlashesAction() {
	case hcmv3.HttpConnectionManager_IMPLEMENTATION_SPECIFIC_DEFAULT, hcmv3.HttpConnectionManager_KEEP_UNCHANGED:
	case hcmv3.HttpConnectionManager_REJECT_REQUEST:
		c.norm.Slashes = pathnorm.Reject
	case hcmv3.HttpConnectionManager_UNESCAPE_AND_REDIRECT:
		c.norm.Slashes = pathnorm.Redirect
	case hcmv3.HttpConnectionManager_UNESCAPE_AND_FORWARD:
		c.norm.Slashes = pathnorm.Unescape
	default:
		return fields.NotSupported("path_with_escaped_slashes_action")
	}
	return nil
}

func (c *config) compileUpgrades(h *hcmv3.HttpConnectionManager) error {
	for i, u := range h.GetUpgradeConfigs() {
		path := fields.Index("", "upgrade_configs", i)
		if err := fields.Only(u, path, "upgrade_type", "enabled"); err != nil {
			return err
		}
		name := strings.ToLower(u.GetUpgradeType())
		if name == "" || name == "connect" || name == "connect-udp" || name == "h2c" {
			return fields.NotSupported(fields.Join(path, "upgrade_type"))
		}
		c.upgrades[name] = u.GetEnabled() == nil || u.GetEnabled().GetValue()
	}
	return nil
}

func (c *config) compileHost(h *hcmv3.HttpConnectionManager) error {
	if h.GetStripAnyHostPort() && h.GetStripMatchingHostPort() {
		return errors.New("strip_any_host_port and strip_matching_host_port exclude each other")
	}
	c.stripPort = func(a string, _ uint16) string { return a }
	if !h.GetStripAnyHostPort() && !h.GetStripMatchingHostPort() {
		return nil
	}
	anyPort := h.GetStripAnyHostPort()
	c.stripPort = func(a string, local uint16) string {
		i := strings.LastIndexByte(a, ':')
		if i < 0 || strings.HasSuffix(a, "]") || !anyPort && a[i+1:] != fmt.Sprint(local) {
			return a
		}
		return a[:i]
	}
	return nil
}
