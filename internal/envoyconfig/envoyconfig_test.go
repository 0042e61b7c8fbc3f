// SPDX-License-Identifier: Apache-2.0

package envoyconfig

import (
	"os"
	"slices"
	"testing"

	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
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
