// SPDX-License-Identifier: Apache-2.0

package proxy_test

import (
	"fmt"
	"net"
	"syscall"
	"testing"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/weirmesh/weir/services/proxy/internal/xds"
)

// dearRoutes are as many routes by dear expressions as a namespace may have: some 195,000 instructions.
func dearRoutes(name string, salt int) *routev3.RouteConfiguration {
	host := &routev3.VirtualHost{Name: "all", Domains: []string{"*"}}
	for i := range 900 {
		host.Routes = append(host.Routes, &routev3.Route{
			Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{
				Regex: fmt.Sprintf("/(a|b|c)*x{1,100}[0-9]+/%d-%d/.*", salt, i),
			}}},
			Action: &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{Status: 200}},
		})
	}
	return &routev3.RouteConfiguration{Name: name, VirtualHosts: []*routev3.VirtualHost{host}}
}

// ruled gives the xDS server a listener that follows routes, and has a rule.
func (b *bench) ruled(name, addr, routes, rule string) {
	b.t.Helper()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		b.t.Fatal(err)
	}
	b.set(name, &listenerv3.Listener{}, `{"name":%q,"address":{"socket_address":{"address":%q,"port_value":%s}},"filter_chains":[{"filters":[
		{"name":"envoy.filters.network.http_connection_manager","typed_config":{
			"@type":"type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager","stat_prefix":"x",
			"rds":{"route_config_name":%q,"config_source":{"ads":{},"resource_api_version":"V3"}},
			"http_filters":[{"name":"envoy.filters.http.rbac","typed_config":{
				"@type":"type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC","rules":{"policies":{"r":{"principals":[{"any":true}],
					"permissions":[{"url_path":{"path":{"safe_regex":{"regex":%q}}}}]}}}}},
				{"name":"envoy.filters.http.router","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]}}]}]}`,
		name, host, port, routes, rule)
}

// acknowledged is how often the proxy took resources of a type.
func (b *bench) acknowledged(typeURL string) (n int) {
	for _, r := range b.xds.Requests() {
		if r.GetTypeUrl() == typeURL && r.GetResponseNonce() != "" && r.GetErrorDetail() == nil {
			n++
		}
	}
	return n
}

// BenchmarkUpdate is what a tenant's changes cost the process, which is what its neighbours do without: the dearest configuration that a namespace may have, all
// of it new; the same with one expression changed; and an edit of a rule beside it.
func BenchmarkUpdate(t *testing.B) {
	b := newBench(t)
	addr := free(t)
	b.xds.Set(t, "dear", dearRoutes("dear", 0))
	b.ruled("listener", addr, "dear", "/.*")
	b.run()
	until(t, "the first configuration", func() bool { return b.acknowledged(xds.Route) > 0 && b.acknowledged(xds.Listener) > 0 })
	salt := 0
	for _, update := range []struct {
		name, typeURL string
		do            func()
	}{
		{"all new", xds.Route, func() { b.xds.Set(t, "dear", dearRoutes("dear", salt)) }},
		{"one expression", xds.Route, func() {
			routes := dearRoutes("dear", 0)
			routes.VirtualHosts[0].Routes[7].Match.GetSafeRegex().Regex += fmt.Sprint(salt)
			b.xds.Set(t, "dear", routes)
		}},
		{"a rule beside it", xds.Listener, func() { b.ruled("listener", addr, "dear", fmt.Sprintf("/(.*|%d)", salt)) }},
	} {
		t.Run(update.name, func(t *testing.B) {
			t.ReportAllocs()
			begun := cpuTime(t)
			for t.Loop() {
				salt++
				n := b.acknowledged(update.typeURL)
				update.do()
				until(t, update.name, func() bool { return b.acknowledged(update.typeURL) > n })
			}
			t.ReportMetric(float64((cpuTime(t)-begun).Microseconds())/float64(t.N)/1000, "cpu-ms/op")
		})
	}
}

func cpuTime(t testing.TB) time.Duration {
	t.Helper()
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		t.Fatal(err)
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}
