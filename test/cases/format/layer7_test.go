// SPDX-License-Identifier: Apache-2.0

package format

import (
	"slices"
	"testing"

	"go.yaml.in/yaml/v3"
)

func TestRequest(t *testing.T) {
	for text, want := range map[string][]string{
		`{http: {method: PUT, headers: {X-A: b}}}`:                  {"X-A: b"},
		`{http: {headers: {X-A: [b, c]}}}`:                          {"X-A: b", "X-A: c"},
		`{http: {headers: ["X-A: b", "X-C: d"]}}`:                   {"X-A: b", "X-C: d"},
		`{http: {headers: [{name: X-A, value: b}, {X-C: [d, e]}]}}`: {"X-A: b", "X-C: d", "X-C: e"},
		`{http: {}}`: nil,
	} {
		var e Expectation
		if err := yaml.Unmarshal([]byte(text), &e); err != nil {
			t.Fatal(err)
		}
		http, _, _, err := e.Request()
		if err != nil || http == nil || !slices.Equal(http.Headers, want) || http.Path != "/" {
			t.Errorf("%s: %+v, %v; want headers %q", text, http, err, want)
		}
		if !e.IsLayer7() {
			t.Errorf("%s: not above L4", text)
		}
	}
	var e Expectation
	if err := yaml.Unmarshal([]byte(`{tls: {}, upstream_headers: {X-A: [b], X-C: []}, status: 403, rcode: refused}`), &e); err != nil {
		t.Fatal(err)
	}
	_, _, tls, err := e.Request()
	if err != nil || tls == nil || tls.SNI != "" {
		t.Errorf("tls: %+v, %v", tls, err)
	}
	upstream, err := e.Upstream()
	if err != nil || !slices.Equal(upstream["X-A"], []string{"b"}) || len(upstream) != 2 || len(upstream["X-C"]) != 0 {
		t.Errorf("upstream_headers: %v, %v", upstream, err)
	}
	if e.WantStatus() != "403" || e.WantRCode() != "REFUSED" {
		t.Errorf("status %q, rcode %q", e.WantStatus(), e.WantRCode())
	}
}
