// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
	"github.com/weirmesh/weir/services/proxy/internal/match"
	"github.com/weirmesh/weir/services/proxy/internal/mutation"
)

// reply is an answer of the proxy's own.
type reply struct {
	status      int
	body        string
	contentType string
	headers     mutation.List
	flag        string
}

// replies change the proxy's own answers, as local_reply_config says.
type replies struct {
	mappers []mapper
	format  bodyFormat
}

type mapper struct {
	matches func(*reply, *match.Request) bool
	status  int
	body    *string
	format  bodyFormat
	headers mutation.List
}

// bodyFormat makes a body; nil text = the body as it is.
type bodyFormat struct {
	text        *string
	contentType string
}

func (x compiler) replies(c *hcmv3.LocalReplyConfig, path string) (r replies, err error) {
	if c == nil {
		return r, nil
	}
	if r.format, err = compileBodyFormat(c.GetBodyFormat(), fields.Join(path, "body_format")); err != nil {
		return r, err
	}
	for i, m := range c.GetMappers() {
		at := fields.Index(path, "mappers", i)
		to := mapper{status: int(m.GetStatusCode().GetValue())}
		if to.matches, err = x.replyFilter(m.GetFilter(), fields.Join(at, "filter")); err != nil {
			return r, err
		}
		if b := m.GetBody(); b != nil {
			if err := fields.Only(b, fields.Join(at, "body"), "inline_string", "inline_bytes"); err != nil {
				return r, err
			}
			text := b.GetInlineString() + string(b.GetInlineBytes())
			to.body = &text
		}
		if to.format, err = compileBodyFormat(m.GetBodyFormatOverride(), fields.Join(at, "body_format_override")); err != nil {
			return r, err
		}
		if to.headers, err = mutation.Compile(m.GetHeadersToAdd(), nil, at, ""); err != nil {
			return r, err
		}
		r.mappers = append(r.mappers, to)
	}
	return r, nil
}

func compileBodyFormat(f *corev3.SubstitutionFormatString, path string) (bodyFormat, error) {
	if f == nil {
		return bodyFormat{}, nil
	}
	if err := fields.Only(f, path, "text_format", "text_format_source", "content_type", "omit_empty_values"); err != nil {
		return bodyFormat{}, err
	}
	text := f.GetTextFormat() //nolint:staticcheck // the deprecated field is still written
	if s := f.GetTextFormatSource(); s != nil {
		if err := fields.Only(s, fields.Join(path, "text_format_source"), "inline_string", "inline_bytes"); err != nil {
			return bodyFormat{}, err
		}
		text = s.GetInlineString() + string(s.GetInlineBytes())
	}
	rest := strings.NewReplacer("%LOCAL_REPLY_BODY%", "", "%RESPONSE_CODE%", "").Replace(text)
	if strings.Contains(rest, "%") {
		return bodyFormat{}, fmt.Errorf("%s: only %%LOCAL_REPLY_BODY%% and %%RESPONSE_CODE%% are supported", path)
	}
	return bodyFormat{text: &text, contentType: f.GetContentType()}, nil
}

func (f *bodyFormat) apply(r *reply) {
	if f.text == nil {
		return
	}
	r.body = strings.NewReplacer("%LOCAL_REPLY_BODY%", r.body, "%RESPONSE_CODE%", strconv.Itoa(r.status)).Replace(*f.text)
	if r.contentType = f.contentType; r.contentType == "" {
		r.contentType = "text/plain"
	}
}

func (x compiler) replyFilter(f *accesslogv3.AccessLogFilter, path string) (func(*reply, *match.Request) bool, error) {
	switch s := f.GetFilterSpecifier().(type) {
	case *accesslogv3.AccessLogFilter_StatusCodeFilter:
		c := s.StatusCodeFilter.GetComparison()
		want := int(c.GetValue().GetDefaultValue())
		switch c.GetOp() {
		case accesslogv3.ComparisonFilter_EQ:
			return func(r *reply, _ *match.Request) bool { return r.status == want }, nil
		case accesslogv3.ComparisonFilter_GE:
			return func(r *reply, _ *match.Request) bool { return r.status >= want }, nil
		case accesslogv3.ComparisonFilter_LE:
			return func(r *reply, _ *match.Request) bool { return r.status <= want }, nil
		case accesslogv3.ComparisonFilter_NE:
			return func(r *reply, _ *match.Request) bool { return r.status != want }, nil
		}
	case *accesslogv3.AccessLogFilter_ResponseFlagFilter:
		want := s.ResponseFlagFilter.GetFlags()
		return func(r *reply, _ *match.Request) bool {
			return r.flag != "" && (len(want) == 0 || slices.Contains(want, r.flag))
		}, nil
	case *accesslogv3.AccessLogFilter_HeaderFilter:
		h, err := x.Header(s.HeaderFilter.GetHeader(), fields.Join(path, "header_filter.header"))
		return func(_ *reply, q *match.Request) bool { return h.Match(q) }, err
	case *accesslogv3.AccessLogFilter_AndFilter:
		list, err := x.replyFilters(s.AndFilter.GetFilters(), fields.Join(path, "and_filter"))
		return func(r *reply, q *match.Request) bool {
			return !slices.ContainsFunc(list, func(f func(*reply, *match.Request) bool) bool { return !f(r, q) })
		}, err
	case *accesslogv3.AccessLogFilter_OrFilter:
		list, err := x.replyFilters(s.OrFilter.GetFilters(), fields.Join(path, "or_filter"))
		return func(r *reply, q *match.Request) bool {
			return slices.ContainsFunc(list, func(f func(*reply, *match.Request) bool) bool { return f(r, q) })
		}, err
	}
	return nil, fields.NotSupported(path)
}

func (x compiler) replyFilters(list []*accesslogv3.AccessLogFilter, path string) ([]func(*reply, *match.Request) bool, error) {
	var out []func(*reply, *match.Request) bool
	for i, f := range list {
		c, err := x.replyFilter(f, fields.Index(path, "filters", i))
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// apply changes an answer by the first mapper that matches.
func (c *replies) apply(r *reply, q *match.Request) {
	format := &c.format
	for i := range c.mappers {
		m := &c.mappers[i]
		if !m.matches(r, q) {
			continue
		}
		if m.body != nil {
			r.body, r.contentType = *m.body, "text/plain"
		}
		if m.status != 0 {
			r.status = m.status
		}
		if m.format.text != nil {
			format = &m.format
		}
		r.headers = m.headers
		break
	}
	format.apply(r)
}

const grpcDeadlineExceeded = "4"

// grpcStatus is what a gRPC client is told for an HTTP status.
func grpcStatus(status int) string {
	switch status {
	case http.StatusBadRequest:
		return "13"
	case http.StatusUnauthorized:
		return "16"
	case http.StatusForbidden:
		return "7"
	case http.StatusNotFound:
		return "12"
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return "14"
	}
	return "2"
}

// grpcMessage encodes a message as gRPC's headers have it.
func grpcMessage(s string) string {
	s = strings.TrimRight(s, "\r\n")
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '%' {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}
