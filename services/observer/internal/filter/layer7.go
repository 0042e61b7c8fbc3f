// SPDX-License-Identifier: Apache-2.0

package filter

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/gen/flow"
)

// eventTypeL7 is the event type of L7 flows.
const eventTypeL7 = 129

// layer7Fields: HTTP fields may be combined with event types only if one of them is L7.
func layer7Fields() []field {
	guard := func(what string, isSet func(*flow.FlowFilter) bool, compile func(*flow.FlowFilter) (Match, error)) func(*flow.FlowFilter) (Match, error) {
		return func(f *flow.FlowFilter) (Match, error) {
			if !isSet(f) {
				return nil, nil
			}
			types := f.GetEventType()
			if len(types) > 0 && !slices.ContainsFunc(types, func(t *flow.EventTypeFilter) bool { return t.GetType() == eventTypeL7 }) {
				return nil, errors.New("filtering by " + what + " requires the event type filter to only match 'l7' events")
			}
			return compile(f)
		}
	}
	l7 := []string{"l7"}
	return []field{
		{"http_status_code", l7, guard("http status code", func(f *flow.FlowFilter) bool { return len(f.GetHttpStatusCode()) > 0 }, compileStatusCodes)},
		{"http_method", l7, guard("http method", func(f *flow.FlowFilter) bool { return len(f.GetHttpMethod()) > 0 }, compileMethods)},
		{"http_path", l7, guard("http path", func(f *flow.FlowFilter) bool { return len(f.GetHttpPath()) > 0 }, compilePaths)},
		{"http_url", l7, guard("http url", func(f *flow.FlowFilter) bool { return len(f.GetHttpUrl()) > 0 }, compileURLs)},
		{"http_header", l7, guard("http headers", func(f *flow.FlowFilter) bool { return len(f.GetHttpHeader()) > 0 }, compileHTTPHeaders)},
		{"dns_query", l7, compileDNSQueries},
	}
}

// statusCode reads `503`, `5+` or `40+`.
func statusCode(text string) (digits string, prefix, ok bool) {
	digits, prefix = strings.CutSuffix(text, "+")
	if len(digits) == 0 || digits[0] < '1' || digits[0] > '5' {
		return "", false, false
	}
	for _, d := range digits {
		if d < '0' || d > '9' {
			return "", false, false
		}
	}
	return digits, prefix, len(digits) == 3 && !prefix || len(digits) < 3 && prefix
}

func compileStatusCodes(f *flow.FlowFilter) (Match, error) {
	var prefixes []string // a full code is a prefix of itself only
	for _, text := range f.GetHttpStatusCode() {
		digits, _, ok := statusCode(text)
		if !ok {
			return nil, fmt.Errorf("invalid http status code filter: invalid status code prefix: %q", text)
		}
		prefixes = append(prefixes, digits)
	}
	return func(fl *flow.Flow) bool {
		code := fl.GetL7().GetHttp().GetCode()
		if code < 100 || code > 999 {
			return false
		}
		text := strconv.FormatUint(uint64(code), 10)
		return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(text, p) })
	}, nil
}

func compileMethods(f *flow.FlowFilter) (Match, error) {
	list := f.GetHttpMethod()
	return func(fl *flow.Flow) bool {
		http := fl.GetL7().GetHttp()
		return http != nil && slices.ContainsFunc(list, func(m string) bool { return strings.EqualFold(m, http.GetMethod()) })
	}, nil
}

func expressions(list []string, what string) ([]*regexp.Regexp, error) {
	var out []*regexp.Regexp
	for _, text := range list {
		re, err := regexp.Compile(text)
		if err != nil {
			return nil, fmt.Errorf("invalid %s filter: %s: %w", what, text, err)
		}
		out = append(out, re)
	}
	return out, nil
}

func anyExpression(list []*regexp.Regexp, text string) bool {
	return slices.ContainsFunc(list, func(re *regexp.Regexp) bool { return re.MatchString(text) })
}

func compilePaths(f *flow.FlowFilter) (Match, error) {
	list, err := expressions(f.GetHttpPath(), "http path")
	if err != nil {
		return nil, err
	}
	return func(fl *flow.Flow) bool {
		text := fl.GetL7().GetHttp().GetUrl()
		if text == "" {
			return false
		}
		u, err := url.ParseRequestURI(text)
		return err == nil && anyExpression(list, u.Path)
	}, nil
}

func compileURLs(f *flow.FlowFilter) (Match, error) {
	list, err := expressions(f.GetHttpUrl(), "http url")
	if err != nil {
		return nil, err
	}
	return func(fl *flow.Flow) bool {
		text := fl.GetL7().GetHttp().GetUrl()
		return text != "" && anyExpression(list, text)
	}, nil
}

func compileHTTPHeaders(f *flow.FlowFilter) (Match, error) {
	list := f.GetHttpHeader()
	return func(fl *flow.Flow) bool {
		return slices.ContainsFunc(fl.GetL7().GetHttp().GetHeaders(), func(has *flow.HTTPHeader) bool {
			return slices.ContainsFunc(list, func(want *flow.HTTPHeader) bool {
				return want.GetKey() == has.GetKey() && want.GetValue() == has.GetValue()
			})
		})
	}, nil
}

func compileDNSQueries(f *flow.FlowFilter) (Match, error) {
	if len(f.GetDnsQuery()) == 0 {
		return nil, nil
	}
	var list []*regexp.Regexp
	for _, text := range f.GetDnsQuery() {
		re, err := regexp.Compile(text)
		if err != nil {
			return nil, fmt.Errorf("invalid DNS query filter: failed to compile regexp: %w", err)
		}
		list = append(list, re)
	}
	return func(fl *flow.Flow) bool {
		dns := fl.GetL7().GetDns()
		return dns != nil && anyExpression(list, dns.GetQuery())
	}, nil
}
