// SPDX-License-Identifier: Apache-2.0

package render

import (
	"fmt"
	"strings"
	"testing"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// BenchmarkEdit: one rule of one of 1,000 filters of a node changes.
func BenchmarkEdit(b *testing.B) {
	s, err := NewState(DefaultOptions())
	if err != nil {
		b.Fatal(err)
	}
	var keys []string
	for i := range 1000 {
		f := lockDown()
		f.Key = fmt.Sprintf("http-%d", i)
		keys = append(keys, f.Key)
		s.Apply([]*policyv1.RenderResource{filterOf(f)}, nil)
	}
	s.Apply([]*policyv1.RenderResource{slotsOf("n1", keys...)}, nil)
	s.Snapshot("n1")
	for i := 0; b.Loop(); i++ {
		f := lockDown()
		f.Key, f.Http[0].Path = "http-7", fmt.Sprintf("/%d", i)
		s.Apply([]*policyv1.RenderResource{filterOf(f)}, nil)
		s.Snapshot("n1")
	}
}

// BenchmarkConfig: a configuration with 5,000 routes is read and rendered.
func BenchmarkConfig(b *testing.B) {
	var routes strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&routes, `{"match": {"prefix": "/%d"}, "route": {"cluster": "production/api-service-v1"}},`, i)
	}
	spec := fmt.Sprintf(`{"services": [{"name": "api-service"}], "backendServices": [{"name": "api-service-v1"}], "resources": [
		{"@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration", "name": "r", "virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [%s
			{"match": {"prefix": "/"}, "route": {"cluster": "production/api-service-v1"}}]}]},
		{"@type": "type.googleapis.com/envoy.config.listener.v3.Listener", "name": "l", "filter_chains": [{"filters": [{"name": "http", "typed_config": {
			"@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", "stat_prefix": "x",
			"rds": {"route_config_name": "r"}, "http_filters": [{"name": "router", "typed_config": {
				"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]}}]}]}]}`, routes.String())
	for b.Loop() {
		c := renderConfig(&policyv1.EnvoyConfig{Kind: "CiliumEnvoyConfig", Namespace: "production", Name: "x", Spec: []byte(spec)})
		if c.err != nil || len(c.problems) > 0 {
			b.Fatal(c.err, c.problems)
		}
	}
}
