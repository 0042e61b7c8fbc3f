// SPDX-License-Identifier: Apache-2.0

// Package accesslog tells what went through the proxy over Envoy's gRPC access log service. Nothing here ever holds up a request: what there is no room
// for is counted, and told with the next message.
//
// A request may be told at its beginning too (flush_access_log_on_new_request). Any entry waits for up to a flush interval; a beginning whose request ends
// within it is left out if the end repeats all that it says. Most do, and that halves what proxy and server have to do.
package accesslog

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/grpc/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/model"
	"github.com/weirmesh/weir/services/proxy/internal/resource"
)

const (
	defaultFlush = time.Second
	defaultBatch = 16384
	maxHeaders   = 256
)

// stream says where entries go; equal ones share a stream.
type stream struct {
	cluster, name string
	tcp           bool
}

// logger is one compiled gRPC access log.
type logger struct {
	service *Service
	stream  stream
	sink    *sink
	flush   time.Duration
	batch   int
	tags    map[string]string

	requestHeaders, responseHeaders, trailers []header
}

// header is a header to log: its name as http.Header has it, and as it is told.
type header struct{ canonical, lower string }

// Log implements model.Logger.
func (l *logger) Log(e *model.Entry) {
	// Envoy's HTTP logger knows requests only, and its TCP logger connections.
	if e.Stream != l.stream.tcp {
		return
	}
	l.service.put(l, e)
}

type loggers []model.Logger

// Log implements model.Logger.
func (l loggers) Log(e *model.Entry) {
	for _, one := range l {
		one.Log(e)
	}
}

type none struct{}

// Log implements model.Logger.
func (none) Log(*model.Entry) {}

// Compile compiles the access logs of a filter or listener. It never returns a nil logger without an error.
func (s *Service) Compile(path string, in []*accesslogv3.AccessLog) (model.Logger, error) {
	var all loggers
	for i, one := range in {
		l, err := s.compile(fields.Index(path, "access_log", i), one)
		if err != nil {
			return nil, err
		}
		all = append(all, l)
	}
	switch len(all) {
	case 0:
		return none{}, nil
	case 1:
		return all[0], nil
	}
	return all, nil
}

func (s *Service) compile(path string, in *accesslogv3.AccessLog) (*logger, error) {
	if err := fields.Only(in, path, "name", "typed_config"); err != nil {
		return nil, err
	}
	l := &logger{service: s}
	var common *alsv3.CommonGrpcAccessLogConfig
	config := in.GetTypedConfig()
	at := path + ".typed_config"
	switch {
	case config.MessageIs(&alsv3.HttpGrpcAccessLogConfig{}):
		var c alsv3.HttpGrpcAccessLogConfig
		if err := resource.Unpack(at, config, &c); err != nil {
			return nil, err
		}
		common = c.GetCommonConfig()
		if len(c.GetAdditionalRequestHeadersToLog())+len(c.GetAdditionalResponseHeadersToLog())+len(c.GetAdditionalResponseTrailersToLog()) > maxHeaders {
			return nil, fmt.Errorf("%s: more than %d headers to log", at, maxHeaders)
		}
		l.requestHeaders = headers(c.GetAdditionalRequestHeadersToLog())
		l.responseHeaders = headers(c.GetAdditionalResponseHeadersToLog())
		l.trailers = headers(c.GetAdditionalResponseTrailersToLog())
	case config.MessageIs(&alsv3.TcpGrpcAccessLogConfig{}):
		var c alsv3.TcpGrpcAccessLogConfig
		if err := resource.Unpack(at, config, &c); err != nil {
			return nil, err
		}
		common, l.stream.tcp = c.GetCommonConfig(), true
	default:
		return nil, fmt.Errorf("%s: access log %q (%s) is not supported", path, in.GetName(), config.GetTypeUrl())
	}
	if err := l.compileCommon(at+".common_config", common); err != nil {
		return nil, err
	}
	l.sink = s.sink(l.stream)
	return l, nil
}

func (l *logger) compileCommon(path string, in *alsv3.CommonGrpcAccessLogConfig) error {
	if in == nil {
		return fmt.Errorf("%s is empty", path)
	}
	if err := fields.Only(in, path, "log_name", "grpc_service", "transport_api_version", "buffer_flush_interval", "buffer_size_bytes",
		"custom_tags", "grpc_stream_retry_policy"); err != nil {
		return err
	}
	if err := fields.Only(in.GetGrpcService(), path+".grpc_service", "envoy_grpc", "timeout"); err != nil {
		return err
	}
	l.stream.cluster = in.GetGrpcService().GetEnvoyGrpc().GetClusterName()
	if l.stream.cluster == "" {
		return fmt.Errorf("%s.grpc_service.envoy_grpc.cluster_name is empty", path)
	}
	if in.GetTransportApiVersion() == corev3.ApiVersion_V2 { //nolint:staticcheck // named to refuse it
		return fmt.Errorf("%s.transport_api_version V2 is not supported", path)
	}
	l.stream.name = in.GetLogName()
	var err error
	if l.flush, err = resource.Duration(path+".buffer_flush_interval", in.GetBufferFlushInterval(), defaultFlush); err != nil {
		return err
	}
	if l.flush == 0 {
		return fmt.Errorf("%s.buffer_flush_interval is 0", path)
	}
	l.batch = defaultBatch
	if b := in.GetBufferSizeBytes(); b != nil {
		l.batch = int(min(b.GetValue(), 1<<20))
	}
	for i, tag := range in.GetCustomTags() {
		if tag.GetLiteral() == nil {
			return fmt.Errorf("%s: only literal tags are supported", fields.Index(path, "custom_tags", i))
		}
		if l.tags == nil {
			l.tags = map[string]string{}
		}
		l.tags[tag.GetTag()] = tag.GetLiteral().GetValue()
	}
	return nil
}

func headers(names []string) []header {
	var out []header
	for _, n := range names {
		out = append(out, header{canonical: http.CanonicalHeaderKey(n), lower: strings.ToLower(n)})
	}
	return out
}
