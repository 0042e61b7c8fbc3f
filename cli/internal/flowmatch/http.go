// SPDX-License-Identifier: Apache-2.0

package flowmatch

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/cli/internal/eventname"
	"github.com/weirmesh/weir/gen/flow"
)

var (
	statusCode   = regexp.MustCompile(`^[1-5][0-9]{2}$`)
	statusPrefix = regexp.MustCompile(`^[1-5][0-9]?\+$`)
)

func httpFields(f *flow.FlowFilter) (predicate, error) {
	for _, field := range []struct {
		name string
		set  bool
	}{
		{"status code", len(f.GetHttpStatusCode()) > 0}, {"method", len(f.GetHttpMethod()) > 0}, {"path", len(f.GetHttpPath()) > 0},
		{"url", len(f.GetHttpUrl()) > 0}, {"headers", len(f.GetHttpHeader()) > 0},
	} {
		if field.set && !mayBeL7(f.GetEventType()) {
			return nil, fmt.Errorf("filtering by http %s requires the event type filter to only match 'l7' events", field.name)
		}
	}
	status, err := anyOf(f.GetHttpStatusCode(), compileStatus)
	if err != nil {
		return nil, err
	}
	method, err := anyOf(f.GetHttpMethod(), func(v string) (predicate, error) {
		return func(f *flow.Flow) bool {
			h := f.GetL7().GetHttp()
			return h != nil && strings.EqualFold(h.GetMethod(), v)
		}, nil
	})
	if err != nil {
		return nil, err
	}
	path, err := anyOf(f.GetHttpPath(), func(v string) (predicate, error) {
		re, err := regexp.Compile(v)
		if err != nil {
			return nil, fmt.Errorf("invalid http path filter: %w", err)
		}
		return func(f *flow.Flow) bool {
			h := f.GetL7().GetHttp()
			if h == nil {
				return false
			}
			u, err := url.ParseRequestURI(h.GetUrl())
			return err == nil && re.MatchString(u.Path)
		}, nil
	})
	if err != nil {
		return nil, err
	}
	whole, err := anyOf(f.GetHttpUrl(), func(v string) (predicate, error) {
		re, err := regexp.Compile(v)
		if err != nil {
			return nil, fmt.Errorf("invalid http url filter: %w", err)
		}
		return func(f *flow.Flow) bool {
			h := f.GetL7().GetHttp()
			return h != nil && re.MatchString(h.GetUrl())
		}, nil
	})
	if err != nil {
		return nil, err
	}
	header, err := anyOf(f.GetHttpHeader(), func(want *flow.HTTPHeader) (predicate, error) {
		return func(f *flow.Flow) bool {
			return slices.ContainsFunc(f.GetL7().GetHttp().GetHeaders(), func(h *flow.HTTPHeader) bool {
				return h.GetKey() == want.GetKey() && h.GetValue() == want.GetValue()
			})
		}, nil
	})
	return join(status, method, path, whole, header), err
}

// mayBeL7 says whether an event type filter lets L7 records pass at all.
func mayBeL7(types []*flow.EventTypeFilter) bool {
	return len(types) == 0 || slices.ContainsFunc(types, func(t *flow.EventTypeFilter) bool { return t.GetType() == eventname.TypeL7 })
}

func compileStatus(v string) (predicate, error) {
	var test func(code string) bool
	switch {
	case statusCode.MatchString(v):
		test = func(code string) bool { return code == v }
	case statusPrefix.MatchString(v):
		prefix := strings.TrimSuffix(v, "+")
		test = func(code string) bool { return strings.HasPrefix(code, prefix) }
	default:
		return nil, fmt.Errorf("invalid http status code filter: invalid status code prefix: %q", v)
	}
	return func(f *flow.Flow) bool {
		// Requests have no code.
		code := f.GetL7().GetHttp().GetCode()
		return code != 0 && test(strconv.FormatUint(uint64(code), 10))
	}, nil
}

func dnsQueries(f *flow.FlowFilter) (predicate, error) {
	return anyOf(f.GetDnsQuery(), func(v string) (predicate, error) {
		re, err := regexp.Compile(v)
		if err != nil {
			return nil, fmt.Errorf("invalid dns query filter: %w", err)
		}
		return func(f *flow.Flow) bool {
			d := f.GetL7().GetDns()
			return d != nil && re.MatchString(d.GetQuery())
		}, nil
	})
}
