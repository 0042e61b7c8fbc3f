// SPDX-License-Identifier: Apache-2.0

package envoyconfig

import (
	"os"
	"slices"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	httpoptionsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"sigs.k8s.io/yaml"
)

func parseFile(t *testing.T, name string) *Config {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	c, err := parseYAML(t, string(text))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return c
}

func parseYAML(t *testing.T, text string) (*Config, error) {
	t.Helper()
	raw, err := yaml.YAMLToJSON([]byte(text))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return Parse(raw)
}

// managerOf returns the connection manager of a listener's first chain.
func managerOf(t *testing.T, c *Config, listener int) *hcmv3.HttpConnectionManager {
	t.Helper()
	m := &hcmv3.HttpConnectionManager{}
	if err := c.Resources.Listeners[listener].GetFilterChains()[0].GetFilters()[0].GetTypedConfig().UnmarshalTo(m); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestParsePublished(t *testing.T) {
	c := parseFile(t, "api-traffic-split.yaml")
	if c.Key() != "CiliumEnvoyConfig/production/api-traffic-split" {
		t.Errorf("key %q", c.Key())
	}
	if l, ok := c.ListenerFor("production", "api-service", 80); !ok || l != "api-listener" {
		t.Errorf("listener %q, %v", l, ok)
	}
	if _, ok := c.ListenerFor("production", "api-service-v1", 80); ok {
		t.Error("a backend service leads to a listener")
	}
	want := []string{"production/api-service", "production/api-service-v1", "production/api-service-v2"}
	if got := c.ServiceNames(); !slices.Equal(got, want) {
		t.Errorf("services %q", got)
	}
	routes := managerOf(t, c, 0).GetRouteConfig().GetVirtualHosts()[0].GetRoutes()
	header := routes[0].GetMatch().GetHeaders()[0]
	if header.GetStringMatch().GetExact() != "true" {
		t.Errorf("exact_match was not rewritten: %v", header)
	}
	if w := routes[1].GetRoute().GetWeightedClusters().GetClusters(); len(w) != 2 || w[0].GetWeight().GetValue() != 90 {
		t.Errorf("weights %v", w)
	}
}

// TestParseOldForms: what manifests in use say is what today's fields say.
func TestParseOldForms(t *testing.T) {
	c := parseFile(t, "traffic-management.yaml")
	if l, ok := c.ListenerFor("default", "echo-service-1", 8080); !ok || l != "envoy-lb-listener" {
		t.Errorf("listener %q, %v", l, ok)
	}
	if _, ok := c.ListenerFor("default", "echo-service-1", 80); ok {
		t.Error("a port that is not listed leads to a listener")
	}
	if _, ok := c.ListenerFor("default", "echo-service-2", 1); !ok {
		t.Error("a service without namespace is not that of default")
	}
	route := c.Resources.Routes[0].GetVirtualHosts()[0].GetRoutes()[0]
	h := route.GetMatch().GetHeaders()
	if h[0].GetStringMatch().GetPrefix() != "p" || h[1].GetStringMatch().GetSuffix() != "s" || h[2].GetStringMatch().GetContains() != "c" ||
		h[3].GetStringMatch().GetSafeRegex().GetRegex() != "[0-9]+" || !h[3].GetInvertMatch() || !h[4].GetPresentMatch() {
		t.Errorf("headers %v", h)
	}
	if h[3].GetStringMatch().GetSafeRegex().GetEngineType() != nil {
		t.Error("the regular expression has an engine")
	}
	add := route.GetRequestHeadersToAdd()
	if add[0].GetAppendAction() != corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD ||
		add[1].GetAppendAction() != corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD || add[0].GetAppend() != nil { //nolint:staticcheck // it must be gone
		t.Errorf("headers to add %v", add)
	}
	cluster := c.Resources.Clusters[0]
	options := &httpoptionsv3.HttpProtocolOptions{}
	if err := cluster.GetTypedExtensionProtocolOptions()[httpOptions].UnmarshalTo(options); err != nil {
		t.Fatal(err)
	}
	if n := options.GetExplicitHttpConfig().GetHttp2ProtocolOptions().GetMaxConcurrentStreams().GetValue(); n != 10 {
		t.Errorf("http2 options %v", options)
	}
	if cluster.GetEdsClusterConfig().GetEdsConfig().GetAds() == nil || managerOf(t, c, 0).GetRds().GetConfigSource().GetAds() == nil {
		t.Error("no source of endpoints or routes")
	}
}
